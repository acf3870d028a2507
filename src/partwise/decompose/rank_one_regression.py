"""Low-rank linear regression by rank-one maps, in parallel or in sequence, as scikit-learn regressors."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from partwise.checks import InputError, RunError, check_at_least, check_choice, check_rank
from partwise.decompose.rank_one_rounds import Pairs, ParallelRankOne, SequentialRankOne, random_pairs
from partwise.linalg.compute_schedule import compute_schedule
from partwise.linalg.deflation import deflation_errors, pair_distances
from partwise.linalg.rank_one import ExactParts, ReducedRegression, exact_parts, numerical_rank, reduce_regression
from partwise.rounds import run_rounds

__all__ = ["SCHEDULES", "ParallelRankOneRegression", "SequentialRankOneRegression"]

SCHEDULES = ("equal", "more-first", "less-first")
SMALLEST_GAP = 1e-8  # relative to the largest singular value; below it components are defined as a group only


class _RankOneRegression(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """What the two estimators share: the checks at the door, the reduction, and the learned attributes."""

    n_components: int
    solver: str
    lr: float
    random_state: int | np.random.RandomState | None

    @abstractmethod
    def _check_settings(self) -> None:
        """Refuse settings that no data could make right."""

    @abstractmethod
    def _run(self, start: Pairs, errors: _Errors) -> Pairs:
        """Run the rounds from ``start`` and return the last state."""

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
            When gradient steps diverge.

        Warns
        -----
        UserWarning
            When singular values that must be told apart are equal.
        """
        self._check_settings()
        inputs, checked_y = validate_data(self, X, y, dtype=[np.float64, np.float32], multi_output=True, y_numeric=True)
        targets = checked_y.astype(inputs.dtype, copy=False).reshape(len(inputs), -1)  # (samples, targets)
        _check_columns(inputs, name="X")
        _check_columns(targets, name="y")
        check_rank(self.n_components, (targets.shape[1], inputs.shape[1]), name="n_components")
        problem = reduce_regression(torch.tensor(inputs).T, torch.tensor(targets).T)  # columns are samples from here on
        target_size = float(np.linalg.norm(targets))
        exact = exact_parts(problem.target, num_components=self.n_components)
        _check_spectrum(exact, problem, num_components=self.n_components, target_size=target_size)

        size = exact.singular_values[0]  # rounds see a target of size 1, so that no setting depends on the unit of y
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        start = random_pairs(problem.target / size, num_components=self.n_components, seed=seed)
        errors = _Errors(exact, size)
        last = self._run(start, errors)
        if not bool(torch.isfinite(last.left).all() and torch.isfinite(last.right).all()):
            raise RunError("diverged", f"got infinite numbers after {last.num_rounds} rounds with lr={self.lr}, expected finite ones. Lower lr.")
        self._learn(problem, last.published_left * size, last.right, one_target=checked_y.ndim == 1)
        self.errors_per_round_ = np.stack(errors.rows)  # (rounds, components)
        self.n_iter_ = last.num_rounds
        return self

    def _learn(self, problem: ReducedRegression, left: Tensor, right: Tensor, *, one_target: bool) -> None:
        maps = right @ problem.unreduce.T  # (components, features)
        sizes = left.norm(dim=1) * right.norm(dim=1)  # (components,)
        largest = maps.gather(1, maps.abs().argmax(dim=1, keepdim=True))  # (components, 1): the entry that fixes the sign
        scale = left.norm(dim=1, keepdim=True) * torch.where(largest < 0, -1, 1)  # (components, 1)
        loadings = left / torch.where(scale == 0, 1, scale)  # (components, targets), unit rows
        self.components_: NDArray[Any] = (maps * scale).numpy()
        self.y_loadings_: NDArray[Any] = loadings.T.contiguous().numpy()  # (targets, components)
        self.singular_values_: NDArray[Any] = sizes.numpy()
        coef = self.y_loadings_ @ self.components_  # (targets, features)
        self.coef_: NDArray[Any] = coef[0] if one_target else coef
        self.rank_ = problem.rank

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


class _Errors:
    """Collects the error of every published component after every round."""

    def __init__(self, exact: ExactParts, size: Tensor) -> None:
        self.left, self.right = exact.left, exact.scaled_right / size
        self.rows: list[NDArray[Any]] = []

    def __call__(self, _: int, state: Pairs) -> None:
        self.rows.append(deflation_errors(state.published_left, state.right, self.left, self.right).numpy())


class ParallelRankOneRegression(_RankOneRegression):
    """Low-rank regression in which all rank-one maps are learned at the same time.

    Predicts ``y`` by a sum of ``n_components`` rank-one maps of ``X``, where map k is fitted to what the maps in front of it leave over. All maps
    work at once: each round, every one of them rebuilds its target from the latest published maps and takes a few solver steps. A mistake in front
    therefore heals, and with rounds every map reaches the one that exact deflation would give.

    There is no intercept, as in the papers: centre ``X`` and ``y`` first if they need one.

    Parameters
    ----------
    n_components : int, default=1
        Rank-one maps (r in the paper), at most the smaller of n_features and n_targets, and of the rank of what can be fitted.
    solver : {"power", "gd", "svd"}, default="power"
        How a map moves: alternating least squares, gradient steps, or exactly.
    num_rounds : int, default=200
        Rounds at most (L in the paper). At least ``n_components`` unless ``activation="all"``, since map k joins in round k.
    num_local_steps : int, default=1
        Solver steps in a round (T in the paper).
    activation : {"staggered", "advance", "all"}, default="advance"
        ``staggered``: map k starts in round k. ``advance``: until then it learns in private. ``all``: every map joins in round 1.
    lr : float, default=0.25
        Step size of ``solver="gd"``, in units of one over the largest singular value of the fitted targets; at most 0.5.
    tol : float, default=1e-5
        Stop when every map is published and none moved by more than this fraction of its size in a round; 0 runs all rounds.
    random_state : int, RandomState or None, default=None
        Decides where the maps start.

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
    rank_ : int
        Numerical rank of ``X``.
    n_iter_ : int
        Rounds that were run.

    See Also
    --------
    SequentialRankOneRegression : One map after the other, each frozen when done.

    Notes
    -----
    Differences from the paper: the error measure is ours (the essay uses one without defining it); a map that is not published yet counts as
    absent; starting everyone in round 1 and ``solver="svd"`` are additions. The fit computes the exact maps as well, in order to report errors and
    to refuse what is not determined, so in one process this is no faster than one singular value decomposition. Cost per round:
    ``O(n_components * num_local_steps * n_targets * rank_)``.

    References
    ----------
    AdaPaD. arXiv:2605.10741.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.normal(size=(50, 4)), np.outer([1.0, 2.0, 3.0], [1.0, 0.0, -1.0, 0.0])
    >>> model = ParallelRankOneRegression(n_components=1, random_state=0).fit(X, X @ W.T)
    >>> bool(np.allclose(model.coef_, W))
    True
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        solver: str = "power",
        num_rounds: int = 200,
        num_local_steps: int = 1,
        activation: str = "advance",
        lr: float = 0.25,
        tol: float = 1e-5,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.solver = solver
        self.num_rounds = num_rounds
        self.num_local_steps = num_local_steps
        self.activation = activation
        self.lr = lr
        self.tol = tol
        self.random_state = random_state

    def _rounds(self) -> ParallelRankOne:
        return ParallelRankOne(solver=self.solver, num_local_steps=self.num_local_steps, activation=self.activation, lr=self.lr)

    def _check_settings(self) -> None:
        self._rounds()
        check_at_least(self.n_components, 1, name="n_components")
        check_at_least(self.num_rounds, 1, name="num_rounds")
        if not 0 <= self.tol < 1:
            raise InputError("tol-range", f"got tol={self.tol}, expected 0 or more and below 1. Pass tol=1e-5, or 0 to run all rounds.")
        if self.activation != "all" and self.num_rounds < self.n_components:
            raise InputError(
                "too-few-rounds",
                f"got num_rounds={self.num_rounds} for n_components={self.n_components} with activation={self.activation!r}, expected at least "
                f"{self.n_components}: component k joins in round k. Raise num_rounds, or pass activation='all'.",
            )

    def _run(self, start: Pairs, errors: _Errors) -> Pairs:
        largest_move = math.inf

        def settled(before: Pairs, after: Pairs) -> bool:
            nonlocal largest_move
            largest_move = _largest_move(before, after)
            return self.tol > 0 and largest_move <= self.tol

        last = run_rounds(self._rounds(), start, num_rounds=self.num_rounds, progress=errors, stop=settled)
        if self.tol > 0 and not largest_move <= self.tol:
            warnings.warn(
                f"In round num_rounds={self.num_rounds} a map still moved by {largest_move:.1e} of its size, more than tol={self.tol}. "
                f"Raise num_rounds or num_local_steps, or tol.",
                ConvergenceWarning,
                stacklevel=3,
            )
        return last


class SequentialRankOneRegression(_RankOneRegression):
    """Low-rank regression in which rank-one maps are learned one after the other.

    Map k gets its share of the steps on what the frozen maps leave over, and is then frozen for good. Cheap and simple, and what a map gets wrong
    stays wrong: the error is passed on to all maps behind it.

    There is no intercept, as in the paper: centre ``X`` and ``y`` first if they need one.

    Parameters
    ----------
    n_components : int, default=1
        Rank-one maps (r in the paper), at most the smaller of n_features and n_targets, and of the rank of what can be fitted.
    solver : {"power", "gd", "svd"}, default="power"
        How a map moves: alternating least squares, gradient steps, or exactly.
    num_steps : int, default=200
        Solver steps in total (T in the paper).
    min_steps : int, default=1
        Steps that every map gets.
    schedule : {"equal", "more-first", "less-first"}, default="equal"
        How the other steps are dealt. ``more-first`` pays when the solver is far from done in the steps it has (slow gradient steps) and not
        otherwise.
    alpha : float, default=1.0
        How steep ``more-first`` and ``less-first`` are, above 0; the paper sees no gain beyond about 1.5. ``equal`` does not use it.
    lr : float, default=0.25
        Step size of ``solver="gd"``, in units of one over the largest singular value of the fitted targets; at most 0.5.
    random_state : int, RandomState or None, default=None
        Decides where the maps start.

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
    errors_per_round_ : ndarray of shape (n_components, n_components)
        Row k: distance of each map from the exact one after stage k, relative to the exact one's size; 1 before its stage.
    steps_ : tuple of int
        Steps that each map got.
    rank_ : int
        Numerical rank of ``X``.
    n_iter_ : int
        Stages that were run: n_components.

    See Also
    --------
    ParallelRankOneRegression : All maps at once; errors heal.

    Notes
    -----
    Watch the components, not the residual: on targets of exact rank n_components, every least-squares step removes one rank whatever it finds, so
    the residual ends at zero while the maps may be far from the exact ones. Differences from the paper: steps are whole numbers (largest remainder);
    ``solver="svd"`` is an addition. The fit computes the exact maps as well, in order to report errors.

    References
    ----------
    One Rank at a Time: Cascading Error Dynamics in Sequential Learning. arXiv:2505.22602.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.normal(size=(50, 3)), np.diag([4.0, 2.0, 1.0])
    >>> model = SequentialRankOneRegression(n_components=3, num_steps=60, schedule="more-first", random_state=0).fit(X, X @ W)
    >>> model.steps_, bool(np.allclose(model.coef_, W))
    ((39, 20, 1), True)
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        solver: str = "power",
        num_steps: int = 200,
        min_steps: int = 1,
        schedule: str = "equal",
        alpha: float = 1.0,
        lr: float = 0.25,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.solver = solver
        self.num_steps = num_steps
        self.min_steps = min_steps
        self.schedule = schedule
        self.alpha = alpha
        self.lr = lr
        self.random_state = random_state

    def _rounds(self) -> SequentialRankOne:
        slope = {"equal": 0.0, "more-first": self.alpha, "less-first": -self.alpha}[self.schedule]
        steps = compute_schedule(self.n_components, self.num_steps, min_steps=self.min_steps, alpha=slope)
        return SequentialRankOne(steps=steps, solver=self.solver, lr=self.lr)

    def _check_settings(self) -> None:
        check_at_least(self.n_components, 1, name="n_components")
        check_choice(self.schedule, SCHEDULES, name="schedule")
        if not self.alpha > 0:
            raise InputError(
                "alpha-range", f"got alpha={self.alpha}, expected more than 0. The direction is the schedule's: more-first, less-first, or equal."
            )
        self._rounds()

    def _run(self, start: Pairs, errors: _Errors) -> Pairs:
        rounds = self._rounds()
        self.steps_ = rounds.steps
        return run_rounds(rounds, start, num_rounds=self.n_components, progress=errors)


def _largest_move(before: Pairs, after: Pairs) -> float:
    """How far the most restless map moved in a round, relative to its size; infinite while one of them counts as absent."""
    if not all(before.published):
        return math.inf
    moves = pair_distances(after.left, after.right, before.left, before.right)  # (components,)
    return float((moves / (after.left.norm(dim=1) * after.right.norm(dim=1))).max())


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
    gaps = sizes[:num_components] - torch.nn.functional.pad(sizes, (0, 1))[1 : num_components + 1]  # (components,)
    smallest = max(SMALLEST_GAP, 8 * torch.finfo(sizes.dtype).eps) * sizes[0]
    equal = [k + 1 for k in range(num_components) if gaps[k] < smallest]
    if equal:
        warnings.warn(
            f"Singular values {', '.join(f'{k} and {k + 1}' for k in equal)} are equal up to rounding: their components are not defined one by one, "
            f"only their span is.",
            UserWarning,
            stacklevel=3,
        )
