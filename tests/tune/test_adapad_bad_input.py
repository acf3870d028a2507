"""What AdaPaD refuses, by the text a user reads."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapters import adapter_weights, data, grower, loss_of, mlp, train
from partwise.checks import InputError, RunError
from partwise.tune import AdaPaDConfig, RepeatForLevels, attach, level_passes, rank_table, truncate
from partwise.tune import _controller as controller_module
from partwise.tune.adapad import controller_of

X, Y = data(6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_r": 5, "r": 4}, r"init_r=5 is above the largest rank r=4. Lower init_r or raise r"),
        ({"budget": 6, "target_r": 2.0}, r"budget=6 and target_r=2.0 exclude each other. Pass one of them"),
        ({"target_r": 5.0}, r"target_r=5.0 must lie between init_r=1 and r=4"),
        ({"target_r": 0.5}, r"target_r=0.5 must lie between init_r=1 and r=4"),
        ({"rank_pattern": {"0": 2}}, r"rank_pattern was given, but ranks are what AdaPaD finds. Leave it out, or use LoraConfig"),
        ({"alpha_pattern": {"0": 2}}, r"alpha_pattern was given"),
        ({"use_dora": True}, r"use_dora=True does not work with AdaPaD: its layers must be plain LoRA. Leave it out"),
        ({"lora_bias": True}, r"lora_bias=True does not work with AdaPaD"),
        ({"target_parameters": ["weight"]}, r"target_parameters=\['weight'\] does not work with AdaPaD"),
        ({"layer_replication": [(0, 1)]}, r"layer_replication=.* does not work with AdaPaD"),
        *[
            ({"init_lora_weights": init}, rf"init_lora_weights={init!r} sets all components at once.* Leave it out")
            for init in ("gaussian", "pissa", "pissa_niter_4", "corda", "olora", "loftq", "eva", "lora_ga", "orthogonal", False)
        ],
        ({"schedule": "random"}, r"schedule='random' is not known. Choose one of: exact, split, cycle, joint"),
        ({"preset": "best"}, r"preset='best' is not known. Choose one of: nested, balanced, ordered, paper"),
        ({"finish": "never"}, r"finish='never' is not known. Choose one of: deflate, joint"),
        ({"successor_weight": 1.5}, r"successor_weight=1.5 must lie in \[0, 1\]"),
        ({"top_share": float("nan")}, r"top_share=nan must lie in \[0, 1\]"),
        ({"joint_start": -0.1}, r"joint_start=-0.1 must lie in \[0, 1\]"),
        ({"finish_fraction": 2.0}, r"finish_fraction=2.0 must lie in \[0, 1\]"),
        ({"beta1": 1.0}, r"beta1=1.0 must lie in \[0, 1\). The usual value is 0.85"),
        ({"beta2": -0.1}, r"beta2=-0.1 must lie in \[0, 1\)"),
        ({"r": 0}, r"r=0 must be at least 1"),
        ({"growth_interval": 0}, r"growth_interval=0 must be at least 1"),
        ({"growth_step": 0}, r"growth_step=0 must be at least 1"),
        ({"growth_modules": 0}, r"growth_modules=0 must be at least 1"),
        ({"growth_warmup": -1}, r"growth_warmup=-1 must be at least 0"),
        ({"component_warmup": -1}, r"component_warmup=-1 must be at least 0"),
        ({"total_steps": 0}, r"total_steps=0 must be at least 1. Leave it out where it is unknown"),
    ],
    ids=lambda value: ",".join(f"{name}={setting}" for name, setting in value.items()) if isinstance(value, dict) else "",
)
def test_a_configuration_that_cannot_work_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        AdaPaDConfig(target_modules=["0"], **settings)


@pytest.mark.parametrize("budget", [2, 13])
def test_a_budget_outside_what_the_modules_hold_names_the_range(budget):
    model = grower(budget=budget)
    with pytest.raises(InputError, match=rf"budget={budget} components cannot be dealt to 3 modules of rank 1 to 4: it must be between 3 and 12"):
        model(X)


def test_a_rank_above_a_modules_size_names_the_module():
    with pytest.raises(InputError, match=r"r=6 does not fit 4, whose weight is 5 x 8: pass r=5 or less"):
        grower(r=6)


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.Conv2d(3, 4, 3), "Conv2d"), (nn.Embedding(5, 6), "Embedding"), (nn.MultiheadAttention(8, 2), "MultiheadAttention")]
)
def test_layers_that_are_not_linear_are_refused(layer, name):
    with pytest.raises(InputError, match=rf"layer is a {name}; AdaPaD adapts linear layers only. Leave it out of target_modules"):
        get_peft_model(nn.ModuleDict({"layer": layer}), AdaPaDConfig(target_modules=["layer"], r=2))


def test_one_configuration_drives_one_model():
    config = AdaPaDConfig(target_modules=["4"])
    model = get_peft_model(mlp(), config)
    with pytest.raises(InputError, match=r"this AdaPaDConfig already drives a model \(4 is taken\). Make one config object per model"):
        get_peft_model(mlp(), config)
    model.to(torch.float64).train()(X)
    with pytest.raises(InputError, match="already drives a model"):
        get_peft_model(nn.ModuleDict({"other": mlp()}), config)


def test_an_optimiser_built_before_the_adapter_is_refused():
    base = mlp()
    optimiser = torch.optim.SGD(base.parameters(), lr=1e-2)
    model = grower(base)
    loss_of(model, X, Y).backward()
    with pytest.raises(InputError, match=r"it was built before get_peft_model. Build it after, from the parameters that require gradients"):
        optimiser.step()


def test_an_optimiser_of_another_model_is_left_alone():
    model = grower()
    loss_of(model, X, Y).backward()
    other = mlp()
    train(other, X, Y, num_steps=1, optimiser=torch.optim.SGD(other.parameters(), lr=1e-2))
    assert controller_of(model).step == 0


def test_training_forwards_without_an_optimiser_step_are_noticed(monkeypatch):
    monkeypatch.setattr(controller_module, "FORWARDS_WITHOUT_STEP", 5)
    model = grower()
    for _ in range(5):
        model(X)
    with torch.no_grad():
        model(X)  # generation in training mode is no training
    with pytest.raises(RunError, match=r"6 training forwards, no optimiser step seen.*FSDP1 and DeepSpeed ZeRO-3.*step_done\(model\)"):
        model(X)


def test_optimiser_steps_reset_the_count_of_forwards(monkeypatch):
    monkeypatch.setattr(controller_module, "FORWARDS_WITHOUT_STEP", 5)
    train(grower(), X, Y, num_steps=8)


def test_exact_with_one_forward_per_step_says_what_to_write():
    with pytest.raises(InputError, match=r"level_passes\(model\).*RepeatForLevels\(model\).*schedule='split'"):
        grower(schedule="exact", init_r=2)(X)


def test_exact_needs_rows_that_are_samples():
    model = grower(schedule="exact", init_r=2)
    inner = model.base_model.model
    with RepeatForLevels(model), pytest.raises(InputError, match=r"2 sees 7 rows where the batch has 12.*Use level_passes\(model\)"):
        model(X)
        hidden = inner[1](inner[0](X.repeat_interleave(2, dim=0)))
        inner[2](hidden[:7])


def test_the_schedule_comes_back_when_a_pass_fails():
    model = grower(schedule="exact", init_r=2)
    with pytest.raises(ZeroDivisionError):
        for _ in level_passes(model):
            raise ZeroDivisionError
    passes = level_passes(model)
    next(passes)
    passes.close()
    assert controller_of(model).forced_level is None


def test_a_model_without_a_growing_adapter_says_how_to_get_one():
    plain = get_peft_model(mlp(), LoraConfig(target_modules=["0"]))
    with pytest.raises(InputError, match=r"no growing AdaPaD adapter. Wrap it with get_peft_model\(model, AdaPaDConfig\(...\)\)"):
        controller_of(plain)
    with pytest.raises(InputError, match=r"this model has no LoRA layers with adapter 'default'"):
        rank_table(mlp())


def two_adapters():
    model = get_peft_model(mlp(dtype=torch.float32), LoraConfig(target_modules=["0", "2"], r=2))
    model.add_adapter("second", AdaPaDConfig(target_modules=["0", "2"], budget=3, growth_interval=2, growth_warmup=0))
    return model


def test_a_second_adapter_that_was_not_attached_is_not_saved_as_if_it_had_grown(tmp_path):
    with pytest.raises(InputError, match=r"fixed rank: peft added it to layers that carry LoRA already. Call partwise.tune.attach"):
        two_adapters().save_pretrained(tmp_path)


def test_attach_makes_a_second_adapter_grow(tmp_path):
    model = two_adapters()
    attach(model, "second")
    model.set_adapter("second")
    x, y = data(6, dtype=torch.float32)
    train(model.train(), x, torch.zeros(6, 5) + y, num_steps=6)
    assert controller_of(model, "second").num_components == 3
    assert len(adapter_weights(model)) == 4
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"adapter 'second' grows already. Leave attach out"):
        attach(model, "second")
    with pytest.raises(InputError, match="adapter 'default' was not configured with AdaPaDConfig but LoraConfig"):
        attach(model, "default")


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({}, "got rank=None and budget=None, expected exactly one of them"),
        ({"rank": 1, "budget": 3}, "got rank=1 and budget=3, expected exactly one of them"),
        ({"rank": 0}, "rank=0 cannot be cut from an adapter of rank 2: pass a rank from 1 to 2"),
        ({"rank": 3}, "rank=3 cannot be cut from an adapter of rank 2"),
        ({"budget": 2}, r"budget=2 cannot be cut from 6 components in 3 modules: pass a number from 3 \(one in each module\) to 6"),
        ({"budget": 7}, "budget=7 cannot be cut from 6 components in 3 modules"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused(cut, message):
    with pytest.raises(InputError, match=message):
        truncate(grower(init_r=2), **cut)


def test_weights_of_a_higher_rank_are_refused():
    big, small = grower(init_r=4), grower(r=2)
    with pytest.raises(InputError, match=r"the saved adapter has rank 4 at 0, this configuration allows 1 to r=2. Pass r=4 or more"):
        small.load_state_dict(big.state_dict())


def test_a_growth_state_of_another_r_is_refused():
    big, small = grower(r=4), grower(r=2)
    with pytest.raises(InputError, match=r"the saved growth state of 0 was made with another r than r=2. Use the same r"):
        small.load_state_dict(big.state_dict())
