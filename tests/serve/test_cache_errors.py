"""What a cache with a budget refuses, with the words that say what to do, and what state it leaves behind."""

from __future__ import annotations

import types

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

import partwise.serve._attention as attention_module
from cache_models import continued, decoder, padded, shared_decoder, words
from partwise.checks import InputError, RunError
from partwise.serve._attached import attached
from partwise.serve.cache import BudgetedCache
from partwise.serve.caches import H2OCache, ScissorhandsCache, SlidingWindowCache, StreamingLLMCache
from partwise.serve.scissorhands import Scissorhands

SMALL = {"budget": 12, "recent": 3, "drop": 4}
SETTINGS = [
    (
        {"budget": 7, "recent": 3, "drop": 4},
        "cache-budget",
        r"got a budget of 7 tokens, expected at least 8: 3 recent, 0 pinned, and 4 that may leave",
    ),
    (
        {"budget": 12, "pinned": 5, "recent": 3, "drop": 4},
        "cache-budget",
        r"expected at least 13: 3 recent, 5 pinned, .* Raise budget, or lower recent",
    ),
    ({"budget": 12, "pinned": [90], "num_sinks": 4, "recent": 3, "drop": 4}, "cache-budget", r"expected at least 13: 3 recent, 5 pinned"),
    ({"budget": 12, "recent": 3, "drop": 12}, "cache-budget", r"expected at least 16"),
    ({"budget": 12, "recent": 0.9, "drop": 0.5}, "cache-budget", r"expected at least 18: 11 recent, 0 pinned, and 6 that"),
    ({"budget": 20, "recent": 3, "drop": 4, "bits": 8}, "cache-budget", r"expected at least 21: 16 recent"),
    ({"budget": 0}, "cache-budget", r"got a budget of 0 tokens, expected at least"),
    ({"budget": -3}, "cache-budget", r"got a budget of -3, expected a number of tokens, or a list"),
    ({"budget": "256"}, "cache-budget", r"got a budget of '256', expected a number of tokens, or a list of one for each layer\. Try budget=256"),
    ({"budget": 25.6}, "cache-budget", r"got a budget of 25\.6, expected a number of tokens"),
    ({"budget": [20, 20, 20]}, "cache-budget", r"got 3 budgets, expected 2, one for each layer with full attention"),
    ({"budget": [20]}, "cache-budget", r"got 1 budgets, expected 2"),
    ({"budget": [60, 7], "recent": 3, "drop": 4}, "cache-budget", r"got a budget of 7 tokens"),
    ({"budget": [20, 20.0]}, "cache-budget", r"got a budget of \[20, 20\.0\]"),
    ({"budget": 40, "drop": 40}, "cache-budget", r"expected at least 51"),
    (
        {"budget": 40, "drop": 1.0},
        "bad-cache-setting",
        r"got drop=1\.0, expected a number of tokens from 1 on, or a share of the budget between 0 and 1",
    ),
    ({"budget": 40, "window": 0}, "below-minimum", r"window=0 must be an integer of at least 1"),
    ({"budget": 40, "windw": 9}, None, r"windw"),
    ({"budget": 40, "bits": 2}, "bad-cache-setting", r"got bits=2, expected 4, 8 or None"),
    ({"budget": 40, "bits": True}, "bad-cache-setting", r"got bits=True, expected 4, 8 or None"),
    ({"budget": 40, "bits": "4"}, "bad-cache-setting", r"got bits='4', expected 4, 8 or None"),
    ({"budget": 40, "bits": 8.0}, "bad-cache-setting", r"got bits=8\.0, expected 4, 8 or None"),
    ({"budget": 40, "score_chunk": 0}, "bad-cache-setting", r"got score_chunk=0 and residual=16, expected at least 1 and at least 0"),
    ({"budget": 40, "residual": -1}, "bad-cache-setting", r"got score_chunk=None and residual=-1"),
    ({"budget": 40, "pinned": -1}, "bad-cache-setting", r"got pinned=-1, expected how many first tokens stay, or their numbers from 0 on"),
    ({"budget": 40, "pinned": [3, -1]}, "bad-cache-setting", r"got pinned=\[3, -1\]"),
    ({"budget": 40, "pinned": "all"}, "bad-cache-setting", r"got pinned='all'"),
    ({"budget": 40, "pinned": [1.5]}, "bad-cache-setting", r"got pinned=\[1\.5\]"),
]


@pytest.mark.parametrize(("settings", "code", "text"), SETTINGS, ids=[repr(settings) for settings, _, _ in SETTINGS])
def test_a_bad_setting_is_refused_with_the_number_that_would_do(settings, code, text):
    model = decoder("llama")
    with pytest.raises(InputError, match=text) as caught:
        ScissorhandsCache(model, **settings)
    assert code in {None, caught.value.code}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("rule", "text"), [(Scissorhands, r"got rule=<class"), ("h2o", r"got rule='h2o', expected a rule with its settings, such as Scissorhands\(\)")]
)
def test_what_is_no_rule_is_refused(rule, text):
    with pytest.raises(InputError, match=text):
        BudgetedCache(shared_decoder("llama"), rule, budget=40)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "my/llama", None], ids=["module", "path", "none"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(InputError, match=rf"got {type(model).__name__}, which cannot have a cache with a budget: it is no model of transformers"):
        ScissorhandsCache(model, budget=40)


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"batch_size": -1}, {"num_beams": 0}, {"batch_size": 1.5}])
def test_a_bound_for_no_rows_is_refused(settings):
    with pytest.raises(InputError, match=r"(batch_size|num_beams)=.* must be an integer of at least 1"):
        ScissorhandsCache(shared_decoder("llama"), **SMALL).max_bytes(**settings)


def test_the_smallest_budget_that_is_named_is_enough():
    model = shared_decoder("llama")
    for settings in ({"recent": 3, "drop": 4}, {"recent": 3, "drop": 4, "pinned": 5}, {"recent": 0, "drop": 1}):
        with pytest.raises(InputError) as caught:
            ScissorhandsCache(model, budget=1, **settings)
        least = int(str(caught.value).split("expected at least ")[1].split(":")[0])
        cache = ScissorhandsCache(model, budget=least, **settings)
        continued(model, cache, words(1, 20), new=20)
        assert cache.report().evictions > 0


def test_heads_that_cannot_be_packed_are_refused():
    model = decoder("llama", head_dim=24)
    with pytest.raises(InputError, match=r"got heads of 24 dimensions with bits=4, expected a multiple of 32 .* Leave bits out"):
        ScissorhandsCache(model, budget=60, bits=4)


def test_a_model_whose_layers_all_have_a_window_is_refused():
    model = decoder("mistral", sliding_window=8)
    with pytest.raises(InputError, match=r"all its layers are of type sliding_attention\. .* Their memory is bounded already: use no cache of ours"):
        ScissorhandsCache(model, budget=40)


def test_an_encoder_and_decoder_is_refused():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    with pytest.raises(InputError, match=r"got T5ForConditionalGeneration, .*: it has an encoder and a decoder\. Expected a decoder such as Llama"):
        ScissorhandsCache(T5ForConditionalGeneration(T5Config(**sizes)), budget=40)


def test_layers_that_share_keys_are_refused():
    for name, value in (("kv_sharing_modes", ["a"]), ("num_kv_shared_layers", 1)):
        model = decoder("llama")
        setattr(model.config, name, value)
        with pytest.raises(InputError, match=r"some of its layers share keys and values"):
            ScissorhandsCache(model, budget=40)


def test_layers_of_unknown_kinds_are_refused():
    model = decoder("gemma3")
    model.config.layer_types = ["hybrid", *model.config.layer_types[1:]]
    with pytest.raises(InputError, match=r"it has layers of type hybrid"):
        ScissorhandsCache(model, budget=40)


def test_latent_attention_is_refused_and_nothing_is_left():
    sizes = {
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 24,
        "n_routed_experts": 4,
        "n_group": 1,
    }
    config = transformers.DeepseekV3Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        **sizes,
        topk_group=1,
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    with pytest.raises(InputError, match=r"got DeepseekV3ForCausalLM, which cannot have a cache with a budget: layers \[0\] did not use the cache"):
        ScissorhandsCache(model, budget=40)
    assert model.config._attn_implementation == "sdpa"


class OddHeads(transformers.LlamaForCausalLM):
    """Has heads of another size than its configuration says."""


def test_heads_that_are_not_as_configured_are_refused():
    model = OddHeads(decoder("llama").config).eval()
    model.config.head_dim = 64
    text = r"a token has keys and values of shape \[\(1, 2, 1, 32\), \(1, 2, 1, 32\)\], not \(1, 2, 1, 64\) as configured"
    with pytest.raises(InputError, match=text):
        ScissorhandsCache(model, budget=40)


@pytest.mark.parametrize("name", ["flex_attention", "paged|sdpa"])
def test_other_kinds_of_attention_are_refused(name):
    model = decoder("llama")
    model.config._attn_implementation_internal = name
    with pytest.raises(
        InputError, match=r"got a model whose attention is .*, expected one of eager, sdpa.* Call model\.set_attn_implementation\('sdpa'\)"
    ):
        ScissorhandsCache(model, budget=40)


def test_a_model_with_attention_of_its_own_is_refused():
    model = decoder("llama")
    model._supports_attention_backend = False
    with pytest.raises(InputError, match=r"its attention does not go through transformers' AttentionInterface"):
        ScissorhandsCache(model, budget=40)


class PassesBy(transformers.LlamaForCausalLM):
    """Forgets the cache on the way."""

    def forward(self, cache=None, **kwargs):
        return super().forward(cache=DynamicCache(config=self.config), **kwargs)


class Fails(transformers.LlamaForCausalLM):
    """Cannot run."""

    def forward(self, **kwargs):
        raise NotImplementedError("no such thing")


@pytest.mark.parametrize(
    ("kind", "text"), [(PassesBy, r"layers \[0, 1\] did not use the cache"), (Fails, r"one token through it failed with NotImpl.*no such")]
)
def test_a_model_that_does_not_use_the_cache_is_refused_before_the_first_token(kind, text):
    model = kind(decoder("llama").config)
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(InputError, match=text):
        ScissorhandsCache(model, budget=40)
    assert model.config._attn_implementation == "sdpa"
    assert [module.training for module in model.modules()] == before


def test_a_model_without_eager_attention_is_told_so(monkeypatch):
    model = decoder("llama", kernel="eager")
    home = types.ModuleType("home_without_eager")
    monkeypatch.setitem(attention_module.sys.modules, "home_without_eager", home)
    module = type("Odd", (nn.Module,), {"__module__": "home_without_eager"})()
    with pytest.raises(InputError, match=r"got Odd, .*: its module has no function eager_attention_forward.* attn_implementation='sdpa'"):
        attention_module._base("eager", module)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": None}], ids=["prompt lookup", "assistant"])
@pytest.mark.parametrize("budget", [12, 100])
def test_assisted_decoding_is_refused(settings, budget):
    model = shared_decoder("llama")
    settings = {"assistant_model": decoder("llama", seed=1)} if "assistant_model" in settings else settings
    cache = ScissorhandsCache(model, budget=budget, recent=3, drop=4)
    with pytest.raises((InputError, ValueError), match=r"assist|crop"):
        continued(model, cache, words(1, 8).repeat(1, 3), **settings)


def test_going_back_is_refused_and_going_back_by_nothing_is_not():
    model = shared_decoder("llama")
    cache = ScissorhandsCache(model, **SMALL)
    continued(model, cache, words(1, 20))
    cache.crop(0)
    with pytest.raises(InputError, match=r"got crop\(-3\), expected no step back: .* Do not use assisted decoding or prompt lookup"):
        cache.crop(-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_another_batch_size_is_refused_and_the_cache_stays_whole(family):
    model, ids = shared_decoder(family), words(2, 20)
    cache, other = ScissorhandsCache(model, **SMALL), ScissorhandsCache(model, **SMALL)
    first = continued(model, cache, ids)
    continued(model, other, ids)
    with pytest.raises(InputError, match=r"got a batch of 1 rows for a cache that holds 2, expected as many\. Call cache\.reset\(\)"):
        model(input_ids=ids[:1], cache=cache)
    more = torch.cat([first, words(2, 3, seed=4)], dim=1)
    assert torch.equal(continued(model, cache, more), continued(model, other, more))


@pytest.mark.parametrize("same_name", [True, False])
def test_another_model_is_refused_within_its_first_call(same_name):
    model, other = decoder("llama"), decoder("llama", seed=1)
    cache = ScissorhandsCache(model, **SMALL)
    if same_name:
        ScissorhandsCache(other, **SMALL)
        with pytest.raises(
            InputError, match=r"got LlamaAttention of another model, expected the one that the cache was made for\. Make another cache"
        ):
            other(input_ids=words(1, 5), cache=cache)
    else:
        with pytest.raises(RunError, match=r"the attention of the last call did not come back to the cache"):
            other(input_ids=words(1, 5), cache=cache)
    cache.reset()
    assert continued(model, cache, words(1, 5)).shape == (1, 17)


def test_attention_that_was_set_afterwards_is_refused_within_the_first_call():
    model = decoder("llama")
    cache = ScissorhandsCache(model, **SMALL)
    model.set_attn_implementation("eager")
    with pytest.raises(RunError, match=r"the implementation is 'eager', expected one that begins with 'partwise_'\. Make the cache after"):
        model(input_ids=words(1, 5), cache=cache)


@pytest.mark.parametrize("shape", [(1, 1, 1, 33), (1, 1, 1, 13), (1, 1, 1, 10), (1, 1, 1, 1)])
def test_a_mask_of_the_user_s_own_is_refused_once_tokens_have_left(shape):
    model = shared_decoder("llama")
    cache = ScissorhandsCache(model, **SMALL)
    continued(model, cache, words(1, 21))
    assert cache.seen == 32
    with pytest.raises(InputError, match=r"got a mask of \d+ columns for \d+ cached tokens, expected none of your own once tokens have left"):
        model(input_ids=words(1, 1), attention_mask=torch.ones(shape, dtype=torch.bool), cache=cache)


def test_a_mask_of_the_user_s_own_counts_before_that():
    model, ids = shared_decoder("llama"), words(1, 10)
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    mask[5:, :5] = False
    full = model(input_ids=ids, attention_mask=mask[None, None], cache=DynamicCache(config=model.config)).logits
    assert torch.equal(model(input_ids=ids, attention_mask=mask[None, None], cache=ScissorhandsCache(model, **SMALL)).logits, full)


def interrupted(model, cache, *, module, ids):
    """Stop a call as the user would, in the middle of a module."""

    def stop(*_):
        raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            model(input_ids=ids, cache=cache)
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_whose_call_was_interrupted_says_so_until_it_is_reset(family):
    model, ids = shared_decoder(family), words(1, 20)
    expected = continued(model, ScissorhandsCache(model, **SMALL), ids)
    last = len(model.model.layers) - 1
    for layer, part in [(last, "self_attn"), *((layer, part) for layer in range(1, last) for part in ("mlp", "self_attn"))]:
        cache = ScissorhandsCache(model, **SMALL)
        continued(model, cache, ids, new=4)
        interrupted(model, cache, module=getattr(model.model.layers[layer], part), ids=words(1, 2))
        with pytest.raises(RunError, match=r"got a cache whose layers saw 23 to 25 tokens, expected as many\. Call cache\.reset\(\) and start anew"):
            model(input_ids=words(1, 1), cache=cache)
        cache.reset()
        assert torch.equal(continued(model, cache, ids), expected)


def test_attention_that_fails_breaks_the_cache_until_it_is_reset(monkeypatch):
    model, ids = decoder("llama", kernel="eager"), words(1, 20)
    cache = ScissorhandsCache(model, **SMALL)
    expected = continued(model, cache, ids)
    cache.reset()
    with monkeypatch.context() as patch:
        patch.setattr(attention_module.sys.modules[type(model).__module__], "eager_attention_forward", None)
        with pytest.raises((TypeError, InputError)):
            model(input_ids=ids, cache=cache)
    with pytest.raises(RunError, match=r"Call cache\.reset\(\)|attention of the last call did not come back"):
        model(input_ids=ids, cache=cache)
    cache.reset()
    assert torch.equal(continued(model, cache, ids), expected)


def test_a_backward_pass_is_refused():
    model = decoder("llama")
    loss = model(input_ids=words(1, 5), cache=ScissorhandsCache(model, **SMALL)).logits.sum()
    with pytest.raises(InputError, match=r"got a backward pass through a cache with a budget, expected none: .* Train without cache="):
        loss.backward()


def test_positions_of_a_layer_that_holds_none_are_refused():
    model = shared_decoder("gemma3")
    cache = ScissorhandsCache(model, **SMALL)
    with pytest.raises(InputError, match=r"got layer 1, which holds no tokens under a budget, expected one of \[1, 3\] after a call"):
        cache.kept_positions(1)
    continued(model, cache, words(1, 5))
    with pytest.raises(InputError, match=r"got layer 0, which holds no tokens under a budget"):
        cache.kept_positions(0)


@pytest.mark.parametrize("row", [-1, 2, "0"])
def test_a_ledger_of_a_row_that_does_not_exist_is_refused(row):
    model = shared_decoder("llama")
    cache = ScissorhandsCache(model, **SMALL)
    continued(model, cache, words(2, 5))
    with pytest.raises(InputError, match=rf"got row={row!r} of a cache with 2 rows, expected a number from 0 to 1"):
        cache.ledger(row=row)


@pytest.mark.parametrize("layer", [-1, 4, 9, "first"])
def test_a_layer_that_does_not_exist_is_refused(layer):
    model = shared_decoder("gemma3")
    cache = ScissorhandsCache(model, **SMALL)
    continued(model, cache, words(1, 5))
    with pytest.raises(InputError, match=rf"got layer {layer}, which holds no tokens under a budget, expected one of \[1, 3\]"):
        cache.kept_positions(layer)


def test_the_repr_of_a_cache_says_how_it_was_made():
    model = shared_decoder("llama")
    cache = BudgetedCache(model, Scissorhands(recent=3, drop=4), budget=[12, 14], pinned=2, bits=None)
    text = (
        "BudgetedCache(model, Scissorhands(recent=3, num_sinks=0, drop=4, window=400, prompt_window=128), budget=[12, 14], pinned=[0, 1], bits=None)"
    )
    assert repr(cache) == text
    again = eval(text, {"BudgetedCache": BudgetedCache, "Scissorhands": Scissorhands, "model": model})  # noqa: S307 - our own repr
    assert repr(again) == text
    named = H2OCache(model, budget=20, drop=3)
    assert repr(named) == "H2OCache(model, budget=20, pinned=[], bits=None, recent=0.5, num_sinks=0, drop=3)"
    assert repr(eval(repr(named), {"H2OCache": H2OCache, "model": model})) == repr(named)  # noqa: S307 - our own repr


def test_rules_of_their_own_caches_take_their_own_settings():
    model = shared_decoder("llama")
    assert SlidingWindowCache(model, budget=9).rule.limits(9).drop == 1
    assert StreamingLLMCache(model, budget=9).rule.num_sinks == 4
    with pytest.raises(InputError, match=r"pool"):
        H2OCache(model, budget=9, pool=3)


def test_a_cache_made_inside_of_attached_survives_a_padded_batch_after_a_failure():
    model, short = decoder("llama"), padded(9, 4)
    with attached(model):
        cache = ScissorhandsCache(model, **SMALL)
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 3), 10**6), cache=cache)
        assert continued(model, cache, short["input_ids"], attention_mask=short["attention_mask"]).shape == (2, 21)


def test_attached_takes_no_other_cache():
    model = decoder("llama")
    with (
        pytest.raises(InputError, match=r"got DynamicCache, expected a cache of this room, such as ScissorhandsCache"),
        attached(model, DynamicCache(config=model.config)),
    ):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_after_another_one_was_detached_is_told_how_to_come_back():
    model = decoder("llama")
    first, second = ScissorhandsCache(model, **SMALL), ScissorhandsCache(model, **SMALL)
    with attached(model, second):
        model(words(1, 3))
    with pytest.raises(RunError, match=r"the implementation is 'sdpa', .* within `with attached\(model, cache\):`"):
        model(words(1, 3), cache=first)
    first.reset()
    with attached(model, first):
        model(words(1, 3))
    assert first.seen == 3


def test_attention_that_changes_the_keys_on_their_way_is_not_told_its_own_name():
    class Changes(transformers.LlamaForCausalLM):
        """Attention gets other keys than the cache gave."""

    model = Changes(decoder("llama").config).eval()
    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(_other_keys, layer.self_attn)
    with pytest.raises(
        InputError, match=r"got Changes, .* its attention passes the cache by, or gets other keys than the cache returned\. Expected a decoder"
    ):
        ScissorhandsCache(model, budget=40)


def _other_keys(self, hidden_states, cache, **kwargs):
    keys = self.k_proj(hidden_states).view(1, 1, -1, self.head_dim).transpose(1, 2)
    cache.update(keys, keys, self.layer_idx)
    return hidden_states, None


def test_a_text_longer_than_the_model_was_made_for_is_announced_once(caplog):
    model = decoder("llama", max_position_embeddings=20)
    cache = ScissorhandsCache(model, budget=16, recent=2, drop=1)
    model(torch.ones(1, 18, dtype=torch.int64), cache=cache)
    assert not caplog.records
    for _ in range(6):
        model(torch.ones(1, 1, dtype=torch.int64), cache=cache)
    [record] = caplog.records
    assert record.getMessage().startswith("The text passes 20 tokens, the longest this model was made for.")
