"""The training loop: plain PyTorch, one pass of AdamW, checkpoints from which a killed run continues to the same bits.

Everything that decides a step is either a pure function of its number (batch, learning rate) or lies in the checkpoint: trained parameters,
optimiser state, the method's own state, and torch's random numbers (dropout draws from them).
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partwise.checkpoint import load_checkpoint, save_checkpoint
from partwise.checks import RunError
from partwise.runs import stop_flag
from partwise.tune.recipe import Plan, Recipe

if TYPE_CHECKING:
    from peft import PeftModel

    from partwise.runs import RunFolder

logger = logging.getLogger(__name__)

MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Numbers the loop needs; see ``TuneSettings`` for their meaning to a user."""

    lr: float
    weight_decay: float
    seed: int
    checkpoint_every: int


@dataclass(kw_only=True)
class Progress:
    """Where a run stands.

    Parameters
    ----------
    step : int
        Optimiser steps done.
    done : bool
        Whether training is over: all steps taken, or the method has stopped.
    seconds : float
        Time spent training, over all processes that worked on the run.
    ranks : dict of str to int
        Ranks as they were last logged.
    first_ranks : dict of str to int
        Ranks before the first step.
    """

    step: int = 0
    done: bool = False
    seconds: float = 0.0
    ranks: dict[str, int] = field(default_factory=dict)
    first_ranks: dict[str, int] = field(default_factory=dict)
    seconds_per_step: float | None = None


def train(
    model: PeftModel,
    recipe: Recipe,
    plan: Plan,
    *,
    batches: Callable[[int], dict[str, Tensor]],
    settings: LoopSettings,
    run: RunFolder,
    checkpoint: Path | None,
    held_out_loss: Callable[[], float],
    report: Callable[[int, float], None],
) -> Progress:
    """Train until the plan's last step, or until the recipe says stop. The last state is always checkpointed.

    Parameters
    ----------
    batches : callable
        Training batch of a step, from 0; must be a pure function.
    run : RunFolder
        Receives the rows of metrics and the checkpoints. Rows carry the number of steps done.
    checkpoint : Path or None
        Continue from here; None starts anew.
    report : callable
        Told the number of steps done and the loss after every step.

    Raises
    ------
    RunError
        ``diverged`` when a loss is not finite; the last checkpoint is from before.
    KeyboardInterrupt
        After Ctrl-C, once the state is saved.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    if checkpoint is None:
        torch.manual_seed(settings.seed)
        progress = Progress(ranks=recipe.ranks(model))
        progress.first_ranks = progress.ranks
        run.append_metrics({"kind": "growth", "step": 0, "ranks": progress.ranks})
    else:
        progress = restore(checkpoint, model, recipe, trained, optimizer)
        run.rewind(progress.step)
    durations: list[float] = []
    model.train()
    with stop_flag() as stop:
        while not progress.done:
            start = time.perf_counter()
            loss, go_on = take_step(
                model, recipe, plan, optimizer, batches=batches, settings=settings, step=progress.step, held_out_loss=held_out_loss
            )
            durations.append(time.perf_counter() - start)
            progress.step += 1
            progress.seconds += durations[-1]
            progress.seconds_per_step = statistics.median(durations)
            progress.done = not go_on or progress.step >= plan.num_steps
            log_step(run, recipe, plan, model, progress, loss=loss, lr=settings.lr)
            report(progress.step, loss)
            stopped = stop.is_set() and not progress.done
            if progress.done or stopped or progress.step % settings.checkpoint_every == 0:
                run.sync()
                save(run.checkpoints, model, recipe, trained, optimizer, progress)
            if stopped:
                raise KeyboardInterrupt
    return progress


def take_step(
    model: PeftModel,
    recipe: Recipe,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    *,
    batches: Callable[[int], dict[str, Tensor]],
    settings: LoopSettings,
    step: int,
    held_out_loss: Callable[[], float],
) -> tuple[float, bool]:
    """One optimiser step. Returns the training loss and whether the recipe wants another step."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * recipe.lr_factor(step, plan)
    loss = model(**batches(step)).loss
    value = float(loss.detach())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], MAX_GRAD_NORM)
    if not math.isfinite(value) or not torch.isfinite(norm):
        raise RunError(
            "diverged",
            f"at step {step + 1} the training loss is {value:g} and the gradient's norm {float(norm):g} with --lr {settings.lr:g}, expected finite numbers. "
            f"Start again with a lower --lr, say {settings.lr / 3:.1g}; the last checkpoint is kept.",
        )
    optimizer.step()
    go_on = recipe.after_step(model, step, plan, held_out_loss=held_out_loss)
    optimizer.zero_grad(set_to_none=True)
    return value, go_on


def log_step(run: RunFolder, recipe: Recipe, plan: Plan, model: PeftModel, progress: Progress, *, loss: float, lr: float) -> None:
    """One row for the step, and one for the ranks where they changed."""
    run.append_metrics({"kind": "train", "step": progress.step, "loss": loss, "lr": lr * recipe.lr_factor(progress.step - 1, plan)})
    ranks = recipe.ranks(model)
    if ranks != progress.ranks:
        progress.ranks = ranks
        run.append_metrics({"kind": "growth", "step": progress.step, "ranks": ranks})


def save(folder: Path, model: PeftModel, recipe: Recipe, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write a checkpoint: tensors under ``param.``, ``optim.``, ``extra.`` and ``rng.``, everything else as JSON."""
    tensors = {f"param.{name}": parameter.detach() for name, parameter in trained.items()}
    numbers: dict[str, Any] = {}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optim.{key}.{name}"] = value
            else:
                numbers[f"{key}.{name}"] = value
    tensors |= {f"extra.{name}": value for name, value in recipe.extra_state(model).items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    save_checkpoint(folder, step=progress.step, tensors=tensors, state={"progress": vars(progress), "optimizer": numbers})


def restore(checkpoint: Path, model: PeftModel, recipe: Recipe, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Progress:
    """Put the state of ``save`` back, random numbers last.

    Raises
    ------
    RunError
        ``checkpoint-mismatch`` when it does not hold the parameters that this run trains.
    """
    tensors, state = load_checkpoint(checkpoint)
    saved = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    differing = sorted(
        name for name in saved.keys() | trained.keys() if name not in saved or name not in trained or saved[name].shape != trained[name].shape
    )
    if differing:
        raise RunError(
            "checkpoint-mismatch",
            f"{checkpoint} does not fit the model: {len(differing)} of {len(trained)} trained parameters are missing or of another shape, the first is "
            f"{differing[0]}. Resume with the library versions that run.json names, or start again with a new --out.",
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    groups = optimizer.state_dict()["param_groups"]
    names = list(trained)
    optimizer_state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items() | state["optimizer"].items():
        if key.startswith("optim.") or key in state["optimizer"]:
            kind, _, name = key.removeprefix("optim.").partition(".")
            optimizer_state.setdefault(names.index(name), {})[kind] = value
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    recipe.load_extra_state(model, {name.removeprefix("extra."): value for name, value in tensors.items() if name.startswith("extra.")})
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return Progress(**state["progress"])
