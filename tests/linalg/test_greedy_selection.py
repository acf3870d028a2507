"""Claims about greedy forward selection: what it picks, how fast its error falls, and that inner products are enough."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partwise.checks import InputError
from partwise.linalg.greedy_selection import AMOUNTS, Amounts, Course, Subset, greedy_course, greedy_subset
from tolerances import assert_close


def problem(num_units: int, num_examples: int, *, seed: int = 0, inside: bool = False) -> tuple[Tensor, Tensor]:
    """Units, one in each row, and a target: the mean of all units, or anything."""
    generator = torch.Generator().manual_seed(seed)
    units = torch.randn(num_units, num_examples, generator=generator, dtype=torch.float64)
    return units, units.mean(0) if inside else torch.randn(num_examples, generator=generator, dtype=torch.float64)


def products(units: Tensor, target: Tensor) -> tuple[Tensor, Tensor, float]:
    return units @ units.T, units @ target, float(target @ target)


def loss(units: Tensor, target: Tensor, weights: Tensor) -> float:
    """Half the squared distance of a weighted sum from the target, evaluated as it is written."""
    return 0.5 * float((weights @ units - target).square().sum())


def with_one_more(units: Tensor, target: Tensor, added: Tensor, unit: int, amounts: Amounts) -> Tensor:
    """How much was added of each unit, after a step about one of them."""
    after = added.clone()
    if amounts == "equal":
        after[unit] += 1
    elif bool(units[unit].any()):
        rest = target - added @ units
        after[unit] = max(0.0, float(added[unit] + rest @ units[unit] / (units[unit] @ units[unit])))
    return after


def course_slowly(units: Tensor, target: Tensor, *, num_steps: int, amounts: Amounts, allow_repeats: bool) -> Course:
    """Try every unit at every step."""
    chosen: list[int] = []
    losses: list[float] = []
    added = torch.zeros(len(units), dtype=torch.float64)
    for number in range(1, num_steps + 1):
        scale = 1 / number if amounts == "equal" else 1.0
        tried = {
            unit: loss(units, target, scale * with_one_more(units, target, added, unit, amounts))
            for unit in range(len(units))
            if allow_repeats or unit not in chosen
        }
        best = min(tried, key=lambda unit: (tried[unit], unit))
        added = with_one_more(units, target, added, best, amounts)
        chosen.append(best)
        losses.append(tried[best])
    return Course(tuple(chosen), tuple(losses))


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from(AMOUNTS), st.booleans(), st.booleans())
def test_inner_products_choose_what_trying_every_unit_chooses(
    num_units: int, num_examples: int, seed: int, amounts: Amounts, allow_repeats: bool, inside: bool
):
    units, target = problem(num_units, num_examples, seed=seed, inside=inside)
    num_steps = 6 if allow_repeats else num_units
    fast = greedy_course(*products(units, target), num_steps=num_steps, amounts=amounts, allow_repeats=allow_repeats)
    slow = course_slowly(units, target, num_steps=num_steps, amounts=amounts, allow_repeats=allow_repeats)
    for ours, theirs, one, other in zip(fast.losses, slow.losses, fast.chosen, slow.chosen, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)
        if one != other:  # equally good but for rounding; from here on both may go their own way
            break


@pytest.mark.parametrize("amounts", AMOUNTS)
def test_a_unit_that_is_the_target_is_chosen_first_and_nothing_is_left(amounts: Amounts):
    units, _ = problem(30, 20)
    course = greedy_course(*products(units, units[17]), num_steps=1, amounts=amounts)
    assert course.chosen == (17,)
    assert course.losses[0] < 1e-12


@pytest.mark.parametrize("amounts", AMOUNTS)
def test_of_one_unit_that_one_is_chosen(amounts: Amounts):
    units, target = problem(1, 5)
    assert greedy_course(*products(units, target), num_steps=3, amounts=amounts).chosen == (0, 0, 0)
    assert greedy_subset(*products(units, target), num_units=1, max_steps=5, amounts=amounts).units == (0,)


@pytest.mark.parametrize("amounts", AMOUNTS)
def test_of_equal_units_the_one_with_the_lowest_index_is_chosen(amounts: Amounts):
    units = torch.tensor([[0.0, 2.0], [4.0, 1.0], [4.0, 1.0], [4.0, 1.0]], dtype=torch.float64)
    assert greedy_course(*products(units, torch.tensor([4.0, 1.0], dtype=torch.float64)), num_steps=3, amounts=amounts).chosen[0] == 1


def test_equal_units_are_added_in_their_order_where_each_has_one_step():
    units = torch.tensor([[0.0, 2.0], [4.0, 1.0], [4.0, 1.0], [4.0, 1.0]], dtype=torch.float64)
    assert greedy_course(*products(units, units[3]), num_steps=3, allow_repeats=False).chosen == (1, 2, 3)


def exponent(steps: np.ndarray, losses: np.ndarray) -> float:
    """Of the power of the number of steps that the errors follow."""
    return float(np.polyfit(np.log(steps), np.log(losses), 1)[0])


@pytest.mark.parametrize("seed", range(3))
def test_the_error_falls_with_the_square_of_the_steps_where_the_target_is_a_mean_of_units_and_at_random_with_the_steps(seed: int):
    generator = torch.Generator().manual_seed(seed)
    inputs, weights, signs = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((10, 10), (200, 10), (200, 1)))
    units = (weights @ inputs.T).relu() * signs  # (200 neurons, 10 examples)
    target = units[:40].mean(0)
    steps = np.arange(50, 501)
    losses = np.array(greedy_course(*products(units, target), num_steps=500).losses)
    assert exponent(steps, losses[steps - 1]) == pytest.approx(-2, abs=0.25)
    numbers, draws = np.array([5, 20, 80, 200]), np.random.default_rng(seed)
    by_chance = np.array([np.mean([0.5 * float((units[draws.integers(40, size=k)].mean(0) - target).square().sum()) for _ in range(100)]) for k in numbers])
    assert exponent(numbers, by_chance) == pytest.approx(-1, abs=0.15)
    assert all(losses[k - 1] < chance for k, chance in zip(numbers, by_chance, strict=True))


def test_fitted_amounts_never_raise_the_error_and_end_at_the_best_weights_that_are_not_negative():
    units, target = problem(12, 20, seed=3)
    losses = greedy_course(*products(units, target), num_steps=400, amounts="fitted").losses
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(losses))
    best, _ = scipy.optimize.nnls(units.T.numpy(), target.numpy())
    assert losses[-1] == pytest.approx(loss(units, target, torch.as_tensor(best)), rel=1e-9)


def evaluated(units: Tensor, target: Tensor, subset: Subset) -> float:
    return loss(units[list(subset.units)], target, subset.weights)


@given(st.integers(1, 10), st.data(), st.integers(0, 10**6), st.sampled_from(AMOUNTS), st.booleans())
def test_a_subset_has_as_many_units_as_asked_for_with_those_that_must_be_there(num_units: int, data: st.DataObject, seed: int, amounts: Amounts, repeats: bool):
    units, target = problem(num_units, 6, seed=seed)
    keep = data.draw(st.integers(1, num_units))
    must = torch.tensor([unit < data.draw(st.integers(0, keep)) for unit in range(num_units)])
    steps = data.draw(st.integers(keep, 8 * num_units))
    subset = greedy_subset(*products(units, target), num_units=keep, max_steps=steps, amounts=amounts, allow_repeats=repeats, must=must)
    assert len(subset.units) == keep == len(set(subset.units))
    assert list(subset.units) == sorted(subset.units)
    assert set(must.nonzero().flatten().tolist()) <= set(subset.units)
    assert subset.loss == pytest.approx(evaluated(units, target, subset), rel=1e-8, abs=1e-9)
    assert len(subset.course.chosen) == (steps if repeats else keep)
    assert bool((subset.weights >= 0).all())
    if amounts == "equal":
        assert float(subset.weights.sum()) == pytest.approx(1)
    if amounts == "equal" and not repeats:
        assert_close(subset.weights, subset.weights[:1].expand(keep), claim="once each, so all alike", rtol=0, atol=0)


def test_a_subset_takes_the_best_of_the_steps_at_which_the_number_of_units_was_right():
    units, target = problem(12, 9, seed=1)
    subset = greedy_subset(*products(units, target), num_units=4, max_steps=100)
    seen = [len(set(subset.course.chosen[:step])) for step in range(1, 101)]
    assert seen[-1] == 4
    assert subset.loss == min(found for found, number in zip(subset.course.losses, seen, strict=True) if number == 4)


def test_more_steps_sharpen_the_weights_of_a_subset():
    units, target = problem(40, 60, inside=True)
    few, many = (greedy_subset(*products(units, target), num_units=10, max_steps=steps) for steps in (10, 400))
    assert many.loss < few.loss


def test_units_that_do_nothing_fill_a_subset_up_and_change_nothing_when_amounts_are_fitted():
    units = torch.zeros(8, 3, dtype=torch.float64)
    units[[1, 4]] = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    subset = greedy_subset(*products(units, target), num_units=5, max_steps=40, amounts="fitted")
    assert {1, 4} < set(subset.units)
    assert subset.loss < 1e-12


def test_a_unit_that_is_better_left_out_makes_room_for_another():
    """The first unit is the best start, and of no use once the two that it stood for are there."""
    units = torch.zeros(4, 4, dtype=torch.float64)
    units[0] = torch.tensor([1.0, 1.0, 0.6, 0.0])
    units[[1, 2, 3], [0, 1, 3]] = 2.0
    target = torch.tensor([1.0, 1.0, -0.05, 0.05], dtype=torch.float64)
    subset = greedy_subset(*products(units, target), num_units=3, max_steps=200, amounts="fitted")
    assert subset.course.chosen[:3] == (0, 1, 2)
    assert subset.units == (1, 2, 3)
    assert subset.loss == pytest.approx(0.5 * 0.05**2)


def test_a_subset_that_points_away_from_the_target_gets_no_weight():
    units = torch.tensor([[-1.0, 0.0], [1.0, 5.0]], dtype=torch.float64)
    subset = greedy_subset(
        *products(units, torch.tensor([2.0, 0.0], dtype=torch.float64)), num_units=1, max_steps=4, amounts="fitted", must=torch.tensor([True, False])
    )
    assert subset.units == (0,)
    assert subset.weights.tolist() == [0.0]
    assert subset.loss == 2.0


@pytest.mark.parametrize("amounts", AMOUNTS)
def test_the_error_is_never_reported_as_negative(amounts: Amounts):
    units = torch.full((3, 7), 0.1, dtype=torch.float64)
    losses = greedy_course(*products(units, units[0]), num_steps=50, amounts=amounts).losses
    assert all(0 <= found < 1e-15 for found in losses)


def test_arguments_are_not_changed():
    units, target = problem(6, 4)
    gram, cross, square = products(units, target)
    before = gram.clone(), cross.clone()
    greedy_subset(gram, cross, square, num_units=3, max_steps=20)
    assert torch.equal(gram, before[0])
    assert torch.equal(cross, before[1])


def test_bad_numbers_are_refused_with_what_was_got():
    gram, cross, square = products(*problem(4, 3))
    with pytest.raises(InputError, match=r"num_steps=0 must be an integer of at least 1") as raised:
        greedy_course(gram, cross, square, num_steps=0)
    assert raised.value.code == "below-minimum"
    with pytest.raises(InputError, match=r"got 5 different units to choose out of 4, expected at most 4. Lower the number, or allow repeats") as raised:
        greedy_course(gram, cross, square, num_steps=5, allow_repeats=False)
    assert raised.value.code == "too-few-units"
    with pytest.raises(InputError, match=r"num_units=0 must be an integer of at least 1"):
        greedy_subset(gram, cross, square, num_units=0, max_steps=4)
    with pytest.raises(InputError, match=r"got 5 different units to choose out of 4"):
        greedy_subset(gram, cross, square, num_units=5, max_steps=9)
    with pytest.raises(InputError, match=r"max_steps=2 must be an integer of at least 3"):
        greedy_subset(gram, cross, square, num_units=3, max_steps=2)
    with pytest.raises(InputError, match=r"must marks 3 units but num_units=2, expected at most 2") as raised:
        greedy_subset(gram, cross, square, num_units=2, max_steps=9, must=torch.tensor([True, True, False, True]))
    assert raised.value.code == "too-many-protected"
    with pytest.raises(InputError, match=r"amounts='some' is not known. Choose one of: equal, fitted"):
        greedy_course(gram, cross, square, num_steps=1, amounts="some")  # type: ignore[arg-type]


def test_examples_that_are_there_a_thousand_times_choose_the_same_units():
    units, target = problem(5, 10, seed=2)
    wide = math.sqrt(1000.0)
    once = greedy_course(*products(units, target), num_steps=20)
    repeated = greedy_course(*products(units.repeat(1, 1000) / wide, target.repeat(1000) / wide), num_steps=20)
    assert repeated.chosen == once.chosen
