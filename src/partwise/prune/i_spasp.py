"""i-SpaSP: the units of a layer are recovered from its output as a sparse signal is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from partwise.checks import check_at_least, check_choice
from partwise.linalg.sparse_recovery import recover_units
from partwise.linalg.unit_products import pull_sizes, unit_products
from partwise.prune._reading import readings_of
from partwise.prune.unit_method import Choice, UnitMethod

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.prune._reading import Reading
    from partwise.prune.unit_method import Visit

__all__ = ["ISpaSP"]


@dataclass(frozen=True, kw_only=True)
class ISpaSP(UnitMethod):
    """Units found in turns: which ones would lower what is missing from a layer's output most, and which of those are large.

    The output of the layer that reads the units is to be explained by ``s`` of them. Each iteration takes the ``2 s`` units with the largest gradient of the
    squared error of what is missing, joins them with those of the iteration before, and of all these keeps the ``s`` that are largest in the whole layer, by
    the sum of their absolute values over all inputs (for ReLU the plain sum; units behind a gate have both signs). No pass of training, and unlabelled inputs.

    The reading layer is linear in its units, so all iterations are done on sums that are gathered in one pass over the data. A batch normalisation behind
    the reading layer belongs to it.

    With half of the units or more to keep, every unit is a candidate, and what stays are the largest: then the reading layer makes no difference.

    Parameters
    ----------
    num_iterations : int
        At most (T in the paper); it ends earlier when an iteration changes nothing.
    importance : {"signed", "size"}
        What is summed over inputs. signed: the gradient itself, as in the published code; both signs cancel. size: its square, which does not cancel, and
        costs second moments of the inputs and as many multiplications as the cube of the width in each iteration. For a convolution, over the patches read.

    References
    ----------
    i-SpaSP: Structured Neural Pruning via Sparse Signal Recovery. arXiv:2112.04905.
    """

    DEFAULT_KINDS: ClassVar[tuple[str, ...]] = ("neurons", "filters")

    num_iterations: int = 20
    importance: Literal["signed", "size"] = "signed"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self.num_iterations, 1, name="num_iterations")
        check_choice(self.importance, ("signed", "size"), name="importance")

    def score(self, visit: Visit) -> Tensor:
        """How large each unit is: the sum of its absolute values over all inputs."""
        sizes, _ = self._gather(visit, with_sums=False)
        return sizes

    def choose(self, visit: Visit, *, keep: int, protect: Tensor | None) -> Choice:
        """The iteration, from sums over one pass."""
        sizes, importance = self._gather(visit, with_sums=2 * keep < visit.axis.size)
        found = recover_units(importance, sizes, keep=keep, num_iterations=self.num_iterations, protect=protect)
        return Choice(found.units, sizes)

    def _gather(self, visit: Visit, *, with_sums: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Sizes of the units, and what tells their importance when only some are left; with all of them as candidates nobody asks how important."""
        import torch

        readings = readings_of(visit)
        sizes = torch.zeros(visit.axis.size, dtype=torch.float64)
        sums: dict[str, Tensor] = {}

        def add(reader: str, values: Tensor) -> None:
            nonlocal sizes
            reading = readings[reader]
            sizes = sizes + reading.sizes(values).view(visit.axis.size, -1).sum(1).cpu()
            if with_sums:
                here = reading.tally(values) if self.importance == "signed" else reading.moments(values)
                sums[reader] = sums[reader].add_(here) if reader in sums else here

        visit.show_reader_inputs(add)
        if not with_sums:
            return sizes, torch.zeros_like
        pairs = [(readings[reader], values) for reader, values in sums.items()]
        return sizes, _signed(pairs, visit.axis.size) if self.importance == "signed" else _unsigned(pairs)


def _signed(pairs: list[tuple[Reading, Tensor]], size: int) -> Callable[[Tensor], Tensor]:
    """Importance is a sum over the units that are left: (units, units) once, then a product."""
    import torch

    pulls = torch.stack([unit_products(reading.weight, tally, size=size).cpu() for reading, tally in pairs]).sum(0)  # (units, units)
    return lambda left: pulls @ left


def _unsigned(pairs: list[tuple[Reading, Tensor]]) -> Callable[[Tensor], Tensor]:
    """Squares of the gradient, summed over inputs, with the root over all of it."""
    import torch

    def importance(left: Tensor) -> Tensor:
        return torch.stack([pull_sizes(reading.weight, moments, left.to(reading.weight.device)).cpu() for reading, moments in pairs]).sum(0).sqrt()

    return importance
