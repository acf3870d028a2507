"""Matrices whose spectrum is known, built from a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def matrix_with(singular_values: Sequence[float], *, rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random matrix (rows, columns) with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    count = len(singular_values)
    left, _ = torch.linalg.qr(torch.randn(rows, count, dtype=torch.float64, generator=generator))  # (rows, count)
    right, _ = torch.linalg.qr(torch.randn(columns, count, dtype=torch.float64, generator=generator))  # (columns, count)
    return (left * torch.tensor(singular_values, dtype=torch.float64) @ right.T).to(dtype)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Independent normal entries."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
