"""Turning a product of two thin factors without forming it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def singular_factors(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition of ``up @ down``.

    Parameters
    ----------
    up : Tensor, (out, rank)
    down : Tensor, (rank, in)

    Returns
    -------
    left : Tensor, (out, rank), orthonormal columns
    values : Tensor, (rank,), descending
    right : Tensor, (rank, in), orthonormal rows. The largest entry of each row is positive, so that signs do not depend on the library.
        Components beyond ``min(out, in)`` are zero in all three.
    """
    left_basis, left_rest = torch.linalg.qr(up)  # (out, m), (m, rank) with m = min(out, rank)
    right_basis, right_rest = torch.linalg.qr(down.T)  # (in, n), (n, rank) with n = min(in, rank)
    u, values, vh = torch.linalg.svd(left_rest @ right_rest.T, full_matrices=False)  # (m, k), (k,), (k, n) with k = min(m, n)
    num_missing = up.shape[1] - len(values)
    left = functional.pad(left_basis @ u, (0, num_missing))  # (out, rank)
    right = functional.pad(vh @ right_basis.T, (0, 0, 0, num_missing))  # (rank, in)
    values = functional.pad(values, (0, num_missing))  # (rank,)
    peak = right.abs().argmax(dim=1, keepdim=True)  # (rank, 1)
    signs = right.gather(1, peak).sign().squeeze(1)  # (rank,)
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return left * signs, values, right * signs[:, None]
