"""What a method of this room says: which cached tokens leave when the budget is spent, and what it has to see for that."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from partwise.checks import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Cached", "EvictionRule", "Limits", "Observation"]

TIES = 1e-5  # a weight this close below the average counts as average: uniform attention is not exactly uniform in float32


@dataclass(frozen=True)
class Observation:
    """Attention of some queries over the slots of one layer, as rules see it.

    Parameters
    ----------
    weights : Tensor of shape (batch, kv_heads, group, queries, slots), float32
        Attention, zero where a query does not see a slot; group: query heads that share a key head. The last query belongs to the last slot, the one before
        it to the slot before. A rule may write over them.
    num_visible : Tensor of shape (batch, queries), float32
        Number of tokens that a query sees, itself included.
    counted : Tensor of shape (batch, queries), float32
        1 for queries that count, 0 for padding and for queries further from the next eviction than the rule's horizon.
    step : Tensor of shape (batch, queries), int64
        Tokens of the row that have passed, the query's own included.
    previous_step : Tensor of shape (batch,), int64
        The same for the last query that was observed before, 0 at the start.
    """

    weights: Tensor
    num_visible: Tensor
    counted: Tensor
    step: Tensor
    previous_step: Tensor

    def total(self) -> Tensor:
        """Attention that each slot gets from counted queries and all heads of a group, (batch, kv_heads, slots)."""
        return self._weighted(self.weights, self.counted[:, None])[:, :, 0]

    def above_average(self) -> Tensor:
        """Which slots got more than one over the number of visible tokens, (batch, kv_heads, group, queries, slots), bool."""
        return self.weights > self._average(1.0 + TIES)

    def times_below_average(self, factors: Tensor) -> Tensor:
        """How often visible slots got less than one over the number of visible tokens. Writes over the weights: memory is what scoring takes time for.

        Parameters
        ----------
        factors : Tensor of shape (batch, kinds, queries)
            What a query counts for, in each of some kinds of counts.

        Returns
        -------
        Tensor of shape (batch, kv_heads, kinds, slots)
            Sums over queries and the heads of a group. Empty slots have no true value.
        """
        group, queries = self.weights.shape[2:4]
        low = self.weights.lt_(self._average(1.0 - TIES))
        times = self._weighted(low, factors)
        times[..., -queries:] -= group * (factors.cumsum(dim=-1) - factors)[:, None]  # queries that came before a slot did not see it
        return times

    def _average(self, factor: float) -> Tensor:
        return factor / self.num_visible.clamp(min=1)[:, None, None, :, None]

    def _weighted(self, values: Tensor, factors: Tensor) -> Tensor:
        """Sums over queries and heads of a group, with factors (batch, kinds, queries): to (batch, kv_heads, kinds, slots)."""
        return factors.repeat(1, 1, values.shape[2])[:, None] @ values.flatten(2, 3)


@dataclass(frozen=True)
class Cached:
    """What is known of the slots of one layer at an eviction.

    Parameters
    ----------
    record : Tensor of shape (batch, kv_heads, slots, channels)
        What the rule noted, in its own channels.
    positions : Tensor of shape (batch, kv_heads, slots), int32
        Number of the token in its row, padding not counted; -1 where a slot is empty.
    """

    record: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Limits:
    """A rule's shares as numbers of tokens, for one budget."""

    budget: int
    recent: int
    drop: int


@dataclass(frozen=True, kw_only=True)
class EvictionRule(abc.ABC):
    """Which tokens leave a full cache. Every layer and key head decides for itself, but all drop as many.

    A rule notes what it wants about every cached token (`initial`, `observe`) and says at an eviction how dispensable each one is (`badness`).

    Parameters
    ----------
    recent : int or float, default=10
        The last tokens never leave: their number, or their share of the budget.
    num_sinks : int, default=0
        So many first tokens never leave.
    drop : int or float, default=0.5
        Tokens that leave when the budget is exceeded: their number, or their share of the budget.
    """

    recent: int | float = 10
    num_sinks: int = 0
    drop: int | float = 0.5

    num_channels: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_share("recent", self.recent, lowest=0)
        _check_share("drop", self.drop, lowest=1)
        if not isinstance(self.num_sinks, int) or isinstance(self.num_sinks, bool) or self.num_sinks < 0:
            raise InputError("bad-cache-setting", f"got num_sinks={self.num_sinks}, expected a number of tokens, 0 or more. Pass 0 for none.")

    @property
    def horizon(self) -> int | None:
        """How many queries before an eviction the rule has to see: 0 for none, None for all."""
        return 0

    @property
    def most_queries(self) -> int | None:
        """How many queries of one block, such as a prompt, it looks at, the last ones; None for no limit."""
        return None

    @property
    def channels(self) -> int:
        """Numbers that are noted for every slot."""
        return self.num_channels

    @property
    def record_dtype(self) -> torch.dtype:
        """How they are stored."""
        import torch

        return torch.float32

    def forgets(self, limits: Limits) -> bool:
        """Whether the record starts afresh after an eviction."""
        return False

    def initial(self, keys: Tensor, positions: Tensor) -> Tensor:
        """The record of new tokens: keys (batch, kv_heads, new, dim), positions (batch, kv_heads, new) to (batch, kv_heads, new, channels)."""
        return keys.new_zeros((*positions.shape, self.channels), dtype=self.record_dtype)

    def observe(self, record: Tensor, seen: Observation, limits: Limits) -> Tensor:
        """The record (batch, kv_heads, slots, channels) after these queries; may change it in place."""
        return record

    @abc.abstractmethod
    def badness(self, cached: Cached, limits: Limits) -> Tensor:
        """How dispensable each token is, (batch, kv_heads, slots), float32; the largest leave, the older of equals first."""

    def limits(self, budget: int) -> Limits:
        """Shares as numbers of tokens."""
        return Limits(budget=budget, recent=_count(self.recent, budget), drop=max(1, _count(self.drop, budget)))


def _count(value: float, budget: int) -> int:
    return value if isinstance(value, int) else round(value * budget)


def _check_share(name: str, value: float, *, lowest: int) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= lowest
    if not is_count and not (isinstance(value, float) and math.isfinite(value) and 0.0 < value < 1.0):
        raise InputError(
            "bad-cache-setting",
            f"got {name}={value!r}, expected a number of tokens from {lowest} on, or a share of the budget between 0 and 1. Try {name}={max(lowest, 10)}.",
        )
