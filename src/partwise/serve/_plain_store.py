"""Keys and values of one layer in the model's own dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from partwise.serve._slots import Slots

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["PlainStore"]


class PlainStore:
    """Keys and values as they come.

    Parameters
    ----------
    limit : int
        Slots that memory is held for: the budget and one more, for the token that is being attended to.
    """

    def __init__(self, limit: int) -> None:
        self.keys, self.values = Slots(limit), Slots(limit)

    @staticmethod
    def bound(*, limit: int, batch_size: int, num_heads: int, dim: int, value_dim: int, itemsize: int) -> int:
        """Bytes that a store takes at most between two calls of the model."""
        return batch_size * num_heads * limit * (dim + value_dim) * itemsize

    @property
    def num_slots(self) -> int:
        """Slots in use."""
        return self.keys.num_slots

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens: (batch, kv_heads, new, dim) each."""
        self.keys.append(keys)
        self.values.append(values)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, (batch, kv_heads, slots, dim) each."""
        return self.keys.values, self.values.values

    def read_keys(self) -> Tensor:
        """Keys of all slots, (batch, kv_heads, slots, dim)."""
        return self.keys.values

    def keep(self, kept: Tensor) -> None:
        """Keep these slots, (batch, kv_heads, kept), in this order."""
        self.keys.keep(kept)
        self.values.keep(kept)

    def swap_out(self, slot: Tensor) -> None:
        """The last slot takes the place of another one of each head, (batch, kv_heads, 1)."""
        self.keys.swap_out(slot)
        self.values.swap_out(slot)

    def settle(self) -> None:
        """Nothing waits to be packed."""

    def select_rows(self, rows: Tensor) -> None:
        """Rows of the batch, in this order."""
        self.keys.select_rows(rows)
        self.values.select_rows(rows)

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self.keys.to(device)
        self.values.to(device)
