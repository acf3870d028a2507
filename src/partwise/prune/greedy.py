"""Greedy forward selection: a layer is built anew by adding the unit that helps most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from partwise.checks import check_at_least, check_choice
from partwise.linalg.greedy_selection import AMOUNTS, Amounts, greedy_subset
from partwise.linalg.unit_products import unit_products
from partwise.prune._reading import readings_of
from partwise.prune.unit_method import Choice, UnitMethod

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.prune.unit_method import Visit

__all__ = ["GreedyForwardSelection"]


@dataclass(frozen=True, kw_only=True)
class GreedyForwardSelection(UnitMethod):
    """Build every layer anew: begin with nothing, add the unit with which its output comes closest to what it was, and go on.

    A unit may be added again, and then there is more of it: the layers that read it multiply it by how much. The target is what the reading layer of the dense
    model gives on the inputs that arrive, which are those that the pruned layers before it pass on. Labels are not needed.

    The reading layer is linear in its units, so only inner products of what the units add are needed: one pass over the data, then each step takes as many
    operations as there are units. A batch normalisation behind the reading layer belongs to it.

    Parameters
    ----------
    amounts : {"fitted", "equal"}
        How much of a unit a step adds. equal: as much as any other, so that the layer is the mean of what was added, as in the paper and its theory; what is
        kept is then multiplied by its count times the width over the number of steps. fitted: as much as brings the output closest to the target.
    allow_repeats : bool
        False: every unit has one step. Equal amounts then multiply all that is kept by the same number.
    steps_per_unit : int
        Steps at most, for each unit of the whole layer. When as many units as stay are there, the steps left sharpen their weights.

    References
    ----------
    How much pre-training is enough to discover a good subnetwork? arXiv:2108.00259. The selection, there with the loss of the labels: Good Subnetworks
    Provably Exist: Pruning via Greedy Forward Selection. arXiv:2003.01794.
    """

    DEFAULT_KINDS: ClassVar[tuple[str, ...]] = ("neurons", "filters")

    amounts: Amounts = "fitted"
    allow_repeats: bool = True
    steps_per_unit: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.amounts, AMOUNTS, name="amounts")
        check_at_least(self.steps_per_unit, 1, name="steps_per_unit")

    def score(self, visit: Visit) -> Tensor:
        """Squared size of what each unit adds to the output, summed over all inputs: what is missing without it alone."""
        return self._gram(visit).diagonal().clone()

    def choose(self, visit: Visit, *, keep: int, protect: Tensor | None) -> Choice:
        """Units by selection, with factors; scores as `score` gives them."""
        gram, size = self._gram(visit), visit.axis.size
        scores = gram.diagonal().clone()
        if keep == size:
            return Choice(tuple(range(size)), scores)  # the layer itself: once each
        # Contributions of a mean are ``size`` times what units add to the sum.
        subset = greedy_subset(
            gram * size**2,
            gram.sum(1) * size,
            float(gram.sum()),
            num_units=keep,
            max_steps=self.steps_per_unit * size,
            amounts=self.amounts,
            allow_repeats=self.allow_repeats,
            must=protect,
        )
        silent = not bool(subset.weights.any())  # nothing arrives, or nothing that points the right way: no reason to switch the layer off
        return Choice(subset.units, scores, None if silent else subset.weights * size)

    def _gram(self, visit: Visit) -> Tensor:
        """Inner products, over all inputs, of what units add to the outputs of the layers that read them: (units, units)."""
        import torch

        readings = readings_of(visit)
        moments: dict[str, Tensor] = {}

        def add(reader: str, values: Tensor) -> None:
            here = readings[reader].moments(values)
            moments[reader] = moments[reader].add_(here) if reader in moments else here

        visit.show_reader_inputs(add)
        return torch.stack([unit_products(readings[reader].weight, sums, size=visit.axis.size).cpu() for reader, sums in moments.items()]).sum(0)
