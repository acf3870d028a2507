"""Claims about states of Mamba2."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from model_families import IDS
from partwise.checks import InputError
from partwise.models import Part, coupled_axes, extract, mask, merge, scale_readers, tensors_of
from partwise.train import IST, TwIST
from tiny import tiny_mamba2
from tolerances import assert_close

UNEVEN = Part({"backbone.layers.0.mixer.state": (0, 3, 5, 6), "backbone.layers.1.mixer.state": (1,)})
TWO_GROUPS = Part({"backbone.layers.0.mixer.state": (0, 3, 8, 15), "backbone.layers.1.mixer.state": (1, 2, 7, 9, 10, 11)})


def facts(model: nn.Module) -> dict[str, Any]:
    """Every number that modules say about themselves."""
    return {
        f"{name}.{fact}": value
        for name, module in model.named_modules()
        for fact, value in vars(module).items()
        if isinstance(value, int | tuple) and fact != "training" and not fact.startswith("_")
    }


def test_a_state_is_a_row_of_b_and_one_of_c_in_the_projection_and_in_the_convolution():
    [axis, _] = coupled_axes(tiny_mamba2(n_groups=2))
    assert (axis.name, axis.kind, axis.size, axis.readers) == ("backbone.layers.0.mixer.state", "states", 16, ())
    places = {member.tensor.removeprefix("backbone.layers.0.mixer."): (member.entries_of([3]).tolist(), member.length) for member in axis.members}
    # gate 32, input 32, B 16, C 16, time step 4; the convolution has neither gate nor time step
    rows, channels = ([64 + 3, 64 + 16 + 3], 100), ([32 + 3, 32 + 16 + 3], 64)
    assert places == {"in_proj.weight": rows, "in_proj.bias": rows, "conv1d.weight": channels, "conv1d.bias": channels}


def test_everything_on_no_axis_is_kept_and_so_is_the_order():
    [axis, _] = coupled_axes(tiny_mamba2())
    kept = axis.members[0].kept_entries((1, 7), size=8).tolist()
    assert kept == [*range(64), 64 + 1, 64 + 7, 72 + 1, 72 + 7, *range(80, 84)]


@pytest.mark.parametrize(("groups", "part"), [(1, UNEVEN), (2, TWO_GROUPS)], ids=["one-group", "two-groups"])
def test_layers_of_different_size_compute_what_the_masked_model_computes(groups: int, part: Part):
    model = tiny_mamba2(n_groups=groups)
    small, masked = extract(model, part), mask(model, part)
    assert_close(small(IDS).logits, masked(IDS).logits, claim="slicing is masking", rtol=0, atol=1e-6)
    assert (model(IDS).logits - masked(IDS).logits).abs().max() > 1e-3
    words = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(small.generate(IDS, **words), masked.generate(IDS, **words)), "token by token, through the recurrent cache"
    assert torch.equal(small.generate(IDS, num_beams=2, **words), masked.generate(IDS, num_beams=2, **words))
    same = merge(model, [(part, small)])
    assert all(torch.equal(tensor, tensors_of(same)[name]) for name, tensor in tensors_of(model).items())


def test_a_missing_state_is_gone_although_the_convolution_has_a_bias():
    model = tiny_mamba2()
    without = mask(model, Part({"backbone.layers.0.mixer.state": tuple(range(1, 8))}))
    weight, bias = without.backbone.layers[0].mixer.conv1d.weight, without.backbone.layers[0].mixer.conv1d.bias
    for channel in (32, 40):  # B and C of state 0
        assert not weight[channel].any()
        assert bias[channel] == 0
    rows = tiny_mamba2()
    with torch.no_grad():
        for row in (64, 72):
            rows.backbone.layers[0].mixer.in_proj.weight[row] = 0
            rows.backbone.layers[0].mixer.in_proj.bias[row] = 0
    assert (rows(IDS).logits - without(IDS).logits).abs().max() > 1e-4, "zero rows of the projection alone leave silu(bias)"


def test_attributes_and_configuration_are_those_of_a_model_built_at_its_size():
    part = Part({f"backbone.layers.{layer}.mixer.state": (layer, 4, 6) for layer in range(2)})
    small = extract(tiny_mamba2(), part)
    again = type(small)(copy.deepcopy(small.config))
    assert small.config.state_size == 3
    assert small.config.to_dict().get("per_layer_config") is None
    assert facts(again) == facts(small)
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {name: tensor.shape for name, tensor in small.state_dict().items()}
    assert small.backbone.layers[0].mixer.ssm_state_size == 3
    assert small.backbone.layers[0].mixer.conv1d.groups == 32 + 2 * 3


def test_half_of_the_states_halve_the_recurrent_state_of_a_sequence():
    model = tiny_mamba2()
    small = extract(model, Part({f"backbone.layers.{layer}.mixer.state": (0, 2, 4, 6) for layer in range(2)}))
    full, half = (either(IDS, use_cache=True).cache for either in (model, small))
    assert half.get_recurrent_state(0, state_idx=0).numel() * 2 == full.get_recurrent_state(0, state_idx=0).numel()


def test_an_even_cut_is_an_ordinary_checkpoint(tmp_path: Path):
    model = tiny_mamba2()
    part = Part({f"backbone.layers.{layer}.mixer.state": (0, 2, 7) for layer in range(2)})
    extract(model, part).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(loaded(IDS).logits, mask(model, part)(IDS).logits, claim="a plain checkpoint", rtol=0, atol=1e-6)


def test_groups_that_keep_different_numbers_are_refused_with_the_number_to_fill_up_to():
    text = r"got a part whose groups keep 3, 1 of 8 states each in backbone\.layers\.0\.mixer\.state, expected one number.* Keep 3 in every group, filling"
    with pytest.raises(InputError, match=text):
        extract(tiny_mamba2(n_groups=2), Part({"backbone.layers.0.mixer.state": (0, 1, 2, 9)}))


def test_a_factor_on_states_is_refused_because_no_layer_reads_them():
    model = tiny_mamba2()
    with pytest.raises(InputError, match=r"got a factor for backbone\.layers\.0\.mixer\.state, whose units no layer reads as its input"):
        scale_readers(model, {"backbone.layers.0.mixer.state": 2.0}, axes=coupled_axes(model))


def test_subnetwork_training_finds_no_neurons_in_mamba2():
    with pytest.raises(InputError, match=r"got a Mamba2ForCausalLM, expected a transformer with head groups and feed-forward neurons"):
        TwIST().find_axes(tiny_mamba2())
    with pytest.raises(InputError, match=r"got a Mamba2ForCausalLM without hidden neurons, filters or heads of its own"):
        IST().find_axes(tiny_mamba2())
