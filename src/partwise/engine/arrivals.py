"""What an engine does with results as they arrive: it refuses what cannot be right, and counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from partwise.checks import PartwiseError

__all__ = ["Traffic", "TrafficRow", "flaw_of"]


@dataclass(frozen=True)
class TrafficRow:
    """What one worker was sent and sent back in one round.

    Parameters
    ----------
    round_number : int
        Number of the exchange since the engine was opened, from 1: a call with all parts of a round, or one part of an asynchronous run.
    worker : int
        Number of the worker, from 0.
    bytes_down, bytes_up : int
        Size of the pickled parts sent to it, and of the pickled results that came from it.
    """

    round_number: int
    worker: int
    bytes_down: int
    bytes_up: int


@dataclass
class Traffic:
    """What an engine moved, and what went wrong on the way.

    Parameters
    ----------
    rows : list of TrafficRow
        One for each message to a worker, in the order in which they were sent; 0 in ``bytes_up`` until the answer is there. An engine that shares the
        memory of the caller moves nothing and has no rows.
    placed_bytes : int
        Size of the methods, data included, that were put where all workers read them; once for each method, not for each round.
    num_lost : int
        Workers that died and were replaced.
    num_reissued : int
        Parts that were sent again, for whatever reason.
    num_late : int
        Results that came after their time was up, or after their round was over.
    num_duplicate : int
        Results that were dropped because their part had an answer already.
    num_refused : int
        Results that were refused: NaN or infinite numbers, the wrong part, the wrong shape.
    """

    rows: list[TrafficRow] = field(default_factory=list)
    placed_bytes: int = 0
    num_lost: int = 0
    num_reissued: int = 0
    num_late: int = 0
    num_duplicate: int = 0
    num_refused: int = 0

    @property
    def bytes_down(self) -> int:
        """Bytes of all parts sent."""
        return sum(row.bytes_down for row in self.rows)

    @property
    def bytes_up(self) -> int:
        """Bytes of all results received."""
        return sum(row.bytes_up for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Totals, counts and rows as one JSON object."""
        return {"bytes_down": self.bytes_down, "bytes_up": self.bytes_up, **dataclasses.asdict(self)}


def flaw_of(method: Any, part: Any, result: Any) -> str | None:
    """What is wrong with a result, in words that follow "returned", or None."""
    if hasattr(part, "index") and getattr(result, "index", None) != part.index:
        return f"a result for part {getattr(result, 'index', None)}"
    for name, num_bad, size in _bad_numbers(result, ""):
        return f"{num_bad} NaN or infinite numbers out of {size} in {name or 'its result'}"
    if hasattr(method, "check"):
        try:
            method.check(part, result)
        except PartwiseError as error:
            return f"a result that does not fit: {error}"
    return None


def _bad_numbers(value: Any, name: str) -> Iterator[tuple[str, int, int]]:
    """Name, number of bad entries and size of every array or number in ``value`` that has bad entries."""
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from _bad_numbers(getattr(value, item.name), f"{name}.{item.name}" if name else item.name)
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            yield from _bad_numbers(entry, f"{name}[{i}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield name, 1, 1
    elif getattr(getattr(value, "dtype", None), "kind", "") in {"f", "c"}:
        import numpy as np  # late: importing an engine stays light

        num_bad = int(value.size - np.isfinite(value).sum())
        if num_bad:
            yield name, num_bad, value.size
