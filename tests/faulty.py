"""Methods for the tests of engines: a small one that is easy to follow, and a wrapper that misbehaves once for each part that it is told about."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from partwise.checks import InputError


@dataclass(frozen=True, eq=False)
class Chain:
    """State: one vector per part; the part also sees the mean of the vectors in front of it."""

    vectors: np.ndarray  # (k, d)
    num_rounds: int = 0


@dataclass(frozen=True, eq=False)
class ChainPart:
    index: int
    ahead: np.ndarray  # (d,)
    vector: np.ndarray  # (d,)


@dataclass(frozen=True, eq=False)
class ChainResult:
    index: int
    vector: np.ndarray  # (d,)


@dataclass(frozen=True)
class FollowTheChain:
    """Each part moves towards the data, less what stands in front of it. ``data`` is what a worker keeps."""

    data: np.ndarray = field(repr=False)  # (d, d)

    def split(self, state: Chain) -> list[ChainPart]:
        return [ChainPart(k, state.vectors[:k].sum(axis=0) / 7, vector) for k, vector in enumerate(state.vectors)]

    def work(self, part: ChainPart) -> ChainResult:
        return ChainResult(part.index, np.tanh(part.vector / 3 + self.data @ part.vector / 5 - part.ahead + 0.1))

    def merge(self, state: Chain, results: Sequence[ChainResult]) -> Chain:
        vectors = state.vectors.copy()
        for result in results:
            vectors[result.index] = result.vector
        return replace(state, vectors=vectors, num_rounds=state.num_rounds + 1)

    def check(self, part: ChainPart, result: ChainResult) -> None:
        if result.vector.shape != part.vector.shape:
            raise InputError("chain-shape", f"got a vector of shape {result.vector.shape}, expected {part.vector.shape}. Send the vector.")


def chain(num_parts: int = 4, size: int = 6, *, seed: int = 0) -> tuple[FollowTheChain, Chain]:
    """The method and a start state."""
    rng = np.random.default_rng(seed)
    return FollowTheChain(rng.normal(size=(size, size)) / size), Chain(rng.normal(size=(num_parts, size)))


@dataclass(frozen=True, kw_only=True)
class Faulty:
    """``method`` with faults: the n-th time that ``work`` sees part k it does what ``faults`` says at (k, n), everywhere in the cluster.

    The count is kept in files below ``folder``, so that it outlives a killed process. Kinds of fault: ``kill`` (SIGKILL to its own process),
    ``delay`` (waits ``delay`` seconds before it answers), ``nan``, ``shape`` (one number short), ``index`` (another part's number), ``raise``.
    """

    method: Any
    folder: Path
    faults: dict[tuple[int, int], str]
    delay: float = 0.0

    def split(self, state: Any) -> Sequence[Any]:
        return self.method.split(state)

    def merge(self, state: Any, results: Sequence[Any]) -> Any:
        return self.method.merge(state, results)

    def check(self, part: Any, result: Any) -> None:
        if hasattr(self.method, "check"):
            self.method.check(part, result)

    def work(self, part: Any) -> Any:
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
