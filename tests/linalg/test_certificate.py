from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from partwise.checks import InputError
from partwise.linalg.certificate import RISK, Certificate, certify

SLOW_DECAY = np.arange(1.0, 301.0) ** -0.5


def rotation(size: int, seed: int) -> NDArray[Any]:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def matrix_of(eigenvalues: NDArray[Any], seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors as rows in the same order."""
    vectors = rotation(len(eigenvalues), seed).T
    matrix = vectors.T * eigenvalues @ vectors
    return (matrix + matrix.T) / 2, vectors


def times(matrix: NDArray[Any]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda rows: rows @ matrix


def each_interval_owns_an_eigenvalue(intervals: NDArray[Any], eigenvalues: NDArray[Any]) -> bool:
    """Whether eigenvalues can be dealt to intervals, one each, so that each lies in its interval."""
    outside = (eigenvalues < intervals[:, :1]) | (eigenvalues > intervals[:, 1:])  # (K, d)
    rows, columns = linear_sum_assignment(outside)
    return not outside[rows, columns].any()


@st.composite
def spectra_and_vectors(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any]]:
    """Spectra with clusters, zeros and wide ranges; vectors from exact to arbitrary, sometimes nearly the same one twice."""
    size = draw(st.integers(1, 24))
    num_vectors = draw(st.integers(1, size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = rng.choice([1.0, 0.5, 0.5 + 1e-9, 0.1, 0.0], size=size) * 10.0 ** draw(st.integers(-5, 5))
    eigenvalues = np.sort(np.abs(levels + rng.normal(size=size) * 10.0 ** draw(st.integers(-16, 0))))[::-1]
    matrix, vectors = matrix_of(eigenvalues, seed=draw(st.integers(0, 2**32)))
    chosen = vectors[rng.permutation(size)[:num_vectors]] + rng.normal(size=(num_vectors, size)) * 10.0 ** draw(st.integers(-17, 1))
    if num_vectors > 1 and draw(st.booleans()):
        chosen[-1] = chosen[0] + rng.normal(size=size) * 10.0 ** draw(st.integers(-17, -3))
    return matrix, chosen


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@settings(max_examples=300)
@given(case=spectra_and_vectors())
def test_whatever_the_vectors_each_interval_owns_an_eigenvalue(case: tuple[NDArray[Any], NDArray[Any]], dtype: type) -> None:
    matrix, vectors = (array.astype(dtype) for array in case)
    certificate = certify(times(matrix), vectors, seed=0)
    exact = np.linalg.eigvalsh(matrix.astype(np.float64))
    assert each_interval_owns_an_eigenvalue(certificate.intervals, exact)
    assert (certificate.intervals[:, 0] <= certificate.values).all()
    assert (certificate.values <= certificate.intervals[:, 1]).all()


@settings(max_examples=200)
@given(case=spectra_and_vectors())
def test_a_failed_probe_is_proof_that_the_span_can_be_bettered(case: tuple[NDArray[Any], NDArray[Any]]) -> None:
    matrix, vectors = case
    test = certify(times(matrix), vectors, seed=0).missed_value_test
    if not test.passed:
        basis = np.linalg.qr(vectors.T)[0]
        kept = np.trace(basis.T @ matrix @ basis)
        best = np.linalg.eigvalsh(matrix)[::-1][: len(vectors)].sum()
        assert best - kept > 0.5 * (test.probe_value - test.smallest_kept) * (1 - 1e-6)


def test_close_intervals_of_good_vectors_stay_narrow_and_a_repeated_value_is_owned_as_often_as_it_occurs() -> None:
    matrix, vectors = matrix_of(np.array([3.0, 2.0, 2.0, 2.0, 1.0, *[0.1] * 15]))
    mixed = vectors[:5].copy()
    mixed[1:4] = rotation(3, seed=1) @ mixed[1:4]  # any basis of the triple is as good
    certificate = certify(times(matrix), mixed, seed=0)
    assert np.ptp(certificate.intervals, axis=1).max() < 1e-12
    assert certificate.missed_value_test.passed


def test_one_vector_given_twice_does_not_count_an_eigenvalue_twice() -> None:
    matrix, vectors = matrix_of(SLOW_DECAY)
    certificate = certify(times(matrix), vectors[[0, 0]], seed=0)
    assert each_interval_owns_an_eigenvalue(certificate.intervals, SLOW_DECAY)
    assert np.ptp(certificate.intervals, axis=1).max() > 0.1  # nothing is known of a second eigenvalue
    assert not certificate.missed_value_test.passed


def test_residuals_and_values_are_those_of_the_given_vectors() -> None:
    matrix, vectors = matrix_of(SLOW_DECAY)
    rough = vectors[:6] + 0.01 * np.random.default_rng(0).normal(size=(6, 300))
    certificate = certify(times(matrix), 7.0 * rough, seed=0)  # lengths do not matter
    units = rough / np.linalg.norm(rough, axis=1, keepdims=True)
    values = np.einsum("kd,de,ke->k", units, matrix, units)
    np.testing.assert_allclose(certificate.values, values, rtol=1e-10)
    np.testing.assert_allclose(certificate.residuals, np.linalg.norm(units @ matrix - values[:, None] * units, axis=1), rtol=1e-10)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("spectrum", ["slow", "fast", "flat", "triple at the edge", "rank 8"])
def test_exact_results_pass_on_every_seed(spectrum: str, dtype: type) -> None:
    for seed in range(20):
        eigenvalues = {
            "slow": SLOW_DECAY,
            "fast": 0.7 ** np.arange(300.0),
            "flat": np.sort(np.random.default_rng(seed).uniform(0.9, 1.0, 300))[::-1],
            "triple at the edge": np.sort(np.append(SLOW_DECAY, [SLOW_DECAY[9]] * 2))[::-1],  # two of the three are left out
            "rank 8": np.append(SLOW_DECAY[:8], np.zeros(292)),
        }[spectrum]
        matrix, vectors = matrix_of(eigenvalues, seed)
        test = certify(times(matrix.astype(dtype)), vectors[:10].astype(dtype), seed=seed).missed_value_test
        assert test.passed, (seed, test)


def flat_data(seed: int) -> NDArray[Any]:
    return np.random.default_rng(seed).normal(size=(2000, 600))


def test_the_default_solver_of_scikit_learn_is_caught_on_a_flat_spectrum() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="catches one of its solvers")
    for seed in range(4):
        data = flat_data(seed)
        covariance = np.cov(data.T)
        model = decomposition.PCA(10, random_state=seed).fit(data)
        exact = np.linalg.eigvalsh(covariance)[::-1][:10]
        assert (model.explained_variance_ < 0.985 * exact).all()  # all ten are too small, and nothing says so
        fooled = certify(times(covariance), model.components_, seed=seed).missed_value_test
        assert not fooled.passed
        assert fooled.probe_value > 1.01 * fooled.smallest_kept
        right = decomposition.PCA(10, svd_solver="covariance_eigh").fit(data)
        assert certify(times(covariance), right.components_, seed=seed).missed_value_test.passed


@pytest.mark.parametrize("skipped", [0, 4, 9])
def test_a_skipped_isolated_eigenvalue_is_found_although_every_residual_is_zero(skipped: int) -> None:
    eigenvalues = SLOW_DECAY.copy()
    eigenvalues[10:] *= 0.95  # the tenth is isolated too
    for seed in range(20):
        matrix, vectors = matrix_of(eigenvalues, seed)
        certificate = certify(times(matrix), np.delete(vectors[:11], skipped, axis=0), seed=seed)
        assert certificate.residuals.max() < 1e-12
        assert not certificate.missed_value_test.passed, seed
        assert certificate.missed_value_test.probe_value <= eigenvalues[skipped] * (1 + 1e-12)


def test_a_missing_member_of_a_triple_eigenvalue_is_found() -> None:
    eigenvalues = np.sort(np.append(SLOW_DECAY, [0.5, 0.5]))[::-1]  # 0.5 was there once
    for seed in range(20):
        matrix, vectors = matrix_of(eigenvalues, seed)
        assert certify(times(matrix), vectors[:10], seed=seed).missed_value_test.passed
        members = np.flatnonzero(eigenvalues == 0.5)
        mixed = vectors[:11].copy()
        mixed[members] = rotation(3, seed) @ mixed[members]
        test = certify(times(matrix), np.delete(mixed, members[1], axis=0), seed=seed).missed_value_test
        assert not test.passed
        assert test.probe_value == pytest.approx(0.5, rel=1e-3)


def test_what_the_probe_says_of_what_it_did_not_see_is_wrong_no_more_often_than_stated() -> None:
    """With probes that are far too short, so that the stated chances are put to the test."""
    matrix, num_seeds = np.diag(SLOW_DECAY[:60]), 400
    right = [certify(times(matrix), np.eye(60)[:3], seed=seed, num_probe_steps=1 + seed % 3).missed_value_test for seed in range(num_seeds)]
    assert sum(test.bound < SLOW_DECAY[3] for test in right) <= 3  # 0.4 expected at most
    wrong = [certify(times(matrix), np.eye(60)[1:4], seed=seed, num_probe_steps=1).missed_value_test for seed in range(num_seeds)]
    for chance in (0.5, 0.1, 0.02):  # the first eigenvalue is outside; how often is it unseen and called unlikely?
        unseen = sum(test.passed and test.missable <= chance for test in wrong)
        assert unseen <= num_seeds * chance + 3 * (num_seeds * chance) ** 0.5


def test_a_clear_gap_settles_that_interval_k_holds_the_k_th_largest() -> None:
    matrix, vectors = matrix_of(0.6 ** np.arange(200.0))
    certificate = certify(times(matrix), vectors[:5], seed=0)
    test = certificate.missed_value_test
    assert 0.6**5 <= test.bound < certificate.intervals[:, 0].min()
    assert test.missable <= RISK
    assert test.num_products < 80  # and the probe stopped early


def test_more_steps_resolve_smaller_gaps() -> None:
    matrix, vectors = matrix_of(SLOW_DECAY)
    bounds = [certify(times(matrix), vectors[:40], seed=0, num_probe_steps=steps).missed_value_test.bound for steps in (2, 5, 20)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] >= SLOW_DECAY[40]


@pytest.mark.parametrize("power", [-900, -60, 900])
def test_the_size_of_the_numbers_does_not_matter(power: int) -> None:
    matrix, vectors = matrix_of(SLOW_DECAY[:40])
    rough = vectors[:4] + 0.01 * np.random.default_rng(0).normal(size=(4, 40))
    plain, scaled = (certify(times(matrix * factor), rough, seed=0) for factor in (1.0, 2.0**power))
    assert np.array_equal(plain.intervals * 2.0**power, scaled.intervals)
    assert np.array_equal(plain.residuals * 2.0**power, scaled.residuals)
    assert plain.missed_value_test.bound * 2.0**power == scaled.missed_value_test.bound
    assert plain.missed_value_test.missable == scaled.missed_value_test.missable


def test_a_matrix_that_is_known_up_to_rounding_only_has_wider_intervals() -> None:
    matrix, vectors = matrix_of(SLOW_DECAY)
    sharp, blunt = (certify(times(matrix), vectors[:3], seed=0, rounding=rounding) for rounding in (0.0, 1e-3))
    np.testing.assert_allclose(np.ptp(blunt.intervals, axis=1), np.ptp(sharp.intervals, axis=1) + 2e-3, atol=1e-12)
    assert blunt.missed_value_test.bound == pytest.approx(sharp.missed_value_test.bound + 1e-3, abs=1e-9)


def test_when_every_direction_is_kept_nothing_can_be_missed() -> None:
    certificate = certify(times(np.diag([2.0, 1.0, 0.0])), np.eye(3), seed=0)
    test = certificate.missed_value_test
    assert (test.passed, test.probe_value, test.missable, test.num_products) == (True, -math.inf, 0.0, 0)
    assert certificate.values.tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize("eigenvalues", [np.zeros(5), np.ones(5), np.array([1.0, 0.0, 0.0, 0.0, 0.0])])
def test_constant_and_vanishing_matrices_are_certified_without_a_warning(eigenvalues: NDArray[Any]) -> None:
    certificate = certify(times(np.diag(eigenvalues)), np.eye(5)[:2], seed=0)
    assert certificate.missed_value_test.passed
    assert np.isfinite(certificate.intervals).all()


def test_the_same_seed_gives_the_same_certificate_and_another_seed_the_same_intervals() -> None:
    matrix, vectors = matrix_of(SLOW_DECAY)
    first, second, other = (certify(times(matrix), vectors[:5], seed=seed) for seed in (3, 3, 4))

    def facts(certificate: Certificate) -> tuple[Any, ...]:
        return certificate.intervals.tolist(), dataclasses.astuple(certificate.missed_value_test)

    assert facts(first) == facts(second)
    assert first.missed_value_test.probe_value != other.missed_value_test.probe_value
    np.testing.assert_allclose(first.intervals, other.intervals, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("vectors", "product", "text"),
    [
        (np.ones(3), None, r"vectors of shape \(3,\), expected \(K, d\) with K from 1 to d"),
        (np.ones((4, 3)), None, r"vectors of shape \(4, 3\), expected \(K, d\)"),
        (np.array([[1.0, 0.0], [0.0, 0.0]]), None, r"a vector 1 that is zero or not finite, expected a direction"),
        (np.array([[np.nan, 0.0]]), None, r"a vector 0 that is zero or not finite"),
        (np.eye(3)[:1], lambda rows: rows[:, :2], r"an array of shape \(1, 2\) from product, expected finite ones of shape \(1, 3\)"),
        (np.eye(3)[:1], lambda rows: rows * np.inf, r"NaN or infinite entries from product"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_cannot_be_certified_is_refused(vectors: NDArray[Any], product: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        certify(product or times(np.eye(vectors.shape[-1])), vectors, seed=0)


def test_a_probe_needs_a_step() -> None:
    with pytest.raises(InputError, match="num_probe_steps=0 must be an integer of at least 1"):
        certify(times(np.eye(3)), np.eye(3)[:1], seed=0, num_probe_steps=0)
