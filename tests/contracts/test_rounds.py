"""Shared claims of SHAPE 1. An entry in ``ENTRIES`` buys a round method every test below; the suite asks no method for its name."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from faults import spoil
from matrices import gaussian, matrix_with
from partwise.checks import InputError
from partwise.decompose._covariance import covariance_of
from partwise.decompose._eigen_rounds import ParallelDeflation, random_eigenpairs
from partwise.decompose.hotelling_deflation import SequentialDeflation
from partwise.decompose.rank_one_rounds import ParallelRankOne, SequentialRankOne, random_pairs
from partwise.engine.arrivals import flaw_of
from partwise.engine.inline import InlineWorkers, inline
from partwise.engine.ray_actors import RayActors
from partwise.rounds import run_async, run_rounds
from tolerances import assert_close


@dataclass(frozen=True)
class Entry:
    """A method, a small problem for it, and settings it must refuse. ``data``: fields that the repr leaves out."""

    method: Any
    start: Callable[[int], Any]  # seed -> state
    num_rounds: int
    refuses: Sequence[tuple[dict[str, Any], str]] = field(default=())  # settings, text of the error
    data: Mapping[str, Any] = field(default_factory=dict)


TARGET = matrix_with([4, 2, 1, 0.5], rows=6, columns=5)
COVARIANCE = covariance_of(gaussian(40, 12) * np.arange(1, 13) ** -0.5)


def pairs(seed: int) -> Any:
    return random_pairs(TARGET, num_components=3, seed=seed)


def eigenpairs(seed: int, *, with_moments: bool = False) -> Any:
    return random_eigenpairs(4, COVARIANCE.num_features, seed=seed, with_moments=with_moments)


SOLVER_TEXT = r"solver='newton' is not known\. Choose one of: power, gd, svd"
ENTRIES = [
    Entry(
        ParallelRankOne(target=TARGET, solver=solver, activation=activation, num_local_steps=2, lr=0.05),
        pairs,
        num_rounds=5,
        refuses=[
            ({"solver": "newton"}, SOLVER_TEXT),
            ({"activation": "later"}, r"activation='later' is not known\. Choose one of: staggered, advance, all"),
            ({"num_local_steps": 0}, r"num_local_steps=0 must be an integer of at least 1"),
            ({"lr": -1.0}, r"got lr=-1\.0, expected more than 0 and at most 0\.5"),
        ],
        data={"target": TARGET},
    )
    for solver in ("power", "gd", "svd")
    for activation in ("staggered", "advance", "all")
]
ENTRIES += [
    Entry(
        SequentialRankOne(target=TARGET, steps=(3, 2, 1), solver="power"),
        pairs,
        num_rounds=3,
        refuses=[
            ({"solver": "newton"}, SOLVER_TEXT),
            ({"steps": (3, 0)}, r"steps\[1\]=0 must be an integer of at least 1"),
            ({"lr": 2.0}, r"got lr=2\.0, expected more than 0 and at most 0\.5"),
        ],
        data={"target": TARGET},
    )
]
ENTRIES += [
    Entry(
        ParallelDeflation(covariance=COVARIANCE, num_local_steps=2, tol=0.0, **settings),
        partial(eigenpairs, with_moments=settings["solver"] == "adam"),
        num_rounds=6,
        refuses=[
            ({"solver": "newton"}, r"solver='newton' is not known\. Choose one of: power, hebb, adam, lanczos"),
            ({"update": "beta"}, r"update='beta' is not known\. Choose one of: deflation, alpha, mu"),
            ({"num_local_steps": 0}, r"num_local_steps=0 must be an integer of at least 1"),
            ({"tol": -1.0}, r"got tol=-1\.0, expected 0 or more and below 1"),
            ({"solver": "power", "batch_size": 4, "block_size": None, "update": "deflation"}, r"got batch_size=4 with solver='power', expected solver='hebb'"),
        ],
        data={"covariance": COVARIANCE},
    )
    for settings in (
        *({"solver": solver, "update": update} for solver in ("power", "hebb") for update in ("deflation", "alpha", "mu")),
        {"solver": "adam", "update": "mu"},
        {"solver": "hebb", "batch_size": 8},
        {"solver": "lanczos", "block_size": 2},
    )
]
ENTRIES += [
    Entry(
        SequentialDeflation(covariance=COVARIANCE, solver=solver, num_local_steps=2, steps=(4, 3, 1, 2), tol=0.0),
        eigenpairs,
        num_rounds=6,
        refuses=[
            ({"solver": "hebb"}, r"solver='hebb' is not known\. Choose one of: power, lanczos"),
            ({"steps": (3, 0)}, r"steps\[1\]=0 must be an integer of at least 1"),
        ],
        data={"covariance": COVARIANCE},
    )
    for solver in ("power", "lanczos")
]
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: repr(entry.method))


def assert_same(actual: Any, expected: Any, *, claim: str, **override: float) -> None:
    """Compare states, parts or results field by field, whatever they are made of."""
    if isinstance(expected, torch.Tensor | np.ndarray):
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
    kind = type(entry.method)
    assert eval(repr(entry.method), {kind.__name__: partial(kind, **entry.data)}) == entry.method  # noqa: S307 - our own repr
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
        assert_same(results, [entry.method.work(part) for part in parts], claim="a part has the bits it would have alone", **SAME_BITS)
        state = entry.method.merge(state, results)


@every_entry
def test_a_result_that_comes_twice_counts_once(entry: Entry) -> None:
    state = run_rounds(entry.method, entry.start(0), num_rounds=1)
    results = inline(entry.method, entry.method.split(state))
    once, twice = entry.method.merge(state, results), entry.method.merge(state, [*results, *results[:1]])
    assert_same(twice, once, claim="the second copy changes nothing", **SAME_BITS)


@every_entry
@pytest.mark.parametrize("fault", ["nan", "shape", "index"])
def test_a_broken_result_is_told_from_a_sound_one(entry: Entry, fault: str) -> None:
    state = entry.start(0)
    for _ in range(entry.num_rounds):
        parts = entry.method.split(state)
        results = inline(entry.method, parts)
        assert [flaw_of(entry.method, part, result) for part, result in zip(parts, results, strict=True)] == [None] * len(parts)
        assert all(flaw_of(entry.method, part, spoil(result, fault)) for part, result in zip(parts, results, strict=True))
        state = entry.method.merge(state, results)


@every_entry
def test_an_asynchronous_run_replays_to_the_same_bits(entry: Entry) -> None:
    for max_staleness in (None, 1):
        state, schedule = run_async(entry.method, entry.start(0), engine=InlineWorkers(seed=5), num_updates=15, max_staleness=max_staleness)
        replayed, _ = run_async(entry.method, entry.start(0), schedule=schedule)
        assert_same(replayed, state, claim="the schedule says it all", **SAME_BITS)


@pytest.fixture(scope="module")
def workers() -> Iterator[RayActors]:
    """Two workers that all entries use in turn."""
    pytest.importorskip("ray", reason="tests the Ray engine")
    with RayActors(2) as engine:
        yield engine


@pytest.mark.ray
@pytest.mark.slow
@every_entry
def test_ray_and_inline_give_the_same_bits(entry: Entry, workers: RayActors) -> None:
    here, there = (run_rounds(entry.method, entry.start(1), num_rounds=entry.num_rounds, engine=engine) for engine in (inline, workers))
    assert_same(there, here, claim="where the parts ran cannot be seen", **SAME_BITS)


@pytest.mark.ray
@pytest.mark.slow
@every_entry
def test_an_asynchronous_run_on_ray_replays_inline_to_the_same_bits(entry: Entry, workers: RayActors) -> None:
    state, schedule = run_async(entry.method, entry.start(1), engine=workers, num_updates=12)
    replayed, _ = run_async(entry.method, entry.start(1), schedule=schedule)
    assert_same(replayed, state, claim="the schedule says it all", **SAME_BITS)


REFUSALS = [(entry.method, settings, text) for entry in ENTRIES for settings, text in entry.refuses]


@pytest.mark.parametrize(("method", "settings", "text"), REFUSALS, ids=[f"{method!r}-{settings}" for method, settings, _ in REFUSALS])
def test_bad_settings_are_refused_with_what_to_do(method: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        dataclasses.replace(method, **settings)
