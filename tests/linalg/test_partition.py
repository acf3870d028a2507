"""Claims about dealing units into parts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partwise.linalg.partition import deal, deal_shards, deal_with_overlap, draw, flip, nearest_divisors

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32)


def held(parts: list[np.ndarray]) -> Counter[int]:
    return Counter(unit for part in parts for unit in part.tolist())


def is_sorted_and_distinct(part: np.ndarray) -> bool:
    return part.tolist() == sorted(set(part.tolist()))


@given(size=SIZES, seed=SEEDS, data=st.data())
def test_dealt_units_are_in_exactly_one_part_and_sizes_differ_by_at_most_one(size: int, seed: int, data: st.DataObject):
    num_parts = data.draw(st.integers(1, size))
    parts = deal(size, num_parts, np.random.default_rng(seed))
    assert held(parts) == Counter(range(size))
    assert all(is_sorted_and_distinct(part) for part in parts)
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


@given(size=SIZES, seed=SEEDS, data=st.data())
def test_every_part_has_the_minimum_of_distinct_units_and_no_unit_is_lost(size: int, seed: int, data: st.DataObject):
    num_parts, minimum = data.draw(st.integers(1, size)), data.draw(st.integers(1, size))
    parts = deal(size, num_parts, np.random.default_rng(seed), minimum=minimum)
    assert all(is_sorted_and_distinct(part) for part in parts)
    assert held(parts).keys() == set(range(size))
    equal = [len(part) for part in deal(size, num_parts, np.random.default_rng(seed))]
    assert [len(part) for part in parts] == [max(length, minimum) for length in equal], "not one copy more than the minimum asks for"


@given(size=SIZES, seed=SEEDS, data=st.data())
def test_shards_cover_every_unit_once_and_each_owner_gives_every_part_as_many(size: int, seed: int, data: st.DataObject):
    num_parts = data.draw(st.integers(1, size))
    parts = deal_shards(size, num_parts, [np.random.default_rng((seed, owner)) for owner in range(num_parts)])
    assert held(parts) == Counter(range(size))
    assert all(len(part) for part in parts)
    for shard in np.array_split(np.arange(size), num_parts):
        given_by_owner = [len(np.intersect1d(shard, part)) for part in parts]
        assert max(given_by_owner) - min(given_by_owner) <= 1


@given(size=SIZES, seed=SEEDS, data=st.data())
def test_overlapping_parts_hold_every_unit_as_often_as_any_other_or_once_more(size: int, seed: int, data: st.DataObject):
    counts = data.draw(st.lists(st.integers(1, size), min_size=1, max_size=8))
    parts = deal_with_overlap(size, counts, np.random.default_rng(seed))
    assert [len(part) for part in parts] == counts
    assert all(is_sorted_and_distinct(part) for part in parts)
    times = [held(parts)[unit] for unit in range(size)]
    assert max(times) - min(times) <= 1


def test_every_choice_of_units_is_drawn_equally_often():
    generator = np.random.default_rng(0)
    times = Counter(tuple(draw(5, 2, generator)) for _ in range(10_000))
    assert len(times) == 10
    assert all(abs(number - 1000) < 5 * (1000 * 0.9) ** 0.5 for number in times.values())


def test_each_unit_is_flipped_on_with_the_given_probability_and_one_always_is():
    generator = np.random.default_rng(0)
    draws = [flip(6, 0.3, generator) for _ in range(10_000)]
    assert min(map(len, draws)) >= 1
    chance = 0.3 / (1 - 0.7**6)  # given that at least one is on
    assert np.mean([len(units) for units in draws]) == pytest.approx(6 * chance, rel=0.02)


def test_parts_change_with_the_generator_only():
    same = [[part.tolist() for part in deal(20, 4, np.random.default_rng(seed))] for seed in (1, 1, 2)]
    assert same[0] == same[1]
    assert same[0] != same[2]


@given(size=SIZES, wanted=st.integers(1, 60))
def test_the_nearest_divisors_divide_and_none_is_nearer(size: int, wanted: int):
    nearest = nearest_divisors(size, wanted)
    assert all(size % number == 0 for number in nearest)
    assert all(abs(number - wanted) >= abs(nearest[0] - wanted) for number in range(1, size + 1) if size % number == 0)
