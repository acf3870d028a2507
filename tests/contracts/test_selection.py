"""Shared claims of SHAPE 2 (score -> select -> slice)."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partwise.checks import InputError
from partwise.selection import select, select_prefixes, spend

# Few different values, so that ties are common.
SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=9)
PRICED = st.lists(st.tuples(st.integers(-3, 3).map(float), st.integers(1, 4)), min_size=1, max_size=7)
GROUPS = st.lists(st.lists(st.integers(0, 6).map(float), min_size=1, max_size=4), min_size=1, max_size=4)


@st.composite
def selections(draw: st.DrawFn) -> tuple[Tensor, int, Tensor]:
    scores = draw(SCORES)
    protect = draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    keep = draw(st.integers(sum(protect), len(scores)))
    return torch.tensor(scores), keep, torch.tensor(protect)


def select_slowly(scores: Sequence[float], keep: int, protect: Sequence[bool]) -> list[int]:
    """Take the best part that is left, protected ones first, one at a time."""
    chosen: list[int] = []
    for _ in range(keep):
        rest = [index for index in range(len(scores)) if index not in chosen]
        must = [index for index in rest if protect[index]]
        chosen.append(max(must or rest, key=lambda index: (scores[index], -index)))
    return sorted(chosen)


def prefix_choices(groups: Sequence[Sequence[float]], costs: Sequence[int], budget: int, at_least: int) -> Iterator[tuple[int, ...]]:
    """Every way to keep leading parts within the budget."""
    ranges = [range(min(at_least, len(group)), len(group) + 1) for group in groups]
    for kept in itertools.product(*ranges):
        if sum(number * cost for number, cost in zip(kept, costs, strict=True)) <= budget:
            yield kept


def total_value(groups: Sequence[Sequence[float]], kept: Sequence[int]) -> float:
    return sum(sum(group[:number]) for group, number in zip(groups, kept, strict=True))


@given(selections())
def test_select_agrees_with_taking_the_best_part_one_at_a_time(case: tuple[Tensor, int, Tensor]):
    scores, keep, protect = case
    assert select(scores, keep=keep, protect=protect).tolist() == select_slowly(scores.tolist(), keep, protect.tolist())


@given(selections())
def test_select_keeps_exactly_the_number_asked_for_and_every_protected_part(case: tuple[Tensor, int, Tensor]):
    scores, keep, protect = case
    chosen = select(scores, keep=keep, protect=protect).tolist()
    assert len(set(chosen)) == keep
    assert chosen == sorted(chosen)
    assert set(protect.nonzero().flatten().tolist()) <= set(chosen)


@given(selections())
def test_a_part_that_stays_at_a_small_number_stays_at_a_larger_one(case: tuple[Tensor, int, Tensor]):
    scores, keep, protect = case
    chosen = [set(select(scores, keep=number, protect=protect).tolist()) for number in range(keep, len(scores) + 1)]
    assert all(small <= large for small, large in itertools.pairwise(chosen))


@given(selections())
def test_selecting_changes_neither_scores_nor_mask(case: tuple[Tensor, int, Tensor]):
    scores, keep, protect = case
    scores_before, protect_before = scores.clone(), protect.clone()
    select(scores, keep=keep, protect=protect)
    spend(scores, [1] * len(scores), budget=keep)
    assert torch.equal(scores, scores_before)
    assert torch.equal(protect, protect_before)


def test_of_equal_scores_the_lower_index_stays_in_a_tensor_too_long_for_an_unstable_sort():
    assert select(torch.zeros(10_000), keep=3).tolist() == [0, 1, 2]


def test_protected_parts_stay_even_when_every_score_is_the_largest_number_there_is():
    largest = torch.full((4,), torch.finfo(torch.float32).max)
    assert select(largest, keep=2, protect=torch.tensor([False, False, False, True])).tolist() == [0, 3]


@given(PRICED, st.integers(0, 12), st.integers(0, 7) | st.none())
def test_spending_never_exceeds_budget_or_limit_and_leaves_nothing_that_fits(parts: list[tuple[float, int]], budget: int, limit: int | None):
    scores, costs = zip(*parts, strict=True)
    bought = spend(scores, costs, budget=budget, limit=limit)
    paid = sum(costs[index] for index in bought)
    assert len(set(bought)) == len(bought)
    assert paid <= budget
    if limit is None or len(bought) < limit:
        assert all(costs[index] > budget - paid for index in range(len(costs)) if index not in bought)
    else:
        assert len(bought) == limit


@given(PRICED, st.integers(0, 12))
def test_spending_goes_by_score_and_then_by_index(parts: list[tuple[float, int]], budget: int):
    scores, costs = zip(*parts, strict=True)
    bought = spend(scores, costs, budget=budget)
    assert bought == sorted(bought, key=lambda index: (-scores[index], index))
    for index in set(range(len(costs))) - set(bought):
        paid_before = sum(costs[other] for other in bought if (-scores[other], other) < (-scores[index], index))
        assert costs[index] > budget - paid_before, "a better part was passed over although it fitted when its turn came"


@given(SCORES, st.integers(0, 8))
def test_with_equal_costs_a_larger_budget_buys_the_same_parts_and_then_more(scores: list[float], budget: int):
    costs = [1] * len(scores)
    smaller, larger = spend(scores, costs, budget=budget), spend(scores, costs, budget=budget + 1)
    assert larger[: len(smaller)] == smaller


@given(st.lists(st.integers(0, 6).map(float), min_size=1, max_size=7), st.integers(0, 7))
def test_with_equal_costs_no_other_purchase_is_worth_more(scores: list[float], budget: int):
    bought = spend(scores, [1] * len(scores), budget=budget)
    best = max(sum(choice) for size in range(budget + 1) for choice in itertools.combinations(scores, min(size, len(scores))))
    assert sum(scores[index] for index in bought) == best


@given(SCORES, st.integers(0, 8))
def test_spending_on_a_list_and_on_a_tensor_is_the_same(scores: list[float], budget: int):
    costs = [2] * len(scores)
    assert spend(scores, costs, budget=budget) == spend(torch.tensor(scores), costs, budget=budget)


@st.composite
def prefix_cases(draw: st.DrawFn) -> tuple[list[list[float]], list[int], int, int]:
    groups = draw(GROUPS)
    costs = draw(st.lists(st.integers(1, 3), min_size=len(groups), max_size=len(groups)))
    at_least = draw(st.integers(0, 2))
    lowest = sum(min(at_least, len(group)) * cost for group, cost in zip(groups, costs, strict=True))
    highest = sum(len(group) * cost for group, cost in zip(groups, costs, strict=True))
    return groups, costs, draw(st.integers(lowest, highest)), at_least


@given(prefix_cases())
def test_prefixes_stay_within_budget_above_the_minimum_and_leave_no_part_that_fits(case: tuple[list[list[float]], list[int], int, int]):
    groups, costs, budget, at_least = case
    kept = select_prefixes(groups, costs, budget=budget, at_least=at_least)
    left = budget - sum(number * cost for number, cost in zip(kept, costs, strict=True))
    assert left >= 0
    for group, cost, number in zip(groups, costs, kept, strict=True):
        assert min(at_least, len(group)) <= number <= len(group)
        assert number == len(group) or cost > left


@given(prefix_cases())
def test_with_equal_costs_and_values_that_do_not_rise_no_other_prefixes_are_worth_more(case: tuple[list[list[float]], list[int], int, int]):
    groups, _, _, at_least = case
    falling = [sorted(group, reverse=True) for group in groups]
    costs = [1] * len(groups)
    for budget in range(sum(min(at_least, len(group)) for group in groups), sum(map(len, groups)) + 1):
        kept = select_prefixes(falling, costs, budget=budget, at_least=at_least)
        assert sum(kept) == budget
        assert total_value(falling, kept) == max(total_value(falling, other) for other in prefix_choices(falling, costs, budget, at_least))


@given(prefix_cases())
def test_with_equal_costs_and_values_that_do_not_rise_a_larger_budget_only_adds(case: tuple[list[list[float]], list[int], int, int]):
    groups, _, _, at_least = case
    falling = [sorted(group, reverse=True) for group in groups]
    budgets = range(sum(min(at_least, len(group)) for group in groups), sum(map(len, groups)) + 1)
    choices = [select_prefixes(falling, [1] * len(groups), budget=budget, at_least=at_least) for budget in budgets]
    for smaller, larger in itertools.pairwise(choices):
        assert all(fewer <= more for fewer, more in zip(smaller, larger, strict=True))


def test_a_strong_part_behind_a_weak_one_pulls_both_in():
    assert select_prefixes([[1.0, 0.1, 5.0], [1.0, 2.0, 0.0]], [1, 1], budget=4) == [3, 1]


def test_a_run_that_no_longer_fits_gives_way_to_its_affordable_beginning():
    assert select_prefixes([[1.0, 0.5, 5.0], [1.0, 0.2]], [1, 1], budget=3) == [2, 1]


def test_value_per_cost_decides_when_costs_differ():
    assert select_prefixes([[9.0, 4.0], [9.0, 3.0, 3.0]], [2, 1], budget=5) == [1, 3]


def test_equal_values_are_given_to_the_lower_group():
    assert select_prefixes([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [1, 1, 1], budget=4) == [2, 1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_is_counted_and_refused(bad: float):
    with pytest.raises(InputError, match=r"scores has 1 NaN or infinite entries out of 3"):
        select(torch.tensor([1.0, bad, 2.0]), keep=1)
    with pytest.raises(InputError, match=r"scores has 2 NaN or infinite entries out of 3"):
        spend([bad, 1.0, bad], [1, 1, 1], budget=2)
    with pytest.raises(InputError, match=r"values\[1\] has 1 NaN or infinite entries out of 2"):
        select_prefixes([[1.0], [1.0, bad]], [1, 1], budget=2)


def test_scores_with_two_dimensions_are_refused():
    with pytest.raises(InputError, match=r"scores of shape \(2, 3\), expected one number per part"):
        select(torch.ones(2, 3), keep=1)


@pytest.mark.parametrize("keep", [-1, 4])
def test_keeping_more_parts_than_there_are_is_refused(keep: int):
    with pytest.raises(InputError, match=rf"keep={keep} for 3 parts, expected a number from 0 to 3"):
        select(torch.ones(3), keep=keep)


@pytest.mark.parametrize("protect", [torch.ones(2, dtype=torch.bool), torch.ones(3)], ids=["too short", "floats"])
def test_a_protect_mask_that_does_not_fit_is_refused(protect: Tensor):
    with pytest.raises(InputError, match="expected one boolean for each of 3 parts"):
        select(torch.ones(3), keep=3, protect=protect)


def test_protecting_more_parts_than_may_stay_names_both_numbers():
    with pytest.raises(InputError, match=r"protect marks 3 parts but keep=2.*Raise keep, or protect fewer"):
        select(torch.ones(3), keep=2, protect=torch.ones(3, dtype=torch.bool))


def test_costs_that_do_not_fit_the_scores_are_refused():
    with pytest.raises(InputError, match="got 1 costs for 2 scores or groups"):
        spend([1.0, 2.0], [1], budget=1)
    with pytest.raises(InputError, match="got a cost of 0, expected every cost to be at least 1"):
        select_prefixes([[1.0]], [0], budget=1)


@pytest.mark.parametrize(("budget", "limit"), [(-1, None), (1, -1)])
def test_a_negative_budget_is_refused(budget: int, limit: int | None):
    with pytest.raises(InputError, match=rf"budget={budget} and limit={limit}, expected both to be at least 0"):
        spend([1.0], [1], budget=budget, limit=limit)
    with pytest.raises(InputError, match="at_least=-1, expected at least 0"):
        select_prefixes([[1.0]], [1], budget=1, at_least=-1)


@pytest.mark.parametrize(("budget", "got"), [(2, "must stay of 2 groups costs 3"), (7, "all parts of 2 groups cost 6")])
def test_a_budget_that_cannot_be_met_names_the_range(budget: int, got: str):
    with pytest.raises(InputError, match=rf"budget of {budget}, .*{got}\. Pass a budget from 3 to 6"):
        select_prefixes([[1.0, 1.0], [1.0, 1.0]], [1, 2], budget=budget)


def test_importing_selection_does_not_import_torch():
    subprocess.run([sys.executable, "-c", "import partwise.selection, sys; assert 'torch' not in sys.modules"], check=True)
