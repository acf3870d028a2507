"""Which units of a layer explain its output: an iteration in the manner of CoSaMP, the algorithm that recovers sparse signals.

The signal is how large the units are, the measurement is what a layer makes of them. Both are known, which is why nothing is solved: what the units chosen so
far leave unexplained says which others are worth a look, and how large a unit is in the whole layer says which of those stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partwise.checks import InputError, check_at_least, check_finite

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Recovery", "recover_units"]


@dataclass(frozen=True)
class Recovery:
    """What `recover_units` found.

    Parameters
    ----------
    units : tuple of int
        Lowest first.
    num_iterations : int
        Iterations made.
    is_settled : bool
        Whether the last iteration changed nothing, so that no later one would.
    """

    units: tuple[int, ...]
    num_iterations: int
    is_settled: bool


def recover_units(
    importance: Callable[[Tensor], Tensor], sizes: Tensor, *, keep: int, num_iterations: int, protect: Tensor | None = None
) -> Recovery:
    """The iteration of i-SpaSP.

    Begin without any unit. In each iteration, candidates are the ``2 keep`` units that are most important for what the chosen ones do not explain, and the
    chosen ones themselves; of these candidates the ``keep`` largest are chosen. Of equal units the one with the lower index comes first.

    Parameters
    ----------
    importance : callable
        Told which units are not chosen, (units,), 1 for those and 0 for the others, in the dtype of ``sizes``; returns the importance of each, (units,).
    sizes : Tensor of shape (units,)
        How large each unit is in the whole layer.
    keep : int
        Units to choose (s in the paper).
    num_iterations : int
        At most (T in the paper). It ends earlier when an iteration changes nothing.
    protect : Tensor of shape (units,) and dtype bool, optional
        Units that are chosen in every iteration.

    Raises
    ------
    InputError
        ``keep-out-of-range`` when ``keep`` is below 1 or above the number of units, ``below-minimum`` for less than one iteration, ``too-many-protected``,
        ``not-finite``.

    References
    ----------
    i-SpaSP: Structured Neural Pruning via Sparse Signal Recovery. arXiv:2112.04905.

    Examples
    --------
    >>> import torch
    >>> recover_units(lambda left: left * torch.tensor([3.0, 9.0, 0.0, 8.0]), torch.tensor([3.0, 9.0, 4.0, 8.0]), keep=2, num_iterations=20)
    Recovery(units=(1, 3), num_iterations=2, is_settled=True)
    """
    import torch

    num_units = len(sizes)
    if not 1 <= keep <= num_units:
        raise InputError("keep-out-of-range", f"got keep={keep} for {num_units} units, expected a number from 1 to {num_units}. Change keep.")
    check_at_least(num_iterations, 1, name="num_iterations")
    check_finite(sizes, name="sizes of units")
    must = torch.zeros(num_units, dtype=torch.bool) if protect is None else protect
    if int(must.sum()) > keep:
        raise InputError("too-many-protected", f"protect marks {int(must.sum())} units but keep={keep}, expected at most {keep}. Raise keep, or protect fewer.")
    order = _best_first(sizes)
    order = order[(~must[order]).int().sort(stable=True).indices]  # (units,) those that must be there before all others
    chosen: tuple[int, ...] = ()
    for iteration in range(1, num_iterations + 1):
        left = torch.ones_like(sizes)
        left[list(chosen)] = 0
        is_candidate = must.clone()
        is_candidate[list(chosen)] = True
        is_candidate[_best_first(importance(left))[: 2 * keep]] = True
        before, chosen = chosen, tuple(order[is_candidate[order]][:keep].sort().values.tolist())
        if chosen == before:
            return Recovery(chosen, iteration, is_settled=True)
    return Recovery(chosen, num_iterations, is_settled=False)


def _best_first(values: Tensor) -> Tensor:
    """Indices, highest values first, of equal ones the lower index first."""
    return values.sort(descending=True, stable=True).indices
