"""How far one ranking is from another. Plain integers, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from partwise.checks import InputError

__all__ = ["filter_distance"]


def filter_distance(reference: Sequence[int], ranking: Sequence[int]) -> float:
    """Sum over ranks of ``(1/i) |ln i - ln sigma(i)|``: 0 for the same order, and what changes at the top counts most.

    ``sigma(i)`` is the rank in ``ranking`` of the filter with rank i in ``reference``; ranks begin with 1. It follows Spearman's footrule with ranks
    weighted by ``1/i``. It is not symmetric and no metric, so take the later ranking as the reference when you follow training. The mean over random
    orders of 64 filters is 8.33.

    Parameters
    ----------
    reference : sequence of int
        Filters, best first, each once.
    ranking : sequence of int
        The same filters in another order.

    Returns
    -------
    float
        At least 0.

    Raises
    ------
    InputError
        ``empty-ranking``, ``ranking-repeats`` when a filter is ranked twice, or ``rankings-differ`` when the two rank different filters.

    References
    ----------
    LoFT: Finding Lottery Tickets through Filter-wise Training. arXiv:2210.16169.

    Examples
    --------
    >>> filter_distance([5, 3, 8], [5, 3, 8])
    0.0
    >>> filter_distance([5, 3, 8], [3, 5, 8])  # 1.5 ln 2
    1.0397207708399179
    """
    first, second = _checked(reference, name="reference"), _checked(ranking, name="ranking")
    if first.keys() != second.keys():
        missing = min(first.keys() ^ second.keys())
        where, other = ("reference", "ranking") if missing in first else ("ranking", "reference")
        raise InputError(
            "rankings-differ",
            f"got rankings of {len(first)} and {len(second)} filters; {missing} is in {where} and not in {other}, expected the same filters in both. "
            "Rank the filters of one layer of one network.",
        )
    return math.fsum(abs(math.log(rank) - math.log(second[unit])) / rank for unit, rank in first.items())


def _checked(ranking: Sequence[int], *, name: str) -> dict[int, int]:
    """Filter -> rank, the best is 1."""
    values: Any = ranking
    units = values.tolist() if hasattr(values, "tolist") else list(values)  # entries of a tensor are equal to nothing but themselves
    if not units:
        raise InputError("empty-ranking", f"got a {name} of no filters, expected at least one. Pass the filters of a layer, best first.")
    ranks: dict[int, int] = {}
    for rank, unit in enumerate(units, start=1):
        if unit in ranks:
            raise InputError(
                "ranking-repeats",
                f"got filter {unit} at ranks {ranks[unit]} and {rank} of {name}, expected every filter once. Pass indices of filters, not their scores.",
            )
        ranks[unit] = rank
    return ranks
