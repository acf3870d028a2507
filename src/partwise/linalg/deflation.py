"""Remove rank-one parts from a matrix, and measure how far rank-one parts are from each other.

A rank-one part is a pair of vectors; ``k`` parts are the rows of ``left`` (k, m) and ``right`` (k, p), and stand for ``sum_k left_k right_k^T``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["deflate", "deflation_errors", "pair_distances"]


def deflate(matrix: NDArray[Any], left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """What rank-one parts leave over: ``matrix - sum_k left_k right_k^T``.

    Parameters
    ----------
    matrix : ndarray
        (m, p).
    left, right : ndarray
        (k, m) and (k, p), one part per row; k may be 0.

    Returns
    -------
    ndarray
        (m, p), a new array.
    """
    rest: NDArray[Any] = matrix - left.T @ right
    return rest


def pair_distances(left: NDArray[Any], right: NDArray[Any], other_left: NDArray[Any], other_right: NDArray[Any]) -> NDArray[Any]:
    """Frobenius norms of ``left_k right_k^T - other_left_k other_right_k^T``, row by row.

    Neither the sign nor the split of the size between the two vectors of a pair matters. The matrices are never formed, and parts that agree to
    the last digit give the last digit: each pair is split along and across the other one, which makes four terms at right angles to each other.

    Parameters
    ----------
    left, right : ndarray
        (k, m) and (k, p).
    other_left, other_right : ndarray
        The same shapes.

    Returns
    -------
    ndarray
        (k,), not negative.
    """
    left_along, left_across = _along_and_across(left, other_left)
    right_along, right_across = _along_and_across(right, other_right)
    other_size = np.linalg.norm(other_left, axis=1) * np.linalg.norm(other_right, axis=1)  # (k,)
    terms = [left_along * right_along - other_size, left_along * right_across, left_across * right_along, left_across * right_across]
    distances: NDArray[Any] = np.linalg.norm(terms, axis=0)  # (k,)
    return distances


def _along_and_across(vectors: NDArray[Any], axes: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Signed length of each row along the row of ``axes``, and the length of the rest: (k, dim) twice -> (k,) twice. A zero axis has no along."""
    sizes = np.linalg.norm(axes, axis=1, keepdims=True)  # (k, 1)
    units = axes / np.where(sizes == 0, 1, sizes)  # (k, dim)
    along = (vectors * units).sum(axis=1)  # (k,)
    return along, np.linalg.norm(vectors - along[:, None] * units, axis=1)


def deflation_errors(left: NDArray[Any], right: NDArray[Any], exact_left: NDArray[Any], exact_right: NDArray[Any]) -> NDArray[Any]:
    """Error ``G_k`` of each part: ``||left_k right_k^T - exact_k||_F / ||exact_k||_F``.

    Blind to signs. 0 means exact, 1 is what a part of zeros has. The essays on parallel deflation write ``G`` without a definition we could read;
    this one is ours.

    Parameters
    ----------
    left, right : ndarray
        (k, m) and (k, p), the parts.
    exact_left, exact_right : ndarray
        The same shapes: the exact parts, none of them zero.

    Returns
    -------
    ndarray
        (k,).

    References
    ----------
    AdaPaD. arXiv:2605.10741.

    Examples
    --------
    >>> exact = np.eye(2)
    >>> deflation_errors(-exact, -exact, exact, exact).tolist(), deflation_errors(0 * exact, exact, exact, exact).tolist()
    ([0.0, 0.0], [1.0, 1.0])
    """
    exact_size: NDArray[Any] = np.linalg.norm(exact_left, axis=1) * np.linalg.norm(exact_right, axis=1)  # (k,)
    errors: NDArray[Any] = pair_distances(left, right, exact_left, exact_right) / exact_size
    return errors
