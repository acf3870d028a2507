"""Where the parts of a convolutional network sit: filters between two layers, and residual blocks that keep their input's shape.

It reads torchvision's ResNets and plain ones alike, before or after activation, because it follows the data instead of names. Input channels, outputs and
the residual stream lie on no axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partwise.checks import InputError
from partwise.models.axes import BlockAxis
from partwise.models.chains import find_chains, trace

if TYPE_CHECKING:
    from torch import fx, nn

    from partwise.models.axes import Axis, Part
    from partwise.models.chains import Graph

__all__ = ["KINDS", "find_axes", "find_blocks", "matches", "settle"]

NAME = "convolutional networks and ResNets"
KINDS = ("filters", "neurons", "blocks")
_ADDITIONS = {"add", "add_", "iadd"}


def matches(model: nn.Module) -> bool:
    """Whether ``model`` is a plain torch module with two-dimensional convolutions."""
    from torch import nn

    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def find_axes(model: nn.Module) -> tuple[Axis, ...]:
    """One axis per layer whose filters or neurons only other layers read, and one per section with two or more blocks that can be left out."""
    return (*find_chains(trace(model)), *find_blocks(model))


def find_blocks(model: nn.Module) -> tuple[BlockAxis, ...]:
    """Sections (``Sequential`` or ``ModuleList``) with two or more children that add a branch to their own input."""
    from torch import nn

    found = []
    for name, section in model.named_modules():
        if not name or not isinstance(section, nn.Sequential | nn.ModuleList):
            continue
        children = {f"{name}.{child}": module for child, module in section.named_children()}
        closers = {child: tensors for child, module in children.items() if (tensors := _closers(module, child))}
        if len(closers) > 1:
            found.append(BlockAxis(name, tuple(closers), tuple(children), tuple(closers.values())))
    return tuple(found)


def settle(small: nn.Module, axes: tuple[Axis, ...], part: Part) -> None:
    """Nothing to do: the layers themselves know their sizes."""


def _closers(block: nn.Module, name: str) -> tuple[str, ...]:
    """What to set to zero so that ``block`` returns its input; nothing if it is no residual block that keeps its input as it is."""
    if not list(block.children()):
        return ()
    try:
        graph = trace(block)
    except InputError:
        return ()  # a child with branches on its input is no block that we know
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    [output] = [node for node in graph.nodes if node.op == "output"]
    last = _behind_activation(graph, output.args[0])
    if len(inputs) != 1 or last is None or str(getattr(last.target, "__name__", last.target)) not in _ADDITIONS or inputs[0] not in last.args:
        return ()
    branch = next((argument for argument in last.args if argument is not inputs[0]), None)
    end = _behind_activation(graph, branch)
    module = None if end is None else graph.module(end)
    tensors = [] if module is None or end is None else [f"{name}.{end.target}.{tensor}" for tensor, _ in module.named_parameters()]
    return tuple(tensors)


def _behind_activation(graph: Graph, node: object) -> fx.Node | None:
    """The nearest step back that is no activation or dropout."""
    from torch import fx

    while isinstance(node, fx.Node):
        module = graph.module(node)
        kind = str(getattr(node.target, "__name__", node.target)) if module is None else type(module).__name__
        if kind not in {"relu", "relu_", "ReLU", "Dropout", "dropout", "Identity"}:
            return node
        node = node.args[0]
    return None
