"""Take real subnetworks out of a model, and put them back.

``coupled_axes`` says what can be left out, ``extract`` makes a smaller model of the same class, ``merge`` puts such models back, ``mask`` switches off in a
copy of the whole model what a part does not hold.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from partwise.checks import InputError, check_choice
from partwise.linalg.slicing import mean_over_holders, take, take_shape
from partwise.models.axes import BlockAxis, Member, Part, check_part, names_in_part, sliced_entries

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor, nn

    from partwise.models.axes import Axis

    Model = TypeVar("Model", bound=nn.Module)

__all__ = [
    "FAMILIES",
    "coupled_axes",
    "extract",
    "mask",
    "masked_tensors",
    "merge",
    "merge_tensors",
    "scale_readers",
    "scaled_tensors",
    "slice_tensors",
    "tensors_of",
    "with_tensors",
]

# Asked in this order; convolutional networks come before perceptrons because they may contain one.
FAMILIES = ("llama", "gpt2", "neox", "mamba2", "vit", "resnet", "mlp")


def coupled_axes(model: nn.Module, *, kinds: Iterable[str] | None = None) -> tuple[Axis, ...]:
    """What can be left out of a model: which rows, columns, norm entries and head groups go together.

    Parameters
    ----------
    model : torch.nn.Module
        A multilayer perceptron, a convolutional network or ResNet, or a Llama, Mistral, Qwen2, Qwen3, GPT-2, GPT-NeoX, Mamba2 or
        ViT model of transformers.
    kinds : iterable of str, optional
        Only axes of these kinds: ``"neurons"``, ``"heads"``, ``"filters"``, ``"states"``, ``"blocks"``, as far as the family has them. Left out: all.

    Returns
    -------
    tuple of CoupledAxis or BlockAxis
        In the order of the model's layers, then sections of residual blocks.

    Raises
    ------
    InputError
        When the class of model is not known, a kind is not one of its family's, nothing can be left out, or weights are shared in a way that no axis
        describes.
    """
    family = _family(model)
    wanted = tuple(family.KINDS if kinds is None else kinds)
    for kind in wanted:
        check_choice(kind, family.KINDS, name=f"kind of axis of {type(model).__name__}")
    axes = tuple(axis for axis in family.find_axes(model) if axis.kind in wanted)
    if not axes:
        raise InputError(
            "no-axes",
            f"{type(model).__name__} has no {' or '.join(wanted)} that could be left out, expected a hidden layer that only other layers read, or a section "
            "of residual blocks. Use a deeper model.",
        )
    _refuse_tied_members(model, axes)
    return axes


def extract(model: Model, part: Part, *, axes: Sequence[Axis] | None = None, loadable: bool = True) -> Model:
    """A smaller model of the same class that holds the units of a part, with a configuration that says so.

    Its outputs are those of ``mask(model, part)``. Nothing is shared with ``model``, which is not changed.

    Parameters
    ----------
    model : torch.nn.Module
        The whole model.
    part : Part
        What the small model holds.
    axes : sequence of Axis, optional
        ``coupled_axes(model)``, if known already: following the data of a convolutional network takes longer than slicing it.
    loadable : bool, default=True
        Refuse a part whose configuration the model's own configuration class would not load. False for a worker's copy that is never saved.

    Returns
    -------
    torch.nn.Module
        Of the class of ``model``, on its device, in its mode (training or evaluation).

    Raises
    ------
    InputError
        When the part does not fit the axes, or the configuration class of the model cannot describe the result.
    """
    axes = coupled_axes(model) if axes is None else tuple(axes)
    check_part(axes, part)
    tensors = tensors_of(model)
    pieces = slice_tensors(tensors, axes, part)
    names = names_in_part(axes, part, tensors)
    small = with_tensors(model, {name: pieces[names[name]] if name in names else tensor.new_empty(0) for name, tensor in tensors.items()})
    for axis in axes:
        if isinstance(axis, BlockAxis) and axis.name in part.units:
            _leave_blocks_out(small, axis, part.units[axis.name])
    _fit_layers(small)
    family = _family(model)
    family.settle(small, axes, part)
    if loadable and hasattr(family, "check_loadable"):
        family.check_loadable(small, axes)
    return small


def merge(model: Model, results: Iterable[tuple[Part, nn.Module]], *, axes: Sequence[Axis] | None = None, blend: float = 1.0) -> Model:
    """The whole model with the parts put back: each coordinate becomes the mean over the parts that hold it, and keeps its value where none does.

    ``merge(model, [(part, extract(model, part)), ...])`` is ``model``, to the bit.

    Parameters
    ----------
    model : torch.nn.Module
        The whole model, not changed.
    results : iterable of (Part, torch.nn.Module)
        Parts that have arrived, in any order; what is merged depends on their ``index``, not on the order.
    axes : sequence of Axis, optional
        ``coupled_axes(model)``, if known already.
    blend : float, default=1.0
        How far to go from the old value to the mean; below 1 for results that arrive late.
    """
    axes = coupled_axes(model) if axes is None else tuple(axes)
    merged = merge_tensors(tensors_of(model), [(part, tensors_of(small)) for part, small in results], axes=axes, blend=blend)
    return with_tensors(model, merged)


def mask(model: Model, part: Part, *, axes: Sequence[Axis] | None = None) -> Model:
    """A copy of the whole model in which everything that a part does not hold is switched off: the slow twin of ``extract``.

    Layers that read missing units get zeros in their columns, missing states get zeros where they are read and written, and missing blocks get a branch that
    returns zero.
    """
    axes = coupled_axes(model) if axes is None else tuple(axes)
    check_part(axes, part)
    tensors = tensors_of(model)
    return with_tensors(model, {name: tensor.detach().clone() for name, tensor in (tensors | masked_tensors(tensors, axes, part)).items()})


def masked_tensors(tensors: Mapping[str, Tensor], axes: Iterable[Axis], part: Part) -> dict[str, Tensor]:
    """Copies of those tensors that switch off what a part does not hold, with zeros there; the rest of the model stays as it is.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        As `tensors_of` gives them. Not changed.
    axes : iterable of Axis
        Of the whole model.
    part : Part
        What stays switched on.
    """
    changed: dict[str, Tensor] = {}
    for axis in axes:
        missing = sorted(set(range(axis.size)) - set(part.units.get(axis.name, range(axis.size))))
        if isinstance(axis, BlockAxis):
            changed |= {name: tensors[name].detach().new_zeros(tensors[name].shape) for unit in missing for name in axis.closers[unit]}
            continue
        for member in axis.members if missing else ():
            if member.tensor in (axis.closers or axis.readers):
                entries = member.entries_of(missing).to(tensors[member.tensor].device)
                changed[member.tensor] = changed.get(member.tensor, tensors[member.tensor].detach()).index_fill(member.dim, entries, 0)
    return changed


def scale_readers(model: Model, factors: Mapping[str, float | Tensor], *, axes: Sequence[Axis]) -> Model:
    """A copy in which what the units of an axis add up to is multiplied by a factor, folded into the layers that read them; biases are left alone.

    With ``size / number kept`` for each axis, the mean over all subnetworks of one size of what such a layer adds is what it adds in the whole model.

    Parameters
    ----------
    model : torch.nn.Module
        As a rule what `extract` made, without missing blocks.
    factors : mapping of str to float or Tensor
        Axis name -> one factor, or one for each unit that ``model`` has, (units,); axes that are not named: 1.
    axes : sequence of Axis
        Axes of the whole model.

    Raises
    ------
    InputError
        When an axis is not the model's, or no layer reads its units, so that a factor has no place.
    """
    check_part(axes, Part(dict.fromkeys(factors, (0,))))
    tensors = tensors_of(model)
    changed = scaled_tensors(tensors, factors, axes=axes)
    return with_tensors(model, {name: changed[name] if name in changed else tensor.detach().clone() for name, tensor in tensors.items()})


def scaled_tensors(tensors: Mapping[str, Tensor], factors: Mapping[str, float | Tensor], *, axes: Sequence[Axis]) -> dict[str, Tensor]:
    """Scaled copies of the weights that read some axes; see `scale_readers`."""
    if unread := [axis.name for axis in axes if axis.name in factors and not isinstance(axis, BlockAxis) and not axis.readers]:
        raise InputError(
            "no-readers",
            f"got a factor for {unread[0]}, whose units no layer reads as its input, expected an axis with readers. Leave the sum over these units as it is.",
        )
    changed: dict[str, Tensor] = {}
    for axis in axes:
        if isinstance(axis, BlockAxis) or axis.name not in factors:
            continue
        for member in axis.members:
            if member.tensor in axis.readers:
                changed[member.tensor] = _times(changed.get(member.tensor, tensors[member.tensor].detach()), factors[axis.name], member)
    return changed


def _times(tensor: Tensor, factor: float | Tensor, member: Member) -> Tensor:
    """A reader's weight with the entries of each unit multiplied by its factor."""
    if isinstance(factor, (int, float)):
        return tensor * factor
    entries = factor.to(tensor).repeat_interleave(member.width)  # (units * width,)
    return tensor * entries.view([-1 if dim == member.dim else 1 for dim in range(tensor.ndim)])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by their names in ``model.state_dict()``; a tensor with several names is listed under the first."""
    saved = model.state_dict(keep_vars=True)
    names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    return {name: saved[name] for name in names if name in saved}


def with_tensors(model: Model, tensors: Mapping[str, Tensor]) -> Model:
    """A copy of ``model`` with other tensors in the same places; tied ones stay tied. The old ones are never copied.

    Parameters
    ----------
    model : torch.nn.Module
        Not changed.
    tensors : mapping of str to Tensor
        One for every name of `tensors_of`, on any device; on "meta", what is left is the model without its weights. They are used as they are, not cloned.
    """
    from torch import nn

    replaced: dict[int, Any] = {}
    for name, old in tensors_of(model).items():
        new = tensors[name].detach()
        replaced[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    return copy.deepcopy(model, replaced)


def slice_tensors(tensors: Mapping[str, Tensor], axes: Sequence[Axis], part: Part) -> dict[str, Tensor]:
    """Pieces of a part, under their names in the extracted model. Works on any tensors that lie like the parameters, such as optimiser state."""
    entries = sliced_entries(axes, part)
    return {new: take(tensors[name], entries.get(name, {})) for name, new in names_in_part(axes, part, tensors).items()}


def merge_tensors(
    tensors: Mapping[str, Tensor], results: Iterable[tuple[Part, Mapping[str, Tensor]]], *, axes: Sequence[Axis], blend: float = 1.0
) -> dict[str, Tensor]:
    """`merge` for tensors by name; the inverse of `slice_tensors`. Works on any tensors that lie like the parameters.

    Raises
    ------
    InputError
        When a tensor of a result is missing or has another shape than its part.
    """
    if not 0 < blend <= 1:
        raise InputError("blend-range", f"got blend={blend}, expected a number above 0 and at most 1. Pass 1 to take the mean of the parts as it is.")
    pieces: dict[str, list[tuple[dict[int, Tensor], Tensor]]] = {name: [] for name in tensors}
    for part, small in sorted(results, key=lambda result: result[0].index):
        check_part(axes, part)
        entries = sliced_entries(axes, part)
        for name, new in names_in_part(axes, part, tensors).items():
            expected = take_shape(tensors[name].shape, entries.get(name, {}))
            if new not in small or tuple(small[new].shape) != expected:
                got = f"of shape {tuple(small[new].shape)}" if new in small else "missing"
                raise InputError("part-mismatch", f"got {new} of part {part.index} {got}, expected shape {expected}. Merge what `extract` made of this part.")
            pieces[name].append((entries.get(name, {}), small[new]))
    merged = {name: mean_over_holders(old, pieces[name]) for name, old in tensors.items()}
    if blend != 1:
        merged = {name: old.lerp(merged[name], blend) if old.is_floating_point() else merged[name] for name, old in tensors.items()}
    return merged


# Wrappers that stand in front of a model -> what to do about them.
_WRAPPERS = {
    "OptimizedModule": "Pass the model inside, model._orig_mod.",
    "DataParallel": "Pass the model inside, model.module.",
    "DistributedDataParallel": "Pass the model inside, model.module.",
}


def _family(model: nn.Module) -> ModuleType:
    families = [importlib.import_module(f"partwise.models.{name}") for name in FAMILIES]
    kind = type(model)
    # Asked of the class: wrappers hand the attributes of the model inside through.
    model_type = model.config.model_type if hasattr(kind, "config_class") else None  # type: ignore[union-attr]
    for family in families if kind.__name__ not in _WRAPPERS else ():
        if model_type in family.MODEL_TYPES if hasattr(family, "MODEL_TYPES") else model_type is None and family.matches(model):
            return family
    advice = "Use one of them, or describe the family in a file of partwise/models."
    if hasattr(model, "merge_and_unload"):
        advice = "Merge the adapter first, model.merge_and_unload()."
    raise InputError(
        "unknown-model",
        f"got a {kind.__name__}{f' of type {model_type!r}' if model_type else ''}, expected one of: {'; '.join(family.NAME for family in families)}. "
        f"{_WRAPPERS.get(kind.__name__, advice)}",
    )


def _refuse_tied_members(model: nn.Module, axes: Sequence[Axis]) -> None:
    """A tensor that is used in two places cannot be cut for one of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    members = {member.tensor for axis in axes if not isinstance(axis, BlockAxis) for member in axis.members}
    blocks = tuple(f"{block}." for axis in axes if isinstance(axis, BlockAxis) for block in axis.blocks)
    members |= {name for same in names.values() for name in same if name.startswith(blocks)}
    for tied in names.values():
        if len(tied) > 1 and members & set(tied):
            raise InputError(
                "unsupported-sharing",
                f"{' and '.join(tied)} are one tensor, expected every tensor along an axis to be used in one place. Untie them, or choose other kinds of axes.",
            )


def _leave_blocks_out(small: nn.Module, axis: BlockAxis, kept: Sequence[int]) -> None:
    """Take absent blocks out of their section and number the others anew."""
    section = small.get_submodule(axis.name)
    names = {axis.blocks[unit] for unit in kept}
    children = [module for name, module in zip(axis.children, section.children(), strict=True) if name in names or name not in axis.blocks]
    section._modules.clear()
    for position, module in enumerate(children):
        section.add_module(str(position), module)


def _fit_layers(small: nn.Module) -> None:
    """Make the sizes that layers tell agree with their weights."""
    from torch import nn

    for module in small.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            entries = module.weight if module.affine else module.running_mean
            module.num_features = module.num_features if entries is None else len(entries)
