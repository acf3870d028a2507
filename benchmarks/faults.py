"""Methods that misbehave on purpose, for tests of engines and for ``engine_faults``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Faulty:
    """``method`` with faults: the n-th time that ``work`` sees part k it does what ``faults`` says at (k, n), everywhere in the cluster.

    The count is kept in files below ``folder``, so that it outlives a killed process. Kinds of fault: ``kill`` (SIGKILL to its own process),
    ``delay`` (waits ``delay`` seconds before it answers), ``nan``, ``shape`` (one number short), ``index`` (another part's number), ``raise``.
    """

    method: Any
    folder: Path
    faults: Mapping[tuple[int, int], str] = field(repr=False)
    delay: float = 0.0

    def split(self, state: Any) -> Sequence[Any]:
        """As the method does."""
        return self.method.split(state)

    def merge(self, state: Any, results: Sequence[Any]) -> Any:
        """As the method does."""
        return self.method.merge(state, results)

    def check(self, part: Any, result: Any) -> None:
        """As the method does."""
        if hasattr(self.method, "check"):
            self.method.check(part, result)

    def work(self, part: Any) -> Any:
        """What the method returns, unless a fault comes first."""
        fault = self.faults.get((part.index, self._count(part.index)))
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "delay":
            time.sleep(self.delay)
        if fault == "raise":
            raise ZeroDivisionError(f"part {part.index} fell over")
        return spoil(self.method.work(part), fault)

    def _count(self, index: int) -> int:
        """How often ``work`` has seen this part, from 0. Creating a file either succeeds or not, even with two processes at it."""
        for count in range(10_000):
            try:
                (self.folder / f"{index}-{count}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return count
        raise AssertionError("a part was sent ten thousand times")


def spoil(result: Any, fault: str | None) -> Any:
    """A result with the fault ``nan``, ``shape`` or ``index``; any other leaves it as it is."""
    if fault == "index":
        return replace(result, index=result.index + 1)
    if fault not in {"nan", "shape"}:
        return result
    name = next(name for name, value in vars(result).items() if isinstance(value, np.ndarray))
    array = getattr(result, name)
    if fault == "shape":
        return replace(result, **{name: array[..., :-1]})
    spoiled = array.copy()
    spoiled.flat[-1] = np.nan
    return replace(result, **{name: spoiled})
