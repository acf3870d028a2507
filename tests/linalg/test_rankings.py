from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partwise.checks import InputError
from partwise.linalg.rankings import filter_distance

orders = st.integers(1, 40).flatmap(lambda size: st.permutations(range(size)))


def ranking_with_ranks(ranks: tuple[int, ...]) -> list[int]:
    """The ranking in which filter i has rank ``ranks[i]``, the best is 1."""
    return sorted(range(len(ranks)), key=lambda unit: ranks[unit])


def distance_slowly(sigma: tuple[int, ...]) -> float:
    return sum(abs(math.log(i) - math.log(there)) / i for i, there in enumerate(sigma, start=1))


@pytest.mark.parametrize(
    ("sigma", "known"),
    [
        (tuple(range(1, 65)), 0.0),
        ((2, 1, *range(3, 65)), 1.5 * math.log(2)),
        ((*range(1, 63), 64, 63), 4.9604e-4),
        ((2, 3, 1), 1.26208),
        ((3, 1, 2), 1.58034),
        (tuple(range(64, 0, -1)), 11.1566),
    ],
    ids=["same", "first two", "last two of 64", "cycle", "its inverse", "reversal of 64"],
)
def test_known_distances_come_out(sigma: tuple[int, ...], known: float) -> None:
    assert filter_distance(range(len(sigma)), ranking_with_ranks(sigma)) == pytest.approx(known, rel=1e-5)


def test_random_orders_of_64_filters_are_8_33_apart_in_the_mean() -> None:
    logs = np.log(np.arange(1, 65))
    exact = float((np.abs(logs[:, None] - logs).mean(axis=1) / np.arange(1, 65)).sum())
    assert exact == pytest.approx(8.325, abs=0.001)
    rng = random.Random(0)
    drawn = [filter_distance(range(64), rng.sample(range(64), 64)) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(exact, abs=5 * np.std(drawn) / math.sqrt(2000))


@given(orders)
def test_the_distance_is_the_sum_over_ranks_and_zero_for_the_same_order_only(order: list[int]) -> None:
    sigma = tuple(order.index(unit) + 1 for unit in range(len(order)))
    distance = filter_distance(range(len(order)), order)
    assert distance == pytest.approx(distance_slowly(sigma))
    assert (distance == 0) == (order == sorted(order))


@given(orders, st.randoms())
def test_names_of_filters_do_not_matter(order: list[int], rng: random.Random) -> None:
    reference, names = list(range(len(order))), rng.sample(range(1000), len(order))
    assert filter_distance([names[unit] for unit in reference], [names[unit] for unit in order]) == filter_distance(reference, order)


@given(st.integers(3, 40), st.data())
def test_a_swap_of_neighbours_counts_more_the_higher_it_is(size: int, data: st.DataObject) -> None:
    lower = data.draw(st.integers(1, size - 2))
    higher = data.draw(st.integers(0, lower - 1))

    def swapped(place: int) -> list[int]:
        order = list(range(size))
        order[place : place + 2] = order[place + 1], order[place]
        return order

    assert filter_distance(range(size), swapped(higher)) > filter_distance(range(size), swapped(lower)) > 0


def test_it_is_not_symmetric() -> None:
    assert filter_distance([0, 1, 2], [2, 0, 1]) != pytest.approx(filter_distance([2, 0, 1], [0, 1, 2]))


def test_arrays_and_tensors_are_rankings_too() -> None:
    reference, order = [2, 0, 1], [0, 1, 2]
    assert filter_distance(np.array(reference), np.array(order)) == filter_distance(reference, order)
    assert filter_distance(torch.tensor(reference), torch.tensor(order)) == filter_distance(reference, order)


@pytest.mark.parametrize(
    ("reference", "ranking", "code", "text"),
    [
        ([], [], "empty-ranking", r"a reference of no filters, expected at least one"),
        ([1, 2], [], "empty-ranking", r"a ranking of no filters"),
        ([1, 2], [1, 1], "ranking-repeats", r"filter 1 at ranks 1 and 2 of ranking, expected every filter once"),
        ([1, 2], [1, 2, 3], "rankings-differ", r"rankings of 2 and 3 filters; 3 is in ranking and not in reference"),
        ([1, 2], [1, 3], "rankings-differ", r"2 is in reference and not in ranking, expected the same filters"),
    ],
)
def test_rankings_that_cannot_be_compared_are_refused(reference: list[int], ranking: list[int], code: str, text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        filter_distance(reference, ranking)
    assert caught.value.code == code


def test_comparing_rankings_loads_nothing_heavy() -> None:
    code = "import sys, partwise.linalg.rankings; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
