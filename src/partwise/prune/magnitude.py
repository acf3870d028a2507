"""Units with large weights stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from partwise.prune.unit_method import UnitMethod

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.prune.unit_method import Visit

__all__ = ["Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(UnitMethod):
    """Units with large weights stay; reads no data.

    A neuron, filter or head scores the norm of all weights that go with it, those that make it and those that read it. A state of Mamba2 scores the product
    of two norms, of the weights that write it (``B``) and of those that read it (``C``), because that is how they enter the output.

    References
    ----------
    Pruning Filters for Efficient ConvNets, there with the l1 norm of the weights that make a filter. arXiv:1608.08710.
    """

    NEEDS_DATA: ClassVar[bool] = False

    def score(self, visit: Visit) -> Tensor:
        """Norms from the weights alone."""
        import torch
        from torch import nn

        axis = visit.axis
        squares = torch.zeros(2, axis.size, dtype=torch.float64)
        for member in axis.members:
            if not isinstance(visit.tensors[member.tensor], nn.Parameter):
                continue  # statistics of a norm are no weights
            values = visit.tensors[member.tensor].detach().double().cpu().square().movedim(member.dim, 0)  # (entries, ...)
            for place, start in enumerate(member.starts):
                squares[place] += values[start : start + axis.size * member.width].reshape(axis.size, -1).sum(1)  # (units,)
        return squares.prod(0).sqrt() if axis.kind == "states" else squares.sum(0).sqrt()
