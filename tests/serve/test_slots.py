"""A growing tensor of slots against a list of tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partwise.serve._slots import FIRST, Slots

SHAPES = st.sampled_from([(), (3,), (2, 4)])


@given(data=st.data(), limit=st.integers(1, 90), shape=SHAPES, seed=st.integers(0, 1000))
def test_slots_hold_what_a_plain_tensor_holds(data, limit, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    slots, slow = Slots(limit), None
    for _ in range(data.draw(st.integers(1, 6))):
        new = torch.randn(2, 3, data.draw(st.sampled_from([1, 1, 2, 7, 40, 120])), *shape, generator=generator)
        slots.append(new)
        slow = new if slow is None else torch.cat([slow, new], dim=2)
        assert torch.equal(slots.values, slow)
        if slow.shape[2] > limit or data.draw(st.booleans()):
            keep = data.draw(st.integers(1, min(limit, slow.shape[2])))
            kept = torch.stack([torch.randperm(slow.shape[2], generator=generator)[:keep].sort().values for _ in range(6)]).view(2, 3, keep)
            slots.keep(kept)
            slow = torch.stack([torch.stack([slow[row, head, kept[row, head]] for head in range(3)]) for row in range(2)])
            assert slots.nbytes <= 2 * 3 * limit * slow[0, 0, 0].numel() * 4
        assert torch.equal(slots.values, slow)
        assert slots.num_slots == slow.shape[2]
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4)))
    slots.select_rows(rows)
    assert torch.equal(slots.values, slow[rows])


def test_the_last_slot_takes_the_place_of_the_one_that_leaves():
    slots = Slots(5)
    slots.append(torch.arange(10.0).view(1, 2, 5))
    slots.swap_out(torch.tensor([[[1], [4]]]))
    assert slots.values.tolist() == [[[0, 4, 2, 3], [5, 6, 7, 8]]]
    slots.append(torch.full((1, 2, 1), 9.0))
    assert slots.values.tolist() == [[[0, 4, 2, 3, 9], [5, 6, 7, 8, 9]]]


def test_memory_grows_in_steps_up_to_the_limit_and_is_written_in_place():
    slots, sizes, places = Slots(200), set(), set()
    for step in range(200):
        slots.append(torch.full((1, 1, 1), float(step)))
        sizes.add(slots.nbytes)
        places.add(slots.values.data_ptr())
    assert max(sizes) == 200 * 4
    assert min(sizes) == FIRST * 4
    assert len(places) == len(sizes) < 6
    assert slots.values.flatten().tolist() == list(range(200))


def test_a_block_beyond_the_limit_is_freed_when_a_part_of_it_is_kept():
    slots = Slots(10)
    slots.append(torch.randn(1, 1, 5000))
    assert slots.nbytes == 20000
    slots.keep(torch.arange(8).view(1, 1, 8))
    assert slots.nbytes == 40
    slots.append(torch.randn(1, 1, 300))
    slots.keep(torch.arange(9).view(1, 1, 9))
    assert slots.nbytes == 40


@pytest.mark.parametrize("first", [4, 40])
def test_slots_filled_in_inference_mode_are_writable_outside(first):
    slots = Slots(10)
    with torch.inference_mode():
        slots.append(torch.ones(1, 1, first))
        slots.keep(torch.arange(4).view(1, 1, 4))
        slots.select_rows(torch.tensor([0, 0]))
    slots.append(torch.zeros(2, 1, 2))
    slots.swap_out(torch.zeros(2, 1, 1, dtype=torch.int64))
    assert slots.values.tolist() == [[[0, 1, 1, 1, 0]]] * 2


def test_empty_slots_have_no_rows_to_choose_from():
    slots = Slots(4)
    slots.select_rows(torch.tensor([0]))
    slots.to("cpu")
    assert (slots.nbytes, slots.num_slots) == (0, 0)
