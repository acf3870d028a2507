"""SnapKV: the tokens, and their neighbours, that the last queries of a prompt look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from partwise.checks import InputError, check_at_least
from partwise.serve.rule import EvictionRule

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.serve.rule import Cached, Limits, Observation

__all__ = ["SnapKV"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(EvictionRule):
    """Drop the tokens that the last queries look at least, smoothed along the text so that neighbours stay together.

    Unlike the paper, which compresses a prompt and then lets the cache grow: here the same choice is made again whenever the budget is exceeded.

    Parameters
    ----------
    window : int, default=64
        Last queries that are looked at before an eviction.
    pool : int, default=5
        Width of the mean over neighbours, odd.
    recent : int or float, default=32
        The last tokens never leave: their number, or their share of the budget.
    num_sinks : int, default=0
        So many first tokens never leave.
    drop : int or float, default=0.25
        Tokens that leave at an eviction: their number, or their share of the budget.

    References
    ----------
    Li et al. SnapKV: LLM Knows What You are Looking for Before Generation. arXiv:2404.14469.
    """

    window: int = 64
    pool: int = 5
    recent: int | float = 32
    drop: int | float = 0.25
    num_channels: ClassVar[int] = 1  # attention of the window

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self.window, 1, name="window")
        if not isinstance(self.pool, int) or self.pool < 1 or self.pool % 2 == 0:
            raise InputError("bad-cache-setting", f"got pool={self.pool}, expected an odd number of neighbours, 1 or more. Pass 5, or 1 for none.")

    @property
    def horizon(self) -> int:
        """Queries of the window."""
        return self.window

    def forgets(self, limits: Limits) -> bool:
        """Every eviction looks at its own window."""
        return True

    def observe(self, record: Tensor, seen: Observation, limits: Limits) -> Tensor:
        """Add up what each token gets from the window."""
        return record + seen.total()[..., None]

    def badness(self, cached: Cached, limits: Limits) -> Tensor:
        """The less attention around it the worse, in the order of the text."""
        order = cached.positions.argsort(dim=-1, stable=True)  # (batch, kv_heads, slots)
        real = (cached.positions.gather(-1, order) >= 0).float()
        got = cached.record[..., 0].gather(-1, order) * real
        mean = self._around(got) / self._around(real).clamp(min=1 / self.pool)
        return mean.new_zeros(mean.shape).scatter_(-1, order, -mean)

    def _around(self, values: Tensor) -> Tensor:
        """Mean over the neighbours of each slot, nothing beyond the ends."""
        from torch.nn import functional

        return functional.avg_pool1d(values, self.pool, stride=1, padding=self.pool // 2)
