"""Greedy forward selection: a weighted sum of few units that comes close to a target, built step by step from the unit that helps most.

A step adds some of one unit. With equal amounts, as in the paper, the output after ``k`` steps is the mean of the ``k`` units added, where one that was added
twice counts twice; so the output of the whole layer must be read as the mean of all its units, and every further step makes the earlier ones smaller. With
fitted amounts a step adds as much of a unit as brings the sum closest to the target, or takes some of it back.

Only inner products are needed, so a step costs as much as there are units, however many examples the target has.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from partwise.checks import InputError, check_at_least, check_choice

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AMOUNTS", "Amounts", "Course", "Subset", "greedy_course", "greedy_subset"]

Amounts: TypeAlias = Literal["equal", "fitted"]
AMOUNTS: tuple[Amounts, ...] = ("equal", "fitted")
TINY = 1e-24  # squared size of a unit beside the largest, at which nothing could be fitted but rounding


@dataclass(frozen=True)
class Course:
    """Steps of a greedy selection.

    Parameters
    ----------
    chosen : tuple of int
        The unit of each step.
    losses : tuple of float
        Half the squared distance from the target after each step.
    """

    chosen: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Subset:
    """A given number of different units, and how much of each.

    Parameters
    ----------
    units : tuple of int
        Lowest first.
    weights : Tensor of shape (len(units),), float64
        What each unit is multiplied by; with equal amounts they add up to 1.
    loss : float
        Half the squared distance of the weighted sum from the target.
    course : Course
        All steps, those behind the best one included.
    """

    units: tuple[int, ...]
    weights: Tensor
    loss: float
    course: Course


def greedy_course(
    gram: Tensor, cross: Tensor, squared_target: float, *, num_steps: int, amounts: Amounts = "equal", allow_repeats: bool = True
) -> Course:
    """Add units one by one, each time the one with which the sum is closest to the target; of equals the one with the lowest index.

    Parameters
    ----------
    gram : Tensor of shape (units, units), float64
        Inner products ``<phi_i, phi_j>`` of the units.
    cross : Tensor of shape (units,), float64
        ``<phi_i, Y>``, their inner products with the target.
    squared_target : float
        ``||Y||^2``.
    num_steps : int
        Steps to make.
    amounts : {"equal", "fitted"}
        equal: with ``z`` the sum of the units added before, step ``k`` takes the smallest ``||(z + phi_i) / k - Y||^2``. fitted: with ``u`` the weighted sum so
        far, it takes the smallest ``||u + a phi_i - Y||^2`` over all ``a`` that leave no weight below 0.
    allow_repeats : bool, default=True
        Whether a unit may have more than one step.

    Raises
    ------
    InputError
        ``below-minimum`` for less than one step, ``too-few-units`` when there are not enough different ones, ``unknown-choice``.

    References
    ----------
    Equal amounts: Good Subnetworks Provably Exist: Pruning via Greedy Forward Selection. arXiv:2003.01794.

    Examples
    --------
    >>> import torch
    >>> units = torch.tensor([[2.0, 0.0], [0.0, 2.0], [9.0, 9.0]], dtype=torch.float64)
    >>> target = torch.tensor([1.0, 1.0], dtype=torch.float64)
    >>> greedy_course(units @ units.T, units @ target, 2.0, num_steps=2)
    Course(chosen=(0, 1), losses=(1.0, 0.0))
    >>> greedy_course(units @ units.T, units @ target, 2.0, num_steps=1, amounts="fitted")
    Course(chosen=(2,), losses=(0.0,))
    """
    check_at_least(num_steps, 1, name="num_steps")
    if not allow_repeats:
        _check_enough(num_steps, len(cross))
    steps = _start(gram, cross, squared_target, amounts)
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
    amounts: Amounts = "equal",
    allow_repeats: bool = True,
    must: Tensor | None = None,
) -> Subset:
    """The steps of `greedy_course`, until as many different units as wanted are there; then only those have further steps, which sharpens their weights.

    A unit of which all was taken back makes room for another. Of all steps at which the number of units is right, the one with the smallest loss counts. When
    half of the steps are gone and units are missing, only new ones may be added.

    Parameters
    ----------
    gram, cross, squared_target, amounts : Tensor, Tensor, float, str
        As for `greedy_course`.
    num_units : int
        Different units of the result.
    max_steps : int
        At least ``num_units``. Without repeats it makes no difference.
    allow_repeats : bool, default=True
        False: ``num_units`` steps, one for each unit.
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
    check_at_least(num_units, 1, name="num_units")
    _check_enough(num_units, len(cross))
    check_at_least(max_steps, num_units, name="max_steps")
    if must is not None and int(must.sum()) > num_units:
        raise InputError(
            "too-many-protected", f"must marks {int(must.sum())} units but num_units={num_units}, expected at most {num_units}. Raise num_units, or mark fewer."
        )
    steps = _start(gram, cross, squared_target, amounts)
    deadline = max(num_units, max_steps // 2)
    best: tuple[float, Tensor, Tensor] | None = None  # loss, which units, weights
    for done in range(max_steps if allow_repeats else num_units):
        steps.add(_allowed(steps, num_units, deadline - done, allow_repeats, must))
        if steps.num_seen == num_units and (best is None or steps.losses[-1] < best[0]):
            best = steps.losses[-1], steps.seen.clone(), steps.weights
    assert best is not None, "the deadline sees to that"
    loss, is_there, weights = best
    return Subset(tuple(is_there.nonzero().flatten().tolist()), weights[is_there], loss, steps.course())


def _allowed(steps: _Steps, num_units: int, steps_left: int, allow_repeats: bool, must: Tensor | None) -> Tensor | None:
    """Which units the next step may be about, (units,), bool; None: all."""
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


def _start(gram: Tensor, cross: Tensor, squared_target: float, amounts: Amounts) -> _Steps:
    check_choice(amounts, AMOUNTS, name="amounts")
    return {"equal": _EqualSteps, "fitted": _FittedSteps}[amounts](gram, cross, squared_target)


class _Steps(abc.ABC):
    """Where a selection is: how much of each unit was added, and inner products of the sum of all that."""

    def __init__(self, gram: Tensor, cross: Tensor, squared_target: float) -> None:
        import torch

        self.gram, self.cross, self.squared_target = gram, cross, squared_target
        self.own = gram.diagonal()  # (units,)
        self.added = torch.zeros_like(cross)  # (units,)
        self.with_units = torch.zeros_like(cross)  # of the sum with each unit
        self.with_itself = self.with_target = 0.0
        self.seen = torch.zeros(len(cross), dtype=torch.bool)  # which units are there
        self.num_seen = 0
        self.chosen: list[int] = []
        self.losses: list[float] = []

    def add(self, allowed: Tensor | None) -> None:
        """The best unit, of those allowed."""
        import torch

        amounts, worth = self.proposals(len(self.chosen) + 1)
        if allowed is not None:
            worth = worth.masked_fill(~allowed, -torch.inf)
        unit = int(worth.argmax())  # the first of equals
        amount = float(amounts[unit])
        self.with_itself += amount * float(2 * self.with_units[unit] + amount * self.own[unit])
        self.with_target += amount * float(self.cross[unit])
        self.with_units = self.with_units + amount * self.gram[unit]
        self.added[unit] += amount
        self.seen[unit] = amount >= 0 or bool(self.added[unit] > 0)  # all of it taken back: its place is free
        self.num_seen = int(self.seen.sum())
        self.chosen.append(unit)
        squares = self.squared_target - 2 * self.scale * self.with_target + self.scale**2 * self.with_itself
        self.losses.append(max(squares, 0.0) / 2)  # a difference of large numbers: below zero by rounding only

    @property
    def weights(self) -> Tensor:
        """(units,)."""
        return self.added * self.scale

    def course(self) -> Course:
        return Course(tuple(self.chosen), tuple(self.losses))

    @property
    @abc.abstractmethod
    def scale(self) -> float:
        """What the sum is multiplied by."""

    @abc.abstractmethod
    def proposals(self, number: int) -> tuple[Tensor, Tensor]:
        """For step ``number``: how much of each unit it would add, and by how much the squared distance would fall, up to what is the same for all."""


class _EqualSteps(_Steps):
    @property
    def scale(self) -> float:
        return 1 / len(self.chosen)

    def proposals(self, number: int) -> tuple[Tensor, Tensor]:
        import torch

        return torch.ones_like(self.cross), 2 * number * self.cross - 2 * self.with_units - self.own


class _FittedSteps(_Steps):
    scale = 1.0

    def proposals(self, number: int) -> tuple[Tensor, Tensor]:
        import torch

        pulls = self.cross - self.with_units  # <Y - u, phi_i>
        amounts = (pulls / self.own).masked_fill(self.own <= TINY * self.own.max(), 0)
        amounts = torch.maximum(amounts, -self.added)
        return amounts, amounts * (2 * pulls - amounts * self.own)
