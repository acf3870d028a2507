"""What a method of this room says: what is split, how it is dealt, what a part's activations are multiplied by, and what becomes of the parts.

Rounds, engines, optimisers and checkpoints are the same for all of them; see ``SubnetTrainer``.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from partwise.checks import InputError, check_at_least, check_choice

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from partwise.models.axes import Axis, Part
    from partwise.train._rounds import SubnetRounds, SubnetState

__all__ = ["OptimizerState", "SubnetMethod"]

OptimizerState = Literal["reset", "carry", "none"]


@dataclass(frozen=True, kw_only=True)
class SubnetMethod(abc.ABC):
    """How a model is cut into subnetworks.

    Parameters
    ----------
    num_parts : int, default=4
        Subnetworks of a round.
    num_local_steps : int or tuple of int, default=20
        Optimiser steps that a part makes alone before it is merged. A tuple has one number per part: workers of different speed.
    optimizer_state : {"reset", "carry", "none"}, optional
        What becomes of the optimiser's moments at a merge. reset: every round starts afresh. carry: they are cut and merged with the parameters they belong
        to, which triples what is sent. none: the optimiser has none. Left out: carry for AdamW, reset for SGD with momentum, none for plain SGD.
    blend : float, default=0.5
        In asynchronous runs, how far an arriving part moves the parameters it holds towards its own.
    """

    num_parts: int = 4
    num_local_steps: int | tuple[int, ...] = 20
    optimizer_state: OptimizerState | None = None
    blend: float = 0.5

    supports_async: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.num_local_steps, list):  # JSON has lists only
            object.__setattr__(self, "num_local_steps", tuple(self.num_local_steps))
        check_at_least(self.num_parts, 1, name="num_parts")
        steps = self.num_local_steps if isinstance(self.num_local_steps, tuple) else (self.num_local_steps,) * self.num_parts
        if len(steps) != self.num_parts:
            raise InputError(
                "steps-per-part",
                f"got {len(steps)} numbers of local steps for {self.num_parts} parts, expected one each. Pass {self.num_parts}, or one for all.",
            )
        for number in steps:
            check_at_least(number, 1, name="num_local_steps")
        if self.optimizer_state is not None:
            check_choice(self.optimizer_state, ("reset", "carry", "none"), name="optimizer_state")
        if not 0 < self.blend <= 1:
            raise InputError("blend-range", f"got blend={self.blend}, expected a number above 0 and at most 1. Pass 0.5 to meet in the middle.")

    def steps_of(self, part: int) -> int:
        """Local steps of one part."""
        return self.num_local_steps[part] if isinstance(self.num_local_steps, tuple) else self.num_local_steps

    @abc.abstractmethod
    def find_axes(self, model: nn.Module) -> tuple[Axis, ...]:
        """What is split; nothing means that every part holds the whole model.

        Raises
        ------
        InputError
            When the method cannot split this model.
        """

    @abc.abstractmethod
    def deal(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator]) -> list[Part]:
        """One part per generator."""

    def is_whole_round(self, round_number: int, num_rounds: int) -> bool:
        """Whether every part holds the whole model in this round of so many."""
        return False

    def between_rounds(self, state: SubnetState, rounds: SubnetRounds) -> SubnetState:
        """The state that the next round starts from; called after every round, and once before the first. It may put units into another order, no more."""
        return state

    def factors(self, axes: Sequence[Axis], part: Part) -> dict[str, float]:
        """Axis name -> what the input of its readers is multiplied by while the part trains. Parameters are stored without it."""
        return {}

    def after_merge(self, before: SubnetState, merged: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors of the next round and the method's own, from the state before the round and the mean over holders."""
        return merged, before.outer

    def deployed(self, model: nn.Module, axes: Sequence[Axis]) -> nn.Module:
        """The whole model as it is to be used, where that differs from how it is trained."""
        return model

    def ticket_part(self, model: nn.Module, axes: Sequence[Axis], keep: float, generator: np.random.Generator) -> Part:
        """Units of a ticket that keeps a fraction of every axis: as many in every layer of a kind, drawn at random."""
        from partwise.models import FixedFractionSampler

        [part] = FixedFractionSampler(keep=keep, balanced=False)(axes, [generator])
        return part

    def ticket_factors(self, axes: Sequence[Axis], part: Part) -> Mapping[str, float]:
        """Axis name -> what is folded into the readers of a ticket."""
        return self.factors(axes, part)
