"""Units drawn by chance: the baseline of all baselines."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from partwise.prune.unit_method import UnitMethod

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.prune.unit_method import Visit

__all__ = ["Random"]


@dataclass(frozen=True, kw_only=True)
class Random(UnitMethod):
    """Units drawn by chance.

    What a method is worth is what it gains on this. One draw says little: take several seeds.

    Parameters
    ----------
    seed : int
        Of the draw. A larger budget with the same seed keeps the same units and more.

    References
    ----------
    Recovering from Random Pruning: filters drawn by chance, after fine-tuning, beside chosen ones. arXiv:1801.10447.
    """

    NEEDS_DATA: ClassVar[bool] = False

    seed: int = 0

    def score(self, visit: Visit) -> Tensor:
        """A uniform number for each unit, from the seed and the name of its axis."""
        import torch

        digest = hashlib.sha256(f"{self.seed} {visit.axis.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.rand(visit.axis.size, generator=generator, dtype=torch.float64)
