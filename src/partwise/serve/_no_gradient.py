"""A backward pass through a cache is refused: tokens that left it would be missing from the gradient in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from partwise.checks import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NoWayBack"]


class NoWayBack(torch.autograd.Function):
    """Cached keys and values, through which no gradient flows."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        return keys.clone(), values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise InputError(
            "cache-no-gradient",
            "got a backward pass through a cache with a budget, expected none: tokens that left it have no gradient. Train without cache=.",
        )
