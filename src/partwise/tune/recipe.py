"""What a tuning method has to say about itself: how to install its adapter, what to do after a step, and how to finish.

The training loop (``_loop.py``) and the job (``job.py``) know only these functions; no method is known to them by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partwise.checks import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

WARMUP_SHARE = 0.06


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The facts of one run that a method may use.

    Parameters
    ----------
    num_steps : int
        Optimiser steps of the whole run.
    target_r : float
        Size that is asked for, as the rank of a LoRA adapter. Used where ``budget`` is None.
    budget : int or None
        Rank-one components over all modules together.
    seed : int
        Seed of everything random in the method.
    task_type : {"SEQ_CLS", "CAUSAL_LM"}
        peft's name for the kind of model.
    calibration : callable
        Returns a fresh iterator over the same training batches each time it is called.
    num_modules : int or None
        Modules that will carry the adapter, where they have been counted.
    """

    num_steps: int
    target_r: float
    budget: int | None
    seed: int
    task_type: str
    calibration: Callable[[], Iterable[dict[str, Tensor]]]
    num_modules: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """How one tuning method drives a run. Subclasses override what differs; their fields become command-line flags.

    Parameters
    ----------
    lora_alpha : float or None
        Every update is scaled by ``lora_alpha / r``. Left out: twice the rank, so that the scale is 2 for every method.
    lora_dropout : float
        Dropout on the input of each adapter, in [0, 1).
    target_modules : str
        ``all-linear``, or names of linear layers separated by commas.
    """

    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"

    @abstractmethod
    def wrap(self, model: nn.Module, plan: Plan) -> PeftModel:
        """Install the adapter on the freshly loaded base ``model``. The base may be changed in place."""

    @property
    def orders_components(self) -> bool:
        """Whether training puts useful components first, so that a cut needs no rotation to singular order before it."""
        return False

    def lr_factor(self, step: int, plan: Plan) -> float:
        """Learning rate of ``step`` (from 0) as a share of the peak: linear warm-up over 6 % of the steps, then linear decay to 0."""
        num_warmup = max(1, math.ceil(WARMUP_SHARE * plan.num_steps))
        if step < num_warmup:
            return (step + 1) / num_warmup
        return max(0.0, (plan.num_steps - step) / max(1, plan.num_steps - num_warmup))

    def after_step(self, model: PeftModel, step: int, plan: Plan, *, held_out_loss: Callable[[], float]) -> bool:
        """Called after ``optimizer.step()`` and before ``zero_grad()``. False ends the training here.

        Parameters
        ----------
        step : int
            Number of the step just taken, from 0.
        held_out_loss : callable
            Mean loss on the held-out examples; as slow as an evaluation.
        """
        return True

    def extra_state(self, model: PeftModel) -> dict[str, Tensor]:
        """What a checkpoint needs beyond trainable parameters, optimiser and random numbers, by name."""
        return {}

    def load_extra_state(self, model: PeftModel, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - most methods have none
        """Restore what ``extra_state`` returned. Called after the trainable parameters and the optimiser are back."""

    def finish(self, model: PeftModel) -> PeftModel:
        """After the last step: the same function as a ``PeftModel`` with plain, compact LoRA layers."""
        return model

    @abstractmethod
    def ranks(self, model: PeftModel) -> dict[str, int]:
        """Active rank of each module, by the module's full name in the base model. May be asked at any time."""


def as_target_modules(names: str) -> str | list[str]:
    """``all-linear`` as it is, or the list of layer names that a comma-separated text holds."""
    if names == "all-linear":
        return names
    return [name.strip() for name in names.split(",") if name.strip()]


def spread_budget(num_modules: int, plan: Plan) -> list[int]:
    """Ranks (one per module) as even as the budget allows: earlier modules get what is left over.

    Raises
    ------
    InputError
        When there are fewer components than modules.
    """
    total = plan.budget if plan.budget is not None else round(plan.target_r * num_modules)
    if total < num_modules:
        raise InputError(
            "budget-too-small",
            f"the budget is {total} components for {num_modules} modules, expected at least one each. "
            f"Pass --budget {num_modules} or more, or name fewer --target-modules.",
        )
    low, left_over = divmod(total, num_modules)
    return [low + 1] * left_over + [low] * (num_modules - left_over)
