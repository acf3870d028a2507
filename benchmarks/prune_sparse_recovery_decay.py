"""What i-SpaSP leaves unexplained, against the number of units kept, on hidden layers of controlled compressibility.

A network with one hidden ReLU layer: the weights that make hidden unit ``j`` have size ``j^-a``, so sorted units fall with the power ``a``, and everything
else is random. With the largest ``s`` units kept, what is left of a random reader's output falls as the norm of the others, ``s^(1/2 - a)``; that is the
prediction. Seeds are networks and inputs.

Run: ``python benchmarks/prune_sparse_recovery_decay.py`` (a minute on one core).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from partwise.linalg.sparse_recovery import Recovery, recover_units
from partwise.linalg.unit_products import pull_sizes, unit_products
from rows import Row, append

NAME = "prune_sparse_recovery_decay"
SEEDS = (0, 1, 2, 3, 4)
POWERS = (1.0, 1.5, 2.0)
KEPT = (4, 8, 16, 32, 64)
Importance = Literal["signed", "size"]


@dataclass(frozen=True)
class Layer:
    """Hidden values (inputs, units) and what reads them (units, outputs)."""

    hidden: Tensor
    weight: Tensor

    def left(self, units: Sequence[int]) -> float:
        """Relative norm of the output that is missing when only some units are there."""
        whole = self.hidden @ self.weight
        return float((whole - self.hidden[:, list(units)] @ self.weight[list(units)]).norm() / whole.norm())

    def recover(self, keep: int, importance: Importance = "signed") -> Recovery:
        """The units that i-SpaSP keeps."""
        return recover_units(self._importance(importance), self.hidden.sum(0), keep=keep, num_iterations=20)

    def _importance(self, kind: Importance) -> Callable[[Tensor], Tensor]:
        if kind == "size":
            moments = self.hidden.T @ self.hidden
            return lambda left: pull_sizes(self.weight, moments, left).sqrt()
        pulls = unit_products(self.weight, self.hidden.sum(0, keepdim=True), size=len(self.weight))
        return lambda left: pulls @ left


def layer(power: float, *, seed: int, num_units: int = 512, num_features: int = 32, num_inputs: int = 400, num_outputs: int = 128) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    inputs, first, second = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((num_inputs, num_features), (num_units, num_features), (num_units, num_outputs))
    )
    sizes = torch.arange(1, num_units + 1, dtype=torch.float64).pow(-power)[torch.randperm(num_units, generator=generator)]
    return Layer((inputs @ (first * sizes[:, None]).T).relu(), second)


def course(given: Layer, importance: Importance = "signed", *, kept: Sequence[int] = KEPT) -> np.ndarray:
    """What is left, by the number of units kept."""
    return np.array([given.left(given.recover(number, importance).units) for number in kept])


def exponent(numbers: Sequence[int], values: np.ndarray) -> tuple[float, float]:
    """Slope of a line through the logarithms, and how straight they are (share of variance that it explains)."""
    logs = np.log(numbers), np.log(values)
    return float(np.polyfit(*logs, 1)[0]), float(np.corrcoef(*logs)[0, 1] ** 2)


def report(claim: str, method: str, values: Sequence[float], *, unit: str, started: float, expected: str, held: bool, **more: object) -> None:
    row = Row(
        claim=claim, method=method, values=tuple(values), unit=unit, seeds=SEEDS[: len(values)], seconds=time.perf_counter() - started,
        expected=expected, held=bool(held), **more,
    )  # type: ignore[arg-type]  # fmt: skip
    append(NAME, row)
    print(f"{claim}: {[f'{value:.4g}' for value in row.values]} {[f'{value:.4g}' for value in row.baseline_values]} {'held' if held else 'FAILED'}", flush=True)


def decay(importance: Importance) -> None:
    """A row for each compressibility, and one that compares them."""
    began = time.perf_counter()
    steepest: list[tuple[float, ...]] = []
    for power in POWERS:
        started = time.perf_counter()
        found = [exponent(KEPT, course(layer(power, seed=seed), importance)) for seed in SEEDS]
        slopes = [slope for slope, _ in found]
        steepest.append(tuple(slopes))
        report(
            f"What i-SpaSP leaves falls with a power of the number of units kept: sizes fall as j^-{power:g}, importance {importance}",
            f"recover_units, {importance}",
            slopes,
            unit=f"exponent, from {KEPT[0]} to {KEPT[-1]} of 512 units",
            started=started,
            baseline="1/2 - a, the norm of the smaller units",
            baseline_values=[0.5 - power] * len(SEEDS),
            paper="polynomial, with a degree set by how compressible the hidden layer is",
            expected="within 0.25 of the prediction and a straight line (95 % of the variance), in every seed",
            held=all(abs(slope - (0.5 - power)) <= 0.25 and straight >= 0.95 for slope, straight in found),
        )
    report(
        f"The more compressible a hidden layer, the faster what i-SpaSP leaves falls, importance {importance}",
        f"recover_units, {importance}",
        steepest[-1],
        unit=f"exponent where sizes fall as j^-{POWERS[-1]:g}",
        started=began,
        baseline=f"sizes that fall as j^-{POWERS[0]:g}",
        baseline_values=steepest[0],
        paper="polynomial, with a degree set by how compressible the hidden layer is",
        expected=f"steeper from each of the powers {', '.join(f'{power:g}' for power in POWERS)} to the next, in every seed",
        held=all(later < earlier for pair in itertools.pairwise(steepest) for earlier, later in zip(*pair, strict=True)),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    decay("signed")
    decay("size")
