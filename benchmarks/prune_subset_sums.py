"""How many random numbers it takes to build a weight as the sum of some of them, if none of them may move, and if each may by a little.

Candidates are uniform between -1 and 1, targets between -1/2 and 1/2, and all subsets are tried. The paper's theorem says that fewer candidates are needed by
a factor of order 1 / (1 + epsilon); its constant is not known to us, so 1 is asked for. Beside it a rule of our own is measured: a subset of about n / 2
members moves its sum by up to epsilon n / 2, and sums lie as dense as 2^n / sqrt(n) there, which gives how many are needed with epsilon from how many are
needed without.

Run: ``python benchmarks/prune_subset_sums.py`` (about half a minute on one core).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from partwise.linalg.subset_sums import errors_by_size
from rows import Row, append

NAME = "prune_subset_sums"
SEEDS = (0, 1, 2, 3, 4)
NUM_DRAWS = 1000
MOST = 16  # candidates
RADII = (0.001, 0.01, 0.1)
ERRORS = (0.01, 0.001)
CHANCE = 0.9
METHOD = "best_subset_errors(candidates, targets, radius={radius:g})"

Distances = list[np.ndarray]
"""Number of candidates -> distance for each draw and subset size, (draws, sizes); entry 0 is for none."""


def measure(seed: int, *, num_draws: int = NUM_DRAWS, most: int = MOST) -> Distances:
    """Draws are nested: with one candidate more, a draw keeps those that it had."""
    generator = np.random.default_rng(seed)
    candidates, targets = generator.uniform(-1, 1, (num_draws, most)), generator.uniform(-0.5, 0.5, (num_draws, 1))
    return [np.stack([errors_by_size(row[:count], target)[:, 0] for row, target in zip(candidates, targets, strict=True)]) for count in range(most + 1)]


def errors(distances: np.ndarray, radius: float) -> np.ndarray:
    """Error of the best subset in each draw, (draws,)."""
    return np.asarray(np.maximum(0, distances - radius * np.arange(distances.shape[1])).min(axis=1))


def number_needed(distances: Distances, *, radius: float, error: float, chance: float = CHANCE) -> float:
    """Candidates with which a share ``chance`` of the draws has at most that error, by linear interpolation between whole numbers."""
    reached = [float((errors(each, radius) <= error).mean()) for each in distances]
    after = next((count for count, share in enumerate(reached) if share >= chance), None)
    if after is None:
        raise ValueError(f"{len(distances) - 1} candidates reach an error of {error} in {reached[-1]:.0%} of the draws, expected {chance:.0%}. Take more.")
    return after - 1 + (chance - reached[after - 1]) / (reached[after] - reached[after - 1]) if after else 0.0


def rule(needed: float, *, radius: float, error: float) -> float:
    """Number that is needed with a radius, from the number without: the same density of sums times the width that each of them covers."""
    found = needed
    for _ in range(100):
        found = max(1.0, needed - math.log2(1 + radius * found / (2 * error)) + 0.5 * math.log2(found / needed))
    return found


def report(
    claim: str, method: str, values: Sequence[float], *, unit: str, started: float, expected: str = "", held: bool | None = None, **more: object
) -> None:
    row = Row(
        claim=claim, method=method, values=tuple(values), unit=unit, seeds=SEEDS[: len(values)], seconds=time.perf_counter() - started,
        expected=expected, held=held, **more,
    )  # type: ignore[arg-type]  # fmt: skip
    append(NAME, row)
    verdict = {True: "held", False: "FAILED", None: "-"}[held]
    print(f"{claim}: {[f'{value:.4g}' for value in values]} against {[f'{value:.4g}' for value in row.baseline_values]} {verdict}", flush=True)


def decay(runs: Sequence[Distances], started: float) -> None:
    """Without a radius the error falls as fast as the sums get dense."""
    low, high = 6, MOST
    factors = [(np.median(errors(run[high], 0)) / np.median(errors(run[low], 0))) ** (1 / (high - low)) for run in runs]
    theory = 0.5 * (high / low) ** (0.5 / (high - low))
    report(
        "One candidate more makes the error of the best subset sum smaller by as much as subsets get denser",
        METHOD.format(radius=0),
        factors,
        unit="factor of the median error for one more",
        started=started,
        baseline="sqrt(n) / 2^n",
        baseline_values=(theory,) * len(runs),
        expected="within 5 % of the formula, for every seed",
        held=all(abs(factor / theory - 1) <= 0.05 for factor in factors),
        note=f"From {low} to {high} candidates.",
    )


def means(runs: Sequence[Distances], started: float) -> None:
    """Mean errors, for information: more room can only make them smaller."""
    for count in (6, 9, 12):
        for radius in RADII[:2]:
            report(
                f"Mean error of the best subset of {count} numbers that may each move by {radius:g}",
                METHOD.format(radius=radius),
                [errors(run[count], radius).mean() for run in runs],
                unit="mean error",
                started=started,
                baseline=METHOD.format(radius=0),
                baseline_values=tuple(errors(run[count], 0).mean() for run in runs),
                note=f"{len(runs[0][count])} draws for each seed. A few targets out of reach make up much of the mean.",
            )


def counts(runs: Sequence[Distances], started: float) -> None:
    """Candidates that are needed, against the theorem with a constant of 1, and against the rule."""
    off: list[list[float]] = [[] for _ in runs]
    lines = []
    for error in ERRORS:
        without = [number_needed(run, radius=0, error=error) for run in runs]
        for radius in RADII:
            needed = [number_needed(run, radius=radius, error=error) for run in runs]
            ratios, limit = [some / whole for some, whole in zip(needed, without, strict=True)], 1 / (1 + radius)
            predicted = [rule(whole, radius=radius, error=error) for whole in without]
            for each, found, expected in zip(off, needed, predicted, strict=True):
                each.append(abs(found - expected))
            line = f"{np.median(without):.3g} without, {np.median(needed):.3g} with epsilon {radius:g}, {np.median(predicted):.3g} by the rule"
            lines.append(f"error {error:g}: {line}")
            report(
                f"Numbers that may move by {radius:g} build a target to within {error:g} with fewer of them, by at least 1 / (1 + epsilon)",
                METHOD.format(radius=radius),
                ratios,
                unit="candidates needed, as a share of those needed without moving",
                started=started,
                baseline="1 / (1 + epsilon)",
                baseline_values=(limit,) * len(runs),
                paper="over-parameterisation falls by a factor O(1 / (1 + epsilon)), constant not in the abstract",
                expected="at most 1 / (1 + epsilon), for every seed",
                held=all(ratio <= limit for ratio in ratios),
                note=f"In {CHANCE:.0%} of the draws. Candidates needed: {line}.",
            )
    report(
        "Candidates needed with a radius follow from those needed without, by the density of sums times the width that each covers",
        METHOD.format(radius=0) + " and the rule",
        [max(each) for each in off],
        unit="candidates, the largest distance from the rule",
        started=started,
        expected="at most 1, for every seed",
        held=all(max(each) <= 1 for each in off),
        note="n' = n - log2(1 + epsilon n' / (2 error)) + log2(n' / n) / 2. " + "; ".join(lines) + ".",
    )


def main() -> None:
    started = time.perf_counter()
    runs = [measure(seed) for seed in SEEDS]
    decay(runs, started)
    means(runs, started)
    counts(runs, started)


if __name__ == "__main__":
    main()
