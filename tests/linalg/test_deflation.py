from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from matrices import gaussian
from partwise.linalg.deflation import deflate, deflation_errors, pair_distances
from tolerances import assert_close

sizes = st.integers(1, 6)


def deflate_slowly(matrix: NDArray[Any], left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    rest = matrix.copy()
    for one, other in zip(left, right, strict=True):
        rest -= np.outer(one, other)
    return rest


def distance_slowly(pair: tuple[NDArray[Any], NDArray[Any]], other: tuple[NDArray[Any], NDArray[Any]]) -> NDArray[Any]:
    return np.linalg.norm(np.outer(*pair) - np.outer(*other))


@given(sizes, sizes, st.integers(0, 4))
def test_deflate_agrees_with_removing_one_part_at_a_time(rows: int, columns: int, count: int) -> None:
    matrix, left, right = gaussian(rows, columns), gaussian(count, rows, seed=1), gaussian(count, columns, seed=2)
    kept = matrix.copy()
    assert_close(deflate(matrix, left, right), deflate_slowly(matrix, left, right), claim="same sum, other order")
    assert_close(matrix, kept, claim="the matrix is not changed", rtol=0.0, atol=0.0)


@given(sizes, sizes)
def test_distances_agree_with_forming_both_matrices(rows: int, columns: int) -> None:
    left, right, other_left, other_right = gaussian(3, rows), gaussian(3, columns, seed=1), gaussian(3, rows, seed=2), gaussian(3, columns, seed=3)
    expected = np.array([distance_slowly((left[k], right[k]), (other_left[k], other_right[k])) for k in range(3)])
    assert_close(pair_distances(left, right, other_left, other_right), expected, claim="same norm")


def test_distances_do_not_see_signs_or_how_the_size_is_split() -> None:
    left, right = gaussian(4, 5), gaussian(4, 3, seed=1)
    assert_close(pair_distances(-3 * left, right / -3, left, right), np.zeros(4), claim="the same matrices")


def test_tiny_distances_are_not_lost_in_cancellation() -> None:
    left, right = gaussian(1, 50), gaussian(1, 40, seed=1)
    across = gaussian(1, 50, seed=2)
    across -= (across @ left.T) / (left @ left.T) * left
    moved = pair_distances(left + 1e-13 * across, right, left, right)
    expected = 1e-13 * np.linalg.norm(across, axis=1) * np.linalg.norm(right, axis=1)
    assert_close(moved, expected, claim="1e-13 is seen as 1e-13, to the digits that left + 1e-13 keeps", rtol=0.05)


def test_a_part_of_zeros_has_the_error_one_and_the_exact_part_zero() -> None:
    left, right = gaussian(2, 5), gaussian(2, 3, seed=1)
    errors = deflation_errors(np.stack([0 * left[0], left[1]]), right, left, right)
    assert_close(errors, np.array([1.0, 0.0]), claim="absent and exact")
