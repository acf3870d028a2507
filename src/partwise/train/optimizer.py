"""Optimisers of local steps, and how their moments travel with the parameters they belong to.

A parameter that is split has coordinates that were trained at different times, so AdamW's count of steps is kept for each of them: bias correction with one
count for all would be wrong for those that were rarely held.

References
----------
Decoupled Weight Decay Regularization. arXiv:1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from partwise.checks import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.models.axes import Axis
    from partwise.train.method import OptimizerState

__all__ = ["Moments", "OptimizerSettings", "UnitAdamW", "fresh_moments"]

Moments = dict[str, dict[str, torch.Tensor]]
"""Slot of the optimiser's state -> parameter name -> tensor."""

SLOTS = {"adamw": ("exp_avg", "exp_avg_sq", "step"), "sgd": ("momentum_buffer",)}


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
        for name, holds, expected in (
            ("lr", self.lr is None or (math.isfinite(self.lr) and self.lr > 0), "a number above 0"),
            ("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "0 or more"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers of at least 0 and below 1"),
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

    def open(self, parameters: Mapping[str, nn.Parameter], moments: Moments) -> torch.optim.Optimizer:
        """The optimiser of some parameters, with the moments that came with them; with none, a fresh one."""
        trained = list(parameters.values())
        if self.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, lr=self.top_lr, momentum=self.momentum, weight_decay=self.weight_decay)
        elif all(_is_uniform(step) for step in moments.get("step", {}).values()):
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

    def moments_after(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], before: Moments, num_steps: int) -> Moments:
        """The moments that travel back, lying like ``before``."""
        if not before:
            return {}
        moments: Moments = {slot: {name: optimizer.state[parameters[name]][slot] for name in before[slot]} for slot in before if slot != "step"}
        if "step" in before:
            moments["step"] = {name: step + num_steps for name, step in before["step"].items()}
        return moments


class UnitAdamW(torch.optim.Optimizer):
    """AdamW whose count of steps is a tensor, so that each coordinate gets the bias correction of its own age.

    Parameters
    ----------
    params : iterable of Parameter
        What to train. The state of each holds ``exp_avg``, ``exp_avg_sq`` of its shape, and ``step`` of a shape that broadcasts to it.
    lr, betas, eps, weight_decay
        As in ``torch.optim.AdamW``.

    References
    ----------
    Decoupled Weight Decay Regularization. arXiv:1711.05101. A count for every coordinate is ours.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter with a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    zeros = torch.zeros_like(parameter)
                    state |= {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": zeros.new_zeros([1] * parameter.ndim)}
                state["step"] = state["step"] + 1
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                first, second = (1 - beta ** state["step"] for beta in (beta1, beta2))
                denominator = (state["exp_avg_sq"] / second).sqrt_().add_(group["eps"])
                parameter.addcdiv_(state["exp_avg"] / first, denominator, value=-group["lr"])
        return loss


def fresh_moments(settings: OptimizerSettings, parameters: Mapping[str, Tensor], axes: Iterable[Axis]) -> Moments:
    """The moments of a model before its first step, for an optimiser whose state is carried.

    Steps are counted for each entry of the dimensions that an axis runs along; the count broadcasts along the others.
    """
    from partwise.models.axes import BlockAxis

    sliced: dict[str, set[int]] = {}
    for axis in axes:
        for member in () if isinstance(axis, BlockAxis) else axis.members:
            sliced.setdefault(member.tensor, set()).add(member.dim)
    moments: Moments = {}
    for slot in SLOTS[settings.optimizer] if settings.has_state else ():
        moments[slot] = {}
        for name, parameter in parameters.items():
            shape = list(parameter.shape)
            if slot == "step":
                shape = [size if dim in sliced.get(name, ()) else 1 for dim, size in enumerate(shape)]
            moments[slot][name] = torch.zeros(shape, dtype=torch.float32 if slot == "step" else parameter.dtype)
    return moments


def _is_uniform(step: Tensor) -> bool:
    return bool((step == step.flatten()[0]).all())
