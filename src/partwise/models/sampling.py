"""Deal the units of a model's axes into parts, one sampler per way of dealing.

A sampler is called with axes and with one numpy generator per part; the number of generators is the number of parts. Seed generator ``k`` with
``partwise.rounds.part_seed(seed, round_number=..., part=k)``: then the seed, sent instead of indices, gives the same parts everywhere. What is dealt
once for all parts is drawn from generator 0. Axes that are not passed stay whole in every part, which is how layers are pinned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from partwise.checks import InputError, check_at_least
from partwise.linalg import partition
from partwise.models.axes import Axis, Part

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BernoulliSampler", "DisjointSampler", "FixedFractionSampler", "StratifiedSampler"]


@dataclass(frozen=True, kw_only=True)
class DisjointSampler:
    """Every unit in exactly one part, dealt anew on each axis.

    Parameters
    ----------
    require_equal : bool, default=False
        Refuse sizes that the number of parts does not divide. Otherwise parts differ by at most one unit.
    minimum : int, default=1
        Units of each axis that every part holds at least. Where there are too few to go round, some units sit in several parts (minimum depth in
        ResIST).

    References
    ----------
    Independent Subnet Training. arXiv:1910.02120. ResIST. arXiv:2107.00961.
    """

    require_equal: bool = False
    minimum: int = 1

    def __post_init__(self) -> None:
        check_at_least(self.minimum, 1, name="minimum")

    def __call__(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator]) -> list[Part]:
        """One part per generator."""
        for axis in axes:
            if self.minimum > axis.size:
                raise InputError(
                    "minimum-above-size",
                    f"got minimum={self.minimum}, but {axis.name} has {axis.size} {axis.kind}. Pass minimum={axis.size} or less.",
                )
            if self.minimum == 1:
                _check_enough(axis, len(generators))
            if self.require_equal:
                _check_divides(axis, len(generators))
        return _parts(axes, [partition.deal(axis.size, len(generators), generators[0], minimum=self.minimum) for axis in axes], num_parts=len(generators))


@dataclass(frozen=True, kw_only=True)
class StratifiedSampler:
    """Every part owns a fixed shard of each axis and deals it to all parts: disjoint, and no place has to know the whole axis.

    References
    ----------
    The partitioned form of Independent Subnet Training. arXiv:1910.02120.
    """

    def __call__(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator]) -> list[Part]:
        """One part per generator; generator ``k`` deals the shards that part ``k`` owns."""
        for axis in axes:
            _check_enough(axis, len(generators))
        return _parts(axes, [partition.deal_shards(axis.size, len(generators), generators) for axis in axes], num_parts=len(generators))


@dataclass(frozen=True, kw_only=True)
class BernoulliSampler:
    """Each part keeps each unit with the same probability, independently. A draw that leaves an axis empty is drawn again.

    Parameters
    ----------
    keep : float, default=0.5
        Probability, above 0 and at most 1.

    References
    ----------
    On the Convergence of Shallow Neural Network Training with Randomly Masked Neurons. arXiv:2112.02668.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        _check_keep(self.keep)

    def __call__(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator]) -> list[Part]:
        """One part per generator, drawn from it alone."""
        for axis in axes:
            if self.keep * axis.size < 1:
                raise _empty_layer(axis, self.keep, lowest=1 / axis.size)
        return _parts(axes, [[partition.flip(axis.size, self.keep, generator) for generator in generators] for axis in axes], num_parts=len(generators))


@dataclass(frozen=True, kw_only=True)
class FixedFractionSampler:
    """Every part keeps the same fraction of each axis, in blocks of consecutive units where wanted.

    Parameters
    ----------
    keep : float or tuple of float, default=0.5
        Fraction of the blocks that a part keeps, above 0 and at most 1, rounded to whole blocks, halves up. A tuple has one for each part: workers of
        different size.
    block_size : mapping of str to int, default={}
        Kind of axis -> consecutive units that stay or go together. Kinds that are not named: 1.
    balanced : bool, default=True
        Deal one shuffle round and round, so that no unit has more than one holder above any other; drawn from generator 0. Otherwise each part draws
        for itself.

    References
    ----------
    TwIST. arXiv:2511.03983. The balanced deal is ours.
    """

    keep: float | tuple[float, ...] = 0.5
    block_size: Mapping[str, int] = field(default_factory=dict)
    balanced: bool = True

    def __post_init__(self) -> None:
        for keep in self.keep if isinstance(self.keep, tuple) else (self.keep,):
            _check_keep(keep)
        for kind, size in self.block_size.items():
            check_at_least(size, 1, name=f"block_size[{kind!r}]")

    def __call__(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator]) -> list[Part]:
        """One part per generator."""
        return _parts(axes, [self._dealt(axis, generators) for axis in axes], num_parts=len(generators))

    def _dealt(self, axis: Axis, generators: Sequence[np.random.Generator]) -> list[NDArray[np.int64]]:
        import numpy as np

        width = self.block_size.get(axis.kind, 1)
        if axis.size % width:
            nearest = " or ".join(str(number) for number in partition.nearest_divisors(axis.size, width))
            raise InputError(
                "block-does-not-divide",
                f"got block_size={width} for the {axis.size} {axis.kind} of {axis.name}, expected a number that divides {axis.size}. "
                f"The nearest is {nearest}.",
            )
        num_blocks = axis.size // width
        counts = [self._count(axis, keep, num_blocks) for keep in self._keep_of_parts(len(generators))]
        if self.balanced:
            dealt = partition.deal_with_overlap(num_blocks, counts, generators[0])
        else:
            dealt = [partition.draw(num_blocks, count, generator) for count, generator in zip(counts, generators, strict=True)]
        return [(blocks[:, None] * width + np.arange(width)).reshape(-1) for blocks in dealt]  # each (count * width,)

    def _keep_of_parts(self, num_parts: int) -> tuple[float, ...]:
        if not isinstance(self.keep, tuple):
            return (self.keep,) * num_parts
        if len(self.keep) != num_parts:
            raise InputError("keep-per-part", f"got {len(self.keep)} keep fractions for {num_parts} parts, expected one each. Pass {num_parts}, or one.")
        return self.keep

    @staticmethod
    def _count(axis: Axis, keep: float, num_blocks: int) -> int:
        count = int(keep * num_blocks + 0.5)
        if not count:
            raise _empty_layer(axis, keep, lowest=0.5 / num_blocks)
        return count


def _parts(axes: Sequence[Axis], dealt: Sequence[Sequence[NDArray[np.int64]]], *, num_parts: int) -> list[Part]:
    """``dealt[axis][part]`` turned round."""
    return [
        Part({axis.name: tuple(of_axis[index].tolist()) for axis, of_axis in zip(axes, dealt, strict=True)}, index=index) for index in range(num_parts)
    ]


def _check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise InputError("keep-range", f"got keep={keep}, expected a fraction above 0 and at most 1. Pass 0.5 to keep half.")


def _empty_layer(axis: Axis, keep: float, *, lowest: float) -> InputError:
    return InputError(
        "empty-layer", f"got keep={keep}, which leaves {axis.name} with none of its {axis.size} {axis.kind}. Pass keep={lowest:.3g} or more."
    )


def _check_enough(axis: Axis, num_parts: int) -> None:
    if num_parts > axis.size:
        raise InputError(
            "too-many-parts",
            f"got {num_parts} parts, but {axis.name} has {axis.size} {axis.kind}, so some parts would hold none. Use {axis.size} parts or fewer.",
        )


def _check_divides(axis: Axis, num_parts: int) -> None:
    if axis.size % num_parts:
        nearest = " or ".join(str(number) for number in partition.nearest_divisors(axis.size, num_parts))
        raise InputError(
            "parts-do-not-divide",
            f"got {num_parts} parts for the {axis.size} {axis.kind} of {axis.name}, expected a number that divides {axis.size}. "
            f"The nearest is {nearest}.",
        )
