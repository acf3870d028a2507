"""Claims about a store whose older slots are in 4 or 8 bits."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from partwise.checks import InputError
from partwise.serve import ScissorhandsCache, _packed_store
from partwise.serve._packed_store import PackedStore
from partwise.serve._packing import Packed, pack, pair_bytes, unpack
from tiny import tiny_llama

BITS = pytest.mark.parametrize("bits", [4, 8])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def tokens(number: int, *, batch: int = 2, heads: int = 3, dim: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys and values of new tokens, (2, batch, heads, number, dim)."""
    return torch.randn(2, batch, heads, number, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def store_of(pairs: Tensor, *, bits: int = 4, residual: int = 4, limit: int = 100) -> PackedStore:
    store = PackedStore(limit, bits=bits, residual=residual)
    store.append(*pairs)
    store.settle()
    return store


def held(store: PackedStore) -> Tensor:
    return torch.stack(store.read())


def lossy(pairs: Tensor, bits: int) -> Tensor:
    return unpack(pack(pairs, bits), pairs.dtype)


def some_of(slots: int, *, keep: int, recent: int, batch: int, heads: int, seed: int) -> Tensor:
    """Slots that each head keeps, the last ``recent`` among them."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(batch, heads, slots - recent, generator=generator).argsort(-1)[..., : keep - recent]
    return torch.cat([chosen, torch.arange(slots - recent, slots).expand(batch, heads, recent)], -1).sort(-1).values


def at(pairs: Tensor, kept: Tensor) -> Tensor:
    index = kept[None, ..., None].expand(2, *kept.shape, pairs.shape[-1])
    return pairs.gather(3, index)


class SlowStore:
    """Every token of every head in a list of its own: as it came, as it is when packed alone, and whether it has been packed."""

    def __init__(self, *, bits: int) -> None:
        self.bits = bits
        self.heads: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        self.done: dict[tuple[int, int], list[bool]] = {}

    def append(self, pairs: Tensor) -> None:
        _, batch, heads, new, _ = pairs.shape
        for row, head, slot in torch.cartesian_prod(torch.arange(batch), torch.arange(heads), torch.arange(new)).tolist():
            pair = pairs[:, row, head, slot]
            self.heads.setdefault((row, head), []).append((pair, lossy(pair[:, None, None, None], self.bits).flatten(1)))
            self.done.setdefault((row, head), []).append(False)

    def keep(self, kept: Tensor) -> None:
        for row, head in self.heads:
            for lists in (self.heads, self.done):
                lists[row, head] = [lists[row, head][number] for number in kept[row, head].tolist()]

    def check(self, read: Tensor, *, packed: int, exact: int) -> None:
        """The first ``packed`` slots at least are packed, the last ``exact`` at least are not, and no slot was packed before and is not now."""
        for (row, head), slots in self.heads.items():
            for number, (pair, alone) in enumerate(slots):
                now, left = read[:, row, head, number], len(slots) - number
                is_packed = self.done[row, head][number] or not torch.equal(now, pair)
                assert torch.equal(now, alone if is_packed else pair), "a vector is what it was, or packed once"
                assert is_packed or number >= packed
                assert not is_packed or left > exact
                self.done[row, head][number] = is_packed


@BITS
@DTYPES
def test_the_last_slots_are_as_they_came_and_older_ones_are_packed_alone(bits: int, dtype: torch.dtype):
    pairs = tokens(20, dtype=dtype)
    store = store_of(pairs, bits=bits, residual=6)
    read = held(store)
    assert read.dtype == dtype
    assert read.shape == pairs.shape
    assert torch.equal(read[:, :, :, 16:], pairs[:, :, :, 16:]), "two of six are packed early"
    assert torch.equal(read[:, :, :, :16], lossy(pairs[:, :, :, :16], bits))
    assert torch.equal(store.read_keys(), read[0])


@BITS
@pytest.mark.parametrize(("limit", "residual", "most"), [(200, 8, 20), (200, 1, 77), (200, 0, 78), (20, 19, 1)])
def test_while_tokens_come_one_by_one_they_are_packed_four_at_once_where_that_fits(
    bits: int, limit: int, residual: int, most: int, monkeypatch: pytest.MonkeyPatch
):
    packed, store = count_packed(monkeypatch), PackedStore(limit, bits=bits, residual=residual)
    for step in range(min(78, limit)):
        store.append(*tokens(1, seed=step))
        store.settle()
        assert residual - 3 <= store._tail.shape[3] <= residual or store.num_slots < residual
    assert len(packed) <= most
    assert sum(packed) >= min(78, limit) - residual


@BITS
def test_nothing_is_packed_before_settle(bits: int):
    store = PackedStore(20, bits=bits, residual=4)
    pairs = tokens(50)
    store.append(*pairs)
    assert torch.equal(held(store), pairs)
    assert store.num_slots == 50


@BITS
def test_a_prompt_longer_than_the_limit_is_cut_down_before_it_is_packed(bits: int, monkeypatch: pytest.MonkeyPatch):
    packed = count_packed(monkeypatch)
    store, pairs = PackedStore(21, bits=bits, residual=4), tokens(50)
    store.append(*pairs)
    kept = some_of(50, keep=20, recent=4, batch=2, heads=3, seed=1)
    store.keep(kept)
    assert torch.equal(held(store), at(pairs, kept))
    store.settle()
    assert packed == [16]
    assert torch.equal(held(store)[:, :, :, :16], lossy(at(pairs, kept)[:, :, :, :16], bits))


def count_packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of slots of every call of `pack`."""
    numbers: list[int] = []

    def counting(pairs: Tensor, bits: int) -> Packed:
        numbers.append(pairs.shape[3])
        return pack(pairs, bits)

    monkeypatch.setattr(_packed_store, "pack", counting)
    return numbers


@BITS
def test_keep_copies_codes_and_packs_nothing_again(bits: int, monkeypatch: pytest.MonkeyPatch):
    pairs = tokens(40)
    store = store_of(pairs, bits=bits, residual=4)
    before = held(store)
    monkeypatch.setattr(_packed_store, "pack", None)
    kept = some_of(40, keep=15, recent=4, batch=2, heads=3, seed=2)
    codes = store._packed.codes.clone()
    store.keep(kept)
    assert store.num_slots == 15
    assert torch.equal(held(store), at(before, kept))
    index = kept[None, :, :, :11, None].expand(len(codes), 2, 3, 11, 32)
    assert torch.equal(store._packed.codes[:, :, :, :11], codes.gather(3, index))


@BITS
def test_a_hundred_evictions_leave_a_token_as_it_was_packed_first(bits: int):
    store = store_of(tokens(12, dtype=torch.bfloat16), bits=bits, residual=2, limit=13)
    first = held(store)[:, :, :, 0].clone()
    for step in range(100):
        store.append(*tokens(1, seed=step, dtype=torch.bfloat16))
        store.keep(torch.cat([torch.tensor([0]), torch.arange(2, 13)]).expand(2, 3, 12))
        store.settle()
    assert torch.equal(held(store)[:, :, :, 0], first)


@BITS
@settings(max_examples=60)
@given(data=st.data(), residual=st.integers(0, 6), budget=st.integers(8, 14))
def test_any_course_of_blocks_and_evictions_holds_what_a_loop_over_tokens_holds(bits: int, data: Any, residual: int, budget: int):
    store, slow = PackedStore(budget + 1, bits=bits, residual=residual), SlowStore(bits=bits)
    for step, new in enumerate(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))):
        pairs = tokens(new, batch=2, heads=2, seed=step)
        store.append(*pairs)
        slow.append(pairs)
        slow.check(held(store), packed=0, exact=new)
        if store.num_slots > budget:
            keep = data.draw(st.integers(max(residual, 1), budget))
            kept = some_of(store.num_slots, keep=keep, recent=min(residual, store.num_slots), batch=2, heads=2, seed=step)
            store.keep(kept)
            slow.keep(kept)
        store.settle()
        slow.check(held(store), packed=store.num_slots - residual, exact=max(residual - 3, 0) if residual < store.num_slots else 0)
        assert store.num_slots <= budget
        assert store.nbytes <= bound(store, batch=2, heads=2)


def bound(store: PackedStore, *, batch: int, heads: int, dim: int = 32, itemsize: int = 4) -> int:
    sizes = {"batch_size": batch, "num_heads": heads, "dim": dim, "value_dim": dim, "itemsize": itemsize}
    return PackedStore.bound(limit=store.limit, **sizes, bits=store.bits, residual=store.residual)


@BITS
@settings(max_examples=60)
@given(seed=st.integers(0, 1000), dropped=st.integers(1, 6))
def test_recent_slots_may_leave_some_heads_and_the_others_are_packed_once_and_early(bits: int, seed: int, dropped: int):
    """Padding among the last tokens of a row leaves first; the other rows keep all of theirs."""
    store = store_of(tokens(30), bits=bits, residual=8, limit=31)
    store.append(*tokens(1, seed=9))
    before, exact = held(store), torch.cat([tokens(30), tokens(1, seed=9)], 3)
    kept = some_of(31, keep=30 - dropped, recent=0, batch=2, heads=3, seed=seed)
    store.keep(kept)
    store.settle()
    after, either = held(store), torch.stack([at(before, kept), lossy(at(exact, kept), bits)])
    assert bool((after == either).all(-1).any(0).all()), "each vector is what it was, or is packed for the first time"
    for more in range(12):
        store.append(*tokens(1, seed=more))
        if store.num_slots > 30:
            store.keep(torch.arange(1, store.num_slots).expand(2, 3, -1))
        store.settle()
        assert store.nbytes <= bound(store, batch=2, heads=3)


@BITS
def test_empty_slots_may_come_first_in_any_order(bits: int):
    store = store_of(tokens(30), bits=bits, residual=8)
    before = held(store)
    kept = torch.arange(10, 30).repeat(2, 3, 1)
    kept[0, :, :3] = torch.tensor([29, 4, 27])
    store.keep(kept)
    assert torch.equal(held(store)[:, 1], before[:, 1, :, 10:])
    assert torch.equal(held(store)[:, 0, :, 3:15], before[:, 0, :, 13:25])


@BITS
@DTYPES
@pytest.mark.parametrize(("limit", "residual"), [(40, 8), (300, 16), (9, 8), (5, 8), (50, 0)])
def test_bytes_are_those_of_the_formula_and_never_above_the_bound(bits: int, dtype: torch.dtype, limit: int, residual: int):
    store = PackedStore(limit, bits=bits, residual=residual)
    most = bound(store, batch=2, heads=3, itemsize=dtype.itemsize)
    seen = []
    for step in range(limit):
        store.append(*tokens(1, seed=step, dtype=dtype))
        store.settle()
        seen.append(store.nbytes)
    assert max(seen) == seen[-1] == most
    num_recent = min(limit, residual)
    assert most == 2 * 3 * ((limit - num_recent) * pair_bytes(32, bits) + num_recent * 2 * 32 * dtype.itemsize)


@BITS
def test_bytes_stay_at_the_bound_while_tokens_come_and_go(bits: int):
    store = PackedStore(33, bits=bits, residual=4)
    for step in range(120):
        store.append(*tokens(1, seed=step))
        if store.num_slots > 32:
            store.keep(some_of(33, keep=17, recent=4, batch=2, heads=3, seed=step))
        store.settle()
        assert store.num_slots <= 32
        assert store.nbytes <= bound(store, batch=2, heads=3)


def test_four_bits_hold_the_same_tokens_in_less_than_a_third_of_bfloat16():
    sizes = {"batch_size": 1, "num_heads": 8, "dim": 128, "value_dim": 128, "itemsize": 2}
    full = 8 * 1024 * 2 * 128 * 2
    assert full / PackedStore.bound(limit=1024, **sizes, bits=4, residual=0) == pytest.approx(3.56, abs=0.01)
    assert full / PackedStore.bound(limit=1024, **sizes, bits=4, residual=16) > 3.4


@BITS
def test_adding_a_token_moves_no_older_one(bits: int):
    store = store_of(tokens(40), bits=bits, residual=4, limit=200)
    memory = [part.data_ptr() for part in store._packed]
    for step in range(20):
        store.append(*tokens(1, seed=step))
        store.settle()
    assert [part.data_ptr() for part in store._packed] == memory


@BITS
def test_beams_take_their_rows_along_and_do_not_share_memory(bits: int):
    pairs = tokens(20, batch=3)
    store = store_of(pairs, bits=bits, residual=4)
    before = held(store)
    rows = torch.tensor([2, 0, 0, 1])
    store.select_rows(rows)
    assert torch.equal(held(store), before[:, rows])
    store.append(*tokens(8, batch=4, seed=5))
    store.settle()
    kept = some_of(28, keep=10, recent=4, batch=4, heads=3, seed=3)
    expected = at(held(store), kept)
    store.keep(kept)
    assert torch.equal(held(store), expected)


@BITS
def test_rows_are_selected_before_anything_is_packed_too(bits: int):
    pairs = tokens(3)
    store = store_of(pairs, bits=bits, residual=4)
    store.select_rows(torch.tensor([1, 1]))
    assert torch.equal(held(store), pairs[:, [1, 1]])
    assert store._packed is None


@BITS
def test_a_store_moves_between_devices_as_a_whole(bits: int):
    store = store_of(tokens(20), bits=bits)
    store.to("meta")
    assert {tensor.device.type for tensor in (store._tail, *store._packed)} == {"meta"}


@BITS
def test_a_store_made_under_inference_mode_goes_on_outside_of_it(bits: int):
    with torch.inference_mode():
        store = store_of(tokens(20), bits=bits)
        store.select_rows(torch.tensor([0, 1]))
    for step in range(100):
        store.append(*tokens(1, seed=step))
        store.settle()
    store.keep(some_of(120, keep=30, recent=4, batch=2, heads=3, seed=1))
    assert store.num_slots == 30


@BITS
def test_a_graph_of_gradients_is_not_kept_alive(bits: int):
    store = PackedStore(50, bits=bits, residual=4)
    for step in range(3):
        store.append(*tokens(8, seed=step).requires_grad_())
        store.settle()
    assert not held(store).requires_grad


@pytest.mark.parametrize(("bits", "most"), [(8, 3e-3), (4, 4e-2)])
def test_a_model_answers_nearly_the_same_from_packed_keys_and_values(bits: int, most: float):
    model = tiny_llama(hidden_size=64, max_position_embeddings=128)  # heads of 32
    ids = torch.randint(24, (2, 60), generator=torch.Generator().manual_seed(0))
    cache = ScissorhandsCache(model, budget=100, bits=bits, residual=4)
    with torch.no_grad():
        full = model(ids).logits
        packed = torch.cat([model(ids[:, start : start + 4], cache=cache).logits for start in range(0, 60, 4)], 1)
    errors = (packed - full).norm(dim=-1) / full.norm(dim=-1)  # (batch, tokens)
    assert float(errors[:, :4].max()) < 1e-5
    assert 0 < float(errors.mean()) < most
    assert cache.report().bytes <= cache.max_bytes(2)


def test_slots_are_in_the_order_in_which_they_came_for_every_head():
    pairs = tokens(30)
    store = PackedStore(100, bits=8, residual=5)
    for start in range(0, 30, 3):
        store.append(*pairs[:, :, :, start : start + 3])
        store.settle()
    assert float((held(store) - pairs).abs().max()) < 0.02


def test_what_cannot_be_packed_is_refused_before_the_first_token():
    with pytest.raises(InputError, match=r"got keys of 64 and values of 32 entries per head, expected as many.*Leave out bits\.") as refused:
        PackedStore(9, bits=4, residual=2).append(torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 32))
    assert refused.value.code == "keys-values-differ"
    with pytest.raises(InputError, match=r"got keys and values of 20 entries per head, expected a multiple of 32"):
        PackedStore(9, bits=4, residual=2).append(torch.zeros(1, 1, 1, 20), torch.zeros(1, 1, 1, 20))
    with pytest.raises(InputError, match=r"residual=-1 must be an integer of at least 0"):
        PackedStore(9, bits=4, residual=-1)
