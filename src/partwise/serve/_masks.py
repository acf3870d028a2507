"""What a model's mask says about new tokens, and the mask of slots that takes its place once tokens have left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["mask_of_slots", "real_tokens"]


def real_tokens(mask: Any, new: int) -> Tensor | None:
    """Which of the new tokens are no padding, (batch, new), bool; None: all. A query sees itself, so the diagonal says it."""
    if mask is None:
        return None
    own = mask[:, -new:] if mask.ndim == 2 else mask[:, 0, :, -new:].diagonal(dim1=1, dim2=2)
    real: Tensor = own > torch.finfo(own.dtype).min / 2 if own.dtype.is_floating_point else own.bool()
    return None if bool(real.all()) else real


def mask_of_slots(real: Tensor | None, query: Tensor, *, slots: int, additive: bool) -> Tensor:
    """What new tokens see: every slot that holds a token, and of each other the earlier ones.

    Parameters
    ----------
    real : Tensor of shape (batch, slots), bool, or None
        Slots that hold tokens; None: all.
    query : Tensor of shape (batch, heads, new, dim)
        Queries of the new tokens, which have the last slots.
    slots : int
        Slots in all.
    additive : bool
        As numbers to be added to logits, instead of booleans.

    Returns
    -------
    Tensor of shape (batch, 1, new, slots)
        For all heads. A token of padding sees itself, so that no row is empty.
    """
    batch, new = query.shape[0], query.shape[2]
    column, row = torch.arange(slots, device=query.device), torch.arange(slots - new, slots, device=query.device)
    visible = (column <= row[:, None])[None]  # (1, new, slots)
    if real is not None:
        visible = (visible & real[:, None]) | (column == row[:, None])
    visible = visible[:, None].expand(batch, 1, new, slots)
    if additive:
        return torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)
    return visible
