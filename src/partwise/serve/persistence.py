"""Do important tokens stay important? How much so in each layer says how a total budget is best shared among layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from partwise.checks import InputError, check_at_least
from partwise.serve._decoder import decoder_config, layer_shapes
from partwise.serve._evaluating import evaluating
from partwise.serve.cache import BudgetedCache
from partwise.serve.rule import EvictionRule

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.serve.rule import Cached, Limits, Observation

__all__ = ["Persistence", "allocate_budgets", "persistence_ratio", "share_out"]


@dataclass(frozen=True)
class Persistence:
    """How far the tokens that mattered early are those that matter later.

    A token is pivotal when a query gives it more than average attention (one over the number of tokens it sees). Each tensor has shape (layers, heads), for
    the layers with full attention and all query heads; means over the rows of text.

    Parameters
    ----------
    ratio : Tensor
        Of the early tokens that are pivotal to a later query, the share that had been pivotal to an early one.
    pivotal_share : Tensor
        Share of the early tokens that were pivotal to an early query. Where this is near 1, a ratio near 1 means nothing.
    lift : Tensor
        ``(ratio - pivotal_share) / (1 - pivotal_share)``: 0 where early importance says nothing about later, 1 where it says everything.
    """

    ratio: Tensor
    pivotal_share: Tensor
    lift: Tensor


@dataclass(frozen=True, kw_only=True)
class _PivotalTokens(EvictionRule):
    """Note who was pivotal before and after a place in the text; nobody ever leaves."""

    group: int
    place: int
    recent: int | float = 0
    drop: int | float = 1

    @property
    def record_dtype(self) -> torch.dtype:
        """Yes or no."""
        return torch.bool

    @property
    def channels(self) -> int:
        """Early and late, for each query head of a key head."""
        return 2 * self.group

    @property
    def horizon(self) -> None:
        """All queries."""
        return

    def observe(self, record: Tensor, seen: Observation, limits: Limits) -> Tensor:
        """Note pivotal tokens: (batch, kv_heads, group, queries, slots) to (batch, kv_heads, slots, 2 * group)."""
        pivotal = seen.above_average()
        late = (seen.step > self.place)[:, None, None, :, None]
        found = torch.cat([(pivotal & ~late).any(dim=3), (pivotal & late).any(dim=3)], dim=2).transpose(2, 3)
        return record | found

    def badness(self, cached: Cached, limits: Limits) -> Tensor:
        return cached.positions.to(torch.float32)


def persistence_ratio(model: Any, input_ids: Tensor, *, split: float = 0.5) -> Persistence:
    """Measure how far important tokens stay important.

    Parameters
    ----------
    model : PreTrainedModel
        A model that can have a cache with a budget.
    input_ids : Tensor of shape (rows, tokens), int64
        Texts of the same length, without padding.
    split : float, default=0.5
        Where early ends and late begins, as a share of the tokens.

    Returns
    -------
    Persistence
        Ratio, share and lift of each layer and query head.

    Raises
    ------
    InputError
        When there are too few tokens, ``split`` is not between 0 and 1, or layers have different numbers of heads.

    References
    ----------
    arXiv:2305.17118, section 3; the lift is ours.
    """
    shape = tuple(getattr(input_ids, "shape", ()))
    if len(shape) != 2 or shape[1] < 4 or not 0.0 < split < 1.0:
        raise InputError(
            "persistence-input",
            f"got input_ids of shape {shape} and split={split}, expected (rows, at least 4 tokens) and a share between 0 and 1. "
            "Tokenize a longer text.",
        )
    tokens, (heads, *others) = shape[1], sorted(set(layer_shapes(decoder_config(model))), key=lambda one: one.query_heads)
    if others:
        raise InputError(
            "persistence-input",
            f"got a model whose layers have {heads.query_heads} to {others[-1].query_heads} heads, expected as many in each: the result has one row for each "
            "layer. Share a budget with calibrate_budgets.",
        )
    place = max(1, min(tokens - 1, round(split * tokens)))
    group = heads.query_heads // heads.kv_heads
    cache = BudgetedCache(model, _PivotalTokens(group=group, place=place), budget=tokens + 2)
    with evaluating(model):
        model(input_ids=input_ids, cache=cache, use_cache=True)
    ratios, shares = [], []
    for layer in cache.budgeted:
        record = layer.record.values[:, :, :place]  # (rows, kv_heads, early tokens, 2 * group)
        early, late = record.transpose(2, 3).chunk(2, dim=2)  # (rows, kv_heads, group, early tokens) each
        again = (early & late).sum(dim=-1) / late.sum(dim=-1).clamp(min=1)
        again = torch.where(late.any(dim=-1), again, 1.0)  # where nobody matters later, nobody was missed
        ratios.append(again.mean(dim=0).flatten())
        shares.append(early.float().mean(dim=-1).mean(dim=0).flatten())
    ratio, share = torch.stack(ratios), torch.stack(shares)
    lift = torch.where(share < 1, (ratio - share) / (1 - share).clamp(min=1e-9), 0.0)
    return Persistence(ratio, share, lift)


def allocate_budgets(ratio: Sequence[float] | Tensor, *, average: int, minimum: int) -> list[int]:
    """Share a total budget among layers: the less important tokens persist in a layer, the more it gets.

    Each layer has ``minimum`` and a share of the rest in proportion to one minus its ratio; fractions go to the largest remainders, so that the sum is
    exactly ``average`` times the number of layers.

    Parameters
    ----------
    ratio : sequence of float, or Tensor of shape (layers,)
        Persistence of each layer, from 0 to 1: ``persistence_ratio(...).ratio.mean(1)``.
    average : int
        Tokens per layer, on average.
    minimum : int
        Tokens that every layer has.

    Returns
    -------
    list of int
        Budgets, one for each layer; equal ratios give equal budgets.

    Raises
    ------
    InputError
        When a ratio is not between 0 and 1 or ``minimum`` is not between 1 and ``average``.

    Examples
    --------
    >>> allocate_budgets([0.9, 0.9, 0.7], average=100, minimum=50)
    [80, 80, 140]
    """
    ratios = [float(value) for value in ratio]
    if not ratios or not all(0.0 <= value <= 1.0 for value in ratios):
        raise InputError(
            "persistence-ratio", f"got ratios {ratios}, expected one between 0 and 1 for each layer. Pass persistence_ratio(...).ratio.mean(1)."
        )
    check_at_least(minimum, 1, name="minimum")
    check_at_least(average, minimum, name="average")
    return share_out([1.0 - value for value in ratios], average=average, minimum=minimum)


def share_out(needs: Sequence[float], *, average: int, minimum: int) -> list[int]:
    """Give every layer the minimum and a share of the rest in proportion to its need; fractions go to the largest remainders, so that the sum is exact."""
    total = sum(needs)
    needs = list(needs) if total > 0 else [1.0] * len(needs)
    free = len(needs) * (average - minimum)
    exact = [free * need / sum(needs) for need in needs]
    shares = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda index: (shares[index] - exact[index], index))
    for index in order[: free - sum(shares)]:
        shares[index] += 1
    return [minimum + share for share in shares]
