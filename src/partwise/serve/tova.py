"""TOVA: the tokens that the last query looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from partwise.serve.rule import EvictionRule

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.serve.rule import Cached, Limits, Observation

__all__ = ["TOVA"]


@dataclass(frozen=True, kw_only=True)
class TOVA(EvictionRule):
    """Drop the token that the last query looks at least ("token omission via attention"), by the mean over all heads of a layer.

    Parameters
    ----------
    recent : int or float, default=1
        The last tokens never leave: their number, or their share of the budget.
    num_sinks : int, default=0
        So many first tokens never leave.
    drop : int or float, default=1
        Tokens that leave at an eviction: their number, or their share of the budget.

    References
    ----------
    Oren, Hassid, Yarden, Adi, Schwartz. Transformers are Multi-State RNNs. arXiv:2401.06104.
    """

    recent: int | float = 1
    drop: int | float = 1
    num_channels: ClassVar[int] = 1  # attention of the last query

    @property
    def horizon(self) -> int:
        """The query that exceeds the budget."""
        return 1

    def observe(self, record: Tensor, seen: Observation, limits: Limits) -> Tensor:
        """What the last query looks at, the same for all heads; rows whose turn it is not keep what they have."""
        attention = seen.total().mean(dim=1, keepdim=True)  # (batch, 1, slots)
        asked = (seen.counted.sum(dim=1) > 0)[:, None, None]
        return attention.where(asked, record[..., 0])[..., None]

    def badness(self, cached: Cached, limits: Limits) -> Tensor:
        """The less attention the worse."""
        return -cached.record[..., 0]
