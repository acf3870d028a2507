from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sklearn", reason="certifies its components")

import scipy.sparse
import scipy.sparse.linalg
from sklearn.decomposition import PCA, TruncatedSVD

from partwise.checks import InputError
from partwise.decompose import certify


def data_with(eigenvalues: NDArray[Any], *, num_samples: int = 1000, seed: int = 0) -> NDArray[Any]:
    """Centred data whose covariance has exactly these eigenvalues, on top of an offset."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(num_samples, len(eigenvalues)))
    scores = np.linalg.qr(raw - raw.mean(axis=0))[0] * np.sqrt(num_samples - 1)
    rotation = np.linalg.qr(rng.normal(size=(len(eigenvalues), len(eigenvalues))))[0]
    return scores * np.sqrt(eigenvalues) @ rotation + rng.normal(size=len(eigenvalues))


def test_the_values_are_the_explained_variance_of_scikit_learn() -> None:
    X = data_with(0.8 ** np.arange(60.0))
    pca = PCA(6, svd_solver="full").fit(X)
    certificate = certify(X, pca.components_)
    np.testing.assert_allclose(certificate.values, pca.explained_variance_, rtol=1e-10)
    assert certificate.residuals.max() < 1e-12
    assert (np.abs(certificate.intervals - 0.8 ** np.arange(6.0)[:, None]) < 1e-12).all()
    assert certificate.missed_value_test.passed
    assert certificate.intervals[:, 0].min() > certificate.missed_value_test.bound  # so interval k holds the k-th largest


@pytest.mark.parametrize("seed", range(3))
def test_a_flat_spectrum_shows_which_solvers_of_scikit_learn_can_be_trusted(seed: int) -> None:
    X = np.random.default_rng(seed).normal(size=(2000, 600))
    passed = {solver: certify(X, PCA(10, svd_solver=solver, random_state=0).fit(X).components_).missed_value_test.passed
              for solver in ("auto", "randomized", "arpack", "covariance_eigh")}  # fmt: skip
    assert passed == {"auto": False, "randomized": False, "arpack": True, "covariance_eigh": True}


def test_what_arpack_returns_at_a_loose_tolerance_passes_with_intervals_that_hold() -> None:
    eigenvalues = np.arange(1.0, 201.0) ** -0.5
    for seed in range(10):
        X = data_with(eigenvalues, num_samples=400, seed=seed)
        covariance = np.cov(X.T)
        values, vectors = scipy.sparse.linalg.eigsh(covariance, k=8, tol=1e-3, v0=np.random.default_rng(seed).normal(size=200))
        certificate = certify(X, vectors.T[::-1], seed=seed)
        assert certificate.missed_value_test.passed
        assert (certificate.intervals[:, 0] <= eigenvalues[:8]).all()
        assert (eigenvalues[:8] <= certificate.intervals[:, 1]).all()
        np.testing.assert_allclose(certificate.values, values[::-1], rtol=1e-8)


def test_a_component_that_was_left_out_is_missed_in_dense_and_sparse_data_and_operators_alike() -> None:
    X = np.where(np.random.default_rng(0).random((800, 60)) < 0.1, np.random.default_rng(1).normal(size=(800, 60)), 0.0) * 0.9 ** np.arange(60)
    components = np.delete(PCA(6, svd_solver="full").fit(X).components_, 2, axis=0)
    forms = (X, X.tolist(), scipy.sparse.csr_array(X), scipy.sparse.linalg.aslinearoperator(X))
    tests = [certify(form, components).missed_value_test for form in forms]
    assert not any(test.passed for test in tests)
    np.testing.assert_allclose([test.probe_value for test in tests], tests[0].probe_value, rtol=1e-8)


def test_components_of_data_that_were_not_centred_are_certified_with_a_mean_of_zero() -> None:
    X = np.abs(data_with(0.8 ** np.arange(30.0)))
    svd = TruncatedSVD(4, algorithm="arpack", random_state=0).fit(X)
    own, centred = certify(X, svd.components_, mean=np.zeros(30)), certify(X, svd.components_)
    assert own.residuals.max() < 1e-10 * own.values.max()
    assert centred.residuals.max() > 1e-3 * centred.values.max()


def test_single_precision_components_are_judged_as_they_are() -> None:
    X = data_with(0.8 ** np.arange(40.0))
    certificate = certify(X, PCA(5, svd_solver="full").fit(X.astype(np.float32)).components_)
    assert 1e-9 < certificate.residuals.max() < 1e-5
    assert certificate.missed_value_test.passed


def test_intervals_of_a_covariance_do_not_reach_below_zero() -> None:
    X = data_with(np.array([1.0, 0.5, 0.0, 0.0]))
    certificate = certify(X, np.random.default_rng(0).normal(size=(3, 4)))
    assert certificate.intervals[:, 0].min() >= 0.0
    assert np.diff(certificate.intervals, axis=1).min() >= 0.0


@pytest.mark.parametrize(
    ("components", "text"),
    [
        (np.ones((5, 2)), r"components of shape \(5, 2\) for data of shape \(20, 5\), expected \(n_components, 5\)\. Transpose them"),
        (np.ones(5), r"components of shape \(5,\) .*expected \(n_components, 5\)\. Pass one component per row"),
        (np.ones((6, 5)), r"components of shape \(6, 5\)"),
        (np.ones((1, 5)) * 1j, "components of type complex128, expected real numbers"),
        (np.zeros((1, 5)), "a vector 0 that is zero or not finite"),
    ],
)
def test_components_that_cannot_be_certified_are_refused(components: NDArray[Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        certify(np.random.default_rng(0).normal(size=(20, 5)), components)
