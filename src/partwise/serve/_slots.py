"""A tensor with an axis of slots that grows up to a limit and stays there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Slots"]

FIRST = 64  # slots that are allocated at least


class Slots:
    """Values of cached tokens, in the order in which they came: (batch, heads, slots, ...).

    Memory for at most ``limit`` slots is held between two calls of the model. A longer block is kept as it came until `keep` has chosen from it.
    Tensors are written in place, so nothing is copied when a token is added.

    Parameters
    ----------
    limit : int
        Slots that memory is held for.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.num_slots = limit, 0
        self._buffer: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """What is there, (batch, heads, slots, ...); a view."""
        assert self._buffer is not None
        return self._buffer[:, :, : self.num_slots]

    @property
    def nbytes(self) -> int:
        """Bytes held, free slots included."""
        return 0 if self._buffer is None else self._buffer.untyped_storage().nbytes()

    def append(self, new: Tensor) -> None:
        """Add slots at the end."""
        new, needed = new.detach(), self.num_slots + new.shape[2]
        if self._buffer is None and needed > self.limit:
            self._buffer, self.num_slots = new, needed
            return
        capacity = 0 if self._buffer is None else self._buffer.shape[2]
        if needed > capacity:
            grown = max(needed, min(self.limit, capacity + capacity // 4 + FIRST))
            larger = _empty(new, grown)
            if self._buffer is not None:
                larger[:, :, : self.num_slots] = self.values
            self._buffer = larger
        assert self._buffer is not None
        self._buffer[:, :, self.num_slots : needed] = new
        self.num_slots = needed

    def keep(self, kept: Tensor) -> None:
        """Keep the slots of these numbers, (batch, heads, kept), in this order; memory of the others is freed."""
        index = kept.reshape(*kept.shape, *(1 for _ in range(self.values.ndim - 3))).expand(*kept.shape, *self.values.shape[3:])
        chosen = self.values.gather(2, index)
        assert self._buffer is not None
        if self._buffer.shape[2] > self.limit or self._buffer.requires_grad or self._buffer.is_inference():
            self._buffer = _empty(chosen, self.limit)
        self.num_slots = kept.shape[2]
        self._buffer[:, :, : self.num_slots] = chosen

    def swap_out(self, slot: Tensor) -> None:
        """The last slot takes the place of another one of each head, (batch, heads, 1): one token is moved, not all."""
        values = self.values
        index = slot.reshape(*slot.shape, *(1 for _ in range(values.ndim - 3))).expand(*slot.shape, *values.shape[3:])
        values.scatter_(2, index, values[:, :, -1:].clone())
        self.num_slots -= 1

    def replace(self, values: Tensor) -> None:
        """Write other values into all slots."""
        self.values.copy_(values)

    def select_rows(self, rows: Tensor) -> None:
        """Rows of the batch, in this order; a row may occur several times or not at all."""
        if self._buffer is not None:
            with torch.inference_mode(False):
                self._buffer = self._buffer.index_select(0, rows.to(self._buffer.device))

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        if self._buffer is not None:
            self._buffer = self._buffer.to(device)


def _empty(like: Tensor, num_slots: int) -> Tensor:
    """Memory for so many slots, writable in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.empty(*like.shape[:2], num_slots, *like.shape[3:], dtype=like.dtype, device=like.device)
