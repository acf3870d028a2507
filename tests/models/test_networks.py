from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from partwise.checks import InputError
from partwise.models import BlockAxis, Part, coupled_axes, extract, tensors_of
from partwise.models.networks import MLP, NETWORKS, PreResNet, build, config_of
from tiny import with_statistics
from tolerances import assert_close

SIZES: dict[str, dict[str, Any]] = {
    "mlp": {"num_inputs": 6, "num_classes": 3, "hidden": [16, 8]},
    "resnet": {"channels": 2, "num_classes": 3},
    "llama-small": {"vocab_size": 300, "max_position_embeddings": 32},
    "llama-medium": {"vocab_size": 300, "max_position_embeddings": 32},
}
INPUTS = {"mlp": (5, 6), "resnet": (5, 2, 8, 8)}


def network(name: str, *, seed: int = 0, **changes: Any) -> Any:
    return build(NETWORKS[name] | SIZES[name] | changes, seed=seed)


def inputs(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if name in INPUTS:
        return torch.randn(INPUTS[name], generator=generator)
    return torch.randint(300, (2, 12), generator=generator)


def outputs(model: nn.Module, name: str) -> Tensor:
    found = model.eval()(inputs(name))
    return getattr(found, "logits", found)


# Weights


@pytest.mark.parametrize("name", NETWORKS)
def test_the_seed_decides_the_weights_and_the_global_random_state_is_left_alone(name: str):
    before = torch.get_rng_state()
    first, again, other = (tensors_of(network(name, seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in first.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_rebuilt_from_its_configuration_as_json(name: str):
    model = network(name)
    twin = build(json.loads(json.dumps(config_of(model))))
    assert type(twin) is type(model)
    twin.load_state_dict(model.state_dict())
    assert_close(outputs(twin, name), outputs(model, name), claim="same network", rtol=0, atol=0)


def test_a_perceptron_without_norms_is_rebuilt_too():
    model = network("mlp", norm=False)
    assert config_of(model)["norm"] is False
    assert build(config_of(model)).state_dict().keys() == model.state_dict().keys()
    assert not any(isinstance(module, nn.BatchNorm1d) for module in model.modules())


# Axes


def test_all_hidden_layers_of_the_perceptron_can_be_cut():
    axes = coupled_axes(network("mlp"))
    assert [(axis.kind, axis.size) for axis in axes] == [("neurons", 16), ("neurons", 8)]
    assert {member.tensor for member in axes[0].members} >= {"layers.0.weight", "norms.0.weight", "norms.0.running_var", "layers.1.weight"}


def test_the_resnet_has_an_axis_for_every_inner_width_and_one_long_section_of_blocks():
    axes = coupled_axes(network("resnet"))
    inner = {axis.name: axis for axis in axes if axis.kind == "filters"}
    assert len(inner) == 13
    assert {member.tensor for member in inner["stage2.3.conv_a"].members} == {
        "stage2.3.conv_a.weight",
        *(f"stage2.3.norm_b.{tensor}" for tensor in ("weight", "bias", "running_mean", "running_var")),
        "stage2.3.conv_b.weight",
    }
    assert {axis.name: axis.size for axis in axes if isinstance(axis, BlockAxis)} == {"stage1": 2, "stage2": 8}


def test_the_perceptron_and_the_resnet_learn_from_a_batch():
    for name in INPUTS:
        model = network(name).train()
        nn.functional.cross_entropy(model(inputs(name)), torch.tensor([0, 1, 2, 0, 1])).backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_strided_stage_halves_the_image_and_only_changing_blocks_have_a_shortcut():
    model = network("resnet").eval()
    x = model.stem(inputs("resnet"))
    shapes = []
    for section in model.sections():
        x = section(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 8, 8), (32, 4, 4), (64, 2, 2)]
    assert [name for name, block in model.named_modules() if name.endswith("shortcut") and block is not None] == [
        "stage2.0.shortcut",
        "stage3.0.shortcut",
    ]


@pytest.mark.parametrize("name", ["mlp", "resnet"])
@pytest.mark.parametrize("seed", range(3))
def test_a_part_is_rebuilt_from_its_configuration(name: str, seed: int):
    model = with_statistics(network(name)).eval()
    generator = np.random.default_rng(seed)
    units = {}
    for axis in coupled_axes(model):
        count = int(generator.integers(1, axis.size + 1))
        units[axis.name] = tuple(sorted(generator.permutation(axis.size)[:count].tolist()))
    small = extract(model, Part(units))
    twin = build(json.loads(json.dumps(config_of(small))))
    assert {key: value.shape for key, value in twin.state_dict().items()} == {key: value.shape for key, value in small.state_dict().items()}
    twin.load_state_dict(small.state_dict())
    assert_close(outputs(twin, name), outputs(small, name), claim="same network", rtol=0, atol=0)
    assert sum(map(torch.numel, twin.parameters())) < sum(map(torch.numel, model.parameters()))


@pytest.mark.parametrize("name", ["llama-small", "llama-medium"])
@pytest.mark.parametrize("keep", [1.0, 0.75, 0.5, 0.25])
def test_the_decoders_load_at_100_75_50_and_25_per_cent(name: str, keep: float, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = network(name).eval()
    part = Part({axis.name: tuple(range(round(keep * axis.size))) for axis in coupled_axes(model)})
    small = extract(model, part)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_attention_heads == keep * NETWORKS[name]["num_attention_heads"]
    assert loaded.config.intermediate_size == keep * NETWORKS[name]["intermediate_size"]
    assert_close(outputs(loaded, name), outputs(small, name), claim="saved and loaded", rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama-small", "llama-medium"])
def test_the_decoders_are_tied_have_a_key_value_head_per_head_and_sixteen_blocks_of_neurons(name: str):
    model = network(name)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.num_key_value_heads == model.config.num_attention_heads
    assert model.config.intermediate_size % 16 == 0
    assert model.get_input_embeddings().padding_idx is None


def test_the_default_decoder_has_two_to_four_million_parameters():
    model = build(NETWORKS["llama-small"] | {"vocab_size": 2048, "max_position_embeddings": 128})
    assert 2e6 < sum(map(torch.numel, model.parameters())) < 4e6


def test_a_configuration_that_makes_no_network_is_refused():
    with pytest.raises(InputError, match="network='gru' is not known"):
        build({"network": "gru"})
    with pytest.raises(InputError, match=r"makes no mlp: .*num_inputs") as caught:
        build({"network": "mlp", "hidden": [3], "num_classes": 2})
    assert caught.value.code == "network-config"


def test_a_model_that_is_not_one_of_ours_has_no_configuration():
    with pytest.raises(InputError, match="got a Sequential, expected one of the networks llama-small") as caught:
        config_of(nn.Sequential(nn.Linear(2, 2)))
    assert caught.value.code == "unknown-network"


def test_the_classes_are_the_ones_that_parts_keep():
    assert isinstance(network("mlp"), MLP)
    assert isinstance(network("resnet"), PreResNet)
