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

from partwise.checks import InputError
from partwise.linalg.products import tiled_product

__all__ = ["GRAM_LIMIT", "Covariance", "DenseCovariance", "GramCovariance", "covariance_of"]

GRAM_LIMIT = 4096  # features; a formed covariance of this size takes 128 MiB
CACHE_BYTES = 1 << 20  # of a piece of centred rows, so that both halves of a product find it in the cache


class Covariance(Protocol):
    """What an eigensolver needs to know of the data. It is picklable: it travels to each worker once.

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

    def product(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Rows times the covariance: (k, features) -> (k, features). The bits of a row do not depend on the other rows."""
        ...

    def apply(self, vector: NDArray[Any]) -> NDArray[Any]:
        """The covariance times one vector, (features,) -> (features,): faster than ``product`` and with bits of its own."""
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
    data : ndarray of shape (num_samples, features)
        Where ``rows`` come from.
    """

    matrix: NDArray[Any] = field(repr=False)
    mean: NDArray[Any] = field(repr=False)
    num_samples: int
    data: Any = field(repr=False)

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
        return tiled_product(vectors, self.matrix)

    def apply(self, vector: NDArray[Any]) -> NDArray[Any]:
        """The covariance times one vector: (features,) -> (features,)."""
        result: NDArray[Any] = self.matrix @ vector
        return result

    def rows(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Centred dense rows of the data, (b, features)."""
        rows: NDArray[Any] = self.data[indices] - self.mean
        return rows


@dataclass(frozen=True, eq=False)
class DenseCovariance:
    """A covariance that is never formed: each product passes over the rows. For data with more features than a formed covariance may have.

    Parameters
    ----------
    data : ndarray of shape (num_samples, features)
        Not copied.
    mean : ndarray of shape (features,)
        Mean of each feature, float64.
    total_variance : float
        Trace of the covariance.
    """

    data: NDArray[Any] = field(repr=False)
    mean: NDArray[Any] = field(repr=False)
    total_variance: float

    @property
    def num_samples(self) -> int:
        """Rows of the data."""
        return len(self.data)

    @property
    def num_features(self) -> int:
        """Columns of the data."""
        return len(self.mean)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of vectors and products."""
        return self.mean.dtype

    def product(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Rows times the covariance: (k, features) -> (k, features)."""
        total = np.zeros((len(vectors), self.num_features))
        for piece in self._pieces():
            total += tiled_product(tiled_product(vectors, piece.T), piece)
        return total / (self.num_samples - 1)

    def apply(self, vector: NDArray[Any]) -> NDArray[Any]:
        """The covariance times one vector: (features,) -> (features,)."""
        total = np.zeros(self.num_features)
        for piece in self._pieces():
            total += (piece @ vector) @ piece
        return total / (self.num_samples - 1)

    def rows(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Centred dense rows of the data, (b, features)."""
        rows: NDArray[Any] = self.data[indices] - self.mean
        return rows

    def _pieces(self) -> Iterator[NDArray[Any]]:
        size = max(1, CACHE_BYTES // (8 * self.num_features))
        for start in range(0, self.num_samples, size):
            yield self.data[start : start + size] - self.mean


def covariance_of(X: Any, *, mean: NDArray[Any] | None = None) -> Covariance:
    """The covariance of data in any form that this room reads.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
        The data, not copied.
    mean : ndarray of shape (n_features,), optional
        Subtracted instead of the mean of the data.

    Returns
    -------
    Covariance
        Formed when there are at least as many samples as features and at most ``GRAM_LIMIT`` features.

    Raises
    ------
    InputError
        When ``X`` is no matrix of real numbers, has fewer than two samples, or holds NaN or infinite entries.
    """
    if X.ndim != 2 or X.shape[0] < 2 or X.shape[1] < 1:
        raise InputError("data-shape", f"got data of shape {X.shape}, expected a matrix of at least 2 samples and 1 feature. Pass rows of samples.")
    centre = X.mean(axis=0, dtype=np.float64) if mean is None else np.asarray(mean, dtype=np.float64)
    num_samples, num_features = X.shape
    if num_features <= min(GRAM_LIMIT, num_samples):
        centred = X - centre
        return GramCovariance(centred.T @ centred / (num_samples - 1), centre, num_samples, X)
    return DenseCovariance(X, centre, float(sum(np.square(X - centre).sum(axis=0)) / (num_samples - 1)))
