"""Peak memory of a worker of ResIST and LoFT, against local SGD and against the formula: weights, gradients and momentum of its part.

A residual network so wide, and images so few and small, that weights rule. Every measurement is a process of its own, which makes only its part, never the
whole network. Run: ``OMP_NUM_THREADS=1 python benchmarks/train_memory.py`` (under a minute).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from partwise.models.networks import build
from partwise.train import LocalSGD, LoFT, OptimizerSettings, ResIST
from rows import Row, append
from train_ist_accuracy import bare_rounds, drawn_part, kilobytes

NAME = "train_memory"
REPEATS = (0, 1, 2)
NUM_PARTS = 4
METHODS = {"ResIST": ResIST, "LoFT": partial(LoFT, include_first_section=True), "local SGD": LocalSGD}
WIDTH, BLOCKS, SIZE, BATCH_SIZE = 320, 12, 4, 4
MOST = 2.5  # times the formula: the part is kept as it came, to be sent again
SHARES = {"ResIST": 0.6, "LoFT": 0.5}  # of the memory of local SGD: a part of the blocks, or a part of the filters


def memory_of_part(name: str, width: int) -> tuple[float, float]:
    """Megabytes that training one part adds to this process, and the formula: weights, gradients and momentum in four bytes each."""

    def work(size: int) -> int:
        stages = [{"width": size, "stride": 1, "inner": [size] * BLOCKS}]
        with torch.device("meta"):
            template = build({"network": "resnet", "stem": size, "stages": stages, "channels": 3, "num_classes": 10})
        rounds = bare_rounds(METHODS[name](num_parts=NUM_PARTS, optimizer_state="carry"), template, OptimizerSettings(optimizer="sgd"))
        images = torch.randn(BATCH_SIZE, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        batch = (images, torch.randint(10, (BATCH_SIZE,), generator=torch.Generator().manual_seed(1)))
        result = rounds.work(replace(drawn_part(rounds), batches=[batch] * 3))
        return sum(tensor.numel() for key, tensor in result.tensors.items() if "running" not in key and "num_batches" not in key)

    torch.set_num_threads(1)
    work(8)  # whatever is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, from imports, is forgotten
    before = kilobytes("VmRSS")
    num_parameters = work(width)
    return (kilobytes("VmHWM") - before) * 1024 / 1e6, 12 * num_parameters / 1e6


def memory_apart(name: str, width: int) -> tuple[float, float]:
    """`memory_of_part` in a process of its own."""
    measured, formula = subprocess.run([sys.executable, __file__, name, str(width)], check=True, capture_output=True, text=True).stdout.split()
    return float(measured), float(formula)


def compare(*, repeats: Sequence[int] = REPEATS, width: int = WIDTH) -> None:
    """Rows of all methods."""
    started = time.perf_counter()
    turns = [{name: memory_apart(name, width) for name in METHODS} for _ in repeats]
    seconds = time.perf_counter() - started
    note = (
        f"Pre-activation ResNet, {BLOCKS} blocks of {width} filters, {BATCH_SIZE} images of {SIZE} x {SIZE}, SGD whose momentum is carried; the process beyond "
        "what it held after a run of 8 filters. A worker also keeps its part as it came, and temporary tensors of convolutions."
    )
    shown = {"unit": "MB", "seeds": tuple(repeats), "seconds": seconds, "note": note}
    for name in METHODS:
        measured, formula = [turn[name][0] for turn in turns], [turn[name][1] for turn in turns]
        held = all(ours <= MOST * theirs for ours, theirs in zip(measured, formula, strict=True))
        row = Row(
            claim=f"Peak memory of a worker of {name} is at most {MOST:g} times its weights, gradients and momentum",
            method=f"{name}, {NUM_PARTS} parts",
            values=tuple(measured),
            baseline="12 bytes for each parameter of the part",
            baseline_values=tuple(formula),
            expected=f"at most {MOST:g} times the formula",
            held=held,
            **shown,
        )
        append(NAME, row)
        print(name, measured, formula, flush=True)
    for name, share in SHARES.items():
        ours, theirs = [turn[name][0] for turn in turns], [turn["local SGD"][0] for turn in turns]
        row = Row(
            claim=f"A worker of {name} with {NUM_PARTS} parts needs less memory than one of local SGD",
            method=f"{name}, {NUM_PARTS} parts",
            values=tuple(ours),
            baseline=f"local SGD, {NUM_PARTS} parts",
            baseline_values=tuple(theirs),
            expected=f"ratio at most {share:g}",
            held=all(mine <= share * other for mine, other in zip(ours, theirs, strict=True)),
            **shown,
        )
        append(NAME, row)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(*memory_of_part(sys.argv[1], int(sys.argv[2])))
    else:
        compare()
