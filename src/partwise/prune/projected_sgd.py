"""Gradient descent that stays near where it started."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from partwise.checks import InputError, check_radius

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ProjectedSGD"]


class ProjectedSGD(torch.optim.Optimizer):
    """Gradient descent in which no entry gets further from its start than a radius: after each step it is put back to the nearest value that is allowed.

    The start of a parameter is its value when it is handed over; it is part of ``state_dict()``. Each entry has limits of its own, so the parameters stay in
    a box. With an infinite radius it is ``torch.optim.SGD``, to the bit; with 0 nothing moves.

    Parameters
    ----------
    params : iterable of Parameter or dict
        What to train; groups may have their own ``lr``, ``radius`` and ``momentum``.
    lr : float
        Learning rate, 0 or more.
    radius : float
        Largest distance of an entry from its start, 0 or more; may be infinite. Limits that the dtype cannot hold are rounded towards the start.
    momentum : float, default=0
        As in ``torch.optim.SGD``, at least 0 and below 1. What is cut off at a limit stays in the momentum.

    Raises
    ------
    InputError
        ``radius-range`` for a radius below 0 or NaN, ``optimizer-setting`` for the other two.

    References
    ----------
    Strong Lottery Ticket Hypothesis with epsilon-perturbation. arXiv:2210.16589. We know its abstract; momentum is ours.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = ProjectedSGD([weight], lr=1.0, radius=0.25)
    >>> (weight @ torch.tensor([0.125, -3.0])).backward()
    >>> optimizer.step()
    >>> weight.detach()
    tensor([-0.1250,  0.2500])
    """

    def __init__(self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], *, lr: float, radius: float, momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "radius": radius, "momentum": momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in a group of parameters; where they are now is their start."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_radius(group["radius"])
        for name, holds in (("lr", 0 <= group["lr"] < math.inf), ("momentum", 0 <= group["momentum"] < 1)):
            if not holds:
                raise InputError(
                    "optimizer-setting", f"got {name}={group[name]}, expected {'0 or more' if name == 'lr' else 'at least 0 and below 1'}. Change it."
                )
        for parameter in group["params"]:
            self.state[parameter]["start"] = parameter.detach().clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter with a gradient, and back to the limits."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, change = self.state[parameter], parameter.grad
                if group["momentum"]:
                    before = state.get("momentum_buffer")
                    change = state["momentum_buffer"] = change.clone() if before is None else before.mul_(group["momentum"]).add_(change)
                parameter.add_(change, alpha=-group["lr"])
                if group["radius"] < math.inf:
                    _put_back(parameter, state["start"], group["radius"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another one stopped: its starts, momentum and settings.

        Raises
        ------
        InputError
            ``no-start`` when a parameter has no start, as in a state of ``torch.optim.SGD``.
        """
        entries = [index for group in state_dict["param_groups"] for index in group["params"]]
        missing = [index for index in entries if "start" not in state_dict["state"].get(index, {})]
        if missing:
            raise InputError(
                "no-start", f"the state has no start for parameter {missing[0]}, expected the state of a ProjectedSGD. Make a new one where training starts."
            )
        super().load_state_dict(state_dict)


def _put_back(parameter: Tensor, start: Tensor, radius: float) -> None:
    """Clip to ``[start - radius, start + radius]``; limits that a narrow dtype would round outwards are rounded inwards."""
    if not radius:
        parameter.copy_(start)  # clipping would turn -0.0 into 0.0
        return
    exact = start.double()
    lowest, highest = (exact - radius).to(start.dtype), (exact + radius).to(start.dtype)
    lowest = torch.where(exact - lowest.double() > radius, torch.nextafter(lowest, start), lowest)
    highest = torch.where(highest.double() - exact > radius, torch.nextafter(highest, start), highest)
    parameter.clamp_(lowest, highest)
