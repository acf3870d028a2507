"""Rank-one regression as rounds: the state, the parts, and the two methods that the estimators of ``rank_one_regression`` run.

Everything here lives on the reduced problem of ``partwise.linalg.rank_one``: a target ``F`` (m, p) and one pair ``(b_k, z_k)`` per component, whose
own target is ``F`` minus the published pairs in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from partwise.checks import InputError, check_at_least, check_choice
from partwise.linalg.rank_one import SOLVERS, rank_one_step, rank_one_steps
from partwise.rounds import part_generator

__all__ = ["ACTIVATIONS", "PairPart", "PairResult", "Pairs", "ParallelRankOne", "SequentialRankOne", "random_pairs"]

ACTIVATIONS = ("staggered", "advance", "all")
START_NORM = 0.3  # small against a target of size 1, so that gradient steps start near the saddle at 0; power and svd do not see it


@dataclass(frozen=True, eq=False)
class Pairs:
    """State: where every component stands.

    Attributes
    ----------
    target : Tensor
        (m, p), ``F``, scaled so that its largest singular value is 1 when the solver is ``gd``.
    left, right : Tensor
        (r, m) and (r, p), the latest pair of every component, published or private.
    published : tuple of bool
        Which pairs the others may use. What is not published counts as absent.
    num_rounds : int
        Rounds done.
    """

    target: Tensor
    left: Tensor
    right: Tensor
    published: tuple[bool, ...]
    num_rounds: int = 0

    @property
    def published_left(self) -> Tensor:
        """(r, m), rows of zeros where nothing is published; with ``right``, the approximation that the components make together."""
        return self.left * torch.tensor(self.published, dtype=self.left.dtype, device=self.left.device)[:, None]


@dataclass(frozen=True, eq=False)
class PairPart:
    """What the worker of one component needs: the target, the pairs in front of it, and its own."""

    index: int
    target: Tensor  # (m, p)
    ahead: tuple[Tensor, Tensor]  # (j, m), (j, p)
    left: Tensor  # (m,)
    right: Tensor  # (p,)


@dataclass(frozen=True, eq=False)
class PairResult:
    """What a worker sends back: m + p numbers."""

    index: int
    left: Tensor  # (m,)
    right: Tensor  # (p,)


def random_pairs(target: Tensor, *, num_components: int, seed: int) -> Pairs:
    """Start state: small random pairs, none published. A pair depends on the seed and its own index only."""
    rows, columns = target.shape
    left, right = target.new_empty(num_components, rows), target.new_empty(num_components, columns)
    for k in range(num_components):
        generator = part_generator(seed, round_number=0, part=k)
        draw = torch.randn(rows + columns, generator=generator, dtype=torch.float64).to(target)  # (m + p,)
        left[k] = START_NORM * torch.nn.functional.normalize(draw[:rows], dim=0)
        right[k] = START_NORM * torch.nn.functional.normalize(draw[rows:], dim=0)
    return Pairs(target, left, right, published=(False,) * num_components)


def _part(state: Pairs, index: int) -> PairPart:
    ahead = [j for j in range(index) if state.published[j]]
    return PairPart(index, state.target, (state.left[ahead], state.right[ahead]), state.left[index], state.right[index])


def _write(state: Pairs, results: Sequence[PairResult], *, publish: set[int]) -> Pairs:
    left, right, published = state.left.clone(), state.right.clone(), list(state.published)
    for result in results:  # any subset may have arrived
        left[result.index], right[result.index] = result.left, result.right
        published[result.index] |= result.index in publish
    return replace(state, left=left, right=right, published=tuple(published), num_rounds=state.num_rounds + 1)


@dataclass(frozen=True, kw_only=True)
class ParallelRankOne:
    """All components at once, each on what the components in front of it, as published last round, leave over.

    A mistake in front is not passed on for ever: the target is rebuilt every round, so errors heal from the first component to the last.

    Parameters
    ----------
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

    solver: str = "power"
    num_local_steps: int = 1
    activation: str = "advance"
    lr: float = 0.25

    def __post_init__(self) -> None:
        check_choice(self.solver, SOLVERS, name="solver")
        check_choice(self.activation, ACTIVATIONS, name="activation")
        check_at_least(self.num_local_steps, 1, name="num_local_steps")
        _check_lr(self.lr)

    def split(self, state: Pairs) -> list[PairPart]:
        """One part per component that works this round."""
        num_components = len(state.left)
        working = min(state.num_rounds + 1, num_components) if self.activation == "staggered" else num_components
        return [_part(state, k) for k in range(working)]

    def work(self, part: PairPart) -> PairResult:
        """A few solver steps of one component from its own last pair."""
        pair = rank_one_step(part.target, part.left, part.right, part.ahead, solver=self.solver, num_steps=self.num_local_steps, lr=self.lr)
        return PairResult(part.index, *pair)

    def work_all(self, parts: Sequence[PairPart]) -> list[PairResult]:
        """The same for all parts of one round, in one matrix product per step."""
        longest = max((part.ahead for part in parts), key=lambda ahead: len(ahead[0]))  # (j, m), (j, p); the others are its first rows
        counts = torch.tensor([len(part.ahead[0]) for part in parts])  # (k,)
        mask = torch.arange(len(longest[0])) < counts[:, None]  # (k, j)
        left, right = torch.stack([part.left for part in parts]), torch.stack([part.right for part in parts])  # (k, m), (k, p)
        left, right = rank_one_steps(
            parts[0].target, left, right, longest, mask.to(left), solver=self.solver, num_steps=self.num_local_steps, lr=self.lr
        )
        return [PairResult(part.index, left[i], right[i]) for i, part in enumerate(parts)]

    def merge(self, state: Pairs, results: Sequence[PairResult]) -> Pairs:
        """Write the pairs that arrived; publish those whose round has come."""
        due = len(state.left) if self.activation == "all" else state.num_rounds + 1
        return _write(state, results, publish=set(range(due)))


@dataclass(frozen=True, kw_only=True)
class SequentialRankOne:
    """One component per round: train it on what the frozen ones leave over, freeze it, go on. The same shape with one part alive.

    Parameters
    ----------
    steps : tuple of int
        Solver steps of each component, one entry per component, as ``partwise.linalg.compute_schedule`` deals them.
    solver, lr
        As in ``ParallelRankOne``.

    References
    ----------
    One Rank at a Time: Cascading Error Dynamics in Sequential Learning. arXiv:2505.22602.
    """

    steps: tuple[int, ...]
    solver: str = "power"
    lr: float = 0.25

    def __post_init__(self) -> None:
        check_choice(self.solver, SOLVERS, name="solver")
        _check_lr(self.lr)
        for k, num_steps in enumerate(self.steps):
            check_at_least(num_steps, 1, name=f"steps[{k}]")

    def split(self, state: Pairs) -> list[PairPart]:
        """The first component that is not frozen; nothing when all are."""
        return [_part(state, k) for k, frozen in enumerate(state.published) if not frozen][:1]

    def work(self, part: PairPart) -> PairResult:
        """All the steps that this component gets."""
        pair = rank_one_step(part.target, part.left, part.right, part.ahead, solver=self.solver, num_steps=self.steps[part.index], lr=self.lr)
        return PairResult(part.index, *pair)

    def merge(self, state: Pairs, results: Sequence[PairResult]) -> Pairs:
        """Freeze what arrived; a component whose result was lost has its turn again."""
        return _write(state, results, publish=set(range(len(state.published))))


def _check_lr(lr: float) -> None:
    """Refuse a step size that is not above 0 or that makes gradient steps on a target of size 1 diverge."""
    if not 0 < lr <= 0.5:
        raise InputError("lr-range", f"got lr={lr}, expected more than 0 and at most 0.5. Pass lr=0.25, or 0.1 for slow and smooth steps.")
