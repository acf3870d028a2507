"""Noticing optimiser steps without a callback: two process-wide hooks of torch, which pay attention to one adapter's parameters only."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class Listener(Protocol):
    """Who wants to know of optimiser steps."""

    def owns(self, optimiser: Optimizer) -> bool:
        """Whether a step of this optimiser moves the listener's parameters."""

    def before_step(self, optimiser: Optimizer) -> None:
        """The optimiser is about to use the gradients as they are now."""

    def after_step(self, optimiser: Optimizer) -> None:
        """The optimiser has moved the parameters; gradients are still there."""


def watch_steps(listener: Listener) -> weakref.finalize[[tuple[RemovableHandle, ...]], Listener]:
    """Tell ``listener`` of every step of its optimiser until it dies or the returned function is called.

    A step that a gradient scaler skips is not a step. The hooks hold the listener weakly.
    """
    reference = weakref.ref(listener)

    def before(optimiser: Optimizer, *_: Any) -> None:
        alive = reference()
        if alive is not None and alive.owns(optimiser):
            alive.before_step(optimiser)

    def after(optimiser: Optimizer, *_: Any) -> None:
        alive = reference()
        if alive is not None and alive.owns(optimiser):
            alive.after_step(optimiser)

    handles = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))
    return weakref.finalize(listener, _remove, handles)


def settings_by_parameter(optimiser: Optimizer) -> dict[int, dict[str, Any]]:
    """The parameter group of everything that ``optimiser`` holds, by ``id`` of the parameter."""
    return {id(parameter): group for group in optimiser.param_groups for parameter in group["params"]}


def _remove(handles: tuple[RemovableHandle, ...]) -> None:
    for handle in handles:
        handle.remove()
