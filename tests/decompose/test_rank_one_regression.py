"""Claims of the two estimators: what they learn, what they keep, what they refuse."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from matrices import gaussian, matrix_with
from partwise.checks import InputError, MissingExtra, RunError
from partwise.decompose import METHODS, ParallelRankOneRegression, SequentialRankOneRegression
from partwise.decompose.rank_one_rounds import PairResult
from partwise.engine.inline import inline
from partwise.linalg.rank_one import exact_parts, reduce_regression
from tolerances import assert_close

SPECTRUM = [4.0, 2.0, 1.0, 0.5]
ESTIMATORS = [ParallelRankOneRegression, SequentialRankOneRegression]
every_estimator = pytest.mark.parametrize("estimator_class", ESTIMATORS, ids=lambda cls: cls.__name__)


def data(dtype: type = np.float64, *, num_samples: int = 40, noise: float = 0.1, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows are samples: X (samples, 6), y (samples, 5)."""
    inputs = gaussian(num_samples, 6, seed=seed)
    targets = inputs @ matrix_with(SPECTRUM, rows=6, columns=5, seed=seed) + noise * gaussian(num_samples, 5, seed=seed + 1)
    return inputs.astype(dtype), targets.astype(dtype)


@parametrize_with_checks(
    [
        ParallelRankOneRegression(random_state=0),
        ParallelRankOneRegression(activation="staggered", solver="gd", num_local_steps=20, random_state=0),
        ParallelRankOneRegression(activation="all", solver="svd", random_state=0),
        ParallelRankOneRegression(mode="async", max_staleness=2, random_state=0),
        SequentialRankOneRegression(random_state=0),
        SequentialRankOneRegression(solver="gd", num_steps=400, random_state=0),
    ]
)
def test_scikit_learn_accepts_the_estimators(estimator: BaseEstimator, check: Any) -> None:
    check(estimator)


@every_estimator
def test_at_full_rank_the_fit_is_least_squares(estimator_class: type) -> None:
    X, y = data()
    model = estimator_class(n_components=5, solver="svd").fit(X, y)
    assert_close(model.coef_, np.linalg.lstsq(X, y, rcond=None)[0].T, claim="numpy's least squares")
    np.testing.assert_allclose(model.predict(X), X @ model.coef_.T)


def test_many_rounds_reach_the_best_regression_of_a_lower_rank() -> None:
    X, y = data()
    problem = reduce_regression(X.T, y.T)
    exact = exact_parts(problem.target, num_components=2)
    model = ParallelRankOneRegression(n_components=2, num_rounds=300, tol=0, random_state=0).fit(X, y)
    assert_close(model.coef_, exact.left.T @ exact.scaled_right @ problem.unreduce.T, claim="Eckart-Young in the fitted part")
    assert_close(model.singular_values_, exact.singular_values[:2], claim="size of each map")
    assert model.errors_per_round_.shape == (300, 2)
    assert model.errors_per_round_[-1].max() < 1e-12


@every_estimator
def test_the_attributes_fit_together(estimator_class: type) -> None:
    X, y = data()
    model = estimator_class(n_components=3, random_state=0).fit(X, y)
    assert (model.components_.shape, model.y_loadings_.shape, model.coef_.shape) == ((3, 6), (5, 3), (5, 6))
    np.testing.assert_allclose(model.y_loadings_ @ model.components_, model.coef_)
    np.testing.assert_allclose(np.linalg.norm(model.y_loadings_, axis=0), 1)
    np.testing.assert_allclose(np.linalg.norm(X @ model.components_.T, axis=0), model.singular_values_)
    assert all(row[np.abs(row).argmax()] > 0 for row in model.components_)
    assert model.rank_ == 6
    assert model.errors_per_round_.shape == (model.n_iter_, 3)


@every_estimator
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_of_the_inputs_is_kept(estimator_class: type, dtype: type) -> None:
    X, y = data(dtype)
    model = estimator_class(n_components=2, random_state=0).fit(X, y)
    arrays = (model.coef_, model.components_, model.y_loadings_, model.singular_values_, model.errors_per_round_, model.predict(X))
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}
    double = estimator_class(n_components=2, random_state=0).fit(*data(np.float64))
    np.testing.assert_allclose(model.coef_, double.coef_, atol=2e-4)


@every_estimator
def test_one_target_gives_one_axis(estimator_class: type) -> None:
    X, y = data()
    model = estimator_class().fit(X, y[:, 0])
    assert model.coef_.shape == (6,)
    assert model.predict(X).shape == (40,)
    np.testing.assert_allclose(model.coef_, np.linalg.lstsq(X, y[:, 0], rcond=None)[0])


@every_estimator
@pytest.mark.parametrize("solver", ["power", "gd", "svd"])
def test_the_unit_of_the_targets_changes_nothing_but_the_scale(estimator_class: type, solver: str) -> None:
    X, y = data()
    limits = {"num_rounds": 400} if estimator_class is ParallelRankOneRegression else {}
    plain = estimator_class(n_components=2, solver=solver, **limits, random_state=1).fit(X, y)
    scaled = clone(plain).fit(X, 1000 * y)
    assert_close(scaled.coef_, 1000 * plain.coef_, claim="y -> 1000 y", rtol=1e-8)
    assert scaled.n_iter_ == plain.n_iter_


@every_estimator
def test_the_inputs_are_not_changed_and_the_seed_decides(estimator_class: type) -> None:
    X, y = data()
    kept = X.copy(), y.copy()
    first, second = (estimator_class(n_components=2, random_state=5).fit(X, y) for _ in range(2))
    np.testing.assert_array_equal(first.errors_per_round_, second.errors_per_round_)
    other = estimator_class(n_components=2, random_state=6).fit(X, y)
    assert not np.array_equal(first.errors_per_round_[:1], other.errors_per_round_[:1])
    np.testing.assert_array_equal(X, kept[0])
    np.testing.assert_array_equal(y, kept[1])


def test_tol_ends_the_rounds_early_and_zero_runs_them_all() -> None:
    X, y = data()
    loose, tight = (ParallelRankOneRegression(n_components=3, tol=tol, random_state=0).fit(X, y) for tol in (1e-2, 1e-8))
    assert 3 < loose.n_iter_ < tight.n_iter_ < 200
    assert tight.errors_per_round_[-1].max() < 1e-6
    assert ParallelRankOneRegression(n_components=3, tol=0, num_rounds=50, random_state=0).fit(X, y).n_iter_ == 50


def test_maps_that_still_move_are_reported() -> None:
    X, y = data()
    with pytest.warns(ConvergenceWarning, match=r"In round num_rounds=3 a map still moved by .* of its size, more than tol=1e-05\. Raise num_rounds"):
        ParallelRankOneRegression(n_components=3, num_rounds=3, random_state=0).fit(X, y)


def test_maps_that_stand_still_where_they_should_not_be_are_reported() -> None:
    X, y = data()

    def idle(_: Any, parts: Any) -> Any:
        return [PairResult(part.index, part.left, part.right) for part in parts]

    with pytest.warns(ConvergenceWarning, match=r"square of singular value \d is known to \+-.* of the largest only, .* has not arrived\. Pass"):
        model = ParallelRankOneRegression(n_components=2, engine=idle, activation="all", random_state=0).fit(X, y)
    assert (model.converged_, model.n_iter_) == (True, 2)  # round 1 has nothing to compare with


def test_a_map_that_was_skipped_is_reported() -> None:
    X, y = data()

    def skipping(method: Any, parts: Any) -> Any:
        exact = exact_parts(method.target, num_components=3)
        return [PairResult(part.index, exact.left[part.index + 1], exact.scaled_right[part.index + 1]) for part in parts]

    with pytest.warns(ConvergenceWarning, match=r"A search outside the maps found the eigenvalue .* the smallest one kept\. Pass another random_state"):
        model = ParallelRankOneRegression(n_components=2, engine=skipping, random_state=0).fit(X, y)
    assert not model.missed_value_test_.passed
    assert model.residuals_.max() < 1e-10


@pytest.mark.parametrize("activation", ["staggered", "advance", "all"])
@pytest.mark.parametrize("max_staleness", [None, 1])
def test_maps_that_do_not_wait_for_each_other_find_the_same_regression(activation: str, max_staleness: int | None) -> None:
    X, y = data()
    settings = {"activation": activation, "tol": 1e-8, "random_state": 0}
    waiting = ParallelRankOneRegression(n_components=3, **settings).fit(X, y)
    free = ParallelRankOneRegression(n_components=3, mode="async", max_staleness=max_staleness, **settings).fit(X, y)
    np.testing.assert_allclose(free.coef_, waiting.coef_, atol=1e-6)
    assert free.converged_
    assert free.errors_per_round_[-1].max() < 1e-6
    assert waiting.schedule_ is None
    assert free.schedule_.num_updates == free.n_iter_ == len(free.errors_per_round_)
    assert max(free.schedule_.ages) <= (max_staleness or len(free.schedule_.ages))


def test_an_asynchronous_fit_can_be_repeated_to_the_same_bits() -> None:
    X, y = data()
    model = ParallelRankOneRegression(n_components=3, mode="async", random_state=0)
    first, second, other = (clone(model).set_params(random_state=seed).fit(X, y) for seed in (0, 0, 1))
    assert first.schedule_ == second.schedule_ != other.schedule_
    np.testing.assert_array_equal(first.coef_, second.coef_)


@every_estimator
@pytest.mark.parametrize("unit", [1.0, 1e3])
def test_the_intervals_hold_the_squares_of_the_largest_singular_values(estimator_class: type, unit: float) -> None:
    X, y = data()
    problem = reduce_regression(X.T, unit * y.T)
    squares = exact_parts(problem.target, num_components=3).singular_values[:3] ** 2
    model = estimator_class(n_components=3, random_state=0).fit(X, unit * y)
    lower, upper = model.eigenvalue_intervals_.T
    assert (lower <= squares).all()
    assert (squares <= upper).all()
    assert (model.residuals_ <= 1e-4 * squares[0]).all()
    assert model.missed_value_test_.passed
    assert model.missed_value_test_.smallest_kept == pytest.approx(squares[2], rel=1e-6)


def test_local_steps_save_rounds() -> None:
    X, y = data()
    few, many = (ParallelRankOneRegression(n_components=3, num_local_steps=steps, tol=1e-8, random_state=0).fit(X, y).n_iter_ for steps in (1, 5))
    assert many < few / 2


def test_schedules_deal_the_steps_and_alpha_says_how_steeply() -> None:
    X, y = data()

    def steps(**settings: Any) -> tuple[int, ...]:
        return SequentialRankOneRegression(n_components=4, num_steps=40, min_steps=2, random_state=0, **settings).fit(X, y).steps_

    assert steps() == (10, 10, 10, 10)
    assert steps(schedule="more-first") == (18, 13, 7, 2)
    assert steps(schedule="less-first") == (2, 7, 13, 18)
    assert steps(schedule="more-first", alpha=0.3) == (12, 11, 9, 8)


def test_sequential_errors_stay_where_parallel_ones_vanish() -> None:
    X, y = data()
    sequential = SequentialRankOneRegression(n_components=3, num_steps=9, random_state=0).fit(X, y)
    parallel = ParallelRankOneRegression(n_components=3, tol=0, num_rounds=200, random_state=0).fit(X, y)
    assert sequential.errors_per_round_[-1].max() > 1e-3
    assert parallel.errors_per_round_[-1].max() < 1e-12
    np.testing.assert_array_equal(sequential.errors_per_round_[1:, 0], sequential.errors_per_round_[0, 0])


REFUSED_BY_BOTH = [
    ({"n_components": 6}, r"n_components=6 does not fit a matrix of shape \(5, 6\): it must be between 1 and 5"),
    ({"n_components": 0}, r"n_components=0 must be an integer of at least 1"),
    ({"n_components": 1.5}, r"n_components=1\.5 must be an integer of at least 1"),
    ({"solver": "newton"}, r"solver='newton' is not known\. Choose one of: power, gd, svd"),
    ({"engine": "spark"}, r"engine='spark' is not known\. Choose one of: inline, ray"),
    ({"n_components": 2, "engine": "ray", "num_workers": 3}, r"got num_workers=3 for 2 parts, expected at most one each\. Pass num_workers=2 or fewer"),
    ({"num_workers": 0}, r"num_workers=0 must be an integer of at least 1"),
    ({"lr": 0.0}, r"got lr=0\.0, expected more than 0 and at most 0\.5"),
]
REFUSED_BY_PARALLEL = [
    (
        {"num_rounds": 2, "n_components": 3},
        r"num_rounds=2 for n_components=3 with activation='advance', expected at least 3: component k joins in round k",
    ),
    ({"num_rounds": 2, "n_components": 3, "activation": "staggered"}, r"num_rounds=2 .* activation='staggered', expected at least 3"),
    ({"num_rounds": 0, "activation": "all"}, r"num_rounds=0 must be an integer of at least 1"),
    ({"mode": "later"}, r"mode='later' is not known\. Choose one of: sync, async"),
    ({"max_staleness": 1}, r"max_staleness=1 with mode='sync', expected mode='async': in synchronous rounds nothing is stale"),
    ({"mode": "async", "max_staleness": 0}, r"max_staleness=0 must be an integer of at least 1"),
    ({"mode": "async", "engine": inline}, r"mode='async' with engine=<function inline.*>, expected an engine that takes parts one at a time\. Pass"),
    ({"num_local_steps": 0}, r"num_local_steps=0 must be an integer of at least 1"),
    ({"activation": "later"}, r"activation='later' is not known\. Choose one of: staggered, advance, all"),
    ({"tol": -1.0}, r"got tol=-1\.0, expected 0 or more and below 1"),
    ({"tol": float("nan")}, r"got tol=nan, expected 0 or more and below 1"),
]
REFUSED_BY_SEQUENTIAL = [
    ({"n_components": 3, "num_steps": 5, "min_steps": 2}, r"num_steps=5 for 3 components of at least 2 steps, expected at least 6"),
    ({"schedule": "more-first"}, r"alpha=1\.0 for one component, expected at least two"),
    ({"schedule": "later"}, r"schedule='later' is not known\. Choose one of: equal, more-first, less-first"),
    ({"alpha": 0.0}, r"got alpha=0\.0, expected more than 0\. The direction is the schedule's"),
    ({"n_components": 2, "schedule": "more-first", "alpha": float("inf")}, r"alpha=inf, expected a finite number"),
]
REFUSALS = [(estimator, *refusal) for estimator in ESTIMATORS for refusal in REFUSED_BY_BOTH]
REFUSALS += [(ParallelRankOneRegression, *refusal) for refusal in REFUSED_BY_PARALLEL]
REFUSALS += [(SequentialRankOneRegression, *refusal) for refusal in REFUSED_BY_SEQUENTIAL]


@pytest.mark.parametrize(("estimator_class", "settings", "text"), REFUSALS)
def test_settings_are_checked_when_fitting(estimator_class: type, settings: dict[str, Any], text: str) -> None:
    model = estimator_class(**settings)
    with pytest.raises(InputError, match=text):
        model.fit(*data())
    assert not hasattr(model, "coef_")


@every_estimator
def test_more_components_than_the_data_determine_are_refused_with_the_rank(estimator_class: type) -> None:
    X, _ = data()
    y = X @ matrix_with([2.0, 1.0], rows=6, columns=5)
    with pytest.raises(
        InputError, match=r"n_components=3 is above the numerical rank 2 of what X \(rank 6\) can explain of y\. Pass n_components=2 or less"
    ):
        estimator_class(n_components=3).fit(X, y)


@every_estimator
def test_targets_that_the_inputs_do_not_explain_are_refused(estimator_class: type) -> None:
    X, y = data()
    basis, _ = np.linalg.qr(X)
    with pytest.raises(InputError, match=r"numerical rank 0 of what X \(rank 6\) can explain of y\. Pass other targets: X explains nothing"):
        estimator_class().fit(X, y - basis @ (basis.T @ y))


@every_estimator
@pytest.mark.parametrize("name", ["X", "y"])
def test_columns_of_zeros_are_refused_and_counted(estimator_class: type, name: str) -> None:
    X, y = data()
    {"X": X, "y": y}[name][:, [1, 3]] = 0
    with pytest.raises(InputError, match=rf"got 2 of \d columns of {name} with zeros only \(the first has index 1\), expected none\. Drop them"):
        estimator_class().fit(X, y)


@every_estimator
@pytest.mark.parametrize("name", ["X", "y"])
def test_nan_and_infinite_entries_are_counted_and_the_first_is_named(estimator_class: type, name: str) -> None:
    X, y = data()
    {"X": X, "y": y}[name][2, 1] = np.nan
    with pytest.raises(InputError, match=rf"{name} has 1 NaN or infinite entries out of \d+, the first in row 2, column 1 \(counted from 0\)\. Remove"):
        estimator_class().fit(X, y)
    with pytest.raises(InputError, match=r"y has 2 NaN or infinite entries out of 40, the first in row 7 \(counted from 0\)"):
        estimator_class().fit(data()[0], np.where(np.arange(40) % 20 == 7, np.inf, 1.0))


@every_estimator
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_singular_values_are_reported_because_only_their_span_is_defined(estimator_class: type, dtype: type) -> None:
    X = np.eye(6, dtype=dtype)
    y = matrix_with([3.0, 2.0, 2.0, 1.0], rows=6, columns=5).astype(dtype)
    with pytest.warns(UserWarning, match=r"Singular values 2 and 3 are equal up to rounding: .* only their span is"):
        estimator_class(n_components=2, solver="svd", random_state=0).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the first is told apart from the second
        estimator_class(n_components=1, solver="svd", random_state=0).fit(X, y)


def test_gradient_steps_that_diverge_stop_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = data()
    monkeypatch.setattr("partwise.decompose.rank_one_rounds.START_NORM", 100.0)  # no allowed setting diverges from the usual start
    with pytest.raises(RunError, match=r"NaN or infinite numbers out of 5 in left, 3 times for part 0, expected a sound result\. .* lower the step size"):
        SequentialRankOneRegression(solver="gd", lr=0.5, random_state=0).fit(X, y)
    with pytest.raises(RunError, match=r"infinite numbers after \d+ rounds with lr=0\.5, expected finite ones\. Lower lr"):
        SequentialRankOneRegression(solver="gd", lr=0.5, engine=inline, random_state=0).fit(X, y)  # an engine that does not look at results


def test_without_scikit_learn_the_room_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import partwise.decompose as room

    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtra, match=r"pip install 'partwise\[sklearn\]'"):
        _ = room.ParallelRankOneRegression


def test_the_room_is_light_until_a_name_is_used() -> None:
    code = "import sys, partwise.decompose; sys.exit(bool({'torch', 'sklearn', 'numpy', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert {"parallel-rank-one-regression", "sequential-rank-one-regression"} <= set(METHODS)
