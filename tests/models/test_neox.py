"""Claims about parts of GPT-NeoX."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from model_families import IDS
from partwise.checks import InputError
from partwise.models import Member, Part, coupled_axes, extract, mask
from tiny import tiny_neox
from tolerances import assert_close


def test_neurons_go_with_the_rows_of_the_first_map_and_the_columns_of_the_second():
    [first, _] = coupled_axes(tiny_neox())
    name = "gpt_neox.layers.0.mlp"
    assert (first.name, first.kind, first.size) == (name, "neurons", 32)
    maps = {Member(f"{name}.dense_h_to_4h.weight", 0), Member(f"{name}.dense_h_to_4h.bias", 0), Member(f"{name}.dense_4h_to_h.weight", 1)}
    assert set(first.members) == maps
    assert first.readers == (f"{name}.dense_4h_to_h.weight",)


def test_stock_from_pretrained_gives_the_logits_of_the_masked_parent(tmp_path: Path):
    model = tiny_neox()
    half = Part({f"gpt_neox.layers.{layer}.mlp": tuple(range(layer, 32, 2)) for layer in range(2)})
    small = extract(model, half)
    assert small.config.intermediate_size == 16
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(loaded(IDS).logits, mask(model, half)(IDS).logits, claim="a plain checkpoint", rtol=0, atol=1e-6)


def test_layers_of_different_size_compute_what_the_masked_model_computes():
    model = tiny_neox()
    part = Part({"gpt_neox.layers.1.mlp": (3, 4, 30)})
    small = extract(model, part)
    assert small.config.to_dict()["per_layer_config"] == {"1": {"intermediate_size": 3}}
    assert_close(small(IDS).logits, mask(model, part)(IDS).logits, claim="slicing is masking", rtol=0, atol=1e-6)


def test_heads_are_refused_because_the_configuration_cannot_count_them():
    with pytest.raises(InputError, match=r"kind of axis of GPTNeoXForCausalLM='heads' is not known\. Choose one of: neurons\."):
        coupled_axes(tiny_neox(), kinds=["heads"])
