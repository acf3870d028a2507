"""Sums of subsets whose members may move, against trying one subset after the other."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partwise.checks import InputError
from partwise.linalg.subset_sums import best_subset_errors, errors_by_size, subset_sums
from tolerances import assert_close

NUMBERS = st.floats(-1, 1, allow_subnormal=False)
CANDIDATES = st.lists(NUMBERS, max_size=7)
TARGETS = st.lists(NUMBERS, min_size=1, max_size=4)


def best_error_slowly(candidates: list[float], target: float, radius: float) -> float:
    best = math.inf
    for size in range(len(candidates) + 1):
        for chosen in itertools.combinations(candidates, size):
            lowest, highest = sum(each - radius for each in chosen), sum(each + radius for each in chosen)
            best = min(best, max(0.0, lowest - target, target - highest))
    return best


@given(CANDIDATES, TARGETS, st.floats(0, 0.5))
def test_the_error_is_that_of_trying_every_subset_with_its_members_moved_as_far_as_they_may(
    candidates: list[float], targets: list[float], radius: float
) -> None:
    slowly = np.array([best_error_slowly(candidates, target, radius) for target in targets])
    assert_close(best_subset_errors(candidates, targets, radius=radius), slowly, claim="itertools finds the same")


@given(CANDIDATES, TARGETS)
def test_distances_by_size_are_those_of_the_combinations_of_that_size(candidates: list[float], targets: list[float]) -> None:
    slowly = [
        [min(abs(target - sum(chosen)) for chosen in itertools.combinations(candidates, size)) for target in targets] for size in range(len(candidates) + 1)
    ]
    assert_close(errors_by_size(candidates, targets), np.array(slowly), claim="size by size")


@given(CANDIDATES)
def test_subset_number_i_holds_the_candidates_whose_bits_are_set(candidates: list[float]) -> None:
    sums, sizes = subset_sums(candidates)
    members = [[value for bit, value in enumerate(candidates) if number >> bit & 1] for number in range(2 ** len(candidates))]
    assert_close(sums, np.array([sum(chosen) for chosen in members], dtype=np.float64), claim="sums")
    assert sizes.tolist() == [len(chosen) for chosen in members]


@given(CANDIDATES, NUMBERS, st.floats(0, 0.2), st.floats(0, 0.2))
def test_more_room_to_move_and_more_candidates_never_hurt(candidates: list[float], target: float, radius: float, more: float) -> None:
    error = best_subset_errors(candidates, [target], radius=radius)[0]
    assert best_subset_errors(candidates, [target], radius=radius + more)[0] <= error + 1e-15
    assert best_subset_errors([*candidates, 0.3], [target], radius=radius)[0] <= error + 1e-15


@given(st.lists(NUMBERS, min_size=1, max_size=6), st.data())
def test_a_sum_of_candidates_is_reached_exactly(candidates: list[float], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.booleans(), min_size=len(candidates), max_size=len(candidates)))
    target = sum(value for value, taken in zip(candidates, chosen, strict=True) if taken)
    assert best_subset_errors(candidates, [target])[0] <= 1e-15


def test_the_limits_are_the_empty_subset_and_everything() -> None:
    assert best_subset_errors([], [0.4, -0.2]).tolist() == [0.4, 0.2]
    assert best_subset_errors([0.1], [100.0], radius=math.inf).tolist() == [0.0]
    assert best_subset_errors([], [100.0], radius=math.inf).tolist() == [100.0]


# Computed once with other code and other random numbers, each the mean of 200: number of candidates -> radius -> mean error.
KNOWN = {
    6: {0.0: 3.0e-2, 0.001: 2.8e-2, 0.01: 1.7e-2},
    9: {0.0: 7.8e-3, 0.001: 5.7e-3, 0.01: 3.6e-3},
    12: {0.0: 2.0e-3, 0.001: 1.4e-3, 0.01: 9.0e-4},
}


@pytest.mark.parametrize("num_candidates", KNOWN)
@pytest.mark.parametrize("radius", [0.0, 0.001, 0.01])
def test_mean_errors_of_uniform_numbers_are_those_that_other_code_found(num_candidates: int, radius: float) -> None:
    generator = np.random.default_rng(num_candidates)
    draws = [(generator.uniform(-1, 1, num_candidates), generator.uniform(-0.5, 0.5, 1)) for _ in range(2000)]
    errors = np.concatenate([best_subset_errors(candidates, target, radius=radius) for candidates, target in draws])
    noise = errors.std() * math.sqrt(1 / 200 + 1 / 2000)  # a few targets that no subset comes near make the mean of 200 uncertain
    assert abs(errors.mean() - KNOWN[num_candidates][radius]) < 4 * noise


@pytest.mark.parametrize(
    ("candidates", "targets", "radius", "code", "text"),
    [
        ([0.1], [0.2], -0.1, "radius-range", r"got radius=-0\.1, expected 0 or more"),
        ([0.1] * 21, [0.2], 0.0, "too-many-candidates", r"got 21 candidates, expected at most 20"),
        ([0.1, math.nan], [0.2], 0.0, "not-finite", r"candidates has 1 NaN or infinite entries out of 2"),
        ([0.1], [math.inf], 0.0, "not-finite", r"targets has 1 NaN or infinite entries out of 1"),
    ],
)
def test_numbers_that_cannot_be_tried_are_refused(candidates: list[float], targets: list[float], radius: float, code: str, text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        best_subset_errors(candidates, targets, radius=radius)
    assert caught.value.code == code
