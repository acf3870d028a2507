"""DiLoCo: local steps on the whole model, then one outer step of Nesterov momentum along the mean change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from partwise.checks import InputError
from partwise.train.local_sgd import LocalSGD

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.train._rounds import SubnetState

__all__ = ["DiLoCo"]


@dataclass(frozen=True, kw_only=True)
class DiLoCo(LocalSGD):
    """Local SGD whose mean change is a gradient for a second optimiser: SGD with Nesterov momentum, one step per round.

    With ``outer_lr=1`` and ``outer_momentum=0`` it is Local SGD. The paper leaves AdamW's moments on the workers; here a worker keeps nothing between rounds,
    so they travel and are averaged (``optimizer_state="carry"``), or start afresh (``"reset"``), which sends as little as the paper. Statistics of batch
    normalisation are averaged, not stepped. There is no asynchronous form: the outer momentum would take the same change up once for every worker.

    Parameters
    ----------
    outer_lr : float, default=0.7
        Of the outer step, above 0; the paper's choice.
    outer_momentum : float, default=0.9
        Of the outer step, at least 0 and below 1; the paper's choice.

    References
    ----------
    DiLoCo: Distributed Low-Communication Training of Language Models. arXiv:2311.08105. Its 500 local steps suit runs far longer than those of one machine,
    so the default is that of the other methods.
    """

    outer_lr: float = 0.7
    outer_momentum: float = 0.9

    supports_async: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.outer_lr) and self.outer_lr > 0):
            raise InputError(
                "optimizer-setting", f"got outer_lr={self.outer_lr}, expected a number above 0. Pass 0.7, or 1 to take the mean change as it is."
            )
        if not 0 <= self.outer_momentum < 1:
            raise InputError(
                "optimizer-setting", f"got outer_momentum={self.outer_momentum}, expected at least 0 and below 1. Pass 0.9, or 0 for no momentum."
            )

    def after_merge(self, before: SubnetState, merged: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The outer step, and its momentum."""
        tensors, outer = dict(merged), {}
        for name in (name for name, tensor in merged.items() if tensor.is_floating_point() and not _is_statistic(name)):
            old, new = _precise(before.tensors[name]), _precise(merged[name])
            gradient = old - new
            outer[name] = gradient + (self.outer_momentum * before.outer[name] if name in before.outer else 0)
            tensors[name] = (old - self.outer_lr * (gradient + self.outer_momentum * outer[name])).to(merged[name].dtype)
        return tensors, outer


def _precise(tensor: Tensor) -> Tensor:
    """At least single precision, so that a small change is not lost beside a bfloat16 weight."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _is_statistic(name: str) -> bool:
    """Whether a tensor belongs to batch normalisation and is no parameter: a step beyond its mean could make a variance negative."""
    return name.rpartition(".")[2] in {"running_mean", "running_var"}
