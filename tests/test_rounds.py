"""The loop of SHAPE 1, on a method small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from partwise.checks import InputError
from partwise.engine.inline import inline
from partwise.rounds import part_seed, run_rounds


@dataclass(frozen=True)
class Halve:
    """Each part of a tuple of numbers is halved; a number that did not arrive stays."""

    def split(self, state: tuple[float, ...]) -> list[tuple[int, float]]:
        return list(enumerate(state))

    def work(self, part: tuple[int, float]) -> tuple[int, float]:
        return part[0], part[1] / 2

    def merge(self, state: tuple[float, ...], results: Sequence[tuple[int, float]]) -> tuple[float, ...]:
        arrived = dict(results)
        return tuple(arrived.get(i, number) for i, number in enumerate(state))


@dataclass(frozen=True)
class HalveTogether(Halve):
    def work_all(self, parts: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
        return [(i, -number / 2) for i, number in parts]  # the sign shows which form ran


def test_every_round_splits_works_and_merges_once() -> None:
    assert run_rounds(Halve(), (8.0, 4.0), num_rounds=2) == (2.0, 1.0)


def test_progress_sees_every_round_with_its_number_from_one() -> None:
    seen: list[Any] = []
    run_rounds(Halve(), (8.0,), num_rounds=3, progress=lambda number, state: seen.append((number, state)))
    assert seen == [(1, (4.0,)), (2, (2.0,)), (3, (1.0,))]


def test_stop_compares_two_states_and_ends_the_rounds() -> None:
    small_move = run_rounds(Halve(), (8.0,), num_rounds=100, stop=lambda before, after: before[0] - after[0] <= 1)
    assert small_move == (1.0,)


def test_an_engine_that_loses_results_costs_those_results_only() -> None:
    def lossy(method: Any, parts: Sequence[Any]) -> list[Any]:
        return inline(method, parts)[:1]

    assert run_rounds(Halve(), (8.0, 4.0), num_rounds=2, engine=lossy) == (2.0, 4.0)


def test_the_inline_engine_uses_the_batched_form_where_there_is_one() -> None:
    assert inline(HalveTogether(), [(0, 8.0)]) == [(0, -4.0)]
    assert inline(Halve(), [(0, 8.0)]) == [(0, 4.0)]


@pytest.mark.parametrize("num_rounds", [0, -1, 1.5, True])
def test_a_number_of_rounds_below_one_is_refused(num_rounds: Any) -> None:
    with pytest.raises(InputError, match=rf"num_rounds={num_rounds} must be an integer of at least 1\. Pass num_rounds=1 or more"):
        run_rounds(Halve(), (8.0,), num_rounds=num_rounds)


def test_what_a_part_draws_depends_on_seed_round_and_part_only() -> None:
    seeds = {(s, r, p): part_seed(s, round_number=r, part=p) for s in range(3) for r in range(3) for p in range(3)}
    assert len(set(seeds.values())) == 27
    np.random.default_rng(99).random()
    assert part_seed(2, round_number=1, part=0) == seeds[2, 1, 0]


def test_the_seed_of_a_part_starts_generators_of_numpy_and_torch() -> None:
    seed = part_seed(0, round_number=1, part=2)
    assert np.random.default_rng(seed).random() != np.random.default_rng(seed + 1).random()
    assert torch.Generator().manual_seed(seed).initial_seed() == seed
