"""Rank-one regression: reduce it to one small matrix, solve it in closed form, or take solver steps on a deflated target.

The problem is ``min 1/2 ||Y - B A X||_F^2`` with inputs ``X`` (d, n), targets ``Y`` (m, n), and ``k`` rank-one maps ``b_k a_k^T`` (columns are
samples, as in the papers). Only the part of ``Y`` inside the row space of ``X`` can be fitted, so everything happens on a matrix
``F`` (m, p), p the rank of ``X``: there a map is the pair ``(b_k, z_k)`` and its target is ``F - sum_{j<k} b_j z_j^T``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partwise.checks import check_choice

__all__ = ["SOLVERS", "ExactParts", "ReducedRegression", "exact_parts", "numerical_rank", "rank_one_step", "rank_one_steps", "reduce_regression"]

SOLVERS = ("power", "gd", "svd")


@dataclass(frozen=True, eq=False)
class ReducedRegression:
    """A regression on ``inputs`` (d, n), written in an orthonormal basis of their row space.

    Attributes
    ----------
    target : Tensor
        (m, p), ``F = Y Q``: all of the targets that can be fitted.
    basis : Tensor
        (n, p), ``Q``: orthonormal columns that span the rows of the inputs.
    unreduce : Tensor
        (d, p), turns the rows ``z`` of a fitted pair into weights ``a = unreduce @ z`` on the inputs, with ``a^T X = z^T Q^T``.
    """

    target: Tensor
    basis: Tensor
    unreduce: Tensor

    @property
    def rank(self) -> int:
        """Numerical rank of the inputs (p)."""
        return self.basis.shape[1]


def numerical_rank(singular_values: Tensor, shape: Sequence[int], *, scale: float | None = None) -> int:
    """Number of singular values above ``eps * max(shape) * scale``, the usual line below which they are rounding.

    ``scale`` is the size of the numbers that the matrix was computed from; by default that is the largest singular value.
    """
    if not len(singular_values):
        return 0
    line = torch.finfo(singular_values.dtype).eps * max(shape) * (float(singular_values[0]) if scale is None else scale)
    return int((singular_values > line).sum())


def reduce_regression(inputs: Tensor, targets: Tensor) -> ReducedRegression:
    """Thin QR of ``X^T``, then the pseudo-inverse of its small factor.

    For ``X`` of full rank this is ``X^T = Q R``, ``F = Y Q``, ``a = R^-1 z``, up to a rotation of ``Q`` that no fitted map can see. When ``X`` is
    rank-deficient, directions that are rounding are left out, which gives the maps of least norm; ``rank`` says how many stayed.

    Parameters
    ----------
    inputs : Tensor
        (d, n), columns are samples.
    targets : Tensor
        (m, n).
    """
    basis, factor = torch.linalg.qr(inputs.T)  # (n, q), (q, d) with q = min(n, d)
    left, sizes, right = torch.linalg.svd(factor, full_matrices=False)  # (q, q), (q,), (q, d)
    rank = numerical_rank(sizes, inputs.shape)
    basis = basis @ left[:, :rank]  # (n, p)
    return ReducedRegression(target=targets @ basis, basis=basis, unreduce=right[:rank].T / sizes[:rank])


@dataclass(frozen=True, eq=False)
class ExactParts:
    """The exact rank-one parts of a matrix (m, p), largest first.

    Attributes
    ----------
    left, right : Tensor
        (k, m) and (k, p), unit rows ``u_k`` and ``v_k``.
    singular_values : Tensor
        (min(m, p),), all of them, not only the first k.
    """

    left: Tensor
    right: Tensor
    singular_values: Tensor

    @property
    def scaled_right(self) -> Tensor:
        """(k, p), rows ``sigma_k v_k``, so that ``left.T @ scaled_right`` is the best approximation of rank k."""
        return self.singular_values[: len(self.right), None] * self.right


def exact_parts(target: Tensor, *, num_components: int) -> ExactParts:
    """What exact sequential deflation of ``target`` (m, p) returns, by one singular value decomposition."""
    left, sizes, right = torch.linalg.svd(target, full_matrices=False)  # (m, q), (q,), (q, p)
    return ExactParts(left.T[:num_components], right[:num_components], sizes)


def rank_one_step(
    target: Tensor, left: Tensor, right: Tensor, previous: tuple[Tensor, Tensor], *, solver: str = "power", num_steps: int = 1, lr: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Move one pair towards the best rank-one approximation of what ``previous`` pairs leave of ``target``.

    The deflated target is never formed (except by ``svd``): its products with a vector are those of ``target`` minus a few inner products.

    Parameters
    ----------
    target : Tensor
        (m, p), ``F``.
    left, right : Tensor
        (m,) and (p,), the pair ``(b, z)`` to start from.
    previous : tuple of Tensor
        (j, m) and (j, p), the pairs in front of this one; j may be 0.
    solver : {"power", "gd", "svd"}
        ``power`` alternates least squares, and one step contracts the error by the squared ratio of the two largest singular values of the
        deflated target. ``gd`` takes gradient steps in both vectors at once. ``svd`` is exact, ignores the start and needs one step.
    num_steps : int
        Steps to take.
    lr : float
        Step size of ``gd``; at most 0.3 over the largest singular value of ``target`` is safe.

    Returns
    -------
    tuple of Tensor
        The new pair, (m,) and (p,).

    References
    ----------
    AdaPaD. arXiv:2605.10741.
    """
    ahead = torch.ones(1, len(previous[0]), dtype=target.dtype, device=target.device)  # (1, j)
    lefts, rights = rank_one_steps(target, left[None], right[None], previous, ahead, solver=solver, num_steps=num_steps, lr=lr)
    return lefts[0], rights[0]


def rank_one_steps(
    target: Tensor,
    left: Tensor,
    right: Tensor,
    previous: tuple[Tensor, Tensor],
    ahead: Tensor,
    *,
    solver: str = "power",
    num_steps: int = 1,
    lr: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """``rank_one_step`` for many pairs at once, each with its own selection of previous pairs.

    Parameters
    ----------
    target, solver, num_steps, lr
        As in ``rank_one_step``.
    left, right : Tensor
        (k, m) and (k, p), one pair per row.
    previous : tuple of Tensor
        (j, m) and (j, p).
    ahead : Tensor
        (k, j), 1 where previous pair j is in front of pair k, else 0.

    Returns
    -------
    tuple of Tensor
        The new pairs, (k, m) and (k, p).
    """
    check_choice(solver, SOLVERS, name="solver")
    if solver == "svd":
        return _svd_steps(target, previous, ahead)
    for _ in range(num_steps):
        if solver == "power":
            left, right = _power_step(target, left, right, previous, ahead)
        else:
            left, right = _gradient_step(target, left, right, previous, ahead, lr=lr)
    return left, right


def _times_right(target: Tensor, right: Tensor, previous: tuple[Tensor, Tensor], ahead: Tensor) -> Tensor:
    """``F_k z_k`` for every row: (k, p) -> (k, m)."""
    overlaps = ahead * (right @ previous[1].T)  # (k, j)
    return right @ target.T - overlaps @ previous[0]  # (k, m)


def _times_left(target: Tensor, left: Tensor, previous: tuple[Tensor, Tensor], ahead: Tensor) -> Tensor:
    """``F_k^T b_k`` for every row: (k, m) -> (k, p)."""
    overlaps = ahead * (left @ previous[0].T)  # (k, j)
    return left @ target - overlaps @ previous[1]  # (k, p)


def _squared_norm(vectors: Tensor) -> Tensor:
    return vectors.square().sum(dim=1, keepdim=True)  # (k, 1)


def _power_step(target: Tensor, left: Tensor, right: Tensor, previous: tuple[Tensor, Tensor], ahead: Tensor) -> tuple[Tensor, Tensor]:
    tiny = torch.finfo(target.dtype).tiny  # a target of zeros then gives a pair of zeros, its best approximation, and not NaN
    left = _times_right(target, right, previous, ahead) / _squared_norm(right).clamp_min(tiny)  # (k, m)
    right = _times_left(target, left, previous, ahead) / _squared_norm(left).clamp_min(tiny)  # (k, p)
    return left, right


def _gradient_step(
    target: Tensor, left: Tensor, right: Tensor, previous: tuple[Tensor, Tensor], ahead: Tensor, *, lr: float
) -> tuple[Tensor, Tensor]:
    left_gradient = left * _squared_norm(right) - _times_right(target, right, previous, ahead)  # (b z^T - F_k) z: (k, m)
    right_gradient = right * _squared_norm(left) - _times_left(target, left, previous, ahead)  # (b z^T - F_k)^T b: (k, p)
    return left - lr * left_gradient, right - lr * right_gradient


def _svd_steps(target: Tensor, previous: tuple[Tensor, Tensor], ahead: Tensor) -> tuple[Tensor, Tensor]:
    deflated = target - torch.einsum("kj,jm,jp->kmp", ahead, *previous)  # (k, m, p)
    left, sizes, right = torch.linalg.svd(deflated, full_matrices=False)  # (k, m, q), (k, q), (k, q, p)
    return left[:, :, 0], sizes[:, :1] * right[:, 0]  # (k, m), (k, p)
