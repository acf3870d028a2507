"""Shared claims of SHAPE 1. An entry in ``ENTRIES`` buys a round method every test below; the suite asks no method for its name."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from matrices import matrix_with
from partwise.checks import InputError
from partwise.decompose.rank_one_rounds import ParallelRankOne, SequentialRankOne, random_pairs
from partwise.engine.inline import inline
from partwise.rounds import run_rounds
from tolerances import assert_close


@dataclass(frozen=True)
class Entry:
    """A method, a small problem for it, and settings it must refuse."""

    method: Any
    start: Callable[[int], Any]  # seed -> state
    num_rounds: int
    refuses: Sequence[tuple[dict[str, Any], str]] = field(default=())  # settings, text of the error


def pairs(seed: int) -> Any:
    return random_pairs(matrix_with([4, 2, 1, 0.5], rows=6, columns=5), num_components=3, seed=seed)


SOLVER_TEXT = r"solver='newton' is not known\. Choose one of: power, gd, svd"
ENTRIES = [
    Entry(
        ParallelRankOne(solver=solver, activation=activation, num_local_steps=2, lr=0.05),
        pairs,
        num_rounds=5,
        refuses=[
            ({"solver": "newton"}, SOLVER_TEXT),
            ({"activation": "later"}, r"activation='later' is not known\. Choose one of: staggered, advance, all"),
            ({"num_local_steps": 0}, r"num_local_steps=0 must be an integer of at least 1"),
            ({"lr": -1.0}, r"got lr=-1\.0, expected more than 0 and at most 0\.5"),
        ],
    )
    for solver in ("power", "gd", "svd")
    for activation in ("staggered", "advance", "all")
]
ENTRIES += [
    Entry(
        SequentialRankOne(steps=(3, 2, 1), solver="power"),
        pairs,
        num_rounds=3,
        refuses=[
            ({"solver": "newton"}, SOLVER_TEXT),
            ({"steps": (3, 0)}, r"steps\[1\]=0 must be an integer of at least 1"),
            ({"lr": 2.0}, r"got lr=2\.0, expected more than 0 and at most 0\.5"),
        ],
    )
]
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: repr(entry.method))


def assert_same(actual: Any, expected: Any, *, claim: str, **override: float) -> None:
    """Compare states, parts or results field by field, whatever they are made of."""
    if isinstance(expected, torch.Tensor):
        assert_close(actual, expected, claim=claim, **override)
    elif dataclasses.is_dataclass(expected):
        assert type(actual) is type(expected), claim
        for item in dataclasses.fields(expected):
            assert_same(getattr(actual, item.name), getattr(expected, item.name), claim=f"{claim} ({item.name})", **override)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), claim
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, claim=claim, **override)
    else:
        assert actual == expected, claim


def through_a_pipe(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 - what an engine with several processes does to parts and results


SAME_BITS = {"rtol": 0.0, "atol": 0.0}


@every_entry
def test_the_repr_rebuilds_the_method_and_the_method_cannot_be_changed(entry: Entry) -> None:
    assert eval(repr(entry.method), {type(entry.method).__name__: type(entry.method)}) == entry.method  # noqa: S307 - our own repr
    name = dataclasses.fields(entry.method)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(entry.method, name, None)


@every_entry
def test_method_parts_and_results_survive_a_trip_to_another_process(entry: Entry) -> None:
    state = run_rounds(entry.method, entry.start(0), num_rounds=1)
    for part in entry.method.split(state):
        sent, method = through_a_pipe(part), through_a_pipe(entry.method)
        arrived = through_a_pipe(method.work(sent))
        assert_same(arrived, entry.method.work(part), claim="a worker elsewhere computes the same bits", **SAME_BITS)


@every_entry
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(entry: Entry) -> None:
    first, second = (run_rounds(entry.method, entry.start(3), num_rounds=entry.num_rounds) for _ in range(2))
    assert_same(first, second, claim="same seed, same answer", **SAME_BITS)
    with pytest.raises(AssertionError):
        assert_same(entry.start(4), entry.start(3), claim="starts of two seeds", **SAME_BITS)


@every_entry
def test_the_order_in_which_results_arrive_does_not_matter(entry: Entry) -> None:
    forward = backward = entry.start(0)
    for _ in range(entry.num_rounds):
        forward = entry.method.merge(forward, inline(entry.method, entry.method.split(forward)))
        backward = entry.method.merge(backward, inline(entry.method, entry.method.split(backward))[::-1])
    assert_same(backward, forward, claim="merge does not see the order", **SAME_BITS)


@every_entry
def test_split_work_and_merge_leave_their_inputs_untouched(entry: Entry) -> None:
    state = run_rounds(entry.method, entry.start(0), num_rounds=2)
    parts = entry.method.split(state)
    results = inline(entry.method, parts)
    kept = copy.deepcopy((state, parts, results))
    entry.method.merge(state, results)
    for part in parts:
        entry.method.work(part)
    assert_same((state, parts, results), kept, claim="inputs are not changed", **SAME_BITS)


@every_entry
def test_any_subset_of_the_results_can_be_merged_and_the_rounds_go_on(entry: Entry) -> None:
    state = entry.start(0)
    for dropped in range(entry.num_rounds):
        results = inline(entry.method, entry.method.split(state))
        arrived = [result for i, result in enumerate(results) if i != dropped % len(results)]
        state = entry.method.merge(state, arrived)
    state = entry.method.merge(state, [])
    healed = run_rounds(entry.method, state, num_rounds=1)
    assert type(healed) is type(state)


@every_entry
def test_the_batched_form_equals_one_part_at_a_time(entry: Entry) -> None:
    if not hasattr(entry.method, "work_all"):
        pytest.skip("offers no batched form")
    state = entry.start(0)
    for _ in range(entry.num_rounds):
        parts = entry.method.split(state)
        results = entry.method.work_all(parts)
        assert_same(results, [entry.method.work(part) for part in parts], claim="same sums, other order")
        state = entry.method.merge(state, results)


REFUSALS = [(entry.method, settings, text) for entry in ENTRIES for settings, text in entry.refuses]


@pytest.mark.parametrize(("method", "settings", "text"), REFUSALS, ids=[f"{method!r}-{settings}" for method, settings, _ in REFUSALS])
def test_bad_settings_are_refused_with_what_to_do(method: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        dataclasses.replace(method, **settings)
