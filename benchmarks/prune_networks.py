"""Neurons of a perceptron on MNIST and filters of a small ResNet on CIFAR-10: accuracy against size, before and after fine-tuning, and the seconds it took.

Dense networks are trained once for each seed and stay in runs/ (a perceptron with layers of 300 and 100 neurons; a pre-activation ResNet of six blocks on
11,000 images averaged to 16 x 16, whose inner filters are cut). Every method gets the same 1,024 images with labels, and every pruned network the same steps
of the same fine-tuning. Methods take turns, so that a machine that slows down slows all of them. Without the images nothing is measured, with a line that
says so. Run: ``OMP_NUM_THREADS=1 python benchmarks/prune_networks.py [mnist] [cifar10] [--resume]`` (half an hour on one core).
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from images import NUM_CLASSES, Images, batches, cifar10, mnist, residual_network
from partwise.models.network_files import load_network, save_network
from partwise.models.networks import build
from partwise.prune import METHODS, apply
from partwise.train._metrics import accuracy
from prune_models import written
from resumable import KeptValues
from rows import ROOT, Row, append

NAME = "prune_networks"
SEEDS, KEPT = (0, 1, 2), (0.75, 0.5, 0.25, 0.1)
ASKED_AT = (0.5, 0.25)
# Name in the rows -> name of the method, and settings.
MEASURED: dict[str, tuple[str, dict[str, Any]]] = {
    "i-spasp": ("i-spasp", {}),
    "i-spasp, size": ("i-spasp", {"importance": "size"}),
    "greedy": ("greedy", {}),
    "magnitude": ("magnitude", {}),
    "taylor": ("taylor", {}),
    "wanda": ("wanda", {}),
    "random": ("random", {}),
}
ASKED = ("i-spasp", "greedy")
NUM_CALIBRATION, BATCH_SIZE = 1024, 64
TUNE_STEPS, TUNE_RATE = 200, 0.01
BEFORE, AFTER, SECONDS = "before fine-tuning", "after fine-tuning", "seconds"


@dataclass(frozen=True)
class Task:
    """A data set, the network for it, and how it is trained."""

    name: str
    images: Images
    make: Callable[[int], nn.Module]
    num_steps: int
    lr: float


def tasks(names: Sequence[str]) -> list[Task]:
    """Those that are named."""
    found = []
    if "mnist" in names:
        config = {"network": "mlp", "hidden": [300, 100], "num_inputs": 784, "num_classes": NUM_CLASSES, "norm": False}
        found.append(Task("MNIST", mnist(), lambda seed: build(config, seed=seed), 4000, 0.05))
    if "cifar10" in names:
        images = cifar10()
        found.append(Task("CIFAR-10", images, lambda seed: residual_network(images, seed=seed, blocks=(2, 2, 2)), 3000, 0.1))
    return found


def fit(model: nn.Module, images: Images, *, num_steps: int, lr: float, seed: int) -> nn.Module:
    """Train a model in place by SGD with momentum, over a learning rate that rises and falls; images are mirrored at random."""
    inputs, classes = images.train.tensors
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.2)
    model.train()
    for _ in range(num_steps):
        rows = torch.randint(len(inputs), (BATCH_SIZE,), generator=draws)
        batch = inputs[rows]
        if batch.ndim == 4:
            mirrored = torch.rand(len(batch), generator=draws) < 0.5
            batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
        loss = nn.functional.cross_entropy(model(batch), classes[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


def dense(task: Task, seed: int, *, folder: Path = ROOT / "runs" / NAME) -> nn.Module:
    """The trained network, from its file where there is one."""
    path = folder / f"{task.name.lower()}-{task.num_steps}-steps-{seed}"
    if not path.exists():
        started = time.perf_counter()
        save_network(fit(task.make(seed), task.images, num_steps=task.num_steps, lr=task.lr, seed=seed), path)
        print(f"{task.name}, seed {seed}: trained in {time.perf_counter() - started:.0f} s", flush=True)
    return load_network(path)


def method_of(name: str, keep: float, seed: int = 0) -> Any:
    """A method of one size."""
    known, settings = MEASURED[name]
    module, _, kind = METHODS[known].partition(":")
    return getattr(importlib.import_module(module), kind)(keep=keep, **settings, **({"seed": seed} if known == "random" else {}))


def available() -> list[str]:
    """Of what is to be measured, what the room has."""
    return [name for name, (known, _) in MEASURED.items() if known in METHODS]


def calibration(images: Images, seed: int) -> list[Any]:
    """Batches of training images with labels, others for each seed."""
    inputs, classes = images.train.tensors
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:NUM_CALIBRATION]
    return list(zip(inputs[rows].split(128), classes[rows].split(128), strict=True))


def measured(task: Task, model: nn.Module, name: str, keep: float, seed: int, *, tune_steps: int) -> dict[str, float]:
    """Accuracy of one pruned network before and after fine-tuning, and how long its units took to choose."""
    data = calibration(task.images, seed)
    started = time.perf_counter()
    plan = method_of(name, keep, seed).plan(model, data)
    seconds = time.perf_counter() - started
    small = apply(model, plan)
    found = {SECONDS: seconds, BEFORE: accuracy(small, batches(task.images.test))}
    fit(small, task.images, num_steps=tune_steps, lr=TUNE_RATE, seed=1000 + seed)
    share = sum(map(torch.Tensor.numel, small.parameters())) / sum(map(torch.Tensor.numel, model.parameters()))
    return found | {AFTER: accuracy(small, batches(task.images.test)), "share": share}


def run(task: Task, values: KeptValues, *, seeds: Sequence[int] = SEEDS, kept: Sequence[float] = KEPT, tune_steps: int = TUNE_STEPS) -> None:
    """All rows of one data set."""
    names = available()
    found: dict[tuple[str, float], list[dict[str, float]]] = {}
    whole = []
    for seed in seeds:
        model = dense(task, seed)
        whole.append(values.of(f"whole, seed {seed}", lambda model=model: accuracy(model, batches(task.images.test))))
        for keep in kept:
            for name in names:

                def measure(model: nn.Module = model, name: str = name, keep: float = keep, seed: int = seed) -> dict[str, float]:
                    return measured(task, model, name, keep, seed, tune_steps=tune_steps)

                found.setdefault((name, keep), []).append(values.of(f"{name}, keep {keep}, seed {seed}", measure))
    for keep in kept:
        for name in names:
            for when in (BEFORE, AFTER):
                append(NAME, accuracy_row(task, when, keep, name, found, whole, seeds, values.seconds, tune_steps))
        print(task.name, f"{keep:.0%}", {name: f"{statistics.fmean(each[BEFORE] for each in found[name, keep]):.3f}" for name in names}, flush=True)
    for name in names:
        for keep in kept if name == "i-spasp" else (0.5,):
            append(NAME, seconds_row(task, keep, name, found, seeds, values.seconds))


def accuracy_row(
    task: Task,
    when: str,
    keep: float,
    name: str,
    found: Mapping[tuple[str, float], list[dict[str, float]]],
    whole: Sequence[float],
    seeds: Sequence[int],
    seconds: float,
    tune_steps: int,
) -> Row:
    """One method at one size against magnitude; magnitude against the whole network."""
    ours = [each[when] for each in found[name, keep]]
    theirs = list(whole) if name == "magnitude" else [each[when] for each in found["magnitude", keep]]
    asked = name in ASKED and keep in ASKED_AT and when == BEFORE
    steps = f" {tune_steps} steps of SGD at {TUNE_RATE:g}." if when == AFTER else ""
    return Row(
        claim=f"Test accuracy with {keep:.0%} of the units, {when}: {task.name}, {name}",
        method=written(method_of(name, keep)),
        values=tuple(ours),
        unit="test accuracy",
        seeds=tuple(seeds),
        seconds=seconds,
        baseline="whole network" if name == "magnitude" else written(method_of("magnitude", keep)),
        baseline_values=tuple(theirs),
        expected="at least that of magnitude, in every seed" if asked else "",
        held=all(mine >= other for mine, other in zip(ours, theirs, strict=True)) if asked else None,
        note=f"{100 * (statistics.fmean(ours) - statistics.fmean(theirs)):+.1f} points by means; the whole network {statistics.fmean(whole):.4f}; "
        f"{found[name, keep][0]['share']:.0%} of its parameters; {NUM_CALIBRATION:,} images to choose by.{steps}",
    )


def seconds_row(
    task: Task, keep: float, name: str, found: Mapping[tuple[str, float], list[dict[str, float]]], seeds: Sequence[int], seconds: float
) -> Row:
    """How long choosing took; i-SpaSP against greedy selection."""
    ours = [each[SECONDS] for each in found[name, keep]]
    compared = name == "i-spasp" and ("greedy", keep) in found
    theirs = [each[SECONDS] for each in found["greedy", keep]] if compared else []
    ratio = statistics.median(theirs) / statistics.median(ours) if compared else 1.0
    return Row(
        claim=f"Seconds to choose {keep:.0%} of the units: {task.name}, {name}",
        method=written(method_of(name, keep)),
        values=tuple(ours),
        unit="seconds",
        seeds=tuple(seeds),
        seconds=seconds,
        baseline=written(method_of("greedy", keep)) if compared else "",
        baseline_values=tuple(theirs),
        paper="several orders of magnitude cheaper than greedy selection (ImageNet)" if compared else None,
        expected="less than greedy selection, in every seed" if compared else "",
        held=all(mine < other for mine, other in zip(ours, theirs, strict=True)) if compared else None,
        note=(f"Greedy selection takes {ratio:.2f} times as long, by medians. " if compared else "") + f"{NUM_CALIBRATION:,} images, 1 thread.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="any of mnist, cifar10; both if none is named")
    parser.add_argument("--resume", action="store_true", help="use values that were measured before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        chosen = tasks(options.parts or ("mnist", "cifar10"))
    except FileNotFoundError as error:
        print(f"Nothing is measured: {error}")
        return
    for task in chosen:
        run(task, KeptValues(f"{NAME}/{task.name.lower()}", resume=options.resume))


if __name__ == "__main__":
    main()
