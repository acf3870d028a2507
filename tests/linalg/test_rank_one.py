from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from matrices import gaussian, matrix_with
from partwise.checks import InputError
from partwise.linalg import rank_one_step
from partwise.linalg.deflation import deflate
from partwise.linalg.products import one_blas_thread
from partwise.linalg.rank_one import SOLVERS, exact_parts, rank_one_steps, reduce_regression
from tolerances import assert_close

SAME_BITS = {"rtol": 0.0, "atol": 0.0}
NUM_FEATURES, NUM_TARGETS, NUM_SAMPLES = 5, 7, 30


@pytest.fixture
def regression() -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs (d, n) and targets (m, n) with noise."""
    inputs = gaussian(NUM_FEATURES, NUM_SAMPLES)
    targets = gaussian(NUM_TARGETS, NUM_FEATURES, seed=1) @ inputs + 0.5 * gaussian(NUM_TARGETS, NUM_SAMPLES, seed=2)
    return inputs, targets


def maps(inputs: NDArray[Any], targets: NDArray[Any], *, num_components: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Closed form: rows b_k (r, m) and rows a_k (r, d)."""
    problem = reduce_regression(inputs, targets)
    exact = exact_parts(problem.target, num_components=num_components)
    return exact.left, exact.scaled_right @ problem.unreduce.T


def test_the_closed_form_at_full_rank_is_least_squares(regression: tuple[NDArray[Any], NDArray[Any]]) -> None:
    inputs, targets = regression
    left, right = maps(inputs, targets, num_components=NUM_FEATURES)
    expected = np.linalg.lstsq(inputs.T, targets.T, rcond=None)[0].T
    assert_close(left.T @ right, expected, claim="sum of all maps = numpy's least squares")


def test_each_map_contributes_its_singular_part(regression: tuple[NDArray[Any], NDArray[Any]]) -> None:
    inputs, targets = regression
    problem = reduce_regression(inputs, targets)
    exact = exact_parts(problem.target, num_components=3)
    left, right = maps(inputs, targets, num_components=3)
    for k in range(3):
        part = exact.singular_values[k] * np.outer(exact.left[k], exact.right[k] @ problem.basis.T)
        assert_close(np.outer(left[k], right[k] @ inputs), part, claim="b a^T X = sigma u v^T Q^T", rtol=0.0, atol=1e-12)


def test_the_residual_of_the_best_rank_is_noise_outside_plus_the_tail(regression: tuple[NDArray[Any], NDArray[Any]]) -> None:
    inputs, targets = regression
    problem = reduce_regression(inputs, targets)
    sizes = exact_parts(problem.target, num_components=1).singular_values
    outside = np.sum((targets - problem.target @ problem.basis.T) ** 2)
    for rank in range(1, NUM_FEATURES + 1):
        left, right = maps(inputs, targets, num_components=rank)
        residual = np.sum((targets - left.T @ right @ inputs) ** 2)
        assert_close(residual, outside + np.sum(sizes[rank:] ** 2), claim="residual^2 = |Y - Y Q Q^T|^2 + sum of the tail")


def test_exact_sequential_deflation_returns_the_closed_form(regression: tuple[NDArray[Any], NDArray[Any]]) -> None:
    problem = reduce_regression(*regression)
    exact = exact_parts(problem.target, num_components=3)
    left, right = gaussian(0, NUM_TARGETS), gaussian(0, NUM_FEATURES)
    for k in range(3):
        pair = rank_one_step(problem.target, gaussian(NUM_TARGETS), gaussian(NUM_FEATURES), (left, right), solver="svd")
        assert_close(np.outer(*pair), np.outer(exact.left[k], exact.scaled_right[k]), claim=f"component {k + 1}")
        left, right = np.concatenate([left, pair[0][None]]), np.concatenate([right, pair[1][None]])


def test_rank_deficient_inputs_report_their_rank_and_give_the_maps_of_least_norm() -> None:
    inputs = matrix_with([3, 2, 1], rows=NUM_FEATURES, columns=NUM_SAMPLES)
    targets = gaussian(NUM_TARGETS, NUM_SAMPLES, seed=1)
    problem = reduce_regression(inputs, targets)
    assert problem.rank == 3
    left, right = maps(inputs, targets, num_components=3)
    assert_close(left.T @ right, targets @ np.linalg.pinv(inputs), claim="pseudo-inverse")


def test_fewer_samples_than_features_are_a_rank_deficient_problem() -> None:
    inputs, targets = gaussian(8, 4), gaussian(6, 4, seed=1)
    assert reduce_regression(inputs, targets).rank == 4
    left, right = maps(inputs, targets, num_components=4)
    assert_close(left.T @ right @ inputs, targets, claim="four samples are fitted exactly")


def power_slowly(target: NDArray[Any], left: NDArray[Any], right: NDArray[Any], num_steps: int) -> tuple[NDArray[Any], NDArray[Any]]:
    for _ in range(num_steps):
        left = target @ right / (right @ right)
        right = target.T @ left / (left @ left)
    return left, right


def gradient_slowly(target: NDArray[Any], left: NDArray[Any], right: NDArray[Any], num_steps: int, lr: float) -> tuple[NDArray[Any], NDArray[Any]]:
    pair = [torch.tensor(vector, requires_grad=True) for vector in (left, right)]
    for _ in range(num_steps):
        loss = 0.5 * (torch.outer(*pair) - torch.tensor(target)).square().sum()
        gradients = torch.autograd.grad(loss, pair)
        pair = [(vector - lr * gradient).detach().requires_grad_() for vector, gradient in zip(pair, gradients, strict=True)]
    return pair[0].detach().numpy(), pair[1].detach().numpy()


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), count=st.integers(0, 3), num_steps=st.integers(1, 3))
def test_steps_on_the_deflated_target_that_is_never_formed_equal_steps_on_the_formed_one(rows: int, columns: int, count: int, num_steps: int) -> None:
    target, previous = gaussian(rows, columns), (gaussian(count, rows, seed=1), gaussian(count, columns, seed=2))
    left, right = gaussian(rows, seed=3), gaussian(columns, seed=4)
    formed = deflate(target, *previous)
    expected = gradient_slowly(formed, left, right, num_steps, 0.05)
    actual = rank_one_step(target, left, right, previous, solver="gd", num_steps=num_steps, lr=0.05)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, claim="gradient steps; they may grow, so relative to what autograd gives", rtol=1e-8)
    expected = power_slowly(formed, left, right, num_steps)
    actual = rank_one_step(target, left, right, previous, solver="power", num_steps=num_steps)
    assert_close(np.outer(*actual), np.outer(*expected), claim="power steps; the target may be close to zero", rtol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6, 5), (1, 5), (6, 1), (40, 300)])
def test_many_pairs_at_once_have_the_bits_of_one_pair_at_a_time(solver: str, dtype: type, shape: tuple[int, int]) -> None:
    target = gaussian(*shape, dtype=dtype)
    left, right = (gaussian(11, size, seed=seed, dtype=dtype) for seed, size in enumerate(shape, start=1))
    ahead = [(left[:k], right[:k]) for k in range(11)]  # pair k sees those in front of it
    with one_blas_thread():
        many = rank_one_steps(target, left, right, ahead, solver=solver, num_steps=2, lr=1e-3)
        for k in range(11):
            one = rank_one_step(target, left[k], right[k], ahead[k], solver=solver, num_steps=2, lr=1e-3)
            assert_close(many[0][k], one[0], claim="left", **SAME_BITS)
            assert_close(many[1][k], one[1], claim="right", **SAME_BITS)


def test_one_power_step_contracts_by_the_squared_ratio_of_the_first_two_singular_values() -> None:
    target = matrix_with([2.0, 1.5], rows=6, columns=5)
    exact = exact_parts(target, num_components=2)
    left, right = exact.left[0], exact.right[0] + 1e-3 * exact.right[1]
    _, moved = rank_one_step(target, left, right, (gaussian(0, 6), gaussian(0, 5)))
    tangent = (moved @ exact.right[1]) / (moved @ exact.right[0])
    assert_close(tangent, np.array(1e-3 * (1.5 / 2.0) ** 2), claim="(sigma_2 / sigma_1)^2")


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_finds_the_best_rank_one_part(solver: str) -> None:
    target = matrix_with([1.0, 0.4, 0.1], rows=6, columns=5)
    exact = exact_parts(target, num_components=1)
    start = tuple(0.3 * draw / np.linalg.norm(draw) for draw in (gaussian(6), gaussian(5, seed=1)))
    pair = rank_one_step(target, *start, (gaussian(0, 6), gaussian(0, 5)), solver=solver, num_steps=300)
    assert_close(np.outer(*pair), np.outer(exact.left[0], exact.scaled_right[0]), claim=solver)


def test_a_target_of_zeros_gives_a_part_of_zeros_and_not_nan() -> None:
    left, right = rank_one_step(np.zeros((3, 2)), gaussian(3), gaussian(2), (gaussian(0, 3), gaussian(0, 2)), num_steps=3)
    assert_close(np.outer(left, right), np.zeros((3, 2)), claim="its best approximation")


def test_an_unknown_solver_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"solver='newton' is not known\. Choose one of: power, gd, svd"):
        rank_one_step(gaussian(3, 2), gaussian(3), gaussian(2), (gaussian(0, 3), gaussian(0, 2)), solver="newton")


@pytest.mark.parametrize("num_samples", [200, 5000])
def test_what_noise_does_to_the_fit_depends_on_the_sizes_and_not_on_the_number_of_samples(num_samples: int) -> None:
    rows, columns, noise = 60, 40, 0.1
    basis = reduce_regression(gaussian(columns, num_samples), gaussian(rows, num_samples)).basis
    sizes = [noise * np.linalg.norm(gaussian(rows, num_samples, seed=10 + seed) @ basis, 2) for seed in range(10)]
    predicted = noise * (rows**0.5 + columns**0.5)
    assert np.mean(sizes) == pytest.approx(predicted, rel=0.05)  # mean of 10 seeds


def test_the_package_of_maths_is_light_until_used() -> None:
    code = "import sys, partwise.linalg; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
