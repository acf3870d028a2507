"""Tickets of an untrained perceptron on MNIST: frozen weights, weights that projected descent moved by at most epsilon, and weights moved at random.

A perceptron of 300 and 100 hidden neurons with weights from Kaiming's normal distribution, 10,000 images. Tickets of moved weights spend a third of their
steps on moving. What they are compared with gets as many steps in all, or, where that is said, as many steps of scores: then the question is only whether
the moved weights are better to choose from. Random changes are those of projected descent, shuffled within each layer, so they are as large. Rates of
scores and of weights are chosen once, at half length, on a validation split. Without the images nothing is measured, with a line that says so.

Run: ``OMP_NUM_THREADS=1 python benchmarks/prune_strong_tickets.py`` (about three minutes on one core).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from images import Images, batches, mnist, perceptron
from partwise.models import tensors_of, with_tensors
from partwise.prune import EdgePopup, apply
from partwise.prune.edge_popup import maskable_weights
from partwise.train._metrics import accuracy
from rows import Row, append

NAME = "prune_strong_tickets"
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100  # no seed of the results
NUM_IMAGES, BATCH_SIZE = 10_000, 128
HIDDEN = (300, 100)
NUM_EPOCHS, PERTURB_EPOCHS = 6, 2
SCORE_RATES, WEIGHT_RATES = (0.3, 1.0, 3.0), (0.03, 0.1, 0.3)
KEEP = 0.5
RADII = (0.001, 0.01, 0.1)  # the weights of the first layer have a standard deviation of 0.05
MARGIN = 0.01  # of accuracy

Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Settings:
    """What all networks of a comparison share."""

    score_rate: float
    weight_rate: float
    num_epochs: int = NUM_EPOCHS
    perturb_epochs: int = PERTURB_EPOCHS

    def ticket(self, seed: int, *, radius: float = 0.0) -> EdgePopup:
        """As many steps in all, with and without a radius."""
        epochs = self.num_epochs - self.perturb_epochs if radius else self.num_epochs
        return EdgePopup(
            keep=KEEP, radius=radius, lr=self.score_rate, perturb_lr=self.weight_rate, num_epochs=epochs, perturb_epochs=self.perturb_epochs, seed=seed
        )

    def fewer_steps(self, seed: int) -> EdgePopup:
        """Frozen weights, with as many steps of scores as moved ones get."""
        return dataclasses.replace(self.ticket(seed), num_epochs=self.num_epochs - self.perturb_epochs)

    def full(self, seed: int) -> EdgePopup:
        """Plain training."""
        return EdgePopup(keep=1.0, radius=math.inf, perturb_lr=self.weight_rate, perturb_epochs=self.num_epochs, seed=seed)


def network(images: Images, *, seed: int, hidden: Sequence[int] = HIDDEN) -> nn.Module:
    """Untrained, with weights from Kaiming's normal distribution."""
    model, generator = perceptron(images, hidden=hidden, seed=seed), torch.Generator().manual_seed(seed)
    for name in maskable_weights(model):
        nn.init.kaiming_normal_(tensors_of(model)[name], nonlinearity="relu", generator=generator)
    return model


def with_shuffled_changes(model: nn.Module, moved: Mapping[str, Tensor], *, seed: int) -> nn.Module:
    """The model with changes as large as those of some moved weights, dealt anew among the weights of a layer."""
    generator, tensors = torch.Generator().manual_seed(seed), tensors_of(model)
    changed = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for name in maskable_weights(model):
        changes = (moved[name] - changed[name]).flatten()
        changed[name] += changes[torch.randperm(len(changes), generator=generator)].view_as(changed[name])
    return with_tensors(model, changed)


def measure(images: Images, settings: Settings, *, seed: int, radii: Sequence[float] = RADII, hidden: Sequence[int] = HIDDEN) -> dict[str, float]:
    """Test accuracy of each network of one seed."""
    model, loader, test = network(images, seed=seed, hidden=hidden), images.loader(BATCH_SIZE), batches(images.test)

    def tested(start: nn.Module, method: EdgePopup) -> tuple[float, Mapping[str, Tensor]]:
        plan = method.plan(start, loader)
        return accuracy(apply(start, plan), test), plan.moved

    found = {"full training": tested(model, settings.full(seed))[0], "frozen": tested(model, settings.ticket(seed))[0]}
    found["frozen, fewer steps"] = tested(model, settings.fewer_steps(seed))[0]
    for radius in radii:
        method = settings.ticket(seed, radius=radius)
        found[f"moved by {radius:g}"], moved = tested(model, method)
        other = with_shuffled_changes(model, moved, seed=seed)
        found[f"shuffled {radius:g}"] = tested(other, settings.ticket(seed))[0]
        found[f"shuffled {radius:g}, fewer steps"] = tested(other, settings.fewer_steps(seed))[0]
        found[f"unmasked {radius:g}"] = tested(model, dataclasses.replace(method, keep=1.0))[0]
    return found


def tuned(images: Images, *, hidden: Sequence[int] = HIDDEN) -> Settings:
    """The rates that are best at half length on the validation split."""
    model, loader, valid = network(images, seed=TUNING_SEED, hidden=hidden), images.loader(BATCH_SIZE), batches(images.valid)

    def score(method: EdgePopup) -> float:
        return accuracy(apply(model, method.plan(model, loader)), valid)

    def at(score_rate: float, weight_rate: float) -> Settings:
        return Settings(score_rate, weight_rate, num_epochs=NUM_EPOCHS // 2)

    best_score = max(SCORE_RATES, key=lambda rate: score(at(rate, WEIGHT_RATES[0]).ticket(TUNING_SEED)))
    best_weight = max(WEIGHT_RATES, key=lambda rate: score(at(SCORE_RATES[0], rate).full(TUNING_SEED)))
    return Settings(best_score, best_weight)


def report(claim: str, values: Sequence[float], settings: Settings, *, radius: float, baseline: str, baseline_values: Sequence[float], seconds: float,
           expected: str = "", held: bool | None = None, paper: str | None = None, note: str = "") -> None:  # fmt: skip
    row = Row(
        claim=claim, method=repr(settings.ticket(0, radius=radius)), values=tuple(values), unit="test accuracy", seeds=SEEDS[: len(values)],
        seconds=seconds, baseline=baseline, baseline_values=tuple(baseline_values), expected=expected, held=held, paper=paper, note=note,
    )  # fmt: skip
    append(NAME, row)
    verdict = {True: "held", False: "FAILED", None: "-"}[held]
    print(f"{claim}: {[f'{value:.4f}' for value in values]} against {[f'{value:.4f}' for value in baseline_values]} {verdict}", flush=True)


def compare(scores: Scores, settings: Settings, *, radii: Sequence[float] = RADII, seconds: float) -> None:
    """One row for each question."""

    def mean(name: str) -> float:
        return sum(scores[name]) / len(scores[name])

    steps = f"{settings.num_epochs} epochs in all, {settings.perturb_epochs} of them on the weights."
    paper = "perturbed weights by projected SGD show better performance (abstract, without a number)"
    frozen, fewer, full = (repr(method) for method in (settings.ticket(0), settings.fewer_steps(0), settings.full(0)))
    for radius in radii:
        ours, common = scores[f"moved by {radius:g}"], {"radius": radius, "seconds": seconds, "note": steps}
        for rival, baseline, name in (
            ("frozen weights at as many steps", frozen, "frozen"),
            ("weights with random changes of the same sizes at as many steps", f"{frozen} after shuffled changes", f"shuffled {radius:g}"),
            ("frozen weights at as many steps of scores", fewer, "frozen, fewer steps"),
            (
                "weights with random changes of the same sizes at as many steps of scores",
                f"{fewer} after shuffled changes",
                f"shuffled {radius:g}, fewer steps",
            ),
        ):
            report(f"A ticket of weights moved by at most {radius:g} beats one of {rival}, MNIST", ours, settings, baseline=baseline,
                   baseline_values=scores[name], expected="a higher mean", held=mean(f"moved by {radius:g}") > mean(name), paper=paper, **common)  # fmt: skip
        report(f"What the mask adds to weights moved by at most {radius:g}, MNIST", ours, settings,
               baseline="the moved weights without a mask", baseline_values=scores[f"unmasked {radius:g}"], **common)  # fmt: skip
    for name, radius in (("frozen", 0.0), *((f"moved by {radius:g}", radius) for radius in radii)):
        what = f"weights moved by at most {radius:g}" if radius else "frozen weights"
        report(f"A ticket of {what} comes within {MARGIN:g} of full training at as many steps, MNIST", scores[name], settings, radius=radius, baseline=full,
               baseline_values=scores["full training"], seconds=seconds, expected=f"at least the baseline's mean - {MARGIN:g}",
               held=mean(name) >= mean("full training") - MARGIN, note=steps if radius else f"{settings.num_epochs} epochs.")  # fmt: skip


def main() -> None:
    started = time.perf_counter()
    try:
        images = mnist(num_train=NUM_IMAGES)
    except FileNotFoundError as error:
        print(f"nothing is measured: {error}")
        return
    settings = tuned(images)
    print(settings, flush=True)
    runs = [measure(images, settings, seed=seed) for seed in SEEDS]
    compare({name: [run[name] for run in runs] for name in runs[0]}, settings, seconds=time.perf_counter() - started)


if __name__ == "__main__":
    main()
