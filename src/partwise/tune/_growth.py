"""Growth by score: which modules get the next components.

The score is AdaLoRA's sensitivity (arXiv:2303.10512) summed over a rank-one component, smoothed, and multiplied by its variability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from partwise.selection import spend
from partwise.tune._sharded import whole

SCORING_WINDOW = 64  # averages started this many steps before a decision differ from older ones by less than 0.05 %
GROWTH_SHARE = 0.35  # of the steps, where their number is known; IncreLoRA's scripts spend the budget within 37 %


@dataclass(frozen=True)
class Pace:
    """Steps between growth events, last step without growth, modules per event."""

    interval: int
    warmup: int
    modules: int


@lru_cache
def pace(num_missing: int, num_modules: int, *, total_steps: int | None, interval: int | None, warmup: int | None, modules: int | None) -> Pace:
    """Fill in what was left out, so that ``num_missing`` gains are done within the first third of a run of known length.

    >>> pace(36, 36, total_steps=None, interval=None, warmup=None, modules=None)
    Pace(interval=100, warmup=100, modules=2)
    >>> pace(36, 36, total_steps=300, interval=None, warmup=None, modules=None)
    Pace(interval=5, warmup=5, modules=2)
    """
    usual = math.ceil(num_modules / 24)
    if total_steps is None:
        interval = interval or 100
        return Pace(interval, interval if warmup is None else warmup, modules or usual)
    room = max(1, math.floor(GROWTH_SHARE * total_steps))  # steps within which growth should end
    if modules is None:
        num_events = room // interval if interval else room - 1
        modules = max(usual, math.ceil(num_missing / max(1, num_events)))
    num_events = max(1, math.ceil(num_missing / modules))
    if interval is None:
        interval = max(1, room // (num_events + 1))
    return Pace(interval, interval if warmup is None else warmup, modules)


def importance(down: Sequence[Tensor], down_grads: Sequence[Tensor], up: Sequence[Tensor], up_grads: Sequence[Tensor]) -> Tensor:
    """``sum |a * dL/da| + sum |b * dL/db|`` of every component of every module.

    Parameters
    ----------
    down, down_grads : sequence of Tensor, each (r_max, in)
    up, up_grads : sequence of Tensor, each (out, r_max)

    Returns
    -------
    Tensor, (modules, r_max)
    """
    sensitivity = torch._foreach_mul([*down, *up], [*down_grads, *up_grads])
    torch._foreach_abs_(sensitivity)
    num_modules = len(down)
    rows = torch.stack([part.sum(dim=1) for part in sensitivity[:num_modules]])  # (modules, r_max)
    columns = torch.stack([part.sum(dim=0) for part in sensitivity[num_modules:]])  # (modules, r_max)
    return rows + columns


def smooth(mean: Tensor, variability: Tensor, value: Tensor, *, beta1: float, beta2: float) -> None:
    """Update the moving average of the importance, then the moving average of its distance from that average, in place."""
    mean.mul_(beta1).add_(value, alpha=1 - beta1)
    variability.mul_(beta2).add_((value - mean).abs_(), alpha=1 - beta2)


def module_scores(mean: Tensor, variability: Tensor, ranks: Sequence[int]) -> Tensor:
    """Mean over a module's active components of average times variability: (modules, r_max) -> (modules,), float64."""
    active = torch.arange(mean.shape[1])[None, :] < torch.tensor(list(ranks))[:, None]  # (modules, r_max)
    scores = (mean * variability).to("cpu", torch.float64)
    return (scores * active).sum(dim=1) / active.sum(dim=1)


class ImportanceAverages:
    """Smoothed importance of every component and its variability, (modules, r_max) each."""

    def __init__(self, num_modules: int, width: int) -> None:
        self.mean, self.variability = torch.zeros(num_modules, width), torch.zeros(num_modules, width)

    def update(self, down: Sequence[Tensor], up: Sequence[Tensor], *, beta1: float, beta2: float) -> None:
        """Take in the gradients that lie in the weights now."""
        weights = [*down, *up]
        grads = [whole(torch.zeros_like(weight) if weight.grad is None else weight.grad) for weight in weights]
        values = [whole(weight.detach()) for weight in weights]
        num = len(down)
        value = importance(values[:num], grads[:num], values[num:], grads[num:]).float()
        self.mean, self.variability = self.mean.to(value.device), self.variability.to(value.device)
        smooth(self.mean, self.variability, value, beta1=beta1, beta2=beta2)

    def load(self, index: int, mean: Tensor, variability: Tensor) -> None:
        """Restore the averages of one module."""
        self.mean[index], self.variability[index] = mean.to(self.mean), variability.to(self.mean)


def grown_ranks(
    scores: Sequence[float], ranks: Sequence[int], costs: Sequence[int], *, r: int, remaining: int, num_modules: int, step: int
) -> list[int]:
    """Ranks after the best ``num_modules`` modules with room gained up to ``step`` components each, for at most ``remaining`` in total.

    >>> grown_ranks([0.1, 0.9, 0.5], [1, 1, 4], [1, 1, 1], r=4, remaining=2, num_modules=2, step=2)
    [1, 3, 4]
    """
    new = list(ranks)
    room = [index for index, rank in enumerate(ranks) if rank < r]
    prices = [costs[index] for index in room]
    for place in spend([scores[index] for index in room], prices, budget=remaining, limit=num_modules):
        gain = min(step, r - ranks[room[place]], remaining // prices[place])
        new[room[place]] += gain
        remaining -= gain * prices[place]
    return new


def is_growth_step(step: int, *, interval: int, warmup: int) -> bool:
    """True after optimiser step number ``step`` (from 1) when modules may grow."""
    return step > warmup and step % interval == 0


def scoring_matters(step: int, *, interval: int, warmup: int) -> bool:
    """True when optimiser step number ``step`` lies in the window that decides the next growth."""
    next_event = interval * max(math.ceil(step / interval), warmup // interval + 1)
    return next_event - step < SCORING_WINDOW
