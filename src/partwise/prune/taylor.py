"""Units whose removal changes the loss most, to first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from partwise.prune._losses import arguments_of, loss_of
from partwise.prune.unit_method import UnitMethod

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.models.axes import CoupledAxis
    from partwise.models.walks import Batch
    from partwise.prune.method import Report
    from partwise.prune.unit_method import Visit

__all__ = ["Taylor"]


@dataclass(frozen=True, kw_only=True)
class Taylor(UnitMethod):
    """Units whose removal changes the loss most, to first order; needs gradients.

    Setting the weights that read a unit to zero removes it, and changes the loss by about ``-sum(gradient * weight)`` over these weights. The score is the
    square of that sum, averaged over batches. One shot: the gradients are those of the whole model, so ``recalibrate`` changes nothing, and unlike the other
    methods it needs the activations of all layers at once.

    Labels come with the batches; language models predict the next token where there are none.

    References
    ----------
    Importance Estimation for Neural Network Pruning. arXiv:1906.10771.
    """

    WALKS: ClassVar[bool] = False

    def prepare(self, model: nn.Module, axes: Sequence[CoupledAxis], batches: Sequence[Batch], report: Report) -> Mapping[str, Tensor]:
        """Scores of all units, from one backward pass for each batch."""
        import torch
        from torch.func import functional_call

        from partwise.models import tensors_of

        every = tensors_of(model)
        names = {member.tensor for axis in axes for member in axis.members if member.tensor in (axis.closers or axis.readers)}
        weights = {name: every[name].detach().requires_grad_() for name in sorted(names)}
        scores = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            for number, batch in enumerate(batches):
                report("following the gradient", number, len(batches), "")
                with torch.enable_grad():  # the caller may have switched it off
                    loss = loss_of(functional_call(model, weights, *arguments_of(model, batch)), batch)
                    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
                for axis in axes:
                    scores[axis.name] += _sum_of_products(axis, weights, gradients).square() / len(batches)
        finally:
            for module, training in modes:
                module.training = training
        return scores

    def score(self, visit: Visit) -> Tensor:
        """What `prepare` found."""
        return visit.prepared[visit.axis.name]


def _sum_of_products(axis: CoupledAxis, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """For each unit, the sum of gradient times weight over the entries that switch it off, (units,)."""
    import torch

    total = torch.zeros(axis.size, dtype=torch.float64)
    for member in axis.members:
        if member.tensor not in (axis.closers or axis.readers):
            continue
        products = (weights[member.tensor].detach() * gradients[member.tensor]).double().cpu().movedim(member.dim, 0)
        products = products.reshape(len(products), -1).sum(1)  # (entries,)
        for start in member.starts:
            total += products[start : start + axis.size * member.width].view(axis.size, -1).sum(1)
    return total
