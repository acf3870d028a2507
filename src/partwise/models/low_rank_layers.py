"""Linear layers of low rank: two thin layers, one behind the other, in the place of one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from partwise import atomic_files
from partwise.checks import InputError

if TYPE_CHECKING:
    from torch import Tensor

    Model = TypeVar("Model", bound=nn.Module)

__all__ = ["RANKS", "LowRankLinear", "check_layer", "make_thin", "ranks_of", "read_ranks", "thin_like", "with_layers"]

RANKS = "low_rank.json"  # beside the configuration of a model: layer -> rank


class LowRankLinear(nn.Sequential):
    """A linear layer ``y = B (A x) + b`` of two thin ones, ``0`` and ``1``.

    Code that asks a linear layer for its weight, its bias or its sizes gets an answer here too; the weight is multiplied out each time.

    Parameters
    ----------
    inner : torch.nn.Linear
        From the inputs to as many numbers as the rank; without bias.
    outer : torch.nn.Linear
        From there to the outputs.
    """

    def __init__(self, inner: nn.Linear, outer: nn.Linear) -> None:
        super().__init__(inner, outer)

    @property
    def rank(self) -> int:
        """Numbers between the two layers."""
        inner, _ = self.thin_layers
        return int(inner.weight.shape[0])

    @property
    def in_features(self) -> int:
        """Inputs."""
        inner, _ = self.thin_layers
        return int(inner.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Outputs."""
        _, outer = self.thin_layers
        return int(outer.weight.shape[0])

    @property
    def weight(self) -> Tensor:
        """The product of the two, (outputs, inputs)."""
        inner, outer = self.thin_layers
        product: Tensor = outer.weight @ inner.weight
        return product

    @property
    def bias(self) -> nn.Parameter | None:
        """Of the outer layer."""
        _, outer = self.thin_layers
        bias: nn.Parameter | None = outer.bias
        return bias

    @property
    def thin_layers(self) -> tuple[Any, Any]:
        """The inner and the outer one, whatever adapters have been put around them."""
        return self[0], self[1]


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Name -> rank of every layer of low rank."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def check_layer(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of a name, which can be made thin.

    Raises
    ------
    InputError
        ``unknown-layer`` when there is none, ``unsupported-layer`` when it is no plain ``torch.nn.Linear``, ``torn-ties`` when its weight is used elsewhere
        too.
    """
    module = dict(model.named_modules()).get(name)
    if module is None:
        raise InputError("unknown-layer", f"{type(model).__name__} has no layer {name}, expected the name of a linear layer. Check that both belong together.")
    if type(module) is not nn.Linear:
        is_thin = isinstance(module, LowRankLinear)
        advice = "It is thin already: use the model that it was made from." if is_thin else "Dequantise the model, or merge its adapters, first."
        raise InputError("unsupported-layer", f"{name} is a {type(module).__module__}.{type(module).__name__}, expected a plain Linear. {advice}")
    own = {id(tensor) for tensor in module.parameters()}
    others = [other for other, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in own and other.rpartition(".")[0] != name]
    if others:
        raise InputError(
            "torn-ties",
            f"{name}.weight and {others[0]} are one tensor, which two thin layers would tear apart, expected a layer with a tensor of its own. Leave it out.",
        )
    return module


def thin_like(linear: nn.Linear, rank: int) -> LowRankLinear:
    """A layer of low rank with the sizes, dtype and device of another, and a bias if that has one; its weights are not set yet."""
    import torch

    weight, bias = linear.weight, linear.bias
    with torch.device("meta"):  # nothing is drawn
        inner = nn.Linear(weight.shape[1], rank, bias=False, dtype=weight.dtype)
        outer = nn.Linear(rank, weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    thin = LowRankLinear(inner, outer)
    if not weight.is_meta:
        thin = thin.to_empty(device=weight.device)
    thin.requires_grad_(weight.requires_grad)
    return thin.train(linear.training)


def make_thin(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put layers of low rank, whose weights are not set yet, in the place of those that ``ranks`` names. The model is changed.

    Raises
    ------
    InputError
        As `check_layer`; and ``rank-out-of-range`` for a rank that the layer cannot have.
    """
    for name, rank in ranks.items():
        linear = check_layer(model, name)
        limit = min(linear.weight.shape)
        if not 1 <= rank <= limit:
            raise InputError(
                "rank-out-of-range",
                f"{name} has {linear.weight.shape[1]} inputs and {linear.weight.shape[0]} outputs, got a rank of {rank}, expected 1 to {limit}. "
                "Check that both belong together.",
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, thin_like(linear, rank))


def with_layers(model: Model, layers: Mapping[str, nn.Module]) -> Model:
    """A copy of a model with other modules in the places that ``layers`` names; the old ones are never copied, the new ones are used as they are."""
    modules = dict(model.named_modules())
    return copy.deepcopy(model, {id(modules[name]): layer for name, layer in layers.items()})


def read_ranks(folder: Path) -> dict[str, int]:
    """Layer -> rank as a folder says; nothing where all its layers are whole.

    Raises
    ------
    InputError
        ``bad-model-config`` when the file holds something else.
    """
    if not (folder / RANKS).is_file():
        return {}
    ranks = atomic_files.read_json(folder / RANKS)
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank >= 1 for rank in ranks.values()):
        raise InputError(
            "bad-model-config", f"{folder / RANKS} does not map layers to ranks of at least 1. Restore it from a copy, or save the model again."
        )
    return ranks
