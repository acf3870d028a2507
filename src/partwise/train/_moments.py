"""Moments of an optimiser that travel with the parameters they belong to.

A parameter that is split has coordinates that were trained at different times, so AdamW's count of steps is kept for each of them: bias correction with one
count for all would be wrong for those that were rarely held.

References
----------
Decoupled Weight Decay Regularization. arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.models.axes import Axis
    from partwise.train.optimizer import OptimizerSettings

__all__ = ["Moments", "UnitAdamW", "fresh_moments", "is_uniform"]

Moments = dict[str, dict[str, torch.Tensor]]
"""Slot of the optimiser's state -> parameter name -> tensor."""

SLOTS = {"adamw": ("exp_avg", "exp_avg_sq", "step"), "sgd": ("momentum_buffer",)}


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


def is_uniform(step: Tensor) -> bool:
    """Whether all coordinates have made as many steps."""
    return bool((step == step.flatten()[0]).all())
