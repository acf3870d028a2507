"""The reference engine: this process, parts in order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from partwise.checks import RunError
from partwise.engine import Worker
from partwise.engine.arrivals import Traffic, flaw_of

__all__ = ["InlineWorkers", "inline"]

Part = TypeVar("Part")
Result = TypeVar("Result")


@runtime_checkable
class _Batched(Protocol):
    def work_all(self, parts: Sequence[Any]) -> list[Any]: ...


def inline(method: Worker[Part, Result], parts: Sequence[Part]) -> list[Result]:
    """Run all parts here and return their results in the order of the parts.

    Parameters
    ----------
    method : Worker
        Anything with ``work(part)``. If it also has ``work_all(parts)``, that is called once instead, so that one machine never pays for
        pretending to be many. Both give the same bits.
    parts : sequence
        What ``method.split`` returned.
    """
    if not parts:
        return []
    if isinstance(method, _Batched):
        return method.work_all(parts)
    return [method.work(part) for part in parts]


class InlineWorkers:
    """The inline engine with all that the others have: it refuses broken results, and runs parts one at a time in an order that a seed decides.

    Parameters
    ----------
    num_workers : int, optional
        How many parts may be under way at once in an asynchronous run; by default all.
    seed : int, default=0
        Decides which of the parts under way arrives next in an asynchronous run. The same seed gives the same order.
    max_attempts : int, default=3
        How often a part is run before its broken results end the run.

    Attributes
    ----------
    traffic : Traffic
        Results that were refused. Nothing is sent, so there are no rows.
    """

    def __init__(self, num_workers: int | None = None, *, seed: int = 0, max_attempts: int = 3) -> None:
        self.num_workers = num_workers
        self.seed = seed
        self.max_attempts = max_attempts
        self.traffic = Traffic()
        self._order = random.Random(seed)
        self._waiting: dict[int, tuple[Any, Any]] = {}  # method and part, by index
        self._done: dict[int, Any] = {}

    def __repr__(self) -> str:
        return f"InlineWorkers({self.num_workers}, seed={self.seed})"

    def __call__(self, method: Worker[Part, Result], parts: Sequence[Part]) -> list[Result]:
        """Results of ``parts`` in their order.

        Raises
        ------
        RunError
            ``result-refused`` when a part gives broken results every time.
        """
        return [self._accept(method, part, result) for part, result in zip(parts, inline(method, parts), strict=True)]

    def _accept(self, method: Worker[Part, Result], part: Part, result: Result) -> Result:
        for attempt in range(1, self.max_attempts + 1):
            flaw = flaw_of(method, part, result)
            if flaw is None:
                return result
            self.traffic.num_refused += 1
            if attempt < self.max_attempts:
                self.traffic.num_reissued += 1
                result = method.work(part)
        raise RunError(
            "result-refused",
            f"the inline worker returned {flaw}, {self.max_attempts} times for part {getattr(part, 'index', '?')}, expected a sound result. "
            "Check the data, or lower the step size.",
        )

    def is_free(self, index: int) -> bool:
        """Whether the worker of part ``index`` has nothing to do."""
        under_way = {*self._waiting, *self._done}
        return index not in under_way if self.num_workers is None else all((index - other) % self.num_workers for other in under_way)

    def submit(self, method: Worker[Any, Any], part: Any) -> None:
        """Take one part; it is run when a result is asked for."""
        self._done.pop(part.index, None)
        self._waiting[part.index] = method, part

    def collect(self, index: int | None = None) -> Any:
        """Result of one of the parts under way: of ``index``, or of the one that the seed picks."""
        if index is None:
            index = self._order.choice(sorted({*self._waiting, *self._done}))
        if index not in self._done:
            method = self._waiting[index][0]
            together = [part for other, part in self._waiting.values() if other is method]  # one product where the method can
            for part, result in zip(together, self(method, together), strict=True):
                self._done[part.index] = result
                del self._waiting[part.index]
        return self._done.pop(index)

    def abandon(self) -> None:
        """Forget the parts under way."""
        self._waiting.clear()
        self._done.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> InlineWorkers:
        return self  # an open engine is shared by the copies of what uses it, as sklearn.base.clone makes them
