"""After how many steps of training a dense network contains a good small one, against the number of examples it is trained on.

Networks with one hidden ReLU layer, read as the mean of their neurons, are trained on the squared error of one-hot labels, on some of MNIST's images, with
batches of one size. At some steps, neurons are chosen greedily against the labels. The first good step is the one from which the chosen network has made a
given share of all the progress that it makes until the last step. Theory says that it grows with the logarithm of the number of examples. The seed draws
weights, images and batches. Without the images nothing is measured, with a line that says so.

Run: ``OMP_NUM_THREADS=1 python benchmarks/prune_pretraining_threshold.py`` (four minutes on one core).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from images import NUM_CLASSES, mnist
from partwise.linalg.greedy_selection import greedy_course
from rows import Row, append

NAME = "prune_pretraining_threshold"
SEEDS = (0, 1, 2)
SIZES = (250, 500, 1000, 2000, 4000, 8000)
TOLERANCE = 0.1  # of the progress that may be missing
NUM_STEPS = 2000


@dataclass(frozen=True)
class Net:
    """``f(x) = mean over neurons of max(<w, x> + b, 0) v``."""

    weights: Tensor  # (neurons, features)
    biases: Tensor  # (neurons,)
    reads: Tensor  # (neurons, outputs)

    def hidden(self, inputs: Tensor) -> Tensor:
        """(examples, neurons)."""
        return (inputs @ self.weights.T + self.biases).relu()

    def outputs(self, inputs: Tensor) -> Tensor:
        """(examples, outputs)."""
        return self.hidden(inputs) @ self.reads / len(self.reads)


def net(num_neurons: int, num_features: int, num_outputs: int, *, seed: int) -> Net:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(num_neurons, num_features, generator=generator)
    return Net(weights, torch.randn(num_neurons, generator=generator), torch.randn(num_neurons, num_outputs, generator=generator))


def step(given: Net, inputs: Tensor, targets: Tensor, *, lr: float) -> Net:
    """Of gradient descent on half the mean squared error. Every neuron moves as fast as if it were alone: the rate grows with their number."""
    hidden = given.hidden(inputs)
    errors = (hidden @ given.reads / len(given.reads) - targets) / len(inputs)  # (examples, outputs)
    back = (errors @ given.reads.T) * (hidden > 0)  # (examples, neurons)
    return Net(given.weights - lr * back.T @ inputs, given.biases - lr * back.sum(0), given.reads - lr * hidden.T @ errors)


def chosen_loss(given: Net, inputs: Tensor, targets: Tensor, *, num_units: int) -> float:
    """Half the mean squared error of the mean of some neurons, chosen greedily against the labels; one may be chosen again."""
    hidden, reads, labels = given.hidden(inputs).double(), given.reads.double(), targets.double()
    gram = (hidden.T @ hidden) * (reads @ reads.T)  # (neurons, neurons)
    cross = ((hidden.T @ labels) * reads).sum(1)  # (neurons,)
    return greedy_course(gram, cross, float(labels.square().sum()), num_steps=num_units).losses[-1] / len(inputs)


def dense_loss(given: Net, inputs: Tensor, targets: Tensor) -> float:
    return 0.5 * float((given.outputs(inputs) - targets).square().sum()) / len(inputs)


def looks(num_steps: int, *, first: int = 20, number: int = 36) -> list[int]:
    """Steps at which the network is looked at: none, and then geometrically."""
    return [0, *sorted({int(value + 0.5) for value in np.geomspace(first, num_steps, number)})]


@dataclass(frozen=True)
class Curve:
    """Losses while a network is trained."""

    steps: tuple[int, ...]
    dense: tuple[float, ...]
    chosen: tuple[float, ...]


def pruned_loss_curve(
    inputs: Tensor,
    targets: Tensor,
    *,
    seed: int,
    num_neurons: int = 512,
    num_units: int = 100,
    num_steps: int = NUM_STEPS,
    batch_size: int = 50,
    lr: float = 1.0,
) -> Curve:
    """Train on all examples in shuffled batches, and choose neurons on the way."""
    given = net(num_neurons, inputs.shape[1], targets.shape[1], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    at, dense, chosen = looks(num_steps), [], []
    order = torch.empty(0, dtype=torch.int64)
    for number in range(num_steps + 1):
        if number in at:
            dense.append(dense_loss(given, inputs, targets))
            chosen.append(chosen_loss(given, inputs, targets, num_units=num_units))
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
        batch, order = order[:batch_size], order[batch_size:]
        given = step(given, inputs[batch], targets[batch], lr=lr)
    return Curve(tuple(at), tuple(dense), tuple(chosen))


def first_good_step(curve: Curve, *, tolerance: float = TOLERANCE) -> int:
    """The step from which on at most this share of the progress of the chosen network is still missing."""
    limit = curve.chosen[-1] + tolerance * (curve.chosen[0] - curve.chosen[-1])
    good = len(curve.chosen)
    while good > 0 and curve.chosen[good - 1] <= limit:
        good -= 1
    return curve.steps[good]


def line(across: Sequence[float], up: Sequence[float]) -> tuple[float, float]:
    """Slope of a line, and the share of variance that it explains."""
    if len(set(up)) == 1:
        return 0.0, 0.0
    return float(np.polyfit(across, up, 1)[0]), float(np.corrcoef(across, up)[0, 1] ** 2)


def some(size: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Images of length about one with a constant, and one-hot labels."""
    inputs, classes = mnist().train.tensors
    chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:size]
    return inputs[chosen] / inputs.shape[1] ** 0.5, one_hot(classes[chosen], NUM_CLASSES).float()


def report(claim: str, values: Sequence[float], *, unit: str, started: float, expected: str = "", held: bool | None = None, **more: object) -> None:
    settings = {"method": "GreedyForwardSelection against labels, equal amounts, 100 of 512 neurons"} | more
    row = Row(
        claim=claim, values=tuple(values), unit=unit, seeds=SEEDS, seconds=time.perf_counter() - started, expected=expected, held=held, **settings
    )  # type: ignore[arg-type]
    append(NAME, row)
    print(f"{claim}: {[f'{value:.4g}' for value in row.values]} {[f'{value:.4g}' for value in row.baseline_values]} {held}", flush=True)


def measure() -> None:
    """The first good step of every size, and what they lie on."""
    began = time.perf_counter()
    steps: dict[int, list[float]] = {}
    for size in SIZES:
        started = time.perf_counter()
        curves = [pruned_loss_curve(*some(size, seed=seed), seed=seed) for seed in SEEDS]
        steps[size] = [float(first_good_step(curve)) for curve in curves]
        report(f"First good step of {size:,} examples", steps[size], unit="steps", started=started)
        loss = [curve.chosen[-1] for curve in curves]
        report(f"Loss of the chosen network after the last step: {size:,} examples", loss, unit="half the mean squared error", started=started,
               baseline="the dense network", baseline_values=[curve.dense[-1] for curve in curves])  # fmt: skip
    by_seed = [[steps[size][index] for size in SIZES] for index in range(len(SEEDS))]
    logs = [line(np.log(SIZES).tolist(), each) for each in by_seed]
    straight = [line(SIZES, each) for each in by_seed]
    paper = "the threshold grows with the logarithm of the number of examples"
    report(
        "The first good step grows with the number of examples",
        [slope for slope, _ in logs],
        unit="steps for each e-fold of examples",
        started=began,
        paper=paper,
        expected="above 0 in every seed",
        held=all(slope > 0 for slope, _ in logs),
    )
    report(
        "The first good step lies on a line over the logarithm of the number of examples, and less well on one over the number",
        [fit for _, fit in logs],
        unit="share of variance explained by the logarithm",
        started=began,
        baseline="by the number itself",
        baseline_values=[fit for _, fit in straight],
        paper=paper,
        expected="at least 0.8 and more than the number explains, in every seed",
        held=all(fit >= 0.8 and fit > other for (_, fit), (_, other) in zip(logs, straight, strict=True)),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        mnist(num_train=10)
    except FileNotFoundError as error:
        print(f"nothing measured: {error}")
    else:
        measure()
