"""Edge-popup: a subnetwork that is good although its weights were never trained, or only moved by a little."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError, RunError, check_at_least, check_finite, check_radius
from partwise.models.walks import Batch
from partwise.prune._calibration import batches_of, count_inputs
from partwise.prune._losses import arguments_of, loss_of
from partwise.prune.method import PruneMethod, silent
from partwise.prune.weight_mask import WeightMaskPlan

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from partwise.prune.method import Data, Report

__all__ = ["EdgePopup", "maskable_weights", "top_share"]


@dataclass(frozen=True, kw_only=True)
class EdgePopup(PruneMethod):
    """Single weights stay by scores that are trained while the weights are not; a mask, which saves neither memory nor time.

    Every weight of the linear and convolutional layers gets a score. In a forward pass each layer uses the share ``keep`` of its weights with the largest
    sizes of scores; the gradient is passed to all scores as if the choice were the size of the score itself. Weights, biases and all other parameters are
    frozen.

    With a radius above 0 the weights are first moved by projected gradient descent, none by more than the radius (epsilon in the paper); the plan holds the
    moved weights. With an infinite radius that is ordinary training. Biases and norms are not moved.

    Unlike the other methods of this room, it runs a copy of the model in training mode: dropout drops, and running statistics of norms follow, which the plan
    also holds. Data are read once for each epoch. With the same seed, data and number of threads the result has the same bits; a loader with a generator of
    its own has its own order.

    Weights are used as the model has them; draw them anew for a ticket of an untrained network. A weight that another kind of module shares, such as an
    embedding, stays whole. With ``keep=1`` there is nothing to choose, and no scores are trained.

    Parameters
    ----------
    keep : float, default=0.5
        Share of the weights of every layer that stays (k in the paper), above 0 and at most 1; rounded to whole weights, at least one.
    radius : float, default=0
        How far a weight may move before the choice (epsilon in the paper), 0 or more; may be infinite.
    perturb_epochs : int, default=2
        Times that the data are read while weights move; none with radius 0.
    perturb_lr : float, default=0.1
        Learning rate of the weights at its highest.
    num_epochs : int, default=10
        Times that the data are read while scores are trained.
    lr : float, default=1
        Learning rate of the scores at its highest. The released code has 0.1, for 100 epochs; short runs need more. Both rates fall to 0 along half a cosine.
    momentum : float, default=0.9
        Of both.
    weight_decay : float, default=0
        Of the scores. It changes which weights are chosen: scores that get little gradient shrink.
    seed : int, default=0
        Of the scores, of dropout, and of the order of a DataLoader.

    References
    ----------
    What's Hidden in a Randomly Weighted Neural Network? arXiv:1911.13299. Strong Lottery Ticket Hypothesis with epsilon-perturbation. arXiv:2210.16589.
    """

    keep: float = 0.5
    radius: float = 0.0
    perturb_epochs: int = 2
    perturb_lr: float = 0.1
    num_epochs: int = 10
    lr: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError("keep-range", f"got keep={self.keep}, expected a fraction above 0 and at most 1. Pass 0.5 to keep half.")
        check_radius(self.radius)
        check_at_least(self.perturb_epochs, 1, name="perturb_epochs")
        check_at_least(self.num_epochs, 1, name="num_epochs")
        check_at_least(self.seed, 0, name="seed")
        for name, holds, expected in (
            ("perturb_lr", math.isfinite(self.perturb_lr) and self.perturb_lr > 0, "a number above 0"),
            ("lr", math.isfinite(self.lr) and self.lr > 0, "a number above 0"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "0 or more"),
        ):
            if not holds:
                raise InputError("optimizer-setting", f"got {name}={getattr(self, name)}, expected {expected}. Change it, or leave it out.")

    def plan(self, model: nn.Module, data: Data | None = None, *, report: Report = silent) -> WeightMaskPlan:
        """Move the weights if there is a radius, then choose among them; see `PruneMethod.plan`.

        Parameters
        ----------
        model : torch.nn.Module
            With weights that are worth choosing from. Not changed.
        data : iterable
            Batches with labels: (inputs, labels) pairs, or mappings with ``labels``; text needs none. A list or a DataLoader; what can be read only once is
            kept in memory.
        report : callable
            Told (phase, done, total, note) at each step; the note is the loss of the step before.

        Raises
        ------
        InputError
            ``no-weights`` when there is no layer to choose in, ``no-calibration`` and ``no-labels`` for data that nothing can be learned from.
        RunError
            ``diverged`` when the loss is no finite number.
        """
        import torch

        from partwise.models import tensors_of, with_tensors

        names = maskable_weights(model)
        pieces = _readable_again(model, data)
        before = tensors_of(model)
        copy = with_tensors(model, {name: tensor.detach().clone() for name, tensor in before.items()}).requires_grad_(False).train()
        weights = {name: tensor for name, tensor in tensors_of(copy).items() if name in names}
        run = _Run(copy, pieces, self.seed, report)
        if self.radius > 0:
            self._move(run, weights)
        masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        if self.keep < 1:
            masks = self._choose(run, weights)
        return WeightMaskPlan(
            method=repr(self),
            num_tokens=run.num_inputs,
            masks={name: mask.cpu() for name, mask in masks.items()},
            moved={name: tensor.detach().cpu() for name, tensor in tensors_of(copy).items() if not torch.equal(tensor, before[name])},
        )

    def _move(self, run: _Run, weights: Mapping[str, Tensor]) -> None:
        """Projected gradient descent on the weights of the copy."""
        from partwise.prune.projected_sgd import ProjectedSGD

        moving: list[Any] = [weight.requires_grad_() for weight in weights.values()]
        optimizer = ProjectedSGD(moving, lr=self.perturb_lr, radius=self.radius, momentum=self.momentum)
        run.train(optimizer, dict, num_epochs=self.perturb_epochs, phase="moving weights")
        for weight in moving:
            weight.requires_grad_(False).grad = None

    def _choose(self, run: _Run, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Train scores; which weights are the best of their layers in the end."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        scores: dict[str, Any] = {}
        for name, weight in weights.items():
            drawn = torch.nn.init.kaiming_uniform_(torch.empty(weight.shape), a=math.sqrt(5), generator=generator)
            scores[name] = drawn.to(weight.device).requires_grad_()

        def masked() -> dict[str, Tensor]:
            return {name: weight * _as_if_linear(scores[name], self.keep).to(weight.dtype) for name, weight in weights.items()}

        optimizer = torch.optim.SGD(list(scores.values()), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        run.train(optimizer, masked, num_epochs=self.num_epochs, phase="choosing weights")
        for name, score in scores.items():
            check_finite(score.detach(), name=f"the scores of {name}")
        return {name: top_share(score.detach().abs(), self.keep) for name, score in scores.items()}


@dataclass
class _Run:
    """What both steps train with."""

    model: nn.Module
    pieces: Sequence[Any]
    seed: int
    report: Report
    num_inputs: int = 0

    def train(self, optimizer: torch.optim.Optimizer, replaced: Callable[[], Mapping[str, Tensor]], *, num_epochs: int, phase: str) -> None:
        """Descend for some epochs, with other tensors in the place of the model's. Rates fall along half a cosine."""
        from torch.func import functional_call

        first, loss, step = optimizer.param_groups[0]["lr"], math.nan, 0
        total = num_epochs * len(self.pieces)
        with _seeded(next(self.model.parameters()).device, self.seed):
            for _ in range(num_epochs):
                num_inputs = 0
                for batch in _batches(self.model, self.pieces):
                    self.report(phase, step, total, f"loss {loss:.4g}" if step else "")
                    for group in optimizer.param_groups:
                        group["lr"] = first * (1 + math.cos(math.pi * min(1.0, step / total))) / 2
                    optimizer.zero_grad()
                    found = loss_of(functional_call(self.model, dict(replaced()), *arguments_of(self.model, batch)), batch)
                    found.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    loss, step, num_inputs = float(found.detach()), step + 1, num_inputs + count_inputs(batch)
                    if not math.isfinite(loss):
                        raise RunError(
                            "diverged", f"the loss is {loss} at step {step} of {total} while {phase}, expected a finite number. Check the data, or lower the "
                            "learning rate."
                        )  # fmt: skip
                self.num_inputs = num_inputs
        self.report(phase, total, total, "")


def maskable_weights(model: nn.Module) -> tuple[str, ...]:
    """Names of the weights of linear and convolutional layers that no other kind of module uses.

    Raises
    ------
    InputError
        ``no-weights`` when there are none.
    """
    from torch import nn

    from partwise.models import tensors_of

    fits: dict[int, bool] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fits[id(parameter)] = fits.get(id(parameter), True) and isinstance(module, nn.Linear | nn.Conv2d) and name == "weight"
    names = tuple(name for name, tensor in tensors_of(model).items() if fits.get(id(tensor)) and tensor.is_floating_point())
    if not names:
        raise InputError(
            "no-weights",
            f"{type(model).__name__} has no torch.nn.Linear or Conv2d with a weight of its own, expected at least one to choose in. Pass another model.",
        )
    return names


def top_share(sizes: Tensor, keep: float) -> Tensor:
    """Mark the largest entries.

    Parameters
    ----------
    sizes : Tensor
        Of any shape, finite.
    keep : float
        Share that is marked, in (0, 1], rounded to whole entries, halves up, at least one. Of equal entries the first ones are taken.

    Returns
    -------
    Tensor of the shape of ``sizes``, bool

    Examples
    --------
    >>> import torch
    >>> top_share(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 0.75)
    tensor([[ True,  True],
            [False,  True]])
    """
    import numpy as np
    import torch

    flat = sizes.flatten()  # (entries,)
    rest = flat.numel() - max(1, int(keep * flat.numel() + 0.5))
    if flat.device.type == "cpu":  # several times as fast as torch
        smallest = torch.from_numpy(np.partition(flat.numpy(), rest))[rest]
    else:
        smallest = flat.kthvalue(rest + 1).values
    chosen = flat > smallest
    ties = (flat == smallest).nonzero().flatten()
    chosen[ties[: flat.numel() - rest - int(chosen.sum())]] = True
    return chosen.view_as(sizes)


def _as_if_linear(scores: Tensor, keep: float) -> Tensor:
    """1 where a weight is used and 0 elsewhere; to the gradient it is the size of the score."""
    sizes = scores.abs()
    return top_share(sizes.detach(), keep).to(sizes.dtype) + (sizes - sizes.detach())


def _readable_again(model: nn.Module, data: Data | None) -> Sequence[Any]:
    """Data that give the same batches, as often as they are asked, and know how many."""
    from torch import Tensor

    if data is None or isinstance(data, Tensor):
        return batches_of(model, data)
    pieces: Any = data
    try:
        num_batches = len(pieces)
    except TypeError:  # a generator, or a loader of a stream
        pieces = list(pieces)
        num_batches = len(pieces)
    return pieces if num_batches else batches_of(model, [])


def _batches(model: nn.Module, pieces: Iterable[Any]) -> Iterator[Batch]:
    for piece in pieces:
        yield piece if isinstance(piece, Batch) else batches_of(model, [piece])[0]


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, the global random state is that of a seed; afterwards it is what it was before."""
    import torch

    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
