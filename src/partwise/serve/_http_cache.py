"""Caches for the server: how one is made, and how many bytes it may hold at any moment, known before it exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partwise.serve._layer import BudgetedLayer
from partwise.serve.cache import BudgetedCache

if TYPE_CHECKING:
    from partwise.serve.rule import EvictionRule

__all__ = ["CacheMaker"]


@dataclass(frozen=True, kw_only=True)
class CacheMaker:
    """Makes the cache of a conversation.

    Parameters
    ----------
    model : PreTrainedModel
        The model that is served.
    rule : EvictionRule
        Which tokens leave.
    budget : int
        Tokens per layer and head.
    pinned : int
        First tokens that never leave.
    bits : 4, 8 or None
        Bits per stored number.
    """

    model: Any
    rule: EvictionRule
    budget: int
    pinned: int = 0
    bits: Any = None

    def new(self) -> BudgetedCache:
        """An empty cache."""
        return BudgetedCache(self.model, self.rule, budget=self.budget, pinned=self.pinned, bits=self.bits)

    def bound(self, cache: BudgetedCache, *, num_prompt: int, num_new: int) -> int:
        """Bytes that a cache never exceeds while a request is answered, inside calls of the model too.

        A layer sees the whole prompt before it lets tokens go, and is done before the next one begins: one layer of unpacked tokens comes on top of what all
        hold between calls. A layer with a window of its own is counted with all tokens, since transformers keeps their memory until the next one comes.
        """
        per_token = [shape.numbers_per_token * self.model.dtype.itemsize for shape in cache.shapes]  # of each layer
        notes = max(cache.note_bytes(1, 1, shape.kv_heads) for shape in cache.shapes)
        one_layer = (num_prompt + self.budget + 1) * (max(per_token) + notes)
        own_window = sum(number for number, layer in zip(per_token, cache.layers, strict=True) if not isinstance(layer, BudgetedLayer))
        return cache.max_bytes() + int(one_layer + own_window * (num_prompt + num_new))
