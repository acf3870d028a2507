"""Claims about DiLoCo: local steps, then an outer step of Nesterov momentum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from partwise.checks import InputError
from partwise.models import tensors_of
from partwise.runs import Stopped
from partwise.train import DiLoCo, LocalSGD, OptimizerSettings, SubnetTrainer
from partwise.train._rounds import SubnetState
from subnet_runs import ADAMW, SGD, loader, perceptron, same_bits
from subnet_twins import image_loader, plain_training, preact_resnet
from tolerances import assert_close


def state(tensors: dict[str, Tensor], outer: dict[str, Tensor] | None = None) -> SubnetState:
    return SubnetState(tensors=tensors, optimizer={}, outer=outer or {}, updates=(1,), round_number=1, holders={})


@given(outer_lr=st.floats(0.1, 2.0), outer_momentum=st.floats(0.0, 0.95), num_rounds=st.integers(1, 5), seed=st.integers(0, 9))
def test_the_outer_step_is_that_of_torch(outer_lr: float, outer_momentum: float, num_rounds: int, seed: int):
    method = DiLoCo(outer_lr=outer_lr, outer_momentum=outer_momentum)
    generator = torch.Generator().manual_seed(seed)
    changes = torch.randn(num_rounds, 4, dtype=torch.float64, generator=generator)
    parameter = nn.Parameter(torch.ones(4, dtype=torch.float64))
    twin = torch.optim.SGD([parameter], lr=outer_lr, momentum=outer_momentum, nesterov=outer_momentum > 0)
    ours = state({"weight": torch.ones(4, dtype=torch.float64)})
    for change in changes:
        ours = state(*method.after_merge(ours, {"weight": ours.tensors["weight"] + change}))
        parameter.grad = -change
        twin.step()
        assert_close(ours.tensors["weight"], parameter.detach(), claim="the mean change is a gradient, turned round")


@pytest.mark.parametrize("settings", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_an_outer_step_of_one_without_momentum_is_local_sgd(settings: OptimizerSettings):
    shared: dict[str, Any] = {"num_parts": 3, "num_local_steps": 3}
    ours, theirs = (
        SubnetTrainer(perceptron(), method, optimizer=settings).fit(loader(), num_rounds=4).state.tensors
        for method in (DiLoCo(outer_lr=1.0, outer_momentum=0.0, **shared), LocalSGD(**shared))
    )
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], claim=f"{name} after four rounds")


def test_one_worker_whose_outer_step_is_one_is_ordinary_training():
    trainer = SubnetTrainer(perceptron(), DiLoCo(num_parts=1, num_local_steps=3, outer_lr=1.0, outer_momentum=0.0), optimizer=SGD)
    trainer.fit(loader(), num_rounds=4)
    for name, tensor in tensors_of(plain_training(perceptron(), trainer, num_rounds=4)).items():
        assert_close(trainer.state.tensors[name], tensor.detach(), claim=f"{name} after four rounds")


def test_momentum_gets_further_than_averaging_where_all_changes_point_the_same_way():
    slow = OptimizerSettings(optimizer="sgd", lr=0.02, momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0)
    losses = {}
    for method in (DiLoCo(num_parts=2, num_local_steps=4), LocalSGD(num_parts=2, num_local_steps=4)):
        trainer = SubnetTrainer(perceptron(), method, optimizer=slow).fit(loader(), num_rounds=20)
        losses[type(method)] = trainer.history[-1].loss_after_merge
    assert losses[DiLoCo] < losses[LocalSGD] - 0.05


def test_statistics_of_batch_normalisation_are_averaged_and_not_stepped():
    """Momentum beyond a falling variance would end below zero."""
    method = DiLoCo()
    before = {
        "1.running_var": torch.full((2,), 10.0),
        "1.running_mean": torch.zeros(2),
        "1.num_batches_tracked": torch.tensor(3),
        "1.weight": torch.ones(2),
    }
    merged = {
        "1.running_var": torch.full((2,), 0.1),
        "1.running_mean": torch.ones(2),
        "1.num_batches_tracked": torch.tensor(9),
        "1.weight": torch.zeros(2),
    }
    tensors, outer = method.after_merge(state(before), dict(merged))
    assert all(torch.equal(tensors[name], merged[name]) for name in merged if name != "1.weight")
    assert list(outer) == ["1.weight"]
    trainer = SubnetTrainer(preact_resnet(), DiLoCo(num_parts=2, num_local_steps=2), optimizer=SGD).fit(image_loader(), num_rounds=3)
    assert trainer.model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_small_changes_of_a_coarse_weight_are_remembered():
    method = DiLoCo(outer_lr=0.5, outer_momentum=0.9)
    before = {"weight": torch.ones(1, dtype=torch.bfloat16)}
    tensors, outer = method.after_merge(state(before), {"weight": torch.full((1,), 1.0078125, dtype=torch.bfloat16)})
    assert tensors["weight"].dtype == torch.bfloat16
    assert_close(outer["weight"], torch.tensor([-0.0078125]), claim="momentum in single precision")


def test_what_is_frozen_stays_to_the_bit():
    model = perceptron()
    model[0].requires_grad_(False)
    trainer = SubnetTrainer(model, DiLoCo(num_parts=2, num_local_steps=2), optimizer=SGD).fit(loader(), num_rounds=3)
    assert torch.equal(trainer.state.tensors["0.weight"], model[0].weight)
    assert not torch.equal(trainer.state.tensors["3.weight"], model[3].weight)


def test_a_run_that_was_stopped_remembers_its_outer_momentum(tmp_path: Path):
    def trainer() -> SubnetTrainer:
        return SubnetTrainer(perceptron(), DiLoCo(num_parts=2, num_local_steps=2), optimizer=SGD)

    stopping = trainer()
    with pytest.raises(Stopped):
        stopping.fit(loader(), num_rounds=4, checkpoints=tmp_path, should_stop=lambda: len(stopping.history) == 2)
    resumed, whole = trainer().fit(loader(), num_rounds=4, checkpoints=tmp_path), trainer().fit(loader(), num_rounds=4)
    assert same_bits(resumed.state.tensors, whole.state.tensors)
    assert same_bits(resumed.state.outer, whole.state.outer)


def test_there_is_no_asynchronous_form():
    with pytest.raises(InputError, match=r"got mode='async' for DiLoCo, .*Pass mode='sync'"):
        SubnetTrainer(perceptron(), DiLoCo(), mode="async")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"outer_lr": 0.0}, r"got outer_lr=0\.0, expected a number above 0\. Pass 0\.7"),
        ({"outer_lr": float("nan")}, r"got outer_lr=nan, expected a number above 0"),
        ({"outer_momentum": 1.0}, r"got outer_momentum=1\.0, expected at least 0 and below 1\. Pass 0\.9"),
        ({"outer_momentum": float("nan")}, r"got outer_momentum=nan, expected at least 0"),
        ({"num_parts": 0}, r"num_parts=0 must be an integer of at least 1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_at_once(settings: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text):
        DiLoCo(**settings)


def test_its_repr_builds_it_again():
    method = DiLoCo(outer_lr=0.5, outer_momentum=0.0)
    assert eval(repr(method)) == method  # noqa: S307 - our own repr
