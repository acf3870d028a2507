"""Plans that make two thin layers out of one: in which directions the outputs of each layer may lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from partwise.checks import InputError
from partwise.linalg.output_basis import projected_layer, thin_layer
from partwise.models.axes import Part
from partwise.prune.plan import PrunePlan

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.ledger import Ledger

    Model = TypeVar("Model", bound=nn.Module)

__all__ = ["LowRankPlan", "projected_tensors"]


@dataclass(frozen=True, kw_only=True)
class LowRankPlan(PrunePlan):
    """A basis for the outputs of each layer that is to become thin. Layers that are not named stay whole.

    Parameters
    ----------
    bases : mapping of str to Tensor
        Name of a layer -> orthonormal columns, (outputs, rank), float64.
    inputs : mapping of str to int
        Name of a layer -> its inputs.
    means : mapping of str to Tensor
        Name of a layer with a bias -> mean of its outputs, (outputs,), float64. Layers without bias are missing.
    shares : mapping of str to Tensor
        Name of a layer -> share of the energy of its outputs along each direction, (directions,), float64, falling; those of ``bases`` come first.
    """

    bases: Mapping[str, Tensor]
    inputs: Mapping[str, int]
    means: Mapping[str, Tensor] = field(default_factory=dict)
    shares: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Name -> rank of each layer."""
        return {name: int(basis.shape[1]) for name, basis in self.bases.items()}

    def apply(self, model: Model, *, as_mask: bool) -> Model:
        """The model with thin layers; as a mask: with layers of the old size that compute the same."""
        from partwise.models import tensors_of, with_tensors
        from partwise.models.low_rank_layers import with_layers

        layers = {name: self._layer(model, name) for name in self.bases}
        if not as_mask:
            return with_layers(model, {name: self._thin(name, layer) for name, layer in layers.items()})
        changed: dict[str, Tensor] = {}
        for name, layer in layers.items():
            changed |= projected_tensors(layer, name, self.bases[name], self.means.get(name))
        return with_tensors(model, {name: changed[name] if name in changed else tensor.detach().clone() for name, tensor in tensors_of(model).items()})

    def ledger(self, model: nn.Module) -> Ledger:
        """One row per direction of the layers that the plan names; a direction costs a row of one thin layer and a column of the other."""
        from partwise.ledger import Ledger
        from partwise.ledger import Part as Row

        rows = []
        for name, basis in self.bases.items():
            cost, shares = self.inputs[name] + len(basis), self.shares.get(name)
            size = cost * self._layer(model, name).weight.element_size()
            rows += [
                Row(
                    where=name,
                    index=direction,
                    parameters=cost,
                    bytes=size,
                    score=None if shares is None else float(shares[direction]),
                    status="kept" if direction < basis.shape[1] else "dropped",
                )
                for direction in range(basis.shape[1] if shares is None else len(shares))
            ]
        return Ledger(tuple(rows))

    def part_of(self, small: nn.Module) -> Part:
        """All units; after a check that the thin layers of ``small`` are those of this plan, or none where it was applied as a mask."""
        from partwise.models.low_rank_layers import ranks_of

        ranks = ranks_of(small)
        for name in [*self.ranks, *ranks] if ranks else ():
            if ranks.get(name) != self.ranks.get(name):
                raise InputError(
                    "plan-for-another-model",
                    f"{name} is {_told(ranks.get(name))} in this model and {_told(self.ranks.get(name))} in the plan, expected the model that the plan makes. "
                    "Pass the plan that was applied, or leave it out.",
                )
        return Part({})

    def contents(self) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
        """Bases, means and shares as float64."""
        groups = {"bases": self.bases, "means": self.means, "shares": self.shares}
        return "low-rank", {f"{group}/{name}": values for group, named in groups.items() for name, values in named.items()}, {"inputs": dict(self.inputs)}

    @classmethod
    def from_contents(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> LowRankPlan:
        """The plan that `contents` came from."""
        groups: dict[str, dict[str, Any]] = {"bases": {}, "means": {}, "shares": {}}
        for key, values in sorted(tensors.items()):
            group, _, name = key.partition("/")
            groups[group][name] = values
        return cls(method=facts["method"], num_tokens=facts["num_tokens"], inputs=facts["inputs"], **groups)

    def _layer(self, model: nn.Module, name: str) -> nn.Linear:
        """A layer of the model that the plan was made for."""
        from partwise.models.low_rank_layers import check_layer

        layer = check_layer(model, name)
        made_for = (len(self.bases[name]), self.inputs[name])
        if tuple(layer.weight.shape) != made_for or (layer.bias is not None) != (name in self.means):
            raise InputError(
                "plan-for-another-model",
                f"the plan was made for a layer {name} of shape {made_for} {'with' if name in self.means else 'without'} a bias, but this model has one of "
                f"shape {tuple(layer.weight.shape)} {'without' if layer.bias is None else 'with'} a bias, expected the model that it was made for. "
                "A model that was pruned before needs a new plan: call the method again.",
            )
        return layer

    def _thin(self, name: str, layer: nn.Linear) -> nn.Module:
        from partwise.models.low_rank_layers import thin_like

        thin = thin_like(layer, self.ranks[name])
        basis, mean = _placed(layer, self.bases[name], self.means.get(name))
        inner, outer, bias = thin_layer(layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), basis, mean)
        first, second = thin.thin_layers
        first.weight.data.copy_(inner)
        second.weight.data.copy_(outer)
        if bias is not None:
            second.bias.data.copy_(bias)
        return thin


def _told(rank: int | None) -> str:
    return "whole" if rank is None else f"of rank {rank}"


def projected_tensors(layer: nn.Linear, name: str, basis: Tensor, mean: Tensor | None) -> dict[str, Tensor]:
    """Weight and bias with which a layer of the old size computes what the thin ones do, by their names in the model.

    Parameters
    ----------
    layer : torch.nn.Linear
        Not changed.
    name : str
        Of the layer.
    basis : Tensor of shape (outputs, rank) and dtype float64
        Orthonormal columns.
    mean : Tensor of shape (outputs,) and dtype float64, or None
        Mean of the outputs, for a layer with a bias.
    """
    basis, mean = _placed(layer, basis, mean)
    weight, bias = projected_layer(layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), basis, mean)
    return {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})


def _placed(layer: nn.Linear, basis: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """On the device of a layer."""
    device = layer.weight.device
    return basis.to(device), None if mean is None else mean.to(device)
