"""Claims about folders of plain networks: the same bits come back, nothing runs, and what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model_families import images, rows
from partwise.checks import InputError
from partwise.models import FixedFractionSampler, Part, coupled_axes, extract
from partwise.models.network_files import load_network, save_network
from partwise.models.networks import build
from tiny import tiny_llama, tiny_mlp, tiny_resnet, with_statistics

MLP = {"network": "mlp", "num_inputs": 6, "hidden": [8, 5], "num_classes": 3, "norm": True}
RESNET = {"network": "resnet", "channels": 3, "num_classes": 4, "stem": 4, "stages": [{"width": 4, "stride": 1, "inner": [3, 2, 3]}]}


def half(network: nn.Module) -> tuple[Part, nn.Module]:
    """Half of everything that can be left out, blocks included."""
    [part] = FixedFractionSampler(keep=0.5)(coupled_axes(network), [np.random.default_rng(0)])
    return part, extract(network, part).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Half of a perceptron that this package did not build."""
    part, small = half(tiny_mlp(6, 8, 4, 2))
    save_network(small, tmp_path / "small", part=part)
    return tmp_path / "small"


@pytest.mark.parametrize(("settings", "inputs"), [(MLP, rows(6)), (RESNET, images(8))], ids=["perceptron", "resnet"])
def test_a_network_of_this_package_is_built_again_from_its_folder_alone(settings: dict[str, Any], inputs: torch.Tensor, tmp_path: Path):
    _, small = half(with_statistics(build(settings)))
    save_network(small, tmp_path / "small", extra={"README.md": b"# Half\n"})
    assert {path.name for path in (tmp_path / "small").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = load_network(str(tmp_path / "small"))
    assert type(loaded) is type(small)
    assert not loaded.training
    assert torch.equal(loaded(inputs), small(inputs))


@pytest.mark.parametrize(("make", "inputs"), [(lambda seed: tiny_mlp(6, 8, 4, 2, seed=seed), rows(6)), (lambda seed: tiny_resnet(seed=seed), images(8))])
def test_any_other_network_is_taken_again_out_of_a_fresh_whole_one(make: Callable[[int], nn.Module], inputs: torch.Tensor, tmp_path: Path):
    part, small = half(with_statistics(make(0)))
    save_network(small, tmp_path / "small", part=part)
    fresh = make(5)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    assert torch.equal(load_network(tmp_path / "small", model=fresh)(inputs), small(inputs))
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["class"] == f"{type(small).__module__}.{type(small).__qualname__}"
    assert config["sizes"] == {name: list(tensor.shape) for name, tensor in small.state_dict().items()}


def test_a_whole_network_of_any_kind_is_saved_with_an_empty_part(tmp_path: Path):
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    network[2].weight = network[0].weight  # one tensor, which stays one
    save_network(network, tmp_path / "whole", part=Part({}))
    twin = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    twin[2].weight = twin[0].weight
    loaded: Any = load_network(tmp_path / "whole", model=twin)
    assert loaded[2].weight is loaded[0].weight
    assert torch.equal(loaded(rows(4)), network(rows(4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_that_of_the_file(dtype: torch.dtype, tmp_path: Path):
    network = build(MLP).to(dtype).eval()
    save_network(network, tmp_path / "network")
    loaded = load_network(tmp_path / "network")
    assert torch.equal(loaded(rows(6).to(dtype)), network(rows(6).to(dtype)))


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path: Path):
    with pytest.raises(InputError, match=r"got a Sequential, which partwise cannot build again, .* Pass part=, .* or Part\(\{\}\) for a whole") as caught:
        save_network(tiny_mlp(3, 4, 2), tmp_path / "network")
    assert caught.value.code == "unknown-network"
    with pytest.raises(InputError, match=r"got a LlamaForCausalLM of transformers, .* Save it with partwise\.models\.uneven_files\.save_uneven\."):
        save_network(tiny_llama(), tmp_path / "network")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes is there already and is no model"):
        save_network(build(MLP), tmp_path / "notes")
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def shorten(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["0.bias"] = tensors["0.bias"][:1].clone()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut short"), "damaged-weights", "the weights of .* cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "damaged-weights", "the weights of .* cannot be read"),
        (shorten, "weights-do-not-match", r"0\.bias of the weights of .* is of shape \(1,\), but in the network it is of shape \(4,\)"),
        (lambda folder: (folder / "config.json").unlink(), "model-incomplete", r"has no config\.json, expected a network as save_network writes it"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "bad-model-config", "names no network and no class"),
        (lambda folder: edit(folder, units=[1]), "bad-model-config", "has no units and sizes as save_network writes them"),
        (lambda folder: edit(folder, sizes={"0.bias": [-1]}), "bad-model-config", "has no units and sizes as save_network writes them"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b""), "pickle-refused", r"holds optimizer\.pt: these can be pickles"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(damage: Callable[[Path], object], code: str, message: str, saved: Path):
    damage(saved)
    with pytest.raises(InputError, match=message) as caught:
        load_network(saved, model=tiny_mlp(6, 8, 4, 2))
    assert caught.value.code == code


def test_another_whole_network_than_the_one_that_was_saved_is_refused(saved: Path):
    message = r"0\.weight of .*config\.json is of shape \(4, 6\), but in the network it is of shape \(4, 5\)\. Pass model= with the sizes"
    with pytest.raises(InputError, match=message) as caught:
        load_network(saved, model=tiny_mlp(5, 8, 4, 2))
    assert caught.value.code == "weights-do-not-match"
    with pytest.raises(InputError, match=r"4\.bias of .*config\.json is missing, but in the network|is of shape .*, but in the network it is missing"):
        load_network(saved, model=tiny_mlp(6, 8, 4, 2, bias=False))
    with pytest.raises(InputError, match="expected the whole network too") as caught:
        load_network(saved)
    assert caught.value.code == "needs-whole-model"
