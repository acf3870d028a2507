"""Claims about parts of GPT-2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from model_families import IDS
from partwise.checks import InputError
from partwise.models import Member, Part, coupled_axes, extract, mask
from partwise.models.gpt2 import block_class
from partwise.models.uneven import per_layer_blocks
from tiny import tiny_gpt2
from tolerances import assert_close

HALF = Part({f"transformer.h.{layer}.mlp": tuple(range(layer, 64, 2)) for layer in range(2)})


def test_neurons_go_with_the_columns_of_the_first_map_and_the_rows_of_the_second():
    [first, _] = coupled_axes(tiny_gpt2())
    name = "transformer.h.0.mlp"
    assert (first.name, first.kind, first.size) == (name, "neurons", 64)
    assert set(first.members) == {Member(f"{name}.c_fc.weight", 1), Member(f"{name}.c_fc.bias", 0), Member(f"{name}.c_proj.weight", 0)}
    assert first.readers == (f"{name}.c_proj.weight",)


def test_stock_from_pretrained_gives_the_logits_of_the_masked_parent(tmp_path: Path):
    model = tiny_gpt2()
    small = extract(model, HALF)
    assert (small.config.n_inner, small.transformer.h[0].mlp.c_fc.nf, small.transformer.h[0].mlp.c_proj.nx) == (32, 32, 32)
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(loaded(IDS).logits, mask(model, HALF)(IDS).logits, claim="a plain checkpoint", rtol=0, atol=1e-6)


def test_layers_of_different_size_load_through_the_bridge(tmp_path: Path):
    model = tiny_gpt2()
    small = extract(model, Part({"transformer.h.1.mlp": (3, 4, 5)}))
    assert small.config.to_dict()["per_layer_config"] == {"0": {"n_inner": 64}, "1": {"n_inner": 3}}, "the whole has none of its own"
    small.save_pretrained(tmp_path)
    with per_layer_blocks(block_class("gpt2")):
        loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, small(IDS).logits)


def test_a_width_that_the_configuration_leaves_open_stays_open_while_it_is_true():
    assert extract(tiny_gpt2(), Part({})).config.n_inner is None


def test_heads_are_refused_because_the_configuration_cannot_count_them():
    with pytest.raises(InputError, match=r"kind of axis of GPT2LMHeadModel='heads' is not known\. Choose one of: neurons\."):
        coupled_axes(tiny_gpt2(), kinds=["heads", "neurons"])
