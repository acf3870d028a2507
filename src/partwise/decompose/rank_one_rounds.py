"""Rank-one regression as rounds: the state, the parts, and the two methods that the estimators of ``rank_one_regression`` run.

Everything here lives on the reduced problem of ``partwise.linalg.rank_one``: a target ``F`` (m, p) and one pair ``(b_k, z_k)`` per component, whose
own target is ``F`` minus the published pairs in front of it. ``F`` belongs to the method and not to the parts, so that an engine with workers
elsewhere sends it to each of them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partwise.checks import InputError, RunError, check_at_least, check_choice
from partwise.linalg.products import one_blas_thread
from partwise.linalg.rank_one import SOLVERS, rank_one_steps
from partwise.rounds import part_seed

__all__ = ["ACTIVATIONS", "PairPart", "PairResult", "Pairs", "ParallelRankOne", "SequentialRankOne", "random_pairs"]

ACTIVATIONS = ("staggered", "advance", "all")
START_NORM = 0.3  # small against a target of size 1, so that gradient steps start near the saddle at 0; power and svd do not see it


@dataclass(frozen=True, eq=False)
class Pairs:
    """State: where every component stands.

    Attributes
    ----------
    left, right : ndarray
        (r, m) and (r, p), the latest pair of every component, published or private.
    published : tuple of bool
        Which pairs the others may use. What is not published counts as absent.
    num_rounds : int
        Merges done: rounds, or results when they are merged one at a time.
    updates : tuple of int
        Results that arrived for each component.
    """

    left: NDArray[Any]
    right: NDArray[Any]
    published: tuple[bool, ...]
    num_rounds: int = 0
    updates: tuple[int, ...] = ()

    @property
    def published_left(self) -> NDArray[Any]:
        """(r, m), rows of zeros where nothing is published; with ``right``, the approximation that the components make together."""
        shown: NDArray[Any] = self.left * np.array(self.published, dtype=self.left.dtype)[:, None]
        return shown


@dataclass(frozen=True, eq=False)
class PairPart:
    """What the worker of one component needs besides the method: the pairs in front of it, and its own."""

    index: int
    ahead: tuple[NDArray[Any], NDArray[Any]]  # (j, m), (j, p)
    left: NDArray[Any]  # (m,)
    right: NDArray[Any]  # (p,)


@dataclass(frozen=True, eq=False)
class PairResult:
    """What a worker sends back: m + p numbers."""

    index: int
    left: NDArray[Any]  # (m,)
    right: NDArray[Any]  # (p,)


def random_pairs(target: NDArray[Any], *, num_components: int, seed: int) -> Pairs:
    """Start state for ``target`` (m, p): small random pairs, none published. A pair depends on the seed and its own index only."""
    rows, columns = target.shape
    left, right = np.empty((num_components, rows), target.dtype), np.empty((num_components, columns), target.dtype)
    for k in range(num_components):
        draw = np.random.default_rng(part_seed(seed, round_number=0, part=k)).standard_normal(rows + columns)  # (m + p,)
        left[k] = START_NORM * draw[:rows] / np.linalg.norm(draw[:rows])
        right[k] = START_NORM * draw[rows:] / np.linalg.norm(draw[rows:])
    return Pairs(left, right, published=(False,) * num_components, updates=(0,) * num_components)


def _part(state: Pairs, index: int) -> PairPart:
    ahead = [j for j in range(index) if state.published[j]]
    return PairPart(index, (state.left[ahead], state.right[ahead]), state.left[index], state.right[index])


def _move(parts: Sequence[PairPart], target: NDArray[Any], *, solver: str, num_steps: int, lr: float) -> list[PairResult]:
    """Solver steps of all parts in one matrix product per step; a part has the bits it would have alone."""
    starts = np.stack([part.left for part in parts]), np.stack([part.right for part in parts])  # (k, m), (k, p)
    with one_blas_thread():
        left, right = rank_one_steps(target, *starts, [part.ahead for part in parts], solver=solver, num_steps=num_steps, lr=lr)
    return [PairResult(part.index, left[i], right[i]) for i, part in enumerate(parts)]


def _check_result(part: PairPart, result: PairResult) -> None:
    sent, came = ([(vector.shape, vector.dtype.name) for vector in (pair.left, pair.right)] for pair in (part, result))
    if came != sent:
        raise RunError("result-shape", f"got a pair with {came}, expected {sent}. Use the same version of partwise and numpy on every machine.")


def _write(state: Pairs, results: Sequence[PairResult], *, publish: set[int]) -> Pairs:
    left, right, published, updates = state.left.copy(), state.right.copy(), list(state.published), list(state.updates)
    for k, result in {result.index: result for result in results}.items():  # any subset may have arrived, and one twice
        left[k], right[k] = result.left, result.right
        published[k] |= k in publish
        updates[k] += 1
    return Pairs(left, right, tuple(published), state.num_rounds + 1, tuple(updates))


@dataclass(frozen=True, kw_only=True)
class ParallelRankOne:
    """All components at once, each on what the components in front of it, as published last round, leave over.

    A mistake in front is not passed on for ever: the target is rebuilt every round, so errors heal from the first component to the last.

    Parameters
    ----------
    target : ndarray
        (m, p), ``F``, scaled so that its largest singular value is 1 when the solver is ``gd``.
    solver : {"power", "gd", "svd"}
        How a worker moves its pair, see ``partwise.linalg.rank_one_step``.
    num_local_steps : int
        Solver steps between two exchanges (T in the paper).
    activation : {"staggered", "advance", "all"}
        ``staggered``: component k starts in round k. ``advance``: it also starts in round 1, in private, and publishes from round k on.
        ``all``: everyone works and publishes from round 1 on.
    lr : float
        Step size of ``gd`` for a target whose largest singular value is 1; other solvers do not use it.

    References
    ----------
    AdaPaD. arXiv:2605.10741.
    """

    target: NDArray[Any] = field(repr=False, compare=False)
    solver: str = "power"
    num_local_steps: int = 1
    activation: str = "advance"
    lr: float = 0.25

    def __post_init__(self) -> None:
        check_choice(self.solver, SOLVERS, name="solver")
        check_choice(self.activation, ACTIVATIONS, name="activation")
        check_at_least(self.num_local_steps, 1, name="num_local_steps")
        _check_lr(self.lr)
        object.__setattr__(self, "target", np.ascontiguousarray(self.target))  # in every process the same layout, hence the same bits

    def split(self, state: Pairs) -> list[PairPart]:
        """One part per component that works this round."""
        num_components = len(state.left)
        working = min(state.num_rounds + 1, num_components) if self.activation == "staggered" else num_components
        return [_part(state, k) for k in range(working)]

    def work(self, part: PairPart) -> PairResult:
        """A few solver steps of one component from its own last pair."""
        return self.work_all([part])[0]

    def work_all(self, parts: Sequence[PairPart]) -> list[PairResult]:
        """The same for all parts of one round, in one matrix product per step."""
        return _move(parts, self.target, solver=self.solver, num_steps=self.num_local_steps, lr=self.lr)

    def check(self, part: PairPart, result: PairResult) -> None:
        """Refuse a pair of another shape or dtype than the part's; engines call this."""
        _check_result(part, result)

    def merge(self, state: Pairs, results: Sequence[PairResult]) -> Pairs:
        """Write the pairs that arrived; publish those whose round has come."""
        due = len(state.left) if self.activation == "all" else state.num_rounds + 1
        return _write(state, results, publish=set(range(due)))


@dataclass(frozen=True, kw_only=True)
class SequentialRankOne:
    """One component per round: train it on what the frozen ones leave over, freeze it, go on. The same shape with one part alive.

    Parameters
    ----------
    target
        As in ``ParallelRankOne``.
    steps : tuple of int
        Solver steps of each component, one entry per component, as ``partwise.linalg.compute_schedule`` deals them.
    solver, lr
        As in ``ParallelRankOne``.

    References
    ----------
    One Rank at a Time: Cascading Error Dynamics in Sequential Learning. arXiv:2505.22602.
    """

    target: NDArray[Any] = field(repr=False, compare=False)
    steps: tuple[int, ...]
    solver: str = "power"
    lr: float = 0.25

    def __post_init__(self) -> None:
        check_choice(self.solver, SOLVERS, name="solver")
        _check_lr(self.lr)
        for k, num_steps in enumerate(self.steps):
            check_at_least(num_steps, 1, name=f"steps[{k}]")
        object.__setattr__(self, "target", np.ascontiguousarray(self.target))  # as above

    def split(self, state: Pairs) -> list[PairPart]:
        """The first component that is not frozen; nothing when all are."""
        return [_part(state, k) for k, frozen in enumerate(state.published) if not frozen][:1]

    def work(self, part: PairPart) -> PairResult:
        """All the steps that this component gets."""
        return _move([part], self.target, solver=self.solver, num_steps=self.steps[part.index], lr=self.lr)[0]

    def check(self, part: PairPart, result: PairResult) -> None:
        """Refuse a pair of another shape or dtype than the part's; engines call this."""
        _check_result(part, result)

    def merge(self, state: Pairs, results: Sequence[PairResult]) -> Pairs:
        """Freeze what arrived; a component whose result was lost has its turn again."""
        return _write(state, results, publish=set(range(len(state.published))))


def _check_lr(lr: float) -> None:
    """Refuse a step size that is not above 0 or that makes gradient steps on a target of size 1 diverge."""
    if not 0 < lr <= 0.5:
        raise InputError("lr-range", f"got lr={lr}, expected more than 0 and at most 0.5. Pass lr=0.25, or 0.1 for slow and smooth steps.")
