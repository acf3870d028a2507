"""Shape 2: score -> select -> slice.

A method writes the first step: one number per part that says what the part is worth. The second step is here, because budgets and parts
that must stay are the same everywhere. The third step, slicing, belongs to whoever owns the object: it makes a smaller dense thing, never
only a mask.

Three questions about a budget, three functions:

* :func:`select`: which ``keep`` parts are best?
* :func:`spend`: parts have prices; which do we buy with this budget?
* :func:`select_prefixes`: parts come in ordered groups, and one may be kept only if those before it are; how many of each group?

All are pure and deterministic: arguments are not changed, and ties go to the lower index.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from partwise.checks import InputError, check_finite

if TYPE_CHECKING:
    from torch import Tensor


def select(scores: Tensor, *, keep: int, protect: Tensor | None = None) -> Tensor:
    """Indices of the ``keep`` best parts, in ascending order.

    Parameters
    ----------
    scores : Tensor of shape (parts,)
        What each part is worth; more is better.
    keep : int
        How many parts stay, protected ones included.
    protect : Tensor of shape (parts,) and dtype bool, optional
        Parts that stay whatever their score is.

    Returns
    -------
    Tensor of shape (keep,) and dtype int64
        Sorted indices into ``scores``, on the same device. Of equal scores the lower index stays.

    Raises
    ------
    InputError
        When a score is NaN or infinite, shapes disagree, ``keep`` is not between 0 and the number of parts, or more parts are protected
        than may stay.

    Examples
    --------
    >>> import torch
    >>> select(torch.tensor([0.1, 0.9, 0.5]), keep=2).tolist()
    [1, 2]
    >>> select(torch.tensor([0.1, 0.9, 0.5]), keep=2, protect=torch.tensor([True, False, False])).tolist()
    [0, 1]
    """
    if scores.ndim != 1:
        raise InputError("scores-shape", f"got scores of shape {tuple(scores.shape)}, expected one number per part. Reduce other dimensions first.")
    check_finite(scores, name="scores")
    num_parts = len(scores)
    if not 0 <= keep <= num_parts:
        raise InputError("keep-out-of-range", f"got keep={keep} for {num_parts} parts, expected a number from 0 to {num_parts}. Change keep.")
    order = scores.sort(descending=True, stable=True).indices  # (parts,) best first, ties by index
    if protect is not None:
        order = _protected_first(order, protect, keep=keep)
    return order[:keep].sort().values  # (keep,)


def _protected_first(order: Tensor, protect: Tensor, *, keep: int) -> Tensor:
    if protect.shape != order.shape or protect.dtype.is_floating_point or protect.dtype.is_complex:
        raise InputError(
            "protect-shape",
            f"got protect of shape {tuple(protect.shape)}, {protect.dtype}, expected one boolean for each of {len(order)} parts. Pass a mask.",
        )
    mask = protect.bool()
    num_protected = int(mask.sum())
    if num_protected > keep:
        raise InputError(
            "too-many-protected", f"protect marks {num_protected} parts but keep={keep}, expected at most {keep}. Raise keep, or protect fewer parts."
        )
    # Moved to the front, not scored higher: a score that ties with the highest possible one could still push a protected part out.
    return order[(~mask[order]).int().sort(stable=True).indices]  # (parts,)


def spend(scores: Sequence[float] | Tensor, costs: Sequence[int], *, budget: int, limit: int | None = None) -> list[int]:
    """Buy parts with a budget: best score first, whatever no longer fits is passed over.

    With equal costs no other choice has a higher total score, unless scores are negative: this spends as long as something fits.

    Parameters
    ----------
    scores : sequence of float, or Tensor of shape (parts,)
        What each part is worth; more is better.
    costs : sequence of int
        Price of each part, at least 1, in the unit of ``budget``.
    budget : int
        What may be spent in total, at least 0.
    limit : int, optional
        The most parts to buy, at least 0. Left out: as many as fit.

    Returns
    -------
    list of int
        Indices of the parts bought, best first. Of equal scores the lower index is bought first.

    Raises
    ------
    InputError
        When a score is NaN or infinite, a cost is below 1, lengths disagree, or ``budget`` or ``limit`` is negative.

    Examples
    --------
    >>> spend([0.5, 0.9, 0.7], [1, 3, 1], budget=2)
    [2, 0]
    >>> spend([0.5, 0.9, 0.7], [1, 1, 1], budget=9, limit=1)
    [1]
    """
    worth = _as_finite_floats(scores, name="scores")
    _check_costs(costs, num_expected=len(worth))
    if budget < 0 or (limit is not None and limit < 0):
        raise InputError("negative-budget", f"got budget={budget} and limit={limit}, expected both to be at least 0. Pass 0 to buy nothing.")
    bought: list[int] = []
    left = budget
    for index in sorted(range(len(worth)), key=lambda part: (-worth[part], part)):
        if limit is not None and len(bought) == limit:
            break
        if costs[index] <= left:
            bought.append(index)
            left -= costs[index]
    return bought


def select_prefixes(values: Sequence[Sequence[float]], costs: Sequence[int], *, budget: int, at_least: int = 1) -> list[int]:
    """How many leading parts of each group to keep, when a part may stay only if all parts before it in its group stay.

    From the required minimum, the run of next parts with the highest value per cost is added again and again while it fits. A strong
    part behind a weak one can thereby pull both in. Where the costs of all groups are equal and values do not rise within a group,
    the total value is the highest that the budget allows.

    Parameters
    ----------
    values : sequence of sequences of float
        For each group, the worth of its parts in the order in which they may be kept.
    costs : sequence of int
        For each group, the price of one of its parts, at least 1, in the unit of ``budget``.
    budget : int
        What all kept parts may cost together. It is spent as far as parts fit.
    at_least : int, default=1
        Parts that every group keeps, or all of a group that has fewer.

    Returns
    -------
    list of int
        For each group, the number of leading parts kept. Of equal values per cost the shorter run, then the lower group, is added first.

    Raises
    ------
    InputError
        When ``budget`` is below the cost of the minimum or above the cost of everything, a value is NaN or infinite, a cost is below 1,
        or lengths disagree.

    Examples
    --------
    >>> select_prefixes([[3.0, 1.0], [2.0, 1.5]], [1, 1], budget=3)
    [1, 2]
    >>> select_prefixes([[3.0, 0.1, 5.0], [2.0, 1.5, 1.0]], [1, 1], budget=4)
    [3, 1]
    """
    groups = [_as_finite_floats(group, name=f"values[{index}]") for index, group in enumerate(values)]
    _check_costs(costs, num_expected=len(groups))
    if at_least < 0:
        raise InputError("negative-budget", f"got at_least={at_least}, expected at least 0. Pass 0 to let whole groups go.")
    kept = [min(at_least, len(group)) for group in groups]
    _check_prefix_budget(groups, costs, kept, budget=budget)

    left = budget - sum(number * cost for number, cost in zip(kept, costs, strict=True))
    waiting = [
        (*run, index) for index, group in enumerate(groups) if (run := _best_run(group, kept[index], cost=costs[index], left=left)) is not None
    ]
    heapq.heapify(waiting)
    while waiting:
        _, length, index = heapq.heappop(waiting)
        if length * costs[index] <= left:
            kept[index] += length
            left -= length * costs[index]
        # An entry that no longer fits was an upper bound on what its group can still offer; what fits now goes back into the queue.
        run = _best_run(groups[index], kept[index], cost=costs[index], left=left)
        if run is not None:
            heapq.heappush(waiting, (*run, index))
    return kept


def _best_run(group: Sequence[float], start: int, *, cost: int, left: int) -> tuple[float, int] | None:
    """(minus the value per cost, length) of the best run of parts from ``start`` that ``left`` can pay; the shortest of equals."""
    best: tuple[float, int] | None = None
    total = 0.0
    for length, value in enumerate(group[start : start + left // cost], start=1):
        total += value
        candidate = (-total / (length * cost), length)
        if best is None or candidate < best:
            best = candidate
    return best


def _check_prefix_budget(groups: Sequence[Sequence[float]], costs: Sequence[int], required: Sequence[int], *, budget: int) -> None:
    lowest = sum(number * cost for number, cost in zip(required, costs, strict=True))
    highest = sum(len(group) * cost for group, cost in zip(groups, costs, strict=True))
    if budget < lowest:
        raise InputError(
            "budget-too-small",
            f"got a budget of {budget}, but what must stay of {len(groups)} groups costs {lowest}. Pass a budget from {lowest} to {highest}.",
        )
    if budget > highest:
        raise InputError(
            "budget-too-large",
            f"got a budget of {budget}, but all parts of {len(groups)} groups cost {highest}. Pass a budget from {lowest} to {highest}.",
        )


def _as_finite_floats(numbers: Sequence[float] | Tensor, *, name: str) -> list[float]:
    listed: Sequence[float] = numbers if isinstance(numbers, Sequence) else numbers.tolist()
    num_bad = sum(not math.isfinite(number) for number in listed)
    if num_bad:
        raise InputError("not-finite", f"{name} has {num_bad} NaN or infinite entries out of {len(listed)}. Check how they were computed.")
    return [float(number) for number in listed]


def _check_costs(costs: Sequence[int], *, num_expected: int) -> None:
    if len(costs) != num_expected:
        raise InputError("costs-mismatch", f"got {len(costs)} costs for {num_expected} scores or groups, expected one each. Pass as many costs.")
    lowest = min(costs, default=1)
    if lowest < 1:
        raise InputError("costs-mismatch", f"got a cost of {lowest}, expected every cost to be at least 1. Leave out parts that cost nothing.")
