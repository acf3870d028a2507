"""Models whose layers differ in size: their caches, whose layers then have different numbers of heads."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cache_models import continued, padded, plain, uneven_decoder, words
from partwise.checks import InputError
from partwise.models.llama import block_class
from partwise.models.uneven import per_layer_blocks
from partwise.models.uneven_files import load_uneven, save_uneven
from partwise.serve._attached import attached
from partwise.serve._held_tokens import PREFIX
from partwise.serve._http_cache import CacheMaker
from partwise.serve.budgets import calibrate_budgets
from partwise.serve.caches import ScissorhandsCache
from partwise.serve.persistence import persistence_ratio
from partwise.serve.scissorhands import Scissorhands

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt-neox"]


def kernels(model) -> set[str]:
    """Names of the attention that the layers run."""
    return {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_within_the_budget_the_text_is_that_of_a_full_cache(family, kernel):
    model, short = uneven_decoder(family, kernel=kernel), padded(17, 6, 11)
    cache = ScissorhandsCache(model, budget=100)
    settings = {"attention_mask": short["attention_mask"], "new": 20}
    assert torch.equal(continued(model, cache, short["input_ids"], **settings), plain(model, short["input_ids"], **settings))
    assert kernels(model) == {PREFIX + kernel}


def test_layers_with_other_groups_of_heads_and_other_neurons_have_a_cache_each_of_its_size():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.2}
    config = LlamaConfig(vocab_size=61, num_hidden_layers=3, num_key_value_heads=2, intermediate_size=48, pad_token_id=0, eos_token_id=None, **sizes)
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = {0: {"num_key_value_heads": 1, "intermediate_size": 16}, 2: {"num_key_value_heads": 4, "intermediate_size": 80}}
    with per_layer_blocks(block_class("llama")):
        model = LlamaForCausalLM(config).eval()
    ids = words(2, 30)
    cache, full = ScissorhandsCache(model, budget=16, recent=3, drop=4), DynamicCache(config=config)
    assert torch.equal(continued(model, ScissorhandsCache(model, budget=60), ids, new=12), continued(model, full, ids, new=12))
    continued(model, cache, ids, new=12)
    report = cache.report()
    assert [cache.kept_positions(layer).shape[:2] for layer in range(3)] == [(2, 1), (2, 2), (2, 4)]
    assert [layer.bytes_full for layer in report.layers] == [keys.nbytes * 2 for keys in (layer.keys for layer in full.layers)]
    assert report.bytes <= cache.max_bytes(2)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_bytes_that_were_promised_are_those_of_each_layer(bits):
    model = uneven_decoder("llama")
    maker = CacheMaker(model=model, rule=Scissorhands(), budget=40, bits=bits)
    cache = maker.new()
    continued(model, cache, words(1, 60), new=60)
    first, second = cache.report().layers
    assert first.bytes < second.bytes
    assert cache.nbytes <= cache.max_bytes() <= maker.bound(cache, num_prompt=60, num_new=60)


def test_attention_is_given_back_to_every_layer():
    model = uneven_decoder("llama")
    with attached(model, ScissorhandsCache(model, budget=100)):
        assert kernels(model) == {"partwise_sdpa"}
        model.generate(words(1, 9), max_new_tokens=4)
    assert kernels(model) == {"sdpa"}


def test_a_model_that_was_saved_and_opened_has_a_cache(tmp_path):
    model = uneven_decoder("llama")
    save_uneven(model, tmp_path / "small")
    opened, ids = load_uneven(tmp_path / "small"), words(2, 30)
    found = [continued(one, ScissorhandsCache(one, budget=16, recent=3, drop=4), ids, new=20) for one in (model, opened)]
    assert torch.equal(*found)


def test_budgets_are_calibrated_whatever_the_heads_of_layers_and_persistence_asks_for_equal_ones():
    model, ids = uneven_decoder("llama"), words(2, 60)
    assert sum(calibrate_budgets(model, ids, average=20, rule=Scissorhands(recent=3, drop=2)).budgets) == 40
    with pytest.raises(InputError, match=r"got a model whose layers have 2 to 4 heads, expected as many in each: .* with calibrate_budgets"):
        persistence_ratio(model, ids)
    assert persistence_ratio(uneven_decoder("gpt-neox"), ids).ratio.shape == (2, 2)
