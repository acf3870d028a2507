"""Eigenvectors of a stream: what was seen before is kept as the leading directions of its covariance, and each batch brings one round.

With n rows seen, the scatter matrix is that of the kept directions plus that of the batch plus one row for the move of the mean. Twice as many
directions are kept as are asked for, and a few more: what is cut off is then far from what is wanted. On spectra that fall slowly this decides the
accuracy; with no directions to spare, a stream forgets most of its tail with every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from partwise.decompose._eigen_rounds import Eigenpairs, ParallelDeflation
from partwise.decompose._units import unit_of
from partwise.engine import Engine
from partwise.linalg.products import one_blas_thread, tiled_product

__all__ = ["EigenStream", "StreamCovariance", "num_kept"]

Array = NDArray[np.float64]


def num_kept(num_components: int, num_features: int) -> int:
    """Directions that a stream keeps for ``num_components``."""
    return min(2 * num_components + 10, num_features)


@dataclass(frozen=True, eq=False)
class StreamCovariance:
    """The covariance of all rows seen, as kept directions and a batch: ``S = rows^T rows / (num_samples - 1)``.

    Parameters
    ----------
    stacked : ndarray of shape (r, features)
        Scaled directions, centred rows of the batch, and the move of the mean.
    num_samples : int
        Rows seen.
    """

    stacked: Array = field(repr=False)
    num_samples: int

    @property
    def num_features(self) -> int:
        """Columns of the data."""
        return int(self.stacked.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of vectors and products."""
        return self.stacked.dtype

    @property
    def mean(self) -> Array:
        """Zero: the rows are centred."""
        return np.zeros(self.num_features)

    @property
    def total_variance(self) -> float:
        """Trace of the covariance."""
        return float(np.square(self.stacked).sum()) / (self.num_samples - 1)

    @property
    def rounding(self) -> float:
        """Nothing beyond rounding in float64."""
        return 0.0

    def product(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Rows times the covariance: (k, features) -> (k, features)."""
        return tiled_product(tiled_product(vectors, self.stacked.T), self.stacked) / (self.num_samples - 1)

    def apply(self, vector: NDArray[Any]) -> NDArray[Any]:
        """The covariance times one vector: (features,) -> (features,)."""
        result: NDArray[Any] = (self.stacked @ vector) @ self.stacked / (self.num_samples - 1)
        return result

    def rows(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Rows of the stack, (b, features)."""
        rows: NDArray[Any] = self.stacked[indices]
        return rows


@dataclass(frozen=True, eq=False)
class EigenStream:
    """All that is remembered of the rows seen.

    Attributes
    ----------
    capacity, seed : int
        Directions kept at most; what restarts are drawn from.
    mean : ndarray of shape (d,)
        Of all rows seen, float64.
    vectors, sizes : ndarray of shape (k, d) and (k,)
        Orthonormal directions and the scatter along each, largest first.
    scatter : float
        Sum of squares of all centred rows seen: nothing is lost in it.
    num_samples, num_batches : int
        Seen so far.
    """

    capacity: int
    seed: int
    mean: Array
    vectors: Array
    sizes: Array
    scatter: float = 0.0
    num_samples: int = 0
    num_batches: int = 0

    @classmethod
    def empty(cls, num_features: int, *, num_components: int, seed: int) -> Self:
        """Nothing seen yet."""
        capacity = num_kept(num_components, num_features)
        return cls(capacity, seed, np.zeros(num_features), np.zeros((0, num_features)), np.zeros(0))

    @classmethod
    def going_on(cls, components: NDArray[Any], *, variances: NDArray[Any], ratios: NDArray[Any], mean: NDArray[Any], num_samples: int, seed: int) -> Self:
        """A stream whose rows so far were fitted all at once; their directions beyond the components are not remembered."""
        sizes = np.asarray(variances, dtype=np.float64) * (num_samples - 1)
        return cls(
            capacity=num_kept(len(components), components.shape[1]),
            seed=seed,
            mean=np.asarray(mean, dtype=np.float64),
            vectors=np.asarray(components, dtype=np.float64),
            sizes=sizes,
            scatter=float(sizes.sum() / max(ratios.sum(), np.finfo(np.float64).tiny)),
            num_samples=num_samples,
            num_batches=1,
        )

    @property
    def total_variance(self) -> float:
        """Trace of the covariance of all rows seen."""
        return self.scatter / (self.num_samples - 1) if self.num_samples > 1 else 0.0

    @property
    def values(self) -> Array:
        """Variance along each direction, (k,)."""
        return self.sizes / max(self.num_samples - 1, 1)

    def joined(self, rows: Array, method_of: Callable[[StreamCovariance, int], ParallelDeflation], *, engine: Engine) -> EigenStream:
        """The stream after one more batch (b, d) of at least one row."""
        num_rows, batch_mean = len(rows), rows.mean(axis=0)
        total = self.num_samples + num_rows
        centred = rows - batch_mean  # (b, d)
        shift = math.sqrt(self.num_samples * num_rows / total) * (batch_mean - self.mean)  # (d,): what the move of the mean adds
        fresh = np.concatenate([centred, shift[None]])  # (b + 1, d)
        stacked = np.concatenate([np.sqrt(self.sizes)[:, None] * self.vectors, fresh])  # (k + b + 1, d)
        with one_blas_thread():
            vectors = self._leading(stacked) if len(self.vectors) < self.capacity else self._one_round(stacked, total, method_of, engine)
            vectors, sizes = _ritz(stacked, vectors)
        kept = sizes > max(stacked.shape) * np.finfo(np.float64).eps * sizes.max(initial=0.0)
        return replace(
            self,
            mean=self.mean + (batch_mean - self.mean) * (num_rows / total),
            vectors=vectors[kept],
            sizes=sizes[kept],
            scatter=self.scatter + float(np.square(fresh).sum()),
            num_samples=total,
            num_batches=self.num_batches + 1,
        )

    def _leading(self, stacked: Array) -> Array:
        """Exact leading directions, while there are fewer than may be kept: a round needs a direction for each of its parts."""
        if len(stacked) <= stacked.shape[1]:
            return np.ascontiguousarray(np.linalg.svd(stacked, full_matrices=False)[2][: self.capacity])
        _, vectors = np.linalg.eigh(stacked.T @ stacked)
        return np.ascontiguousarray(vectors[:, ::-1][:, : self.capacity].T)

    def _one_round(
        self, stacked: Array, num_samples: int, method_of: Callable[[StreamCovariance, int], ParallelDeflation], engine: Engine
    ) -> Array:
        stacked = stacked / math.sqrt(unit_of(float(np.abs(stacked).max()) ** 2))  # directions do not depend on the unit; what rounds square does
        method = method_of(StreamCovariance(stacked, num_samples), self.seed)
        size = len(self.vectors)
        start = Eigenpairs(
            vectors=self.vectors,
            values=np.square(self.vectors @ stacked.T).sum(axis=1) / (num_samples - 1),
            residuals=np.full(size, math.inf),  # nothing sits still: the matrix is new
            updates=(self.num_batches,) * size,
            present=(True,) * size,
        )
        found: Array = method.merge(start, engine(method, method.split(start))).vectors
        return found


def _ritz(stacked: Array, vectors: Array) -> tuple[Array, Array]:
    """Best orthonormal directions within a span, largest first, and the scatter along each: (k, d) -> (k, d), (k,)."""
    basis = np.linalg.qr(vectors.T)[0].T  # (k, d)
    seen = basis @ stacked.T  # (k, r)
    sizes, rotation = np.linalg.eigh(seen @ seen.T)
    return rotation[:, ::-1].T @ basis, np.maximum(sizes[::-1], 0.0)
