"""Turning a product of two thin factors without forming it."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """
    left_basis, left_rest = torch.linalg.qr(up)  # (out, rank), (rank, rank)
    right_basis, right_rest = torch.linalg.qr(down.T)  # (in, rank), (rank, rank)
    u, values, vh = torch.linalg.svd(left_rest @ right_rest.T)  # all (rank, ...)
    left, right = left_basis @ u, vh @ right_basis.T  # (out, rank), (rank, in)
    peak = right.abs().argmax(dim=1, keepdim=True)  # (rank, 1)
    signs = right.gather(1, peak).sign().squeeze(1)  # (rank,)
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return left * signs, values, right * signs[:, None]
