"""How fast the error of greedily selected neurons falls with their number, against neurons drawn by chance.

Two hundred ReLU neurons with random signs on some random inputs; the target is the mean of forty of them, so it lies in their hull. Greedy selection of
equal amounts should reach it with the square of the number of neurons, neurons drawn from the forty with the number. Seeds are neurons and inputs.

Run: ``python benchmarks/prune_greedy_decay.py`` (half a minute on one core).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from partwise.linalg.greedy_selection import AMOUNTS, greedy_course, greedy_subset
from rows import Row, append

NAME = "prune_greedy_decay"
SEEDS = (0, 1, 2, 3, 4)
NUM_EXAMPLES = (10, 20, 40)
FIRST, LAST = 100, 2000  # steps through which the exponent is fitted
DRAWN = (5, 10, 20, 50, 100, 200)
KEPT = (10, 20, 40)


@dataclass(frozen=True)
class Problem:
    """Neurons' contributions, one in each row, and a target that is a mean of some of them."""

    units: Tensor
    target: Tensor
    num_targets: int

    @property
    def products(self) -> tuple[Tensor, Tensor, float]:
        """What greedy selection is told."""
        return self.units @ self.units.T, self.units @ self.target, float(self.target @ self.target)


def problem(num_examples: int, *, seed: int, num_units: int = 200, num_targets: int = 40, num_features: int = 10) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_examples, num_features), (num_units, num_features), (num_units, 1)
    inputs, weights, signs = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    units = (weights @ inputs.T).relu() * signs  # (units, examples)
    return Problem(units, units[:num_targets].mean(0), num_targets)


def greedy_losses(given: Problem, *, num_steps: int = LAST) -> np.ndarray:
    """After each step."""
    return np.array(greedy_course(*given.products, num_steps=num_steps).losses)


def drawn_losses(given: Problem, numbers: Sequence[int] = DRAWN, *, seed: int, num_draws: int = 400) -> np.ndarray:
    """Mean error of neurons drawn from those that the target is the mean of, by how many."""
    generator = np.random.default_rng(seed)
    means = []
    for number in numbers:
        chosen = generator.integers(given.num_targets, size=(num_draws, number))
        outputs = given.units[torch.as_tensor(chosen)].mean(1)  # (draws, examples)
        means.append(0.5 * float((outputs - given.target).square().sum(1).mean()))
    return np.array(means)


def left(given: Problem, loss: float) -> float:
    """Squared distance from the target, beside that of nothing."""
    return 2 * loss / float(given.target @ given.target)


def exponent(numbers: Sequence[int] | np.ndarray, losses: np.ndarray) -> float:
    """Slope of a line through the logarithms."""
    return float(np.polyfit(np.log(numbers), np.log(losses), 1)[0])


def report(claim: str, values: Sequence[float], *, unit: str, started: float, expected: str, held: bool, **more: object) -> None:
    row = Row(
        claim=claim, values=tuple(values), unit=unit, seeds=SEEDS[: len(values)], seconds=time.perf_counter() - started,
        expected=expected, held=bool(held), **more,
    )  # type: ignore[arg-type]  # fmt: skip
    append(NAME, row)
    print(f"{claim}: {[f'{value:.4g}' for value in row.values]} {[f'{value:.4g}' for value in row.baseline_values]} {'held' if held else 'FAILED'}", flush=True)


def decay() -> None:
    """One row for each number of examples: the more there are, the thinner the hull, and the later the square sets in."""
    steps = np.arange(FIRST, LAST + 1)
    for num_examples in NUM_EXAMPLES:
        started = time.perf_counter()
        given = [problem(num_examples, seed=seed) for seed in SEEDS]
        ours = [exponent(steps, greedy_losses(each)[steps - 1]) for each in given]
        chance = [exponent(DRAWN, drawn_losses(each, seed=seed)) for seed, each in zip(SEEDS, given, strict=True)]
        report(
            f"The error of greedy selection falls with the square of the number of neurons: {num_examples} examples",
            ours,
            unit=f"exponent, from {FIRST} to {LAST:,} steps",
            method="greedy_course(amounts='equal')",
            baseline="neurons by chance",
            baseline_values=chance,
            started=started,
            expected="at most -1.8 in every seed, by chance between -1.2 and -0.8",
            held=all(value <= -1.8 for value in ours) and all(-1.2 <= value <= -0.8 for value in chance),
        )


def same_number() -> None:
    """Errors with as many different neurons."""
    for kept in KEPT:
        started = time.perf_counter()
        given = [problem(40, seed=seed) for seed in SEEDS]
        found = {
            amounts: [left(each, greedy_subset(*each.products, num_units=kept, max_steps=800, amounts=amounts).loss) for each in given]
            for amounts in AMOUNTS
        }
        chance = [left(each, float(drawn_losses(each, (kept,), seed=seed)[0])) for seed, each in zip(SEEDS, given, strict=True)]
        for amounts, rival, name in (("equal", chance, "neurons by chance"), ("fitted", found["equal"], "greedy_subset(amounts='equal')")):
            report(
                f"{kept} neurons chosen greedily, {amounts} amounts, come closer than {'by chance' if amounts == 'equal' else 'with equal ones'}",
                found[amounts],
                unit="relative squared error",
                method=f"greedy_subset(amounts={amounts!r})",
                baseline=name,
                baseline_values=rival,
                started=started,
                expected="lower in every seed",
                held=all(ours < theirs for ours, theirs in zip(found[amounts], rival, strict=True)),
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    decay()
    same_number()
