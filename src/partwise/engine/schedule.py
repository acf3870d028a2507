"""What happened in an asynchronous run, so that it can be replayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from partwise.checks import InputError

__all__ = ["Event", "Schedule"]

Event = tuple[Literal["send", "arrive"], int]


@dataclass(frozen=True)
class Schedule:
    """What happened in an asynchronous run, in order. Replaying it gives the same bits, whatever the run was spread over.

    Parameters
    ----------
    events : tuple of (str, int)
        ``("send", k)``: part k was cut from the state of that moment and sent off. ``("arrive", k)``: its result was merged.

    Examples
    --------
    >>> schedule = Schedule((("send", 0), ("send", 1), ("arrive", 0), ("send", 0), ("arrive", 0), ("arrive", 1)))
    >>> schedule.ages  # when part 1 was merged, part 0 had been updated twice since part 1 looked
    (0, 0, 2)
    >>> Schedule.from_json(schedule.to_json()) == schedule
    True
    """

    events: tuple[Event, ...] = ()

    @property
    def num_updates(self) -> int:
        """Results that were merged."""
        return sum(kind == "arrive" for kind, _ in self.events)

    @property
    def ages(self) -> tuple[int, ...]:
        """For every merged result, how many updates old the oldest thing was that it had read of the parts in front of it."""
        arrived, read, ages = Counter[int](), dict[int, Counter[int]](), []
        for kind, k in self.events:
            if kind == "send":
                read[k] = arrived.copy()
            else:
                ages.append(max((arrived[j] - read[k][j] for j in arrived if j < k), default=0))
                arrived[k] += 1
        return tuple(ages)

    def to_json(self) -> list[list[str | int]]:
        """The events as JSON."""
        return [list(event) for event in self.events]

    @classmethod
    def from_json(cls, events: Iterable[Sequence[Any]]) -> Schedule:
        """The schedule that ``to_json`` came from.

        Raises
        ------
        InputError
            ``schedule-malformed`` naming the first event that is none, or that arrives without having been sent.
        """
        under_way: set[int] = set()
        read: list[Event] = []
        for number, event in enumerate(events):
            kind, k = event if len(event) == 2 else (None, None)
            if kind not in ("send", "arrive") or not isinstance(k, int) or k < 0 or (kind == "arrive" and k not in under_way):
                raise InputError(
                    "schedule-malformed",
                    f"event {number} of the schedule is {event}, expected ['send', part], or ['arrive', part] of a part that was sent. "
                    "Write schedules with Schedule.to_json.",
                )
            under_way = under_way | {k} if kind == "send" else under_way - {k}
            read.append((kind, k))
        return cls(tuple(read))
