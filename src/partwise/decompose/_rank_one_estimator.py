"""What the two rank-one regressions share: the checks at the door, the reduction to a small problem, the learned attributes."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from partwise.checks import InputError, RunError, check_at_least, check_rank
from partwise.decompose.rank_one_rounds import Pairs, random_pairs
from partwise.engine import Engine, open_engine
from partwise.linalg.certificate import MissedValueTest, certify
from partwise.linalg.deflation import deflation_errors
from partwise.linalg.rank_one import ExactParts, ReducedRegression, exact_parts, numerical_rank, reduce_regression

__all__ = ["RankOneEstimator"]

SMALLEST_GAP = 1e-8  # relative to the largest singular value; below it components are defined as a group only


class RankOneEstimator(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Low-rank regression by a sum of rank-one maps; a child says in which order and with how many steps they are trained.

    Attributes
    ----------
    components_ : ndarray of shape (n_components, n_features)
        ``a_k``, scaled; the entry largest in size is positive.
    y_loadings_ : ndarray of shape (n_targets, n_components)
        ``b_k``, unit columns; ``coef_ = y_loadings_ @ components_``.
    coef_ : ndarray of shape (n_targets, n_features) or (n_features,)
        The sum of the maps; one axis when ``y`` has one.
    singular_values_ : ndarray of shape (n_components,)
        Norm of what each map contributes to the fitted targets.
    errors_per_round_ : ndarray of shape (n_iter_, n_components)
        Distance of each published map from the exact one after each round, relative to the exact one's size; 1 before it is published.
    residuals_ : ndarray of shape (n_components,)
        ``||F^T F v - (v^T F^T F v) v||`` of each map's unit row ``v``, where ``F`` are the fitted targets in a basis of the rows of ``X``.
    eigenvalue_intervals_ : ndarray of shape (n_components, 2)
        Guaranteed up to rounding: ``F^T F`` has as many eigenvalues (squares of singular values of the fitted targets) as there are maps, one in each
        interval.
    missed_value_test_ : MissedValueTest
        Whether a search outside the span of the maps found an eigenvalue of ``F^T F`` that should have been among them.
    traffic_ : Traffic or None
        What the engine counted: bytes by worker and round, and workers and results that were lost, late or refused.
    rank_ : int
        Numerical rank of ``X``.
    n_iter_ : int
        Rounds that were run.
    """

    def __init__(
        self, n_components: int, *, solver: str, lr: float, engine: str | Engine, num_workers: int | None, random_state: int | np.random.RandomState | None
    ) -> None:
        self.n_components = n_components
        self.solver = solver
        self.lr = lr
        self.engine = engine
        self.num_workers = num_workers
        self.random_state = random_state

    @abstractmethod
    def _check_settings(self) -> None:
        """Refuse settings that no data could make right."""

    @abstractmethod
    def _run(self, target: NDArray[Any], start: Pairs, errors: ErrorLog, engine: Engine) -> Pairs:
        """Run the rounds for ``target`` from ``start`` and return the last state."""

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn ``n_components`` rank-one maps from ``X`` to ``y``.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Inputs, float64 or float32 (kept), without NaN and without a column of zeros.
        y : array-like of shape (n_samples,) or (n_samples, n_targets)
            Targets, cast to the dtype of ``X``; the same rules.

        Returns
        -------
        self
            The fitted estimator.

        Raises
        ------
        InputError
            When a setting is out of range, or there are more components than the data can determine. A ``ValueError``.
        RunError
            When gradient steps diverge, or the engine cannot get an answer.
        MissingExtra
            When ``engine="ray"`` and Ray is not installed.

        Warns
        -----
        UserWarning
            When singular values that must be told apart are equal.
        """
        check_at_least(self.n_components, 1, name="n_components")
        self._check_settings()
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        opening = open_engine(self.engine, num_workers=self.num_workers, num_parts=self.n_components, seed=seed)
        _check_finite(X, name="X")
        _check_finite(y, name="y")
        inputs, checked_y = validate_data(self, X, y, dtype=[np.float64, np.float32], multi_output=True, y_numeric=True)
        targets = checked_y.astype(inputs.dtype, copy=False).reshape(len(inputs), -1)  # (samples, targets)
        _check_columns(inputs, name="X")
        _check_columns(targets, name="y")
        check_rank(self.n_components, (targets.shape[1], inputs.shape[1]), name="n_components")
        problem = reduce_regression(inputs.T, targets.T)  # columns are samples from here on
        target_size = float(np.linalg.norm(targets))
        exact = exact_parts(problem.target, num_components=self.n_components)
        _check_spectrum(exact, problem, num_components=self.n_components, target_size=target_size)

        size = exact.singular_values[0]  # rounds see a target of size 1, so that no setting depends on the unit of y
        target = problem.target / size  # (targets, rank)
        errors = ErrorLog(exact, size)
        with opening as engine, np.errstate(over="ignore", invalid="ignore"):  # steps that diverge get an error of their own below
            last = self._run(target, random_pairs(target, num_components=self.n_components, seed=seed), errors, engine)
        if not (np.isfinite(last.left).all() and np.isfinite(last.right).all()):
            raise RunError("diverged", f"got infinite numbers after {last.num_rounds} rounds with lr={self.lr}, expected finite ones. Lower lr.")
        self._learn(problem, last.published_left * size, last.right, one_target=checked_y.ndim == 1)
        self._certify(target, last.right, size=float(size), seed=seed)
        self.errors_per_round_ = np.stack(errors.rows)  # (rounds, components)
        self.n_iter_ = last.num_rounds
        self.traffic_ = getattr(engine, "traffic", None)
        self._warn()
        return self

    def _warn(self) -> None:
        """Say what the fit is known to lack."""

    def _learn(self, problem: ReducedRegression, left: NDArray[Any], right: NDArray[Any], *, one_target: bool) -> None:
        maps = right @ problem.unreduce.T  # (components, features)
        lengths = np.linalg.norm(left, axis=1)  # (components,)
        largest = np.take_along_axis(maps, np.abs(maps).argmax(axis=1, keepdims=True), axis=1)  # (components, 1): the entry that fixes the sign
        scale = lengths[:, None] * np.where(largest < 0, -1, 1).astype(left.dtype)  # (components, 1)
        self.components_: NDArray[Any] = maps * scale
        self.y_loadings_: NDArray[Any] = np.ascontiguousarray((left / np.where(scale == 0, 1, scale)).T)  # (targets, components), unit columns
        self.singular_values_: NDArray[Any] = lengths * np.linalg.norm(right, axis=1)
        coef = self.y_loadings_ @ self.components_  # (targets, features)
        self.coef_: NDArray[Any] = coef[0] if one_target else coef
        self.rank_ = problem.rank

    def _certify(self, target: NDArray[Any], right: NDArray[Any], *, size: float, seed: int) -> None:
        unit = certify(lambda rows: (rows @ target.T) @ target, right, seed=seed)  # for targets of size 1, where no square overflows
        test, scale = unit.missed_value_test, size**2
        self.residuals_: NDArray[Any] = scale * unit.residuals
        self.eigenvalue_intervals_: NDArray[Any] = scale * unit.intervals
        self.missed_value_test_: MissedValueTest = replace(
            test, probe_value=scale * test.probe_value, smallest_kept=scale * test.smallest_kept, bound=scale * test.bound
        )

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Targets of new samples: ``X @ coef_.T``.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Inputs.

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_targets)
            As many axes as the ``y`` that was fitted.
        """
        check_is_fitted(self)
        inputs = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        predicted: NDArray[Any] = inputs @ self.coef_.T
        return predicted


class ErrorLog:
    """Collects the error of every published component after every round."""

    def __init__(self, exact: ExactParts, size: float) -> None:
        self.left, self.right = exact.left, exact.scaled_right / size
        self.rows: list[NDArray[Any]] = []

    def __call__(self, _: int, state: Pairs) -> None:
        self.rows.append(deflation_errors(state.published_left, state.right, self.left, self.right))


def _check_finite(values: ArrayLike, *, name: str) -> None:
    """What scikit-learn refuses as well, with the number of bad entries and the place of the first."""
    array = np.asarray(values)
    bad: Any = np.argwhere(~np.isfinite(array)) if array.dtype.kind == "f" else ()
    if len(bad):
        place = ", ".join(f"{axis} {index}" for axis, index in zip(("row", "column"), bad[0], strict=False))
        raise InputError(
            "not-finite",
            f"{name} has {len(bad)} NaN or infinite entries out of {array.size}, the first in {place} (counted from 0). Remove these rows, or fill them in.",
        )


def _check_columns(values: NDArray[Any], *, name: str) -> None:
    empty = np.flatnonzero(~values.any(axis=0))
    if len(empty):
        raise InputError(
            "zero-column",
            f"got {len(empty)} of {values.shape[1]} columns of {name} with zeros only (the first has index {empty[0]}), expected none. "
            f"Drop them: they determine nothing.",
        )


def _check_spectrum(exact: ExactParts, problem: ReducedRegression, *, num_components: int, target_size: float) -> None:
    sizes = exact.singular_values  # (min(targets, rank),)
    rank = numerical_rank(sizes, (*problem.target.shape, len(problem.basis)), scale=target_size)
    if num_components > rank:
        raise InputError(
            "above-numerical-rank",
            f"n_components={num_components} is above the numerical rank {rank} of what X (rank {problem.rank}) can explain of y. "
            + (f"Pass n_components={rank} or less." if rank else "Pass other targets: X explains nothing of these."),
        )
    gaps = sizes[:num_components] - np.append(sizes, sizes.dtype.type(0))[1 : num_components + 1]  # (components,)
    smallest = max(SMALLEST_GAP, 8 * np.finfo(sizes.dtype).eps) * sizes[0]
    equal = [k + 1 for k in range(num_components) if gaps[k] < smallest]
    if equal:
        warnings.warn(
            f"Singular values {', '.join(f'{k} and {k + 1}' for k in equal)} are equal up to rounding: their components are not defined one by one, "
            f"only their span is.",
            UserWarning,
            stacklevel=3,
        )
