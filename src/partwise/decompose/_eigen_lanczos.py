"""A block of neighbouring eigenvectors at once, by ARPACK on the matrix without what belongs to the vectors in front."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse.linalg
from numpy.typing import NDArray

from partwise.decompose._eigen_rounds import EigenPart, EigenResult
from partwise.decompose._eigen_steps import Ahead
from partwise.rounds import part_seed

if TYPE_CHECKING:
    from partwise.decompose._covariance import Covariance

__all__ = ["next_vector", "solve_block"]

SAFETY = 0.5  # ARPACK's own residuals are estimates; asked for half, it stays within what we promise


def solve_block(covariance: Covariance, part: EigenPart, *, tol: float, seed: int) -> EigenResult:
    """Solve one part and measure what came out on the whole matrix.

    The same part and seed give the same bits: the start is the sum of the part's own vectors, and restarts are drawn from the seed.
    """
    num_wanted, num_features = part.vectors.shape
    ahead = Ahead(part.ahead_vectors, part.ahead_values)

    def deflated(vector: NDArray[Any]) -> NDArray[Any]:
        vector = np.ascontiguousarray(vector.reshape(-1), dtype=covariance.dtype)
        return ahead.taken_from(covariance.apply(vector), vector)

    if num_features <= max(2 * num_wanted + 1, 20):  # ARPACK's basis would be the whole space
        vectors = _dense(deflated, num_features, num_wanted, covariance.dtype)
    else:
        operator = scipy.sparse.linalg.LinearOperator((num_features, num_features), matvec=deflated, dtype=covariance.dtype)
        rng = np.random.default_rng(part_seed(seed, round_number=part.round_number, part=part.index))
        vectors = _arpack(operator, num_wanted, start=part.vectors.sum(axis=0), tol=SAFETY * tol, rng=rng)
    images = covariance.product(vectors)  # (b, d)
    values = np.einsum("kd,kd->k", vectors, images).astype(np.float64)
    residuals = np.linalg.norm(images - values[:, None].astype(vectors.dtype) * vectors, axis=1).astype(np.float64)
    noise = max(num_features, 100) * float(np.finfo(vectors.dtype).eps)
    largest = max(values.max(), part.ahead_values.max(initial=0.0))
    present = values > noise * largest
    return EigenResult(part.index, vectors, values, residuals, tuple(bool(there) for there in present))


def next_vector(covariance: Covariance, vectors: NDArray[Any], *, tol: float, seed: int) -> NDArray[Any]:
    """The leading vector (1, d) of what orthonormal rows (k, d) leave over.

    Lanczos from one start sees one vector of each eigenspace, so members of a repeated eigenvalue are missed now and then. After the others are taken
    away, the next is the leading one.
    """
    images = covariance.product(vectors)  # (k, d)
    part = EigenPart(
        index=len(vectors),
        round_number=1,
        vectors=np.random.default_rng(part_seed(seed, round_number=0, part=len(vectors))).standard_normal((1, vectors.shape[1])),
        ahead_vectors=vectors,
        ahead_values=np.einsum("kd,kd->k", vectors, images),
        ahead_residual=0.0,
        scale=covariance.total_variance,
    )
    return solve_block(covariance, part, tol=tol, seed=seed).vectors


def _dense(deflated: Any, num_features: int, num_wanted: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    columns = np.stack([deflated(row) for row in np.eye(num_features, dtype=dtype)])  # (d, d)
    _, vectors = np.linalg.eigh((columns + columns.T) / 2)
    return np.ascontiguousarray(vectors[:, ::-1][:, :num_wanted].T)  # (b, d), largest first


def _arpack(operator: Any, num_wanted: int, *, start: NDArray[Any], tol: float, rng: np.random.Generator) -> NDArray[Any]:
    try:
        values, vectors = scipy.sparse.linalg.eigsh(operator, k=num_wanted, which="LA", v0=start, tol=tol, rng=rng)  # (b,), (d, b)
    except scipy.sparse.linalg.ArpackNoConvergence as stopped:  # what has converged, then the start for what has not
        missing = num_wanted - stopped.eigenvectors.shape[1]
        fill = np.linalg.qr(np.column_stack([stopped.eigenvectors, rng.standard_normal((len(start), missing))]))[0]
        values, vectors = np.append(stopped.eigenvalues, np.full(missing, -np.inf)), fill
    order = np.argsort(values)[::-1]
    found = np.ascontiguousarray(vectors[:, order].T, dtype=start.dtype)  # (b, d)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found
