"""Claims of ParallelDeflationPCA and EigenGame: the same answer as scikit-learn from any form of data, what they certify, warn of and refuse."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.linalg import aslinearoperator
from sklearn.base import BaseEstimator, clone
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from partwise.checks import InputError
from partwise.decompose import EigenGame, ParallelDeflationPCA
from partwise.decompose._covariance import GramCovariance, covariance_of
from partwise.decompose._eigen_rounds import Eigenpairs, random_eigenpairs
from partwise.decompose._eigen_runs import solve_rounds
from partwise.decompose._readers import rows_of
from partwise.decompose.parallel_deflation import RoundEstimator
from partwise.engine import open_engine
from tolerances import assert_close

SAME_BITS = {"rtol": 0.0, "atol": 0.0}
SOLVERS: list[RoundEstimator] = [
    ParallelDeflationPCA(4, random_state=0),
    ParallelDeflationPCA(4, solver="hebb", random_state=0),
    ParallelDeflationPCA(4, solver="lanczos", random_state=0),
    ParallelDeflationPCA(4, solver="lanczos", block_size=2, random_state=0),
    ParallelDeflationPCA(4, mode="async", random_state=0),
    ParallelDeflationPCA(4, mode="async", max_staleness=1, random_state=0),
    EigenGame(4, random_state=0),
    EigenGame(4, variant="alpha", random_state=0),
    EigenGame(4, step_size=5.0, random_state=0),
    EigenGame(4, optimizer="adam", random_state=0),
]
every_solver = pytest.mark.parametrize("estimator", SOLVERS, ids=repr)


def data(*, num_samples: int = 300, num_features: int = 25, ratio: float = 1.2, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((num_features, num_features)))[0]
    return rng.standard_normal((num_samples, num_features)) * ratio ** -np.arange(num_features) @ basis + 3.0


def planted(values: list[float], *, num_features: int = 40, seed: int = 0) -> NDArray[np.float64]:
    """Rows whose covariance has exactly these eigenvalues, then zeros."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((120, len(values)))
    rows = np.linalg.qr(rows - rows.mean(axis=0))[0]  # orthonormal columns of mean 0
    basis = np.linalg.qr(rng.standard_normal((num_features, len(values))))[0].T
    return rows * np.sqrt(119 * np.array(values)) @ basis


@parametrize_with_checks(
    [
        ParallelDeflationPCA(random_state=0),
        ParallelDeflationPCA(solver="hebb", rayleigh_ritz=True, random_state=0),
        ParallelDeflationPCA(solver="lanczos", random_state=0),
        EigenGame(mode="async", random_state=0),  # without partial_fit, which asynchronous rounds refuse
        EigenGame(variant="alpha", step_size=5.0, random_state=0),
    ]
)
def test_scikit_learn_accepts_the_estimators(estimator: BaseEstimator, check: Any) -> None:
    check(estimator)


@every_solver
def test_the_answer_is_that_of_scikit_learn(estimator: RoundEstimator) -> None:
    X, full = data(), PCA(4, svd_solver="full").fit(data())
    model = clone(estimator).fit(X)
    np.testing.assert_allclose(model.explained_variance_, full.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose(model.explained_variance_ratio_, full.explained_variance_ratio_, rtol=1e-6)
    np.testing.assert_allclose(model.singular_values_, full.singular_values_, rtol=1e-6)
    np.testing.assert_allclose(np.abs((model.components_ * full.components_).sum(axis=1)), 1, atol=1e-6)
    np.testing.assert_allclose(model.mean_, full.mean_)
    np.testing.assert_allclose(np.abs(model.transform(X)), np.abs(full.transform(X)), atol=1e-3)
    assert model.converged_
    assert model.missed_value_test_.passed


FORMS: dict[str, Any] = {
    "float32": lambda X: X.astype(np.float32),
    "integers": lambda X: np.round(100 * X).astype(np.int16),
    "Fortran order": np.asfortranarray,
    "CSR": scipy.sparse.csr_array,
    "CSC": scipy.sparse.csc_matrix,
    "operator": aslinearoperator,
    "reader": rows_of,
    "list": np.ndarray.tolist,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", ["power", "lanczos"])
def test_every_form_of_the_data_gives_the_same_answer(form: str, solver: str) -> None:
    X = np.where(data() > 3.5, data(), 0.0)
    given = FORMS[form](X)
    dense = np.asarray(given) if form in ("float32", "integers") else X
    full = PCA(3, svd_solver="full").fit(dense.astype(float))
    model = ParallelDeflationPCA(3, solver=solver, random_state=0).fit(given)
    rtol = 1e-5 if form == "float32" else 1e-6
    np.testing.assert_allclose(model.explained_variance_, full.explained_variance_, rtol=rtol)
    assert model.components_.dtype == (np.float32 if form == "float32" else np.float64)
    scores = model.transform(given)
    np.testing.assert_allclose(scores, (dense - model.mean_) @ model.components_.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.inverse_transform(scores), scores @ model.components_ + model.mean_, rtol=1e-5)


def test_a_memory_map_is_read_and_not_copied(tmp_path: Path) -> None:
    X = data().astype(np.float32)
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    from_map, from_memory = (ParallelDeflationPCA(3, random_state=0).fit(source) for source in (mapped, X))
    assert_close(from_map.components_, from_memory.components_, claim="the same bits from a file", **SAME_BITS)
    np.testing.assert_allclose(from_map.transform(mapped), from_memory.transform(X), rtol=1e-5)


@pytest.mark.parametrize("estimator_class", [ParallelDeflationPCA, EigenGame])
def test_signs_are_positive_at_the_largest_entry_and_the_same_in_fit_and_fit_transform(estimator_class: type[RoundEstimator]) -> None:
    X = data()
    first, second = estimator_class(4, random_state=0), estimator_class(4, random_state=7)
    scores = first.fit_transform(X)
    second.fit(X)
    assert all(row[np.abs(row).argmax()] > 0 for row in first.components_)
    assert_close(first.fit(X).transform(X), scores, claim="fit then transform", **SAME_BITS)
    np.testing.assert_allclose(first.components_, second.components_, atol=1e-4)  # another start, the same signs


def test_components_come_in_the_order_of_their_values() -> None:
    # Long local steps from a start near the second vector: the first component settles on it before it turns to the first.
    X = data(ratio=1.02)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ParallelDeflationPCA(6, num_rounds=8, random_state=0).fit(X)
    assert np.all(np.diff(model.explained_variance_) <= 0)
    images = model.components_ @ np.cov(X.T)
    np.testing.assert_allclose(np.linalg.norm(images - model.explained_variance_[:, None] * model.components_, axis=1), model.residuals_, rtol=1e-6)


def test_intervals_hold_the_true_values_whether_or_not_the_fit_converged() -> None:
    X = data(ratio=1.05)
    true = np.linalg.eigvalsh(np.cov(X.T))[::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rough = ParallelDeflationPCA(4, num_rounds=6, random_state=0).fit(X)
    fine = ParallelDeflationPCA(4, random_state=0).fit(X)
    for model in (rough, fine):
        assert model.eigenvalue_intervals_.shape == (4, 2)
        assert all(((true >= low) & (true <= high)).any() for low, high in model.eigenvalue_intervals_)
    assert np.diff(rough.eigenvalue_intervals_).max() > 1e-3
    assert np.diff(fine.eigenvalue_intervals_).max() < 1e-5


def test_intervals_that_are_too_wide_are_reported() -> None:
    model = ParallelDeflationPCA(4, num_rounds=5, random_state=0)
    with pytest.warns(ConvergenceWarning, match=r"\d of 4 eigenvalues are known less well than tol=1e-06 asks for: component \d to within .* Raise num"):
        model.fit(data(ratio=1.1))
    assert not model.converged_
    assert model.n_iter_ == 5


def test_a_missed_value_is_reported() -> None:
    X = planted([3.0, 2.0, 1.0, 0.5])
    model = ParallelDeflationPCA(2, random_state=0)
    covariance = covariance_of(X)
    basis = np.linalg.eigh(np.cov(X.T))[1][:, ::-1].T
    start = random_eigenpairs(2, 40, seed=0)
    skipped = Eigenpairs(basis[[0, 2]].copy(), np.array([3.0, 1.0]), np.zeros(2), (1, 1), (True, True), None, 5)
    with pytest.warns(UserWarning, match=r"A larger eigenvalue was missed: 2 lies outside the components, whose smallest is 1\. .*Raise num_rounds"):
        model.fit_from(covariance, start=skipped)
    assert not model.missed_value_test_.passed
    assert start.num_rounds == 0


def test_lanczos_finds_every_member_of_a_repeated_eigenvalue() -> None:
    X = planted([4.0, 2.0, 2.0, 2.0, *1.1 ** -np.arange(30.0)])
    model = ParallelDeflationPCA(4, solver="lanczos", random_state=0).fit(X)
    np.testing.assert_allclose(model.explained_variance_, [4.0, 2.0, 2.0, 2.0], rtol=1e-6)
    assert model.missed_value_test_.passed


def test_rayleigh_ritz_makes_the_components_orthonormal_and_no_worse() -> None:
    X = data(ratio=1.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, rotated = (ParallelDeflationPCA(5, num_rounds=12, rayleigh_ritz=finish, random_state=0).fit(X) for finish in (False, True))
    assert np.abs(rotated.components_ @ rotated.components_.T - np.eye(5)).max() < 1e-12
    assert np.abs(plain.components_ @ plain.components_.T - np.eye(5)).max() > 1e-6
    assert rotated.residuals_.max() < plain.residuals_.max()


def test_data_of_lower_rank_give_fewer_components_and_say_so() -> None:
    X = planted([3.0, 2.0, 1.0])
    for solver in ("power", "lanczos"):
        with pytest.warns(UserWarning, match=r"The data have only 3 directions with variance, fewer than n_components=5; the fit has 3 components"):
            model = ParallelDeflationPCA(5, solver=solver, random_state=0).fit(X)
        assert model.components_.shape == (3, 40)
        assert model.get_feature_names_out().tolist() == [f"paralleldeflationpca{k}" for k in range(3)]
        np.testing.assert_allclose(model.inverse_transform(model.transform(X)), X, atol=1e-4)


def test_the_history_has_a_row_for_each_round_and_its_floats_follow_the_formula() -> None:
    seen = []
    model = ParallelDeflationPCA(3, tol=0, num_rounds=12, random_state=0)
    model.fit_from(covariance_of(data()), progress=lambda number, state: seen.append((number, state.updates)))
    assert [row["round"] for row in model.history_] == list(range(1, 13))
    assert [number for number, _ in seen] == list(range(1, 13))
    assert [row["floats_sent"] for row in model.history_[:4]] == [25, 25 * (2 + 1), 25 * (3 + 3), 25 * (3 + 3)]
    assert model.history_[0]["residuals"][1:] == [None, None]
    assert model.history_[-1]["residuals"][0] < 1e-3
    assert model.n_iter_ == 12


@pytest.mark.parametrize("solver", ["power", "hebb"])
def test_a_run_goes_on_from_any_round_with_the_same_bits(solver: str) -> None:
    covariance, states = covariance_of(data()), {}
    batch_size = 50 if solver == "hebb" else None
    model = ParallelDeflationPCA(3, solver=solver, batch_size=batch_size, num_rounds=30, tol=0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit_from(covariance, progress=states.__setitem__)
        resumed = clone(model).fit_from(covariance, start=states[11])
    assert_close(resumed.components_, model.components_, claim="the last 19 rounds", **SAME_BITS)
    assert (resumed.n_iter_, len(resumed.history_)) == (30, 19)


def test_an_asynchronous_run_repeats_from_its_schedule_bit_for_bit() -> None:
    covariance = covariance_of(data())
    model = ParallelDeflationPCA(4, mode="async", random_state=0)
    model.fit_from(covariance)
    assert model.schedule_ is not None
    assert max(model.schedule_.ages) > 0
    states: list[Eigenpairs] = []
    with open_engine("inline", seed=5) as engine:
        start, method = random_eigenpairs(4, 25, seed=3), model.round_method(covariance, 3)
        last, _, schedule = solve_rounds(
            method, start, num_rounds=500, engine=engine, mode="async", progress=lambda _, state: states.append(state)
        )
        again, history, _ = solve_rounds(method, start, num_rounds=500, engine=engine, schedule=schedule)
    assert_close(again.vectors, last.vectors, claim="the same order of events", **SAME_BITS)
    assert len(history) == len(states)


def test_the_seed_decides_and_the_input_stays() -> None:
    X = data()
    kept = X.copy()
    first, second, other = (ParallelDeflationPCA(3, random_state=seed).fit(X) for seed in (1, 1, 2))
    assert_close(first.components_, second.components_, claim="one seed", **SAME_BITS)
    assert not np.array_equal(first.components_, other.components_)
    np.testing.assert_array_equal(X, kept)


def test_batches_come_close_and_the_certificate_says_how_close() -> None:
    X = data(num_samples=3000, ratio=1.5)
    full = PCA(3).fit(X)
    model = ParallelDeflationPCA(3, solver="hebb", batch_size=200, num_rounds=100, random_state=0)
    with pytest.warns(ConvergenceWarning, match="Raise num_rounds or batch_size, or leave batch_size out"):
        model.fit(X)
    assert np.abs(model.explained_variance_ / full.explained_variance_ - 1).max() < 0.01
    assert not model.converged_
    assert model.n_iter_ == 100


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [
        ParallelDeflationPCA(4, num_rounds=20, random_state=0),
        ParallelDeflationPCA(4, solver="hebb", batch_size=30, num_rounds=10, random_state=0),
        ParallelDeflationPCA(4, solver="lanczos", block_size=2, random_state=0),
        EigenGame(4, variant="alpha", optimizer="adam", num_rounds=10, random_state=0),
    ],
    ids=repr,
)
def test_ray_gives_the_bits_of_the_inline_engine(estimator: RoundEstimator) -> None:
    ray_actors = pytest.importorskip("partwise.engine.ray_actors", reason="needs the extra ray")
    X = data()
    with warnings.catch_warnings(), ray_actors.RayActors(2) as engine:
        warnings.simplefilter("ignore")
        inline, spread = clone(estimator).fit(X), clone(estimator).set_params(engine=engine).fit(X)
    assert_close(spread.components_, inline.components_, claim="two processes", **SAME_BITS)
    assert_close(spread.residuals_, inline.residuals_, claim="two processes", **SAME_BITS)
    assert spread.traffic_.bytes_up > 0


@pytest.mark.ray
@pytest.mark.slow
def test_an_asynchronous_fit_on_ray_repeats_here_bit_for_bit() -> None:
    ray_actors = pytest.importorskip("partwise.engine.ray_actors", reason="needs the extra ray")
    covariance, model = covariance_of(data()), ParallelDeflationPCA(4, mode="async", random_state=0)
    with ray_actors.RayActors(2) as engine:
        method, start = model.round_method(covariance, 1), random_eigenpairs(4, 25, seed=1)
        spread, _, schedule = solve_rounds(method, start, num_rounds=500, engine=engine, mode="async")
    assert method.settled(spread)
    here, _, _ = solve_rounds(method, start, num_rounds=500, engine=None, schedule=schedule)
    assert_close(here.vectors, spread.vectors, claim="the events of the cluster, in this process", **SAME_BITS)


REFUSED: list[tuple[RoundEstimator, str]] = [
    (ParallelDeflationPCA(0), r"n_components=0 must be an integer of at least 1"),
    (ParallelDeflationPCA(1.5), r"n_components=1\.5 must be an integer"),  # type: ignore[arg-type]
    (ParallelDeflationPCA(26), r"n_components=26 does not fit data of 300 samples and 25 features: it must be between 1 and 25\. Pass n_components=25"),
    (ParallelDeflationPCA(solver="newton"), r"solver='newton' is not known\. Choose one of: power, hebb, lanczos"),
    (ParallelDeflationPCA(solver="adam"), r"solver='adam' is not known"),
    (ParallelDeflationPCA(batch_size=10), r"batch_size=10 with solver='power', expected solver='hebb'"),
    (ParallelDeflationPCA(step_size=-1.0, solver="hebb"), r"got step_size=-1\.0, expected a finite number above 0"),
    (ParallelDeflationPCA(tol=-1.0), r"got tol=-1\.0, expected 0 or more and below 1"),
    (ParallelDeflationPCA(num_rounds=0), r"num_rounds=0 must be an integer of at least 1"),
    (ParallelDeflationPCA(3, num_rounds=2), r"num_rounds=2 for 3 parts, expected at least 3: part k joins in round k"),
    (ParallelDeflationPCA(mode="later"), r"mode='later' is not known\. Choose one of: sync, async"),
    (ParallelDeflationPCA(max_staleness=1), r"max_staleness=1 with mode='sync', expected mode='async'"),
    (ParallelDeflationPCA(mode="async", max_staleness=0), r"max_staleness=0 must be an integer of at least 1"),
    (ParallelDeflationPCA(mode="async", solver="lanczos"), r"mode='async' with solver='lanczos' and all components in one block, expected at least two"),
    (ParallelDeflationPCA(block_size=1), r"block_size=1 with solver='power', expected solver='lanczos'"),
    (ParallelDeflationPCA(engine="cloud"), r"engine='cloud' is not known\. Choose one of: inline, ray"),
    (ParallelDeflationPCA(num_workers=3), r"num_workers=3 for 2 parts, expected at most one each"),
    (EigenGame(variant="beta"), r"variant='beta' is not known\. Choose one of: mu, alpha"),
    (EigenGame(optimizer="lion"), r"optimizer='lion' is not known\. Choose one of: sgd, adam"),
    (EigenGame(step_size=0.0), r"got step_size=0\.0"),
]


@pytest.mark.parametrize(("estimator", "text"), REFUSED, ids=lambda value: repr(value) if isinstance(value, BaseEstimator) else "")
def test_bad_settings_are_refused_when_fitting(estimator: RoundEstimator, text: str) -> None:
    with pytest.raises(InputError, match=text):
        clone(estimator).fit(data())


BAD_DATA: list[tuple[Any, str]] = [
    (data().astype(np.float16), r"got float16 numbers, expected float32, float64 or integers\. Convert them"),
    (data() + 1j, r"Complex data not supported"),
    (np.where(np.arange(300)[:, None] == 7, np.nan, data()), r"X has 25 NaN or infinite entries out of 7500, the first in row 7, column 0"),
    (scipy.sparse.csr_array(np.where(np.arange(300)[:, None] == 7, np.inf, data())), r"X has 25 NaN or infinite entries"),
    (np.arange(2**60, 2**60 + 12).reshape(4, 3), r"got integers up to 1152921504606846987 in size, expected at most 2\^53 = 9007199254740992"),
    (np.full((10, 4), 0.1), r"got data in which every column is constant, expected at least one that varies"),
    (data()[:1], r"1 sample"),
    (data()[0], r"Expected 2D array, got 1D array"),
    (np.array([["a", "b"], ["c", "d"]], dtype=object), r"could not convert string to float"),
]


@pytest.mark.parametrize(("X", "text"), BAD_DATA, ids=[text for _, text in BAD_DATA])
def test_bad_data_are_refused(X: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ParallelDeflationPCA(1).fit(X)


def test_what_was_not_fitted_or_does_not_fit_is_refused() -> None:
    with pytest.raises(NotFittedError):
        ParallelDeflationPCA().transform(data())
    model = ParallelDeflationPCA(random_state=0).fit(data())
    with pytest.raises(ValueError, match="X has 24 features, but ParallelDeflationPCA is expecting 25 features as input"):
        model.transform(data()[:, 1:])
    with pytest.raises(InputError, match="X has 24 features, but ParallelDeflationPCA is expecting 25 features as input"):
        model.transform(aslinearoperator(data()[:, 1:]))
    with pytest.raises(InputError, match=r"got coordinates of shape \(5, 3\), expected \(n_samples, 2\)\. Pass what transform returned"):
        model.inverse_transform(np.zeros((5, 3)))


def test_a_failed_fit_leaves_the_settings_alone() -> None:
    model = ParallelDeflationPCA(3, random_state=0)
    before = copy.deepcopy(model.get_params())
    model.fit(data())
    assert model.get_params() == before


def test_the_rows_do_not_travel_with_a_formed_covariance() -> None:
    sent: list[Any] = []

    def engine(method: Any, parts: Any) -> list[Any]:
        sent.append(method.covariance)
        return method.work_all(parts)  # type: ignore[no-any-return]

    ParallelDeflationPCA(2, engine=engine, random_state=0).fit(data())
    assert isinstance(sent[0], GramCovariance)
    assert sent[0].source is None
