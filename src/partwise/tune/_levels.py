"""Which prefix of the components a sample sees, and when: pure functions of (step, batch, ranks).

Level ``k`` is a component together with all before it; level 0 is the private one of advance learning. Purity matters: gradient
checkpointing runs a forward pass twice, and a resumed run must deal the same levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partwise.tune._prefix_linear import Masks


@dataclass(frozen=True)
class LevelRules:
    """The settings of AdaPaD that say who learns from whom, with nothing left out; see ``AdaPaDSettings``."""

    schedule: str
    successor_weight: float
    top_share: float
    joint_start: float
    finish: str
    finish_fraction: float

    def phase(self, step: int, *, total_steps: int | None, growth_is_over: bool) -> str:
        """What the step after ``step`` optimiser steps trains by: ``joint``, or the schedule."""
        if self.schedule == "joint":
            return "joint"
        if self.joint_start > 0:
            in_start = step < round(self.joint_start * total_steps) if total_steps else not growth_is_over
            if in_start:
                return "joint"
        if self.finish == "joint":
            in_finish = step >= round((1 - self.finish_fraction) * total_steps) if total_steps else growth_is_over
            if in_finish:
                return "joint"
        return self.schedule


def deal_levels(schedule: str, *, batch: int, step: int, num_levels: int, private: bool, top_share: float, offset: int = 0) -> Tensor:
    """Level of each sample, (batch,), or one level for the whole batch, (1,).

    Parameters
    ----------
    schedule : {"exact", "split", "cycle"}
        ``exact`` expects each sample ``num_levels`` times in a row.
    private : bool
        Whether a share of the samples trains private components (level 0).
    top_share : float
        Share of samples at the top level, kept over steps where it is no whole number of samples.
    offset : int
        Samples of this step that are dealt on other workers before this batch.
    """
    num_groups = num_levels + private
    size = 1 if schedule == "cycle" else batch
    share = 0.0 if schedule == "exact" else top_share
    top_before = math.floor(step * share * size)  # top samples (or batches) of earlier steps
    num_top = math.floor((step + 1) * share * size) - top_before
    if share == 0 and size > 1:
        turn = torch.arange(size) + step + offset  # (size,)
        return (turn % num_groups + 1) % (num_levels + 1)
    place = (torch.arange(size) + step) % size  # (size,): which samples are at the top changes from step to step
    turn = place - num_top + step * size - top_before + (offset if size > 1 else 0)  # the others take turns, also over steps
    return torch.where(place < num_top, num_levels, (turn % num_groups + 1) % (num_levels + 1))


def make_masks(levels: Tensor, *, rank: int, private: bool, successor_weight: float, device: torch.device) -> Masks | None:
    """Masks of one module from the levels of the samples. None: all samples see all active components and train them.

    Parameters
    ----------
    levels : Tensor, (samples,)
    rank : int
        Active components of the module.
    private : bool
        Whether it has one more component in training.
    successor_weight : float
        Weight with which components before a sample's level learn from it.
    """
    level = levels[:, None]  # (samples, 1)
    component = torch.arange(rank + private)[None, :]  # (1, width)
    active, is_private = component < rank, level == 0
    sees = torch.where(is_private, component >= 0, active & (component < level))  # (samples, width)
    own = torch.where(is_private, ~active, active & (component == level - 1))
    learns = own.float() + successor_weight * (active & (component < level - 1)).float()  # (samples, width)
    same = torch.equal(learns, sees.float())
    if same and bool(sees.all()) and not private:
        return None
    return Masks(sees.float().to(device), None if same else learns.to(device))
