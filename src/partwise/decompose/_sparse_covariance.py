"""Covariances of data that can only be multiplied: sparse matrices and linear operators, centred without being densified.

With ``Y = X w - 1 (mean . w)`` the product is ``X^T Y - mean (1^T Y)``. Subtracting the mean inside, between the two halves, matters: rounding then costs
digits in proportion to the offset of the data, and not to its square as in ``X^T X w - n mean (mean . w)``.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import LinearOperator

from partwise.checks import InputError
from partwise.decompose._in_order import map_in_order
from partwise.decompose._moments import RANGE, check_integers, not_finite
from partwise.decompose._readers import check_dtype
from partwise.linalg.products import TILE

__all__ = ["OperatorCovariance", "SparseCovariance", "operator_covariance", "sparse_covariance"]

NUM_CHUNKS = 32  # of a sparse matrix, at most: each has its own sum over the features until they are added
CHUNK_ENTRIES = 1 << 17  # at least, in a chunk
ENTRIES_PER_FEATURE = 8  # at least, in a chunk, or adding the sums would take as long as making them
TRACE_LIMIT = 2048  # rows or features of an operator, up to which its total variance is computed and not estimated
ADJOINT_DOUBLE, ADJOINT_SINGLE = 1e-9, 1e-4  # of the lengths, how far the two products of an operator may be apart by rounding
NUM_PROBES = 64  # random vectors of the estimate


@dataclass(frozen=True, eq=False)
class _Multiplied(ABC):
    """The covariance of data that can only be multiplied.

    Parameters
    ----------
    data : csr_array or LinearOperator of shape (num_samples, features)
        Not copied.
    mean : ndarray of shape (features,)
        Mean of each feature, float64.
    total_variance : float
        Trace of the covariance.
    """

    data: Any = field(repr=False)
    mean: NDArray[Any] = field(repr=False)
    total_variance: float
    rounding: float = 0.0
    constant: NDArray[np.intp] | None = field(default=None, repr=False)  # columns that do not vary, where a huge one would leave its rounding

    @property
    def num_samples(self) -> int:
        """Rows of the data."""
        return int(self.data.shape[0])

    @property
    def num_features(self) -> int:
        """Columns of the data."""
        return int(self.data.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of vectors and products."""
        return self.mean.dtype

    def product(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Rows times the covariance: (k, features) -> (k, features)."""
        result = np.empty((len(vectors), self.num_features))
        for start in range(0, len(vectors), TILE):
            tile = np.zeros((self.num_features, TILE))  # all products meet the same loops, whose inner one runs over these eight
            tile[:, : len(vectors) - start] = vectors[start : start + TILE].T
            result[start : start + TILE] = self._times_varying(tile).T[: len(vectors) - start]
        return result

    def apply(self, vector: NDArray[Any]) -> NDArray[Any]:
        """The covariance times one vector: (features,) -> (features,)."""
        return self._times_varying(vector)

    def _times_varying(self, right: NDArray[Any]) -> NDArray[Any]:
        if self.constant is None:
            return self._times(right)
        right = right.copy()
        right[self.constant] = 0.0
        total = self._times(right)
        total[self.constant] = 0.0
        return total

    @abstractmethod
    def _times(self, right: NDArray[Any]) -> NDArray[Any]:
        """The covariance times columns: (features,) or (features, TILE), and the same back."""


class SparseCovariance(_Multiplied):
    """The covariance of a sparse matrix."""

    def rows(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Centred dense rows of the data, (b, features)."""
        rows: NDArray[Any] = self.data[indices].toarray().astype(np.float64) - self.mean
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_chunks"}

    def _times(self, right: NDArray[Any]) -> NDArray[Any]:
        shift = self.mean @ right

        def of_chunk(chunk: Any) -> tuple[NDArray[Any], NDArray[Any]]:
            scores = chunk @ right - shift  # centred: (rows,) or (rows, TILE)
            return chunk.T @ scores, scores.sum(axis=0)

        total, sums = np.zeros(right.shape), np.zeros(right.shape[1:])
        for partial, partial_sums in map_in_order(of_chunk, self._chunks, bytes_each=right.nbytes):
            total += partial
            sums += partial_sums
        total -= np.multiply.outer(self.mean, sums)
        total /= self.num_samples - 1
        return total

    @cached_property
    def _chunks(self) -> list[Any]:
        """Row blocks with about the same number of entries; views, and the same ones for any number of cores."""
        pointers = self.data.indptr
        count = int(np.clip(self.data.nnz // max(CHUNK_ENTRIES, ENTRIES_PER_FEATURE * self.num_features), 1, min(NUM_CHUNKS, self.num_samples)))
        cuts = np.searchsorted(pointers, np.linspace(0, self.data.nnz, count + 1)[1:-1])
        edges = np.unique(np.concatenate([[0], cuts, [self.num_samples]]))
        return [self._block(start, stop) for start, stop in pairwise(edges)]

    def _block(self, start: int, stop: int) -> Any:
        first, last = self.data.indptr[start], self.data.indptr[stop]
        parts = (self.data.data[first:last], self.data.indices[first:last], self.data.indptr[start : stop + 1] - first)
        return sparse.csr_array(parts, shape=(stop - start, self.num_features), copy=False)


def sparse_covariance(X: Any, *, mean: NDArray[Any] | None) -> SparseCovariance:
    """The covariance of a sparse matrix; formats other than CSR are converted to it, integers to float64."""
    check_dtype(X.dtype)
    data = sparse.csr_array(X)
    check_integers(data.data)
    if not data.has_canonical_format:
        data = data.copy()  # the caller's matrix stays as it is
        data.sum_duplicates()
    if data.dtype not in (np.float64, np.float32):
        data = data.astype(np.float64)
    num_samples = data.shape[0]
    bad = ~np.isfinite(data.data)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        row = int(np.searchsorted(data.indptr, first, side="right")) - 1
        raise not_finite(int(bad.sum()), (row, int(data.indices[first])), num_entries=data.nnz)
    centre = _mean(data) if mean is None else mean
    square = _sum_of_squares(data, centre)
    if not np.isfinite(square):
        raise _too_large()
    return SparseCovariance(data, centre, square / (num_samples - 1), constant=_constant_columns(data) if mean is None else None)


def _too_large() -> InputError:
    return InputError(
        "too-large", f"got entries so large that their squares overflow, expected absolute values below {RANGE:.0e}. Divide the data by a constant."
    )


def _mean(data: Any) -> NDArray[Any]:
    """Mean of each column, with what rounding left of it in the first pass put right in a second, as a huge column has its rounding squared later."""
    num_samples, num_features = data.shape
    stored = np.bincount(data.indices, minlength=num_features)
    first = np.bincount(data.indices, weights=data.data, minlength=num_features) / num_samples
    off = -(num_samples - stored) * first  # (features,), of the entries that are not stored
    for start in range(0, data.nnz, CHUNK_ENTRIES):
        here = data.indices[start : start + CHUNK_ENTRIES]
        off += np.bincount(here, weights=data.data[start : start + CHUNK_ENTRIES] - first[here], minlength=num_features)
    return first + off / num_samples  # type: ignore[no-any-return]


def _constant_columns(data: Any) -> NDArray[np.intp] | None:
    """Columns whose entries are all stored and all the same, or None. Few columns of sparse data have all entries stored."""
    full = np.flatnonzero(np.bincount(data.indices, minlength=data.shape[1]) == data.shape[0])
    if not len(full):
        return None
    lowest, highest = np.full(data.shape[1], np.inf), np.full(data.shape[1], -np.inf)
    for start in range(0, data.nnz, CHUNK_ENTRIES):
        here, entries = data.indices[start : start + CHUNK_ENTRIES], data.data[start : start + CHUNK_ENTRIES]
        np.minimum.at(lowest, here, entries)
        np.maximum.at(highest, here, entries)
    constant = full[lowest[full] == highest[full]]
    return constant if len(constant) else None


def _sum_of_squares(data: Any, centre: NDArray[Any]) -> float:
    """Of all centred entries, those that are not stored included."""
    empty = data.shape[0] - np.bincount(data.indices, minlength=data.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(empty @ np.square(centre))
        for start in range(0, data.nnz, CHUNK_ENTRIES):
            off = data.data[start : start + CHUNK_ENTRIES] - centre[data.indices[start : start + CHUNK_ENTRIES]]
            square += float(off @ off)
    return square


class OperatorCovariance(_Multiplied):
    """The covariance of a linear operator with ``matmat`` and ``rmatmat``, or ``matvec`` and ``rmatvec``, which is asked for products only."""

    def _times(self, right: NDArray[Any]) -> NDArray[Any]:
        scores = self.data.dot(right) - self.mean @ right  # (num_samples,) or (num_samples, TILE)
        total: NDArray[Any] = self.data.adjoint().dot(scores) - np.multiply.outer(self.mean, scores.sum(axis=0))
        return total / (self.num_samples - 1)

    def rows(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Centred dense rows of the data, (b, features), found by asking for products with unit vectors."""
        rows: NDArray[Any] = _rows_of_operator(self.data, np.asarray(indices)) - self.mean
        return rows


def operator_covariance(X: LinearOperator, *, mean: NDArray[Any] | None) -> OperatorCovariance:
    """The covariance of an operator.

    Warns
    -----
    UserWarning
        When both sides are so long that the total variance is estimated.
    """
    if X.dtype is not None:
        check_dtype(np.dtype(X.dtype))
    num_samples = X.shape[0]
    sums = _transposed(X, np.ones(num_samples))
    num_bad = int((~np.isfinite(sums)).sum())
    if num_bad:
        first = int(np.flatnonzero(~np.isfinite(sums))[0])
        raise InputError("not-finite", f"X has NaN or infinite column sums for {num_bad} features, the first is feature {first}. Check the operator.")
    _check_adjoint(X)
    centred = OperatorCovariance(X, sums / num_samples if mean is None else mean, np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        trace = _trace(centred)
    if not np.isfinite(trace):
        raise _too_large()
    return OperatorCovariance(X, centred.mean, trace)


def _transposed(X: LinearOperator, vector: NDArray[Any]) -> NDArray[Any]:
    try:
        return np.asarray(X.rmatvec(vector), dtype=np.float64)
    except NotImplementedError as error:
        raise InputError(
            "operator-without-adjoint", "got a LinearOperator without rmatvec, expected products with the data from both sides. Pass rmatvec to it."
        ) from error


def _check_adjoint(X: LinearOperator) -> None:
    """Refuse two products that are not of one matrix: ``u (X v)`` and ``v (X^T u)`` are one number. Eigenvalues would be wrong, and intervals too."""
    rng = np.random.default_rng(0)
    right, left = rng.standard_normal(X.shape[1]), rng.standard_normal(X.shape[0])
    image, back = np.asarray(X.matvec(right), dtype=np.float64), _transposed(X, left)
    one, other = float(left @ image), float(right @ back)
    rounding = ADJOINT_SINGLE if X.dtype is not None and np.dtype(X.dtype) == np.float32 else ADJOINT_DOUBLE
    size = float(np.abs(image).max()) or 1.0  # lengths of tiny or huge numbers are not squared
    if not abs(one - other) / size <= rounding * float(np.linalg.norm(left)) * float(np.linalg.norm(image / size)):
        raise InputError(
            "operator-adjoint",
            f"got an operator whose rmatvec does not belong to its matvec: u (X v) is {one:.6g} and v (X^T u) is {other:.6g} for random u and v, "
            "expected the same number. Check rmatvec.",
        )


def _trace(centred: OperatorCovariance) -> float:
    """Exact through the shorter side; where both are long, by Hutchinson's estimator, whose probes are the same each time."""
    num_samples, num_features = centred.num_samples, centred.num_features
    if num_samples <= min(num_features, TRACE_LIMIT):
        tiles = (np.arange(start, min(start + TILE, num_samples)) for start in range(0, num_samples, TILE))
        return sum(float(np.square(centred.rows(tile)).sum()) for tile in tiles) / (num_samples - 1)
    scores = _Scores(centred)
    if num_features <= TRACE_LIMIT:
        tiles = (np.arange(start, min(start + TILE, num_features)) for start in range(0, num_features, TILE))
        return sum(float(scores.squares(np.equal.outer(np.arange(num_features), tile).astype(float)).sum()) for tile in tiles) / (num_samples - 1)
    rng = np.random.default_rng(0)
    found = np.concatenate([scores.squares(rng.choice([-1.0, 1.0], size=(num_features, TILE))) for _ in range(NUM_PROBES // TILE)])
    error = float(found.std(ddof=1) / np.sqrt(NUM_PROBES) / max(found.mean(), np.finfo(float).tiny))
    warnings.warn(
        f"The total variance of an operator of shape {centred.data.shape} is estimated with {NUM_PROBES} random vectors, to about {error:.1%}; "
        "explained_variance_ratio_ inherits this. Pass the matrix itself for an exact one.",
        UserWarning,
        stacklevel=2,
    )
    return float(found.mean() / (num_samples - 1))


@dataclass(frozen=True)
class _Scores:
    centred: OperatorCovariance

    def squares(self, right: NDArray[Any]) -> NDArray[Any]:
        """Squared lengths of the centred scores of each column of ``right``."""
        scores = self.centred.data.matmat(right) - self.centred.mean @ right
        return np.square(scores).sum(axis=0)  # type: ignore[no-any-return]


def _rows_of_operator(operator: LinearOperator, indices: NDArray[Any]) -> NDArray[Any]:
    rows = np.empty((len(indices), operator.shape[1]))
    for start in range(0, len(indices), TILE):
        here = indices[start : start + TILE]
        units = np.zeros((operator.shape[0], len(here)))
        units[here, np.arange(len(here))] = 1.0
        rows[start : start + TILE] = np.asarray(operator.rmatmat(units)).T
    return rows
