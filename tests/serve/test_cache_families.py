"""With a budget that is never reached, every family writes what it writes with transformers' own cache, to the last token."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import DynamicCache, set_seed

from cache_models import FAMILIES, KERNELS, WORDS, continued, decoder, padded, plain, shared_decoder, stepped, words
from partwise.checks import InputError
from partwise.serve._attached import attached
from partwise.serve.caches import (
    H2OCache,
    KeyNormCache,
    RandomTokensCache,
    ScissorhandsCache,
    SlidingWindowCache,
    SnapKVCache,
    StreamingLLMCache,
    TovaCache,
)
from partwise.serve.persistence import persistence_ratio

CACHES = [ScissorhandsCache, SlidingWindowCache, StreamingLLMCache, H2OCache, TovaCache, SnapKVCache, KeyNormCache, RandomTokensCache]
families = pytest.mark.parametrize(("family", "kernel"), KERNELS, ids=[f"{family}-{kernel}" for family, kernel in KERNELS])


def large(model, **settings):
    return ScissorhandsCache(model, budget=100, **settings)


@families
def test_greedy_padded_and_beam_search_are_those_of_a_full_cache(family, kernel):
    model, ids, short = shared_decoder(family, kernel), words(2, 17), padded(17, 6, 11)
    assert torch.equal(continued(model, large(model), ids), plain(model, ids))
    assert torch.equal(
        continued(model, large(model), short["input_ids"], attention_mask=short["attention_mask"]),
        plain(model, short["input_ids"], attention_mask=short["attention_mask"]),
    )
    assert torch.equal(continued(model, large(model), ids, num_beams=3), plain(model, ids, num_beams=3))


@families
def test_logits_of_prompt_blocks_and_steps_have_the_bits_of_a_full_cache(family, kernel):
    model, ids = shared_decoder(family, kernel), words(2, 30)
    for blocks in ((30,), (9, 8), (1,)):
        assert torch.equal(stepped(model, large(model), ids, blocks=blocks), stepped(model, DynamicCache(config=model.config), ids, blocks=blocks))


@families
def test_a_second_turn_continues_as_with_a_full_cache(family, kernel):
    model, cache, other = shared_decoder(family, kernel), None, None
    cache, other = large(model), DynamicCache(config=model.config)
    ids = words(2, 9)
    for turn in range(3):
        ours, theirs = continued(model, cache, ids, new=6), continued(model, other, ids, new=6)
        assert torch.equal(ours, theirs)
        assert cache.get_seq_length() == cache.seen == ours.shape[1] - 1
        ids = torch.cat([ours, words(2, 4, seed=turn)], dim=1)


def test_padding_in_the_middle_of_a_conversation_changes_nothing():
    model, cache, other = shared_decoder("llama"), None, None
    cache, other = large(model), DynamicCache(config=model.config)
    first, second = padded(9, 5), padded(3, 8)
    ids = continued(model, cache, first["input_ids"], attention_mask=first["attention_mask"], new=4)
    assert torch.equal(ids, continued(model, other, first["input_ids"], attention_mask=first["attention_mask"], new=4))
    mask = torch.cat([first["attention_mask"], torch.ones(2, 4, dtype=torch.int64), second["attention_mask"]], dim=1)
    ids = torch.cat([ids, second["input_ids"]], dim=1)
    assert torch.equal(continued(model, cache, ids, attention_mask=mask), continued(model, other, ids, attention_mask=mask))


@pytest.mark.parametrize("make", CACHES)
def test_every_rule_lets_a_text_within_the_budget_alone(make):
    model, short = shared_decoder("llama"), padded(17, 6, 11)
    settings = {"attention_mask": short["attention_mask"], "new": 20}
    cache = make(model, budget=100)
    assert torch.equal(continued(model, cache, short["input_ids"], **settings), plain(model, short["input_ids"], **settings))
    assert cache.report().evictions == 0
    exact = make(model, budget=36, recent=3, drop=2)
    assert torch.equal(continued(model, exact, short["input_ids"], **settings), plain(model, short["input_ids"], **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_chunks_is_that_of_a_full_cache_in_chunks(family):
    model, ids = shared_decoder(family, "eager"), words(2, 23)
    assert torch.equal(continued(model, large(model), ids, prefill_chunk_size=6), plain(model, ids, prefill_chunk_size=6))


def test_several_samples_per_prompt_are_those_of_a_full_cache():
    model, ids = shared_decoder("llama"), words(2, 9)
    found = []
    for run in (lambda **settings: continued(model, large(model), ids, **settings), lambda **settings: plain(model, ids, **settings)):
        set_seed(0)
        found.append(run(do_sample=True, num_return_sequences=3))
    assert found[0].shape[0] == 6
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_copy_of_a_cache_is_a_prompt_that_many_questions_share(family, bits):
    model, prompt = shared_decoder(family), words(1, 12)
    cache = ScissorhandsCache(model, budget=40, recent=4, drop=6, bits=bits)
    with torch.no_grad():
        model(input_ids=prompt, cache=cache)
    answers = {}
    for seed in (1, 2, 1):
        ids = torch.cat([prompt, words(1, 5, seed=seed)], dim=1)
        copied = copy.deepcopy(cache)
        answer = continued(model, copied, ids, new=40)
        assert copied.seen == 56
        assert cache.seen == 12
        assert torch.equal(answers.setdefault(seed, answer), answer)
    assert not torch.equal(answers[1][:, 17:], answers[2][:, 17:])


def test_a_cache_of_a_few_rows_can_be_repeated_and_chosen_from():
    model, ids = shared_decoder("llama"), words(3, 12)
    cache = ScissorhandsCache(model, budget=16, recent=2, drop=5)
    continued(model, cache, ids, new=3)
    for rows in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        chosen = copy.deepcopy(cache)
        chosen.batch_select_indices(rows)
        alone = ScissorhandsCache(model, budget=16, recent=2, drop=5)
        ids_chosen = continued(model, alone, ids[rows], new=3)
        assert torch.equal(chosen.kept_positions(1), alone.kept_positions(1))
        assert torch.equal(continued(model, chosen, ids_chosen, new=9), continued(model, alone, ids_chosen, new=9))
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    assert torch.equal(repeated.kept_positions(0), cache.kept_positions(0).repeat_interleave(2, dim=0))


@families
def test_a_reset_cache_is_as_good_as_new(family, kernel):
    model, ids = shared_decoder(family, kernel), words(1, 20)
    cache = ScissorhandsCache(model, budget=14, recent=3, drop=4)
    first = continued(model, cache, ids, new=30)
    cache.reset()
    assert cache.seen == cache.nbytes == cache.report().bytes == 0
    assert torch.equal(continued(model, cache, ids, new=30), first)
    assert torch.equal(continued(model, ScissorhandsCache(model, budget=14, recent=3, drop=4), ids, new=30), first)


@families
def test_the_attention_of_a_cache_changes_nothing_for_other_calls(family, kernel):
    model, ids = decoder(family, kernel=kernel), words(2, 15)
    before, without = plain(model, ids), model(input_ids=ids, use_cache=False).logits
    large(model)
    assert model.config._attn_implementation == f"partwise_{kernel}"
    assert torch.equal(plain(model, ids), before)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, without)


def test_nothing_of_ours_is_saved_with_a_model(tmp_path):
    model = decoder("llama")
    model.save_pretrained(tmp_path / "before")
    large(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "before" / name).read_text()) == json.loads((tmp_path / "after" / name).read_text())
        assert "partwise" not in (tmp_path / "after" / name).read_text()


@pytest.mark.parametrize(("family", "kernel"), [("llama", "sdpa"), ("gemma3", "eager")])
def test_an_attached_cache_is_used_although_nobody_passes_it(family, kernel):
    model, ids = decoder(family, kernel=kernel), words(1, 20)
    cache, other = (ScissorhandsCache(model, budget=14, recent=3, drop=4) for _ in range(2))
    expected = continued(model, other, ids, new=10)
    with attached(model, cache) as same:
        assert same is model
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=10, do_sample=False), expected)
        with torch.no_grad():
            model(input_ids=words(1, 3))
        assert cache.seen == 20 + 9 + 3
    assert model.config._attn_implementation == kernel
    assert "generate" not in vars(model)
    assert not model._forward_pre_hooks


def test_blocks_of_attached_caches_nest():
    model, ids = decoder("llama"), words(1, 9)
    with attached(model, large(model)) as _:
        outer = large(model)
        with attached(model, outer):
            inner = large(model)
            with attached(model, inner):
                model(input_ids=ids)
                model.generate(input_ids=torch.cat([ids, ids[:, :3]], dim=1), max_new_tokens=1)
            model(input_ids=ids[:, :4])
            model.generate(input_ids=ids[:, :6], max_new_tokens=1)
        assert (inner.seen, outer.seen) == (12, 6)
        assert model.config._attn_implementation == "partwise_sdpa"
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)


def test_a_cache_with_a_budget_that_is_passed_inside_of_attached_is_used():
    model, ids = decoder("llama"), words(1, 9)
    mine, other = large(model), large(model)
    with attached(model, other):
        model(input_ids=ids, cache=mine)
        model.generate(input_ids=torch.cat([ids, ids[:, :3]], dim=1), cache=mine, max_new_tokens=1)
        persistence_ratio(model, ids)
        model(input_ids=ids[:, :4], cache=DynamicCache(config=model.config))
    assert (mine.seen, other.seen) == (12, 4)


def test_the_former_word_of_transformers_still_leads_to_the_cache_with_its_warning():
    model, ids = decoder("llama"), words(1, 9)
    cache = large(model)
    with pytest.warns(FutureWarning, match=r"`past_key_values` is deprecated .* Use `cache` instead"):
        found = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=4)
    assert cache.seen == 12
    assert torch.equal(found, model.generate(input_ids=ids, cache=large(model), max_new_tokens=4))


def test_nothing_is_left_of_an_attached_cache_when_its_block_fails():
    model = decoder("llama")
    with pytest.raises(ZeroDivisionError), attached(model, large(model)):
        raise ZeroDivisionError
    with pytest.raises(InputError, match=r"got a batch of 2 rows"), attached(model, large(model)):
        model(input_ids=words(1, 4))
        model(input_ids=words(2, 4))
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)
    assert not model._forward_pre_hooks


def test_without_a_cache_attached_only_puts_the_attention_back():
    model, ids = decoder("llama"), words(1, 20)
    with attached(model):
        cache = ScissorhandsCache(model, budget=14, recent=3, drop=4)
        continued(model, cache, ids)
        assert model.config._attn_implementation == "partwise_sdpa"
    assert model.config._attn_implementation == "sdpa"


@families
def test_a_model_in_bfloat16_writes_the_same_with_a_large_budget(family, kernel):
    model, ids = decoder(family, kernel=kernel, dtype=torch.bfloat16), words(2, 17)
    assert torch.equal(continued(model, large(model), ids), plain(model, ids))
    small = ScissorhandsCache(model, budget=14, recent=3, drop=4)
    assert continued(model, small, ids, new=30).shape == (2, 47)
    assert all(layer.num_slots <= 14 for layer in small.budgeted)
    assert small.nbytes <= small.max_bytes(2)


def test_texts_of_these_models_are_not_all_alike():
    written = {tuple(plain(shared_decoder(family, kernel), words(1, 17))[0].tolist()) for family, kernel in KERNELS}
    assert len(written) >= 7  # Llama, Mistral and Phi3 are the same arithmetic
    assert all(len(set(ids)) > WORDS // 6 for ids in written)
