"""Principal components one after the other, each frozen when it is done, with an account of how their errors add up."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError

from partwise.checks import InputError, check_at_least, check_choice
from partwise.decompose._eigen_estimator import Progress, Solved, counted
from partwise.decompose._eigen_rounds import Eigenpairs, EigenPart, EigenResult, ParallelDeflation
from partwise.decompose._eigen_steps import Ahead, Mover, is_drowned
from partwise.decompose._units import unit_of
from partwise.decompose.parallel_deflation import RoundEstimator
from partwise.linalg.bounds import deflation_error_bound
from partwise.linalg.products import one_blas_thread

if TYPE_CHECKING:
    from partwise.decompose._covariance import Covariance
    from partwise.engine import Engine

__all__ = ["HotellingDeflationPCA", "SequentialDeflation"]

TOP1 = ("power", "lanczos")
STEPS_PER_ROUND = 10  # power steps between two looks at the residual
FARTHEST = math.sqrt(2)  # no two unit vectors of aligned signs are farther apart


@dataclass(frozen=True, kw_only=True)
class SequentialDeflation(ParallelDeflation):
    """Hotelling's deflation as rounds: only the first component that is not done works, on what the frozen ones in front leave over.

    ``values`` and ``residuals`` of the state are those of each vector on the matrix it was searched in, ``S_k``, which is what the next matrix is
    deflated with: ``S_{k+1} = S_k - value_k v_k v_k^T``. It is never formed.

    Parameters
    ----------
    covariance, solver, tol, seed
        As in ``ParallelDeflation``; ``solver`` is ``power`` or ``lanczos``.
    steps : tuple of int
        Power steps at most for each component.

    References
    ----------
    On the Error-Propagation of Inexact Hotelling's Deflation for Principal Component Analysis. arXiv:2310.04283.
    """

    num_local_steps: int = STEPS_PER_ROUND
    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.solver, TOP1, name="solver")
        for k, count in enumerate(self.steps):
            check_at_least(count, 1, name=f"steps[{k}]")

    def split(self, state: Eigenpairs) -> list[EigenPart]:
        """The one component whose turn it is, or none when all are done."""
        for k in range(state.num_present):
            if not self._done(state, k):
                return [self._part(state, k, k, k + 1)]
        return []

    def settled(self, state: Eigenpairs) -> bool:
        """Whether every component is done: within ``tol``, or out of steps."""
        return not self.split(state)

    def num_steps_taken(self, state: Eigenpairs) -> tuple[int, ...]:
        """Power steps that each component has had; with ``lanczos`` 1."""
        return tuple(min(updates * self._steps_per_round, limit) for updates, limit in zip(state.updates, self._limits(state), strict=True))

    @property
    def _steps_per_round(self) -> int:
        return self.num_local_steps if self.solver == "power" else 1

    def _limits(self, state: Eigenpairs) -> tuple[int, ...]:
        return self.steps if self.solver == "power" else (1,) * len(state.vectors)

    def _done(self, state: Eigenpairs, k: int) -> bool:
        if self.num_steps_taken(state)[k] >= self._limits(state)[k]:
            return True
        return bool(state.residuals[k] <= self.tol * float(state.values.max(initial=0.0)))

    def _size(self, num_components: int) -> int:
        return 1

    def work_all(self, parts: Sequence[EigenPart]) -> list[EigenResult]:
        """Some power steps for the component whose turn it is, or all of Lanczos."""
        with one_blas_thread():
            return [self._search(part) for part in parts]

    def _search(self, part: EigenPart) -> EigenResult:
        ahead = Ahead(part.ahead_vectors, part.ahead_values)
        taken = (part.round_number - 1) * self._steps_per_round
        vector, last = part.vectors[0], True
        left = ahead.taken_from(self.covariance.product(vector[None])[0], vector)  # S_k v, (d,)
        if self.solver == "lanczos":
            from partwise.decompose._eigen_lanczos import solve_block  # late: scipy's solvers are needed here only

            with contextlib.suppress(ArpackError):  # it refuses a matrix of zeros, for which any vector is as good as the start
                vector = solve_block(self.covariance, part, tol=self.tol, seed=self.seed).vectors[0]
            left = ahead.taken_from(self.covariance.product(vector[None])[0], vector)
        else:
            mover, num_steps = Mover("power", 1.0, part.scale), min(self._steps_per_round, self.steps[part.index] - taken)
            for _ in range(num_steps):
                if not left.any():  # nothing is left over
                    break
                vector = mover.move(vector, left)
                left = ahead.taken_from(self.covariance.product(vector[None])[0], vector)
            last = taken + num_steps >= self.steps[part.index]
        value = float(vector @ left)
        residual = float(np.linalg.norm(left - value * vector))
        noise = max(self.covariance.num_features, 100) * float(np.finfo(vector.dtype).eps)
        there = value > noise * part.scale
        if last or residual <= self.tol * part.scale:  # earlier the start may still show
            there = there and not is_drowned(vector, value, ahead)
        return EigenResult(part.index, vector[None], np.array([value]), np.array([residual]), (there,))


def _distances(residuals: NDArray[np.float64], gaps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances between unit vectors and eigenvectors at most (Davis and Kahan): (K,) twice -> (K,)."""
    sines = np.divide(residuals, gaps, out=np.ones_like(residuals), where=gaps > 0)
    return FARTHEST * np.minimum(sines, 1.0)


class HotellingDeflationPCA(RoundEstimator):
    """Principal components one after the other, with an account of how errors add up.

    Each component is the leading eigenvector of what the ones before it left over. It is searched to a tolerance, or with a number of steps, and then
    frozen: what it gets wrong is passed on to all behind it. The fit says how far each search stopped from its goal and what that can do to the
    component at most.

    Parameters
    ----------
    n_components : int, default=2
        Components, at most the smaller of n_samples and n_features.
    top1 : {"power", "lanczos"}, default="power"
        How a leading eigenvector is searched: by power steps, or by ARPACK.
    num_steps : int or sequence of int, default=1000
        Power steps at most, for every component or for each; ``partwise.linalg.bounds.plan_iterations`` plans them. ``lanczos`` does not use it.
    tol : float, default=1e-6
        A search ends when its residual is within half of it, times the largest eigenvalue; 0 takes all steps.
    random_state : int, RandomState or None, default=None
        Decides the starts.

    Attributes
    ----------
    components_ : ndarray of shape (n_components_, n_features)
        Unit rows, largest eigenvalue first; the largest entry in size is positive. Orthogonal up to their errors.
    sub_solver_errors_ : ndarray of shape (n_components_,)
        Upper bound on ``delta_k``, the distance between component k and the exact leading eigenvector of the matrix it was searched in, from the residual
        there. ``sqrt(2)``, the distance of vectors at right angles, where the gap is too small to say.
    error_bounds_ : ndarray of shape (n_components_,)
        Upper bound on the distance between component k and the true one, from ``sub_solver_errors_`` alone, by
        ``partwise.linalg.bounds.deflation_error_bound``: safe and not sharp. ``sqrt(2)`` where it says nothing.
    residual_bounds_ : ndarray of shape (n_components_,)
        The same from ``residuals_``: sharper, as it knows how the errors really added up. All three use gaps between eigenvalues, and so rest on the
        probe of ``missed_value_test_``.
    explained_variance_ : ndarray of shape (n_components_,)
        Rayleigh quotients, with n_samples - 1 as in scikit-learn's ``PCA``.
    explained_variance_ratio_, singular_values_ : ndarray of shape (n_components_,)
        As in scikit-learn's ``PCA``.
    mean_ : ndarray of shape (n_features,)
        Mean of each feature.
    residuals_ : ndarray of shape (n_components_,)
        ``||S v - value v||`` of each component on the whole covariance matrix.
    eigenvalue_intervals_ : ndarray of shape (n_components_, 2)
        The covariance matrix has an eigenvalue in each, counted as often as it occurs. Guaranteed, up to rounding.
    missed_value_test_ : MissedValueTest
        What a search for larger eigenvalues outside the components found.
    n_components_, n_samples_, n_features_in_ : int
        Sizes of the fit. ``n_components_`` is smaller than asked for when a component is not resolvable.
    num_steps_ : ndarray of shape (n_components_,)
        Power steps that were taken for each component; 1 with ``lanczos``.
    n_iter_ : int
        Rounds of up to 10 steps that were run, all components together.
    converged_ : bool
        Whether every search ended because of ``tol``.
    history_ : list of dict
        For each round its number, seconds since the start, values and residuals on the deflated matrix, and floats sent.
    traffic_ : None
        Nothing is sent: components wait for each other.

    See Also
    --------
    ParallelDeflationPCA : All components at the same time; errors heal.

    Notes
    -----
    Products with the covariance: one per power step, and one per 10 steps to look at the residual. The deflated matrix is never formed.

    References
    ----------
    On the Error-Propagation of Inexact Hotelling's Deflation for Principal Component Analysis. arXiv:2310.04283.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(500, 4)) * [4.0, 3.0, 2.0, 1.0]
    >>> pca = HotellingDeflationPCA(n_components=2, random_state=0).fit(X)
    >>> pca.converged_, bool(pca.sub_solver_errors_.max() < 1e-5), bool(pca.error_bounds_.max() < 1e-3)
    (True, True, True)
    """

    engine: str | Engine = "inline"
    num_workers: int | None = None
    mode = "sync"
    max_staleness: int | None = None
    rayleigh_ritz = False

    def __init__(
        self,
        n_components: int = 2,
        *,
        top1: str = "power",
        num_steps: int | Sequence[int] = 1000,
        tol: float = 1e-6,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.top1 = top1
        self.num_steps = num_steps
        self.tol = tol
        self.random_state = random_state

    @property
    def num_rounds(self) -> int:  # type: ignore[override]
        """Rounds at most: every component one after the other."""
        return sum(-(-limit // STEPS_PER_ROUND) for limit in self._steps()) if self.top1 == "power" else self.n_components

    def _steps(self) -> tuple[int, ...]:
        given = (self.num_steps,) * self.n_components if np.ndim(self.num_steps) == 0 else tuple(self.num_steps)  # type: ignore[arg-type]
        if len(given) != self.n_components:
            raise InputError(
                "steps-per-component",
                f"got num_steps={given} for n_components={self.n_components}, expected one number for each component, or one for all. Pass as many.",
            )
        for limit in given:
            check_at_least(limit, 1, name="num_steps")
        return tuple(int(limit) for limit in given)  # type: ignore[arg-type]

    def round_method(self, covariance: Covariance, seed: int) -> SequentialDeflation:
        """The rounds that these settings stand for, on this covariance."""
        check_choice(self.top1, TOP1, name="top1")
        return SequentialDeflation(covariance=covariance, solver=self.top1, steps=self._steps(), tol=self.tol / 2, seed=seed)

    def _solve(self, covariance: Covariance, seed: int, *, start: Eigenpairs | None = None, progress: Progress | None = None) -> Solved:
        last: list[Eigenpairs] = [] if start is None else [start]

        def remember(round_number: int, state: Eigenpairs) -> None:
            last[:] = [state]
            if progress is not None:
                progress(round_number, state)

        solved = super()._solve(covariance, seed, start=start, progress=remember)
        [state] = last
        self._search = state
        within = state.residuals[: state.num_present] <= self.tol / 2 * state.values.max(initial=0.0)
        return Solved(solved.vectors, solved.history, state.num_rounds, bool(within.all()), solved.traffic)

    def fit_from(self, covariance: Covariance, *, start: Eigenpairs | None = None, progress: Progress | None = None) -> Self:
        """As in the parent; also fills in the account of errors."""
        super().fit_from(covariance, start=start, progress=progress)
        unit = unit_of(covariance.total_variance)
        found, count = self._search, self.n_components_  # in this unit, as everything that is computed with below
        del self._search
        place = np.abs(found.vectors[:count] @ self.components_.T.astype(found.vectors.dtype)).argmax(axis=0)  # where component k was found
        upper, gaps = self._upper_values_and_gaps(unit)
        intervals = self.eigenvalue_intervals_ / unit
        to_last = np.append(math.inf, intervals[:-1, 0]) - intervals[:, 1]  # (K,), to the eigenvalue in front
        self.residual_bounds_: NDArray[np.float64] = _distances(self.residuals_ / unit, np.minimum(gaps, to_last))
        offsets = np.where(place == np.arange(count), self.residual_bounds_, FARTHEST)  # found out of turn, it is no approximation of its own
        deltas = self._distances_of_searches(found.values[:count], found.residuals[:count], upper, offsets, intervals)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a missing gap shows in the numbers
            errors = deflation_error_bound(upper.tolist(), deltas.tolist(), gaps=gaps.tolist())
        self.sub_solver_errors_: NDArray[np.float64] = deltas[place]
        self.error_bounds_: NDArray[np.float64] = np.minimum(errors, FARTHEST)[place]
        self.num_steps_: NDArray[np.int64] = np.array(self.round_method(covariance, 0).num_steps_taken(found)[:count])[place]
        return self

    def _upper_values_and_gaps(self, unit: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Upper bounds (K + 1,) on the largest eigenvalues, and lower bounds (K,) on their gaps, as far as certificate and probe go."""
        lower, upper = self.eigenvalue_intervals_.T / unit
        test = self.missed_value_test_
        smallest = float(np.linalg.svd(self.components_, compute_uv=False)[-1])
        # Eigenvalues that belong to no interval are at most this (Weyl); none of them may lie between two that do.
        others = max(test.bound / unit, 0.0) + float(np.linalg.norm(self.residuals_ / unit)) / smallest if test.passed else math.inf
        highest = np.maximum.accumulate(np.append(upper, min(others, float(upper.max())))[::-1])[::-1]  # (K + 1,), descending
        return highest, lower - np.maximum(highest[1:], others)

    def _distances_of_searches(
        self,
        values: NDArray[np.float64],
        residuals: NDArray[np.float64],
        upper: NDArray[np.float64],
        offsets: NDArray[np.float64],
        intervals: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """``delta_k`` at most, in the order of the searches: the residual of each on its matrix, over the distance to other eigenvalues there."""
        widths = np.diff(intervals, axis=1)[:, 0]
        # What was taken away for component k is at most this far from lambda_k u_k u_k^T.
        moved = np.abs(values - intervals.mean(axis=1)) + widths / 2 + upper[:-1] * offsets
        differences = np.append(0.0, np.cumsum(moved)[:-1])  # how far each matrix is from what exact components would have left
        return _distances(residuals, values - upper[1:] - differences)

    def _shortage(self) -> str:
        missing, lower = self.n_components_ + 1, "lower tol and " if self.tol else ""
        return (
            f"Component {missing} is not resolvable: what the components in front leave over is no larger than rounding and their own errors. The fit has "
            f"{counted(self.n_components_, 'component')}. Pass n_components={self.n_components_}, or {lower}raise num_steps if the data have "
            "more directions."
        )

    def _advice(self) -> str:
        return "Raise num_steps, or pass top1='lanczos'." if self.top1 == "power" else "Raise tol: ARPACK reached no more."
