"""Plans: what a method wants to take out of a model, before anything is taken out. ``apply`` does it."""

from __future__ import annotations

import abc
import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from partwise import atomic_files
from partwise.checks import InputError
from partwise.models.axes import Part, check_part

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.ledger import Ledger
    from partwise.models.axes import CoupledAxis

    Model = TypeVar("Model", bound=nn.Module)

__all__ = ["PrunePlan", "UnitPlan", "apply", "load_plan", "spread_factors"]

TENSORS, FACTS = "plan.safetensors", "plan.json"
KINDS = {
    "units": "partwise.prune.plan:UnitPlan",
    "low-rank": "partwise.prune.low_rank:LowRankPlan",
    "weights": "partwise.prune.weight_mask:WeightMaskPlan",
}


@dataclass(frozen=True, kw_only=True)
class PrunePlan(abc.ABC):
    """What stays of a model. Every method of this room makes one; it can be looked at, saved and compared before it is applied.

    Parameters
    ----------
    method : str
        ``repr`` of the method that made it.
    num_tokens : int
        Calibration tokens, or inputs, that the method looked at.
    """

    method: str
    num_tokens: int = 0

    @abc.abstractmethod
    def apply(self, model: Model, *, as_mask: bool) -> Model:
        """The pruned model; see `partwise.prune.apply`."""

    @abc.abstractmethod
    def ledger(self, model: nn.Module) -> Ledger:
        """One row per part of ``model`` with its cost, its score and whether it stays."""

    @abc.abstractmethod
    def contents(self) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
        """What a file holds: the kind of plan, tensors by name, and the rest as JSON."""

    @classmethod
    @abc.abstractmethod
    def from_contents(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> PrunePlan:
        """The plan that `contents` came from."""

    def part_of(self, small: nn.Module) -> Part:
        """The units of the whole model that ``small`` holds; nothing named where it holds all of every axis.

        Parameters
        ----------
        small : torch.nn.Module
            What the plan makes, also as a mask.

        Raises
        ------
        InputError
            ``plan-for-another-model`` when it is something else.
        """
        return Part({})

    def files(self) -> dict[str, bytes]:
        """Content of ``plan.safetensors`` and ``plan.json`` by name."""
        from safetensors.torch import save as to_bytes

        kind, tensors, facts = self.contents()
        head = {"kind": kind, "method": self.method, "num_tokens": self.num_tokens}
        return {TENSORS: to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}), FACTS: atomic_files.to_json_bytes(head | facts)}

    def save(self, folder: Path) -> None:
        """Write ``plan.safetensors`` and ``plan.json``; the folder appears whole or not at all.

        Parameters
        ----------
        folder : Path
            Target; replaced when it is there.
        """
        with atomic_files.write_folder(Path(folder)) as temporary:
            for name, data in self.files().items():
                atomic_files.write_atomic(temporary / name, data)


def load_plan(folder: Path) -> PrunePlan:
    """Open what `PrunePlan.save` wrote.

    Parameters
    ----------
    folder : Path
        With ``plan.json`` and ``plan.safetensors``.

    Raises
    ------
    InputError
        ``no-plan`` when there is none, it is damaged, or the file is of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / FACTS).is_file() or not (folder / TENSORS).is_file():
        raise InputError("no-plan", f"{folder} holds no {FACTS} with a {TENSORS}, expected what PrunePlan.save wrote. Check the path.")
    facts = atomic_files.read_json(folder / FACTS)
    target = KINDS.get(facts.get("kind", "")) if isinstance(facts, dict) else None
    if target is None:
        raise InputError("no-plan", f"{folder / FACTS} does not say which kind of plan it is, expected one of {', '.join(KINDS)}. Make the plan again.")
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise InputError("no-plan", f"{folder / TENSORS} cannot be read ({error}), expected what PrunePlan.save wrote. Make the plan again.") from error
    module, _, name = target.partition(":")
    plan: PrunePlan = getattr(importlib.import_module(module), name).from_contents(tensors, facts)
    return plan


def apply(model: Model, plan: PrunePlan, *, as_mask: bool = False) -> Model:
    """Prune a model as a plan says.

    Parameters
    ----------
    model : torch.nn.Module
        The model that the plan was made for. It is not changed, and the result shares nothing with it.
    plan : PrunePlan
        From ``method.plan(model, data)``.
    as_mask : bool, default=False
        Leave all sizes as they are and set to zero what is not kept: nothing is saved, but the outputs are those of the small model. For tests.

    Returns
    -------
    torch.nn.Module
        Of the class of ``model``, in its mode and on its device.

    Raises
    ------
    InputError
        When the plan is not for this model, or the configuration class of the model cannot describe the result.
    """
    return plan.apply(model, as_mask=as_mask)


@dataclass(frozen=True, kw_only=True)
class UnitPlan(PrunePlan):
    """Which units of which axes stay: neurons, filters, heads or states.

    Parameters
    ----------
    units : mapping of str to tuple of int
        Axis name -> kept units, lowest first. Axes that are not named stay whole.
    scores : mapping of str to Tensor
        Axis name -> what each unit is worth, (units,), float64. Axes without scores are missing.
    factors : mapping of str to Tensor
        Axis name -> what the layers that read a kept unit multiply it by, (kept,), float64. Axes that are not named: 1.
    """

    units: Mapping[str, tuple[int, ...]]
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)

    def apply(self, model: Model, *, as_mask: bool) -> Model:
        """The model with these units only."""
        from partwise.models import coupled_axes, extract, mask, scale_readers

        axes = coupled_axes(model)
        part = Part(self.units)
        _refuse_other_sizes(axes, self)
        check_part(axes, part)
        if not as_mask:
            small = extract(model, part, axes=axes)
            return scale_readers(small, self.factors, axes=axes) if self.factors else small
        sizes = {axis.name: axis.size for axis in axes}
        spread = {name: spread_factors(factors, self.units[name], sizes[name]) for name, factors in self.factors.items()}
        return mask(scale_readers(model, spread, axes=axes) if spread else model, part, axes=axes)

    def part_of(self, small: nn.Module) -> Part:
        """The units that the plan keeps, or all where it was applied as a mask."""
        from partwise.models import coupled_axes

        sizes = {axis.name: axis.size for axis in coupled_axes(small) if axis.name in self.units}
        if all(sizes.get(name) == len(kept) for name, kept in self.units.items()):
            return Part(self.units)
        for name, kept in self.units.items():
            if sizes.get(name) is None or sizes[name] <= kept[-1] or sizes[name] != len(self.scores.get(name, range(sizes[name]))):
                raise InputError(
                    "plan-for-another-model",
                    f"{name} has {sizes.get(name, 'no')} units in this model, expected the {len(kept)} that the plan keeps. Pass the plan that was applied, or "
                    "leave it out.",
                )
        return Part({})

    def ledger(self, model: nn.Module) -> Ledger:
        """One row per unit of the axes that the plan names; a unit costs the entries that go with it."""
        from partwise.ledger import Ledger
        from partwise.ledger import Part as Row
        from partwise.models import coupled_axes, tensors_of

        axes = coupled_axes(model)
        _refuse_other_sizes(axes, self)
        check_part(axes, Part(self.units))
        tensors, rows = tensors_of(model), []
        for axis in axes:
            if axis.name not in self.units:
                continue
            parameters, size = _unit_cost(axis, tensors)  # type: ignore[arg-type]
            kept, scores = set(self.units[axis.name]), self.scores.get(axis.name)
            rows += [
                Row(
                    where=axis.name,
                    index=unit,
                    parameters=parameters,
                    bytes=size,
                    score=None if scores is None else float(scores[unit]),
                    status="kept" if unit in kept else "dropped",
                )
                for unit in range(axis.size)
            ]
        return Ledger(tuple(rows))

    def intersect(self, other: UnitPlan) -> UnitPlan:
        """The units that both plans keep; axes that only one of them names are cut as it says. Scores and factors are this plan's.

        Raises
        ------
        InputError
            ``empty-layer`` when nothing of an axis would be left.
        """
        units = dict(other.units) | {
            name: tuple(unit for unit in kept if name not in other.units or unit in set(other.units[name])) for name, kept in self.units.items()
        }
        empty = [name for name, kept in units.items() if not kept]
        if empty:
            raise InputError(
                "empty-layer", f"the two plans have no unit of {empty[0]} in common, expected at least one. Use plans that keep more, or one of them alone."
            )
        factors = {
            name: values[[index for index, unit in enumerate(self.units[name]) if unit in set(units[name])]] for name, values in self.factors.items()
        }
        return dataclasses.replace(self, units=units, factors=factors, method=f"{self.method} & {other.method}")

    def agreement(self, other: UnitPlan) -> float:
        """Of all units on which a decision was made in both plans, the share on which it is the same.

        Needs the sizes of the axes, so both plans must have scores.
        """
        common = [name for name in self.units if name in other.units and name in self.scores]
        same = total = 0
        for name in common:
            ours, theirs = set(self.units[name]), set(other.units[name])
            total += len(self.scores[name])
            same += len(self.scores[name]) - len(ours ^ theirs)
        if not total:
            raise InputError("no-plan", "the two plans share no axis with scores, expected plans of one model. Compare plans of the same kind of units.")
        return same / total

    def contents(self) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
        """Kept units as int64, scores and factors as float64."""
        import torch

        tensors = {f"units/{name}": torch.tensor(units, dtype=torch.int64) for name, units in self.units.items()}
        tensors |= {f"scores/{name}": values for name, values in self.scores.items()}
        return "units", tensors | {f"factors/{name}": values for name, values in self.factors.items()}, {}

    @classmethod
    def from_contents(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> UnitPlan:
        """The plan that `contents` came from."""
        groups: dict[str, dict[str, Any]] = {"units": {}, "scores": {}, "factors": {}}
        for key, values in sorted(tensors.items()):
            group, _, name = key.partition("/")
            groups[group][name] = tuple(values.tolist()) if group == "units" else values
        return cls(method=facts["method"], num_tokens=facts["num_tokens"], **groups)


def _refuse_other_sizes(axes: Sequence[Any], plan: UnitPlan) -> None:
    """A plan for a model of other sizes would cut what it never looked at; its scores say how many units there were."""
    for axis in axes:
        scores = plan.scores.get(axis.name)
        if scores is not None and len(scores) != axis.size:
            raise InputError(
                "plan-for-another-model",
                f"the plan was made for {len(scores)} {axis.kind} in {axis.name}, but this model has {axis.size}, expected the model that it was made for. "
                "A model that was pruned before needs a new plan: call the method again.",
            )


def spread_factors(factors: Tensor, units: tuple[int, ...], size: int) -> Tensor:
    """Factors of all units: those of kept ones, and 1."""
    import torch

    spread = torch.ones(size, dtype=factors.dtype)
    spread[list(units)] = factors
    return spread


def _unit_cost(axis: CoupledAxis, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Entries of one unit in all tensors, and their bytes; buffers are left out of the first."""
    from torch import nn

    parameters = size = 0
    for member in axis.members:
        tensor = tensors[member.tensor]
        entries = tensor.numel() // tensor.shape[member.dim] * member.width * len(member.starts)
        parameters += entries if isinstance(tensor, nn.Parameter) else 0
        size += entries * tensor.element_size()
    return parameters, size
