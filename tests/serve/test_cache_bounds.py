"""A budget is a promise: slots and bytes after every call of a layer, memory that is really freed, and reports that add up."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_models import KERNELS, continued, decoder, padded, shared_decoder, stepped, words
from partwise.serve._layer import BudgetedLayer
from partwise.serve.cache import BudgetedCache
from partwise.serve.caches import ScissorhandsCache, SlidingWindowCache
from partwise.serve.h2o import H2O
from partwise.serve.key_norm import KeyNorm
from partwise.serve.random_tokens import RandomTokens
from partwise.serve.scissorhands import Scissorhands
from partwise.serve.sliding_window import SlidingWindow
from partwise.serve.snapkv import SnapKV
from partwise.serve.streaming_llm import StreamingLLM
from partwise.serve.tova import TOVA

RULES = [Scissorhands, SlidingWindow, StreamingLLM, H2O, TOVA, SnapKV, KeyNorm, RandomTokens]


def storages(*owners: object) -> int:
    """Bytes of all memory that tensors reachable from these objects hold, each storage once and single numbers left out."""
    found, todo, done = {}, list(owners), set()
    while todo:
        item = todo.pop()
        if id(item) in done:
            continue
        done.add(id(item))
        if isinstance(item, torch.Tensor) and item.ndim > 0:
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        elif type(item).__module__.startswith("partwise.serve") or type(item).__module__ == "transformers.cache_utils":
            todo += [value for name, value in vars(item).items() if name not in {"rule", "shared", "_shared"}]
    return sum(found.values())


class Watched:
    """A cache whose every layer call is checked against what was promised."""

    def __init__(self, cache: BudgetedCache, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, attend = 0, BudgetedLayer.attend
        promised = cache.max_bytes(rows)

        def checked(layer, *args, **kwargs):
            output = attend(layer, *args, **kwargs)
            self.calls += 1
            assert layer.num_slots <= layer.budget
            assert layer.seen >= layer.num_slots
            assert storages(*cache.layers) <= promised
            return output

        monkeypatch.setattr(BudgetedLayer, "attend", checked)


@st.composite
def tasks(draw):
    """A rule with settings, a budget that they fit into, a prompt of some rows, some turns."""
    recent, sinks, drop = draw(st.integers(0, 6)), draw(st.integers(0, 4)), draw(st.sampled_from([1, 2, 5, 9, 0.3]))
    kind = draw(st.sampled_from(RULES))
    windows = {"window": draw(st.sampled_from([1, 3, 8, 40]))} if kind in {Scissorhands, SnapKV} else {}
    pinned, bits = draw(st.sampled_from([0, 3])), draw(st.sampled_from([None, None, 4, 8]))
    rows = draw(st.integers(1, 3))
    return {
        "rule": kind(recent=recent, num_sinks=sinks, drop=drop, **windows),
        "settings": {"budget": draw(st.integers(20, 40)) + 2 * pinned, "pinned": pinned, "bits": bits, "residual": draw(st.sampled_from([0, 2, 8]))},
        "score_chunk": draw(st.sampled_from([1, 4, 16])),
        "lengths": [draw(st.integers(1, 60)) for _ in range(rows)],
        "turns": draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=2)),
        "beams": draw(st.sampled_from([1, 1, 2])),
        "chunk": draw(st.sampled_from([None, None, 7])),
    }


@given(task=tasks())
@settings(max_examples=25)
def test_the_bytes_that_were_promised_are_never_exceeded(task):
    family = "gemma3" if task["lengths"][0] % 4 == 0 else "llama"
    model, rows = shared_decoder(family), len(task["lengths"]) * task["beams"]
    cache = BudgetedCache(model, task["rule"], score_chunk=task["score_chunk"], **task["settings"])
    with pytest.MonkeyPatch.context() as patch:
        watched = Watched(cache, rows, patch)
        short = padded(*task["lengths"])
        ids, mask = short["input_ids"], short["attention_mask"]
        for turn, (more, new) in enumerate(task["turns"] if task["beams"] == 1 else task["turns"][:1]):
            chunked = {} if task["chunk"] is None or task["beams"] > 1 or turn else {"prefill_chunk_size": task["chunk"]}
            out = continued(model, cache, ids, attention_mask=mask, new=new, num_beams=task["beams"], **chunked)
            grown = out.shape[1] - ids.shape[1]
            assert cache.get_seq_length() == cache.seen == out.shape[1] - 1
            extra = padded(*[1 + (more * length) % 23 for length in task["lengths"]], seed=turn)
            mask = torch.cat([mask, torch.ones(len(mask), grown, dtype=torch.int64), extra["attention_mask"]], dim=1)
            ids = torch.cat([out, extra["input_ids"]], dim=1)
        assert watched.calls > 0
    assert storages(*cache.layers) == cache.nbytes


@pytest.mark.parametrize("rule", [kind() for kind in RULES], ids=repr)
def test_a_cache_takes_no_more_memory_after_ten_budgets_than_after_two(rule):
    model = decoder("llama", max_position_embeddings=2048)
    cache = BudgetedCache(model, rule, budget=64, score_chunk=8)
    sizes = []
    with torch.no_grad():
        for step in range(640):
            model(input_ids=words(1, 1, seed=step), cache=cache)
            sizes.append(storages(*cache.layers))
    assert max(sizes[128:]) <= max(sizes[:128]) <= cache.max_bytes()
    assert cache.report().bytes_full == 640 * 2 * 2 * 2 * 32 * 4


def test_a_token_that_left_is_gone_from_memory_and_not_only_masked():
    model = shared_decoder("llama")
    cache = ScissorhandsCache(model, budget=16, recent=3, drop=4)
    with torch.no_grad():
        model(input_ids=words(1, 400), cache=cache)
    for layer in cache.budgeted:
        assert layer.store.keys.values.untyped_storage().nbytes() == 17 * 2 * 32 * 4
        assert layer.store.values.values.untyped_storage().nbytes() == 17 * 2 * 32 * 4
    assert cache.report().bytes < cache.report().bytes_full / 15


def test_layers_with_a_window_of_their_own_do_not_hold_the_whole_prompt():
    model = shared_decoder("gemma3")
    cache = ScissorhandsCache(model, budget=16, recent=3, drop=4)
    with torch.no_grad():
        model(input_ids=words(1, 400), cache=cache)
    assert cache.layers[0].keys.untyped_storage().nbytes() == 7 * 2 * 32 * 4
    assert storages(*cache.layers) <= cache.max_bytes()
    assert [layer.budget for layer in cache.report().layers] == [None, 16, None, 16]


def test_a_cache_that_nobody_holds_is_freed():
    model = shared_decoder("llama")
    cache = ScissorhandsCache(model, budget=16, recent=3, drop=4)
    continued(model, cache, words(1, 30))
    gone = weakref.ref(cache.layers[0])
    del cache
    gc.collect()
    assert gone() is None


def test_a_cache_does_not_keep_its_model_alive():
    model = decoder("llama")
    cache = ScissorhandsCache(model, budget=16, recent=3, drop=4)
    gone = weakref.ref(model.model.layers[0])
    del model
    gc.collect()
    assert gone() is None
    assert cache.max_bytes() > 0


@pytest.mark.parametrize(("family", "kernel"), KERNELS, ids=[f"{family}-{kernel}" for family, kernel in KERNELS])
def test_a_report_adds_up(family, kernel):
    model = shared_decoder(family, kernel)
    cache = ScissorhandsCache(model, budget=16, recent=3, drop=4)
    empty = cache.report()
    assert (empty.bytes, empty.bytes_full, empty.tokens_seen, empty.evictions, empty.mass_kept) == (0, 0, 0, 0, None)
    continued(model, cache, words(2, 30), new=21)
    report = cache.report()
    assert report.tokens_seen == 50
    assert report.bytes == sum(layer.bytes for layer in report.layers) == cache.nbytes
    assert report.bytes_full == sum(layer.bytes_full for layer in report.layers)
    assert report.max_bytes == cache.max_bytes(2) >= report.bytes
    for layer in report.layers:
        if layer.budget is None:
            assert (layer.slots, layer.evictions, layer.mass_kept) == (7, 0, None)
        else:
            assert layer.evictions == 1 + 20 // 4
            assert layer.slots == 16
            assert 0.0 < layer.mass_kept < 1.0
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    full = [layer.bytes_full for layer in report.layers if layer.budget]
    assert full == [2 * 50 * kv_heads * 2 * 32 * 4] * len(full)


def test_the_mass_that_is_kept_is_that_of_the_last_query_before_an_eviction():
    model, ids = decoder("llama", kernel="eager"), words(1, 30)
    with torch.no_grad():
        full = model(input_ids=ids, output_attentions=True).attentions
    cache = ScissorhandsCache(model, budget=16, recent=3, drop=4)
    with torch.no_grad():
        model(input_ids=ids, cache=cache)
    kept = cache.kept_positions(0)[0].repeat_interleave(2, dim=0)  # (heads, slots)
    expected = full[0][0, :, -1].gather(1, kept).sum(dim=1).mean()
    assert cache.report().layers[0].mass_kept == pytest.approx(float(expected), rel=1e-5)


def test_a_ledger_has_one_part_for_each_token_of_each_layer():
    model, short = shared_decoder("llama"), padded(30, 12)
    cache = ScissorhandsCache(model, budget=16, recent=3, drop=4, pinned=[1])
    continued(model, cache, short["input_ids"], attention_mask=short["attention_mask"], new=5)
    for row, length in enumerate((34, 16)):
        parts = cache.ledger(row=row).parts
        assert len(parts) == 2 * length
        for layer in range(2):
            held = cache.kept_positions(layer)[row]
            mine = [part for part in parts if part.where == f"layer {layer}"]
            for part in mine:
                share = float((held == part.index).any(dim=1).float().mean())
                assert part.score == share
                assert part.status == ("kept" if share else "dropped")
            assert mine[1].score == 1.0
            assert sum(part.bytes for part in mine) <= cache.budgeted[layer].nbytes


def test_positions_are_numbers_of_tokens_in_their_rows():
    model, short = shared_decoder("llama"), padded(30, 5)
    cache = SlidingWindowCache(model, budget=8)
    continued(model, cache, short["input_ids"], attention_mask=short["attention_mask"], new=1)
    assert cache.kept_positions(0)[:, 0].tolist() == [list(range(22, 30)), [-1, -1, -1, 0, 1, 2, 3, 4]]
    assert cache.kept_positions(0).dtype == torch.int64


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("rule", [Scissorhands(recent=3, drop=4), SlidingWindow(), H2O(recent=4)], ids=repr)
def test_pinned_tokens_and_budgets_of_layers_hold_to_the_end(rule, bits):
    model, short = shared_decoder("llama"), padded(40, 11)
    pinned, budgets = [0, 1, 2, 7], [20, 26]
    cache = BudgetedCache(model, rule, budget=budgets, pinned=pinned, bits=bits, residual=2)
    continued(model, cache, short["input_ids"], attention_mask=short["attention_mask"], new=60)
    for layer, budget in enumerate(budgets):
        kept = cache.kept_positions(layer)
        assert kept.shape[2] <= budget
        assert all(set(pinned) <= set(head) for row in kept.tolist() for head in row)
    assert cache.budget == (20, 26)


def test_pinning_a_number_pins_the_first_tokens():
    model, ids = shared_decoder("llama"), words(1, 40)
    first, listed = (SlidingWindowCache(model, budget=12, pinned=pinned) for pinned in (5, [4, 3, 2, 1, 0, 0]))
    assert torch.equal(stepped(model, first, ids, blocks=(20,)), stepped(model, listed, ids, blocks=(20,)))
    assert first.pinned == listed.pinned == (0, 1, 2, 3, 4)
    assert first.kept_positions(0)[0, 0].tolist() == [0, 1, 2, 3, 4, *range(33, 40)]


def test_moving_a_cache_away_and_back_changes_nothing():
    model, ids = shared_decoder("llama"), words(1, 40)
    still, moved = (ScissorhandsCache(model, budget=16, recent=3, drop=4) for _ in range(2))
    with torch.no_grad():
        for start, end in [(0, 25), *((at, at + 1) for at in range(25, 40))]:
            for layer in moved.layers:
                layer.offload()
                layer.prefetch()
            both = [model(input_ids=ids[:, start:end], cache=cache).logits for cache in (still, moved)]
            assert torch.equal(*both)
