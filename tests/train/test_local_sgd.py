"""Claims about Local SGD: periodic averaging of whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model_families import FAMILIES, generators
from partwise.checks import InputError
from partwise.models import Part, tensors_of
from partwise.train import DiLoCo, LocalSGD, OptimizerSettings, SubnetTrainer
from subnet_runs import SGD, loader, perceptron, same_bits
from subnet_twins import MOMENTUM, cut_and_merged, image_loader, plain_training, preact_resnet, sizes_of
from tolerances import assert_close


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_split_whatever_the_model(family: str):
    model = FAMILIES[family][0]()
    assert LocalSGD().find_axes(model) == ()
    assert LocalSGD().deal((), generators(3)) == [Part({}, index=index) for index in range(3)]
    assert same_bits(cut_and_merged(model, LocalSGD(), generators(3)), tensors_of(model))


@pytest.mark.parametrize("settings", [SGD, MOMENTUM], ids=["sgd", "momentum"])
def test_one_worker_is_ordinary_training_to_the_bit(settings: Any):
    model = perceptron()
    trainer = SubnetTrainer(model, LocalSGD(num_parts=1, num_local_steps=3), optimizer=settings).fit(loader(), num_rounds=4)
    assert same_bits(trainer.state.tensors, tensors_of(plain_training(model, trainer, num_rounds=4)))


def test_the_mean_of_parameters_is_the_old_value_and_the_mean_of_changes():
    trainer = SubnetTrainer(perceptron(), LocalSGD(num_parts=3, num_local_steps=2), optimizer=SGD).fit(loader(), num_rounds=1)
    rounds = trainer._rounds(1)
    old = tensors_of(perceptron())
    arrived = [rounds.work(part).tensors for part in rounds.split(rounds.first_state(old))]
    for name, new in trainer.state.tensors.items():
        change = torch.stack([tensors[name] - old[name].detach() for tensors in arrived]).mean(0)
        assert_close(new, old[name].detach() + change, claim=f"{name}: all workers start from one snapshot")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_it_learns_with_and_without_a_barrier(mode: Any):
    trainer = SubnetTrainer(perceptron(), LocalSGD(num_parts=3, num_local_steps=5), optimizer=OptimizerSettings(lr=0.02), mode=mode).fit(
        loader(), num_rounds=12
    )
    assert trainer.history[-1].loss_after_local < 0.7 * trainer.history[0].loss_after_split
    assert trainer.history[-1].coverage == 1.0


def test_a_round_sends_every_parameter_to_every_worker_and_back():
    trainer = SubnetTrainer(perceptron(), LocalSGD(num_parts=3, num_local_steps=1), optimizer=SGD).fit(loader(), num_rounds=1)
    assert trainer.history[0].bytes_down + trainer.history[0].bytes_up == 2 * 3 * sizes_of(perceptron()) * 4


def test_statistics_of_batch_normalisation_are_averaged_and_counts_are_not():
    trainer = SubnetTrainer(preact_resnet(), LocalSGD(num_parts=2, num_local_steps=3), optimizer=SGD, probe_every=0).fit(image_loader(), num_rounds=2)
    counts = {int(tensor) for name, tensor in trainer.state.tensors.items() if name.endswith("num_batches_tracked")}
    assert counts == {6}
    assert all(bool((tensor > 0).all()) for name, tensor in trainer.state.tensors.items() if name.endswith("running_var"))


@pytest.mark.parametrize(
    "method", [LocalSGD(num_parts=2, num_local_steps=1), DiLoCo(num_parts=2, num_local_steps=1)], ids=lambda method: type(method).__name__
)
def test_a_model_that_was_never_split_gives_no_tickets(method: LocalSGD):
    trainer = SubnetTrainer(perceptron(), method, optimizer=SGD).fit(loader(), num_rounds=1)
    text = rf"got keep=0\.5 for a model trained by {type(method).__name__}, which splits nothing, .*Train with TwIST, IST, ResIST or LoFT"
    with pytest.raises(InputError, match=text) as caught:
        trainer.ticket(0.5)
    assert caught.value.code == "no-tickets"


def test_its_repr_builds_it_again():
    method = LocalSGD(num_parts=2, num_local_steps=(3, 4), blend=0.3)
    assert eval(repr(method)) == method  # noqa: S307 - our own repr
