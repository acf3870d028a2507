"""Key norm: tokens whose keys are long leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from partwise.serve.rule import EvictionRule

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.serve.rule import Cached, Limits

__all__ = ["KeyNorm"]


@dataclass(frozen=True, kw_only=True)
class KeyNorm(EvictionRule):
    """Drop the tokens with the longest keys: in many models a short key goes with much attention. No attention is looked at.

    Parameters
    ----------
    recent : int or float, default=10
        The last tokens never leave: their number, or their share of the budget.
    num_sinks : int, default=0
        So many first tokens never leave.
    drop : int or float, default=1
        Tokens that leave at an eviction: their number, or their share of the budget.

    References
    ----------
    Devoto, Zhao, Scardapane, Minervini. A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression. arXiv:2406.11430.
    """

    drop: int | float = 1
    num_channels: ClassVar[int] = 1  # length of the key

    def initial(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Lengths of the keys."""
        return keys.float().square().sum(dim=-1, keepdim=True).sqrt()

    def badness(self, cached: Cached, limits: Limits) -> Tensor:
        """The longer the worse."""
        return cached.record[..., 0]
