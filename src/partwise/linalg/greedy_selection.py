"""Greedy forward selection: a sum of few units that comes close to a target, built by adding the unit that helps most.

After ``k`` steps ``z`` is the sum of the ``k`` units chosen, where one that was chosen twice counts twice, and the output is ``z`` times a scale. In the mean
form the scale is ``1 / k``: the output is the mean of what was chosen, as that of the whole layer is the mean of all its units. Otherwise the scale is fitted:
the number that brings ``z`` closest to the target.

Only inner products are needed, so a step costs as much as there are units, however many examples the target has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from partwise.checks import InputError, check_at_least, check_choice

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SCALES", "Course", "Scale", "Subset", "greedy_course", "greedy_subset"]

Scale: TypeAlias = Literal["mean", "fitted"]
SCALES: tuple[Scale, ...] = ("mean", "fitted")


@dataclass(frozen=True)
class Course:
    """Steps of a greedy selection.

    Parameters
    ----------
    chosen : tuple of int
        The unit that each step added.
    losses : tuple of float
        Half the squared distance from the target after each step.
    """

    chosen: tuple[int, ...]
    losses: tuple[float, ...]

    def counts(self, size: int) -> Tensor:
        """How often each of ``size`` units was chosen: (size,), int64."""
        import torch

        return torch.bincount(torch.tensor(self.chosen, dtype=torch.int64), minlength=size)


@dataclass(frozen=True)
class Subset:
    """A given number of different units, and how much of each.

    Parameters
    ----------
    units : tuple of int
        Lowest first.
    weights : Tensor of shape (len(units),), float64
        What each unit is multiplied by: how often it was chosen times the scale.
    loss : float
        Half the squared distance of the weighted sum from the target.
    course : Course
        All steps, those behind the best one included.
    """

    units: tuple[int, ...]
    weights: Tensor
    loss: float
    course: Course


def greedy_course(gram: Tensor, cross: Tensor, squared_target: float, *, num_steps: int, scale: Scale = "mean", allow_repeats: bool = True) -> Course:
    """Add units one by one, each time the one with which the output is closest to the target; of equals the one with the lowest index.

    Parameters
    ----------
    gram : Tensor of shape (units, units), float64
        Inner products ``<phi_i, phi_j>`` of the units.
    cross : Tensor of shape (units,), float64
        ``<phi_i, Y>``, their inner products with the target.
    squared_target : float
        ``||Y||^2``.
    num_steps : int
        Units to add.
    scale : {"mean", "fitted"}
        mean: step ``k`` takes the smallest ``||(z + phi_i) / k - Y||^2``. fitted: the smallest ``||a (z + phi_i) - Y||^2`` over all ``a >= 0`` as well.
    allow_repeats : bool, default=True
        Whether a unit may be added more than once.

    Raises
    ------
    InputError
        ``below-minimum`` for less than one step, ``too-few-units`` when there are not enough different ones, ``unknown-choice``.

    References
    ----------
    The mean form: Good Subnetworks Provably Exist: Pruning via Greedy Forward Selection. arXiv:2003.01794.

    Examples
    --------
    >>> import torch
    >>> units = torch.tensor([[2.0, 0.0], [0.0, 2.0], [9.0, 9.0]], dtype=torch.float64)
    >>> target = torch.tensor([1.0, 1.0], dtype=torch.float64)
    >>> greedy_course(units @ units.T, units @ target, 2.0, num_steps=2)
    Course(chosen=(0, 1), losses=(1.0, 0.0))
    >>> greedy_course(units @ units.T, units @ target, 2.0, num_steps=1, scale="fitted")
    Course(chosen=(2,), losses=(0.0,))
    """
    check_at_least(num_steps, 1, name="num_steps")
    if not allow_repeats:
        _check_enough(num_steps, len(cross))
    steps = _Steps(gram, cross, squared_target, scale)
    for _ in range(num_steps):
        steps.add(None if allow_repeats else ~steps.seen)
    return steps.course()


def greedy_subset(
    gram: Tensor,
    cross: Tensor,
    squared_target: float,
    *,
    num_units: int,
    max_steps: int,
    scale: Scale = "mean",
    allow_repeats: bool = True,
    must: Tensor | None = None,
) -> Subset:
    """The steps of `greedy_course`, until as many different units as wanted are there; then only those are added again, which sharpens their weights.

    Of all steps at which the number of units is right, the one with the smallest loss counts. When half of the steps are gone and units are still missing,
    only new ones may be added.

    Parameters
    ----------
    gram, cross, squared_target, scale : Tensor, Tensor, float, str
        As for `greedy_course`.
    num_units : int
        Different units of the result.
    max_steps : int
        At least ``num_units``. Without repeats it makes no difference.
    allow_repeats : bool, default=True
        False: ``num_units`` steps, so that all weights are equal.
    must : Tensor of shape (units,) and dtype bool, optional
        Units that are in the result, whatever they do; they are added before all others.

    Raises
    ------
    InputError
        ``below-minimum``, ``unknown-choice``, ``too-few-units`` for more units than there are, ``too-many-protected`` for more that must be there than may.

    Examples
    --------
    >>> import torch
    >>> units = torch.tensor([[4.0, 0.0], [0.0, 4.0], [1.0, 9.0]], dtype=torch.float64)
    >>> target = torch.tensor([3.0, 1.0], dtype=torch.float64)
    >>> best = greedy_subset(units @ units.T, units @ target, 10.0, num_units=2, max_steps=20)
    >>> best.units, best.weights.tolist(), best.loss
    ((0, 1), [0.75, 0.25], 0.0)
    """
    size = len(cross)
    check_at_least(num_units, 1, name="num_units")
    _check_enough(num_units, size)
    check_at_least(max_steps, num_units, name="max_steps")
    if must is not None and int(must.sum()) > num_units:
        raise InputError(
            "too-many-protected", f"must marks {int(must.sum())} units but num_units={num_units}, expected at most {num_units}. Raise num_units, or mark fewer."
        )
    steps = _Steps(gram, cross, squared_target, scale)
    deadline = max(num_units, max_steps // 2)
    best, best_scale = 0, 0.0  # number of steps, and the scale there
    for done in range(max_steps if allow_repeats else num_units):
        steps.add(_allowed(steps, num_units, deadline - done, allow_repeats, must))
        if steps.num_seen == num_units and (not best or steps.losses[-1] < steps.losses[best - 1]):
            best, best_scale = done + 1, steps.factor
    counts = Course(tuple(steps.chosen[:best]), ()).counts(size)
    units = tuple(counts.nonzero().flatten().tolist())
    return Subset(units, counts[list(units)].double() * best_scale, steps.losses[best - 1], steps.course())


def _allowed(steps: _Steps, num_units: int, steps_left: int, allow_repeats: bool, must: Tensor | None) -> Tensor | None:
    """Which units the next step may add, (units,), bool; None: all."""
    waiting = None if must is None else must & ~steps.seen
    if waiting is not None and bool(waiting.any()):
        return waiting
    missing = num_units - steps.num_seen
    if missing == 0:
        return steps.seen
    return None if allow_repeats and steps_left > missing else ~steps.seen


def _check_enough(wanted: int, size: int) -> None:
    if wanted > size:
        raise InputError(
            "too-few-units", f"got {wanted} different units to choose out of {size}, expected at most {size}. Lower the number, or allow repeats."
        )


class _Steps:
    """Where a selection is: inner products of the sum ``z`` of the units chosen so far."""

    def __init__(self, gram: Tensor, cross: Tensor, squared_target: float, scale: Scale) -> None:
        import torch

        check_choice(scale, SCALES, name="scale")
        self.gram, self.cross, self.squared_target, self.scale = gram, cross, squared_target, scale
        self.own = gram.diagonal()  # (units,)
        self.with_units = torch.zeros_like(cross)  # <z, phi_i>
        self.with_itself = self.with_target = 0.0  # <z, z> and <z, Y>
        self.seen = torch.zeros(len(cross), dtype=torch.bool)
        self.num_seen = 0
        self.chosen: list[int] = []
        self.losses: list[float] = []

    @property
    def factor(self) -> float:
        """What ``z`` is multiplied by."""
        if self.scale == "mean":
            return 1 / len(self.chosen)
        return max(self.with_target, 0.0) / self.with_itself if self.with_itself > 0 else 0.0

    def add(self, allowed: Tensor | None) -> None:
        """The best unit, of those allowed."""
        import torch

        worth = self._worth(len(self.chosen) + 1)
        if allowed is not None:
            worth = worth.masked_fill(~allowed, -torch.inf)
        unit = int(worth.argmax())  # the first of equals
        self.with_itself += float(2 * self.with_units[unit] + self.own[unit])
        self.with_target += float(self.cross[unit])
        self.with_units = self.with_units + self.gram[unit]
        self.num_seen += not bool(self.seen[unit])
        self.seen[unit] = True
        self.chosen.append(unit)
        squares = self.squared_target - 2 * self.factor * self.with_target + self.factor**2 * self.with_itself
        self.losses.append(max(squares, 0.0) / 2)  # a difference of large numbers: below zero by rounding only

    def _worth(self, number: int) -> Tensor:
        """What the squared distance falls by if a unit is added as the ``number``-th, up to what is the same for all: (units,)."""
        lengths = 2 * self.with_units + self.own  # of z + phi_i, squared, less what z has
        if self.scale == "mean":
            return 2 * number * self.cross - lengths
        along = (self.cross + self.with_target).clamp(min=0)
        lengths = lengths + self.with_itself
        return (along.square() / lengths).masked_fill(lengths <= 0, 0)

    def course(self) -> Course:
        return Course(tuple(self.chosen), tuple(self.losses))
