from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from partwise.checks import InputError
from partwise.linalg.bounds import deflation_error_bound, plan_iterations


def matrix_of(eigenvalues: NDArray[Any], seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    vectors = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues))))[0].T
    return vectors.T * eigenvalues @ vectors, vectors


def distance(vector: NDArray[Any], other: NDArray[Any]) -> float:
    return float(min(np.linalg.norm(vector - other), np.linalg.norm(vector + other)))


@given(
    log_ratios=st.lists(st.floats(0.05, 2.0), min_size=4, max_size=8),
    log_deltas=st.lists(st.floats(-12.0, -1.0), min_size=3, max_size=3),
    seed=st.integers(0, 2**32),
)
def test_no_error_crosses_its_bound_whatever_the_searches_leave(log_ratios: list[float], log_deltas: list[float], seed: int) -> None:
    eigenvalues = np.exp(-np.cumsum([0.0, *log_ratios]))
    matrix, exact = matrix_of(eigenvalues, seed)
    rng, left, deltas, errors = np.random.default_rng(seed), matrix, [], []
    for k, log_delta in enumerate(log_deltas):
        top = np.linalg.eigh(left)[1][:, -1]
        vector = top + 10**log_delta * rng.normal(size=len(top)) / len(top) ** 0.5
        vector /= np.linalg.norm(vector)
        deltas.append(distance(vector, top))
        errors.append(distance(vector, exact[k]))
        left = left - (vector @ left @ vector) * np.outer(vector, vector)
    bounds = deflation_error_bound(eigenvalues[:4].tolist(), deltas)
    assert all(error <= bound * (1 + 1e-9) + 1e-13 for error, bound in zip(errors, bounds, strict=True))


@given(st.lists(st.floats(0.1, 10.0), min_size=2, max_size=8, unique=True))
def test_exact_searches_have_no_error_and_the_first_component_has_the_error_of_its_search(values: list[float]) -> None:
    eigenvalues = sorted(values, reverse=True)
    assert deflation_error_bound(eigenvalues, [0.0] * (len(values) - 1)) == (0.0,) * (len(values) - 1)
    assert deflation_error_bound(eigenvalues[:2], [0.25]) == (0.25,)


def test_the_bound_of_three_components_by_hand() -> None:
    first = 0.01
    second = 0.02 + 2 * math.sqrt(2) * (2 * 8 * first) / 2
    third = 0.03 + 2 * math.sqrt(2) * (2 * (2 * 8 * first) + 2 * 4 * second) / 1
    assert deflation_error_bound([8.0, 4.0, 2.0, 1.0], [0.01, 0.02, 0.03]) == pytest.approx((first, second, third))
    doubled = deflation_error_bound([8.0, 4.0, 2.0, 1.0], [0.01, 0.02, 0.03], gaps=[2.0, 1.0, 0.5])
    assert doubled[1] == pytest.approx(0.02 + 2 * (second - 0.02))


@pytest.mark.parametrize("spectrum", [[3.0, 2.0, 2.0, 1.0, 0.5], [3.0, 1.0, 2.0, 1.5, 0.5]])
def test_from_a_component_without_a_gap_on_there_is_no_bound_and_it_is_named(spectrum: list[float]) -> None:
    with pytest.warns(UserWarning, match="component 2 has a gap of .* errors from component 2 on have no bound"):
        bounds = deflation_error_bound(spectrum, [1e-9] * 4)
    assert bounds[0] == 1e-9
    assert bounds[1:] == (math.inf,) * 3
    with pytest.warns(UserWarning, match="component 2 has a gap of .*: no number of steps tells it apart"):
        steps = plan_iterations(spectrum, 1e-3)
    assert math.isfinite(steps[0])
    assert steps[1:] == (math.inf,) * 3


@given(log_ratios=st.lists(st.floats(0.2, 2.0), min_size=4, max_size=6), log_target=st.floats(-6.0, -0.5), seed=st.integers(0, 2**32))
def test_power_iteration_with_the_planned_steps_reaches_the_target(log_ratios: list[float], log_target: float, seed: int) -> None:
    eigenvalues = np.exp(-np.cumsum([0.0, *log_ratios]))
    matrix, exact = matrix_of(eigenvalues, seed)
    rng, left = np.random.default_rng(seed), matrix
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = plan_iterations(eigenvalues[:4].tolist(), 10**log_target, start_tangent=100.0)
    for k, num_steps in enumerate(steps):
        top, vector = np.linalg.eigh(left)[1][:, -1], rng.normal(size=len(eigenvalues))
        across = vector - (vector @ top) * top
        vector = top + 100.0 * across / np.linalg.norm(across)  # as bad a start as was planned for
        for _ in range(int(num_steps)):
            vector = left @ vector
            vector /= np.linalg.norm(vector)
        assert distance(vector, exact[k]) <= 10**log_target
        left = left - (vector @ left @ vector) * np.outer(vector, vector)


def test_smaller_targets_and_more_components_behind_ask_for_more_steps() -> None:
    spectrum = [1.0, 0.5, 0.25, 0.125]
    loose, tight = plan_iterations(spectrum, 1e-2), plan_iterations(spectrum, 1e-4)
    assert all(fewer < more for fewer, more in zip(loose, tight, strict=True))
    firsts = [plan_iterations(spectrum, 1e-3, num_components=count)[0] for count in (1, 2, 3)]
    assert all(fewer < more for fewer, more in itertools.pairwise(firsts))
    assert plan_iterations([1.0, 0.0], 1e-3) == (1,)  # a matrix of rank one is solved by one step


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: deflation_error_bound([2.0, 1.0], [0.1, 0.1]), "got 2 eigenvalues for 2 components, expected one eigenvalue more"),
        (lambda: deflation_error_bound([2.0], []), "got 1 eigenvalues for 0 components"),
        (lambda: deflation_error_bound([2.0, 1.0], [0.1], gaps=[1.0, 1.0]), "got 2 eigenvalues and 2 gaps for 1 components.*, and as many gaps"),
        (lambda: deflation_error_bound([1.0, 2.0, 3.0], [0.1, 0.1]), r"eigenvalues=\(1\.0, 2\.0, 3\.0\), expected the largest first. Reverse them"),
        (lambda: deflation_error_bound([2.0, -1.0], [0.1]), r"eigenvalues=\(2\.0, -1\.0\), expected finite numbers of at least 0"),
        (lambda: deflation_error_bound([2.0, math.nan], [0.1]), "expected finite numbers of at least 0"),
        (lambda: deflation_error_bound([2.0, 1.0], [-0.1]), r"got deltas=\(-0\.1,\), expected distances of at least 0"),
        (lambda: plan_iterations([2.0, 1.0], 0.0), "got target=0.0 and start_tangent=1000.0, expected numbers above 0"),
        (lambda: plan_iterations([2.0, 1.0], 0.1, num_components=2), "got 2 eigenvalues for 2 components"),
        (lambda: plan_iterations([2.0], 0.1), "num_components=0 must be an integer of at least 1"),
    ],
)
def test_what_has_no_bound_is_refused(call: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        call()
