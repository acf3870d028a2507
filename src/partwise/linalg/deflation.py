"""Remove rank-one parts from a matrix, and measure how far rank-one parts are from each other.

A rank-one part is a pair of vectors; ``k`` parts are the rows of ``left`` (k, m) and ``right`` (k, p), and stand for ``sum_k left_k right_k^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["deflate", "deflation_errors", "pair_distances"]


def deflate(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """What rank-one parts leave over: ``matrix - sum_k left_k right_k^T``.

    Parameters
    ----------
    matrix : Tensor
        (m, p).
    left, right : Tensor
        (k, m) and (k, p), one part per row; k may be 0.

    Returns
    -------
    Tensor
        (m, p), a new tensor.
    """
    return matrix - left.T @ right


def pair_distances(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> Tensor:
    """Frobenius norms of ``left_k right_k^T - other_left_k other_right_k^T``, row by row.

    Neither the sign nor the split of the size between the two vectors of a pair matters. The matrices are never formed, and parts that agree to
    the last digit give the last digit: each pair is split along and across the other one, which makes four terms at right angles to each other.

    Parameters
    ----------
    left, right : Tensor
        (k, m) and (k, p).
    other_left, other_right : Tensor
        The same shapes.

    Returns
    -------
    Tensor
        (k,), not negative.
    """
    left_along, left_across = _along_and_across(left, other_left)
    right_along, right_across = _along_and_across(right, other_right)
    other_size = torch.linalg.vector_norm(other_left, dim=1) * torch.linalg.vector_norm(other_right, dim=1)  # (k,)
    terms = [left_along * right_along - other_size, left_along * right_across, left_across * right_along, left_across * right_across]
    distances: Tensor = torch.linalg.vector_norm(torch.stack(terms), dim=0)  # (k,)
    return distances


def _along_and_across(vectors: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """Signed length of each row along the row of ``axes``, and the length of the rest: (k, dim) twice -> (k,) twice. A zero axis has no along."""
    units = torch.nn.functional.normalize(axes, dim=1)  # (k, dim)
    along = (vectors * units).sum(dim=1)  # (k,)
    return along, torch.linalg.vector_norm(vectors - along[:, None] * units, dim=1)


def deflation_errors(left: Tensor, right: Tensor, exact_left: Tensor, exact_right: Tensor) -> Tensor:
    """Error ``G_k`` of each part: ``||left_k right_k^T - exact_k||_F / ||exact_k||_F``.

    Blind to signs. 0 means exact, 1 is what a part of zeros has. The essays on parallel deflation write ``G`` without a definition we could read;
    this one is ours.

    Parameters
    ----------
    left, right : Tensor
        (k, m) and (k, p), the parts.
    exact_left, exact_right : Tensor
        The same shapes: the exact parts, none of them zero.

    Returns
    -------
    Tensor
        (k,).

    References
    ----------
    AdaPaD. arXiv:2605.10741.

    Examples
    --------
    >>> exact = torch.eye(2, dtype=torch.float64)
    >>> deflation_errors(-exact, -exact, exact, exact).tolist(), deflation_errors(0 * exact, exact, exact, exact).tolist()
    ([0.0, 0.0], [1.0, 1.0])
    """
    exact_size: Tensor = torch.linalg.vector_norm(exact_left, dim=1) * torch.linalg.vector_norm(exact_right, dim=1)  # (k,)
    return pair_distances(left, right, exact_left, exact_right) / exact_size
