"""Claims about data at the edges: operators that do not fit together, numbers that float64 cannot hold, huge columns, and any unit of the data."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning

from matrices import gaussian
from partwise.checks import InputError
from partwise.decompose import EigenGame, HotellingDeflationPCA, ParallelDeflationPCA, certify
from partwise.decompose._covariance import covariance_of
from partwise.decompose._eigen_rounds import Eigenpairs
from partwise.decompose._readers import NpyRows
from partwise.decompose.parallel_deflation import RoundEstimator
from partwise.engine.inline import InlineWorkers
from partwise.rounds import Schedule
from tolerances import assert_close

SAME_BITS = {"rtol": 0.0, "atol": 0.0}


def data(*, num_samples: int = 200, num_features: int = 12, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num_samples, num_features)) * 1.3 ** -np.arange(num_features) + 2.0


def operator_with(X: NDArray[Any], back: NDArray[Any], dtype: Any = float) -> LinearOperator:
    return LinearOperator(X.shape, matvec=lambda v: X @ v.ravel(), rmatvec=lambda u: back @ u.ravel(), dtype=dtype)


@pytest.mark.parametrize("back", [data().T * -1, data().T * 1.001, data()[::-1].T, data(seed=1).T], ids=["sign", "size", "order", "other"])
def test_an_operator_whose_products_do_not_belong_together_is_refused(back: NDArray[Any]) -> None:
    for use in (covariance_of, ParallelDeflationPCA(2).fit, lambda X: certify(X, np.eye(12)[:2])):
        with pytest.raises(InputError, match=r"rmatvec does not belong to its matvec: u \(X v\) is .* Check rmatvec") as caught:
            use(operator_with(data(), back))
        assert caught.value.code == "operator-adjoint"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4000, 30), (20, 3000)])
def test_rounding_of_an_operator_is_not_taken_for_a_mistake(shape: tuple[int, int], dtype: Any) -> None:
    for offset in (0.0, 1000.0):
        X = (gaussian(*shape) + offset).astype(dtype)
        covariance_of(aslinearoperator(X))
    covariance_of(aslinearoperator(np.zeros(shape)))


def test_an_operator_that_multiplies_from_one_side_only_is_refused() -> None:
    with pytest.raises(InputError, match=r"got a LinearOperator without rmatvec, expected products with the data from both sides\. Pass rmatvec"):
        ParallelDeflationPCA(2).fit(LinearOperator((30, 4), matvec=lambda v: np.ones(30), dtype=float))


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_integers_that_float64_cannot_hold_are_refused_from_everywhere(dtype: Any, tmp_path: Path) -> None:
    X = (np.arange(60).reshape(20, 3) + 2**60).astype(dtype)
    np.save(tmp_path / "x.npy", X)
    forms = (X, X[:2], scipy.sparse.csc_array(X), np.load(tmp_path / "x.npy", mmap_mode="r"), NpyRows.open(tmp_path / "x.npy"))
    for form in forms:
        for use in (covariance_of, ParallelDeflationPCA(1).fit, lambda X: certify(X, np.eye(3)[:1])):
            with pytest.raises(InputError, match=r"got integers up to \d+ in size, expected at most 2\^53") as caught:
                use(form)
            assert caught.value.code == "integers-too-large"


def test_half_precision_is_refused_from_everywhere(tmp_path: Path) -> None:
    X = data().astype(np.float16)
    np.save(tmp_path / "x.npy", X)
    for form in (X, np.load(tmp_path / "x.npy", mmap_mode="r"), NpyRows.open(tmp_path / "x.npy"), aslinearoperator(X)):
        for use in (covariance_of, ParallelDeflationPCA(1).fit, lambda X: certify(X, np.eye(12)[:1])):
            with pytest.raises(InputError, match=r"got float16 numbers, expected float32, float64 or integers\. Convert them"):
                use(form)


FORMS: dict[str, Any] = {"formed": lambda X: X, "not formed": lambda X: X[:10], "sparse": scipy.sparse.csr_array, "operator": aslinearoperator}


@pytest.mark.parametrize("size", [1.7e18, 0.1, 1e100, 0.0])
@pytest.mark.parametrize("form", ["formed", "not formed", "sparse"])
def test_a_constant_column_of_any_size_breaks_nothing(form: str, size: float) -> None:
    X = data()[:10] if form == "not formed" else data()
    alone = PCA(2, svd_solver="full").fit(X)
    model = ParallelDeflationPCA(2, solver="lanczos", random_state=0).fit(FORMS[form](np.c_[X, np.full(len(X), size)]))
    np.testing.assert_allclose(model.explained_variance_, alone.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose(np.abs(model.components_[:, -1]), 0.0, atol=1e-9)
    np.testing.assert_allclose(model.mean_[-1], size, rtol=1e-15)


def test_an_operator_that_a_huge_column_drowns_is_refused() -> None:
    drowned = aslinearoperator(np.c_[data(), np.full(200, 1.7e18)])  # which cannot be centred column by column
    with pytest.raises(InputError, match=r"variance is lost in the rounding of their means, .*Subtract a constant from each column") as caught:
        ParallelDeflationPCA(2, random_state=0).fit(drowned)
    assert caught.value.code == "no-variance"


CONSTANT_FORMS: list[Any] = [np.asarray, lambda X: np.tile(X, (1, 5)), scipy.sparse.csr_array, aslinearoperator]


@pytest.mark.parametrize("form", CONSTANT_FORMS, ids=["tall", "wide", "sparse", "operator"])
@pytest.mark.parametrize("value", [0.1, 0.0, 1.7e18, 1e-200, 1e140])
def test_data_of_constant_columns_have_no_variance(form: Any, value: float) -> None:
    X = np.full((10, 4), value) * [1.0, 3.0, 7.0, 0.3]
    with pytest.raises(InputError, match="every column is constant"):
        ParallelDeflationPCA(1, random_state=0).fit(form(X))


MODELS: list[RoundEstimator] = [
    ParallelDeflationPCA(3, random_state=0),
    ParallelDeflationPCA(3, solver="hebb", random_state=0),
    ParallelDeflationPCA(3, solver="hebb", batch_size=40, num_rounds=30, random_state=0),
    ParallelDeflationPCA(3, solver="lanczos", block_size=2, random_state=0),
    ParallelDeflationPCA(3, mode="async", random_state=0),
    EigenGame(3, variant="alpha", random_state=0),
    EigenGame(3, optimizer="adam", random_state=0),
    HotellingDeflationPCA(3, random_state=0),
]


@pytest.mark.parametrize("exponent", [-420, -266, 80, 484])  # 1e-126, 1e-80, 1e24, 1e146
@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_no_result_depends_on_the_unit_of_the_data(model: RoundEstimator, exponent: int) -> None:
    unit = 2.0**exponent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if getattr(model, "batch_size", None) else "error", ConvergenceWarning)
        plain, other = clone(model).fit(data()), clone(model).fit(data() * unit)
    assert_close(other.components_, plain.components_, claim="another unit", **SAME_BITS)
    for name in ("explained_variance_", "eigenvalue_intervals_", "residuals_"):
        assert_close(getattr(other, name) / unit**2, getattr(plain, name), claim=name, **SAME_BITS)
    assert_close(other.explained_variance_ratio_, plain.explained_variance_ratio_, claim="ratio", **SAME_BITS)
    assert other.converged_ == plain.converged_
    assert other.missed_value_test_.passed
    assert other.missed_value_test_.bound == pytest.approx(plain.missed_value_test_.bound * unit**2, rel=1e-12)
    np.testing.assert_array_equal(np.array(other.history_[-1]["values"]) / unit**2, plain.history_[-1]["values"])
    for name in ("error_bounds_", "residual_bounds_"):
        np.testing.assert_allclose(getattr(other, name, 0.0), getattr(plain, name, 0.0), rtol=1e-9)
    np.testing.assert_allclose(np.isfinite(other.singular_values_), True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e-120, 1e-80, 1e80, 1e146])
def test_values_are_those_of_the_data_in_any_unit(form: str, size: float) -> None:
    X = data()[:10] if form == "not formed" else data()
    model = ParallelDeflationPCA(2, random_state=0).fit(FORMS[form](X * size))
    np.testing.assert_allclose(np.sqrt(model.explained_variance_) / size, np.sqrt(PCA(2).fit(X).explained_variance_), rtol=1e-6)
    certificate = certify(FORMS[form](X * size), model.components_)
    assert certificate.missed_value_test.passed
    np.testing.assert_allclose(certificate.values, model.explained_variance_, rtol=1e-12)


def test_a_run_in_another_unit_goes_on_with_the_same_bits() -> None:
    states: dict[int, Eigenpairs] = {}
    covariance, model = covariance_of(data() * 2.0**-300), ParallelDeflationPCA(3, num_rounds=12, tol=0, random_state=0)
    model.fit_from(covariance, progress=states.__setitem__)
    assert 2.0**-610 < states[3].values[0] < 2.0**-590  # in the unit of the data
    resumed = clone(model).fit_from(covariance, start=states[3])
    assert_close(resumed.components_, model.components_, claim="the last 9 rounds", **SAME_BITS)


@pytest.mark.parametrize("form", ["formed", "not formed", "sparse", "operator"])
def test_data_too_small_or_too_large_to_be_squared_are_refused(form: str) -> None:
    for size in (1e-170, 1e-140):
        with pytest.raises(InputError, match=r"got entries that vary by .*e-1\d\d at most, expected a total variance of at least 1e-260.* Multiply") as caught:
            ParallelDeflationPCA(2).fit(FORMS[form](data() * size))
        assert caught.value.code == "too-small"
    with pytest.raises(InputError, match=r"got entries so large that their squares overflow, expected absolute values below 1e\+148"):
        ParallelDeflationPCA(2).fit(FORMS[form](data() * 1e160))


@pytest.mark.parametrize("size", [1e25, 1e-30])
def test_values_of_float32_data_are_kept_where_float32_cannot_hold_them(size: float) -> None:
    X = (data() * size).astype(np.float32)
    model, exact = ParallelDeflationPCA(2, random_state=0).fit(X), PCA(2).fit(data())
    assert model.components_.dtype == model.mean_.dtype == model.transform(X).dtype == np.float32
    np.testing.assert_allclose(np.sqrt(model.explained_variance_) / size, np.sqrt(exact.explained_variance_), rtol=1e-5)
    np.testing.assert_allclose(model.singular_values_ / size, exact.singular_values_, rtol=1e-5)
    np.testing.assert_allclose(model.explained_variance_ratio_, exact.explained_variance_ratio_, rtol=1e-5)


def test_anything_that_becomes_an_array_can_be_certified() -> None:
    class Table:
        shape = (200, 12)

        def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
            return data()

    components = PCA(2, svd_solver="full").fit(data()).components_
    assert certify(Table(), components).missed_value_test.passed
    pandas = pytest.importorskip("pandas", reason="reads a DataFrame")
    np.testing.assert_array_equal(certify(pandas.DataFrame(data()), components).values, certify(data(), components).values)
    with pytest.raises(InputError, match=r"got data of shape \(12,\), expected a matrix"):
        certify(data()[0], components)


REFUSED: list[tuple[RoundEstimator, str, str]] = [
    (ParallelDeflationPCA(tol="a"), "tol-range", r"got tol='a', expected 0 or more and below 1"),  # type: ignore[arg-type]
    (ParallelDeflationPCA(tol=None), "tol-range", r"got tol=None"),  # type: ignore[arg-type]
    (ParallelDeflationPCA(solver="hebb", step_size="b"), "step-size-range", r"got step_size='b', expected a finite number"),  # type: ignore[arg-type]
    (ParallelDeflationPCA(batch_size=10), "batch-needs-hebb", r"expected solver='hebb': a full step .* Pass solver='hebb', or batch_size=None\."),
    (ParallelDeflationPCA(step_size=1.0), "step-needs-hebb", r"got step_size=1\.0 with solver='power', expected solver='hebb'"),
    (ParallelDeflationPCA(step_size=1.0, solver="lanczos"), "step-needs-hebb", r"with solver='lanczos', expected solver='hebb'"),
]


@pytest.mark.parametrize(("model", "code", "text"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_settings_that_would_not_be_used_are_refused(model: RoundEstimator, code: str, text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        clone(model).fit(data())
    assert caught.value.code == code
    assert "adam" not in str(caught.value)


@pytest.mark.parametrize("model_class", [ParallelDeflationPCA, HotellingDeflationPCA])
def test_one_direction_is_not_several(model_class: type[RoundEstimator]) -> None:
    X = np.outer(np.arange(10.0), np.ones(4))
    with pytest.warns(UserWarning, match=r"only 1 direction with variance.* the fit has 1 component\.|The fit has 1 component\."):
        model_class(2, random_state=0).fit(X)


@pytest.mark.parametrize("model", [*MODELS[:-1], EigenGame(3, num_rounds=20, tol=0, random_state=0)], ids=repr)
def test_an_asynchronous_fit_repeats_in_the_order_of_its_schedule(model: RoundEstimator) -> None:
    X = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        workers = InlineWorkers(seed=11)  # another order than that of engine="inline"
        spread = clone(model).set_params(mode="async", engine=workers).fit(X)
        schedule = Schedule.from_json(spread.schedule_.to_json())
        again = clone(model).set_params(mode="async", max_staleness=1).replay(X, schedule)
        other = clone(model).set_params(mode="async").fit(X)
    for name in ("components_", "explained_variance_", "eigenvalue_intervals_", "residuals_"):
        assert_close(getattr(again, name), getattr(spread, name), claim=name, **SAME_BITS)
    assert (again.n_iter_, again.converged_, again.schedule_, again.traffic_) == (spread.n_iter_, spread.converged_, schedule, None)
    assert other.schedule_ != schedule or getattr(model, "solver", None) == "lanczos"  # two blocks have one order only
    assert not hasattr(again, "_to_repeat")


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(InputError, match=r"got mode='sync' in replay, expected mode='async': rounds in step always repeat by themselves\. Call fit"):
        ParallelDeflationPCA(2, random_state=0).replay(data(), Schedule(()))
    model = ParallelDeflationPCA(2, mode="async", random_state=0)
    with pytest.raises(InputError, match=r"got a schedule of type NoneType, expected a Schedule\. Pass schedule_ of the earlier fit"):
        model.replay(data(), None)  # type: ignore[arg-type]
    more = ParallelDeflationPCA(4, mode="async", random_state=0).fit(data())
    assert more.schedule_ is not None
    with pytest.raises(InputError) as caught:
        model.replay(data(), more.schedule_)
    assert caught.value.code == "schedule-mismatch"
    assert model.fit(data()).converged_  # and the estimator is as it was


@pytest.mark.ray
@pytest.mark.slow
def test_an_asynchronous_fit_on_ray_is_replayed_here() -> None:
    ray_actors = pytest.importorskip("partwise.engine.ray_actors", reason="needs the extra ray")
    model = ParallelDeflationPCA(4, mode="async", random_state=0)
    with ray_actors.RayActors(2) as engine:
        spread = clone(model).set_params(engine=engine).fit(data())
    again = clone(model).set_params(engine="ray").replay(data(), spread.schedule_)  # which no cluster is started for
    assert_close(again.components_, spread.components_, claim="the events of the cluster, in this process", **SAME_BITS)


def test_with_a_tolerance_of_zero_a_tie_is_not_called_a_missed_value() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 5))
    scores = np.linalg.qr(rows - rows.mean(axis=0))[0] * np.sqrt(59)
    X = scores * np.sqrt([3.0, 1.0 + 1e-9, 1.0, 0.5, 0.2])
    held = Eigenpairs(np.eye(5)[[0, 2]], np.array([3.0, 1.0]), np.zeros(2), (1, 1), (True, True), None, 4)
    model = ParallelDeflationPCA(2, tol=0, num_rounds=4, random_state=0).fit_from(covariance_of(X), start=held)
    assert model.missed_value_test_.passed
