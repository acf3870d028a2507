"""Plans that keep single weights: a mask for each weight tensor. They save nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from partwise.checks import InputError
from partwise.prune.plan import PrunePlan

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.ledger import Ledger

    Model = TypeVar("Model", bound=nn.Module)

__all__ = ["WeightMaskPlan"]


@dataclass(frozen=True, kw_only=True)
class WeightMaskPlan(PrunePlan):
    """Which single weights stay; the others become zeros in tensors of the same size.

    Parameters
    ----------
    masks : mapping of str to Tensor
        Name of a weight in ``model.state_dict()`` -> what stays, of the shape of the weight, bool. Tensors that are not named stay as they are.
    moved : mapping of str to Tensor
        What the method changed before it chose: perturbed weights, and the running statistics of norms. Whole tensors, under their names.
    """

    masks: Mapping[str, Tensor]
    moved: Mapping[str, Tensor] = field(default_factory=dict)

    def apply(self, model: Model, *, as_mask: bool) -> Model:
        """The model with zeros where masked; it saves neither memory nor time.

        Sizes stay as they are, so ``as_mask`` makes no difference.

        Raises
        ------
        InputError
            ``plan-for-another-model`` naming the first tensor that does not fit.
        """
        from partwise.models import tensors_of, with_tensors

        tensors = tensors_of(model)
        self._refuse_other_models(model, tensors)
        changed = {}
        for name, old in tensors.items():
            values = self.moved[name].to(old) if name in self.moved else old.detach()
            changed[name] = values.masked_fill(~self.masks[name].to(old.device), 0) if name in self.masks else values.clone()
        return with_tensors(model, changed)

    def ledger(self, model: nn.Module) -> Ledger:
        """Two rows for each masked tensor, what is kept and what is dropped. The bytes are all with what is kept: zeros are stored too."""
        from partwise.ledger import Ledger
        from partwise.ledger import Part as Row
        from partwise.models import tensors_of

        tensors, rows = tensors_of(model), []
        self._refuse_other_models(model, tensors)
        for name, mask in self.masks.items():
            kept, size = int(mask.sum()), tensors[name].numel() * tensors[name].element_size()
            rows += [
                Row(where=name, index=0, parameters=kept, bytes=size, score=None, status="kept"),
                Row(where=name, index=1, parameters=mask.numel() - kept, bytes=0, score=None, status="dropped"),
            ]
        return Ledger(tuple(rows))

    def contents(self) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
        """Masks as one bit for each weight, eight to a byte, the first in the highest bit; what moved as it is."""
        import numpy as np
        import torch

        packed = {f"masks/{name}": torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in self.masks.items()}  # (bytes,)
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        return "weights", packed | {f"moved/{name}": values for name, values in self.moved.items()}, {"shapes": shapes}

    @classmethod
    def from_contents(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> WeightMaskPlan:
        """The plan that `contents` came from.

        Raises
        ------
        InputError
            ``no-plan`` when a mask is missing or has not as many bits as its weight has entries.
        """
        import math

        import numpy as np
        import torch

        masks = {}
        for name, shape in facts.get("shapes", {}).items():
            packed, count = tensors.get(f"masks/{name}"), math.prod(shape)
            if packed is None or packed.numel() != -(-count // 8):
                got = "no mask" if packed is None else f"a mask of {packed.numel()} bytes"
                raise InputError("no-plan", f"the plan holds {got} for {name}, expected {-(-count // 8)} bytes for {count} weights. Make the plan again.")
            masks[name] = torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool)).view(shape)
        moved = {name.removeprefix("moved/"): values for name, values in tensors.items() if name.startswith("moved/")}
        return cls(method=facts["method"], num_tokens=facts["num_tokens"], masks=masks, moved=moved)

    def _refuse_other_models(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """A mask says nothing about a tensor of another size."""
        for name, expected in (dict(self.moved) | dict(self.masks)).items():
            got = tuple(tensors[name].shape) if name in tensors else None
            if got != tuple(expected.shape):
                found = "no such tensor" if got is None else f"{got} there"
                raise InputError(
                    "plan-for-another-model",
                    f"the plan was made for {name} of shape {tuple(expected.shape)}, but {type(model).__name__} has {found}, expected the model that it was "
                    "made for. Make a plan for this one.",
                )
