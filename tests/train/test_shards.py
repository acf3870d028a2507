"""Batches: every row in one shard, the same batches whenever they are asked for, streams that end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from partwise.checks import InputError
from partwise.train._batches import OwnShards, Shards, Stream, batches_of, num_samples_in
from subnet_runs import dataset, loader


class Numbers:
    """A dataset whose rows are their own numbers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def shards(size: int, *, num_parts: int, batch_size: int, shuffle: bool = True, seed: int = 0) -> Shards:
    return Shards(Numbers(size), batch_size, list, shuffle, num_parts, seed)


@given(size=st.integers(4, 40), num_parts=st.integers(1, 4), shuffle=st.booleans(), seed=st.integers(0, 5))
def test_an_epoch_of_all_parts_is_every_row_once(size: int, num_parts: int, shuffle: bool, seed: int):
    found = shards(size, num_parts=num_parts, batch_size=1, shuffle=shuffle, seed=seed)
    rows = []
    for part in range(num_parts):
        own = len(range(part, size, num_parts))
        rows += [row for batch in found.of(part, round_number=1, steps=[own] * num_parts) for row in batch]
    assert sorted(rows) == list(range(size))


@given(steps=st.integers(1, 7), round_number=st.integers(1, 9))
def test_rounds_are_stretches_of_one_long_walk_and_can_be_asked_for_in_any_order(steps: int, round_number: int):
    late, walk = shards(11, num_parts=2, batch_size=3), shards(11, num_parts=2, batch_size=3)
    asked = late.of(1, round_number=round_number, steps=(1, steps))
    everything = walk.of(1, round_number=1, steps=(1, steps * round_number))
    assert asked == everything[-steps:]
    assert late.of(1, round_number=1, steps=(1, steps)) == everything[:steps]


def test_every_epoch_has_an_order_of_its_own_and_unshuffled_data_keep_theirs():
    drawn = shards(12, num_parts=2, batch_size=6)
    first, second = drawn.of(0, round_number=1, steps=(2, 2))
    assert first != second
    assert sorted(first) == sorted(second)
    read = shards(12, num_parts=2, batch_size=6, shuffle=False)
    assert read.of(1, round_number=1, steps=(2, 2)) == [[1, 3, 5, 7, 9, 11]] * 2


def test_a_worker_elsewhere_reads_the_same_batches():
    here = shards(20, num_parts=3, batch_size=4)
    expected = here.of(2, round_number=2, steps=(3, 3, 3))
    assert copy.deepcopy(here).of(2, round_number=2, steps=(3, 3, 3)) == expected


def test_a_stream_is_read_in_order_and_dealt_to_the_parts():
    stream = Stream(range(100))
    assert [stream.of(part, round_number=1, steps=(2, 3)) for part in (0, 1)] == [[0, 1], [2, 3, 4]]
    assert stream.of(0, round_number=1, steps=(2, 3), most=1) == [0]
    assert stream.of(1, round_number=3, steps=(2, 3)) == [12, 13, 14]


def test_a_sample_takes_from_every_part_and_is_always_the_same():
    found = shards(24, num_parts=3, batch_size=4)
    assert found.sample(4) == found.sample(4) == [found.of(k % 3, round_number=1, steps=(2, 2, 2))[k // 3] for k in range(4)]
    assert len(found.sample(100)) == 6, "no more than an epoch"
    own = OwnShards((shards(8, num_parts=1, batch_size=4), shards(8, num_parts=1, batch_size=4, seed=1)))
    assert own.sample(2) == [own.of(part, round_number=1, steps=(1, 1))[0] for part in (0, 1)]
    stream = Stream(range(100))
    stream.of(0, round_number=1, steps=(2, 3))
    assert (stream.sample(3), stream.sample(100)) == ([0, 1, 2], list(range(50))), "however much has been read"


def test_a_list_is_read_again_and_an_iterator_that_ends_is_an_error():
    assert Stream([1, 2, 3]).of(0, round_number=2, steps=(4,)) == [2, 3, 1, 2]
    with pytest.raises(InputError, match=r"the loader ended after 3 batches, in round 2, expected 2 for every round. Pass a DataLoader or a list") as caught:
        Stream(iter([1, 2, 3])).of(0, round_number=2, steps=(2,))
    assert caught.value.code == "loader-ended"
    with pytest.raises(InputError, match="the loader ended after 0 batches"):
        Stream([]).of(0, round_number=1, steps=(2,))


class Counting(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(10))


@pytest.mark.parametrize(
    ("given_loader", "kind"),
    [
        (loader(), Shards),
        (DataLoader(dataset(), batch_size=4), Shards),
        ([loader(), loader()], OwnShards),
        ([1, 2], Stream),
        (DataLoader(Counting(), batch_size=2), Stream),
        (DataLoader(dataset(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 64, 64)), Stream),
    ],
    ids=["shuffled", "in order", "one per part", "list", "iterable dataset", "own sampler"],
)
def test_a_loader_is_dealt_where_its_order_is_ours_to_choose(given_loader: Any, kind: type):
    assert isinstance(batches_of(given_loader, num_parts=2, seed=0), kind)


@pytest.mark.parametrize(
    ("given_loader", "code", "text"),
    [
        ([loader()], "loaders-per-part", "got 1 loaders for 2 parts"),
        ([loader(), DataLoader(Counting())], "loaders-per-part", "reads a stream"),
        (DataLoader(dataset(1)), "too-few-rows", "got 1 rows for 2 parts"),
        (None, "no-loader", "got a NoneType as loader"),
    ],
)
def test_loaders_that_do_not_suit_are_refused(given_loader: Any, code: str, text: str):
    with pytest.raises(InputError, match=text) as caught:
        batches_of(given_loader, num_parts=2, seed=0)
    assert caught.value.code == code


def test_rows_of_a_batch_are_counted_in_every_form():
    rows = torch.ones(5, 2)
    assert [num_samples_in(batch) for batch in (rows, (rows, rows), {"input_ids": rows}, [rows])] == [5] * 4


def test_a_sample_of_a_stream_is_the_same_whenever_it_is_asked_for():
    early, late = Stream([0, 1, 2, 3]), Stream([0, 1, 2, 3])
    assert early.sample(3) == [0, 1, 2]
    rounds = [stream.of(0, round_number=number, steps=(3,)) for stream in (early, late) for number in (1, 2)]
    assert rounds == [[0, 1, 2], [3, 0, 1]] * 2
    assert late.sample(3) == [0, 1, 2]
    assert late.sample(9) == early.sample(9) == [0, 1, 2, 3]
