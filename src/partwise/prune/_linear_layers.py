"""Which linear layers of a model can become thin, and what their outputs look like while calibration data pass."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.linalg.output_basis import Moments, output_basis
from partwise.models.axes import CoupledAxis, Member

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from partwise.models.walks import Batch, Hook, Walk

__all__ = ["Found", "LayerSize", "find_layers", "look_at_outputs"]


@dataclass(frozen=True)
class LayerSize:
    """How large a linear layer is.

    Parameters
    ----------
    axis : CoupledAxis
        Its outputs.
    outputs, inputs : int
        Rows and columns of its weight.
    entry_bytes : int
        Bytes of one entry.
    """

    axis: CoupledAxis
    outputs: int
    inputs: int
    entry_bytes: int

    @property
    def highest(self) -> int:
        """The highest rank that a matrix of this shape has."""
        return min(self.outputs, self.inputs)

    @property
    def break_even(self) -> int:
        """The highest rank at which two thin layers have fewer parameters; 0 where none has."""
        return (self.outputs * self.inputs - 1) // (self.outputs + self.inputs)


@dataclass(frozen=True)
class Found:
    """What the outputs of one layer look like.

    Parameters
    ----------
    name : str
        Of the layer.
    shares : Tensor of shape (directions,), float64
        Share of the energy along each direction, falling; all 0 where there is no energy.
    basis : Tensor of shape (outputs, directions), float64
        The directions, in columns.
    mean : Tensor of shape (outputs,), float64, or None
        Mean of the outputs, for a layer with a bias.
    count : int
        Outputs that were seen.
    """

    name: str
    shares: Tensor
    basis: Tensor
    mean: Tensor | None
    count: int


def find_layers(model: nn.Module, patterns: Sequence[str]) -> dict[str, LayerSize]:
    """The linear layers that patterns of names choose, in the order of the model.

    Parameters
    ----------
    model : torch.nn.Module
        Of transformers, or a plain network.
    patterns : sequence of str
        Names or patterns; none for all layers whose outputs other layers of the model work on.

    Raises
    ------
    InputError
        ``unknown-model``; ``no-linear-layers``; ``unknown-layer`` for a pattern that fits nothing that can be chosen; ``already-low-rank``; and what
        `partwise.models.low_rank_layers.check_layer` refuses.
    """
    from torch import nn

    from partwise.models.low_rank_layers import check_layer, ranks_of

    if thin := ranks_of(model):
        raise InputError(
            "already-low-rank",
            f"{next(iter(thin))} of this {type(model).__name__} is of low rank already, expected a model with whole layers. Call the method for the model that "
            "it was made from. To cut units as well, cut them first.",
        )
    usual, possible = _in_blocks(model) if hasattr(type(model), "config_class") else _in_graph(model)
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = {name for pattern in patterns for name in _fitting(pattern, every, possible)} if patterns else set(usual)
    if not chosen:
        raise InputError(
            "no-linear-layers",
            f"the only linear layers of {type(model).__name__} give its outputs ({', '.join(possible)}), expected others. Name them in layers to choose them.",
        )
    sizes = {}
    for name in every:
        if name in chosen:
            layer = check_layer(model, name)
            outputs, inputs = layer.weight.shape
            members = tuple(Member(f"{name}.{tensor}", 0) for tensor, _ in layer.named_parameters())
            sizes[name] = LayerSize(CoupledAxis(name, "neurons", outputs, members, ()), outputs, inputs, layer.weight.element_size())
    return sizes


def _in_blocks(model: nn.Module) -> tuple[list[str], list[str]]:
    """Layers inside the blocks of a model of transformers, which are those with a number in their name."""
    from torch import nn

    from partwise.models import coupled_axes
    from partwise.models.names import locate

    axes = coupled_axes(model)  # refuses what is not known, quantised or wrapped
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and locate(name)[0] is not None]
    if not names:
        first: Any = axes[0]
        raise InputError(
            "no-linear-layers",
            f"the blocks of {type(model).__name__} have no torch.nn.Linear ({first.members[0].tensor} is the weight of another kind of layer), expected some. "
            "Choose another method.",
        )
    return names, names


def _in_graph(model: nn.Module) -> tuple[list[str], list[str]]:
    """Linear layers that a plain network runs: those whose outputs are not its own, and all."""
    from torch import nn

    from partwise.models.chains import trace

    graph = trace(model)
    nodes = [node for node in graph.nodes if isinstance(graph.module(node), nn.Linear)]
    possible = [str(node.target) for node in nodes]
    for name in possible:
        if possible.count(name) > 1:
            raise InputError(
                "unsupported-sharing", f"{name} is used {possible.count(name)} times in one pass, expected once. Give each place a layer of its own."
            )
    usual = [str(node.target) for node in nodes if not all(user.op == "output" for user in node.users)]
    if not possible:
        raise InputError("no-linear-layers", f"{type(model).__name__} has no torch.nn.Linear, expected some. Choose a method for filters.")
    return usual, possible


def _fitting(pattern: str, every: Sequence[str], possible: Sequence[str]) -> list[str]:
    fitting = [name for name in every if fnmatch.fnmatchcase(name, pattern)]
    chosen = [name for name in fitting if name in possible]
    if not chosen:
        known = ", ".join(possible[:4]) + (", ..." if len(possible) > 4 else "")
        reason = f"names {fitting[0]}, which lies outside of the blocks and stays whole" if fitting else "fits no linear layer of this model"
        raise InputError("unknown-layer", f"layers={pattern!r} {reason}, expected some of these {len(possible)}: {known}. Use their names, or a pattern.")
    return chosen


def look_at_outputs(walk: Walk) -> Iterator[Found]:
    """What the outputs of each layer of a walk look like, one layer after the other.

    Layers that get the same input are looked at together. Whoever iterates may replace tensors of the layer at hand; later ones see what it then passes on.
    """
    done: set[str] = set()
    for axis in walk.axes:
        if axis.name in done:
            continue
        walk.go_to(axis)
        for stage in walk.stages(axis):
            done |= {layer.name for layer in stage}
            yield from _stage(walk, axis, [layer.name for layer in stage])


def _stage(walk: Walk, place: CoupledAxis, names: Sequence[str]) -> Iterator[Found]:
    """Layers with one input. Where outputs are more than inputs, moments of the inputs say the same, and one sum is enough for all."""
    layers: dict[str, Any] = {name: walk.model.get_submodule(name) for name in names}
    wide = [name for name, layer in layers.items() if layer.out_features > layer.in_features]
    of_inputs, of_outputs = Moments(), {name: Moments() for name in names if name not in wide}
    walk.observe(
        place,
        inputs={wide[0]: _adding_to(of_inputs)} if wide else {},
        outputs={name: _adding_to(moments) for name, moments in of_outputs.items()},
    )
    for name, layer in layers.items():
        moments = of_outputs.get(name, of_inputs)
        if not moments.count:
            raise InputError("too-few-samples", f"no calibration data reach {name}, expected some. Pass other data, or leave it out with layers.")
        centred, weight = layer.bias is not None, layer.weight.detach().double()
        energies, basis = output_basis(moments.second(centred=centred), weight=weight if name in wide else None)
        mean = None
        if centred:
            mean = weight @ moments.mean + layer.bias.detach().double() if name in wide else moments.mean
        total = energies.sum()
        shares = energies / total if total > 0 else energies
        yield Found(name, shares.cpu(), basis.cpu(), None if mean is None else mean.cpu(), moments.count)


def _adding_to(moments: Moments) -> Hook:
    """A hook that adds the rows of one batch without padded tokens."""

    def add(values: Tensor, batch: Batch) -> None:
        if batch.real is not None and values.ndim == 3 and values.shape[:2] == batch.real.shape:
            values = values[batch.real]  # (tokens, entries)
        moments.add(values.flatten(0, -2))  # (rows, entries)

    return add
