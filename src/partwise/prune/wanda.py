"""Wanda for whole units: weights times the size of their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from partwise.checks import check_choice
from partwise.linalg import unit_worth
from partwise.prune.unit_method import UnitMethod

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.prune.unit_method import Visit

__all__ = ["WandaStructured"]


@dataclass(frozen=True, kw_only=True)
class WandaStructured(UnitMethod):
    """Weights times the size of their inputs, summed over a unit.

    Wanda scores single weights by ``|W_ij| * ||X_j||``. Here the scores of all weights that read a unit are averaged over outputs and summed over its entries
    (Wanda-sp), so that neurons, filters and groups of heads can be compared, and go as a whole.

    Parameters
    ----------
    metric : {"wanda", "fluctuation"}
        wanda: as above. fluctuation: the variance of the input in place of its size, times the squared norm of the weights; FLAP's metric, which sees that a
        constant input could be moved into a bias.

    References
    ----------
    Wanda. arXiv:2306.11695. The structured form, and the other metric: FLAP. arXiv:2312.11983.
    """

    DEFAULT_KINDS: ClassVar[tuple[str, ...]] = ("neurons", "filters")

    metric: Literal["wanda", "fluctuation"] = "wanda"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.metric, ("wanda", "fluctuation"), name="metric")

    def score(self, visit: Visit) -> Tensor:
        """Sum over the entries of a unit and the layers that read it."""
        import torch

        sums: dict[str, list[Tensor]] = {}

        def count(reader: str, values: Tensor) -> None:
            rows = values.movedim(1, -1) if values.ndim == 4 else values  # images: (rows, height, width, channels)
            rows = rows.flatten(0, -2).double()  # (places, entries)
            here = [rows.new_tensor(len(rows)), rows.sum(0), rows.square().sum(0)]
            sums[reader] = [old + new for old, new in zip(sums[reader], here, strict=True)] if reader in sums else here

        visit.show_reader_inputs(count)
        scores = torch.zeros(visit.axis.size, dtype=torch.float64)
        for reader, (number, first, second) in sums.items():
            weight, mean, square = visit.reader_weight(reader).flatten(1), first / number, second / number  # weight: (entries, outputs * window)
            entries = unit_worth.wanda(weight, square) if self.metric == "wanda" else unit_worth.fluctuation(weight, mean, square)
            scores += entries.view(visit.axis.size, -1).sum(1).cpu()
        return scores
