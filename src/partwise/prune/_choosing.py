"""Which units of one axis stay, once they have scores; and which must."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

from partwise.checks import InputError, check_finite
from partwise.selection import select

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.models.axes import CoupledAxis

__all__ = ["best_units", "protected_units"]


def best_units(scores: Tensor, axis: CoupledAxis, *, keep: int, protect: Tensor | None) -> tuple[int, ...]:
    """The ``keep`` units with the highest scores, as many in every group of the axis.

    Parameters
    ----------
    scores : Tensor of shape (units,)
        More is better.
    axis : CoupledAxis
        Its groups keep equal numbers.
    keep : int
        A multiple of the number of groups.
    protect : Tensor of shape (units,) and dtype bool, optional
        What stays whatever it scores.
    """
    check_finite(scores, name=f"the scores of {axis.name}")
    size = axis.size // axis.groups
    kept: list[int] = []
    for group in range(axis.groups):
        here = slice(group * size, (group + 1) * size)
        must = None if protect is None else protect[here]
        kept += [group * size + unit for unit in select(scores[here], keep=keep // axis.groups, protect=must).tolist()]
    return tuple(kept)


def protected_units(axes: Sequence[CoupledAxis], patterns: Sequence[str]) -> tuple[set[str], dict[str, Tensor]]:
    """Names of the axes that stay whole, and of others which units must stay, (units,), bool.

    Parameters
    ----------
    axes : sequence of CoupledAxis
        What could be cut.
    patterns : sequence of str
        As in ``protect`` of a method.

    Raises
    ------
    InputError
        ``protect-unknown`` for a pattern that fits nothing, or for units that do not exist.
    """
    import torch

    whole: set[str] = set()
    masks: dict[str, Tensor] = {}
    for pattern in patterns:
        names, _, listed = pattern.partition(":")
        fitting = [axis for axis in axes if fnmatch.fnmatchcase(axis.name, names)]
        if not fitting:
            known = ", ".join(axis.name for axis in axes[:4]) + (", ..." if len(axes) > 4 else "")
            raise InputError("protect-unknown", f"protect={pattern!r} fits none of the {len(axes)} axes of this model: {known}. Use their names, or a pattern.")
        for axis in fitting:
            if not listed:
                whole.add(axis.name)
            else:
                masks.setdefault(axis.name, torch.zeros(axis.size, dtype=torch.bool))[_numbers(listed, axis, pattern)] = True
    return whole, masks


def _numbers(listed: str, axis: CoupledAxis, pattern: str) -> list[int]:
    """Units as in ``0,4-7``."""
    units: list[int] = []
    for piece in listed.split(","):
        first, dash, last = piece.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or not int(first) <= int(last or first) < axis.size:
            raise InputError(
                "protect-unknown",
                f"protect={pattern!r} names the units {piece!r} of {axis.name}, expected numbers from 0 to {axis.size - 1}. Write them as 0,4-7.",
            )
        units += range(int(first), int(last or first) + 1)
    return units
