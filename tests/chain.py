"""A small method in rounds that is easy to follow, for tests of engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
