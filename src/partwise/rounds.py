"""SHAPE 1: split -> work -> merge, round after round.

A method is an immutable value with three functions; what changes is the state that travels through them. ``split`` cuts the state into parts,
one per worker; ``work`` runs anywhere and sees nothing but its part; ``merge`` puts back whatever has arrived. Because ``merge`` accepts any
subset of the results, synchronous and asynchronous engines share all of this code, and a lost worker costs one result and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from partwise.checks import InputError, check_at_least
from partwise.engine import AsyncEngine, Engine
from partwise.engine.inline import InlineWorkers, inline
from partwise.engine.schedule import Event, Schedule

__all__ = ["RoundMethod", "Schedule", "part_seed", "run_async", "run_rounds"]

State = TypeVar("State")
Part = TypeVar("Part")
Result = TypeVar("Result")


class RoundMethod(Protocol[State, Part, Result]):
    """Three functions that make a method run in rounds on any engine.

    A method is a frozen dataclass: its fields are its settings, its repr rebuilds it. Parts and results carry ``index``, the number of their part.
    What else a method may offer is said at ``partwise.engine.Worker``.
    """

    def split(self, state: State) -> Sequence[Part]:
        """One part per worker. A part pickles and holds all that its worker needs."""
        ...

    def work(self, part: Part) -> Result:
        """Result of one part; a pure function, so a part may be sent again."""
        ...

    def merge(self, state: State, results: Sequence[Result]) -> State:
        """New state from the old one and the results that arrived: any subset, in any order, some twice. ``state`` itself is not changed."""
        ...


def run_rounds(
    method: RoundMethod[State, Part, Result],
    state: State,
    *,
    num_rounds: int,
    engine: Engine = inline,
    progress: Callable[[int, State], None] | None = None,
    stop: Callable[[State, State], bool] | None = None,
) -> State:
    """Split, work and merge up to ``num_rounds`` times and return the last state.

    Parameters
    ----------
    method : RoundMethod
        What the rounds do.
    state : Any
        Where to start; it is not changed.
    num_rounds : int
        Rounds to run, at least 1.
    engine : Engine, default=inline
        Where the parts run. Called once per round as ``engine(method, parts)``.
    progress : callable, optional
        Called after each round as ``progress(round_number, state)``; the first round has number 1.
    stop : callable, optional
        Called after each round as ``stop(state_before, state_after)``; True ends the run.

    Raises
    ------
    InputError
        When ``num_rounds`` is not an integer of at least 1.
    """
    check_at_least(num_rounds, 1, name="num_rounds")
    for round_number in range(1, num_rounds + 1):
        before, state = state, method.merge(state, engine(method, method.split(state)))
        if progress is not None:
            progress(round_number, state)
        if stop is not None and stop(before, state):
            break
    return state


def part_seed(seed: int, *, round_number: int, part: int) -> int:
    """Seed of the random generator of one part in one round, for ``numpy.random.default_rng`` or ``torch.Generator.manual_seed``.

    It depends on the three numbers only, so neither the order of the workers nor their place can change what a part draws.

    Parameters
    ----------
    seed : int
        Seed of the run, not negative.
    round_number : int
        0 for what is drawn before the first round, then 1, 2, ...
    part : int
        Index of the part.

    Examples
    --------
    >>> part_seed(0, round_number=1, part=2) == part_seed(0, round_number=2, part=1)
    False
    """
    import numpy as np  # late: importing this module stays light

    return int(np.random.SeedSequence((seed, round_number, part)).generate_state(1, np.uint64)[0])


def run_async(
    method: RoundMethod[State, Any, Any],
    state: State,
    *,
    engine: AsyncEngine | None = None,
    num_updates: int | None = None,
    max_staleness: int | None = None,
    schedule: Schedule | None = None,
    progress: Callable[[int, State], None] | None = None,
    stop: Callable[[State, State], bool] | None = None,
) -> tuple[State, Schedule]:
    """Rounds without a barrier: every result is merged alone when it comes, and its part is sent off again with what is known by then.

    Parts must carry their ``index``, as their results do. A part is sent when it has no result under way, its worker is free and ``max_staleness``
    allows it; the one that has waited longest comes first.

    Parameters
    ----------
    method : RoundMethod
        What the rounds do.
    state : Any
        Where to start; it is not changed.
    engine : AsyncEngine, optional
        Where the parts run; by default here, in an order of arrival that the seed of ``InlineWorkers`` decides.
    num_updates : int, optional
        Results to merge at most; needed without a ``schedule``.
    max_staleness : int, optional
        Bounds how far parts drift apart, at least 1; by default they are free. With s, no result is merged that read something of a part in front of
        it which has since been updated more than s times, and no part makes more than s updates in a row on the same news of a part in front of it
        that still works.
    schedule : Schedule, optional
        Replay this run instead, here, whatever it was spread over.
    progress : callable, optional
        Called after each merge as ``progress(update_number, state)``; the first has number 1.
    stop : callable, optional
        Called after each merge as ``stop(state_before, state_after)``; True ends the run.

    Returns
    -------
    state : Any
        The last state. When all parts have nothing left to do the run ends early.
    schedule : Schedule
        What happened.

    Raises
    ------
    InputError
        ``below-minimum``, ``schedule-mismatch`` when ``schedule`` sends a part that the method does not have then, or ``schedule-and-engine``.
    """
    if schedule is not None and (engine is not None or max_staleness is not None):
        raise InputError("schedule-and-engine", "got a schedule with engine or max_staleness, expected it alone: a replay runs here. Leave them out.")
    if schedule is None or num_updates is not None:
        check_at_least(num_updates, 1, name="num_updates")
    if max_staleness is not None:
        check_at_least(max_staleness, 1, name="max_staleness")
    run = _AsyncRun(engine or InlineWorkers(), method, state, max_staleness)
    run.engine.abandon()
    try:
        arrivals = run.lived(num_updates or 0) if schedule is None else run.replayed(schedule)
        for update_number, result in enumerate(arrivals, 1):
            before, run.state = run.state, method.merge(run.state, [result])
            if progress is not None:
                progress(update_number, run.state)
            if update_number == num_updates or (stop is not None and stop(before, run.state)):
                break
    finally:
        run.engine.abandon()
    return run.state, Schedule(tuple(run.events))


@dataclass
class _AsyncRun:
    """The book-keeping of one asynchronous run: who is under way, what they have read, and who may go next."""

    engine: AsyncEngine
    method: RoundMethod[Any, Any, Any]
    state: Any
    max_staleness: int | None
    events: list[Event] = field(default_factory=list)
    arrived: Counter[int] = field(default_factory=Counter)  # updates of each part
    read: dict[int, Counter[int]] = field(default_factory=dict)  # of parts under way: the updates of the others when they were sent
    last_sent: dict[int, int] = field(default_factory=dict)
    on_same_news: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # (k, j): an update of j, and how often k has used it

    def lived(self, num_updates: int) -> Iterator[Any]:
        """Results as they come. Between two of them the caller merges."""
        for num_merged in range(num_updates):
            self._send_what_may(room=num_updates - num_merged - len(self.read))
            if not self.read:
                return  # nobody has anything left to do
            result = self.engine.collect()
            self._note_arrival(result.index)
            yield result

    def _send_what_may(self, *, room: int) -> None:
        parts = self._parts()
        for k in sorted(parts, key=lambda k: (self.last_sent.get(k, -1), k)):
            if room and k not in self.read and self.engine.is_free(k) and self._is_fresh(k, parts):
                self.engine.submit(self.method, parts[k])
                for j in (j for j in parts if j < k):
                    version, count = self.on_same_news.get((k, j), (-1, 0))
                    self.on_same_news[k, j] = (self.arrived[j], count + 1 if version == self.arrived[j] else 1)
                self.events.append(("send", k))
                self.read[k], self.last_sent[k] = self.arrived.copy(), len(self.events)
                room -= 1

    def _is_fresh(self, k: int, parts: Iterable[int]) -> bool:
        """Whether part k may be sent: nobody's reading of it grows too old by that, and it has news of those in front."""
        if self.max_staleness is None:
            return True
        if any(self.arrived[k] + 1 - seen[k] > self.max_staleness for other, seen in self.read.items() if other > k):
            return False
        used = ((*self.on_same_news.get((k, j), (-1, 0)), self.arrived[j]) for j in parts if j < k)
        return not any(version == now and count >= self.max_staleness for version, count, now in used)

    def _parts(self) -> dict[int, Any]:
        return {part.index: part for part in self.method.split(self.state)}

    def _note_arrival(self, k: int) -> None:
        self.events.append(("arrive", k))
        self.read.pop(k, None)
        self.arrived[k] += 1

    def replayed(self, schedule: Schedule) -> Iterator[Any]:
        """Results in the order of another run."""
        worker, under_way = InlineWorkers(), set[int]()
        parts: dict[int, Any] | None = None
        for number, (kind, k) in enumerate(schedule.events):
            parts = self._parts() if parts is None else parts
            if k not in (parts if kind == "send" else under_way):
                raise InputError(
                    "schedule-mismatch",
                    f"event {number} of the schedule is ({kind!r}, {k}), and there is no such part then, expected the schedule of the same run. "
                    "Replay it with the settings, the data and the seed that it was recorded with.",
                )
            if kind == "send":
                worker.submit(self.method, parts[k])
                under_way.add(k)
                self.events.append((kind, k))
            else:
                result, parts = worker.collect(k), None
                under_way.discard(k)
                self._note_arrival(k)
                yield result
