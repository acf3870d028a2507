"""Rounds without a barrier: what is guaranteed about age and order, and that a recorded run can be replayed to the bit."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chain import Chain, FollowTheChain, chain
from partwise.checks import InputError
from partwise.engine.inline import InlineWorkers
from partwise.rounds import Schedule, run_async, run_rounds
from tolerances import assert_close

SAME_BITS = {"rtol": 0.0, "atol": 0.0}
seeds = st.integers(0, 2**32 - 1)


def slowly_from(schedule: Schedule, method: FollowTheChain, state: Chain) -> Chain:
    """What a reader of the schedule would do by hand."""
    results = {}
    for kind, k in schedule.events:
        if kind == "send":
            results[k] = method.work(method.split(state)[k])
        else:
            state = method.merge(state, [results.pop(k)])
    return state


@given(seed=seeds, num_parts=st.integers(1, 6), num_updates=st.integers(1, 40), num_workers=st.none() | st.integers(1, 4))
def test_a_replay_gives_the_bits_of_the_run(seed: int, num_parts: int, num_updates: int, num_workers: int | None) -> None:
    method, start = chain(num_parts)
    state, schedule = run_async(method, start, engine=InlineWorkers(num_workers, seed=seed), num_updates=num_updates)
    assert schedule.num_updates == num_updates == state.num_rounds
    replayed, same = run_async(method, start, schedule=Schedule.from_json(schedule.to_json()))
    assert same == schedule
    assert_close(replayed.vectors, state.vectors, claim="the schedule says it all", **SAME_BITS)
    assert_close(slowly_from(schedule, method, start).vectors, state.vectors, claim="and it means what it says", **SAME_BITS)


@given(seed=seeds, num_parts=st.integers(2, 6), max_staleness=st.integers(1, 4), num_workers=st.none() | st.integers(1, 4))
def test_nothing_older_than_max_staleness_is_merged_and_nobody_starves(seed: int, num_parts: int, max_staleness: int, num_workers: int | None) -> None:
    method, start = chain(num_parts)
    engine = InlineWorkers(num_workers, seed=seed)
    _, schedule = run_async(method, start, engine=engine, num_updates=60, max_staleness=max_staleness)
    assert schedule.num_updates == 60
    assert max(schedule.ages) <= max_staleness
    counts = Counter(k for kind, k in schedule.events if kind == "arrive")
    assert set(counts) == set(range(num_parts))
    for behind in range(1, num_parts):
        in_a_row, most = 0, 0  # updates of a part since there was news of the one before it
        for kind, k in schedule.events:
            in_a_row = 0 if (kind, k) == ("arrive", behind - 1) else in_a_row + ((kind, k) == ("send", behind))
            most = max(most, in_a_row)
        assert most <= max_staleness


def test_without_a_bound_results_grow_older_than_with_one() -> None:
    method, start = chain(6)
    free, bound = (run_async(method, start, engine=InlineWorkers(seed=1), num_updates=200, max_staleness=s)[1] for s in (None, 1))
    assert max(free.ages) > 3
    assert max(bound.ages) == 1


def test_the_seed_of_the_engine_decides_the_order_of_arrival() -> None:
    method, start = chain(5)
    first, same, other = (run_async(method, start, engine=InlineWorkers(seed=seed), num_updates=30)[1] for seed in (1, 1, 2))
    assert first == same != other


def test_one_part_alone_is_the_same_in_rounds_and_without() -> None:
    method, start = chain(1)
    state, schedule = run_async(method, start, num_updates=5)
    assert_close(state.vectors, run_rounds(method, start, num_rounds=5).vectors, claim="nobody to wait for", **SAME_BITS)
    assert schedule.ages == (0,) * 5


def test_asynchronous_rounds_reach_the_same_fixed_point() -> None:
    method, start = chain(4)
    rounds, asynchronous = run_rounds(method, start, num_rounds=200), run_async(method, start, num_updates=800)[0]
    assert_close(asynchronous.vectors, rounds.vectors, claim="both end where every part answers itself")


def test_workers_with_several_parts_give_each_its_turn() -> None:
    method, start = chain(6)
    _, schedule = run_async(method, start, engine=InlineWorkers(2, seed=0), num_updates=60)
    counts = Counter(k for kind, k in schedule.events if kind == "arrive")
    for worker in (0, 1):
        own = [counts[k] for k in range(worker, 6, 2)]
        assert max(own) - min(own) <= 1
    under_way: set[int] = set()
    for kind, k in schedule.events:
        assert kind == "arrive" or not {other % 2 for other in under_way} & {k % 2}
        under_way = under_way | {k} if kind == "send" else under_way - {k}


def test_progress_and_stop_see_every_merge() -> None:
    method, start = chain(3)
    seen: list[tuple[int, int]] = []
    state, schedule = run_async(
        method, start, num_updates=50, progress=lambda number, state: seen.append((number, state.num_rounds)), stop=lambda _, after: after.num_rounds == 4
    )
    assert seen == [(n, n) for n in range(1, 5)]
    assert state.num_rounds == schedule.num_updates == 4


class UntilZero:
    """Two counters that go down by one; nothing is left to do at zero."""

    def split(self, state: tuple[int, ...]) -> list[Any]:
        return [Count(k, number) for k, number in enumerate(state) if number]

    def work(self, part: Any) -> Any:
        return Count(part.index, part.number - 1)

    def merge(self, state: tuple[int, ...], results: Any) -> tuple[int, ...]:
        arrived = {result.index: result.number for result in results}
        return tuple(arrived.get(k, number) for k, number in enumerate(state))


class Count:
    def __init__(self, index: int, number: int) -> None:
        self.index, self.number = index, number


@pytest.mark.parametrize("max_staleness", [None, 1])
def test_a_run_ends_when_no_part_has_anything_left_to_do(max_staleness: int | None) -> None:
    state, schedule = run_async(UntilZero(), (3, 5), num_updates=100, max_staleness=max_staleness)
    assert state == (0, 0)
    assert schedule.num_updates == 8


def test_a_method_that_fails_leaves_nothing_under_way() -> None:
    class Fails(UntilZero):
        def merge(self, state: Any, results: Any) -> Any:
            raise ZeroDivisionError

    engine = InlineWorkers()
    with pytest.raises(ZeroDivisionError):
        run_async(Fails(), (3, 5), engine=engine, num_updates=10)
    assert engine.is_free(0)
    assert engine.is_free(1)


def test_a_part_sent_again_after_a_crash_replays_as_the_last_one_sent() -> None:
    method, start = chain(2)
    events = (("send", 1), ("send", 0), ("arrive", 0), ("send", 1), ("arrive", 1))
    replayed, _ = run_async(method, start, schedule=Schedule.from_json(events))
    assert_close(replayed.vectors, slowly_from(Schedule.from_json(events), method, start).vectors, claim="the second sending counts", **SAME_BITS)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, r"num_updates=None must be an integer of at least 1"),
        ({"num_updates": 0}, r"num_updates=0 must be an integer of at least 1"),
        ({"num_updates": 1, "max_staleness": 0}, r"max_staleness=0 must be an integer of at least 1"),
        ({"schedule": Schedule(), "max_staleness": 1}, r"got a schedule with engine or max_staleness, expected it alone"),
        ({"schedule": Schedule((("send", 7), ("arrive", 7)))}, r"event 0 of the schedule is \('send', 7\), and there is no such part then"),
        ({"schedule": Schedule((("arrive", 0),))}, r"event 0 of the schedule is \('arrive', 0\), and there is no such part then"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        run_async(*chain(2), **options)


@pytest.mark.parametrize("events", [[["sent", 0]], [["send"]], [["send", -1]], [["send", 0], ["arrive", 1]], [["send", "0"]]])
def test_a_malformed_schedule_names_its_event(events: Any) -> None:
    with pytest.raises(InputError, match=rf"event {len(events) - 1} of the schedule is \[.*\], expected \['send', part\]"):
        Schedule.from_json(events)


def test_ages_of_a_schedule_are_counted_from_sending_to_arrival() -> None:
    method, start = chain(3)
    _, schedule = run_async(method, start, engine=InlineWorkers(seed=3), num_updates=25)
    assert len(schedule.ages) == 25
    arrivals = [k for kind, k in schedule.events if kind == "arrive"]
    assert all(age == 0 for k, age in zip(arrivals, schedule.ages, strict=True) if k == 0)  # nobody is in front of it
    assert any(one != other for one, other in pairwise(schedule.ages))
    assert np.isfinite(schedule.ages).all()
