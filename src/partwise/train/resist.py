"""ResIST: every worker trains a shallower ResNet, made of some residual blocks of one long section and of everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partwise.checks import InputError, check_at_least
from partwise.linalg import partition
from partwise.models import BlockAxis, Part, coupled_axes, tensors_of, with_tensors
from partwise.train.method import SubnetMethod

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from partwise.models import Axis

__all__ = ["ResIST"]


@dataclass(frozen=True, kw_only=True)
class ResIST(SubnetMethod):
    """Deal the residual blocks of one section to the workers; a worker goes round the blocks that it does not hold.

    Blocks that change the shape of their input, and all other sections, are in every part and are averaged over all of them; a block is averaged over those
    that held it. The whole network runs more blocks than a part was trained with, so its branches are multiplied by what a part holds of them on average,
    ``max(1 / num_parts, min_blocks / blocks)``; training multiplies by nothing. Bytes on the wire per round, for S parts and b bytes a number:
    2 b (S P_shared + P_split + E p), with E copies of a block of p parameters beyond the first.

    Parameters
    ----------
    num_local_steps : int or tuple of int, default=50
        As in the paper.
    section : str, optional
        Name of the module whose blocks are dealt. Left out: the one with the most blocks, the first of equals. The paper splits the longest only, for
        splitting all cost it 16 points on CIFAR-10.
    min_blocks : int, default=0
        Blocks that every part holds at least; some blocks then sit in several parts. The paper raises it with the number of parts and does not say to what;
        its bytes fit 6 of 22 at 4 parts and 4 of 22 at 8.
    allow_post_activation : bool, default=False
        Take blocks with an activation behind the addition too. The paper splits blocks that add last, and gained half a point by it.

    References
    ----------
    ResIST: Layer-Wise Decomposition of ResNets for Distributed Training. arXiv:2107.00961.

    Examples
    --------
    >>> ResIST(num_parts=4, min_blocks=6).branch_scale(22)
    0.2727272727272727
    """

    num_local_steps: int | tuple[int, ...] = 50
    section: str | None = None
    min_blocks: int = 0
    allow_post_activation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self.min_blocks, 0, name="min_blocks")

    def find_axes(self, model: nn.Module) -> tuple[Axis, ...]:
        """The one section that is split."""
        axis = self._choose(model, [axis for axis in coupled_axes(model) if isinstance(axis, BlockAxis)])
        after = [block for block in axis.blocks if not _adds_last(model, block)]
        if after and not self.allow_post_activation:
            raise InputError(
                "post-activation",
                f"got {after[0]} with an activation behind its addition, expected blocks that add their branch last, as pre-activation ResNets have them. "
                "Use such a network, or pass allow_post_activation=True to split this one for a little accuracy.",
            )
        if self.min_blocks > axis.size:
            raise InputError(
                "minimum-above-size",
                f"got min_blocks={self.min_blocks}, but {axis.name} has {axis.size} blocks. Pass min_blocks={axis.size} or less.",
            )
        if not self.min_blocks and self.num_parts > axis.size:
            raise InputError(
                "too-many-parts",
                f"got {self.num_parts} parts, but {axis.name} has {axis.size} blocks, so some parts would hold none. Use {axis.size} parts or fewer, or "
                "pass min_blocks=1 to give blocks to several parts.",
            )
        return (axis,)

    def deal(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator]) -> list[Part]:
        """Blocks of each part; all of them are drawn from the first generator, so that they fit together."""
        [axis] = axes
        dealt = partition.deal(axis.size, len(generators), generators[0], minimum=self.min_blocks)
        return [Part({axis.name: tuple(blocks.tolist())}, index=index) for index, blocks in enumerate(dealt)]

    def branch_scale(self, num_blocks: int) -> float:
        """What the branches of the whole network are multiplied by: the share of ``num_blocks`` blocks that a part holds on average."""
        return max(1 / self.num_parts, self.min_blocks / num_blocks)

    def deployed(self, model: nn.Module, axes: Sequence[Axis]) -> nn.Module:
        """A copy whose split branches are multiplied by ``branch_scale``, folded into their last layers."""
        [axis] = axes
        return _scale_branches(model, axis, self.branch_scale(axis.size)) if isinstance(axis, BlockAxis) else model

    def _choose(self, model: nn.Module, sections: Sequence[BlockAxis]) -> BlockAxis:
        if not sections:
            raise InputError(
                "no-axes",
                f"got a {type(model).__name__} without a section of two or more residual blocks that keep the shape of their input, expected a ResNet. "
                "Use a deeper one, or IST for other networks.",
            )
        if self.section is None:
            return max(sections, key=lambda axis: axis.size)
        for axis in sections:
            if axis.name == self.section:
                return axis
        known = ", ".join(f"{axis.name} ({axis.size} blocks)" for axis in sections)
        raise InputError(
            "unknown-section",
            f"got section={self.section!r}, expected one with two or more residual blocks that keep the shape of their input: {known}. Name one of them.",
        )


def _adds_last(model: nn.Module, block: str) -> bool:
    """Whether the output of a residual block is the sum itself. A block is known to end in a sum and at most activations behind it."""
    from partwise.models.chains import trace

    [output] = [node for node in trace(model.get_submodule(block)).nodes if node.op == "output"]
    last = output.args[0]
    return str(getattr(last.target, "__name__", last.target)) in {"add", "add_", "iadd"}  # type: ignore[union-attr]


def _scale_branches(model: nn.Module, axis: BlockAxis, scale: float) -> nn.Module:
    closers = {name for closers in axis.closers for name in closers}
    return with_tensors(
        model, {name: tensor.detach() * scale if name in closers else tensor.detach().clone() for name, tensor in tensors_of(model).items()}
    )
