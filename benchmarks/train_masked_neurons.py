"""What theory says about one hidden layer that is trained by subnetworks, against what happens.

The paper promises that the expected squared error of the whole net shrinks by a constant factor per round until it ends in a ball, and how that ball
depends on subnetworks, local steps, the chance to be kept and the width. Every number here is a mean over several draws of weights and masks on the
same data; seeds are data sets.

Run: ``python benchmarks/train_masked_neurons.py`` (about two minutes on one core).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from partwise.linalg.masked_neurons import (
    bernoulli_masks,
    bernoulli_sampling_cost,
    categorical_masks,
    error_ball,
    infinite_width_kernel,
    masked_round,
    predicted_contraction,
    random_shallow_net,
    subset_sampling_cost,
)
from partwise.linalg.partition import deal
from rows import Row, append

NAME = "train_masked_neurons"
SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Setting:
    """One experiment: the data, the net, and how it is cut.

    ``hardest`` replaces random targets by the ones that are learned slowest: off by the kernel's least eigenvector. ``categorical`` puts every neuron in
    exactly one subnetwork, so that ``keep`` is ``1 / num_subnets``.
    """

    num_samples: int = 10
    num_features: int = 20
    num_neurons: int = 500
    num_subnets: int = 4
    num_local_steps: int = 1
    keep: float = 0.5
    lr: float = 0.4
    hardest: bool = False
    categorical: bool = False
    num_draws: int = 2

    @property
    def share(self) -> float:
        """What the whole net is multiplied by."""
        return 1 / self.num_subnets if self.categorical else self.keep

    def predicted(self, smallest_eigenvalue: float) -> float:
        """Factor per round that the theory promises."""
        return predicted_contraction(
            smallest_eigenvalue, lr=self.lr, keep=self.keep, num_subnets=self.num_subnets, num_local_steps=self.num_local_steps
        )

    def ball(self, *, num_rounds: int) -> float:
        """Size of the ball by the formula, up to its constant."""
        return error_ball(
            self.keep,
            num_subnets=self.num_subnets,
            num_local_steps=self.num_local_steps,
            num_samples=self.num_samples,
            num_rounds=num_rounds,
        )

    def __str__(self) -> str:
        subnets, steps = (
            f"{self.num_subnets} subnet{'s'[: self.num_subnets != 1]}",
            f"{self.num_local_steps} local step{'s'[: self.num_local_steps != 1]}",
        )
        return f"{subnets}, neurons dealt, {steps}" if self.categorical else f"keep {self.keep:g}, {subnets}, {steps}"


def problem(setting: Setting, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of length 1, and targets."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(setting.num_samples, setting.num_features))
    inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
    return inputs, generator.uniform(-1, 1, setting.num_samples)


def errors(setting: Setting, *, seed: int, num_rounds: int) -> np.ndarray:
    """Mean squared distance of the whole net from the targets, before the first round and after each."""
    inputs, targets = problem(setting, seed=seed)
    slowest = np.linalg.eigh(infinite_width_kernel(inputs))[1][:, 0]
    total = np.zeros(num_rounds + 1)
    for draw in range(setting.num_draws):
        generator = np.random.default_rng((seed, draw))
        net = random_shallow_net(setting.num_neurons, setting.num_features, scale=setting.num_samples**-0.5, generator=generator)
        if setting.hardest:
            targets = net.outputs(inputs, keep=setting.share) + slowest
        for number in range(num_rounds + 1):
            total[number] += np.sum((targets - net.outputs(inputs, keep=setting.share)) ** 2)
            if setting.categorical:
                masks = categorical_masks(setting.num_neurons, num_subnets=setting.num_subnets, generator=generator)
            else:
                masks = bernoulli_masks(setting.num_neurons, num_subnets=setting.num_subnets, keep=setting.keep, generator=generator)
            net = masked_round(net, inputs, targets, masks, num_local_steps=setting.num_local_steps, lr=setting.lr)
    return total / setting.num_draws


def contraction(course: np.ndarray, *, level: float = 0.1) -> tuple[float, float]:
    """Factor per round until the error is below ``level`` of where it began, and how straight its logarithm falls (share of variance of a line)."""
    below = np.flatnonzero(course < level * course[0])
    last = int(below[0]) if len(below) else len(course) - 1
    logs, rounds = np.log(course[: last + 1]), np.arange(last + 1)
    straight = float(np.corrcoef(rounds, logs)[0, 1] ** 2) if last > 1 else 1.0
    return float((course[last] / course[0]) ** (1 / last)), straight


def ball(setting: Setting, *, seed: int, num_rounds: int = 300) -> float:
    """Mean error of the last third of the rounds."""
    return float(errors(setting, seed=seed, num_rounds=num_rounds)[-num_rounds // 3 :].mean())


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def report(claim: str, method: str, values: Sequence[float], *, unit: str, started: float, expected: str, held: bool, **more: object) -> None:
    row = Row(
        claim=claim, method=method, values=tuple(values), unit=unit, seeds=SEEDS[: len(values)], seconds=time.perf_counter() - started,
        expected=expected, held=bool(held), **more,
    )  # type: ignore[arg-type]  # fmt: skip
    append(NAME, row)
    verdict = "held" if held else "FAILED"
    print(f"{claim}: {[f'{value:.4g}' for value in values]} {[f'{value:.4g}' for value in row.baseline_values]} {verdict}", flush=True)


def rates() -> None:
    """Convergence is linear, and at least as fast as predicted; on the targets that are learned slowest, where the prediction is tightest."""
    usual = [
        Setting(keep=keep, num_subnets=p, num_local_steps=t) for keep, p, t in ((0.25, 1, 1), (0.5, 4, 1), (0.5, 4, 4), (0.75, 4, 8), (1.0, 1, 1))
    ]
    below = [Setting(keep=1 / 16, num_subnets=p) for p in (1, 4)]
    for setting in (dataclasses.replace(each, hardest=True, num_draws=8, num_neurons=1000) for each in usual + below):
        started, found, predicted, straight = time.perf_counter(), [], [], []
        for seed in SEEDS:
            smallest = float(np.linalg.eigvalsh(infinite_width_kernel(problem(setting, seed=seed)[0]))[0])
            factor, line = contraction(errors(setting, seed=seed, num_rounds=40 if setting.keep >= 0.25 else 60), level=0.1)
            found.append(factor)
            straight.append(line)
            predicted.append(setting.predicted(smallest))
        small = setting.keep < 0.25
        report(
            f"The error shrinks per round at least by the predicted factor: {setting}",
            "masked_round on one hidden layer",
            found,
            unit="factor per round",
            started=started,
            baseline="1 - eta theta tau lambda_0 / 4",
            baseline_values=tuple(predicted),
            expected="at most the predicted factor, for every seed" + ("" if small else "; a line through the logarithms explains 98 % of them"),
            held=all(f <= p for f, p in zip(found, predicted, strict=True)) and (small or min(straight) >= 0.98),
            paper="linear convergence with this factor, constants of width and step left open",
            note=f"{setting.num_neurons} neurons, targets off by the kernel's least eigenvector, mean of {setting.num_draws} draws; a line "
            f"explains at least {min(straight):.1%} of the logarithms." + (_SMALL_KEEP if small else ""),
        )


_SMALL_KEEP = (
    " A subnetwork that is not scaled up moves the whole net, read as keep times its output, by 2 eta xi theta lambda_0 per step, so below keep = 1/8 the "
    "factor as printed cannot hold in the direction of the least eigenvector."
)


def growth(claim: str, settings: Sequence[Setting], sizes: Sequence[float], *, theory: Callable[[Setting], float] | None, unit: str, expected: str,
           held: Callable[[Sequence[float], Sequence[float]], bool], note: str) -> None:  # fmt: skip
    """One row: the exponent of the error ball in something."""
    started, slopes, balls = time.perf_counter(), [], []
    for seed in SEEDS:
        balls.append([ball(setting, seed=seed) for setting in settings])
        slopes.append(slope(sizes, balls[-1]))
    formula = (slope(sizes, [theory(setting) for setting in settings]),) * len(SEEDS) if theory else ()
    middle = ", ".join(f"{value:.2g}" for value in np.median(balls, axis=0))
    more = {"baseline": "error_ball", "baseline_values": formula} if formula else {}
    report(claim, "masked_round on one hidden layer", slopes, unit=unit, started=started, expected=expected, held=held(slopes, formula), **more,
           note=f"{note} Sizes {', '.join(f'{size:g}' for size in sizes)}: errors {middle}.")  # fmt: skip


def balls() -> None:
    counts = (1, 2, 4, 8, 16)
    growth(
        "The error ball shrinks with the number of subnetworks",
        [Setting(num_subnets=p) for p in counts],
        counts,
        theory=lambda setting: setting.ball(num_rounds=300),
        unit="exponent",
        expected="within 0.3 of the formula's exponent in the median, below 0 for every seed",
        held=lambda slopes, formula: max(slopes) < 0 and abs(float(np.median(slopes)) - formula[0]) <= 0.3,
        note="Keep 0.5, 1 local step, 500 neurons.",
    )
    steps = (1, 2, 4, 8)
    growth(
        "The error ball grows with local steps",
        [Setting(num_local_steps=t) for t in steps],
        steps,
        theory=lambda setting: setting.ball(num_rounds=300),
        unit="exponent",
        expected="above 0 for every seed",
        held=lambda slopes, _: min(slopes) > 0,
        note="Keep 0.5, 4 subnets, 500 neurons. The formula has no step size in it, and its constants are left open.",
    )
    started, keeps = time.perf_counter(), (0.75, 0.9, 0.97, 0.99, 1.0)
    ends = [[ball(Setting(keep=keep, num_local_steps=2), seed=seed) for keep in keeps] for seed in SEEDS]
    report(
        "The error ball vanishes as the chance to be kept goes to 1",
        "masked_round on one hidden layer",
        [end[-1] for end in ends],
        unit="squared error at keep 1",
        started=started,
        expected="falls from each keep to the next, and below 1e-20 at keep 1, for every seed",
        held=all(after < before for end in ends for before, after in itertools.pairwise(end)) and max(end[-1] for end in ends) < 1e-20,
        note="4 subnets, 2 local steps. Errors at keep "
        + ", ".join(f"{k:g}: {v:.2g}" for k, v in zip(keeps, np.median(ends, axis=0), strict=True))
        + ".",
    )


def categorical() -> None:
    started, counts = time.perf_counter(), (1, 2, 4, 8)
    ends = [[ball(Setting(num_subnets=p, num_local_steps=4, categorical=True), seed=seed) for p in counts] for seed in SEEDS]
    report(
        "Disjoint subnetworks: no error is left with one, and more with more",
        "masked_round with categorical masks",
        [end[0] for end in ends],
        unit="squared error with 1 subnet",
        started=started,
        expected="below 1e-20 with 1 subnet, and rising with each doubling, for every seed",
        held=all(after > before for end in ends for before, after in itertools.pairwise(end)) and max(end[0] for end in ends) < 1e-20,
        paper="error O(tau (p-1)^2 n^3 d / (lambda_0^2 m))",
        note="4 local steps, 500 neurons. Errors for "
        + ", ".join(f"{p}: {v:.2g}" for p, v in zip(counts, np.median(ends, axis=0), strict=True))
        + ".",
    )
    widths = (125, 250, 500, 1000, 2000)
    growth(
        "Disjoint subnetworks: the error shrinks with the width at least as fast as promised",
        [Setting(num_subnets=4, num_local_steps=4, categorical=True, num_neurons=m, num_draws=1) for m in widths],
        widths,
        theory=None,
        unit="exponent",
        expected="at most -1, the exponent of the bound, for every seed",
        held=lambda slopes, _: max(slopes) <= -1,
        note="4 subnets, 4 local steps; the bound's exponent is -1.",
    )


def sampling(*, num_draws: int = 4000) -> None:
    """The exact costs of sampling, against drawing."""
    for name in ("each neuron with probability 1/4", "4 equal pieces"):
        started, found, exact, off = time.perf_counter(), [], [], []
        for seed in SEEDS:
            inputs, targets = problem(Setting(), seed=seed)
            generator = np.random.default_rng(seed)
            contributions = random_shallow_net(64, 20, scale=1.0, generator=generator).contributions(inputs)
            if name.startswith("each"):
                masks = bernoulli_masks(64, num_subnets=num_draws, keep=0.25, generator=generator).astype(float)
                exact.append(bernoulli_sampling_cost(contributions, targets, keep=0.25))
            else:
                masks = np.zeros((num_draws, 64))
                for row in masks:
                    row[deal(64, 4, generator)[0]] = 1
                exact.append(subset_sampling_cost(contributions, targets, num_kept=16))
            costs = np.sum((targets - masks @ contributions.T) ** 2, axis=1)
            found.append(float(costs.mean()))
            off.append(abs(found[-1] - exact[-1]) / (costs.std() / math.sqrt(num_draws)))
        report(
            f"What sampling costs is what the formula says: {name}",
            "Monte Carlo",
            found,
            unit="expected squared error",
            started=started,
            baseline="the formula",
            baseline_values=tuple(exact),
            expected="within 4 standard errors for every seed",
            held=max(off) <= 4,
            note=f"64 neurons, {num_draws} draws; at most {max(off):.1f} standard errors off.",
        )


def three_moves(*, num_rounds: int = 20) -> None:
    """The loss goes up when subnetworks are drawn, down while they train, and down again when they are put back."""
    started, shares, setting = time.perf_counter(), [], Setting(keep=0.5, num_local_steps=4)
    for seed in SEEDS:
        inputs, targets = problem(setting, seed=seed)
        generator, moves = np.random.default_rng(seed), []
        net = random_shallow_net(setting.num_neurons, setting.num_features, scale=setting.num_samples**-0.5, generator=generator)
        for _ in range(num_rounds):
            masks = bernoulli_masks(setting.num_neurons, num_subnets=setting.num_subnets, keep=setting.keep, generator=generator)
            alone = [masked_round(net, inputs, targets, mask[None], num_local_steps=setting.num_local_steps, lr=setting.lr) for mask in masks]
            losses = [
                np.mean([np.sum((targets - each.contributions(inputs)[:, mask].sum(axis=1)) ** 2) for each, mask in zip(nets, masks, strict=True)])
                for nets in ([net] * len(masks), alone)
            ]
            before = np.sum((targets - net.outputs(inputs, keep=setting.keep)) ** 2)
            net = masked_round(net, inputs, targets, masks, num_local_steps=setting.num_local_steps, lr=setting.lr)
            after = np.sum((targets - net.outputs(inputs, keep=setting.keep)) ** 2)
            moves.append((losses[0] > before, losses[1] < losses[0], after < losses[1]))
        shares.append(np.mean(moves, axis=0))
    report(
        "The loss goes up when subnetworks are drawn, down while they train, and down again when they are put back",
        "masked_round on one hidden layer",
        [float(share.min()) for share in shares],
        unit="share of rounds, the rarest move",
        started=started,
        expected="each of the three in at least 90 % of the rounds, in the median",
        held=bool(np.median([share.min() for share in shares]) >= 0.9),
        paper="three visible moves of the training curve",
        note=f"First {num_rounds} rounds, {setting}. Up, down, down in "
        + ", ".join(f"{share:.0%}" for share in np.mean(shares, axis=0))
        + " of the rounds.",
    )


if __name__ == "__main__":
    sampling()
    rates()
    three_moves()
    balls()
    categorical()
