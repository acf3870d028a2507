"""ResIST and LoFT against local SGD and DiLoCo on CIFAR-10 at equal work, and LoFT's tickets against those of a densely trained network.

A pre-activation ResNet of 11 blocks on 9,000 images averaged to 16 x 16. All methods see equally many samples; the parts of ResIST and LoFT are smaller, so
they compute less. Each method gets the same grid of learning rates, tried once, at half length, on a validation split. Tickets of 50 and 30 % of the inner
filters are fine-tuned with the same settings, whatever they were cut from. Without the images nothing is measured, with a line that says so.
``OMP_NUM_THREADS=1 python benchmarks/train_resnets.py`` (about five minutes on one core).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from torch import nn

from images import Images, batches, cifar10, residual_network
from partwise.models import FixedFractionSampler, Part, extract
from partwise.train import DiLoCo, LocalSGD, LoFT, OptimizerSettings, ResIST, SubnetTrainer
from partwise.train._metrics import accuracy
from partwise.train.traffic import bytes_per_round
from rows import Row, append
from train_ist_accuracy import BATCH_SIZE, SEEDS, TUNING_SEED, Entry, train

NAME = "train_resnets"
BLOCKS = (1, 9, 1)
NUM_PARTS, NUM_LOCAL_STEPS, NUM_ROUNDS = 4, 10, 12
RATES = (0.05, 0.2)
SGD = OptimizerSettings(optimizer="sgd", weight_decay=5e-4)
TUNE_STEPS, TUNE_RATE = 120, 0.02  # of tickets
KEPT = (0.5, 0.3)
MARGIN = 0.02  # of accuracy; one standard error of 1,000 test images is 0.016

Scores = dict[str, list[float]]


def entries(num_rounds: int = NUM_ROUNDS) -> dict[str, Entry]:
    settings = {"num_parts": NUM_PARTS, "num_local_steps": NUM_LOCAL_STEPS}
    one = LocalSGD(num_parts=1, num_local_steps=NUM_LOCAL_STEPS, optimizer_state="carry")
    return {
        "ResIST": Entry(ResIST(**settings), num_rounds),
        "LoFT": Entry(LoFT(**settings), num_rounds),
        "local SGD": Entry(LocalSGD(**settings), num_rounds),
        "DiLoCo": Entry(DiLoCo(**settings), num_rounds),
        "one worker": Entry(one, num_rounds * NUM_PARTS),
    }


def drawn(model: nn.Module, *, keep: float, seed: int) -> nn.Module:
    """A ticket of random filters."""
    axes = LoFT().find_axes(model)
    [part] = FixedFractionSampler(keep=keep, balanced=False)(axes, [np.random.default_rng(seed)])
    return extract(model, part, axes=axes)


def largest(model: nn.Module, *, keep: float) -> nn.Module:
    """A ticket of the filters with the largest norms."""
    axes = LoFT().find_axes(model)
    part: Part = LoFT().ticket_part(model, axes, keep, np.random.default_rng(0))
    return extract(model, part, axes=axes)


def tuned_ticket(ticket: nn.Module, images: Images, *, seed: int, num_steps: int = TUNE_STEPS) -> nn.Module:
    """Fine-tuned on one worker."""
    steps = min(num_steps, NUM_LOCAL_STEPS)
    entry = Entry(LocalSGD(num_parts=1, num_local_steps=steps, optimizer_state="carry"), num_steps // steps)
    return train(ticket, entry, images, lr=TUNE_RATE, seed=seed, optimizer=SGD).model


def tickets(models: dict[str, nn.Module], *, keep: float, seed: int) -> dict[str, nn.Module]:
    return {
        "the largest filters after LoFT": largest(models["LoFT"], keep=keep),
        "the largest filters after dense training": largest(models["one worker"], keep=keep),
        "the largest filters after local SGD": largest(models["local SGD"], keep=keep),
        "random filters after LoFT": drawn(models["LoFT"], keep=keep, seed=seed),
    }


def compare(
    images: Images, *, seeds: Sequence[int] = SEEDS, rates: Sequence[float] = RATES, num_rounds: int = NUM_ROUNDS, tune_steps: int = TUNE_STEPS
) -> None:
    started = time.perf_counter()
    found: Scores = {}
    lines: dict[str, str] = {}
    models: dict[str, list[nn.Module]] = {}
    for name, entry in entries(num_rounds).items():

        def run(lr: float, seed: int, share: float = 1.0, entry: Entry = entry) -> SubnetTrainer:
            return train(residual_network(images, seed=seed, blocks=BLOCKS), entry, images, lr=lr, seed=seed, share=share, optimizer=SGD)

        scores = {lr: accuracy(run(lr, TUNING_SEED, 0.5).model, batches(images.valid)) for lr in rates}
        lr = max(scores, key=lambda rate: scores[rate])
        models[name] = [run(lr, seed).model for seed in seeds]
        found[name] = [accuracy(model, batches(images.test)) for model in models[name]]
        lines[name] = f"{entry.method!r}, lr={lr:g}, {entry.num_rounds} rounds"
        print(f"{name}: validation {scores}, test {found[name]}", flush=True)
    report_whole(images, found, lines, seeds=seeds, seconds=time.perf_counter() - started, num_rounds=num_rounds)
    for keep in KEPT:
        started, of_tickets = time.perf_counter(), dict[str, list[float]]()
        for number, seed in enumerate(seeds):
            for name, ticket in tickets({name: of_seeds[number] for name, of_seeds in models.items()}, keep=keep, seed=seed).items():
                tuned = tuned_ticket(ticket, images, seed=seed, num_steps=tune_steps)
                of_tickets.setdefault(name, []).append(accuracy(tuned, batches(images.test)))
        print(f"tickets of {keep:.0%}: {of_tickets}", flush=True)
        report_tickets(of_tickets, keep=keep, lines=lines, seeds=seeds, seconds=time.perf_counter() - started)


def report_whole(images: Images, found: Scores, lines: dict[str, str], *, seeds: Sequence[int], seconds: float, num_rounds: int) -> None:
    model = residual_network(images, seed=0, blocks=BLOCKS)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_bytes = {name: bytes_per_round(entry.method, model, optimizer=SGD).total for name, entry in entries().items()}
    papers = {"ResIST": "92.35 %, local SGD 92.90 % (CIFAR-10, 4 machines, ResNet of 33 blocks, 160 epochs)", "LoFT": None}
    for ours, paper in papers.items():
        for theirs in ("local SGD", "DiLoCo", "one worker"):
            below = float(np.mean(found[theirs]) - np.mean(found[ours]))
            append(
                NAME,
                Row(
                    claim=f"{ours} with {NUM_PARTS} parts comes within {MARGIN:g} of the test accuracy of {theirs} at as many samples, CIFAR-10",
                    method=lines[ours],
                    values=tuple(found[ours]),
                    unit="test accuracy",
                    seeds=tuple(seeds),
                    seconds=seconds,
                    baseline=lines[theirs],
                    baseline_values=tuple(found[theirs]),
                    paper=paper if theirs == "local SGD" else None,
                    expected=f"at least the baseline's mean - {MARGIN:g}",
                    held=below <= MARGIN,
                    note=f"Pre-activation ResNet of {sum(BLOCKS)} blocks, {num_parameters:,} parameters, images averaged to 16 x 16, "
                    f"{num_rounds * NUM_PARTS * NUM_LOCAL_STEPS * BATCH_SIZE:,} samples in batches of {BATCH_SIZE}, 1,000 test images; learning rate of each "
                    f"from {RATES} on a validation split. {ours} sends {num_bytes[ours] / num_bytes['local SGD']:.2f} of the bytes of local SGD.",
                ),
            )


def report_tickets(found: Scores, *, keep: float, lines: dict[str, str], seeds: Sequence[int], seconds: float) -> None:
    ours, *others = found
    sources = {"dense training": "one worker", "local SGD": "local SGD", "LoFT": "LoFT"}
    for theirs in others:
        random = theirs.startswith("random")
        margin = 0.0 if random else MARGIN
        above = float(np.mean(found[ours]) - np.mean(found[theirs]))
        append(
            NAME,
            Row(
                claim=f"A ticket of {keep:.0%}, {ours}, {'beats' if random else f'comes within {margin:g} of'} {theirs}, both fine-tuned, CIFAR-10",
                method=f"{ours}: {lines['LoFT']}",
                values=tuple(found[ours]),
                unit="test accuracy",
                seeds=tuple(seeds),
                seconds=seconds,
                baseline=f"{theirs}: {lines[sources[theirs.partition(' after ')[2]]]}",
                baseline_values=tuple(found[theirs]),
                paper="94.02 %, after GPipe 94.38 % (PreResNet-34, CIFAR-10, 50 %, 4 workers)" if "dense" in theirs and keep == 0.5 else None,
                expected="a higher mean" if random else f"at least the baseline's mean - {margin:g}",
                held=above > 0 if random else above >= -margin,
                note=f"{keep:.0%} of the inner filters of the blocks that LoFT splits; {TUNE_STEPS} steps of SGD at {TUNE_RATE:g} on one worker. All networks "
                "saw equally many samples; dense training is one worker, which made four times as many steps in a row.",
            ),
        )


def main() -> None:
    try:
        images = cifar10()
    except FileNotFoundError as error:
        print(f"Nothing is measured: {error}")
        return
    compare(images)


if __name__ == "__main__":
    main()
