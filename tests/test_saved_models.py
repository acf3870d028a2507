"""Claims about ``partwise.load``: one function for whatever this package saves, and a light import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import partwise
from model_families import images, rows
from partwise.checks import InputError
from partwise.models import FixedFractionSampler, Part, coupled_axes, extract
from partwise.models.networks import build
from partwise.models.uneven_files import save_uneven
from partwise.train.ticket import Ticket, save_ticket
from tiny import tiny_decoder, tiny_mlp

MLP = {"network": "mlp", "num_inputs": 6, "hidden": [8, 5], "num_classes": 3, "norm": True}
RESNET = {"network": "resnet", "channels": 3, "num_classes": 4, "stem": 4, "stages": [{"width": 4, "stride": 1, "inner": [3, 2]}]}


@pytest.mark.parametrize(("settings", "inputs"), [(MLP, rows(6)), (RESNET, images(8))], ids=["perceptron", "resnet"])
def test_networks_of_the_package_with_layers_of_any_size_are_opened(settings: dict[str, object], inputs: torch.Tensor, tmp_path: Path):
    network = build(settings).eval()
    [part] = FixedFractionSampler(keep=0.5)([axis for axis in coupled_axes(network) if axis.kind != "blocks"], [np.random.default_rng(0)])
    small = extract(network, part)
    save_ticket(Ticket(small, part, 0.5, None, (), 0), tmp_path / "ticket")
    loaded = partwise.load(tmp_path / "ticket")
    assert type(loaded) is type(network)
    assert torch.equal(loaded(inputs), small(inputs))


def test_a_path_may_be_text_and_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_uneven(tiny_decoder("Llama"), Path("~/model"))
    assert (tmp_path / "model" / "config.json").is_file()
    assert type(partwise.load("~/model")) is type(partwise.load(str(tmp_path / "model")))


def test_a_ticket_of_a_network_of_your_own_is_opened_beside_the_whole_one(tmp_path: Path):
    network = tiny_mlp(3, 4, 2)
    [axis] = coupled_axes(network)
    part = Part({axis.name: (0, 3)})
    small = extract(network, part).eval()
    save_ticket(Ticket(small, part, 0.5, None, (), 0), tmp_path / "ticket")
    assert torch.equal(partwise.load(tmp_path / "ticket", model=tiny_mlp(3, 4, 2, seed=7))(rows(3)), small(rows(3)))
    with pytest.raises(InputError, match=r"holds a part of a torch\..*\.Sequential, .* Pass model=, made by its own constructor, trained or not\.") as caught:
        partwise.load(tmp_path / "ticket")
    assert caught.value.code == "needs-whole-model"


def test_an_adapter_is_told_what_opens_it(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"This is an adapter: use peft\.PeftModel\.from_pretrained\(model, folder\)\."):
        partwise.load(tmp_path)


def test_the_name_costs_no_import_until_it_is_called():
    program = "import sys, partwise; partwise.load; assert not {'torch', 'transformers', 'partwise.saved_models'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
