"""Deal units into parts: disjoint, overlapping, with a minimum, at random.

All functions take the number of units, draw from the generator they are given, and return sorted arrays of unit indices. Nothing here knows what a
unit is (a neuron, a head group, a residual block).

References
----------
Distributed Learning of Deep Neural Networks using Independent Subnet Training. arXiv:1910.02120.
ResIST: Layer-Wise Decomposition of ResNets for Distributed Training. arXiv:2107.00961.
TwIST. arXiv:2511.03983.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["deal", "deal_shards", "deal_with_overlap", "draw", "flip", "nearest_divisors"]


def deal(size: int, num_parts: int, generator: np.random.Generator, *, minimum: int = 0) -> list[NDArray[np.int64]]:
    """Shuffle the units and deal them; every unit is in exactly one part, and sizes differ by at most one.

    With ``minimum`` above ``size // num_parts``, dealing goes on from fresh shuffles until every part has that many distinct units; some units then
    sit in several parts.

    Parameters
    ----------
    size : int
        Number of units.
    num_parts : int
        At most ``size``, so that no part is empty.
    generator : numpy.random.Generator
        The only source of randomness.
    minimum : int, default=0
        Units that every part has at least, at most ``size``.

    Examples
    --------
    >>> import numpy as np
    >>> [len(part) for part in deal(7, 3, np.random.default_rng(0))]
    [3, 2, 2]
    >>> [len(part) for part in deal(7, 3, np.random.default_rng(0), minimum=4)]
    [4, 4, 4]
    """
    import numpy as np

    order = generator.permutation(size)  # (size,)
    parts = [set(order[part::num_parts].tolist()) for part in range(num_parts)]
    while any(len(part) < minimum for part in parts):
        for unit in generator.permutation(size).tolist():
            short = [part for part in parts if len(part) < minimum and unit not in part]
            if short:
                min(short, key=len).add(unit)  # the part with the fewest; of equals the first
    return [np.array(sorted(part), dtype=np.int64) for part in parts]


def deal_shards(size: int, num_parts: int, generators: Sequence[np.random.Generator]) -> list[NDArray[np.int64]]:
    """Each part owns a fixed shard of consecutive units and deals it to all parts: no place needs to know all units.

    Every unit is in exactly one part. Every part gets the same number of units from each owner, or one more.

    Parameters
    ----------
    size : int
        Number of units.
    num_parts : int
        At most ``size``.
    generators : sequence of numpy.random.Generator
        One for each owner.
    """
    import numpy as np

    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(num_parts)]
    start = 0
    for shard, generator in zip(np.array_split(np.arange(size), num_parts), generators, strict=True):
        shuffled = generator.permutation(shard)
        for turn in range(num_parts):
            # The next owner goes on where this one stopped, so that odd units do not pile up in the first parts.
            parts[(start + turn) % num_parts].append(shuffled[turn::num_parts])
        start += len(shard)
    return [np.sort(np.concatenate(pieces)) for pieces in parts]


def deal_with_overlap(size: int, counts: Sequence[int], generator: np.random.Generator) -> list[NDArray[np.int64]]:
    """Deal one shuffle round and round: part ``k`` gets ``counts[k]`` distinct units, and no unit is held by more than one part above any other.

    When the counts add up to ``size`` the parts are disjoint and cover everything; when they add up to more, no unit idles.

    Parameters
    ----------
    size : int
        Number of units.
    counts : sequence of int
        From 1 to ``size`` each.
    generator : numpy.random.Generator
        The only source of randomness.
    """
    import numpy as np

    order = generator.permutation(size)  # (size,)
    ends = np.cumsum([0, *counts])  # (num_parts + 1,)
    return [np.sort(order[np.arange(begin, end) % size]) for begin, end in pairwise(ends.tolist())]


def draw(size: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """``count`` of ``size`` units without replacement, every choice equally likely."""
    import numpy as np

    return np.sort(generator.permutation(size)[:count])


def flip(size: int, keep: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Each unit with probability ``keep``, independently; drawn again while nothing is kept, so ``keep`` must be above 0."""
    import numpy as np

    kept: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    while not len(kept):
        kept = np.flatnonzero(generator.random(size) < keep)
    return kept


def nearest_divisors(size: int, wanted: int) -> tuple[int, ...]:
    """The divisors of ``size`` that are nearest to ``wanted``: one, or two at the same distance, the smaller first.

    Examples
    --------
    >>> nearest_divisors(8, 3), nearest_divisors(8, 7)
    ((2, 4), (8,))
    """
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    distance = min(abs(number - wanted) for number in divisors)
    return tuple(number for number in divisors if abs(number - wanted) == distance)
