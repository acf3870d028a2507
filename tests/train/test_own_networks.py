"""Tickets of networks that a user built, and calls that mistake one thing for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from partwise.checks import InputError, RunError
from partwise.models.networks import build
from partwise.train import IST, SubnetTrainer, load_ticket
from partwise.train.ticket import cut, save_ticket
from subnet_runs import SGD, Halves, dataset, loader, perceptron


def test_a_ticket_of_a_network_of_ones_own_opens_again_beside_the_whole_model(tmp_path: Path):
    trainer = SubnetTrainer(perceptron(), Halves(), optimizer=SGD).fit(loader(), num_rounds=2)
    ticket = trainer.ticket(0.5)
    ticket.save(tmp_path / "half")
    opened = load_ticket(tmp_path / "half", model=perceptron(seed=5))
    rows = dataset().tensors[0]
    assert torch.equal(opened(rows), ticket.model(rows))
    assert sum(entry.numel() for entry in opened.parameters()) == ticket.num_parameters


def test_without_the_whole_model_it_is_refused(tmp_path: Path):
    SubnetTrainer(perceptron(), Halves(), optimizer=SGD).fit(loader(), num_rounds=1).ticket(0.5).save(tmp_path / "half")
    with pytest.raises(InputError, match=r"holds a part of a torch\..*\.Sequential, .* expected the whole network too\. Pass model=") as caught:
        load_ticket(tmp_path / "half")
    assert caught.value.code == "needs-whole-model"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"method": "ist"}, "got 'ist' as method, expected a method of this room"),
        ({"method": IST}, "as method, expected a method of this room"),
        ({"method": IST(num_parts=2), "optimizer": "adamw"}, "got 'adamw' as optimizer, expected OptimizerSettings"),
    ],
)
def test_a_name_or_a_class_in_the_place_of_a_method_is_refused(settings: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text) as caught:
        SubnetTrainer(perceptron(), **settings)
    assert caught.value.code == "not-a-method"


def test_a_loss_that_breaks_after_the_last_step_is_named_too():
    calls = [0]

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        calls[0] += 1
        value = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        return value * float("inf") if calls[0] == 4 else value

    with pytest.raises(RunError, match="the loss of part 0 in round 1 became inf after its last local step") as caught:
        SubnetTrainer(perceptron(), Halves(), optimizer=SGD, loss=loss).fit(loader(), num_rounds=2)
    assert caught.value.code == "loss-not-finite"


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut short"), "damaged-weights"),
        (lambda folder: (folder / "model.safetensors").unlink(), "damaged-weights"),
        (lambda folder: save_file({"head.weight": torch.zeros(2)}, folder / "model.safetensors"), "weights-do-not-match"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "no-ticket"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "no-ticket"),
    ],
    ids=["damaged", "missing", "others", "no class", "no object"],
)
def test_a_broken_ticket_is_refused(damage: Any, code: str, tmp_path: Path):
    method, model = IST(num_parts=2), build({"network": "mlp", "num_inputs": 6, "hidden": [8, 8], "num_classes": 3})
    save_ticket(cut(method, model, method.find_axes(model), 0.5), tmp_path / "half")
    damage(tmp_path / "half")
    with pytest.raises(InputError) as caught:
        load_ticket(tmp_path / "half")
    assert caught.value.code == code
