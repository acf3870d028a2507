"""How a part is trained between two merges. Light to import: the optimisers load when one is opened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from partwise.checks import InputError, check_choice

if TYPE_CHECKING:
    from torch import nn, optim

    from partwise.train._moments import Moments
    from partwise.train.method import OptimizerState

__all__ = ["OptimizerSettings"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How a part is trained between two merges.

    Parameters
    ----------
    optimizer : str
        adamw or sgd.
    lr : float or None
        Learning rate at its highest. Left out: 0.001 for AdamW, 0.05 for SGD.
    weight_decay : float
        Decoupled for AdamW, part of the gradient for SGD.
    momentum : float
        Of SGD.
    betas : tuple of float
        Decay of AdamW's two moments.
    schedule : str
        cosine: the learning rate falls to a tenth over all rounds. constant: it stays.
    warmup : float
        Share of all steps over which the learning rate rises.
    grad_clip : float or None
        Largest norm of a part's gradient; longer ones are shortened to it.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float | None = None
    weight_decay: float = 0.01
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    grad_clip: float | None = 1.0

    def __post_init__(self) -> None:
        check_choice(self.optimizer, ("adamw", "sgd"), name="optimizer")
        check_choice(self.schedule, ("cosine", "constant"), name="schedule")
        for name, holds, expected in (
            ("lr", self.lr is None or (math.isfinite(self.lr) and self.lr > 0), "a number above 0"),
            ("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "0 or more"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "two numbers of at least 0 and below 1"),
            ("warmup", 0 <= self.warmup <= 1, "a share from 0 to 1"),
            ("grad_clip", self.grad_clip is None or self.grad_clip > 0, "a number above 0, or none"),
        ):
            if not holds:
                raise InputError("optimizer-setting", f"got {name}={getattr(self, name)}, expected {expected}. Change it, or leave it out.")

    @property
    def top_lr(self) -> float:
        """The learning rate at its highest."""
        return self.lr if self.lr is not None else {"adamw": 1e-3, "sgd": 0.05}[self.optimizer]

    @property
    def has_state(self) -> bool:
        """Whether the optimiser remembers anything from step to step."""
        return self.optimizer == "adamw" or self.momentum > 0

    def lr_at(self, step: int, num_steps: int) -> float:
        """Learning rate of step ``step`` of ``num_steps``, counted from 0.

        Examples
        --------
        >>> settings = OptimizerSettings(lr=1.0, warmup=0.1)
        >>> [round(settings.lr_at(step, 100), 3) for step in (0, 9, 55, 100)]
        [0.1, 1.0, 0.55, 0.1]
        """
        num_warmup = round(self.warmup * num_steps)
        if step < num_warmup:
            return self.top_lr * (step + 1) / num_warmup
        if self.schedule == "constant":
            return self.top_lr
        done = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
        return self.top_lr * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)

    def state_rule(self, asked: OptimizerState | None) -> OptimizerState:
        """What becomes of the optimiser's moments at a merge, where a method asks for it or leaves it open.

        Raises
        ------
        InputError
            ``optimizer-has-state`` when there must be none and there is.
        """
        if asked == "none" and self.has_state:
            raise InputError(
                "optimizer-has-state",
                f"got optimizer_state='none' with {self.optimizer}{f' and momentum {self.momentum}' if self.optimizer == 'sgd' else ''}, expected an optimiser "
                "that remembers nothing. Pass optimizer='sgd' and momentum=0, or choose 'reset' or 'carry'.",
            )
        if not self.has_state:
            return "none"
        return asked or ("carry" if self.optimizer == "adamw" else "reset")

    def open(self, parameters: Mapping[str, nn.Parameter], moments: Moments) -> optim.Optimizer:
        """The optimiser of some parameters, with the moments that came with them; with none, a fresh one."""
        import torch

        from partwise.train._moments import UnitAdamW, is_uniform

        trained = list(parameters.values())
        if self.optimizer == "sgd":
            optimizer: optim.Optimizer = torch.optim.SGD(trained, lr=self.top_lr, momentum=self.momentum, weight_decay=self.weight_decay)
        elif all(is_uniform(step) for step in moments.get("step", {}).values()):
            optimizer = torch.optim.AdamW(trained, lr=self.top_lr, betas=self.betas, weight_decay=self.weight_decay)
        else:
            optimizer = UnitAdamW(trained, lr=self.top_lr, betas=self.betas, weight_decay=self.weight_decay)
        for name, parameter in parameters.items():
            state = {slot: of_slot[name] for slot, of_slot in moments.items()}
            if isinstance(optimizer, torch.optim.AdamW) and state:
                state["step"] = state["step"].flatten()[0].clone()
            if state:
                optimizer.state[parameter] = state
        return optimizer

    def moments_after(self, optimizer: optim.Optimizer, parameters: Mapping[str, nn.Parameter], before: Moments, num_steps: int) -> Moments:
        """The moments that travel back, lying like ``before``."""
        if not before:
            return {}
        moments: Moments = {slot: {name: optimizer.state[parameters[name]][slot] for name in before[slot]} for slot in before if slot != "step"}
        if "step" in before:
            moments["step"] = {name: step + num_steps for name, step in before["step"].items()}
        return moments
