"""H2O: the tokens that have gathered the most attention, and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from partwise.serve.rule import EvictionRule

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.serve.rule import Cached, Limits, Observation

__all__ = ["H2O"]


@dataclass(frozen=True, kw_only=True)
class H2O(EvictionRule):
    """Drop the token that has gathered the least attention since it came ("heavy hitter oracle"); half of the budget is for the last tokens.

    Query heads that share a key head add their attention. Every query is looked at, so a long prompt costs more than with a window.

    Parameters
    ----------
    recent : int or float, default=0.5
        The last tokens never leave: their number, or their share of the budget.
    num_sinks : int, default=0
        So many first tokens never leave.
    drop : int or float, default=1
        Tokens that leave at an eviction: their number, or their share of the budget.

    References
    ----------
    Zhang et al. H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models. arXiv:2306.14048.
    """

    recent: int | float = 0.5
    drop: int | float = 1
    num_channels: ClassVar[int] = 1  # attention gathered

    @property
    def horizon(self) -> None:
        """All queries."""
        return

    def observe(self, record: Tensor, seen: Observation, limits: Limits) -> Tensor:
        """Add up what each token gets."""
        return record + seen.total()[..., None]

    def badness(self, cached: Cached, limits: Limits) -> Tensor:
        """The less attention the worse."""
        return -cached.record[..., 0]
