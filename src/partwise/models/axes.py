"""What a coupled axis is, and what a part is: the words in which families describe their models.

A *unit* is the smallest thing that can be left out of a model without a trace: a neuron, a filter, a head group, a residual block. An *axis* is a row of
such units, with the entries of all tensors that go together with each of them. A *part* says which units of which axes it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

from partwise.checks import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["Axis", "BlockAxis", "CoupledAxis", "Member", "Part", "check_part", "count_holders", "names_in_part", "sliced_entries"]


@dataclass(frozen=True)
class Member:
    """One tensor along an axis.

    Parameters
    ----------
    tensor : str
        Name in ``model.state_dict()``.
    dim : int
        The dimension that the axis runs along.
    width : int, default=1
        Consecutive entries of one unit: unit ``u`` covers ``u * width`` to ``(u + 1) * width - 1``. The size of a head, for example.
    starts : tuple of int, default=(0,)
        Where the entries of unit 0 begin; several where a tensor holds the units several times, one row of them behind the other.
    length : int, optional
        Entries of the whole dimension, where some of them lie on no axis. Left out: there are no others.
    """

    tensor: str
    dim: int
    width: int = 1
    starts: tuple[int, ...] = (0,)
    length: int | None = None

    def entries_of(self, units: Sequence[int]) -> torch.Tensor:
        """Indices of the entries of some units, in the order of ``starts``."""
        import torch

        first = torch.tensor(units, dtype=torch.int64)[:, None] * self.width  # (units, 1)
        wide = (first + torch.arange(self.width)).flatten()  # (units * width,)
        return torch.cat([start + wide for start in self.starts])  # (starts * units * width,)

    def kept_entries(self, units: Sequence[int], *, size: int) -> torch.Tensor:
        """Sorted indices of everything that a part with these units of an axis of ``size`` units holds, entries on no axis included."""
        import torch

        if self.length is None:
            return self.entries_of(units).sort().values
        stays = torch.ones(self.length, dtype=torch.bool)  # (length,)
        stays[self.entries_of(range(size))] = False
        stays[self.entries_of(units)] = True
        return stays.nonzero().flatten()  # (kept,)


@dataclass(frozen=True)
class CoupledAxis:
    """One choice of units, applied to several tensors at once.

    Parameters
    ----------
    name : str
        Name of the module that makes the units.
    kind : str
        ``"neurons"``, ``"heads"``, ``"filters"`` or ``"states"``.
    size : int
        Number of units.
    members : tuple of Member
        Every tensor that has entries of a unit.
    readers : tuple of str
        The members that read the units as input. The output of each is a sum over units, so zeroing a unit's entries here removes the unit, and a factor
        on the sum is folded here. None where something other than a layer reads them.
    closers : tuple of str, default=()
        The members whose entries switch a unit off when they are zero, where these are not the readers.
    groups : int, default=1
        Runs of units, one behind the other, that must keep equal numbers, because the model stores them as (groups, units).
    """

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    readers: tuple[str, ...]
    closers: tuple[str, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class BlockAxis:
    """Residual blocks of one section; a block that is left out is the identity.

    Parameters
    ----------
    name : str
        Name of the section, a module that runs its children in order.
    blocks : tuple of str
        Names of the children that can be left out, in order.
    children : tuple of str
        Names of all children of the section, in order.
    closers : tuple of tuple of str
        For each block, the tensors that switch its branch off when they are zero.
    """

    name: str
    blocks: tuple[str, ...]
    children: tuple[str, ...]
    closers: tuple[tuple[str, ...], ...]
    kind: str = field(default="blocks", init=False)

    @property
    def size(self) -> int:
        """Number of blocks that can be left out."""
        return len(self.blocks)


Axis: TypeAlias = CoupledAxis | BlockAxis


@dataclass(frozen=True)
class Part:
    """Which units a subnetwork holds.

    Parameters
    ----------
    units : mapping of str to tuple of int
        Axis name -> sorted unit indices. An axis that is not named is held whole, and so is everything that lies on no axis.
    index : int, default=0
        Number of the part. Results are merged in this order.

    Examples
    --------
    >>> Part({"0": (1, 4)}).units["0"]
    (1, 4)
    """

    units: Mapping[str, tuple[int, ...]]
    index: int = 0


def check_part(axes: Sequence[Axis], part: Part) -> None:
    """Refuse a part that names an unknown axis, holds nothing of an axis, or lists units that are out of range, unsorted or repeated."""
    sizes = {axis.name: axis.size for axis in axes}
    for name, units in part.units.items():
        if name not in sizes:
            known = ", ".join(list(sizes)[:8]) + (", ..." if len(sizes) > 8 else "")
            raise InputError("unknown-axis", f"got units of {name!r}, expected one of the {len(sizes)} axes of this model: {known}. Use their names.")
        if not units:
            raise InputError(
                "empty-layer",
                f"got a part without units of {name}, expected 1 to {sizes[name]} of them: a layer without units passes nothing on. Keep at least one.",
            )
        wrong = [unit for unit in units if not 0 <= unit < sizes[name]]
        if wrong or any(later <= unit for unit, later in pairwise(units)):
            trouble = f"unit {wrong[0]}" if wrong else "units that are not in rising order"
            raise InputError(
                "part-units", f"got {trouble} for {name}, expected distinct units from 0 to {sizes[name] - 1}, lowest first. Sort and check the part."
            )


def sliced_entries(axes: Iterable[Axis], part: Part) -> dict[str, dict[int, torch.Tensor]]:
    """Which entries of which tensor a part holds: tensor name -> {dimension: sorted indices}. Tensors that are not named are held whole."""
    entries: dict[str, dict[int, torch.Tensor]] = {}
    for axis in axes:
        if isinstance(axis, BlockAxis) or axis.name not in part.units:
            continue
        for member in axis.members:
            entries.setdefault(member.tensor, {})[member.dim] = member.kept_entries(part.units[axis.name], size=axis.size)  # (kept,)
    return entries


def names_in_part(axes: Iterable[Axis], part: Part, names: Iterable[str]) -> dict[str, str]:
    """Tensor names of the whole model -> names in the extracted one; those of absent blocks are left out.

    Blocks behind an absent one move up, because a section numbers its children from 0.
    """
    moved: dict[str, str | None] = {}
    for axis in axes:
        if isinstance(axis, BlockAxis) and axis.name in part.units:
            kept = {axis.blocks[unit] for unit in part.units[axis.name]}
            stays = [child for child in axis.children if child in kept or child not in axis.blocks]
            moved |= dict.fromkeys(axis.children)
            moved |= {child: f"{axis.name}.{position}" for position, child in enumerate(stays)}
    renamed: dict[str, str] = {}
    for name in names:
        block = next((child for child in moved if name.startswith(f"{child}.")), None)
        if block is None:
            renamed[name] = name
        elif (new := moved[block]) is not None:
            renamed[name] = new + name[len(block) :]
    return renamed


def count_holders(axis: Axis, parts: Iterable[Part]) -> tuple[int, ...]:
    """For each unit of an axis, how many parts hold it.

    Examples
    --------
    >>> axis = CoupledAxis("0", "neurons", 3, (), ())
    >>> count_holders(axis, [Part({"0": (0, 1)}), Part({"0": (1,)}), Part({})])
    (2, 3, 1)
    """
    counts = [0] * axis.size
    for part in parts:
        for unit in part.units.get(axis.name, range(axis.size)):
            counts[unit] += 1
    return tuple(counts)
