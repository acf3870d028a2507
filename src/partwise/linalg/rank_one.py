"""Rank-one regression: reduce it to one small matrix, solve it in closed form, or take solver steps on a deflated target.

The problem is ``min 1/2 ||Y - B A X||_F^2`` with inputs ``X`` (d, n), targets ``Y`` (m, n), and ``k`` rank-one maps ``b_k a_k^T`` (columns are
samples, as in the papers). Only the part of ``Y`` inside the row space of ``X`` can be fitted, so everything happens on a matrix
``F`` (m, p), p the rank of ``X``: there a map is the pair ``(b_k, z_k)`` and its target is ``F - sum_{j<k} b_j z_j^T``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from partwise.checks import check_choice
from partwise.linalg.deflation import deflate
from partwise.linalg.products import tiled_product

__all__ = ["SOLVERS", "ExactParts", "ReducedRegression", "exact_parts", "numerical_rank", "rank_one_step", "rank_one_steps", "reduce_regression"]

SOLVERS = ("power", "gd", "svd")
Pair: TypeAlias = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class ReducedRegression:
    """A regression on ``inputs`` (d, n), written in an orthonormal basis of their row space.

    Attributes
    ----------
    target : ndarray
        (m, p), ``F = Y Q``: all of the targets that can be fitted.
    basis : ndarray
        (n, p), ``Q``: orthonormal columns that span the rows of the inputs.
    unreduce : ndarray
        (d, p), turns the rows ``z`` of a fitted pair into weights ``a = unreduce @ z`` on the inputs, with ``a^T X = z^T Q^T``.
    """

    target: NDArray[Any]
    basis: NDArray[Any]
    unreduce: NDArray[Any]

    @property
    def rank(self) -> int:
        """Numerical rank of the inputs (p)."""
        return int(self.basis.shape[1])


def numerical_rank(singular_values: NDArray[Any], shape: Sequence[int], *, scale: float | None = None) -> int:
    """Number of singular values above ``eps * max(shape) * scale``, the usual line below which they are rounding.

    ``scale`` is the size of the numbers that the matrix was computed from; by default that is the largest singular value.
    """
    if not len(singular_values):
        return 0
    line = np.finfo(singular_values.dtype).eps * max(shape) * (float(singular_values[0]) if scale is None else scale)
    return int((singular_values > line).sum())


def reduce_regression(inputs: NDArray[Any], targets: NDArray[Any]) -> ReducedRegression:
    """Thin QR of ``X^T``, then the pseudo-inverse of its small factor.

    For ``X`` of full rank this is ``X^T = Q R``, ``F = Y Q``, ``a = R^-1 z``, up to a rotation of ``Q`` that no fitted map can see. When ``X`` is
    rank-deficient, directions that are rounding are left out, which gives the maps of least norm; ``rank`` says how many stayed.

    Parameters
    ----------
    inputs : ndarray
        (d, n), columns are samples.
    targets : ndarray
        (m, n).
    """
    basis, factor = np.linalg.qr(inputs.T)  # (n, q), (q, d) with q = min(n, d)
    left, sizes, right = np.linalg.svd(factor, full_matrices=False)  # (q, q), (q,), (q, d)
    rank = numerical_rank(sizes, inputs.shape)
    basis = basis @ left[:, :rank]  # (n, p)
    return ReducedRegression(target=targets @ basis, basis=basis, unreduce=right[:rank].T / sizes[:rank])


@dataclass(frozen=True, eq=False)
class ExactParts:
    """The exact rank-one parts of a matrix (m, p), largest first.

    Attributes
    ----------
    left, right : ndarray
        (k, m) and (k, p), unit rows ``u_k`` and ``v_k``.
    singular_values : ndarray
        (min(m, p),), all of them, not only the first k.
    """

    left: NDArray[Any]
    right: NDArray[Any]
    singular_values: NDArray[Any]

    @property
    def scaled_right(self) -> NDArray[Any]:
        """(k, p), rows ``sigma_k v_k``, so that ``left.T @ scaled_right`` is the best approximation of rank k."""
        scaled: NDArray[Any] = self.singular_values[: len(self.right), None] * self.right
        return scaled


def exact_parts(target: NDArray[Any], *, num_components: int) -> ExactParts:
    """What exact sequential deflation of ``target`` (m, p) returns, by one singular value decomposition."""
    left, sizes, right = np.linalg.svd(target, full_matrices=False)  # (m, q), (q,), (q, p)
    return ExactParts(np.ascontiguousarray(left.T[:num_components]), right[:num_components], sizes)


def rank_one_step(
    target: NDArray[Any], left: NDArray[Any], right: NDArray[Any], previous: Pair, *, solver: str = "power", num_steps: int = 1, lr: float = 0.25
) -> Pair:
    """Move one pair towards the best rank-one approximation of what ``previous`` pairs leave of ``target``.

    The deflated target is never formed (except by ``svd``): its products with a vector are those of ``target`` minus a few inner products.

    Parameters
    ----------
    target : ndarray
        (m, p), ``F``.
    left, right : ndarray
        (m,) and (p,), the pair ``(b, z)`` to start from.
    previous : tuple of ndarray
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
    tuple of ndarray
        The new pair, (m,) and (p,).

    References
    ----------
    AdaPaD. arXiv:2605.10741.

    Examples
    --------
    >>> nothing = np.zeros((0, 3)), np.zeros((0, 2))
    >>> left, right = rank_one_step(np.outer([1.0, 2.0, 2.0], [3.0, 4.0]), np.ones(3), np.ones(2), nothing)
    >>> np.outer(left, right).round(12).tolist()  # a matrix of rank one is found in one step
    [[3.0, 4.0], [6.0, 8.0], [6.0, 8.0]]
    """
    lefts, rights = rank_one_steps(target, left[None], right[None], [previous], solver=solver, num_steps=num_steps, lr=lr)
    return lefts[0], rights[0]


def rank_one_steps(
    target: NDArray[Any],
    left: NDArray[Any],
    right: NDArray[Any],
    previous: Sequence[Pair],
    *,
    solver: str = "power",
    num_steps: int = 1,
    lr: float = 0.25,
) -> Pair:
    """``rank_one_step`` for many pairs at once, each with its own pairs in front of it.

    Products with ``target`` are made for all pairs together, everything else pair by pair. Inside ``one_blas_thread`` the result of a pair therefore
    has the bits it would have alone.

    Parameters
    ----------
    target, solver, num_steps, lr
        As in ``rank_one_step``.
    left, right : ndarray
        (k, m) and (k, p), one pair per row.
    previous : sequence of tuple of ndarray
        For each of the k pairs the pairs in front of it, (j, m) and (j, p).

    Returns
    -------
    tuple of ndarray
        The new pairs, (k, m) and (k, p).
    """
    check_choice(solver, SOLVERS, name="solver")
    if solver == "svd":
        return _exact_steps(target, previous)
    step = _power_step if solver == "power" else functools.partial(_gradient_step, lr=lr)
    for _ in range(num_steps):
        left, right = step(target, left, right, previous)
    return left, right


def _times_right(target: NDArray[Any], right: NDArray[Any], previous: Sequence[Pair]) -> NDArray[Any]:
    """``F_k z_k`` for every row: (k, p) -> (k, m)."""
    products = tiled_product(right, target.T)  # (k, m)
    for product, own, (lefts, rights) in zip(products, right, previous, strict=True):
        product -= (rights @ own) @ lefts  # (m,)
    return products


def _times_left(target: NDArray[Any], left: NDArray[Any], previous: Sequence[Pair]) -> NDArray[Any]:
    """``F_k^T b_k`` for every row: (k, m) -> (k, p)."""
    return _times_right(target.T, left, [(rights, lefts) for lefts, rights in previous])


def _squared_norms(vectors: NDArray[Any]) -> NDArray[Any]:
    return np.array([vector @ vector for vector in vectors], dtype=vectors.dtype)[:, None]  # (k, 1)


def _power_step(target: NDArray[Any], left: NDArray[Any], right: NDArray[Any], previous: Sequence[Pair]) -> Pair:
    tiny = np.finfo(target.dtype).tiny  # a target of zeros then gives a pair of zeros, its best approximation, and not NaN
    left = _times_right(target, right, previous) / np.maximum(_squared_norms(right), tiny)  # (k, m)
    right = _times_left(target, left, previous) / np.maximum(_squared_norms(left), tiny)  # (k, p)
    return left, right


def _gradient_step(target: NDArray[Any], left: NDArray[Any], right: NDArray[Any], previous: Sequence[Pair], *, lr: float) -> Pair:
    left_gradient = left * _squared_norms(right) - _times_right(target, right, previous)  # (b z^T - F_k) z: (k, m)
    right_gradient = right * _squared_norms(left) - _times_left(target, left, previous)  # (b z^T - F_k)^T b: (k, p)
    return left - lr * left_gradient, right - lr * right_gradient


def _exact_steps(target: NDArray[Any], previous: Sequence[Pair]) -> Pair:
    exact = [exact_parts(deflate(target, *ahead), num_components=1) for ahead in previous]
    return np.concatenate([parts.left for parts in exact]), np.concatenate([parts.scaled_right for parts in exact])  # (k, m), (k, p)
