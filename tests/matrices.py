"""Matrices whose spectrum is known, built from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def matrix_with(singular_values: Sequence[float], *, rows: int, columns: int, seed: int = 0) -> NDArray[np.float64]:
    """A random matrix (rows, columns) with these singular values."""
    rng = np.random.default_rng(seed)
    count = len(singular_values)
    left, _ = np.linalg.qr(rng.standard_normal((rows, count)))  # (rows, count)
    right, _ = np.linalg.qr(rng.standard_normal((columns, count)))  # (columns, count)
    return np.ascontiguousarray(left * np.asarray(singular_values, dtype=float) @ right.T)


def gaussian(*shape: int, seed: int = 0, dtype: Any = np.float64) -> NDArray[Any]:
    """Independent normal entries."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
