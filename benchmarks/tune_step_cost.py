"""What a training step of AdaPaD costs beside LoRA and AdaLoRA: time on the same batch, and memory held for the backward pass.

MiniLM, every linear layer of the encoder, rank 4, batch of 16 x 48 tokens, AdamW. The three models take turns inside one process, several rounds
of several steps, and the value of a round is the time ratio of that round, so that whatever else the machine does hits all of them.
Needs the extras hf and demo. ``python benchmarks/tune_step_cost.py [--rounds 15]``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rows

SEQ, BATCH, RANK, STEPS_A_ROUND = 48, 16, 4, 4
METHODS = ("lora", "split", "joint", "adalora")
LABELS = {
    "lora": f"peft LoraConfig(r={RANK})",
    "split": f"AdaPaDConfig(preset='balanced', r={RANK}, init_r={RANK}, target_r={RANK}), levels dealt in every step",
    "joint": f"AdaPaDConfig(schedule='joint', r={RANK}, init_r={RANK}, target_r={RANK})",
    "adalora": f"peft AdaLoraConfig(init_r={RANK * 3 // 2}, target_r={RANK}), update_and_allocate called",
}


def build(method: str) -> Any:
    """The same encoder with one kind of adapter."""
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    from partwise.tune import AdaPaDConfig
    from partwise.tune._models import load_model

    base, _ = load_model(None, task="classification", num_labels=20, seed=0)
    shared: dict[str, Any] = {"target_modules": "all-linear", "task_type": "SEQ_CLS", "lora_alpha": 2 * RANK}
    grown = {"r": RANK, "init_r": RANK, "target_r": RANK, "finish": "deflate", **shared}
    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: LoraConfig(r=RANK, **shared),
        "split": lambda: AdaPaDConfig(preset="balanced", **grown),
        "joint": lambda: AdaPaDConfig(schedule="joint", **grown),
        "adalora": lambda: AdaLoraConfig(init_r=RANK * 3 // 2, target_r=RANK, total_step=10_000, tinit=0, tfinal=100, deltaT=10, **shared),
    }
    torch.manual_seed(0)
    return get_peft_model(base, configs[method]()).train()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (BATCH, SEQ), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(20, (BATCH,), generator=generator)}


class Trainee:
    """One model, its optimiser, and a step."""

    def __init__(self, method: str) -> None:
        self.method, self.model, self.inputs, self.count = method, build(method), batch(), 0
        self.optimiser = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self) -> None:
        """One forward, backward and update."""
        self.model(**self.inputs).loss.backward()
        self.optimiser.step()
        if self.method == "adalora":
            self.model.base_model.update_and_allocate(self.count)
        self.optimiser.zero_grad()
        self.count += 1

    def seconds(self) -> float:
        """Mean time of one step over a few."""
        start = time.perf_counter()
        for _ in range(STEPS_A_ROUND):
            self.step()
        return (time.perf_counter() - start) / STEPS_A_ROUND

    def bytes_for_backward(self) -> int:
        """Bytes of the distinct storages that the forward pass keeps for the backward pass, weights of the base left out."""
        frozen = {p.untyped_storage().data_ptr() for p in self.model.parameters() if not p.requires_grad}
        held: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.model(**self.inputs).loss.backward()
        self.optimiser.zero_grad()
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        return sum(held.values()) + 4 * trained  # weights, gradients and Adam's two averages


def peak_of(method: str) -> float:
    """Peak resident memory of a fresh process that takes ten steps, in MiB."""
    code = f"import sys; sys.path.insert(0, {str(rows.ROOT / 'benchmarks')!r}); import tune_step_cost as c; c.report_peak({method!r})"
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True).stdout
    return float(said.split()[-1])


def report_peak(method: str) -> None:
    trainee = Trainee(method)
    for _ in range(10):
        trainee.step()
    status = Path("/proc/self/status").read_text()  # getrusage would report the parent's peak where that is higher
    print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024)


def compare(method: str, claim: str, ratios: list[float], *, limit: float | None, unit: str, seconds: float, note: str) -> None:
    """One row: what a method needs over what LoRA needs, measured once for each ratio."""
    measure = "ratio" if len(ratios) == 1 else "median ratio"
    row = rows.Row(
        claim=f"{claim.format(method=method)} at rank {RANK}",
        method=LABELS[method],
        baseline=LABELS["lora"],
        values=ratios,
        baseline_values=[1.0] * len(ratios),
        unit=unit,
        seeds=range(len(ratios)),
        expected="" if limit is None else f"{measure} at most {limit}",
        held=None if limit is None else statistics.median(ratios) <= limit,
        seconds=seconds,
        note=note,
    )
    rows.append("tune_step_cost", row)


def measure(num_rounds: int, num_processes: int) -> None:
    """Time, count and append the rows."""
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    trainees = {method: Trainee(method) for method in METHODS}
    for trainee in trainees.values():
        trainee.seconds()  # warm up
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(num_rounds):
        order = METHODS if number % 2 == 0 else METHODS[::-1]
        for method in order:
            times[method].append(trainees[method].seconds())
    held = {method: trainee.bytes_for_backward() for method, trainee in trainees.items()}
    spent = time.perf_counter() - start
    for method, limits in (("split", (1.03, 1.05)), ("joint", (1.03, 1.05)), ("adalora", (None, None))):
        compare(
            method,
            "a training step of {method} costs as much as one of LoRA",
            [a / b for a, b in zip(times[method], times["lora"], strict=True)],
            limit=limits[0],
            unit="ratio of seconds per step",
            seconds=spent,
            note=f"{STEPS_A_ROUND} steps a round, models take turns; LoRA took {statistics.median(times['lora']):.3f} s a step",
        )
        compare(
            method,
            "a training step of {method} holds as many bytes as one of LoRA",
            [held[method] / held["lora"]],
            limit=limits[1],
            unit="ratio of bytes",
            seconds=spent,
            note="tensors kept for the backward pass, trained weights, gradients and Adam's averages; exact count",
        )
    start = time.perf_counter()
    peaks = {method: [peak_of(method) for _ in range(num_processes)] for method in ("lora", "split", "adalora")}
    for method, limit in (("split", 1.05), ("adalora", None)):
        compare(
            method,
            "a process that trains with {method} peaks at as much memory as one with LoRA",
            [a / b for a, b in zip(peaks[method], peaks["lora"], strict=True)],
            limit=limit,
            unit="ratio of peak resident memory",
            seconds=time.perf_counter() - start,
            note=f"fresh processes of ten steps; LoRA's peak is {statistics.median(peaks['lora']):.0f} MiB, libraries included",
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=3)
    options = parser.parse_args()
    measure(options.rounds, options.processes)
