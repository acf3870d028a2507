"""Training one rank-one adapter after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from adapters import PLAIN, adapter_weights, component_errors, data, fit_one_layer, loss_of, mlp, spectrum_problem, train
from partwise.checks import InputError
from partwise.tune import AdaPaDConfig, OneRankAtATime
from partwise.tune.adapad import controller_of
from partwise.tune.finished import active_ranks, finalize
from partwise.tune.one_rank_at_a_time import OneRank
from partwise.tune.recipe import Plan
from tolerances import assert_close

X, Y = data(12, dtype=torch.float32)


def stages(*, r=3, num_steps=12, base=None, **choices):
    base = mlp(dtype=torch.float32) if base is None else base
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    return OneRankAtATime(base, AdaPaDConfig(target_modules=names, r=r, **PLAIN), num_steps=num_steps, **choices)


def components(model, first, last):
    return [
        weight.clone()
        for slot in controller_of(model).slots
        for weight in (slot.down.weight.detach()[first:last], slot.up.weight.detach()[:, first:last])
    ]


def test_a_stage_leaves_finished_components_as_they_are_to_the_bit():
    run = stages(num_steps=12)
    optimiser = torch.optim.AdamW(adapter_weights(run.model), lr=1e-2, weight_decay=0.1)
    run.model.train()
    finished: list[torch.Tensor] = []
    for stage in range(3):
        train(run.model, X, Y, num_steps=4, optimiser=optimiser)
        if stage:
            assert all(torch.equal(mine, old) for mine, old in zip(components(run.model, 0, stage), finished, strict=True))
        finished = components(run.model, 0, stage + 1)
        assert all(float(part.abs().max()) > 0 for part in finished)
    assert run.done
    train(run.model, X, Y, num_steps=2, optimiser=optimiser)
    assert all(torch.equal(mine, old) for mine, old in zip(components(run.model, 0, 3), finished, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_stage_moves_as_under_a_fresh_optimiser(weight_decay):
    run = stages(num_steps=40, r=2)
    optimiser = torch.optim.AdamW(adapter_weights(run.model), lr=1e-2, weight_decay=weight_decay)
    run.model.train()
    train(run.model, X, Y, num_steps=20, optimiser=optimiser)
    slots = controller_of(run.model).slots
    leaves = [(slot.down.weight.detach()[1:2].clone().requires_grad_(), slot.up.weight.detach()[:, 1:2].clone().requires_grad_()) for slot in slots]
    fixed = [
        slot.base.weight.detach() + controller_of(run.model).scale * slot.up.weight.detach()[:, :1] @ slot.down.weight.detach()[:1] for slot in slots
    ]
    fresh = torch.optim.AdamW([leaf for pair in leaves for leaf in pair], lr=1e-2, weight_decay=weight_decay)
    for _ in range(20):
        hidden = X
        for index, (slot, weight, (down, up)) in enumerate(zip(slots, fixed, leaves, strict=True)):
            hidden = functional.linear(hidden, weight + controller_of(run.model).scale * up @ down, slot.base.bias)
            hidden = functional.gelu(hidden) if index < 2 else hidden
        functional.mse_loss(hidden, Y).backward()
        fresh.step()
        fresh.zero_grad()
    train(run.model, X, Y, num_steps=20, optimiser=optimiser)
    for slot, (down, up) in zip(slots, leaves, strict=True):
        assert_close(slot.down.weight.detach()[1:2], down.detach(), claim="float32 and Adam's eps over 20 steps", rtol=0, atol=5e-5)
        assert_close(slot.up.weight.detach()[:, 1:2], up.detach(), claim="float32 and Adam's eps over 20 steps", rtol=0, atol=5e-5)


def test_the_schedule_deals_all_steps():
    assert stages(num_steps=30, schedule=1.0, min_steps=2).steps == (18, 10, 2)
    assert sum(stages(num_steps=31, schedule=-0.5).steps) == 31
    assert stages(num_steps=12).steps == (4, 4, 4)


def test_a_component_that_does_not_help_is_dropped_and_training_ends():
    losses = iter([1.0, 0.5, 0.499, 0.1])
    run = stages(num_steps=12, r=4, tol=0.01, held_out_loss=lambda: next(losses))
    _, optimiser = train(run.model.train(), X, Y, num_steps=9)
    assert run.done
    assert run.held_out_losses == (1.0, 0.5, 0.499)
    assert set(active_ranks(run.model).values()) == {2}
    kept = components(run.model, 0, 2)
    train(run.model, X, Y, num_steps=3, optimiser=optimiser)
    assert all(torch.equal(mine, old) for mine, old in zip(components(run.model, 0, 2), kept, strict=True))
    function = run.model.eval()(X)
    assert_close(finalize(run.model)(X), function, claim="finalised", atol=1e-5)


def test_the_first_component_always_stays_and_the_last_may_be_dropped():
    losses = iter([1.0, 2.0])
    run = stages(num_steps=4, r=2, tol=0.0, held_out_loss=lambda: next(losses))
    train(run.model.train(), X, Y, num_steps=4)
    assert set(active_ranks(run.model).values()) == {1}


def test_held_out_loss_is_asked_in_evaluation_mode_and_training_mode_comes_back():
    modes = []

    def held_out_loss():
        modes.append((run.model.training, torch.is_grad_enabled()))
        return 1.0 / len(modes)

    run = stages(num_steps=6, tol=0.1, held_out_loss=held_out_loss)
    train(run.model.train(), X, Y, num_steps=4)
    assert modes == [(False, False), (False, False)]
    assert run.model.training


@pytest.mark.parametrize("stop_at", [2, 4, 7, 11])
def test_a_resumed_run_finds_its_stage_and_ends_with_the_same_bits(stop_at):
    def fresh():
        return stages(num_steps=12, r=3)

    straight = fresh()
    train(straight.model.train(), X, Y, num_steps=12)
    first = fresh()
    _, optimiser = train(first.model.train(), X, Y, num_steps=stop_at)
    second = fresh()
    other = torch.optim.AdamW(adapter_weights(second.model), lr=1e-2)
    second.model.load_state_dict(first.model.state_dict())
    other.load_state_dict(optimiser.state_dict())
    train(second.model.train(), X, Y, num_steps=12 - stop_at, optimiser=other)
    assert second.done
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(second.model.parameters(), straight.model.parameters(), strict=True))


def test_a_resumed_run_that_had_stopped_stays_stopped():
    losses = iter([1.0, 1.0])
    first = stages(num_steps=12, r=3, tol=0.1, held_out_loss=lambda: next(losses))
    train(first.model.train(), X, Y, num_steps=8)
    second = stages(num_steps=12, r=3, tol=0.1, held_out_loss=lambda: 0.0)
    second.model.load_state_dict(first.model.state_dict())
    kept = components(second.model, 0, 1)
    train(second.model.train(), X, Y, num_steps=2)
    assert second.done
    assert second.held_out_losses == (1.0, 1.0)
    assert all(torch.equal(mine, old) for mine, old in zip(components(second.model, 0, 1), kept, strict=True))


def test_frozen_errors_stay_where_those_of_parallel_deflation_vanish():
    """One linear layer, stages far too short to converge, against the exact schedule with as many steps."""
    x, y = spectrum_problem()
    base = nn.Sequential(nn.Linear(12, 10, bias=False)).to(torch.float64)
    base[0].weight.data.zero_()
    run = OneRankAtATime(base, AdaPaDConfig(target_modules=["0"], r=4, lora_alpha=4, **PLAIN), num_steps=400)
    run.model.to(torch.float64).train()
    optimiser = torch.optim.Adam(adapter_weights(run.model), lr=2e-2)
    for step in range(400):
        for group in optimiser.param_groups:
            group["lr"] = 2e-2 * (1 - step % 100 / 100)
        (functional.mse_loss(run.model(x), y) * 100).backward()
        optimiser.step()
        optimiser.zero_grad()
    slot = controller_of(run.model).slots[0]
    sequential = component_errors(x, y, slot.down.weight.detach(), slot.up.weight.detach())
    parallel = component_errors(*fit_one_layer("exact", 400))
    assert max(sequential) > 3 * max(parallel)


def test_the_recipe_deals_the_budget_and_resumes_through_its_extra_state():
    plan = Plan(num_steps=12, target_r=3, budget=None, seed=0, task_type=None, calibration=lambda: iter(()))
    recipe = OneRank(target_modules="0,2,4")
    straight = recipe.wrap(mlp(dtype=torch.float32), plan).train()
    train(straight, X, Y, num_steps=12)
    first, second = recipe.wrap(mlp(dtype=torch.float32), plan).train(), recipe.wrap(mlp(dtype=torch.float32), plan).train()
    _, optimiser = train(first, X, Y, num_steps=6)
    other = torch.optim.AdamW(adapter_weights(second), lr=1e-2)
    with torch.no_grad():
        for mine, theirs in zip(second.parameters(), first.parameters(), strict=True):
            mine.copy_(theirs)
    other.load_state_dict(optimiser.state_dict())
    recipe.load_extra_state(second, recipe.extra_state(first))
    train(second, X, Y, num_steps=6, optimiser=other)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(second.parameters(), straight.parameters(), strict=True))
    assert set(recipe.ranks(second).values()) == {3}


def test_the_recipe_stops_where_a_component_does_not_help():
    plan = Plan(num_steps=6, target_r=3, budget=None, seed=0, task_type=None, calibration=lambda: iter(()))
    recipe = OneRank(target_modules="0,2,4", tol=0.1)
    model = recipe.wrap(mlp(dtype=torch.float32), plan).train()
    optimiser = torch.optim.AdamW(adapter_weights(model), lr=1e-2)
    losses, went_on = iter([1.0, 0.99]), []
    for step in range(4):
        loss_of(model, X, Y).backward()
        optimiser.step()
        went_on.append(recipe.after_step(model, step, plan, held_out_loss=lambda: next(losses)))
        optimiser.zero_grad()
    assert went_on == [True, True, True, False]
    assert set(recipe.ranks(model).values()) == {1}
    assert set(recipe.ranks(recipe.finish(model)).values()) == {1}


def test_the_learning_rate_warms_up_and_decays_within_each_component():
    plan = Plan(num_steps=100, target_r=2, budget=None, seed=0, task_type="SEQ_CLS", calibration=lambda: iter(()))
    factors = [OneRank().lr_factor(step, plan) for step in range(100)]
    assert factors[:50] == factors[50:]
    assert max(factors) == 1.0
    assert factors[49] < 0.03


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"num_steps": 2}, "num_steps"),
        ({"schedule": float("nan")}, "got alpha=nan, expected a finite number"),
        ({"r": 1, "schedule": 1.0}, "got alpha=1.0 for one component"),
        ({"tol": 0.1}, "tol=0.1 was given without held_out_loss, which decides when to stop. Pass a function without arguments"),
        ({"tol": -0.1, "held_out_loss": lambda: 0.0}, r"tol=-0.1 must lie in \[0, 1\)"),
        ({"tol": float("nan"), "held_out_loss": lambda: 0.0}, r"tol=nan must lie in \[0, 1\)"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(choices, message):
    with pytest.raises(InputError, match=message):
        stages(**choices)


def test_a_budget_below_one_component_per_module_is_refused():
    plan = Plan(num_steps=6, target_r=3, budget=2, seed=0, task_type="SEQ_CLS", calibration=lambda: iter(()))
    with pytest.raises(InputError, match="the budget is 2 components for 3 modules, expected at least one each"):
        OneRank(target_modules="0,2,4").num_components(plan, num_modules=3)
