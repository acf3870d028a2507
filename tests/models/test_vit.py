"""Claims about parts of vision transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from model_families import images
from partwise.checks import InputError
from partwise.models import Member, Part, coupled_axes, extract, mask
from tiny import tiny_vit
from tolerances import assert_close

PART = Part(
    {f"vit.layers.{layer}.attention": (layer, 2, 3) for layer in range(2)} | {f"vit.layers.{layer}.mlp": (layer, 5, 7, 11, 20) for layer in range(2)}
)


def test_a_head_goes_with_its_rows_and_the_columns_that_read_it():
    heads, neurons, *_ = coupled_axes(tiny_vit())
    name = "vit.layers.0.attention"
    rows = {Member(f"{name}.{projection}.{tensor}", 0, 4) for projection in ("q_proj", "k_proj", "v_proj") for tensor in ("weight", "bias")}
    assert (heads.name, heads.kind, heads.size, set(heads.members)) == (name, "heads", 4, rows | {Member(f"{name}.o_proj.weight", 1, 4)})
    assert (neurons.name, neurons.kind, neurons.size) == ("vit.layers.0.mlp", "neurons", 24)


def test_stock_from_pretrained_gives_the_logits_of_the_masked_parent_even_with_three_of_four_heads(tmp_path: Path):
    model = tiny_vit()
    small = extract(model, PART)
    assert (small.config.num_attention_heads, small.config.head_dim, small.config.intermediate_size) == (3, 4, 5)
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.vit.layers[0].attention.num_attention_heads == small.vit.layers[0].attention.num_attention_heads == 3
    assert_close(loaded(images(8)).logits, mask(model, PART)(images(8)).logits, claim="a plain checkpoint", rtol=0, atol=1e-6)


def test_a_part_of_a_part_keeps_the_size_of_a_head():
    smaller = extract(extract(tiny_vit(), PART), Part({f"vit.layers.{layer}.attention": (1,) for layer in range(2)}))
    assert (smaller.config.num_attention_heads, smaller.config.head_dim) == (1, 4)
    assert smaller(images(8)).logits.shape == (3, 2)


def test_layers_of_different_size_are_refused_with_their_numbers():
    text = r"got a part whose layers keep intermediate_size=\[2, 24\], expected the same in every layer of a ViTForImageClassification"
    with pytest.raises(InputError, match=text):
        extract(tiny_vit(), Part({"vit.layers.0.mlp": (0, 1)}))
