"""Principal components that are all learned at the same time, one worker per component."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data

from partwise.checks import InputError, check_at_least, check_choice
from partwise.decompose._eigen_estimator import EigenEstimator, Progress, Solved, positive_largest, rayleigh_ritz
from partwise.decompose._eigen_rounds import Eigenpairs, ParallelDeflation, random_eigenpairs
from partwise.decompose._eigen_runs import solve_rounds
from partwise.decompose._eigen_settings import check_tol
from partwise.decompose._eigen_stream import EigenStream, StreamCovariance
from partwise.decompose._modes import check_mode
from partwise.decompose._moments import RANGE, check_integers, check_precision
from partwise.decompose._units import without_rows
from partwise.engine import Engine, open_engine
from partwise.rounds import Schedule

if TYPE_CHECKING:
    from partwise.decompose._covariance import Covariance

__all__ = ["ParallelDeflationPCA", "RoundEstimator"]

OF_A_FIT = ("residuals_", "eigenvalue_intervals_", "missed_value_test_", "converged_", "history_", "n_iter_", "schedule_", "traffic_")
SMALLEST = 1e-130  # sizes of a batch: the square of rounding in the square of anything smaller vanishes
SETTLED = 0.5  # of tol: overlapping intervals and rounding must still fit into it


class RoundEstimator(EigenEstimator):
    """What estimators share whose components are learned in rounds, on any engine."""

    num_rounds: int
    rayleigh_ritz: bool
    engine: str | Engine
    num_workers: int | None
    mode: str
    max_staleness: int | None

    @abstractmethod
    def round_method(self, covariance: Covariance, seed: int) -> ParallelDeflation:
        """The rounds that these settings stand for, on this covariance."""

    def replay(self, X: Any, schedule: Schedule) -> Self:
        """Fit again in the order of events of an earlier asynchronous fit: here, in one process, with the same bits.

        Parameters
        ----------
        X : array-like, sparse matrix, memory map, LinearOperator or RowSource of shape (n_samples, n_features)
            The data of the earlier fit.
        schedule : Schedule
            Its ``schedule_``. ``Schedule.to_json`` and ``Schedule.from_json`` keep one in a file.

        Returns
        -------
        self
            The fitted estimator. Whatever ``engine``, ``num_workers`` and ``max_staleness`` are, nothing leaves this process.

        Raises
        ------
        InputError
            When ``mode`` is not ``"async"``, ``schedule`` is none, or it belongs to other settings or data. ``random_state`` must be the integer of
            the earlier fit, or the start is another one. A ``ValueError``.
        """
        if self.mode != "async":
            raise InputError(
                "replay-needs-async", f"got mode={self.mode!r} in replay, expected mode='async': rounds in step always repeat by themselves. Call fit."
            )
        if not isinstance(schedule, Schedule):
            raise InputError(
                "replay-needs-schedule", f"got a schedule of type {type(schedule).__name__}, expected a Schedule. Pass schedule_ of the earlier fit."
            )
        self._to_repeat = schedule
        try:
            return self.fit(X)
        finally:
            del self._to_repeat

    def _check_settings(self) -> None:
        check_tol(self.tol)
        check_at_least(self.num_rounds, 1, name="num_rounds")
        check_mode(self.mode, self.max_staleness, self.engine)
        method = self.round_method(cast("Covariance", None), 0)  # checks its settings, and needs no data for that
        num_parts = method.num_parts(self.n_components)
        if self.num_rounds < num_parts:
            raise InputError(
                "too-few-rounds",
                f"got num_rounds={self.num_rounds} for {num_parts} parts, expected at least {num_parts}: part k joins in round k. Raise num_rounds.",
            )
        if self.mode == "async" and method.solver == "lanczos" and num_parts == 1:
            raise InputError(
                "async-needs-parts",
                "got mode='async' with solver='lanczos' and all components in one block, expected at least two blocks: a single part has nobody to run "
                "ahead of. Pass a smaller block_size, or mode='sync'.",
            )

    def _solve(self, covariance: Covariance, seed: int, *, start: Eigenpairs | None = None, progress: Progress | None = None) -> Solved:
        method = self.round_method(covariance, seed)
        if method.batch_size is None:
            method = replace(method, covariance=without_rows(covariance))
        if start is None:
            start = random_eigenpairs(
                self.n_components, covariance.num_features, seed=seed, dtype=covariance.dtype, with_moments=method.solver == "adam"
            )
        num_parts, num_rounds, to_repeat = method.num_parts(self.n_components), self.num_rounds, getattr(self, "_to_repeat", None)
        if to_repeat is not None:
            traffic = None
            state, history, schedule = solve_rounds(method, start, num_rounds=num_rounds, engine=None, mode="async", schedule=to_repeat, progress=progress)
        else:
            with open_engine(self.engine, num_workers=self.num_workers, num_parts=num_parts, seed=seed) as engine:
                state, history, schedule = solve_rounds(
                    method, start, num_rounds=num_rounds, engine=engine, mode=self.mode, max_staleness=self.max_staleness, progress=progress
                )
                traffic = getattr(engine, "traffic", None)
        self.schedule_ = schedule
        vectors = state.vectors[: state.num_present]
        if self.rayleigh_ritz:
            vectors = rayleigh_ritz(covariance, vectors)
        num_iter = state.num_rounds if self.mode == "sync" else max(state.updates)
        return Solved(vectors, history, num_iter, method.settled(state), traffic)


class ParallelDeflationPCA(RoundEstimator):
    """Principal components learned all at the same time, one worker per component.

    Component k is the leading eigenvector of what the components in front of it, as they stand now, leave over. Nobody waits for a predecessor to be
    finished: all move at once, and a mistake in front heals instead of being passed on. Workers exchange vectors and never the data. Every fit says
    how far its eigenvalues can be from the true ones, and warns when one was missed.

    Parameters
    ----------
    n_components : int, default=2
        Components (K in the paper), at most the smaller of n_samples and n_features.
    solver : {"power", "hebb", "lanczos"}, default="power"
        How a worker moves: power steps; steps along the gradient (Hebb's rule, also known as Oja's), which can work on batches; or ARPACK on a block
        of components, by far the fastest in one process.
    num_rounds : int, default=500
        Rounds at most (L in the paper). Component k joins in round k.
    num_local_steps : int, default=5
        Steps of a worker between two exchanges (T in the paper). ``lanczos`` does not use it.
    block_size : int, optional
        Components per worker, with ``lanczos`` only, by default all of them.
    batch_size : int, optional
        Rows per step, drawn anew for each, with ``hebb`` only. The fit then runs all ``num_rounds``, since no batch can tell when to stop.
    step_size : float, optional
        First step of ``hebb`` in units of one over the running largest eigenvalue; by default 10, or 1 on batches, where steps shrink with the rounds.
    engine : {"inline", "ray"} or Engine, default="inline"
        Where the workers run: in this process, in a local Ray cluster, or on an engine that is open already.
    num_workers : int, optional
        Worker processes of ``engine="ray"``.
    mode : {"sync", "async"}, default="sync"
        Whether workers wait for each other between rounds.
    max_staleness : int, optional
        With ``mode="async"``: publications by which a worker may be ahead of one in front of it; by default any number.
    tol : float, default=1e-6
        Stop when every residual ``||S v - value v||`` is within half of it, times the largest eigenvalue; 0 runs all rounds.
    rayleigh_ritz : bool, default=False
        Finish with the best vectors within the span that was found, which are orthonormal.
    random_state : int, RandomState or None, default=None
        Decides the start and the batches.

    Attributes
    ----------
    components_ : ndarray of shape (n_components_, n_features)
        Unit rows, largest eigenvalue first; the largest entry in size is positive.
    explained_variance_ : ndarray of shape (n_components_,)
        Rayleigh quotients, with n_samples - 1 as in scikit-learn's ``PCA``.
    explained_variance_ratio_, singular_values_ : ndarray of shape (n_components_,)
        As in scikit-learn's ``PCA``.
    mean_ : ndarray of shape (n_features,)
        Mean of each feature.
    residuals_ : ndarray of shape (n_components_,)
        ``||S v - value v||`` of each component.
    eigenvalue_intervals_ : ndarray of shape (n_components_, 2)
        The covariance matrix has an eigenvalue in each, counted as often as it occurs. Guaranteed, up to rounding.
    missed_value_test_ : MissedValueTest
        What a search for larger eigenvalues outside the components found.
    n_components_, n_samples_, n_features_in_ : int
        Sizes of the fit. ``n_components_`` is smaller than asked for when the data have fewer directions.
    n_iter_ : int
        Rounds that were run.
    converged_ : bool
        Whether they ended because of ``tol``.
    history_ : list of dict
        For each round its number, seconds since the start, values, residuals and floats sent.
    traffic_ : Traffic or None
        Bytes that the engine moved, and workers that it lost.
    schedule_ : Schedule or None
        Order of events of an asynchronous fit, which ``replay`` repeats.
    n_samples_seen_ : int
        Rows seen by ``partial_fit``.

    See Also
    --------
    EigenGame : The same rounds with other updates.
    HotellingDeflationPCA : One component after the other.

    Notes
    -----
    Cost per round and component: ``num_local_steps + 1`` products with the covariance and ``O(num_local_steps * n_components * n_features)``. The
    rounds exchange ``n_components * n_features`` floats up and ``sum_k (k - 1) * n_features`` down.

    Differences from the paper: a component that has settled, with all in front of it, sits still; where deflation leaves less of a component than
    the errors in front, it is sought outside their span instead; ``lanczos``, asynchronous rounds and the certificate are additions.

    References
    ----------
    Liao, Su, Kyrillidis. Provable Model-Parallel Distributed Principal Component Analysis with Parallel Deflation. arXiv:2502.17615.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(500, 4)) * [4.0, 3.0, 2.0, 1.0]
    >>> pca = ParallelDeflationPCA(n_components=2, random_state=0).fit(X)
    >>> pca.converged_, pca.components_.shape, bool(pca.missed_value_test_.passed)
    (True, (2, 4), True)
    >>> bool(np.diff(pca.eigenvalue_intervals_).max() < 1e-4)
    True
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        solver: str = "power",
        num_rounds: int = 500,
        num_local_steps: int = 5,
        block_size: int | None = None,
        batch_size: int | None = None,
        step_size: float | None = None,
        engine: str | Engine = "inline",
        num_workers: int | None = None,
        mode: str = "sync",
        max_staleness: int | None = None,
        tol: float = 1e-6,
        rayleigh_ritz: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.solver = solver
        self.num_rounds = num_rounds
        self.num_local_steps = num_local_steps
        self.block_size = block_size
        self.batch_size = batch_size
        self.step_size = step_size
        self.engine = engine
        self.num_workers = num_workers
        self.mode = mode
        self.max_staleness = max_staleness
        self.tol = tol
        self.rayleigh_ritz = rayleigh_ritz
        self.random_state = random_state

    def round_method(self, covariance: Covariance, seed: int) -> ParallelDeflation:
        """The rounds that these settings stand for, on this covariance."""
        check_choice(self.solver, ("power", "hebb", "lanczos"), name="solver")
        return ParallelDeflation(
            covariance=covariance,
            solver=self.solver,
            num_local_steps=self.num_local_steps,
            block_size=self.block_size,
            batch_size=self.batch_size,
            step_size=self.step_size,
            tol=SETTLED * self.tol,
            seed=seed,
        )

    def _mended(self, covariance: Covariance, vectors: NDArray[Any], seed: int) -> NDArray[Any] | None:
        if self.solver != "lanczos" or len(vectors) == covariance.num_features:
            return None
        from partwise.decompose._eigen_lanczos import next_vector  # late: scipy's solvers are needed here only

        basis = rayleigh_ritz(covariance, vectors)
        return rayleigh_ritz(covariance, np.concatenate([basis, next_vector(covariance, basis, tol=SETTLED * self.tol, seed=seed)]))[: len(vectors)]

    def _advice(self) -> str:
        if self.batch_size is not None:
            return "Raise num_rounds or batch_size, or leave batch_size out."
        if self.solver == "lanczos":
            return "Raise num_rounds, or tol."
        return "Raise num_rounds or num_local_steps, pass rayleigh_ritz=True if values are close to each other, or solver='lanczos'."

    def partial_fit(self, X: Any, y: None = None) -> Self:
        """Go on with one round on a batch of rows; after it, everything learned refers to all rows seen.

        What was seen before enters as the leading directions of its covariance, of which more are kept than ``n_components``; the round works on those
        and the batch together. The memory is ``O(n_components * n_features)`` and the batch. There is no certificate, because the rows are gone.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
            Any number of rows, from one on. A sparse batch is made dense.
        y : None
            Ignored.

        Returns
        -------
        self
            The estimator. It has components once it has seen two different rows, and ``n_components`` of them once it has seen enough.

        Raises
        ------
        InputError
            When ``mode="async"``, since a round on one batch has an end that all wait for, or numbers of the batch cannot be used. A ``ValueError``.
        """
        check_at_least(self.n_components, 1, name="n_components")
        self._check_settings()
        if self.mode == "async":
            raise InputError(
                "stream-needs-sync",
                "got mode='async' in partial_fit, expected mode='sync': the next batch can only be joined to what all workers found in this one. "
                "Pass mode='sync'.",
            )
        stream = getattr(self, "_stream", None)
        fitted = hasattr(self, "components_")
        X = validate_data(self, X, accept_sparse=["csr", "csc"], dtype="numeric", reset=stream is None and not fitted)
        rows = _dense_batch(X)
        if stream is None:
            self._dtype = self.components_.dtype if fitted else np.dtype(np.float32 if X.dtype == np.float32 else np.float64)
            seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
            if self.n_components > X.shape[1]:
                raise InputError(
                    "too-many-components",
                    f"n_components={self.n_components} does not fit data of {X.shape[1]} features: it must be between 1 and {X.shape[1]}. "
                    f"Pass n_components={X.shape[1]} or fewer.",
                )
            stream = self._first_stream(X.shape[1], seed)
        with open_engine(self.engine, num_workers=self.num_workers, seed=stream.seed) as engine:
            self._stream = stream.joined(rows, self._stream_method, engine=engine)
        for name in OF_A_FIT:  # these rows are not what they speak of
            self.__dict__.pop(name, None)
        self.n_samples_seen_ = self._stream.num_samples
        self._learn(self._stream, positive_largest(self._stream.vectors[: self.n_components]), self._stream.values[: self.n_components])
        return self

    def _first_stream(self, num_features: int, seed: int) -> EigenStream:
        if not hasattr(self, "components_"):
            return EigenStream.empty(num_features, num_components=self.n_components, seed=seed)
        return EigenStream.going_on(
            self.components_,
            variances=self.explained_variance_,
            ratios=self.explained_variance_ratio_,
            mean=self.mean_,
            num_samples=self.n_samples_,
            seed=seed,
        )

    def _stream_method(self, covariance: StreamCovariance, seed: int) -> ParallelDeflation:
        return ParallelDeflation(
            covariance=covariance,
            solver=self.solver,
            num_local_steps=self.num_local_steps,
            block_size=self.block_size,
            step_size=self.step_size,
            tol=SETTLED * self.tol,
            seed=seed,
        )


def _dense_batch(X: Any) -> NDArray[np.float64]:
    """A batch in float64, once its numbers are known to fit."""
    check_precision(X.dtype)
    values = X.data if scipy.sparse.issparse(X) else X
    check_integers(values)
    rows: NDArray[np.float64] = (X.toarray() if scipy.sparse.issparse(X) else X).astype(np.float64)
    largest = float(np.abs(rows).max())
    if largest > RANGE or 0 < largest < SMALLEST:
        limit = f"below {RANGE:.0e}" if largest > RANGE else f"above {SMALLEST:.0e}"
        raise InputError(
            "too-large" if largest > RANGE else "too-small",
            f"got a batch with entries up to {largest:.0e} in size, expected absolute values {limit}. Divide all batches by a constant.",
        )
    return rows
