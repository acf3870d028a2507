"""The covariance of a data matrix, as the eigensolvers of this room see it: a mean, a trace, and products with vectors.

Rows are samples. With ``Xc`` the centred data, ``S = Xc^T Xc / (n - 1)``, so that eigenvalues are scikit-learn's ``explained_variance_``. Vectors and
products are float64 whatever the data are: float32 or integer data are converted a few rows at a time, so that no copy of the data is made and a
residual of 1e-6 can be told from rounding.

A row of a product has the same bits alone and in a batch, and for any number of cores, as long as the caller holds
``partwise.linalg.products.one_blas_thread``: the data are cut into the same pieces everywhere and partial results are added in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import LinearOperator

from partwise.checks import InputError
from partwise.decompose._in_order import map_in_order
from partwise.decompose._moments import check_precision, gather_moments
from partwise.decompose._readers import RowSource, rows_of
from partwise.linalg.products import TILE, tiled_product

__all__ = ["GRAM_LIMIT", "ChunkedCovariance", "Covariance", "GramCovariance", "covariance_of"]

GRAM_LIMIT = 4096  # features; a formed covariance of this size takes 128 MiB
CHUNK_BYTES = 1 << 23  # of rows in float64 that one thread takes at a time
BLOCK_BYTES = 1 << 23  # of a formed covariance that one thread takes at a time
PIECE_BYTES = 1 << 19  # of rows in float64 that stay in the cache between the two halves of a product
PIECE_ROWS = 16  # at least; with fewer the halves are no longer matrix products


class Covariance(Protocol):
    """What an eigensolver needs to know of the data. It is picklable: it travels to each worker once, and a file travels as its path.

    Attributes
    ----------
    num_samples, num_features : int
        Shape of the data.
    dtype : numpy.dtype
        Of the vectors that products take and return: float64.
    mean : ndarray of shape (num_features,)
        Mean of each feature.
    total_variance : float
        Trace of the covariance.
    rounding : float
        How far, as a spectral norm, the covariance behind ``product`` may be from that of the data beyond rounding in float64. Above 0 only where large
        float32 data were multiplied in float32; add it to intervals that shall be guaranteed.
    """

    @property
    def num_samples(self) -> int: ...

    @property
    def num_features(self) -> int: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def mean(self) -> NDArray[Any]: ...

    @property
    def total_variance(self) -> float: ...

    @property
    def rounding(self) -> float: ...

    def product(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Rows times the covariance: (k, features) -> (k, features). The bits of a row do not depend on the other rows."""
        ...

    def apply(self, vector: NDArray[Any]) -> NDArray[Any]:
        """The covariance times one vector, (features,) -> (features,): faster than ``product``, always with the same bits, but not with those of it."""
        ...

    def rows(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Centred dense rows of the data, (b, features) in ``dtype``."""
        ...


@dataclass(frozen=True, eq=False)
class GramCovariance:
    """A covariance that was formed: the fastest when there are many samples for each feature.

    Parameters
    ----------
    matrix : ndarray of shape (features, features)
        The covariance, symmetric, float64.
    mean : ndarray of shape (features,)
        Mean of each feature, float64.
    num_samples : int
        Rows it was formed of.
    source : RowSource or None
        Where ``rows`` come from. Replace it by None before sending the covariance to a worker that needs no rows.
    rounding : float, default=0.0
        See ``Covariance``.
    """

    matrix: NDArray[Any] = field(repr=False)
    mean: NDArray[Any] = field(repr=False)
    num_samples: int
    source: RowSource | None = field(repr=False)
    rounding: float = 0.0

    @property
    def num_features(self) -> int:
        """Columns of the data."""
        return len(self.mean)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of vectors and products."""
        return self.matrix.dtype

    @property
    def total_variance(self) -> float:
        """Trace of the covariance."""
        return float(np.trace(self.matrix))

    def product(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Rows times the covariance: (k, features) -> (k, features)."""
        parts = map_in_order(lambda block: tiled_product(vectors, self.matrix[:, block]), self._blocks())
        return np.concatenate(list(parts), axis=1)

    def apply(self, vector: NDArray[Any]) -> NDArray[Any]:
        """The covariance times one vector: (features,) -> (features,)."""
        parts = map_in_order(lambda block: self.matrix[block] @ vector, self._blocks())
        return np.concatenate(list(parts))

    def _blocks(self) -> list[slice]:
        """Blocks of features that are worth a thread each."""
        size = max(TILE, BLOCK_BYTES // (8 * self.num_features))
        return [slice(start, start + size) for start in range(0, self.num_features, size)]

    def rows(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Centred dense rows of the data, (b, features)."""
        if self.source is None:
            raise ValueError("this covariance was sent without its rows")
        rows: NDArray[Any] = self.source.take(indices).astype(np.float64) - self.mean
        return rows


@dataclass(frozen=True, eq=False)
class ChunkedCovariance:
    """A covariance that is never formed: each product passes once over the rows, in memory or in a file, with all cores.

    Parameters
    ----------
    source : RowSource
        The rows.
    mean : ndarray of shape (features,)
        Mean of each feature, float64.
    total_variance : float
        Trace of the covariance.
    """

    source: RowSource = field(repr=False)
    mean: NDArray[Any] = field(repr=False)
    total_variance: float
    rounding: float = 0.0

    @property
    def num_samples(self) -> int:
        """Rows of the data."""
        return self.source.shape[0]

    @property
    def num_features(self) -> int:
        """Columns of the data."""
        return self.source.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of vectors and products."""
        return self.mean.dtype

    def product(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Rows times the covariance: (k, features) -> (k, features)."""

        def of_chunk(chunk: NDArray[Any]) -> NDArray[Any]:
            total = np.zeros((len(vectors), self.num_features))
            for piece in self._pieces(chunk):
                total += tiled_product(tiled_product(vectors, piece.T), piece)
            return total

        return self._sum(of_chunk, (len(vectors), self.num_features))

    def apply(self, vector: NDArray[Any]) -> NDArray[Any]:
        """The covariance times one vector: (features,) -> (features,)."""

        def of_chunk(chunk: NDArray[Any]) -> NDArray[Any]:
            total = np.zeros(self.num_features)
            for piece in self._pieces(chunk):
                total += (piece @ vector) @ piece
            return total

        return self._sum(of_chunk, (self.num_features,))

    def rows(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Centred dense rows of the data, (b, features)."""
        rows: NDArray[Any] = self.source.take(indices).astype(np.float64) - self.mean
        return rows

    def _sum(self, of_chunk: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        size = max(PIECE_ROWS, CHUNK_BYTES // (8 * self.num_features))
        total = np.zeros(shape)
        for partial in map_in_order(of_chunk, self.source.chunks(size), bytes_each=16 * size * self.num_features):
            total += partial
        return total / (self.num_samples - 1)

    def _pieces(self, chunk: NDArray[Any]) -> Iterator[NDArray[Any]]:
        size = max(PIECE_ROWS, PIECE_BYTES // (8 * self.num_features))
        for start in range(0, len(chunk), size):
            piece = chunk[start : start + size].astype(np.float64, order="C")
            piece -= self.mean
            yield piece


def covariance_of(X: Any, *, mean: NDArray[Any] | None = None) -> Covariance:
    """The covariance of data in any form that this room reads.

    Parameters
    ----------
    X : ndarray, numpy.memmap, scipy sparse matrix or array, LinearOperator or RowSource, of shape (n_samples, n_features)
        The data. Neither copied nor densified; centring is implicit for sparse data and operators.
    mean : ndarray of shape (n_features,), optional
        Subtracted instead of the mean of the data, such as the running mean of a stream.

    Returns
    -------
    Covariance
        Formed where dense data have at most ``GRAM_LIMIT`` features and at least as many samples; otherwise each product passes over the data.

    Raises
    ------
    InputError
        When ``X`` is no matrix of real numbers, has fewer than two samples, or holds NaN or infinite entries (how many, and where the first is), half-precision
        numbers, or integers or squares beyond the range of float64. When the two products of an operator do not belong together.
    """
    # A file that is mapped is read instead of mapped, so that its pages do not stay in this process.
    source = rows_of(X) if isinstance(X, np.ndarray) and X.ndim == 2 else X
    shape = tuple(getattr(source, "shape", ()))
    if len(shape) != 2 or shape[0] < 2 or shape[1] < 1:
        raise InputError("data-shape", f"got data of shape {shape}, expected a matrix of at least 2 samples and 1 feature. Pass one row per sample.")
    if getattr(source, "dtype", None) is not None:
        check_precision(source.dtype)
    centre = None if mean is None else np.asarray(mean, dtype=np.float64)
    if centre is not None and centre.shape != (shape[1],):
        raise InputError("data-shape", f"got a mean of shape {centre.shape} for data of shape {shape}. Pass one number for each feature.")
    if sparse.issparse(source) or isinstance(source, LinearOperator):
        from partwise.decompose._sparse_covariance import operator_covariance, sparse_covariance

        return sparse_covariance(source, mean=centre) if sparse.issparse(source) else operator_covariance(source, mean=centre)
    if not isinstance(source, RowSource):
        kind = type(X).__name__
        raise InputError("unknown-data", f"got data of type {kind}, expected an array, a sparse matrix, a LinearOperator or a reader of rows. Convert it.")
    num_samples, num_features = source.shape
    if num_features <= min(GRAM_LIMIT, num_samples):
        moments = gather_moments(source, gram=True, mean=centre)
        matrix = moments.scatter
        if matrix is None:
            raise AssertionError("the scatter was asked for")
        matrix /= num_samples - 1
        return GramCovariance(matrix, moments.mean, num_samples, source, moments.rounding / (num_samples - 1))
    moments = gather_moments(source, gram=False, mean=centre)
    return ChunkedCovariance(source, moments.mean, moments.trace / (num_samples - 1))
