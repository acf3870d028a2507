"""Low-rank linear regression by rank-one maps, in parallel or in sequence, as scikit-learn regressors."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from partwise.checks import InputError, check_at_least, check_choice
from partwise.decompose._modes import check_mode
from partwise.decompose._rank_one_estimator import ErrorLog, RankOneEstimator
from partwise.decompose.rank_one_rounds import Pairs, ParallelRankOne, SequentialRankOne
from partwise.engine import AsyncEngine, Engine
from partwise.linalg.compute_schedule import compute_schedule
from partwise.linalg.deflation import pair_distances
from partwise.rounds import Schedule, run_async, run_rounds

__all__ = ["SCHEDULES", "ParallelRankOneRegression", "SequentialRankOneRegression"]

SCHEDULES = ("equal", "more-first", "less-first")
NO_TARGET = np.zeros((0, 0))  # for checking the settings of rounds before there are data


class ParallelRankOneRegression(RankOneEstimator):
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
    mode : {"sync", "async"}, default="sync"
        Whether the maps wait for each other between rounds. Without waiting, every result counts as a round of its own in ``errors_per_round_`` and
        ``n_iter_``, and ``num_rounds`` is what every map gets on average.
    max_staleness : int, optional
        With ``mode="async"``: updates by which a map may be ahead of one in front of it; by default any number.
    tol : float, default=1e-5
        Stop when every map is published and none moved by more than this fraction of its size in a round (for ``gd``: by more than ``lr`` times that);
        0 runs all rounds.
    engine : {"inline", "ray"} or Engine, default="inline"
        Where the maps are worked on: in this process, in Ray workers on this machine, or in an engine that is open already. The result is the same.
    num_workers : int, optional
        Ray workers, at most ``n_components``; by default one for each core.
    random_state : int, RandomState or None, default=None
        Decides where the maps start.

    Attributes
    ----------
    coef_, components_, y_loadings_, singular_values_, errors_per_round_, residuals_, eigenvalue_intervals_, missed_value_test_, traffic_, rank_, n_iter_
        What was learned; shapes and meaning stand in ``RankOneEstimator``.
    converged_ : bool
        Whether the rounds ended because of ``tol``.
    schedule_ : Schedule or None
        Order of events of an asynchronous fit; ``partwise.rounds.run_async`` repeats it to the same bits.
    largest_move_ : float
        How far the most restless map moved when it last worked, in the units of ``tol``.

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
        mode: str = "sync",
        max_staleness: int | None = None,
        tol: float = 1e-5,
        engine: str | Engine = "inline",
        num_workers: int | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        super().__init__(n_components, solver=solver, lr=lr, engine=engine, num_workers=num_workers, random_state=random_state)
        self.num_rounds = num_rounds
        self.num_local_steps = num_local_steps
        self.activation = activation
        self.mode = mode
        self.max_staleness = max_staleness
        self.tol = tol

    def _rounds(self, target: NDArray[Any]) -> ParallelRankOne:
        return ParallelRankOne(
            target=target, solver=self.solver, num_local_steps=self.num_local_steps, activation=self.activation, lr=self.lr
        )

    def _check_settings(self) -> None:
        self._rounds(NO_TARGET)
        check_mode(self.mode, self.max_staleness, self.engine)
        check_at_least(self.num_rounds, 1, name="num_rounds")
        if not 0 <= self.tol < 1:
            raise InputError("tol-range", f"got tol={self.tol}, expected 0 or more and below 1. Pass tol=1e-5, or 0 to run all rounds.")
        if self.activation != "all" and self.num_rounds < self.n_components:
            raise InputError(
                "too-few-rounds",
                f"got num_rounds={self.num_rounds} for n_components={self.n_components} with activation={self.activation!r}, expected at least "
                f"{self.n_components}: component k joins in round k. Raise num_rounds, or pass activation='all'.",
            )

    def _run(self, target: NDArray[Any], start: Pairs, errors: ErrorLog, engine: Engine) -> Pairs:
        rounds = self._rounds(target)
        settling = _Settling(self.n_components, tol=self.tol, unit=self.lr if self.solver == "gd" else 1.0, asynchronous=self.mode == "async")
        self.schedule_: Schedule | None = None
        if self.mode == "async":
            last, self.schedule_ = run_async(
                rounds,
                start,
                engine=cast("AsyncEngine", engine),
                num_updates=self.num_rounds * self.n_components,
                max_staleness=self.max_staleness,
                progress=errors,
                stop=settling,
            )
        else:
            last = run_rounds(rounds, start, num_rounds=self.num_rounds, engine=engine, progress=errors, stop=settling)
        self.largest_move_, self.converged_ = float(settling.moves.max()), settling.is_over
        return last

    def _warn(self) -> None:
        halves = np.diff(self.eigenvalue_intervals_)[:, 0] / (2 * self.eigenvalue_intervals_.max())  # (components,)
        if not self.tol:
            return
        if not self.converged_:
            what = (
                f"In round num_rounds={self.num_rounds} a map still moved by {self.largest_move_:.1e} of its size, more than tol={self.tol}. "
                f"Raise num_rounds or num_local_steps, or tol."
            )
        elif halves.max() > self.tol:
            what = (
                f"The square of singular value {halves.argmax() + 1} is known to +-{halves.max():.1e} of the largest only, more than tol={self.tol}. Its "
                f"map hardly moves any more and has not arrived. Pass a smaller tol and more rounds, or fewer components."
            )
        elif not self.missed_value_test_.passed:
            what = (
                f"A search outside the maps found the eigenvalue {self.missed_value_test_.probe_value:.6g}, more than the "
                f"{self.missed_value_test_.smallest_kept:.6g} of the smallest one kept. Pass another random_state, or a smaller tol."
            )
        else:
            return
        warnings.warn(what, ConvergenceWarning, stacklevel=3)


class SequentialRankOneRegression(RankOneEstimator):
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
    engine : {"inline", "ray"} or Engine, default="inline"
        Where the maps are worked on: in this process, in Ray workers on this machine, or in an engine that is open already. The result is the same.
    num_workers : int, optional
        Ray workers, at most ``n_components``; by default one for each core.
    random_state : int, RandomState or None, default=None
        Decides where the maps start.

    Attributes
    ----------
    coef_, components_, y_loadings_, singular_values_, errors_per_round_, residuals_, eigenvalue_intervals_, missed_value_test_, traffic_, rank_, n_iter_
        What was learned; shapes and meaning stand in ``RankOneEstimator``.
    steps_ : tuple of int
        Steps that each map got.

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
        engine: str | Engine = "inline",
        num_workers: int | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        super().__init__(n_components, solver=solver, lr=lr, engine=engine, num_workers=num_workers, random_state=random_state)
        self.num_steps = num_steps
        self.min_steps = min_steps
        self.schedule = schedule
        self.alpha = alpha

    def _rounds(self, target: NDArray[Any]) -> SequentialRankOne:
        slope = {"equal": 0.0, "more-first": self.alpha, "less-first": -self.alpha}[self.schedule]
        steps = compute_schedule(self.n_components, self.num_steps, min_steps=self.min_steps, alpha=slope)
        return SequentialRankOne(target=target, steps=steps, solver=self.solver, lr=self.lr)

    def _check_settings(self) -> None:
        check_choice(self.schedule, SCHEDULES, name="schedule")
        if not self.alpha > 0:
            raise InputError(
                "alpha-range", f"got alpha={self.alpha}, expected more than 0. The direction is the schedule's: more-first, less-first, or equal."
            )
        self._rounds(NO_TARGET)

    def _run(self, target: NDArray[Any], start: Pairs, errors: ErrorLog, engine: Engine) -> Pairs:
        rounds = self._rounds(target)
        self.steps_ = rounds.steps
        return run_rounds(rounds, start, num_rounds=self.n_components, engine=engine, progress=errors)


class _Settling:
    """Watches how far maps move, relative to their size, and says when they have arrived.

    A map is quiet when it moves by at most ``tol``, and all maps behind one that is not must show again that they are. Asynchronous maps must show it
    twice: the first result after a move in front may have been under way before it.
    """

    def __init__(self, num_components: int, *, tol: float, unit: float, asynchronous: bool) -> None:
        self.tol, self.unit, self.needed = tol, unit, 2 if asynchronous else 1
        self.moves = np.full(num_components, math.inf)  # of each map when it last worked, in units of the step, so that small steps do not pass for rest
        self.quiet = [0] * num_components

    @property
    def is_over(self) -> bool:
        return self.tol > 0 and min(self.quiet) >= self.needed

    def __call__(self, before: Pairs, after: Pairs) -> bool:
        distances = pair_distances(after.left, after.right, before.left, before.right)  # (components,)
        sizes = self.unit * np.linalg.norm(after.left, axis=1) * np.linalg.norm(after.right, axis=1)  # (components,)
        for k in np.flatnonzero(np.subtract(after.updates, before.updates)):
            self.moves[k] = distances[k] / sizes[k] if before.published[k] else math.inf
            if self.moves[k] <= self.tol:
                self.quiet[k] += 1
            else:
                self.quiet[k:] = [0] * (len(self.quiet) - k)
        return self.is_over
