"""Claims about parts of Llama-type decoders, and about files that stock transformers reads."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model_families import IDS, generators
from partwise.checks import InputError
from partwise.models import FixedFractionSampler, Member, Part, coupled_axes, extract, mask, merge, tensors_of
from partwise.models.llama import MODEL_TYPES, block_class
from partwise.models.uneven import per_layer_blocks
from tiny import tiny_decoder
from tolerances import assert_close

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3"]
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def built_again(model: Any) -> Any:
    """A model built from nothing but the class and the configuration."""
    return type(model)(type(model.config)(**model.config.to_dict()))


def facts(model: nn.Module) -> dict[str, Any]:
    """Everything plain that modules say about themselves."""
    plain = int | float | str | bool | tuple | torch.Size | type(None)
    elsewhere = {"training", "name_or_path"}  # how a model came about, not what it is
    return {
        f"{name}.{fact}": value
        for name, module in model.named_modules()
        for fact, value in vars(module).items()
        if isinstance(value, plain) and fact not in elsewhere and not fact.startswith("_")
    }


def half(model: Any) -> Part:
    return FixedFractionSampler(keep=0.5)(coupled_axes(model), generators(2))[1]


def test_every_family_that_is_known_is_tested():
    assert {family.lower() for family in FAMILIES} == set(MODEL_TYPES)


def test_a_key_value_head_goes_with_all_query_heads_that_read_it():
    heads, neurons, *_ = coupled_axes(tiny_decoder("Qwen2"))
    name = "model.layers.0.self_attn"
    assert (heads.name, heads.kind, heads.size) == (name, "heads", 4)
    widths = {"q_proj": 8, "k_proj": 4, "v_proj": 4}  # two query heads of 4 for each key-value head of 4
    rows = {Member(f"{name}.{projection}.{tensor}", 0, width) for projection, width in widths.items() for tensor in ("weight", "bias")}
    assert set(heads.members) == rows | {Member(f"{name}.o_proj.weight", 1, 8)}
    assert (neurons.name, neurons.size, neurons.readers) == ("model.layers.0.mlp", 24, ("model.layers.0.mlp.down_proj.weight",))


@EVERY_FAMILY
def test_a_smaller_model_is_what_its_configuration_builds(family: str):
    small = extract(tiny_decoder(family), half(tiny_decoder(family)))
    again = built_again(small)
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {name: tensor.shape for name, tensor in small.state_dict().items()}
    assert facts(again) == facts(small)
    assert all(module.config is small.config for module in small.modules() if hasattr(module, "config"))
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.intermediate_size) == (4, 2, 12)
    assert small.config.head_dim == 4


@EVERY_FAMILY
def test_stock_from_pretrained_gives_the_logits_of_the_masked_parent(family: str, tmp_path: Path):
    model = tiny_decoder(family)
    part = half(model)
    extract(model, part).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert_close(loaded(IDS).logits, mask(model, part)(IDS).logits, claim="a plain checkpoint", rtol=0, atol=1e-6)
    ids = loaded.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(ids, mask(model, part).generate(IDS, max_new_tokens=5, do_sample=False))


def test_tied_embeddings_stay_tied_and_lie_on_no_axis():
    model = tiny_decoder("Llama", tie_word_embeddings=True)
    small = extract(model, half(model))
    assert small.lm_head.weight is small.model.embed_tokens.weight
    merged = merge(model, [(half(model), small)])
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert "lm_head.weight" not in tensors_of(model)


def test_a_model_without_its_output_layer_and_a_classifier_have_the_same_axes():
    bare = tiny_decoder("Llama").model
    assert [axis.name for axis in coupled_axes(bare)] == ["layers.0.self_attn", "layers.0.mlp", "layers.1.self_attn", "layers.1.mlp"]
    part = Part({"layers.0.mlp": (1, 2), "layers.1.mlp": (3, 4)})
    assert_close(extract(bare, part)(IDS)[0], mask(bare, part)(IDS)[0], claim="slicing is masking", rtol=0, atol=1e-6)
    classifier = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**(tiny_decoder("Llama").config.to_dict() | {"pad_token_id": 2})))
    assert [axis.name for axis in coupled_axes(classifier)] == [f"model.{axis.name}" for axis in coupled_axes(bare)]


@settings(max_examples=8)
@given(
    family=st.sampled_from(["Mistral", "Qwen2", "Qwen3"]),
    groups=st.integers(1, 4),
    queries=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4]),
    neurons=st.integers(2, 9),
    keep=st.floats(0.25, 1.0),
    seed=st.integers(0, 100),
)
def test_any_shape_at_any_size_slices_as_it_masks_and_merges_to_itself(
    family: str, groups: int, queries: int, head_dim: int, neurons: int, keep: float, seed: int
):
    sizes = {"num_key_value_heads": groups, "num_attention_heads": groups * queries, "head_dim": head_dim, "intermediate_size": neurons}
    # Qwen2 lists no head_dim: its hidden size is the sum of its heads until a part says otherwise.
    model = tiny_decoder(family, seed=seed, hidden_size=groups * queries * head_dim, **sizes).double()
    axes = coupled_axes(model)
    keep = max(keep, 0.5 / groups)
    parts = FixedFractionSampler(keep=keep)(axes, [np.random.default_rng((seed, part)) for part in range(2)])
    smalls = [extract(model, part, axes=axes) for part in parts]
    for part, small in zip(parts, smalls, strict=True):
        assert_close(small(IDS).logits, mask(model, part, axes=axes)(IDS).logits, claim="slicing is masking")
        assert facts(built_again(small)) == facts(small)
    merged = merge(model, zip(parts, smalls, strict=True), axes=axes)
    assert all(torch.equal(old, new) for old, new in zip(tensors_of(model).values(), tensors_of(merged).values(), strict=True))


def test_a_number_of_heads_that_the_configuration_refuses_is_told_the_nearest_that_it_takes():
    model = tiny_decoder("Llama")
    part = Part({axis.name: (0, 1, 2) for axis in coupled_axes(model, kinds=["heads"])})
    text = (
        r"got a part with 3 of 4 head groups per layer, 6 heads, which LlamaConfig refuses: .*The hidden size \(32\) is not a multiple of the number of "
        r"attention heads \(6\)\. The nearest that it takes is 2 or 4\. Keep that many groups, or pass loadable=False if this model is never saved\."
    )
    with pytest.raises(InputError, match=text):
        extract(model, part)
    worker = extract(model, part, loadable=False)
    assert worker.config.num_attention_heads == 6
    assert_close(worker(IDS).logits, mask(model, part)(IDS).logits, claim="a worker may train it all the same", rtol=0, atol=1e-6)
    other = tiny_decoder("Mistral")
    assert extract(other, part).config.num_attention_heads == 6, "Mistral's configuration takes any number"


@EVERY_FAMILY
def test_layers_of_different_size_are_written_into_per_layer_config_and_load_through_the_bridge(family: str, tmp_path: Path):
    model = tiny_decoder(family)
    part = Part({"model.layers.0.self_attn": (1, 3), "model.layers.1.mlp": (0, 2, 4, 6, 8)})
    small = extract(model, part)
    overrides = small.config.to_dict()["per_layer_config"]
    assert overrides == {"0": {"num_attention_heads": 4, "num_key_value_heads": 2}, "1": {"intermediate_size": 5}}
    assert_close(small(IDS).logits, mask(model, part)(IDS).logits, claim="slicing is masking", rtol=0, atol=1e-6)
    small.save_pretrained(tmp_path)
    block = block_class(model.config.model_type)
    with per_layer_blocks(block):
        loaded = type(model).from_pretrained(tmp_path).eval()
    assert_close(loaded(IDS).logits, small(IDS).logits, claim="what was saved is what is loaded", rtol=0, atol=0)
    assert facts(loaded) == facts(small)
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 8)


def test_parts_of_an_uneven_model_are_cut_and_merged_like_those_of_any_other():
    uneven = extract(tiny_decoder("Mistral"), Part({"model.layers.0.mlp": tuple(range(12))}))
    axes = coupled_axes(uneven)
    assert [axis.size for axis in axes] == [4, 12, 4, 24]
    part = Part({"model.layers.1.mlp": tuple(range(1, 13))})
    small = extract(uneven, part)
    assert "per_layer_config" not in small.config.to_dict(), "both layers have 12 neurons now"
    assert small.config.intermediate_size == 12
    assert_close(small(IDS).logits, mask(uneven, part)(IDS).logits, claim="slicing is masking", rtol=0, atol=1e-6)
    assert all(torch.equal(old, new) for old, new in zip(uneven.parameters(), merge(uneven, [(part, small)]).parameters(), strict=True))


def test_the_bridge_is_gone_when_its_body_fails():
    block = block_class("llama")
    before = block.__init__
    with pytest.raises(RuntimeError), per_layer_blocks(block):
        assert block.__init__ is not before
        raise RuntimeError
    assert block.__init__ is before


def test_layers_that_are_wrapped_are_refused_by_name_and_class():
    peft = importlib.import_module("peft")
    model = peft.get_peft_model(tiny_decoder("Llama"), peft.LoraConfig(target_modules=["v_proj"])).base_model.model
    text = r"model\.layers\.0\.self_attn\.v_proj is a peft\.tuners\.lora\.layer\.Linear, expected a plain Linear\. Dequantise the model, or merge"
    with pytest.raises(InputError, match=text):
        coupled_axes(model)


def test_neurons_tied_between_layers_are_refused_by_both_names():
    model = tiny_decoder("Llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    text = r"model\.layers\.0\.mlp\.up_proj\.weight and model\.layers\.1\.mlp\.up_proj\.weight are one tensor.*or choose other kinds of axes\."
    with pytest.raises(InputError, match=text):
        coupled_axes(model)
    assert coupled_axes(model, kinds=["heads"])


def test_a_mixture_of_experts_is_unknown():
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    with pytest.raises(InputError, match=r"got a MixtralForCausalLM of type 'mixtral', expected one of: llama, mistral, qwen2, qwen3; gpt2"):
        coupled_axes(transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)))
