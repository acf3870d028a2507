"""Bytes on the wire until a validation loss is reached: DDP, local SGD, DiLoCo, and IST on MNIST or TwIST on characters of Shakespeare.

The level is what an ordinary run with the batch of all workers together has reached at half of its steps, the mean of three rounds. DDP makes the same
steps as such a run, so its bytes are computed (a ring all-reduce at every step); those of the others are counted, down and up, with AdamW's moments where
they are carried. Learning rates are constant after a warm-up, chosen for each method from a grid of the same size by the loss of one run of another seed,
half as long as the ordinary one. A run that does not arrive in some times the samples of the ordinary run (eight on MNIST, where a sample costs IST a
fifth of the multiplications; two and a half on text) counts with what it sent by then, and the note says so. Without the data nothing is measured, with a
line that says so. ``OMP_NUM_THREADS=1 python benchmarks/train_traffic.py [--only mnist]`` (about six minutes on one core).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from images import batches, loaders, mnist, perceptron
from partwise.models import with_tensors
from partwise.models.networks import build
from partwise.runs import Stopped
from partwise.train import IST, DiLoCo, LocalSGD, OptimizerSettings, SubnetTrainer, TwIST
from partwise.train._local import task_loss
from partwise.train._text import TokenBlocks
from partwise.train.method import SubnetMethod
from partwise.train.traffic import data_parallel_bytes
from rows import Row, append

NAME = "train_traffic"
SEEDS = (0, 1, 2)
TUNING_SEED = 100
NUM_PARTS, NUM_LOCAL_STEPS = 4, 10
NUM_WARMUP_STEPS = 15
LEVEL_AT = 0.5  # of the ordinary run


@dataclass(frozen=True)
class Task:
    """What is trained: a model for each seed, data, and the optimiser of local steps with the rates to choose from."""

    name: str
    what: str
    model: Callable[[int], nn.Module]
    dataset: Any
    valid: Any  # one batch
    batch_size: int  # of one worker
    optimizer: OptimizerSettings
    rates: tuple[float, ...]
    num_rounds: int  # of the ordinary run
    longest: float = 2.5  # of its samples, that a run may take


@dataclass(frozen=True)
class Course:
    """A run: validation loss and bytes after every round."""

    losses: list[float]
    num_bytes: list[int]

    def rounds_to(self, level: float) -> int | None:
        """Rounds until the loss is at most this, or None."""
        return next((number for number, loss in enumerate(self.losses, start=1) if loss <= level), None)


def mnist_task() -> Task:
    images = mnist(num_valid=2000)
    [valid] = batches(images.valid, 2000)
    what = "hidden layers (256, 256) with batch normalisation, SGD with momentum, which starts afresh every round"
    settings = OptimizerSettings(optimizer="sgd", schedule="constant")
    return Task(
        "MNIST", what, lambda seed: perceptron(images, hidden=(256, 256), seed=seed), images.train, valid, 32, settings, (0.01, 0.04), 24, 8.0
    )


def text_task(*, context: int = 48) -> Task:
    text = loaders().tiny_shakespeare()
    symbols = sorted(set(text))
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    tokens = np.array([numbers[symbol] for symbol in text], dtype=np.int32)
    cut = len(tokens) * 9 // 10
    held_out = TokenBlocks(tokens[cut:], context).evenly(100)
    valid = {name: torch.stack([held_out[index][name] for index in range(len(held_out))]) for name in held_out[0]}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 256}
    config = {"network": "llama", "vocab_size": len(symbols), "max_position_embeddings": context} | sizes
    what = f"Llama of 2 layers, width 64, {context} characters, AdamW, whose moments are carried"
    settings = OptimizerSettings(schedule="constant")
    return Task(
        "Tiny Shakespeare", what, lambda seed: build(config, seed=seed), TokenBlocks(tokens[:cut], context), valid, 8, settings, (0.003, 0.01), 12
    )


def course(task: Task, method: SubnetMethod, *, lr: float, seed: int, num_rounds: int, level: float | None = None, batch_size: int = 0) -> Course:
    """A run until the level is reached, or to the end."""
    warmup = min(1.0, NUM_WARMUP_STEPS / (num_rounds * NUM_LOCAL_STEPS))  # as long however long a run may last
    trainer = SubnetTrainer(
        task.model(seed), method, optimizer=replace(task.optimizer, lr=lr, warmup=warmup), seed=seed, num_threads=1, probe_every=0
    )
    seen = Course([], [])

    def note(report: Any, trainer: SubnetTrainer) -> None:
        seen.losses.append(validation_loss(trainer, task.valid))
        seen.num_bytes.append((seen.num_bytes[-1] if seen.num_bytes else 0) + report.bytes_down + report.bytes_up)

    loader = DataLoader(task.dataset, batch_size=batch_size or task.batch_size, shuffle=True)
    with contextlib.suppress(Stopped):
        trainer.fit(loader, num_rounds=num_rounds, progress=note, should_stop=lambda: level is not None and seen.losses[-1] <= level)
    return seen


def validation_loss(trainer: SubnetTrainer, batch: Any) -> float:
    """Of the whole model; batch normalisation takes the statistics of the validation batch, which costs nothing."""
    assert trainer.state is not None
    model = with_tensors(trainer._template, {name: tensor.clone() for name, tensor in trainer.state.tensors.items()})
    with torch.no_grad():
        return float(task_loss(trainer.method.deployed(model, trainer.axes).train(), batch))


def rivals(task: Task) -> dict[str, SubnetMethod]:
    settings = {"num_parts": NUM_PARTS, "num_local_steps": NUM_LOCAL_STEPS}
    ours = {"IST": IST(**settings)} if task.name == "MNIST" else {"TwIST": TwIST(**settings)}
    return {**ours, "local SGD": LocalSGD(**settings), "DiLoCo": DiLoCo(**settings)}


def measure(task: Task, *, seeds: Sequence[int] = SEEDS) -> None:
    started, num_rounds = time.perf_counter(), task.num_rounds
    longest = round(task.longest * num_rounds)
    dense = LocalSGD(num_parts=1, num_local_steps=NUM_LOCAL_STEPS, optimizer_state="carry")
    together = NUM_PARTS * task.batch_size
    tried = {lr: course(task, dense, lr=lr, seed=TUNING_SEED, num_rounds=num_rounds, batch_size=together) for lr in task.rates}
    lr = min(tried, key=lambda rate: tried[rate].losses[-1])
    reached = round(LEVEL_AT * num_rounds)
    level = float(np.mean(tried[lr].losses[max(0, reached - 3) : reached]))
    num_parameters = sum(parameter.numel() for parameter in task.model(0).parameters())
    bytes_of_step = data_parallel_bytes(num_parameters, num_workers=NUM_PARTS)
    print(f"{task.name}: level {level:.4f}, ordinary run at lr={lr:g}: {[round(loss, 3) for loss in tried[lr].losses]}", flush=True)

    found: dict[str, list[float]] = {}
    lines = {"DDP": f"DDP, {NUM_PARTS} workers, lr={lr:g}"}
    missed: list[str] = []

    def note(name: str, courses: list[Course], num_bytes: Callable[[Course], float]) -> None:
        found[name] = [num_bytes(run) for run in courses]
        if late := sum(run.rounds_to(level) is None for run in courses):
            missed.append(f"{name} did not arrive in {late} of {len(courses)} runs")
        print(f"{name}: rounds {[run.rounds_to(level) for run in courses]}, bytes {found[name]}", flush=True)

    runs = [course(task, dense, lr=lr, seed=seed, num_rounds=longest, level=level, batch_size=together) for seed in seeds]
    note("DDP", runs, lambda run: float(bytes_of_step * NUM_LOCAL_STEPS * len(run.losses)))
    for name, method in rivals(task).items():
        attempts = {lr: min(course(task, method, lr=lr, seed=TUNING_SEED, num_rounds=num_rounds // 2).losses) for lr in task.rates}
        best = min(attempts, key=lambda rate: attempts[rate])
        lines[name] = f"{method!r}, lr={best:g}"
        note(
            name, [course(task, method, lr=best, seed=seed, num_rounds=longest, level=level) for seed in seeds], lambda run: float(run.num_bytes[-1])
        )
    report(task, found, lines, missed, level=level, seeds=seeds, seconds=time.perf_counter() - started)


def report(
    task: Task,
    found: dict[str, list[float]],
    lines: dict[str, str],
    missed: Sequence[str],
    *,
    level: float,
    seeds: Sequence[int],
    seconds: float,
) -> None:
    """A row for each method of ours and each rival."""
    samples = task.num_rounds * NUM_LOCAL_STEPS * NUM_PARTS * task.batch_size
    for ours in (name for name in found if name in {"IST", "TwIST"}):
        for theirs in (name for name in found if name != ours):
            append(
                NAME,
                Row(
                    claim=f"{ours} with {NUM_PARTS} parts sends fewer bytes than {theirs} until the same validation loss, {task.name}",
                    method=lines[ours],
                    values=tuple(found[ours]),
                    unit="bytes, down and up",
                    seeds=tuple(seeds),
                    seconds=seconds,
                    baseline=lines[theirs],
                    baseline_values=tuple(found[theirs]),
                    expected="a lower mean, every run of it arriving",
                    held=bool(np.mean(found[ours]) < np.mean(found[theirs])) and not any(line.startswith(f"{ours} did") for line in missed),
                    note=f"Level {level:.3f}, of an ordinary run at {LEVEL_AT:.0%} of {samples:,} samples; {task.what}; batches of {task.batch_size} a worker, "
                    f"rates {task.rates}; at most {task.longest:g} times as many samples. {'; '.join(missed) + '.' if missed else 'All runs arrived.'}",
                ),
            )


def main(arguments: Sequence[str] = ()) -> None:
    known = {"mnist": mnist_task, "text": text_task}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=known)
    only = parser.parse_args(arguments).only
    try:
        tasks = [make() for name, make in known.items() if only in {None, name}]
    except FileNotFoundError as error:
        print(f"Nothing is measured: {error}")
        return
    for task in tasks:
        measure(task)


if __name__ == "__main__":
    main(sys.argv[1:])
