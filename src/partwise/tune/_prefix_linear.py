"""The two inner maps of a LoRA layer, made aware of which components a sample sees and which of them learn from it.

Both are ``nn.Linear`` with the weight padded to the largest rank, so optimisers, DDP and checkpoints see one tensor of one shape
from the first step to the last. Only the first ``rank`` rows (of ``lora_A``) or columns (of ``lora_B``) take part.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from partwise.tune._controller import Controller
    from partwise.tune._slot import Slot


@dataclass(frozen=True)
class Masks:
    """What one batch sees of one module.

    ``sees`` (samples, width): 1 where the forward pass of a sample contains a component.
    ``learns`` (samples, width): weight with which a component's gradient collects that sample. None: same as ``sees``.
    ``samples`` is 1 when the whole batch is at one level. ``width`` counts the components that take part, private ones included.
    """

    sees: Tensor
    learns: Tensor | None

    @property
    def width(self) -> int:
        return int(self.sees.shape[1])


def spread(mask: Tensor, values: Tensor) -> Tensor:
    """Shape ``mask`` (samples, width) so that it multiplies ``values`` (batch, ..., width); a flattened batch repeats each sample."""
    samples, width = mask.shape
    if values.dim() == 2 and values.shape[0] != samples and samples > 1:
        mask = mask.repeat_interleave(values.shape[0] // samples, dim=0)  # (batch * seq, width)
        samples = values.shape[0]
    return mask.view(samples, *(1,) * (values.dim() - 2), width)


class _Down(torch.autograd.Function):
    """``x A^T``, with one mask on what flows through and another on what the weight's gradient collects."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sees: Tensor, learns: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, sees, learns)
        z = functional.linear(x, weight)  # (..., width), in the autocast dtype where there is one
        return z * sees.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, weight, sees, learns = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = ((grad * sees.to(grad.dtype)) @ weight.to(grad.dtype)).to(x.dtype)  # (..., in)
        if ctx.needs_input_grad[1]:
            collected = (grad * learns.to(grad.dtype)).flatten(0, -2)  # (tokens, width)
            grad_weight = (collected.T @ x.to(grad.dtype).flatten(0, -2)).to(weight.dtype)  # (width, in)
        return grad_x, grad_weight, None, None


class _Up(torch.autograd.Function):
    """``z B^T`` for ``z`` that is masked already; the weight's gradient collects ``z * learns``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, learns: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight, learns)
        return functional.linear(z, weight)  # (..., out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        z, weight, learns = ctx.saved_tensors
        grad_z = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_z = (grad @ weight.to(grad.dtype)).to(z.dtype)  # (..., width)
        if ctx.needs_input_grad[1]:
            collected = (z.to(grad.dtype) * learns.to(grad.dtype)).flatten(0, -2)  # (tokens, width)
            grad_weight = (grad.flatten(0, -2).T @ collected).to(weight.dtype)  # (out, width)
        return grad_z, grad_weight, None


class _PrefixLinear(nn.Linear):
    """What the two maps share: the slot they belong to, and a state dict that holds only the active components."""

    controller: Controller
    slot: Slot
    component_dim: int

    def bind(self, controller: Controller, slot: Slot) -> None:
        self.controller, self.slot = controller, slot

    def unbind(self) -> None:
        """Become a plain ``nn.Linear`` of the active rank (same function, same names on disk)."""
        weight = self._active().clone()
        del self.controller, self.slot
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.out_features, self.in_features = weight.shape

    @abstractmethod
    def _padding(self, like: Tensor) -> Tensor:
        """What waiting components hold after loading, for all components; placed as ``like``."""

    def _active(self) -> Tensor:
        return self.weight.detach().narrow(self.component_dim, 0, self.slot.rank)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination[prefix + "weight"]
        if type(weight) in (Tensor, nn.Parameter):  # a sharded tensor stays whole; finalize() compacts it
            destination[prefix + "weight"] = weight.narrow(self.component_dim, 0, self.slot.rank)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(prefix + "weight")
        if loaded is not None:
            rank = self.controller.accept_rank(self.slot, int(loaded.shape[self.component_dim]))
            if loaded.shape != self.weight.shape:
                like = torch.empty_like(self.weight, device=loaded.device if self.weight.is_meta else self.weight.device)
                padded = self._padding(like)
                padded.narrow(self.component_dim, 0, rank).copy_(loaded)
                state_dict = {**state_dict, prefix + "weight": padded}
        super()._load_from_state_dict(state_dict, prefix, *args)


class PrefixDown(_PrefixLinear):
    """``lora_A``: (batch, ..., in) -> (batch, ..., width). Row ``k`` of the weight (r_max, in) is ``a_k``."""

    component_dim = 0
    STATE = "adapad_state"

    def forward(self, x: Tensor) -> Tensor:
        """Project ``x`` on the components that this forward pass contains."""
        if not self.training or not self.weight.requires_grad:
            return functional.linear(x, self.weight[: self.slot.rank])
        masks = self.slot.masks = self.controller.masks(self.slot, x)
        if masks is None:
            return functional.linear(x, self.weight[: self.slot.rank])  # (..., rank)
        weight = self.weight[: masks.width]  # (width, in)
        sees = spread(masks.sees, x)  # (batch, 1, ..., width)
        if masks.learns is None:
            z = functional.linear(x, weight)  # (..., width)
            return z * sees.to(z.dtype)
        return _apply(_Down, x, weight, sees, spread(masks.learns, x))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + self.STATE] = self.controller.slot_state(self.slot)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        state = state_dict.get(prefix + self.STATE)
        unexpected = args[3]
        if state is not None:
            self.controller.load_slot_state(self.slot, state)
            if self.controller.has_private(self.slot):  # lora_B is loaded after this
                self.slot.private_up = self.slot.up.weight.detach()[:, self.slot.rank].clone()
            if prefix + self.STATE in unexpected:
                unexpected.remove(prefix + self.STATE)

    def _padding(self, like: Tensor) -> Tensor:
        return self.slot.fresh_down(like)


class PrefixUp(_PrefixLinear):
    """``lora_B``: (batch, ..., width) -> (batch, ..., out). Column ``k`` of the weight (out, r_max) is ``b_k``."""

    component_dim = 1

    def forward(self, z: Tensor) -> Tensor:
        """Map the projections back; ``z`` carries the mask of :class:`PrefixDown` already."""
        weight = self.weight[:, : z.shape[-1]]  # (out, width)
        if not self.training or not self.weight.requires_grad:
            return functional.linear(z, weight)
        masks = self.slot.masks  # set by PrefixDown a moment ago
        if masks is None or masks.learns is None:
            return functional.linear(z, weight)
        return _apply(_Up, z, weight, spread(masks.learns, z))

    def _padding(self, like: Tensor) -> Tensor:
        padding = torch.zeros_like(like)
        if self.slot.private_up is not None:
            padding[:, self.slot.rank] = self.slot.private_up
            self.slot.private_up = None
        return padding


def _apply(function: type[torch.autograd.Function], *args: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = function.apply
    return apply(*args)
