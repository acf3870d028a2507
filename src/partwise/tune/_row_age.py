"""Fair optimiser steps for components that join late.

Adam divides its averages by ``1 - beta^T`` with the age ``T`` of the whole tensor. A component that joined later has younger averages,
so its first steps would be several times too long. What the optimiser did to it is rescaled to what an optimiser born with it would do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partwise.tune._sharded import read_components, write_components

NEGLIGIBLE = 1e-3  # a step that is off by less than this share is left as it is


def age_factor(age: int, optimiser_age: int, *, betas: tuple[float, float] | None, warmup: int) -> float:
    """What a component's step must be multiplied with so that it moves as under an optimiser born with it.

    Without ``betas`` only the linear warm-up over ``warmup`` steps remains.

    >>> age_factor(100, 100, betas=(0.9, 0.999), warmup=0)
    1.0
    """
    ramp = min(1.0, age / warmup) if warmup > 0 else 1.0
    if betas is None or age >= optimiser_age:
        return ramp
    beta1, beta2 = betas
    first = (1 - beta1**optimiser_age) / (1 - beta1**age)
    second = math.sqrt((1 - beta2**age) / (1 - beta2**optimiser_age))
    return ramp * first * second


@dataclass(frozen=True)
class YoungComponents:
    """Components ``first`` and later of one weight as they were before an optimiser step, and what that step must be multiplied with.

    ``dim`` is the axis of ``weight`` along which components lie.
    """

    weight: Tensor
    dim: int
    first: int
    before: Tensor
    factors: tuple[float, ...]

    def correct(self, group: dict[str, Any]) -> None:
        """Rescale the step that was just taken by an optimiser with these settings. Decoupled weight decay has no age and stays."""
        before = self.before
        if group.get("decoupled_weight_decay"):
            before = before * (1 - float(group["lr"]) * group["weight_decay"])
        after = read_components(self.weight, dim=self.dim, start=self.first, stop=self.first + len(self.factors))
        factors = torch.tensor(self.factors, dtype=before.dtype, device=before.device)  # (components,)
        corrected = torch.lerp(before, after, factors[:, None] if self.dim == 0 else factors)
        write_components(self.weight, corrected, dim=self.dim, start=self.first)


def remember_young(
    weight: Tensor, *, dim: int, births: Sequence[int], step: int, state: dict[str, Any], group: dict[str, Any], warmup: int
) -> YoungComponents | None:
    """Copy the components of ``weight`` that the coming step would move too far. None where there are none.

    Parameters
    ----------
    births : sequence of int
        Step at which each active component began; 0 for those as old as the training.
    step : int
        Optimiser steps taken so far.
    state, group : dict
        What the optimiser keeps for this weight, and the settings it uses for it.
    """
    optimiser_age = int(state["step"]) + 1 if "step" in state else step + 1
    factors = tuple(age_factor(step + 1 - birth, optimiser_age, betas=group.get("betas"), warmup=warmup) if birth > 0 else 1.0 for birth in births)
    young = [index for index, factor in enumerate(factors) if abs(factor - 1) > NEGLIGIBLE]
    if not young:
        return None
    before = read_components(weight, dim=dim, start=young[0], stop=len(births))
    return YoungComponents(weight, dim, young[0], before, factors[young[0] :])
