"""Axes of networks made of linear and convolutional layers, found by following the data from layer to layer.

A layer makes units. They may pass through operations that treat each unit by itself (activations, batch normalisation, pooling, flattening) and must end
in layers that read them as input. Everything else between the two ties units together, and is refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.models.axes import CoupledAxis, Member

if TYPE_CHECKING:
    from torch import fx, nn

__all__ = ["Graph", "find_chains", "trace"]

# Names of torch functions, tensor methods and torch.nn classes that treat every channel or feature by itself.
_PER_UNIT_CALLS = {
    "alpha_dropout", "celu", "clamp", "contiguous", "dropout", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "leaky_relu_", "mish",
    "neg", "pow", "relu", "relu6", "relu_", "selu", "sigmoid", "silu", "sin", "softplus", "softsign", "tanh",
}  # fmt: skip
_PER_UNIT_MODULES = {
    "CELU", "Dropout", "ELU", "GELU", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity", "LeakyReLU", "Mish", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid",
    "Softplus", "Softsign", "Tanh",
}  # fmt: skip
# The same for channels of images; on the output of a linear layer these would mix features.
_PER_CHANNEL_CALLS = {"adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "dropout2d", "max_pool2d"}
_PER_CHANNEL_MODULES = {"AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "AvgPool2d", "Dropout2d", "MaxPool2d"}
_BATCH_NORMS = {"BatchNorm1d", "BatchNorm2d"}
_WITH_A_NUMBER = {operator.add, operator.iadd, operator.mul, operator.imul, operator.truediv, operator.sub}
# Where the units of several layers meet: a residual stream or a concatenation. Such a layer simply makes no axis.
_MEETINGS = {"add", "add_", "iadd", "sub", "mul", "imul", "cat", "concat", "stack"}


@dataclass(frozen=True)
class Graph:
    """What a model does, one node per step.

    Parameters
    ----------
    nodes : tuple of torch.fx.Node
        In order.
    modules : dict of str to torch.nn.Module
        The model's modules by name.
    """

    nodes: tuple[fx.Node, ...]
    modules: dict[str, nn.Module]

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.modules[str(node.target)] if node.op == "call_module" else None


def trace(model: nn.Module) -> Graph:
    """Follow the data through a model.

    Raises
    ------
    InputError
        When the model's forward pass depends on the values of its input, which cannot be followed.
    """
    from torch import fx

    try:
        # Proxies of a user's forward pass may fail in any way that the user's own code chooses.
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise InputError(
            "cannot-trace",
            f"got a {type(model).__name__} whose forward pass cannot be followed by torch.fx ({error}), expected one without branches on its input. "
            "Move such branches out of the model.",
        ) from error
    return Graph(tuple(graph.nodes), dict(model.named_modules()))


def find_chains(graph: Graph) -> tuple[CoupledAxis, ...]:
    """Every layer of ``graph`` whose units pass, each by itself, into other layers.

    Raises
    ------
    InputError
        When something between two layers ties units together, when a layer with weights is used twice, or when a convolution has groups.
    """
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    axes = []
    for node in graph.nodes:
        module = graph.module(node)
        if module is None or not _is_layer(module):
            continue
        name = str(node.target)
        if calls.count(name) > 1:
            raise InputError(
                "unsupported-sharing", f"{name} is used {calls.count(name)} times in one pass, expected once. Give each place a layer of its own."
            )
        if (axis := _Chain(graph, name, module).axis(node)) is not None:
            axes.append(axis)
    return tuple(axes)


@dataclass
class _Chain:
    """The way of one layer's units to their readers."""

    graph: Graph
    name: str
    producer: nn.Module
    members: list[Member] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def axis(self, node: fx.Node) -> CoupledAxis | None:
        size = int(self.producer.weight.shape[0])  # type: ignore[index]
        convolution = _is_convolution(self.producer)
        self.members += [Member(name, 0) for name in _tensors_of(self.producer, self.name)]
        if not self._follow(node, size, spatial=convolution) or not (self.readers or self.troubles):
            return None
        if convolution and self.producer.groups != 1:
            self.troubles.append(f"is a convolution in {self.producer.groups} groups")
        if self.troubles:
            raise InputError(
                "unsupported-sharing",
                f"{self.name} {self.troubles[0]}, expected its units to pass one by one (activations, batch normalisation, pooling, flattening) into "
                "other layers. Change that place, or choose another model.",
            )
        return CoupledAxis(self.name, "filters" if convolution else "neurons", size, tuple(self.members), tuple(self.readers))

    def _follow(self, node: fx.Node, size: int, *, spatial: bool) -> bool:
        """Walk on from ``node``; False where the units join a stream that several layers share, or leave the model."""
        return all(self._step(user, size, spatial=spatial) for user in node.users)

    def _step(self, user: fx.Node, size: int, *, spatial: bool) -> bool:
        module = self.graph.module(user)
        if _asks_for_shape(user):
            return True
        if module is not None and _is_layer(module):
            return self._read(module, str(user.target), size, spatial=spatial)
        if module is not None and type(module).__name__ in _BATCH_NORMS:
            if module.num_features != size:
                return self._tied(f"passes {user.target}, which normalises {module.num_features} features instead of its {size} units")
            self.members += [Member(name, 0) for name in _tensors_of(module, str(user.target))]
            return self._follow(user, size, spatial=spatial)
        if _is_per_unit(user, module, spatial=spatial):
            return self._follow(user, size, spatial=spatial)
        if _flattens(user, module):
            return self._follow(user, size, spatial=False)
        if user.op == "output" or _name(user) in _MEETINGS or not any(self._layers_behind(user)):
            return False
        return self._tied(f"passes {_name(user)}" if module is None else f"passes {user.target}, a {type(module).__name__}")

    def _read(self, module: nn.Module, name: str, size: int, *, spatial: bool) -> bool:
        """Note how many columns of a layer that reads the units belong to one."""
        columns = int(module.weight.shape[1])  # type: ignore[index]
        if _is_convolution(module) and module.groups != 1:
            return self._tied(f"is read by {name}, a convolution in {module.groups} groups")
        flattened = _is_convolution(self.producer) and not _is_convolution(module)
        if columns % size or (columns != size and not flattened) or (flattened and spatial):
            return self._tied(f"is read by {name}, which has {columns} inputs for its {size} units in an order that is not theirs")
        self.members.append(Member(f"{name}.weight", 1, columns // size))
        self.readers.append(f"{name}.weight")
        return True

    def _tied(self, how: str) -> bool:
        """Remember what ties the units; it matters only if they do not join a shared stream as well."""
        self.troubles.append(how)
        return True

    def _layers_behind(self, node: fx.Node) -> Iterator[fx.Node]:
        seen, waiting = set(), [node]
        while waiting:
            here = waiting.pop()
            module = self.graph.module(here)
            if module is not None and _is_layer(module):
                yield here
            waiting += [user for user in here.users if user not in seen]
            seen |= set(here.users)


def _is_convolution(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Conv2d)


def _is_layer(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear | nn.Conv2d)


def _tensors_of(module: nn.Module, name: str) -> list[str]:
    """Parameters and buffers with one entry, or one row, per unit."""
    return [f"{name}.{tensor}" for tensor, value in module.state_dict().items() if value.ndim]


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _asks_for_shape(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target in {"size", "dim"}) or (node.op == "call_function" and _name(node) == "getattr")


def _is_per_unit(node: fx.Node, module: nn.Module | None, *, spatial: bool) -> bool:
    from torch import fx

    if module is not None:
        return type(module).__name__ in _PER_UNIT_MODULES | (_PER_CHANNEL_MODULES if spatial else set())
    if node.op not in {"call_function", "call_method"} or sum(isinstance(argument, fx.Node) for argument in node.args) != 1:
        return False
    return node.target in _WITH_A_NUMBER or _name(node) in _PER_UNIT_CALLS | (_PER_CHANNEL_CALLS if spatial else set())


def _flattens(node: fx.Node, module: Any) -> bool:
    """Whether a step joins everything but the first dimension, or averages over the two dimensions of an image."""
    if module is not None:
        return type(module).__name__ == "Flatten" and (module.start_dim, module.end_dim) == (1, -1)
    arguments: tuple[Any, ...] = (*node.args[1:], *node.kwargs.values())
    if _name(node) == "flatten":
        return arguments in {(1,), (1, -1)}
    if _name(node) == "mean":
        return any(list(argument) in ([2, 3], [-2, -1], [-1, -2]) for argument in arguments if isinstance(argument, list | tuple))
    return _name(node) in {"view", "reshape"} and len(arguments) == 2 and arguments[1] == -1
