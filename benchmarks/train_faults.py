"""What lost workers do to training by subnetworks.

Workers of Ray are ended with ``kill -9``, one in every round: its part is sent again and the result has the bits of a run without faults. And an engine
that loses one of four results for good in every round: training ends, coverage is reported, and the loss stays near that of the undisturbed run.

Run: ``python benchmarks/train_faults.py [--no-ray]`` (about four minutes on a core of its own).
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from partwise.engine.inline import inline
from partwise.engine.ray_actors import RayActors
from partwise.models import tensors_of
from partwise.rounds import part_seed
from partwise.train import IST, SubnetTrainer, TwIST
from partwise.train._local import task_loss
from partwise.train._metrics import mean_loss
from partwise.train.method import SubnetMethod
from rows import Row, append

NAME = "train_faults"
SEEDS = (0, 1, 2)
NUM_PARTS = 4


@dataclass(frozen=True)
class KilledOnce:
    """Rounds in which one part ends its worker the first time that somebody works on it: part 0 in round 1, part 1 in round 2, and so on."""

    rounds: Any
    folder: Path

    def work(self, part: Any) -> Any:
        """What the rounds return, unless this is the moment."""
        if part.index == (part.round_number - 1) % NUM_PARTS:
            try:
                (self.folder / str(part.round_number)).touch(exist_ok=False)  # a file outlives the process
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return self.rounds.work(part)

    def check(self, part: Any, result: Any) -> None:
        """As the rounds do."""
        self.rounds.check(part, result)


class Killing:
    """A Ray engine with a killed worker in every round."""

    def __init__(self, workers: RayActors, folder: Path) -> None:
        self.workers, self.folder, self.traffic = workers, folder, workers.traffic
        self._killed: KilledOnce | None = None

    def __call__(self, method: Any, parts: Sequence[Any]) -> list[Any]:
        """Results of all parts."""
        if self._killed is None or self._killed.rounds is not method:
            self._killed = KilledOnce(method, self.folder)
        return self.workers(self._killed, parts)


class Lossy:
    """The inline engine, without one result of every round; which one is drawn from a seed. It is lost for good."""

    def __init__(self, *, seed: int) -> None:
        self.seed, self.num_rounds = seed, 0

    def __call__(self, method: Any, parts: Sequence[Any]) -> list[Any]:
        """Results that arrived."""
        self.num_rounds += 1
        lost = np.random.default_rng(part_seed(self.seed, round_number=self.num_rounds, part=1234)).integers(len(parts))
        return inline(method, [part for position, part in enumerate(parts) if position != lost])


@dataclass
class Problem:
    """A method with a model and data."""

    name: str
    method: SubnetMethod
    model: nn.Module
    loader: Any
    valid: list[Any]
    num_rounds: int

    def train(self, *, seed: int, engine: Any = "inline", num_rounds: int | None = None) -> SubnetTrainer:
        """A finished run."""
        trainer = SubnetTrainer(self.model, self.method, engine=engine, seed=seed, num_threads=1)
        return trainer.fit(self.loader, num_rounds=num_rounds or self.num_rounds)

    def loss_of(self, trainer: SubnetTrainer) -> float:
        """Held-out loss of the whole model."""
        return mean_loss(trainer.model, self.valid, loss=task_loss)


def problems(*, num_rounds: int = 30) -> list[Problem]:
    """A small decoder on the source of the standard library, and a perceptron on digits."""
    from partwise.models.networks import build
    from partwise.train.task import TaskSettings, open_task

    text = open_task("twist", TaskSettings(context=64, batch_size=8, vocab_size=512, test_tokens=16384), seed=0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    network = {"network": "llama", **sizes, "vocab_size": len(text.tokenizer), "max_position_embeddings": 64}  # type: ignore[arg-type]
    digits = open_task("ist", TaskSettings(), seed=0)
    twist, ist = TwIST(num_parts=NUM_PARTS, num_local_steps=10), IST(num_parts=NUM_PARTS, num_local_steps=10)
    return [
        Problem("standard library, 2 layers of 64", twist, build(network), text.loader, text.valid, num_rounds),
        Problem("digits, 64-256-256-10", ist, digits.model, digits.loader, digits.valid, 2 * num_rounds),
    ]


def same_bits(one: SubnetTrainer, other: SubnetTrainer) -> bool:
    first, second = tensors_of(one.model), tensors_of(other.model)
    return all(torch.equal(first[name], second[name]) for name in first)


def killed_run(problem: Problem, *, seed: int, num_rounds: int) -> tuple[SubnetTrainer, int]:
    """A run on two Ray workers of which one is killed in every round, and how many were lost."""
    with tempfile.TemporaryDirectory() as folder, RayActors(2) as workers:
        trainer = problem.train(seed=seed, engine=Killing(workers, Path(folder)), num_rounds=num_rounds)
        return trainer, workers.traffic.num_lost


def report(claim: str, method: str, values: Sequence[float], *, expected: str, held: bool, started: float, **more: Any) -> None:
    row = Row(
        claim=claim, method=method, values=tuple(values), seeds=SEEDS[: len(values)], expected=expected, held=bool(held),
        seconds=time.perf_counter() - started, **more,
    )  # fmt: skip
    append(NAME, row)
    print(f"{claim} [{method}]: {[f'{value:.4g}' for value in values]} {[f'{value:.4g}' for value in row.baseline_values]} {row.held}", flush=True)


def killed(problem: Problem, *, num_rounds: int, seeds: Sequence[int]) -> None:
    started, lost, losses, plain, same, coverage = time.perf_counter(), [], [], [], [], []
    for seed in seeds:
        undisturbed = problem.train(seed=seed, num_rounds=num_rounds)
        trainer, num_lost = killed_run(problem, seed=seed, num_rounds=num_rounds)
        lost.append(num_lost)
        same.append(same_bits(trainer, undisturbed))
        losses.append(problem.loss_of(trainer))
        plain.append(problem.loss_of(undisturbed))
        coverage.append(min(one.coverage for one in trainer.history))
    report(
        f"A worker killed in every round changes nothing: {problem.name}",
        repr(problem.method),
        losses,
        unit="held-out loss",
        baseline="undisturbed, inline",
        baseline_values=tuple(plain),
        expected="every run ends with the bits of the undisturbed one",
        held=all(same) and min(lost) >= num_rounds,
        started=started,
        note=f"{num_rounds} rounds on 2 Ray workers; {' and '.join(map(str, lost))} workers lost and replaced, their parts sent again. Coverage reported: "
        f"{min(coverage):.0%} at least.",
    )


def lossy(problem: Problem) -> None:
    started, losses, plain, fewer, coverage = time.perf_counter(), [], [], [], []
    for seed in SEEDS:
        trainer = problem.train(seed=seed, engine=Lossy(seed=seed))
        assert all(one.num_arrived == NUM_PARTS - 1 for one in trainer.history)
        losses.append(problem.loss_of(trainer))
        coverage.append(float(np.mean([one.coverage for one in trainer.history])))
        plain.append(problem.loss_of(problem.train(seed=seed)))
        fewer.append(problem.loss_of(problem.train(seed=seed, num_rounds=round(problem.num_rounds * (1 - 1 / NUM_PARTS)))))
    ratios = [mine / theirs for mine, theirs in zip(losses, plain, strict=True)]
    report(
        f"One of {NUM_PARTS} results lost for good in every round: {problem.name}",
        repr(problem.method),
        losses,
        unit="held-out loss",
        baseline="undisturbed",
        baseline_values=tuple(plain),
        expected="every run ends; loss within 2 % of the undisturbed run, in the median",
        held=float(np.median(ratios)) <= 1.02,
        started=started,
        note=f"{problem.num_rounds} rounds; ratios {', '.join(f'{ratio:.3f}' for ratio in ratios)}. A quarter of the work is lost with the results: "
        f"an undisturbed run with a quarter fewer rounds ends at {np.median(fewer):.4g}. Mean coverage reported: {np.mean(coverage):.0%}.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--no-ray", action="store_true", help="leave out the part that starts worker processes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    twist, ist = problems()
    lossy(ist)
    lossy(twist)
    if not arguments.no_ray:
        killed(ist, num_rounds=4, seeds=SEEDS)
        killed(twist, num_rounds=4, seeds=SEEDS[:1])


if __name__ == "__main__":
    main()
