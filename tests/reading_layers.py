"""Layers that read units, in every form that there is, and what each unit adds to their outputs, by calling them once for each unit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_families import FAMILIES
from partwise.models import coupled_axes, tensors_of
from partwise.models.axes import CoupledAxis
from partwise.models.walks import Batch, start_walk
from partwise.prune.unit_method import Visit


@dataclass(frozen=True)
class Case:
    """A model in float64, one of its axes, an input, and the norm behind a reader, where there is one."""

    model: nn.Module
    axis: CoupledAxis
    inputs: Tensor
    norms: dict[str, str]

    @contextlib.contextmanager
    def visit(self) -> Iterator[Visit]:
        is_text = hasattr(type(self.model), "config_class")
        name = "pixel_values" if self.inputs.is_floating_point() else "input_ids"
        with start_walk(self.model, [self.axis], [Batch({name: self.inputs} if is_text else self.inputs)]) as walk:
            walk.go_to(self.axis)
            yield Visit(self.model, self.axis, tensors_of(self.model), walk)

    @torch.no_grad()
    def hidden(self) -> dict[str, Tensor]:
        """What every reader gets in an ordinary call of the model."""
        found: dict[str, Tensor] = {}

        def note(reader: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                found[reader] = arguments[0].detach().clone()

            return hook

        handles = [self.model.get_submodule(reader.rpartition(".")[0]).register_forward_hook(note(reader)) for reader in self.axis.readers]
        self.model(self.inputs)
        for handle in handles:
            handle.remove()
        return found

    def output(self, reader: str, hidden: Tensor) -> Tensor:
        """Of a reader and the norm behind it."""
        found: Tensor = self.model.get_submodule(reader.rpartition(".")[0])(hidden)
        return self.model.get_submodule(self.norms[reader])(found) if reader in self.norms else found

    def only(self, hidden: Tensor, units: Tensor) -> Tensor:
        """Hidden values with zeros for units that are not marked in (units,)."""
        entries = units.to(hidden).repeat_interleave(hidden.shape[1 if hidden.ndim == 4 else -1] // self.axis.size)
        return hidden * (entries.view(-1, 1, 1) if hidden.ndim == 4 else entries)

    @torch.no_grad()
    def contributions(self) -> Tensor:
        """What each unit adds to the outputs of all readers: (units, everything)."""
        rows = []
        for unit in range(self.axis.size):
            mark = torch.arange(self.axis.size) == unit
            pieces = [self.output(reader, self.only(hidden, mark)) - self.output(reader, 0 * hidden) for reader, hidden in self.hidden().items()]
            rows.append(torch.cat([piece.flatten() for piece in pieces]))
        return torch.stack(rows)


def _family(name: str, kind: str, norms: dict[str, str]) -> Callable[[], Case]:
    def make() -> Case:
        build, inputs = FAMILIES[name]
        model = build(seed=1).double()
        axis = next(axis for axis in coupled_axes(model) if axis.kind == kind)
        assert isinstance(axis, CoupledAxis)
        return Case(model, axis, inputs.double() if inputs.is_floating_point() else inputs, norms)

    return make


def _network(*layers: Callable[[], nn.Module], norms: dict[str, str] | None = None, size: int = 7) -> Callable[[], Case]:
    def make() -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = nn.Sequential(*(layer() for layer in layers)).double().eval()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
                    if module.affine:
                        nn.init.normal_(module.weight)
            inputs = torch.randn(3, 2, size, size, dtype=torch.float64)
        axis: Any = coupled_axes(model)[0]
        return Case(model, axis, inputs, norms or {})

    return make


def _filters() -> nn.Module:
    return nn.Conv2d(2, 6, 3, padding=1)


def _reader(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(6, 4, **({"kernel_size": 3} | options))


class TwoReaders(nn.Module):
    """Filters that are read by a convolution and, averaged, by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.near, self.far = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 3, 3, padding=1), nn.Linear(6, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.make(images))
        return self.near(hidden).mean((2, 3)) + self.far(torch.flatten(self.pool(hidden), 1))


CASES: dict[str, Callable[[], Case]] = {
    "neurons of a perceptron": _family("mlp", "neurons", {}),
    "neurons with a norm behind the reader": _family("mlp-with-norms", "neurons", {"3.weight": "4"}),
    "filters with a norm behind the reader": _family("resnet", "filters", {"layer1.0.conv2.weight": "layer1.0.bn2"}),
    "filters with a shortcut, norms behind both": _family(
        "resnet-bottleneck", "filters", {"layer1.0.conv1.weight": "layer1.0.bn1", "layer1.0.downsample.0.weight": "layer1.0.downsample.1"}
    ),
    "filters before a sum": _family("resnet-preact", "filters", {}),
    "Llama": _family("llama", "neurons", {}),
    "heads of Llama": _family("llama", "heads", {}),
    "Qwen2": _family("qwen2", "neurons", {}),
    "GPT-2": _family("gpt2", "neurons", {}),
    "GPT-NeoX": _family("gpt-neox", "neurons", {}),
    "ViT": _family("vit", "neurons", {}),
    "heads of ViT": _family("vit", "heads", {}),
    "a border of zeros": _network(_filters, nn.ReLU, _reader(padding=1)),
    "a border that is as wide as it takes": _network(_filters, nn.ReLU, _reader(kernel_size=(3, 5), padding="same")),
    "no border": _network(_filters, nn.ReLU, _reader()),
    "a border that reflects": _network(_filters, nn.Tanh, _reader(padding=2, padding_mode="reflect")),
    "a border that goes round": _network(_filters, nn.Tanh, _reader(padding=(1, 2), padding_mode="circular")),
    "a border that repeats": _network(_filters, nn.Tanh, _reader(padding=1, padding_mode="replicate")),
    "steps and gaps": _network(_filters, nn.Tanh, _reader(stride=(2, 1), dilation=2, padding=2)),
    "single points": _network(_filters, nn.ReLU, _reader(kernel_size=1), lambda: nn.BatchNorm2d(4), norms={"2.weight": "3"}),
    "a norm without weights": _network(_filters, nn.ReLU, _reader(padding=1), lambda: nn.BatchNorm2d(4, affine=False), norms={"2.weight": "3"}),
    "images that are flattened": _network(_filters, nn.ReLU, nn.Flatten, lambda: nn.Linear(6 * 49, 5)),
    "pooling between": _network(_filters, nn.ReLU, lambda: nn.MaxPool2d(2), _reader(padding=1)),
    "two readers": _network(TwoReaders),
}
