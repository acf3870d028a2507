"""The local steps of one part: an ordinary training loop on a small model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from partwise.checks import InputError, RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.train._moments import Moments
    from partwise.train.optimizer import OptimizerSettings

__all__ = ["LocalRun", "Loss", "scaled_inputs", "task_loss", "train_alone", "with_threads"]

Loss = Callable[["nn.Module", Any], "Tensor"]
"""Mean loss of a model on a batch."""


@dataclass(frozen=True)
class LocalRun:
    """What local steps made of a part: its losses on its first batch, and the optimiser's moments where they are carried."""

    loss_after_split: float
    loss_after_local: float | None
    moments: Moments


def task_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch as its form suggests: ``model(**batch).loss`` of a mapping, cross entropy of ``(inputs, classes)``.

    Parameters
    ----------
    model : torch.nn.Module
        Language models get batches with ``labels``.
    batch : mapping or pair of Tensor
        On any device; it is moved to that of the model.

    Raises
    ------
    InputError
        ``no-loss`` when the batch has neither form.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        if loss is not None:
            return loss  # type: ignore[no-any-return]
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, classes = (entry.to(device) for entry in batch)
        return functional.cross_entropy(model(inputs), classes)
    raise InputError(
        "no-loss",
        f"got a batch of type {type(batch).__name__}{' without labels' if isinstance(batch, Mapping) else ''}, expected a mapping with labels or a pair of "
        "inputs and classes. Pass loss=, a function of model and batch.",
    )


def train_alone(
    small: nn.Module, batches: Sequence[Any], *, settings: OptimizerSettings, moments: Moments, lr: Sequence[float], loss: Loss, probe: bool, where: str
) -> LocalRun:
    """Train a part in place, one step per batch.

    Parameters
    ----------
    small : torch.nn.Module
        The part.
    batches : sequence
        At least one.
    settings : OptimizerSettings
        What kind of steps.
    moments : Moments
        The optimiser's, for these parameters; empty for a fresh one.
    lr : sequence of float
        Learning rate of every step.
    loss : callable
        See `Loss`.
    probe : bool
        Whether to measure the loss on the first batch once more at the end.
    where : str
        Who this is, for errors.

    Raises
    ------
    RunError
        ``loss-not-finite`` naming the part, the round and the step.
    """
    small.train()
    parameters = {name: parameter for name, parameter in small.named_parameters() if parameter.requires_grad}
    optimizer = settings.open(parameters, moments)
    losses: list[float] = []
    for step, (batch, rate) in enumerate(zip(batches, lr, strict=True), start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        value = loss(small, batch)
        losses.append(float(value.detach()))
        _check_finite(losses[-1], f"{where} became {losses[-1]} at its local step {step} of {len(batches)}", rate)
        value.backward()  # type: ignore[no-untyped-call]
        if settings.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.grad_clip)
        optimizer.step()
    after = _loss_again(small, batches[0], loss) if probe else None
    if after is not None:
        _check_finite(after, f"{where} became {after} after its last local step", rate)
    return LocalRun(losses[0], after, settings.moments_after(optimizer, parameters, moments, len(batches)))


def _check_finite(loss: float, what: str, rate: float) -> None:
    if not math.isfinite(loss):
        raise RunError(
            "loss-not-finite",
            f"the loss of {what}, expected a finite number. The state before this round is kept. Lower the learning rate (it was {rate:.3g}), clip gradients, "
            "or check the data.",
        )


@torch.no_grad()
def _loss_again(small: nn.Module, batch: Any, loss: Loss) -> float:
    """The loss as in training, without a trace in the statistics of norms."""
    buffers = [(buffer, buffer.clone()) for buffer in small.buffers()]
    value = float(loss(small, batch))
    for buffer, before in buffers:
        buffer.copy_(before)
    return value


@contextlib.contextmanager
def scaled_inputs(model: nn.Module, factors: Mapping[str, float]) -> Iterator[None]:
    """Multiply what some layers read: name of a weight -> factor. The weights stay as they are, and biases are not concerned."""

    def scaled(factor: float) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, inputs: (inputs[0] * factor, *inputs[1:])

    handles = [
        model.get_submodule(tensor.rpartition(".")[0]).register_forward_pre_hook(scaled(factor)) for tensor, factor in factors.items() if factor != 1
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def with_threads(number: int | None) -> Iterator[None]:
    """Compute with so many threads: sums of another number of threads can have other last bits."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
