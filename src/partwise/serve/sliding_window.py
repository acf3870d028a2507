"""Sliding window: the last tokens stay, all others leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from partwise.serve.rule import EvictionRule

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.serve.rule import Cached, Limits

__all__ = ["SlidingWindow"]


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(EvictionRule):
    """Drop the oldest token: a baseline that looks at nothing.

    Parameters
    ----------
    recent : int or float, default=0
        The last tokens never leave; they would not anyway.
    num_sinks : int, default=0
        So many first tokens never leave; with 4 this is `StreamingLLM`.
    drop : int or float, default=1
        Tokens that leave at an eviction: their number, or their share of the budget.

    References
    ----------
    Beltagy, Peters, Cohan. Longformer: The Long-Document Transformer. arXiv:2004.05150.
    """

    recent: int | float = 0
    drop: int | float = 1

    def badness(self, cached: Cached, limits: Limits) -> Tensor:
        """The older the worse."""
        return -cached.positions.float()
