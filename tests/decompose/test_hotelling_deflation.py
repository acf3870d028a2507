from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sklearn", reason="tests an estimator of scikit-learn")

from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from partwise.checks import InputError
from partwise.decompose import HotellingDeflationPCA
from partwise.decompose._covariance import GramCovariance, covariance_of
from partwise.decompose._eigen_rounds import Eigenpairs, random_eigenpairs
from partwise.decompose.hotelling_deflation import SequentialDeflation
from partwise.linalg.bounds import deflation_error_bound, plan_iterations
from partwise.rounds import run_rounds


def data_with(eigenvalues: NDArray[Any], *, num_samples: int = 400, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Data whose covariance has exactly these eigenvalues, and its eigenvectors as rows."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(num_samples, len(eigenvalues)))
    scores = np.linalg.qr(raw - raw.mean(axis=0))[0] * np.sqrt(num_samples - 1)
    vectors = np.linalg.qr(rng.normal(size=(len(eigenvalues), len(eigenvalues))))[0].T
    return scores * np.sqrt(eigenvalues) @ vectors + 1.0, vectors


def distances(components: NDArray[Any], exact: NDArray[Any]) -> NDArray[Any]:
    return np.minimum(np.linalg.norm(components - exact, axis=1), np.linalg.norm(components + exact, axis=1))


SPECTRUM = 1.3 ** -np.arange(40.0)


@parametrize_with_checks([HotellingDeflationPCA(random_state=0), HotellingDeflationPCA(top1="lanczos", random_state=0)])
def test_it_is_an_estimator_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("top1", ["power", "lanczos"])
def test_it_finds_what_a_full_decomposition_finds(top1: str) -> None:
    X, _ = data_with(SPECTRUM)
    ours, full = HotellingDeflationPCA(6, top1=top1, tol=1e-9, random_state=0).fit(X), PCA(6, svd_solver="full").fit(X)
    assert ours.converged_
    np.testing.assert_allclose(ours.explained_variance_, full.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(ours.explained_variance_ratio_, full.explained_variance_ratio_, rtol=1e-9)
    assert distances(ours.components_, full.components_).max() < 1e-7
    assert ours.missed_value_test_.passed


def test_the_first_component_is_power_iteration_bit_for_bit() -> None:
    X, _ = data_with(SPECTRUM)
    covariance = covariance_of(X)
    start = random_eigenpairs(1, 40, seed=3, dtype=covariance.dtype)
    method = SequentialDeflation(covariance=covariance, steps=(37,), tol=0.0, seed=3)
    state = run_rounds(method, start, num_rounds=10, stop=lambda _, after: method.settled(after))
    vector = start.vectors[0]
    for _ in range(37):
        vector = covariance.product(vector[None])[0]
        vector = vector / np.linalg.norm(vector)
    assert np.array_equal(state.vectors[0], vector)
    assert method.num_steps_taken(state) == (37,)


def test_exact_searches_leave_the_eigenvalues_that_were_not_taken_and_zeros() -> None:
    X, _ = data_with(SPECTRUM[:12])
    covariance = covariance_of(X)
    assert isinstance(covariance, GramCovariance)
    model = HotellingDeflationPCA(4, top1="lanczos", tol=1e-12, random_state=0).fit(X)
    left = covariance.matrix - model.components_.T * model.explained_variance_ @ model.components_
    np.testing.assert_allclose(np.linalg.eigvalsh(left)[::-1], [*SPECTRUM[4:12], *[0.0] * 4], atol=1e-10)


@pytest.mark.parametrize("num_steps", [5, 15, 60, 400])
def test_the_account_of_errors_is_never_too_good(num_steps: int) -> None:
    for seed in range(5):
        X, exact = data_with(SPECTRUM, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few steps are not enough, and it says so
            model = HotellingDeflationPCA(5, num_steps=num_steps, tol=0, random_state=seed).fit(X)
        count = model.n_components_
        errors = distances(model.components_, exact[:count])
        assert (errors <= model.error_bounds_ + 1e-12).all()
        assert (errors <= model.residual_bounds_ + 1e-12).all()
        left = np.cov(X.T)
        for k in range(count):
            if model.sub_solver_errors_[k] < 1.4:  # the bound says something, so the searches came in this order
                top = np.linalg.eigh(left)[1][:, -1]
                assert distances(model.components_[k : k + 1], top[None])[0] <= model.sub_solver_errors_[k] + 1e-12
            vector = model.components_[k]
            left = left - (vector @ left @ vector) * np.outer(vector, vector)


def test_after_enough_steps_the_account_is_small_and_the_two_bounds_differ_by_what_the_recursion_cannot_know() -> None:
    X, _ = data_with(SPECTRUM)
    model = HotellingDeflationPCA(5, num_steps=1000, tol=1e-12, random_state=0).fit(X)
    assert model.sub_solver_errors_.max() < 1e-9
    assert model.residual_bounds_.max() < 1e-9
    assert (model.residual_bounds_[1:] < model.error_bounds_[1:]).all()
    assert model.error_bounds_[0] == pytest.approx(model.sub_solver_errors_[0])


def test_planned_steps_keep_every_component_below_the_target() -> None:
    X, exact = data_with(SPECTRUM)
    steps = plan_iterations(SPECTRUM[:5], 1e-3)
    model = HotellingDeflationPCA(4, num_steps=[int(count) for count in steps], tol=0, random_state=0).fit(X)
    assert model.num_steps_.tolist() == list(steps)
    assert distances(model.components_, exact[:4]).max() < 1e-3


def test_more_steps_or_a_tighter_tolerance_are_more_exact_and_cost_more() -> None:
    X, exact = data_with(SPECTRUM)
    loose, tight = (HotellingDeflationPCA(3, tol=tol, random_state=0).fit(X) for tol in (1e-3, 1e-8))
    assert (loose.num_steps_ < tight.num_steps_).all()
    assert distances(tight.components_, exact[:3]).max() < 1e-3 * distances(loose.components_, exact[:3]).max()
    with pytest.warns(ConvergenceWarning, match="Raise num_steps, or pass top1='lanczos'"):
        short = HotellingDeflationPCA(3, num_steps=17, random_state=0).fit(X)
    assert not short.converged_
    assert short.num_steps_.tolist() == [17, 17, 17]


@pytest.mark.parametrize("top1", ["power", "lanczos"])
def test_a_second_component_below_rounding_is_not_resolvable(top1: str) -> None:
    X, _ = data_with(np.array([1.0, 1e-16, 0.0, 0.0]))
    with pytest.warns(UserWarning, match=r"Component 2 is not resolvable: what the components in front leave over is no larger than rounding"):
        model = HotellingDeflationPCA(2, top1=top1, random_state=0).fit(X - X.mean(axis=0))
    assert model.n_components_ == len(model.components_) == len(model.error_bounds_) == 1


@pytest.mark.parametrize("top1", ["power", "lanczos"])
@pytest.mark.parametrize("size", [4, 60])
def test_copies_of_one_column_are_one_direction(size: int, top1: str) -> None:
    X = np.random.default_rng(0).normal(size=(100, 1)) * np.ones(size)
    with pytest.warns(UserWarning, match="Component 2 is not resolvable"):
        model = HotellingDeflationPCA(3, top1=top1, random_state=0).fit(X)
    np.testing.assert_allclose(model.components_, np.full((1, size), size**-0.5))


def test_a_run_continues_from_a_state_with_the_same_bits() -> None:
    X, _ = data_with(SPECTRUM)
    covariance, states = covariance_of(X), {}

    def keep(number: int, state: Eigenpairs) -> None:
        states[number] = Eigenpairs.from_arrays(state.to_arrays())

    whole = HotellingDeflationPCA(4, random_state=0).fit_from(covariance, progress=keep)
    assert sorted(states) == list(range(1, whole.n_iter_ + 1))
    for number in (1, whole.n_iter_ // 2, whole.n_iter_):
        rest = HotellingDeflationPCA(4, random_state=0).fit_from(covariance, start=states[number])
        assert np.array_equal(rest.components_, whole.components_)
        assert np.array_equal(rest.error_bounds_, whole.error_bounds_)


def test_the_same_seed_gives_the_same_bits_and_work_alone_is_work_in_a_batch() -> None:
    X, _ = data_with(SPECTRUM)
    first, second = (HotellingDeflationPCA(4, random_state=7).fit(X) for _ in range(2))
    assert np.array_equal(first.components_, second.components_)
    method = SequentialDeflation(covariance=covariance_of(X), steps=(20, 20), seed=0)
    [part] = method.split(random_eigenpairs(2, 40, seed=0))
    assert np.array_equal(method.work(part).vectors, method.work_all([part])[0].vectors)


def test_the_recorded_residuals_are_those_on_the_deflated_matrix() -> None:
    X, _ = data_with(SPECTRUM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = HotellingDeflationPCA(2, num_steps=[25, 200], tol=0, random_state=0).fit(X)
    matrix, first = np.cov(X.T), model.components_[0]
    left = matrix - (first @ matrix @ first) * np.outer(first, first)
    second = model.components_[1]
    value = second @ left @ second
    np.testing.assert_allclose(model.history_[-1]["values"][1], value, rtol=1e-9)
    np.testing.assert_allclose(model.history_[-1]["residuals"][1], np.linalg.norm(left @ second - value * second), atol=1e-9)
    assert model.residuals_[1] > 1000 * model.history_[-1]["residuals"][1]  # the first one's error shows only on the whole matrix


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"top1": "qr"}, "top1='qr' is not known. Choose one of: power, lanczos"),
        ({"num_steps": 0}, "num_steps=0 must be an integer of at least 1"),
        ({"num_steps": [5, 5, 5]}, r"num_steps=\(5, 5, 5\) for n_components=2, expected one number for each component, or one for all"),
        ({"num_steps": [5, 0.5]}, "num_steps=0.5 must be an integer"),
        ({"tol": -1.0}, "tol=-1.0"),
        ({"n_components": 0}, "n_components=0 must be an integer of at least 1"),
        ({"n_components": 41}, "n_components=41 does not fit data of 400 samples and 40 features"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], text: str) -> None:
    X, _ = data_with(SPECTRUM)
    with pytest.raises(InputError, match=text):
        HotellingDeflationPCA(**settings).fit(X)


def test_the_bound_of_the_estimator_is_the_one_of_the_function() -> None:
    X, _ = data_with(SPECTRUM)
    model = HotellingDeflationPCA(3, tol=1e-9, random_state=0).fit(X)
    by_hand = deflation_error_bound(SPECTRUM[:4], model.sub_solver_errors_)
    np.testing.assert_allclose(model.error_bounds_[:2], by_hand[:2], rtol=1e-3)
    assert by_hand[2] <= model.error_bounds_[2]  # whose last gap goes by the probe
