"""The exact schedule: every sample visits every level, by several passes or by repeating the samples of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from partwise.tune.adapad import controller_of


def level_passes(model: nn.Module) -> Iterator[int]:
    """Run the body once per level: ``for level in level_passes(model): loss(model(batch)).backward()``.

    This is the exact schedule without repeating the batch in memory. Gradients of different levels fall on different components.
    A task head collects all of them; what the passes add to its gradient is divided by their number. While a joint start or
    finish lasts, there is one pass.

    Parameters
    ----------
    model : nn.Module
        With a growing AdaPaD adapter.

    Yields
    ------
    int
        The level, from 1; 0 for private components (``advance_learning``).
    """
    controller = controller_of(model)
    own = {id(weight) for slot in controller.slots for weight in (slot.down.weight, slot.up.weight)}
    shared = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
    levels = controller.levels_to_visit()
    before = [None if parameter.grad is None else parameter.grad.clone() for parameter in shared]
    try:
        for level in levels:
            controller.force_level(level if len(levels) > 1 else None)
            yield level
    finally:
        controller.force_level(None)
    for parameter, old in zip(shared, before, strict=True):
        if parameter.grad is not None and len(levels) > 1:
            parameter.grad = parameter.grad / len(levels) if old is None else torch.lerp(old, parameter.grad, 1 / len(levels))


class RepeatForLevels:
    """Inside ``with RepeatForLevels(model):`` every sample of a training batch appears once per level: exact under a stock ``Trainer``.

    The inputs of ``model`` are repeated, labels included, so the loss must be computed inside the model. Memory grows with the number of
    levels. The mean loss is then the mean over levels, which Adam does not notice.

    Parameters
    ----------
    model : nn.Module
        The model that the training loop calls, or that a wrapper such as DDP calls. Its first tensor input must have samples on its first axis.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.controller = model, controller_of(model)

    def __enter__(self) -> RepeatForLevels:
        self.controller.repeats_levels = True
        self._handle = self.model.register_forward_pre_hook(self._repeat, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self.controller.repeats_levels = False

    def _repeat(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        times = len(self.controller.levels_to_visit())
        if not module.training or times == 1:
            return args, kwargs
        batch = next(value.shape[0] for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

        def repeated(value: Any) -> Any:
            is_per_sample = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
            return value.repeat_interleave(times, dim=0) if is_per_sample else value  # (batch * levels, ...)

        return tuple(repeated(value) for value in args), {name: repeated(value) for name, value in kwargs.items()}
