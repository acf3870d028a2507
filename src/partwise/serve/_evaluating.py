"""A model while it is only asked: in evaluation mode and without gradients, afterwards as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["evaluating"]


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No dropout and no gradients inside the block; then every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
