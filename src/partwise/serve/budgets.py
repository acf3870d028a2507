"""Budgets for each layer by what they cost: measured on a text, one layer at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from partwise.checks import InputError, check_at_least
from partwise.serve._evaluating import evaluating
from partwise.serve.cache import BudgetedCache
from partwise.serve.persistence import share_out
from partwise.serve.scissorhands import Scissorhands

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from partwise.serve.rule import EvictionRule

__all__ = ["Calibration", "calibrate_budgets"]


@dataclass(frozen=True)
class Calibration:
    """What a budget costs in each layer, and the budgets that follow.

    Parameters
    ----------
    budgets : tuple of int
        Tokens for each layer with full attention; their sum is the average times the number of layers.
    divergence : tuple of float
        Mean KL divergence, in nats, of the next token's distribution from that of a full cache, when this layer alone has the average budget.
    """

    budgets: tuple[int, ...]
    divergence: tuple[float, ...]


def calibrate_budgets(
    model: Any,
    input_ids: Tensor,
    *,
    average: int,
    minimum: int | None = None,
    rule: EvictionRule | None = None,
    block: int = 16,
    report: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Share a total budget among layers so that the text is disturbed least.

    One layer after the other gets the average budget while all others keep everything, and the divergence of what the model then predicts is measured. If
    the divergence of a layer falls as one over its budget, and those of layers add up, budgets in proportion to its square root are the best ones. Nothing
    is trained, and no labels are needed. A part of the work of `persistence_ratio` and `allocate_budgets`, whose shares are the paper's; these are ours.

    Parameters
    ----------
    model : PreTrainedModel
        The model that the budgets are for.
    input_ids : Tensor of shape (rows, tokens), int64
        Text like that to be read, without padding, longer than the average budget; not the text that anything is tested on.
    average : int
        Tokens per layer, on average.
    minimum : int, optional
        Tokens that every layer has; a quarter of the average, if the rule can do with it.
    rule : EvictionRule, optional
        How tokens leave; Scissorhands by default.
    block : int, default=16
        Tokens that are read at once. Fewer are closer to generating one by one and take longer.
    report : callable, optional
        Told how many layers are done, and how many there are.

    Returns
    -------
    Calibration
        Budgets to pass to a cache, and the divergences they come from.

    Raises
    ------
    InputError
        When the text is not longer than the budget, or the budget is too small for the rule.
    """
    rule = Scissorhands() if rule is None else rule
    check_at_least(average, 1, name="average")
    check_at_least(block, 1, name="block")
    rows, tokens = input_ids.shape if input_ids.ndim == 2 else (0, 0)
    if rows < 1 or tokens < average + block + 1:
        raise InputError(
            "calibration-text",
            f"got input_ids of shape {tuple(input_ids.shape)}, expected rows of at least {average + block + 1} tokens: longer than the average budget of "
            f"{average}. Pass a longer text or a smaller budget.",
        )
    least = _least(rule, average) if minimum is None else minimum
    check_at_least(least, 1, name="minimum")
    check_at_least(average, least, name="average")
    layers = len(BudgetedCache(model, rule, budget=average).budget)
    with evaluating(model):
        full = _predictions(model, input_ids, BudgetedCache(model, rule, budget=tokens + 1 + average), start=average, block=block)
        divergence = []
        for layer in range(layers):
            budgets = [tokens + 1 + average] * layers
            budgets[layer] = average
            found = _predictions(model, input_ids, BudgetedCache(model, rule, budget=budgets), start=average, block=block)
            divergence.append(float((full.exp() * (full - found)).sum(dim=-1).mean()))
            if report is not None:
                report(layer + 1, layers)
    return Calibration(tuple(share_out([math.sqrt(max(0.0, value)) for value in divergence], average=average, minimum=least)), tuple(divergence))


def _predictions(model: Any, input_ids: Tensor, cache: BudgetedCache, *, start: int, block: int) -> Tensor:
    """Log-probabilities of the next token after the first ``start`` tokens, (rows, tokens - start, vocabulary), read in blocks."""
    model(input_ids=input_ids[:, :start], cache=cache, use_cache=True)
    parts = [
        model(input_ids=piece, cache=cache, use_cache=True).logits.to(torch.float32).log_softmax(dim=-1)
        for piece in torch.split(input_ids[:, start:], block, dim=1)
    ]
    return torch.cat(parts, dim=1)


def _least(rule: EvictionRule, average: int) -> int:
    """A quarter of the average, or the smallest budget that the rule can have."""
    wanted = max(1, average // 4)
    for budget in range(wanted, average + 1):
        limits = rule.limits(budget)
        if budget >= limits.recent + rule.num_sinks + limits.drop + 1:
            return budget
    return average
