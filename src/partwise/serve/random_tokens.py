"""Random tokens: a sample of the text, and the last tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from partwise.checks import check_at_least
from partwise.serve.rule import EvictionRule

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.serve.rule import Cached, Limits

__all__ = ["RandomTokens"]

LARGEST = 2**63 - 1
ODD = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB)


@dataclass(frozen=True, kw_only=True)
class RandomTokens(EvictionRule):
    """Keep a random sample of all tokens that passed: a baseline. Every head draws its own, and what is kept depends on seed, head and place alone.

    Parameters
    ----------
    seed : int, default=0
        Seed of the sample.
    recent : int or float, default=10
        The last tokens never leave: their number, or their share of the budget.
    num_sinks : int, default=0
        So many first tokens never leave.
    drop : int or float, default=1
        Tokens that leave at an eviction: their number, or their share of the budget.

    References
    ----------
    Vitter. Random Sampling with a Reservoir. ACM Transactions on Mathematical Software, 1985. doi:10.1145/3147.3165
    """

    seed: int = 0
    drop: int | float = 1
    num_channels: ClassVar[int] = 1  # the token's lot

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self.seed, 0, name="seed")

    def initial(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Draw a lot for each token: its place, mixed until nothing of the order is left."""
        import torch

        heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
        lot = (positions.long() * ODD[0]) ^ ((heads + 1) * ODD[1]) ^ ((self.seed + 1) * ODD[2] & LARGEST)
        for odd in ODD:
            lot = (lot ^ ((lot >> 29) & 0x7FFFFFFFF)) * odd
        return ((lot >> 32) & 0xFFFFFF).float()[..., None]

    def badness(self, cached: Cached, limits: Limits) -> Tensor:
        """The lot decides."""
        return cached.record[..., 0]
