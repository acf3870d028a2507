"""What queries look at in one layer, computed a few queries at a time: no matrix of all queries and all tokens ever exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attention", "chunks", "visible_tokens"]

WORKSPACE = 2**20  # numbers that fit into a processor's cache
MOST = 64  # queries of a block that are scored at once


def chunks(start: int, end: int, *, row: int) -> Iterator[tuple[int, int]]:
    """Parts of a block of queries that are scored at once, for ``row`` weights per query."""
    size = max(1, min(MOST, WORKSPACE // row))
    for first in range(start, end, size):
        yield first, min(first + size, end)


def attention(query: Tensor, keys: Tensor, real: Tensor | None, *, scaling: float, softcap: float | None) -> Tensor:
    """Attention of the queries that belong to the last slots.

    Parameters
    ----------
    query : Tensor of shape (batch, heads, queries, dim)
        As the model rotated it.
    keys : Tensor of shape (batch, kv_heads, slots, dim), float32
        Keys of all slots up to that of the last query.
    real : Tensor of shape (batch, slots), bool, or None
        Slots that hold tokens; None: all.
    scaling, softcap
        As the model's attention has them.

    Returns
    -------
    Tensor of shape (batch, kv_heads, group, queries, slots), float32
        Zero where a query does not see a slot. A query of padding sees itself.
    """
    (batch, heads, new, dim), (kv_heads, slots) = query.shape, keys.shape[1:3]
    grouped = (query.to(torch.float32) * scaling).reshape(batch, kv_heads, heads // kv_heads * new, dim)
    logits = grouped @ keys.transpose(-1, -2)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits = logits.view(batch, kv_heads, heads // kv_heads, new, slots)
    if new > 1:
        later = torch.ones(new, new, dtype=torch.bool, device=logits.device).triu_(1)
        logits[..., slots - new :].masked_fill_(later, -torch.inf)
    if real is not None:
        own = torch.arange(slots - new, slots, device=real.device)[:, None]
        hidden = ~real[:, None] & (torch.arange(slots, device=real.device) != own)  # (batch, queries, slots)
        logits.masked_fill_(hidden[:, None, None], -torch.inf)
    return logits.softmax(dim=-1)


def visible_tokens(real: Tensor | None, *, batch: int, new: int, slots: int, device: torch.device) -> Tensor:
    """How many tokens each query that belongs to one of the last slots sees, (batch, queries), int64."""
    if real is None:
        return torch.arange(slots - new + 1, slots + 1, device=device).expand(batch, new)
    return real[:, :slots].cumsum(dim=1)[:, slots - new :]
