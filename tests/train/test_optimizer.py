"""Settings of local steps, and AdamW whose coordinates have ages of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from partwise.checks import InputError
from partwise.train import IST, LocalSGD, OptimizerSettings, SubnetTrainer
from partwise.train._moments import UnitAdamW
from subnet_runs import ADAMW, Halves, loader, perceptron
from tolerances import assert_close


def test_with_one_age_for_all_it_is_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    one, other = UnitAdamW([ours], lr=0.1, weight_decay=0.1), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1)
    for _ in range(10):
        ours.grad = torch.randn(3, 4)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    assert_close(ours.detach(), theirs.detach(), claim="ten steps agree")


@given(ages=st.lists(st.integers(0, 6), min_size=3, max_size=3))
def test_every_coordinate_gets_the_bias_correction_of_its_own_age(ages: list[int]):
    """Each column is its own AdamW that has made as many steps as its age says."""
    generator = torch.Generator().manual_seed(sum(ages))
    together, moments = nn.Parameter(torch.ones(2, 3)), {"exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 3), "step": torch.zeros(1, 3)}
    alone = []
    for column, age in enumerate(ages):
        parameter = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0)
        for _ in range(age):
            parameter.grad = torch.randn(2, generator=generator)
            optimizer.step()
        with torch.no_grad():
            together[:, column] = parameter
        for slot in ("exp_avg", "exp_avg_sq") if age else ():
            moments[slot][:, column] = optimizer.state[parameter][slot]
        moments["step"][0, column] = age
        alone.append((parameter, optimizer))
    ours = UnitAdamW([together], lr=0.1, weight_decay=0.0)
    ours.state[together] = moments
    gradient = torch.randn(2, 3, generator=generator)
    together.grad = gradient
    ours.step()
    for column, (parameter, optimizer) in enumerate(alone):
        parameter.grad = gradient[:, column].clone()
        optimizer.step()
        assert_close(together[:, column].detach(), parameter.detach(), claim=f"column {column} of age {ages[column]}")


def test_carried_counts_are_the_steps_for_which_an_entry_was_held():
    trainer = SubnetTrainer(perceptron(), Halves(disjoint=True, num_parts=4), optimizer=ADAMW).fit(loader(), num_rounds=5)
    counts = trainer.state.optimizer["step"]
    assert counts["0.weight"].shape == (8, 1)
    assert counts["3.weight"].shape == (8, 8)
    assert bool((counts["0.weight"] == 15).all()), "dealt out without remainder, every neuron is held once a round"
    held = torch.zeros(8, 8)
    rounds = trainer._rounds(5)
    for number in range(1, 6):
        for part in rounds.parts_of(number):
            held[torch.tensor(part.units["3"])[:, None], torch.tensor(part.units["0"])] += 3
    assert torch.equal(counts["3.weight"], held)


def test_the_rule_for_moments_follows_the_optimiser_where_it_is_left_open():
    plain = OptimizerSettings(optimizer="sgd", momentum=0.0)
    assert [settings.state_rule(None) for settings in (ADAMW, OptimizerSettings(optimizer="sgd"), plain)] == ["carry", "reset", "none"]
    assert plain.state_rule("carry") == "none"


@given(step=st.integers(0, 99), warmup=st.sampled_from([0.0, 0.1, 0.5]))
def test_the_learning_rate_rises_once_falls_once_and_ends_at_a_tenth(step: int, warmup: float):
    settings = OptimizerSettings(lr=2.0, warmup=warmup)
    rates = [settings.lr_at(number, 100) for number in range(101)]
    assert 0 < rates[step] <= 2.0
    rising = step < round(100 * warmup) - 1
    assert rates[step + 1] > rates[step] if rising else rates[step + 1] <= rates[step]
    assert rates[100] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"lr": 0.0}, "got lr=0.0, expected a number above 0"),
        ({"lr": float("nan")}, "got lr=nan"),
        ({"weight_decay": -1.0}, "got weight_decay=-1.0"),
        ({"momentum": 1.0}, "got momentum=1.0"),
        ({"betas": (0.9, 1.0)}, "got betas="),
        ({"warmup": 2.0}, "got warmup=2.0"),
        ({"grad_clip": 0.0}, "got grad_clip=0.0"),
    ],
)
def test_settings_that_cannot_train_are_refused(setting: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text) as caught:
        OptimizerSettings(**setting)
    assert caught.value.code == "optimizer-setting"


@pytest.mark.parametrize("settings", [{"optimizer": "lion"}, {"schedule": "linear"}, {"betas": (0.9,)}], ids=str)
def test_an_optimizer_that_does_not_exist_is_refused(settings: dict):
    with pytest.raises(InputError, match=r"lion|linear|two numbers"):
        OptimizerSettings(**settings)


def test_an_unknown_rule_for_the_optimizer_state_is_refused():
    with pytest.raises(InputError, match="optimizer_state='keep' is not known"):
        IST(optimizer_state="keep")  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [perceptron().requires_grad_(False), nn.ReLU()], ids=["frozen", "no parameters"])
def test_a_model_with_nothing_to_train_is_refused(model: nn.Module):
    with pytest.raises(InputError, match="without a parameter that requires a gradient") as caught:
        SubnetTrainer(model, LocalSGD(num_parts=2))
    assert caught.value.code == "nothing-to-train"
