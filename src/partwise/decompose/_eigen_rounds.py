"""Eigenvectors in parallel, as rounds: the state, the parts, and the method that the estimators run.

Part k owns one eigenvector (or a block of neighbours) and knows the vectors in front of it as they were last published. Every round it takes a few
steps on the covariance matrix without what belongs to those, and publishes its own. Nothing is orthogonalised: mistakes in front heal, and what is
behind follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from partwise.checks import RunError, check_at_least, check_choice
from partwise.decompose._eigen_settings import check_combination, check_step_size, check_tol
from partwise.decompose._eigen_steps import Ahead, Mover, is_drowned, normalised, project_out
from partwise.linalg.products import one_blas_thread
from partwise.rounds import part_seed

if TYPE_CHECKING:
    from partwise.decompose._covariance import Covariance

__all__ = ["SOLVERS", "UPDATES", "EigenPart", "EigenResult", "Eigenpairs", "ParallelDeflation", "random_eigenpairs"]

SOLVERS = ("power", "hebb", "adam", "lanczos")
UPDATES = ("deflation", "alpha", "mu")
STEP_SIZES = {"power": 1.0, "hebb": 10.0, "adam": 0.01, "lanczos": 1.0}  # deterministic; in units of one over the largest eigenvalue
BATCH_STEP_SIZES = {"hebb": 1.0, "adam": 0.03}
STILL = 1e-3  # of tol, below which a component sits still: what is left of its error also limits all behind it, by one over the gaps
BATCH_DECAY = 100  # steps after which one on batches has half its first length


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """State: where every component stands.

    Attributes
    ----------
    vectors : ndarray of shape (K, d)
        Unit rows.
    values, residuals : ndarray of shape (K,)
        Rayleigh quotients with the covariance matrix and ``||S v - value v||``, as published; 0 and infinite before that. Where vectors are learned
        from batches, both are those of the last batches.
    updates : tuple of int
        How often each component was published. 0 means that nobody behind it may use it yet.
    present : tuple of bool
        False where the data have no further direction: the numerical rank is used up.
    moments : ndarray of shape (K, 2, d) or None
        Adam's memory; it never leaves a component's own worker.
    num_rounds : int
        Merges done.
    """

    vectors: NDArray[Any]
    values: NDArray[np.float64]
    residuals: NDArray[np.float64]
    updates: tuple[int, ...]
    present: tuple[bool, ...]
    moments: NDArray[Any] | None = None
    num_rounds: int = 0

    @property
    def num_present(self) -> int:
        """Components in front of the first that is absent."""
        return self.present.index(False) if False in self.present else len(self.present)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, as checkpoints want it."""
        arrays = {
            "vectors": self.vectors,
            "values": self.values,
            "residuals": self.residuals,
            "updates": np.array(self.updates, dtype=np.int64),
            "present": np.array(self.present, dtype=np.bool_),
            "num_rounds": np.array([self.num_rounds], dtype=np.int64),
        }
        return arrays if self.moments is None else arrays | {"moments": self.moments}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The state that ``to_arrays`` took apart."""
        return cls(
            vectors=arrays["vectors"],
            values=arrays["values"],
            residuals=arrays["residuals"],
            updates=tuple(int(count) for count in arrays["updates"]),
            present=tuple(bool(there) for there in arrays["present"]),
            moments=arrays.get("moments"),
            num_rounds=int(arrays["num_rounds"][0]),
        )


@dataclass(frozen=True, eq=False)
class EigenPart:
    """What the worker of one block of b components needs: its own vectors and the j in front of them."""

    index: int
    round_number: int  # how many times this part will have published after this call
    vectors: NDArray[Any]  # (b, d)
    ahead_vectors: NDArray[Any]  # (j, d)
    ahead_values: NDArray[np.float64]  # (j,)
    ahead_residual: float  # the largest in front; 0 when nobody is
    scale: float  # running largest eigenvalue; the total variance, which is above it, before anyone has published
    moments: NDArray[Any] | None = None  # (b, 2, d)


@dataclass(frozen=True, eq=False)
class EigenResult:
    """What a worker sends back: its b vectors, two numbers for each, and whether there is such a direction at all."""

    index: int
    vectors: NDArray[Any]  # (b, d)
    values: NDArray[np.float64]  # (b,)
    residuals: NDArray[np.float64]  # (b,)
    present: tuple[bool, ...]  # (b,)
    moments: NDArray[Any] | None = None  # (b, 2, d)


def random_eigenpairs(num_components: int, num_features: int, *, seed: int, dtype: Any = np.float64, with_moments: bool = False) -> Eigenpairs:
    """Start state: random unit vectors, none published. A vector depends on the seed and its own index only."""
    vectors = np.empty((num_components, num_features), dtype=dtype)
    for k in range(num_components):
        draw = np.random.default_rng(part_seed(seed, round_number=0, part=k)).standard_normal(num_features)
        vectors[k] = normalised(draw)
    return Eigenpairs(
        vectors=vectors,
        values=np.zeros(num_components),
        residuals=np.full(num_components, math.inf),
        updates=(0,) * num_components,
        present=(True,) * num_components,
        moments=np.zeros((num_components, 2, num_features), dtype=dtype) if with_moments else None,
    )


@dataclass(frozen=True, kw_only=True)
class ParallelDeflation:
    """Top eigenvectors of a covariance matrix, one worker per eigenvector or per block of them.

    Parameters
    ----------
    covariance : Covariance
        The matrix ``S``, known by its products.
    solver : {"power", "hebb", "adam", "lanczos"}
        How a worker moves: power steps, steps along the gradient, Adam's steps, or ARPACK on the deflated matrix.
    update : {"deflation", "alpha", "mu"}
        What the vectors in front take away; the last two are the games of EigenGame.
    num_local_steps : int
        Steps between two exchanges (T in the paper). ``lanczos`` does not use it.
    block_size : int or None
        Components per worker, with ``lanczos`` only; None: all of them in one.
    batch_size : int or None
        Rows per step, with ``hebb`` and ``adam``; None: every step sees all rows.
    step_size : float or None
        Length of a step of ``hebb`` and ``adam``; ``hebb``'s is divided by the running largest eigenvalue.
    tol : float
        The rounds are over when every residual is at most ``tol`` times the largest eigenvalue. Components far below it, with all in front of them,
        sit still before.
    seed : int
        What batches and restarts are drawn from.

    References
    ----------
    Liao, Su, Kyrillidis. Provable Model-Parallel Distributed Principal Component Analysis with Parallel Deflation. arXiv:2502.17615.
    """

    covariance: Covariance = field(repr=False)
    solver: str = "power"
    update: str = "deflation"
    num_local_steps: int = 5
    block_size: int | None = None
    batch_size: int | None = None
    step_size: float | None = None
    tol: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.solver, SOLVERS, name="solver")
        check_choice(self.update, UPDATES, name="update")
        check_at_least(self.num_local_steps, 1, name="num_local_steps")
        if self.block_size is not None:
            check_at_least(self.block_size, 1, name="block_size")
        if self.batch_size is not None:
            check_at_least(self.batch_size, 1, name="batch_size")
        check_step_size(self.step_size)
        check_combination(self)
        check_tol(self.tol)

    def split(self, state: Eigenpairs) -> list[EigenPart]:
        """One part for every block whose turn has come and that has not settled: a block starts once the one in front of it has published."""
        size = self._size(len(state.vectors))
        parts = []
        for index, begin in enumerate(range(0, state.num_present, size)):
            end = min(begin + size, state.num_present)
            if begin and not state.updates[begin - 1]:
                break
            if not self._within(STILL * self.tol, state, end):
                parts.append(self._part(state, index, begin, end))
        return parts

    def _size(self, num_components: int) -> int:
        """Components per part."""
        return (self.block_size or num_components) if self.solver == "lanczos" else 1

    def _within(self, tol: float, state: Eigenpairs, end: int) -> bool:
        """Whether the first ``end`` residuals are at most ``tol`` times the largest value. That of a batch is noise and does not say."""
        return self.batch_size is None and bool((state.residuals[:end] <= tol * state.values[:end].max(initial=0.0)).all())

    def settled(self, state: Eigenpairs) -> bool:
        """Whether every component that the data have is within ``tol``. Never, where vectors are learned from batches."""
        return self._within(self.tol, state, state.num_present)

    def _part(self, state: Eigenpairs, index: int, begin: int, end: int) -> EigenPart:
        largest = float(state.values.max(initial=0.0))
        return EigenPart(
            index=index,
            round_number=state.updates[begin] + 1,
            vectors=state.vectors[begin:end],
            ahead_vectors=state.vectors[:begin],
            ahead_values=state.values[:begin],
            ahead_residual=float(state.residuals[:begin].max(initial=0.0)),
            scale=largest if largest > 0 else self.covariance.total_variance,
            moments=None if state.moments is None else state.moments[begin:end],
        )

    def num_parts(self, num_components: int) -> int:
        """Parts at most."""
        return -(-num_components // self._size(num_components))

    def floats_sent(self, before: Eigenpairs, after: Eigenpairs) -> int:
        """Floats that the exchange between two states costs workers that keep their own vectors: each publishes its own and reads those in front.

        With all K components of size d at work, one per part, this is ``K d + sum_k (k - 1) d``. The few scalars beside a vector are not counted.
        """
        num_components, num_features = after.vectors.shape
        size = self._size(num_components)
        moved = [k for k in range(num_components) if after.updates[k] > before.updates[k]]
        begins = {k // size * size for k in moved}
        return int(num_features * (len(moved) + sum(begins)))

    def work(self, part: EigenPart) -> EigenResult:
        """The local steps of one part, and the Rayleigh quotient and residual of what it will publish."""
        return self.work_all([part])[0]

    def work_all(self, parts: Sequence[EigenPart]) -> list[EigenResult]:
        """The same for all parts of a round, with one product for all of them per step; bit for bit what ``work`` gives each."""
        if not parts:
            return []
        with one_blas_thread():
            if self.solver == "lanczos":
                from partwise.decompose._eigen_lanczos import solve_block  # late: scipy's solvers are needed here only

                tol = self.tol * (STILL if self.block_size else 1.0)  # blocks behind others need those to be better than themselves
                return [solve_block(self.covariance, part, tol=tol, seed=self.seed) for part in parts]
            if self.batch_size is not None:
                return [self._on_batches(part) for part in parts]
            return self._on_all_rows(parts)

    def _on_all_rows(self, parts: Sequence[EigenPart]) -> list[EigenResult]:
        product = self.covariance.product
        aheads, movers = self._aheads(parts), [self._mover(part) for part in parts]
        vectors = np.concatenate([part.vectors for part in parts])  # (k, d)
        for _ in range(self.num_local_steps):
            images = product(vectors)  # (k, d)
            pairs = zip(movers, aheads, vectors, images, strict=True)
            vectors = np.stack([mover.move(w, ahead.taken_from(y, w)) for mover, ahead, w, y in pairs])
        images = product(vectors)
        return [self._result(*each) for each in zip(parts, aheads, movers, vectors, images, strict=True)]

    def _aheads(self, parts: Sequence[EigenPart]) -> list[Ahead]:
        if self.update != "alpha":
            return [Ahead(part.ahead_vectors, part.ahead_values, update=self.update) for part in parts]
        # Parts of one round see the same vectors in front, so the products of the longest row serve all of them.
        longest = max((part.ahead_vectors for part in parts), key=len)
        images = self.covariance.product(longest)  # (j, d)
        aheads = []
        for part in parts:
            own = part.ahead_vectors
            shared = np.array_equal(own, longest[: len(own)])
            aheads.append(Ahead(own, part.ahead_values, images[: len(own)] if shared else self.covariance.product(own), update="alpha"))
        return aheads

    def _mover(self, part: EigenPart) -> Mover:
        defaults = STEP_SIZES if self.batch_size is None else BATCH_STEP_SIZES
        step = defaults[self.solver] if self.step_size is None else self.step_size
        if self.solver == "hebb":
            step /= part.scale or 1.0
        moves = (part.round_number - 1) * self.num_local_steps
        if self.batch_size is not None:
            step /= 1 + moves / BATCH_DECAY
        return Mover(self.solver, step, part.scale or 1.0, None if part.moments is None else part.moments[0], moves)

    def _result(self, part: EigenPart, ahead: Ahead, mover: Mover, vector: NDArray[Any], image: NDArray[Any]) -> EigenResult:
        value, there = float(vector @ image), True
        noise = max(self.covariance.num_features, 100) * float(np.finfo(vector.dtype).eps)
        if part.ahead_residual <= max(self.tol, noise) * part.scale:  # everyone in front has settled
            if is_drowned(vector, value, ahead):
                vector, image = self._beside(part, ahead, vector)
                value = float(vector @ image)
            there = value > noise * part.scale
        residual = float(np.linalg.norm(image - value * vector))
        moments = None if mover.moments is None else mover.moments[None]  # (1, 2, d)
        return EigenResult(part.index, vector[None], np.array([value]), np.array([residual]), (there,), moments)

    def _beside(self, part: EigenPart, ahead: Ahead, vector: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Power steps strictly outside the span of the vectors in front; returns the last vector and its product with ``S``."""
        basis = np.ascontiguousarray(np.linalg.qr(ahead.vectors.T)[0].T)  # (j, d)
        vector = project_out(vector, basis)
        image = self.covariance.product(vector[None])[0]
        for _ in range(self.num_local_steps):
            ahead_of = project_out(image, basis)
            if not ahead_of.any():  # the matrix maps everything outside the span to zero
                break
            vector = ahead_of
            image = self.covariance.product(vector[None])[0]
        return vector, image

    def _on_batches(self, part: EigenPart) -> EigenResult:
        covariance, mover = self.covariance, self._mover(part)
        assert self.batch_size is not None
        rng = np.random.default_rng(part_seed(self.seed, round_number=part.round_number, part=part.index))
        vector, quotients, residual = part.vectors[0], [], 0.0
        for _ in range(self.num_local_steps):
            rows = covariance.rows(rng.integers(covariance.num_samples, size=self.batch_size))  # (b, d)
            factor = covariance.num_samples / (covariance.num_samples - 1) / self.batch_size  # S divides by n - 1
            scores = rows @ part.ahead_vectors.T  # (b, j)
            values = factor * np.square(scores).sum(axis=0)  # (j,), on the same batch: a product of two batches would be biased
            images = factor * (scores.T @ rows) if self.update == "alpha" else None
            own = rows @ vector  # (b,)
            image = factor * (own @ rows)
            quotients.append(factor * float(own @ own))
            residual = float(np.linalg.norm(image - quotients[-1] * vector))
            vector = mover.move(vector, Ahead(part.ahead_vectors, values, images, self.update).taken_from(image, vector))
        moments = None if mover.moments is None else mover.moments[None]
        return EigenResult(part.index, vector[None], np.array([np.mean(quotients)]), np.array([residual]), (True,), moments)

    def check(self, part: EigenPart, result: EigenResult) -> None:
        """Refuse a result that is not made of as many unit vectors as the part has; engines call this for what comes from elsewhere."""
        if result.vectors.shape != part.vectors.shape or not len(result.values) == len(result.residuals) == len(result.present) == len(part.vectors):
            raise RunError("result-shape", f"got vectors of shape {result.vectors.shape}, expected {part.vectors.shape}. Use the same version everywhere.")
        lengths = np.linalg.norm(result.vectors, axis=1)  # (b,)
        if not np.allclose(lengths, 1.0, atol=1e-6):
            raise RunError("result-length", f"got vectors of length {lengths.min():.3g} to {lengths.max():.3g}, expected 1. Check the worker's memory.")

    def merge(self, state: Eigenpairs, results: Sequence[EigenResult]) -> Eigenpairs:
        """Write what arrived."""
        vectors, values, residuals = state.vectors.copy(), state.values.copy(), state.residuals.copy()
        moments = None if state.moments is None else state.moments.copy()
        updates, present = list(state.updates), list(state.present)
        size = self._size(len(state.vectors))
        for result in results:  # any subset may have arrived
            for i, k in enumerate(range(result.index * size, result.index * size + len(result.vectors))):
                vectors[k], values[k], residuals[k] = result.vectors[i], result.values[i], result.residuals[i]
                updates[k], present[k] = state.updates[k] + 1, result.present[i]  # a result that came twice counts once
                if moments is not None and result.moments is not None:
                    moments[k] = result.moments[i]
        return replace(
            state,
            vectors=vectors,
            values=values,
            residuals=residuals,
            updates=tuple(updates),
            present=tuple(present),
            moments=moments,
            num_rounds=state.num_rounds + 1,
        )
