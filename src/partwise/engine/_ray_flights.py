"""What is under way between this process and its workers, and how long to wait for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal

__all__ = ["Flight", "Patience", "Placed", "Seat", "Task"]

FIRST_S = 600.0  # for an answer while nobody knows how long one takes
LEAST_S = 60.0  # a machine may be busy with other things for so long
FACTOR = 10.0  # how much longer than the slowest answer so far one may take


@dataclass(eq=False)
class Task:
    """One part that waits for its answer. A result whose task is not open any more is recognised by that."""

    method: Any
    part: Any
    seat: Seat
    num_sent: int = 0
    state: Literal["open", "answered", "abandoned"] = "open"
    result: Any = None


@dataclass(eq=False)
class Seat:
    """The place of one worker. Who sits on it changes when a worker is replaced."""

    number: int
    handle: Any = None
    method: Any = None  # what the worker holds
    where: str = "not started"

    def __str__(self) -> str:
        return f"worker {self.number} ({self.where})"

    def vacate(self) -> None:
        """Nobody sits here any more."""
        self.handle, self.method, self.where = None, None, "not started"


@dataclass(eq=False)
class Flight:
    """One message under way: parts to a worker, results back."""

    seat: Seat
    handle: Any
    where: str
    tasks: list[Task]
    row: int
    num_sent: int = 1  # how often its parts were sent
    sent_at: float = field(default_factory=monotonic)
    is_late: bool = False


@dataclass(eq=False)
class Placed:
    """The method that lies in the object store."""

    method: Any = None
    reference: Any = None


@dataclass(eq=False)
class Patience:
    """How long an answer may take.

    Parameters
    ----------
    timeout : float or None
        Seconds. None: ten times what the slowest answer took and at least a minute, twice as long each time that the same parts are sent again.
    """

    timeout: float | None
    slowest: float | None = None

    def learn(self, flight: Flight) -> None:
        """Count an answer that somebody waited for."""
        self.slowest = max(self.slowest or 0.0, monotonic() - flight.sent_at)

    def forget(self) -> None:
        """Nothing is known any more."""
        self.slowest = None

    def seconds(self, flight: Flight) -> float:
        """From when a message was sent to when its parts are sent again."""
        if self.timeout is not None:
            return self.timeout
        first: float = FIRST_S if self.slowest is None else max(LEAST_S, FACTOR * self.slowest)
        return first * 2.0 ** (flight.num_sent - 1)

    def deadline(self, flight: Flight) -> float:
        """When the time of a message is up."""
        return flight.sent_at + self.seconds(flight)
