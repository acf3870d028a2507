"""Calibration data on its way through a model, one layer at a time.

A walk holds what arrives at one place and nothing of the rest, so that memory does not grow with the depth of the model. At that place a method may look at
the activations (`Walk.observe`) and replace tensors, for example by ones in which some units are switched off (`Walk.replace`): what comes later then sees
what the replaced tensors pass on. The model itself is never changed.
"""

from __future__ import annotations

import abc
import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from partwise.checks import InputError

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

    from partwise.models.axes import CoupledAxis

__all__ = ["Batch", "Hook", "Walk", "start_walk"]


@dataclass(frozen=True)
class Batch:
    """One batch of calibration data.

    Parameters
    ----------
    inputs : Tensor or mapping of str to Tensor
        What the model is called with.
    labels : Tensor, optional
        For methods that follow the gradient of a loss.
    real : Tensor of shape (rows, tokens) and dtype bool, optional
        Which tokens are no padding. Left out: all.
    """

    inputs: Tensor | Mapping[str, Tensor]
    labels: Tensor | None = None
    real: Tensor | None = None


Hook: TypeAlias = "Callable[[Tensor, Batch], None]"
"""Told the activations of one batch and the batch itself. A hook that keeps them gives the walk's memory away."""


@dataclass
class Walk(abc.ABC):
    """A walk through a model; see `start_walk`.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode while the walk lasts.
    batches : sequence of Batch
        Calibration data.
    axes : sequence of CoupledAxis
        Where to stop, in the order in which the data pass.
    """

    model: nn.Module
    batches: Sequence[Batch]
    axes: tuple[CoupledAxis, ...] = ()
    replaced: dict[str, Tensor] = field(default_factory=dict)

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Use other tensors than the model's from here on, by their names in ``model.state_dict()``."""
        self.replaced |= tensors

    @abc.abstractmethod
    def go_to(self, axis: CoupledAxis) -> None:
        """Go on until the inputs of the layer that makes the units of ``axis`` are there. There is no way back."""

    @abc.abstractmethod
    def observe(self, axis: CoupledAxis, *, inputs: Mapping[str, Hook] | None = None, outputs: Mapping[str, Hook] | None = None) -> None:
        """Run the place of ``axis`` for every batch and show what its modules get and give; nothing of it is kept.

        Parameters
        ----------
        axis : CoupledAxis
            Where the walk is.
        inputs, outputs : mapping of str to callable
            Module name -> what is told the first input, or the output, of that module, once for each batch.

        Raises
        ------
        InputError
            ``not-finite`` naming the module, when an activation that is shown is NaN or infinite.
        """

    @abc.abstractmethod
    def stages(self, axis: CoupledAxis) -> list[tuple[CoupledAxis, ...]]:
        """Those axes of the walk that lie at the place of ``axis``, where the walk is, in the order in which the modules of their names run.

        Axes whose modules get one and the same input stand together; what one of them passes on cannot reach another.
        """

    @property
    @abc.abstractmethod
    def activation_bytes(self) -> int:
        """Bytes of the activations that the walk holds now."""


@contextlib.contextmanager
def start_walk(model: nn.Module, axes: Sequence[CoupledAxis], batches: Sequence[Batch]) -> Iterator[Walk]:
    """Walk through a model without gradients and in evaluation mode; afterwards everything is as before.

    Parameters
    ----------
    model : torch.nn.Module
        Not changed.
    axes : sequence of CoupledAxis
        Places to stop at.
    batches : sequence of Batch
        Calibration data, at least one batch.
    """
    import torch

    kind = _BlockWalk if hasattr(type(model), "config_class") else _GraphWalk
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield kind(model, batches, tuple(axes))
    finally:
        for module, training in modes:
            module.training = training


class _BlockWalk(Walk):
    """Through a model of transformers, whose blocks take the hidden states of the one before and some arguments that do not depend on them."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], axes: tuple[CoupledAxis, ...]) -> None:
        super().__init__(model, batches, axes)
        stack = _block_of(axes[0].name).rpartition(".")[0]
        self._names = [f"{stack}.{index}" for index in range(len(model.get_submodule(stack)))]  # type: ignore[arg-type]
        self._blocks = [model.get_submodule(name) for name in self._names]
        self._position = 0
        started = [_calls_of(model, self._blocks, batch) for batch in batches]
        self._hidden = [hidden for hidden, _ in started]
        self._calls = [calls for _, calls in started]

    def go_to(self, axis: CoupledAxis) -> None:
        goal = self._names.index(_block_of(axis.name))
        assert goal >= self._position, "a walk goes forward only"
        while self._position < goal:
            for number in range(len(self.batches)):
                self._hidden[number] = _finite(self._run(number), self._names[self._position])
            passed = f"{self._names[self._position]}."
            for name in [name for name in self.replaced if name.startswith(passed)]:
                del self.replaced[name]  # nothing behind it reads them
            self._position += 1

    def observe(self, axis: CoupledAxis, *, inputs: Mapping[str, Hook] | None = None, outputs: Mapping[str, Hook] | None = None) -> None:
        assert self._names[self._position] == _block_of(axis.name), "the walk is somewhere else"
        for number, batch in enumerate(self.batches):
            with _shown(self.model, batch, inputs or {}, outputs or {}):
                self._run(number)

    def stages(self, axis: CoupledAxis) -> list[tuple[CoupledAxis, ...]]:
        here = {other.name: other for other in self.axes if _block_of(other.name) == self._names[self._position]}
        inputs: dict[str, Tensor] = {}  # held until the end, so that no two of them have one id

        def noting(name: str) -> Callable[..., None]:
            def note(_: nn.Module, args: tuple[Any, ...]) -> None:
                inputs.setdefault(name, args[0])

            return note

        handles = [self.model.get_submodule(name).register_forward_pre_hook(noting(name)) for name in here]
        try:
            self._run(0)
        finally:
            for handle in handles:
                handle.remove()
        groups: dict[object, list[CoupledAxis]] = {}
        for name in sorted(here, key=lambda name: list(inputs).index(name) if name in inputs else len(inputs)):
            groups.setdefault((id(inputs[name]), inputs[name]._version) if name in inputs else name, []).append(here[name])
        return [tuple(group) for group in groups.values()]

    @property
    def activation_bytes(self) -> int:
        return sum(hidden.numel() * hidden.element_size() for hidden in self._hidden)

    def _run(self, number: int) -> Tensor:
        """The block where the walk is, for one batch."""
        from torch.func import functional_call

        block, prefix = self._blocks[self._position], f"{self._names[self._position]}."
        others = {name.removeprefix(prefix): tensor for name, tensor in self.replaced.items() if name.startswith(prefix)}
        arguments, named = self._calls[number][self._position]
        inputs = (self._hidden[number], *arguments)
        hidden: Tensor = functional_call(block, others, inputs, dict(named)) if others else block(*inputs, **named)
        return hidden


class _GraphWalk(Walk):
    """Through a plain network, node by node of its graph; only values that are still to be used are held."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], axes: tuple[CoupledAxis, ...]) -> None:
        from torch import fx

        from partwise.models.chains import trace

        nodes = list(trace(model).nodes)
        starts = {str(node.target): index for index, node in reversed(list(enumerate(nodes))) if node.op == "call_module"}
        super().__init__(model, batches, tuple(sorted(axes, key=lambda axis: starts[axis.name])))
        self._nodes, self._starts = nodes, starts
        self._last_use = {node: max((nodes.index(user) for user in node.users), default=-1) for node in nodes}
        self._position = 0
        self._runner = _runner(fx.GraphModule(model, nodes[0].graph), self.replaced)
        self._values: list[dict[fx.Node, Any]] = [{} for _ in batches]

    def go_to(self, axis: CoupledAxis) -> None:
        goal = self._starts[axis.name]
        assert goal >= self._position, "a walk goes forward only"
        for number, batch in enumerate(self.batches):
            values = self._run(number, batch, goal)
            self._values[number] = {node: value for node, value in values.items() if self._last_use[node] >= goal}
        self._position = goal
        for name in [name for name in self.replaced if self._starts.get(name.rpartition(".")[0], goal) < goal]:
            del self.replaced[name]  # nothing behind it reads them

    def observe(self, axis: CoupledAxis, *, inputs: Mapping[str, Hook] | None = None, outputs: Mapping[str, Hook] | None = None) -> None:
        assert self._starts[axis.name] == self._position, "the walk is somewhere else"
        end = 1 + max(self._starts[name] for name in (inputs or {}).keys() | (outputs or {}).keys())
        for number, batch in enumerate(self.batches):
            held = self._values[number]
            # A network may write into its activations in place, and this place is run again.
            self._values[number] = dict(zip(held, copy.deepcopy(list(held.values())), strict=True))
            try:
                with _shown(self.model, batch, inputs or {}, outputs or {}):
                    self._run(number, batch, end)
            finally:
                self._values[number] = held

    def stages(self, axis: CoupledAxis) -> list[tuple[CoupledAxis, ...]]:
        return [(axis,)]

    @property
    def activation_bytes(self) -> int:
        from torch import Tensor

        return sum(value.numel() * value.element_size() for values in self._values for value in values.values() if isinstance(value, Tensor))

    def _run(self, number: int, batch: Batch, end: int) -> dict[fx.Node, Any]:
        """Values of all nodes before ``end``, from where the walk is."""
        from torch import Tensor

        runner = self._runner
        runner.args_iter = iter([copy.deepcopy(batch.inputs) if self._position == 0 else batch.inputs])
        runner.env = dict(self._values[number])
        for index in range(self._position, end):
            node = self._nodes[index]
            runner.env[node] = runner.run_node(node)
            if node.op == "call_module" and isinstance(runner.env[node], Tensor):
                _finite(runner.env[node], str(node.target))
            for used in node.all_input_nodes:  # what nobody reads any more goes at once
                if self._last_use[used] <= index and used not in self._values[number]:
                    del runner.env[used]
        return dict(runner.env)


def _runner(module: fx.GraphModule, replaced: Mapping[str, Tensor]) -> Any:
    """An interpreter that uses other tensors where there are some."""
    from torch import fx
    from torch.func import functional_call

    class Runner(fx.Interpreter):
        def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            others = {name.removeprefix(f"{target}."): tensor for name, tensor in replaced.items() if name.startswith(f"{target}.")}
            called = self.fetch_attr(target)
            return functional_call(called, others, args, kwargs) if others else called(*args, **kwargs)

    return Runner(module)


def _block_of(name: str) -> str:
    """The block that an axis lies in: everything up to the first number."""
    parts = name.split(".")
    return ".".join(parts[: 1 + next(index for index, part in enumerate(parts) if part.isdecimal())])


Call: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"


def _calls_of(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> tuple[Tensor, list[Call]]:
    """What the first block gets, and all other arguments of every block, without running any of them."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((args, kwargs))
        return args[0]  # type: ignore[no-any-return]

    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        vars(block)["forward"] = note
    try:
        model.base_model(**batch.inputs, **({"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}))  # type: ignore[operator,arg-type]
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward
    return seen[0][0][0], [(args[1:], kwargs) for args, kwargs in seen]


@contextlib.contextmanager
def _shown(model: nn.Module, batch: Batch, inputs: Mapping[str, Hook], outputs: Mapping[str, Hook]) -> Iterator[None]:
    """Tell hooks what modules get and give inside the block."""

    def before(name: str, hook: Hook) -> Callable[..., None]:
        return lambda _, args: hook(_finite(args[0], f"the input of {name}"), batch)

    def after(name: str, hook: Hook) -> Callable[..., None]:
        return lambda _, args, output: hook(_finite(output, f"the output of {name}"), batch)

    handles = [model.get_submodule(name).register_forward_pre_hook(before(name, hook)) for name, hook in inputs.items()]
    handles += [model.get_submodule(name).register_forward_hook(after(name, hook)) for name, hook in outputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(values: Tensor, where: str) -> Tensor:
    """The activations, unless some are no numbers."""
    if not bool(values.isfinite().all()):
        raise InputError(
            "not-finite",
            f"got NaN or infinite activations in {where}, expected finite numbers. Check the calibration data, and load the model in float32 if it was in "
            "float16.",
        )
    return values
