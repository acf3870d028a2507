"""Where the parts of a multilayer perceptron sit: its hidden units, with their rows, norm entries and columns.

Inputs and outputs of the network lie on no axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partwise.models.chains import find_chains, trace

if TYPE_CHECKING:
    from torch import nn

    from partwise.models.axes import Axis, Part

__all__ = ["KINDS", "find_axes", "matches", "settle"]

NAME = "multilayer perceptrons"
KINDS = ("neurons",)


def matches(model: nn.Module) -> bool:
    """Whether all weights of ``model`` are those of linear layers and norms."""
    from torch import nn

    kinds = (nn.Linear, nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    return any(isinstance(module, nn.Linear) for module in owners) and all(isinstance(module, kinds) for module in owners)


def find_axes(model: nn.Module) -> tuple[Axis, ...]:
    """One axis per hidden layer, named after the linear layer that makes the units."""
    return find_chains(trace(model))


def settle(small: nn.Module, axes: tuple[Axis, ...], part: Part) -> None:
    """Nothing to do: the layers themselves know their sizes."""
