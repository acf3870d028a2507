"""LoFT: every worker trains some filters of every residual block; at the end the largest filters make a lottery ticket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from partwise.checks import InputError, check_at_least, check_choice
from partwise.linalg.rankings import filter_distance
from partwise.models import CoupledAxis, DisjointSampler, Part, coupled_axes, tensors_of
from partwise.train.method import SubnetMethod

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from partwise.models import Axis
    from partwise.train.round_report import RoundReport
    from partwise.train.trainer import SubnetTrainer

__all__ = ["LoFT", "TicketMonitor"]

SCORES = ("l2", "bn_scaled")


@dataclass(frozen=True, kw_only=True)
class LoFT(SubnetMethod):
    """Deal the inner filters of residual blocks to the workers; the ticket keeps the filters with the largest norms.

    Split are the output filters of the first convolution of every block that keeps the size of its images, from the second section on. The stem, the first
    section, blocks with a stride and everything that is no inner width stay whole in every part and are averaged. Bytes on the wire per round, for S parts
    and b bytes a number: 2 b (S P_shared + P_split).

    As released, nothing makes up for the filters that a part or a ticket lacks: the norms along the residual stream take most of the scale away, and
    multiplying what is left, as IST does, trained worse here. Unlike the released code, whose pruning sorts upwards and so keeps the smallest filters,
    tickets keep the largest, as the paper says. Not taken over: dealing in the order of the norms.

    Parameters
    ----------
    num_local_steps : int or tuple of int, default=15
        As in the released script for ImageNet.
    score : {"l2", "bn_scaled"}, default="l2"
        What tickets rank filters by: their squared norm, or that times the squared weight of the batch normalisation behind them, so that a filter which is
        turned down there counts less (ours).
    include_first_section : bool, default=False
        Split the first section too; it is narrow, so that little is saved.
    include_strided : bool, default=False
        Split blocks with a stride too.

    References
    ----------
    LoFT: Finding Lottery Tickets through Filter-wise Training. arXiv:2210.16169.
    """

    num_local_steps: int | tuple[int, ...] = 15
    score: Literal["l2", "bn_scaled"] = "l2"
    include_first_section: bool = False
    include_strided: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.score, SCORES, name="score")

    def find_axes(self, model: nn.Module) -> tuple[Axis, ...]:
        """The inner width of every block that is split."""
        import numpy as np

        filters = [axis for axis in coupled_axes(model) if isinstance(axis, CoupledAxis) and axis.kind == "filters"]
        axes = tuple(self._inner_widths(model, filters))
        if not axes:
            raise InputError(
                "no-axes",
                f"got a {type(model).__name__} without a block to split, expected residual blocks of two convolutions in two or more sections, some without a "
                "stride. Use a ResNet, or pass include_first_section=True or include_strided=True to split more of its blocks.",
            )
        if self.score == "bn_scaled" and (bare := [axis.name for axis in axes if _norm_weight(axis) is None]):
            raise InputError(
                "no-norm",
                f"got score='bn_scaled', but no batch normalisation with weights follows {bare[0]}, expected one. Pass score='l2', or add it.",
            )
        # Dealt once in vain, so that layers which are too narrow are refused here and not in the first round.
        self.deal(axes, [np.random.default_rng(index) for index in range(self.num_parts)])
        return axes

    def deal(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator]) -> list[Part]:
        """Every filter in exactly one part, every block shuffled by itself."""
        return DisjointSampler()(axes, generators)

    def ranking(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """For each block that is split, its filters from the largest score to the smallest; of equals the first."""
        return self.ranking_of(tensors_of(model), self.find_axes(model))

    def ranking_of(self, tensors: Mapping[str, Tensor], axes: Sequence[Axis]) -> dict[str, tuple[int, ...]]:
        """`ranking` from the tensors of a model and its axes."""
        scores = {axis.name: self._scores(tensors, axis) for axis in axes if isinstance(axis, CoupledAxis)}
        return {name: tuple(score.argsort(descending=True, stable=True).tolist()) for name, score in scores.items()}

    def ticket_part(self, model: nn.Module, axes: Sequence[Axis], keep: float, generator: np.random.Generator) -> Part:
        """The filters with the largest scores of every block: the fraction ``keep``, rounded, halves up, but one at least. Nothing is drawn."""
        if not 0 < keep <= 1:
            raise InputError("keep-range", f"got keep={keep}, expected a fraction above 0 and at most 1. Pass 0.5 to keep half.")
        ranking = self.ranking_of(tensors_of(model), axes)
        return Part({name: tuple(sorted(order[: max(1, int(keep * len(order) + 0.5))])) for name, order in ranking.items()})

    def _inner_widths(self, model: nn.Module, filters: Sequence[CoupledAxis]) -> list[CoupledAxis]:
        """First filters of each block, without the first section and blocks with a stride."""
        first_of_block: dict[str, CoupledAxis] = {}
        for axis in filters:
            if (block := _block_of(model, axis)) is not None:
                first_of_block.setdefault(block, axis)
        sections = list(dict.fromkeys(block.rpartition(".")[0] for block in first_of_block))
        return [
            axis
            for block, axis in first_of_block.items()
            if (self.include_first_section or block.rpartition(".")[0] != sections[0]) and (self.include_strided or not _has_stride(model, block))
        ]

    def _scores(self, tensors: Mapping[str, Tensor], axis: CoupledAxis) -> Tensor:
        scores = tensors[f"{axis.name}.weight"].detach().double().flatten(1).square().sum(dim=1)  # (filters,)
        norm = _norm_weight(axis)
        return scores if self.score == "l2" or norm is None else scores * tensors[norm].detach().double().square()


@dataclass
class TicketMonitor:
    """Notes how filters rank during training, to see when the ticket stops changing. Pass it to ``fit`` as ``progress``.

    Parameters
    ----------
    method : LoFT
        What ranks the filters.
    every : int, default=1
        Rounds between two notes.

    Attributes
    ----------
    rankings : dict of int to dict of str to tuple of int
        Round -> block -> its filters, best first.

    References
    ----------
    LoFT: Finding Lottery Tickets through Filter-wise Training. arXiv:2210.16169.
    """

    method: LoFT
    every: int = 1
    rankings: dict[int, dict[str, tuple[int, ...]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        check_at_least(self.every, 1, name="every")

    def __call__(self, report: RoundReport, trainer: SubnetTrainer) -> None:
        """Note the ranking after a round."""
        assert trainer.state is not None  # a round is done
        if report.round_number % self.every == 0:
            self.rankings[report.round_number] = self.method.ranking_of(trainer.state.tensors, trainer.axes)

    def distances(self) -> dict[int, float]:
        """Round -> filter distance from the last ranking noted, the reference, to that of the round; the mean over blocks. 0 means: the same ticket."""
        if not self.rankings:
            return {}
        last = self.rankings[max(self.rankings)]
        return {number: sum(filter_distance(last[name], ranking[name]) for name in last) / len(last) for number, ranking in self.rankings.items()}


def _block_of(model: nn.Module, axis: CoupledAxis) -> str | None:
    """The innermost child of a section that holds the layer that makes the filters and all that read them."""
    from torch import nn

    layers = [axis.name, *(reader.removesuffix(".weight") for reader in axis.readers)]
    steps = axis.name.split(".")
    for length in range(len(steps) - 1, 0, -1):
        block, section = ".".join(steps[:length]), ".".join(steps[: length - 1])
        if isinstance(model.get_submodule(section), nn.Sequential | nn.ModuleList) and all(layer.startswith(f"{block}.") for layer in layers):
            return block
    return None


def _has_stride(model: nn.Module, block: str) -> bool:
    from torch import nn

    convolutions = [module for module in model.get_submodule(block).modules() if isinstance(module, nn.Conv2d)]
    return any(max(module.stride) > 1 for module in convolutions)


def _norm_weight(axis: CoupledAxis) -> str | None:
    """The tensor that multiplies each filter's output behind the convolution."""
    own = {f"{axis.name}.weight", *axis.readers}
    return next((member.tensor for member in axis.members if member.tensor.endswith(".weight") and member.tensor not in own), None)
