"""How many units of each axis stay, for a budget of any kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from partwise.checks import InputError
from partwise.models.axes import Part
from partwise.models.cache_sizes import CacheSize, cache_sizes, total_cache_bytes, unit_cache_bytes
from partwise.models.names import locate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.models.axes import CoupledAxis
    from partwise.prune.unit_method import UnitMethod

__all__ = ["CONTEXT", "check_sizes", "count_units"]

CONTEXT = 1024  # tokens of the sequence whose cache a budget of state is about, where the cache grows with the text
HALVINGS = 50  # of the interval in which the fraction lies


def count_units(
    method: UnitMethod, model: nn.Module, axes: Sequence[CoupledAxis], protected: Mapping[str, Tensor], shares: Mapping[str, Tensor] | None
) -> dict[str, int]:
    """For each axis, how many units stay.

    Parameters
    ----------
    method : UnitMethod
        Its budget, ``round_to`` and ``scope``.
    model : torch.nn.Module
        The whole model.
    axes : sequence of CoupledAxis
        What may be cut.
    protected : mapping of str to Tensor
        Axis name -> which units must stay, (units,), bool.
    shares : mapping of str to Tensor or None
        For scope "model": what each unit is worth, comparable over axes. None: the same fraction of every axis.

    Raises
    ------
    InputError
        ``budget-too-small`` naming what the smallest model of this kind costs, ``too-many-protected``.
    """
    strict = method.budget is not None
    steps = {axis.name: method.round_to * axis.groups for axis in axes}
    least = {axis.name: _least_for(protected.get(axis.name), axis) for axis in axes}

    def at(fraction: float) -> dict[str, int]:
        if shares is None:
            return {axis.name: _rounded(fraction * axis.size, steps[axis.name], axis, strict=strict) for axis in axes}
        wanted = _best(axes, shares, protected, fraction)
        # A layer takes the places of its protected units from the budget of the whole model.
        floors = {axis.name: min(axis.size, math.ceil(least[axis.name] / steps[axis.name]) * steps[axis.name]) for axis in axes}
        return {axis.name: max(floors[axis.name], _rounded(wanted[axis.name], steps[axis.name], axis, strict=strict)) for axis in axes}

    if method.budget is None:
        counts = at(method.fraction)
    else:
        kind, limit = method.budget
        counts = _largest_within(at, _price(kind, model, axes), limit, kind)
    for axis in axes:
        if least[axis.name] > counts[axis.name]:
            raise InputError(
                "too-many-protected",
                f"{least[axis.name]} of the {axis.size} {axis.kind} of {axis.name} would have to stay to protect what protect names, but the budget leaves "
                f"{counts[axis.name]}. Raise the budget, or protect fewer.",
            )
    return counts


def _least_for(mask: Tensor | None, axis: CoupledAxis) -> int:
    """The smallest count with which all protected units stay: every group keeps as many as the fullest one must."""
    return 0 if mask is None else int(mask.view(axis.groups, -1).sum(1).max()) * axis.groups


def _best(axes: Sequence[CoupledAxis], shares: Mapping[str, Tensor], protected: Mapping[str, Tensor], fraction: float) -> dict[str, float]:
    """How many of each axis are among the best units of the whole model; protected ones come first."""
    import torch

    never = torch.zeros(1, dtype=torch.bool)
    every = torch.cat([shares[axis.name].masked_fill(protected.get(axis.name, never), math.inf) for axis in axes])
    owners = torch.cat([torch.full((axis.size,), index) for index, axis in enumerate(axes)])
    best = every.sort(descending=True, stable=True).indices[: int(fraction * len(every) + 0.5)]
    counts = torch.bincount(owners[best], minlength=len(axes))
    return {axis.name: float(counts[index]) for index, axis in enumerate(axes)}


def _rounded(wanted: float, step: int, axis: CoupledAxis, *, strict: bool) -> int:
    """A multiple of ``step`` near ``wanted``, halves up; not above it where a limit must hold. All units where the step does not fit once."""
    if step > axis.size:
        return axis.size
    steps = int(wanted / step + 1e-9) if strict else int(wanted / step + 0.5 + 1e-9)
    # The last step may be a shorter one: all units are always allowed.
    return axis.size if wanted >= axis.size else min(axis.size, max(1, steps) * step)


def _largest_within(at: Callable[[float], dict[str, int]], price: Callable[[Mapping[str, int]], int], limit: int, kind: str) -> dict[str, int]:
    """The counts of the largest fraction whose price is within the limit."""
    whole, least = at(1.0), at(0.0)
    if price(whole) <= limit:
        return whole
    if price(least) > limit:
        raise InputError(
            "budget-too-small",
            f"got {kind}={limit:,}, but the smallest model that can be cut here costs {price(least):,}, the whole one {price(whole):,}. Pass a number between "
            "them, or more kinds of units.",
        )
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if price(at(middle)) <= limit else (low, middle)
    return at(low)


def _price(kind: str, model: nn.Module, axes: Sequence[CoupledAxis]) -> Callable[[Mapping[str, int]], int]:
    """What a model with some counts costs."""
    if kind == "max_state_bytes":
        return _state_price(model, axes)
    from torch import nn

    from partwise.models import tensors_of

    tensors = {name: tensor for name, tensor in tensors_of(model).items() if kind == "max_bytes" or isinstance(tensor, nn.Parameter)}
    factors = {name: tensor.element_size() if kind == "max_bytes" else 1 for name, tensor in tensors.items()}
    members = [(axis, member) for axis in axes for member in axis.members if member.tensor in tensors]

    def price(counts: Mapping[str, int]) -> int:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        for axis, member in members:
            shapes[member.tensor][member.dim] -= (axis.size - counts[axis.name]) * member.width * len(member.starts)
        return sum(math.prod(shape) * factors[name] for name, shape in shapes.items())

    return price


def _state_price(model: nn.Module, axes: Sequence[CoupledAxis]) -> Callable[[Mapping[str, int]], int]:
    sizes = cache_sizes(model)
    per_unit = {axis.name: unit_cache_bytes(axis, _layer_of(axis, sizes), num_tokens=CONTEXT) for axis in axes} if sizes else {}
    if not any(per_unit.values()):
        kinds = ", ".join(sorted({axis.kind for axis in axes}))
        raise InputError(
            "no-state", f"got max_state_bytes, but no {kinds} of {type(model).__name__} hold anything of a sequence. Cut states or heads, or use max_bytes."
        )
    whole = total_cache_bytes(sizes, num_tokens=CONTEXT)

    def price(counts: Mapping[str, int]) -> int:
        return whole - sum((axis.size - counts[axis.name]) * per_unit[axis.name] for axis in axes)

    return price


def _layer_of(axis: CoupledAxis, sizes: Sequence[CacheSize]) -> CacheSize:
    layer, _ = locate(axis.name)
    assert layer is not None
    return sizes[layer]


def check_sizes(model: nn.Module, axes: Sequence[CoupledAxis], counts: Mapping[str, int] | None) -> None:
    """Refuse numbers of units that the model's configuration cannot describe, by cutting the model without its weights.

    Parameters
    ----------
    model : torch.nn.Module
        Not changed.
    axes : sequence of CoupledAxis
        What is cut.
    counts : mapping of str to int, optional
        Axis name -> units that stay. Left out: it is not known yet, and will differ from layer to layer.

    Raises
    ------
    InputError
        ``uneven-layers``, ``config-refuses-heads``.
    """
    from partwise.models import extract, tensors_of, with_tensors

    weightless = with_tensors(model, {name: tensor.detach().to("meta") for name, tensor in tensors_of(model).items()})
    firsts = [next(axis.name for axis in axes if axis.kind == kind) for kind in sorted({axis.kind for axis in axes})]
    trial = counts or {axis.name: axis.size if axis.name in firsts else axis.groups for axis in axes}
    runs = {axis.name: axis.size // axis.groups for axis in axes}
    units = {axis.name: tuple(unit for unit in range(axis.size) if unit % runs[axis.name] < trial[axis.name] // axis.groups) for axis in axes}
    try:
        extract(weightless, Part(units), axes=axes)
    except InputError as error:
        if error.code == "uneven-layers":
            uneven = f"got scope='model', which leaves layers of different size, and a {type(model).__name__} has one size for all."
            advice = "Pass scope='layer', and protect no layer as a whole."
            raise InputError("uneven-layers", f"{error if counts else uneven} {advice}") from error
        if error.code == "config-refuses-heads":
            reason = str(error).partition(" Keep that many")[0]
            raise InputError("config-refuses-heads", f"{reason} Choose keep so that as many stay, or leave heads out of kinds.") from error
        raise
