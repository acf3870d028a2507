"""What every rule promises, and each rule against a twin of lists and loops."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from partwise.checks import InputError
from partwise.serve.h2o import H2O
from partwise.serve.key_norm import KeyNorm
from partwise.serve.random_tokens import RandomTokens
from partwise.serve.rule import EvictionRule
from partwise.serve.scissorhands import Scissorhands
from partwise.serve.sliding_window import SlidingWindow
from partwise.serve.snapkv import SnapKV
from partwise.serve.streaming_llm import StreamingLLM
from partwise.serve.tova import TOVA
from slow_cache import FastLayer, SlowH2O, SlowKeyNorm, SlowLayer, SlowScissorhands, SlowSnapKV, SlowTOVA, SlowWindow
from tolerances import assert_close

TWINS: list[tuple[EvictionRule, type[SlowLayer]]] = [
    (Scissorhands(window=5, recent=3, drop=6), SlowScissorhands),
    (Scissorhands(window=12, recent=3, drop=4), SlowScissorhands),
    (Scissorhands(window=30, recent=2, drop=1), SlowScissorhands),
    (Scissorhands(window=9, recent=2, drop=0.5, num_sinks=3), SlowScissorhands),
    (SlidingWindow(), SlowWindow),
    (SlidingWindow(drop=5), SlowWindow),
    (StreamingLLM(), SlowWindow),
    (StreamingLLM(num_sinks=2, drop=3), SlowWindow),
    (H2O(), SlowH2O),
    (H2O(recent=3, drop=4, num_sinks=1), SlowH2O),
    (TOVA(), SlowTOVA),
    (TOVA(recent=3, drop=4), SlowTOVA),
    (SnapKV(window=4, recent=4, drop=5), SlowSnapKV),
    (SnapKV(window=20, pool=3, recent=2, drop=1), SlowSnapKV),
    (KeyNorm(recent=4), SlowKeyNorm),
    (KeyNorm(recent=4, drop=4), SlowKeyNorm),
]
ALL = [rule for rule, _ in TWINS] + [RandomTokens(recent=2), RandomTokens(recent=2, drop=4)]
BLOCKS = {
    "one by one": [1] * 48,
    "a long prompt": [30] + [1] * 18,
    "blocks": [9, 1, 1, 14, 1, 1, 1, 20, 1],
    "a prompt of the budget": [16] + [1] * 30,
}
BUDGET = 16


def tokens(count: int, *, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one row."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, number, count, dim, generator=generator) for number in (heads, kv_heads, kv_heads))
    return 2 * query, key, value


def run(layer: FastLayer | SlowLayer, blocks: list[int], *, seed: int = 0) -> tuple[Tensor, list[list[list[int]]]]:
    """Attention of all tokens, and what was kept after each block."""
    start, outputs, kept = 0, [], []
    query, key, value = tokens(sum(blocks), seed=seed)
    for length in blocks:
        block = slice(start, start + length)
        outputs.append(layer.add(query[:, :, block], key[:, :, block], value[:, :, block]))
        kept.append(layer.kept())
        start += length
    return torch.cat(outputs, dim=2), kept


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize(("rule", "slow"), TWINS, ids=lambda value: repr(value) if isinstance(value, EvictionRule) else "")
def test_a_rule_keeps_what_its_twin_of_loops_keeps(rule, slow, blocks):
    for seed in range(2):
        outputs, kept = run(FastLayer(rule, budget=BUDGET, score_chunk=3), blocks, seed=seed)
        expected, expected_kept = run(slow(rule, budget=BUDGET), blocks, seed=seed)
        assert kept == expected_kept
        assert_close(outputs, expected, claim="attention over what is kept")


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_the_number_of_queries_scored_at_once_does_not_matter(rule, blocks):
    kept = [run(FastLayer(rule, budget=BUDGET, score_chunk=chunk), blocks)[1] for chunk in (1, 3, 64)]
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_recent_tokens_sinks_and_pinned_ones_never_leave_and_the_budget_holds(rule, blocks):
    if rule.limits(BUDGET).recent + rule.num_sinks + 3 + rule.limits(BUDGET).drop + 1 > BUDGET:
        rule = dataclasses.replace(rule, drop=1)
    _, kept = run(FastLayer(rule, budget=BUDGET, pinned=(1, 5, 7)), blocks)
    seen = 0
    for length, heads in zip(blocks, kept, strict=True):
        seen += length
        stay = {*range(rule.num_sinks), 1, 5, 7, *range(seen - rule.limits(BUDGET).recent, seen)} & set(range(seen))
        for head in heads:
            assert len(set(head)) == len(head) <= BUDGET
            assert stay <= set(head) <= set(range(seen))


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_a_full_cache_lets_exactly_as_many_go_as_the_rule_says(rule):
    _, kept = run(FastLayer(rule, budget=BUDGET), [1] * 48)
    sizes = [len(heads[0]) for heads in kept]
    for before, after in itertools.pairwise(sizes):
        assert after == (before + 1 if before < BUDGET else BUDGET + 1 - rule.limits(BUDGET).drop)


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_the_repr_of_a_rule_makes_it_again(rule):
    assert eval(repr(rule), {type(rule).__name__: type(rule)}) == rule  # noqa: S307 - our own repr


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_a_rule_is_a_value_and_learns_nothing(rule):
    before = repr(rule)
    run(FastLayer(rule, budget=BUDGET), BLOCKS["blocks"])
    assert repr(rule) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.recent = 3


def test_uniform_attention_makes_scissorhands_a_sliding_window():
    fast = FastLayer(Scissorhands(window=8, recent=2, drop=3), budget=BUDGET)
    window = FastLayer(SlidingWindow(drop=3), budget=BUDGET)
    _, key, value = tokens(60)
    for place in range(60):
        block = slice(place, place + 1)
        for layer in (fast, window):
            layer.add(torch.zeros(1, 4, 1, 8), key[:, :, block], value[:, :, block])
        assert fast.kept() == window.kept()


@pytest.mark.parametrize("length", [100, 1000, 4000])
def test_a_long_block_of_uniform_attention_leaves_the_last_tokens(length):
    fast = FastLayer(Scissorhands(window=64, recent=2, drop=3), budget=40)
    _, key, value = tokens(length)
    fast.add(torch.zeros(1, 4, length, 8), key, value)
    assert fast.kept() == [list(range(length - 40, length))] * 2


@pytest.mark.parametrize("blocks", [[1] * 200, [120] + [1] * 80, [60, 60, 60, 20]], ids=repr)
def test_a_head_that_looks_at_ten_tokens_keeps_them(blocks):
    planted = list(range(3, 43, 4))
    query, key, value = tokens(200, heads=1, kv_heads=1)
    query, key = torch.zeros_like(query), torch.zeros_like(key)
    query[..., 0], key[..., planted, 0] = 20.0, 1.0
    layer = FastLayer(Scissorhands(window=40, recent=5, drop=15), budget=10 + 5 + 15 + 1)
    start = 0
    for length in blocks:
        block = slice(start, start + length)
        layer.add(query[:, :, block], key[:, :, block], value[:, :, block])
        start += length
        assert set(planted) & set(range(start)) <= set(layer.kept()[0])


def test_one_huge_weight_protects_a_token_in_h2o_and_not_in_scissorhands():
    length, once, steady = 40, 4, 5
    weights = torch.full((length, length), 0.99)
    weights[:, steady], weights[once + 1, once] = 1.5, 1e6
    weights[once + 2 :, once] = 0.5
    key, query = torch.eye(length)[None, None], weights.log()[None, None] * length**0.5
    for rule, stays in ((Scissorhands(window=30, recent=2, drop=30), False), (H2O(recent=2, drop=30), True)):
        layer = FastLayer(rule, budget=length - 1)
        layer.add(query, key, key)
        assert steady in layer.kept()[0]
        assert (once in layer.kept()[0]) is stays


def test_random_tokens_are_a_fair_sample_that_depends_on_seed_and_head():
    def kept(seed):
        layer = FastLayer(RandomTokens(seed=seed, recent=1), budget=100)
        query, key, value = tokens(1000)
        layer.add(query, key, value)
        return layer.kept()

    assert kept(0) == kept(0)
    assert kept(0) != kept(1)
    assert kept(0)[0] != kept(0)[1]
    means = [sum(head) / len(head) for seed in range(20) for head in kept(seed)]
    assert abs(sum(means) / len(means) - 500) < 20  # standard error of the mean: 289 / sqrt(4000) = 4.6


@pytest.mark.parametrize(("window", "drop", "heads", "length"), [(2000, 100, 130, 300), (700, 700, 64, 800)])
def test_counts_of_long_windows_and_many_heads_do_not_overflow(window, drop, heads, length):
    query, key, value = tokens(length, heads=heads, kv_heads=1)
    query, key = torch.ones_like(query), torch.zeros_like(key)
    key[..., 0, :] = -5.0
    layer = FastLayer(Scissorhands(window=window, recent=2, drop=drop, prompt_window=window), budget=length - 1)
    layer.add(query, key, value)
    assert 0 not in layer.kept()[0]


BAD = [
    (lambda: Scissorhands(window=0), r"window=0 must be an integer of at least 1"),
    (lambda: SnapKV(window=0), r"window=0 must be an integer of at least 1"),
    (lambda: SnapKV(pool=4), r"got pool=4, expected an odd number of neighbours"),
    (lambda: SnapKV(pool=5.0), r"got pool=5\.0, expected an odd number of neighbours"),
    (lambda: RandomTokens(seed="a"), r"seed='a' must be an integer of at least 0"),
    (lambda: SnapKV(pool=0), r"got pool=0, expected an odd number of neighbours"),
    (lambda: Scissorhands(drop=0), r"got drop=0, expected a number of tokens from 1 on, or a share of the budget between 0 and 1\. Try drop=10"),
    (lambda: Scissorhands(drop=1.0), r"got drop=1\.0, expected"),
    (lambda: Scissorhands(drop=0.0), r"got drop=0\.0, expected"),
    (lambda: Scissorhands(drop=float("nan")), r"got drop=nan, expected"),
    (lambda: Scissorhands(drop=True), r"got drop=True, expected"),
    (lambda: Scissorhands(drop="3"), r"got drop='3', expected"),
    (lambda: H2O(recent=-1), r"got recent=-1, expected a number of tokens from 0 on"),
    (lambda: H2O(recent=1.5), r"got recent=1\.5, expected"),
    (lambda: TOVA(num_sinks=-1), r"got num_sinks=-1, expected a number of tokens, 0 or more"),
    (lambda: TOVA(num_sinks=0.5), r"got num_sinks=0\.5, expected a number of tokens"),
    (lambda: TOVA(num_sinks=True), r"got num_sinks=True, expected a number of tokens"),
]


@pytest.mark.parametrize(("make", "text"), BAD, ids=[text for _, text in BAD])
def test_a_rule_refuses_a_bad_setting(make, text):
    with pytest.raises(InputError, match=text):
        make()
