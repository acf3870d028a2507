"""Scissorhands: tokens that recent queries keep ignoring leave the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from partwise.checks import check_at_least
from partwise.serve.rule import EvictionRule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from partwise.serve.rule import Cached, Limits, Observation

__all__ = ["Scissorhands"]


@dataclass(frozen=True, kw_only=True)
class Scissorhands(EvictionRule):
    """Drop the tokens that got less than average attention most often in the last steps.

    Attention comes back to the same tokens: one that was above the average (one over the number of tokens seen) will be again. So every step that leaves
    a token below it is counted, over a window of recent steps, and at an eviction the highest counts leave. A single huge weight protects nobody for ever,
    and a token that is new cannot have a large count.

    Unlike the paper: few tokens leave at a time (the paper: half of the budget, ``drop=0.5``), because a cache that is always nearly full forgets less; only
    the last queries of a prompt are looked at, so that reading stays quick; query heads that share a key head add their counts; with a window longer than
    the steps between two evictions the counts are kept in two halves, so that they span between half the window and all of it.

    Parameters
    ----------
    window : int, default=400
        Steps that are looked back on (w in the paper).
    recent : int or float, default=10
        The last tokens never leave (r in the paper): their number, or their share of the budget.
    prompt_window : int, default=128
        Last queries of a block, such as a prompt, that are looked at, where the window reaches as far back.
    drop : int or float, default=0.03
        Tokens that leave at an eviction (m in the paper): their number, or their share of the budget.
    num_sinks : int, default=0
        So many first tokens never leave.

    References
    ----------
    Liu, Desai, Liao, Wang, Xie, Xu, Kyrillidis, Shrivastava. Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache
    Compression at Test Time. arXiv:2305.17118.
    """

    window: int = 400
    prompt_window: int = 128
    drop: int | float = 0.03
    num_channels: ClassVar[int] = 2  # the present half of the window, the one before

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self.window, 1, name="window")
        check_at_least(self.prompt_window, 1, name="prompt_window")

    @property
    def record_dtype(self) -> torch.dtype:
        """A step may count once for each head of a group, of which there are up to 64."""
        import torch

        return torch.int16 if self.window < 512 else torch.int32

    @property
    def horizon(self) -> int:
        """Steps before an eviction that count."""
        return self.window

    @property
    def most_queries(self) -> int:
        """Queries of a block that are looked at."""
        return self.prompt_window

    def forgets(self, limits: Limits) -> bool:
        """A window that ends before the last eviction never looks beyond it."""
        return limits.drop >= self.window

    def observe(self, record: Tensor, seen: Observation, limits: Limits) -> Tensor:
        """Count the steps that left a token below the average."""
        if self.forgets(limits):
            record[..., 0] += self._times(seen, seen.counted[:, None])[:, :, 0]
            return record
        half = (self.window + 1) // 2
        part = (seen.step - 1).div(half, rounding_mode="floor")  # (batch, queries)
        newest = part.amax(dim=1)  # (batch,)
        passed = (newest - (seen.previous_step - 1).div(half, rounding_mode="floor"))[:, None, None]
        now, before = record.unbind(dim=-1)
        before.copy_(before.where(passed == 0, now.where(passed == 1, 0)))
        now.masked_fill_(passed > 0, 0)
        age = (newest[:, None] - part)[:, None] == part.new_tensor([[0], [1]])  # (batch, 2, queries)
        record += self._times(seen, age * seen.counted[:, None]).transpose(2, 3)
        return record

    def _times(self, seen: Observation, factors: Tensor) -> Tensor:
        return seen.times_below_average(factors).to(self.record_dtype)

    def badness(self, cached: Cached, limits: Limits) -> Tensor:
        """How often a token was ignored."""
        return cached.record.float().sum(dim=-1)
