"""The one table of tolerances, and the comparison that uses it.

A test that needs another tolerance passes it by name and gives the reason in ``claim``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE: dict[str, dict[str, float]] = {
    "float64": {"rtol": 1e-10, "atol": 1e-12},
    "float32": {"rtol": 1e-5, "atol": 1e-6},
    "bfloat16": {"rtol": 2e-2, "atol": 2e-2},
    "float16": {"rtol": 1e-3, "atol": 1e-3},
}
EXACT: dict[str, float] = {"rtol": 0.0, "atol": 0.0}  # integers and booleans


def assert_close(actual: Tensor | np.ndarray[Any, Any], expected: Tensor | np.ndarray[Any, Any], *, claim: str, **override: float) -> None:
    """Fail with ``claim`` as the first line unless ``actual`` equals ``expected`` within the tolerance of its dtype.

    Both are tensors or both are arrays. Dtype, device and shape must agree too. ``override`` may hold ``rtol`` and ``atol``; 0 asks for the same bits.
    """
    tolerance = TOLERANCE.get(str(actual.dtype).removeprefix("torch."), EXACT) | override
    if not isinstance(actual, Tensor):
        actual, expected = np.asarray(actual), np.asarray(expected)  # a sum over an array is a scalar of numpy, which torch does not know
    torch.testing.assert_close(actual, expected, **tolerance, msg=lambda detail: f"{claim}\n{detail}")
