"""Which modules get more components, when, and how new components move."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional

from adapters import adapter_weights, data, grower, loss_of, mlp, set_ranks, train
from partwise.tune import AdaPaDConfig, finalize, rank_table, step_done
from partwise.tune._growth import importance, is_growth_step, module_scores, pace, scoring_matters, smooth
from partwise.tune._row_age import age_factor
from partwise.tune.adapad import controller_of
from partwise.tune.finished import active_ranks
from partwise.tune.truncation import lora_layers
from tolerances import assert_close

X, Y = data(12)
FAST = {"growth_interval": 2, "growth_warmup": 2, "component_warmup": 0}


def ranks(model):
    return tuple(slot.rank for slot in controller_of(model).slots)


@pytest.mark.parametrize("schedule", ["split", "joint"])
def test_capacity_goes_to_the_layer_that_needs_it(schedule):
    """The second layer of four needs a change of rank four, the others a slight one of rank one; the budget is exactly that.

    A case made for the method: with other draws of the networks a neighbour of that layer takes one of the components.
    """
    sizes = (8, 24, 24, 8, 8)
    base = mlp(sizes=sizes, dtype=torch.float32)
    for layer in base[::2]:
        layer.weight.data *= 2
    teacher = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    for layer, rank, size in ((0, 1, 0.1), (2, 4, 2.0), (4, 1, 0.1), (6, 1, 0.1)):
        num_outputs, num_inputs = teacher[layer].weight.shape
        left = torch.linalg.qr(torch.randn(num_outputs, rank, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(num_inputs, rank, generator=generator)).Q
        teacher[layer].weight.data += size * left @ right.T
    x = torch.randn(192, sizes[0], generator=generator)
    with torch.no_grad():
        y = teacher(x)
    model = grower(base, schedule=schedule, budget=7, growth_interval=100, growth_warmup=100, growth_modules=1)
    train(model, x, y, num_steps=401)
    assert ranks(model) == (1, 4, 1, 1)


def test_growth_keeps_the_function_and_spends_the_budget_exactly():
    model = grower(schedule="split", budget=8, growth_step=2, growth_modules=2, **FAST)
    optimiser = torch.optim.AdamW(adapter_weights(model), lr=1e-2)
    controller = controller_of(model)
    seen = [ranks(model)]
    for _ in range(12):
        loss_of(model, X, Y).backward()
        grow = controller.grow
        around = []

        def watched(grow=grow, around=around):
            model.eval()
            around.append(model(X))
            grow()
            around.append(model(X))
            model.train()

        controller.grow = watched
        optimiser.step()
        controller.grow = grow
        if around:
            assert_close(*around, claim="b = 0; the sum over components may be taken in another order", rtol=0, atol=1e-15)
        optimiser.zero_grad()
        seen.append(ranks(model))
    assert sum(seen[-1]) == 8
    assert all(sum(one) <= 8 for one in seen)
    assert len(set(seen)) > 2


@pytest.mark.parametrize(("kind", "settings"), [(torch.optim.Adam, {}), (torch.optim.AdamW, {"weight_decay": 0.1}), (torch.optim.SGD, {})])
def test_a_late_component_moves_as_under_an_optimiser_born_with_it(kind, settings):
    """A steady gradient, a component that joins at step 40, and a twin with a fresh optimiser from then on."""
    model = grower(schedule="joint", budget=12, growth_warmup=10**6, component_warmup=0)
    controller = controller_of(model)
    slot = controller.slots[0]
    optimiser = kind(adapter_weights(model), lr=1e-2, **settings)
    gradients = torch.Generator().manual_seed(0)

    def step(gradient):
        slot.down.weight.grad = torch.zeros_like(slot.down.weight)
        slot.down.weight.grad[: slot.rank] = gradient[: slot.rank]
        optimiser.step()

    for _ in range(40):
        step(torch.randn(slot.down.weight.shape, generator=gradients, dtype=torch.float64) + 1)
    controller._activate(slot, 2, had_private=False)
    twin = slot.down.weight.detach()[1].clone().requires_grad_()
    fresh = kind([twin], lr=1e-2, **settings)
    for _ in range(120):
        gradient = torch.randn(slot.down.weight.shape, generator=gradients, dtype=torch.float64) + 1
        step(gradient)
        twin.grad = gradient[1].clone()
        fresh.step()
        assert_close(slot.down.weight.detach()[1], twin.detach(), claim="same moves, up to Adam's eps", rtol=0, atol=2e-6)


def test_without_the_correction_a_late_component_would_move_several_times_too_far():
    excess = [1 / age_factor(age, 10**5, betas=(0.9, 0.999), warmup=0) for age in (1, 12, 100)]
    assert [round(times, 1) for times in excess] == [3.2, 6.6, 3.2]


def test_component_warmup_ramps_the_first_steps():
    assert [age_factor(age, age, betas=(0.9, 0.999), warmup=4) for age in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]


def test_scoring_only_before_events_makes_the_same_decisions(monkeypatch):
    def run():
        model = grower(schedule="split", budget=6, growth_interval=80, growth_warmup=80, growth_modules=1, component_warmup=0)
        optimiser = torch.optim.AdamW(adapter_weights(model), lr=1e-2)
        train(model, X, Y, num_steps=159, optimiser=optimiser)
        scores = controller_of(model).scores()
        train(model, X, Y, num_steps=90, optimiser=optimiser)
        return scores, ranks(model)

    windowed, windowed_ranks = run()
    monkeypatch.setattr("partwise.tune._growth.scoring_matters", lambda *_, **__: True)
    always, always_ranks = run()
    assert windowed_ranks == always_ranks
    assert_close(windowed, always, claim="0.05 % of the largest score", rtol=0, atol=5e-4 * float(always.max()))


def test_importance_is_the_sum_over_the_entries_of_a_component():
    down, up = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]])
    scores = importance([down], [torch.tensor([[1.0, 1.0], [-1.0, 0.0]])], [up], [torch.tensor([[2.0, -1.0]])])
    assert scores.tolist() == [[1 + 2 + 10, 3 + 0 + 6]]


def test_the_variability_is_measured_from_the_new_average_and_waiting_components_do_not_count():
    mean, variability = torch.zeros(1, 2), torch.zeros(1, 2)
    smooth(mean, variability, torch.tensor([[1.0, 2.0]]), beta1=0.5, beta2=0.5)
    assert mean.tolist() == [[0.5, 1.0]]
    assert variability.tolist() == [[0.25, 0.5]]
    assert module_scores(mean, variability, [1]).tolist() == [0.125]
    assert module_scores(mean, variability, [2]).tolist() == [(0.125 + 0.5) / 2]


def test_growth_happens_every_interval_after_the_warm_up():
    assert [t for t in range(1, 60) if is_growth_step(t, interval=10, warmup=20)] == [30, 40, 50]
    assert [t for t in range(1, 60) if is_growth_step(t, interval=10, warmup=25)] == [30, 40, 50]
    assert not scoring_matters(300, interval=1000, warmup=0)
    assert scoring_matters(937, interval=1000, warmup=0)
    assert not scoring_matters(937, interval=1000, warmup=1000)


@pytest.mark.parametrize("total_steps", [10, 30, 100, 300, 5000])
@pytest.mark.parametrize(("missing", "modules"), [(1, 1), (36, 36), (144, 72), (3, 37)])
def test_a_run_of_known_length_spends_its_budget_in_time(total_steps, missing, modules):
    found = pace(missing, modules, total_steps=total_steps, interval=None, warmup=None, modules=None)
    events = sum(is_growth_step(t, interval=found.interval, warmup=found.warmup) for t in range(1, total_steps // 2 + 1))
    assert events * found.modules >= missing


def test_private_components_keep_what_they_learned_when_they_become_active():
    model = grower(schedule="split", budget=5, advance_learning=True, growth_modules=1, **FAST)
    optimiser = torch.optim.AdamW(adapter_weights(model), lr=1e-2)
    train(model, X, Y, num_steps=3, optimiser=optimiser)
    columns = [slot.up.weight.detach()[:, 1].clone() for slot in controller_of(model).slots]
    assert all(float(column.abs().max()) > 0 for column in columns)
    train(model, X, Y, num_steps=1, optimiser=optimiser)
    grown = ranks(model).index(2)
    assert float(controller_of(model).slots[grown].up.weight.detach()[:, 1].abs().max()) > 0.5 * float(columns[grown].abs().max())


def test_private_components_that_never_became_active_leave_nothing_in_a_merge():
    model = grower(schedule="split", budget=4, advance_learning=True, growth_modules=1, **FAST)
    train(model, X, Y, num_steps=8)
    assert sum(ranks(model)) == 4
    model.eval()
    before = model(X)
    assert_close(copy.deepcopy(model).merge_and_unload()(X), before, claim="merging adds active components only")


def test_waiting_components_start_from_their_seed_whatever_weight_decay_did():
    model = grower(schedule="split", budget=4, growth_interval=4, growth_warmup=0, growth_modules=1, component_warmup=0)
    optimiser = torch.optim.AdamW(adapter_weights(model), lr=1e-1, weight_decay=0.9)
    train(model, X, Y, num_steps=4, optimiser=optimiser)
    slot = controller_of(model).slots[ranks(model).index(2)]
    assert_close(slot.down.weight.detach()[1], slot._fresh_row(1).double(), claim="drawn again at activation")


def test_hooks_count_every_step_once_and_go_when_the_model_dies():
    from torch.optim import optimizer as hooks

    gc.collect()
    before = len(hooks._global_optimizer_pre_hooks), len(hooks._global_optimizer_post_hooks)
    model = grower(budget=6, **FAST)
    train(model, X, Y, num_steps=3)
    other = nn.Linear(2, 2)
    train(other, torch.ones(3, 2), torch.ones(3, 2), num_steps=4)
    assert controller_of(model).step == 3
    assert len(hooks._global_optimizer_pre_hooks) == before[0] + 1
    del model
    gc.collect()
    assert (len(hooks._global_optimizer_pre_hooks), len(hooks._global_optimizer_post_hooks)) == before


def test_finalize_removes_the_hooks_and_leaves_plain_layers_of_the_same_function():
    from torch.optim import optimizer as hooks

    model = grower(budget=6, **FAST)
    train(model, X, Y, num_steps=8)
    before, found, expected = len(hooks._global_optimizer_pre_hooks), active_ranks(model), model.eval()(X)
    finalize(model)
    assert len(hooks._global_optimizer_pre_hooks) == before - 1
    assert all(type(layer.lora_A["default"]) is nn.Linear for layer in lora_layers(model).values())
    assert_close(model(X), expected, claim="singular order changes nothing")
    assert active_ranks(model) == found == {name: layer.r["default"] for name, layer in lora_layers(model).items()}


def test_a_copy_of_the_model_keeps_growing_on_its_own():
    model = grower(budget=6, **FAST)
    train(model, X, Y, num_steps=1)
    twin = copy.deepcopy(model)
    train(twin, X, Y, num_steps=9)
    assert sum(ranks(twin)) == 6
    assert ranks(model) == (1, 1, 1)
    assert controller_of(model).step == 1
    assert twin.peft_config["default"].to_dict()["r"] == max(ranks(twin))
    assert model.peft_config["default"].to_dict()["r"] == 1


def test_steps_that_hooks_cannot_see_are_reported_by_hand():
    model = grower(budget=6, **FAST)
    for _ in range(10):
        loss_of(model, X, Y).backward()
        step_done(model)
    assert sum(ranks(model)) == 6


def test_gradient_accumulation_counts_optimiser_steps_only():
    model = grower(budget=6, **FAST)
    optimiser = torch.optim.SGD(adapter_weights(model), lr=1e-2)
    for micro in range(6):
        loss_of(model, X, Y).backward()
        if micro % 3 == 2:
            optimiser.step()
            optimiser.zero_grad()
    assert controller_of(model).step == 2


def test_steps_with_another_adapter_active_do_not_count():
    from peft import LoraConfig

    model = grower(budget=6, **FAST)
    model.add_adapter("other", LoraConfig(target_modules=["0"], r=2))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    model.set_adapter("other")
    train(model, X, Y, num_steps=2, optimiser=optimiser)
    assert controller_of(model).step == 0
    model.set_adapter("default")
    train(model, X, Y, num_steps=2, optimiser=optimiser)
    assert controller_of(model).step == 2
    with model.disable_adapter():
        assert_close(model(X).float(), mlp()(X).float(), claim="the base model")


def test_a_short_batch_does_not_end_split_but_mixed_rows_do(caplog):
    model = grower(scatter=0.1, ranks=(1, 4, 2))
    controller = controller_of(model)
    model(X[:2])
    assert len(controller._levels()) == 1
    model(X)
    assert len(controller._levels()) == 12
    model(X[:2])
    assert caplog.text.count("cannot hold 4 levels") == 1
    inner = model.base_model.model
    inner[2](inner[1](inner[0](X))[:7])
    assert controller.phase() == "cycle"
    assert "sees 7 rows where the batch has 12" in caplog.text


def test_rank_table_lists_every_component_with_its_score():
    model = grower(budget=6, growth_modules=1, **FAST)
    train(model, X, Y, num_steps=20)
    table = rank_table(model)
    assert len(table.parts) == 6
    assert [part.status for part in table.parts].count("kept") == 3
    assert all(part.score > 0 for part in table.parts if part.index == 0)
    assert {part.where: part.parameters for part in table.parts} == {"0": 14, "2": 16, "4": 13}
    finalize(model)
    assert len(rank_table(model).parts) == 6


def test_the_joint_start_ends_with_a_rotation_that_keeps_the_function():
    model = grower(schedule="split", budget=12, init_r=4, joint_start=0.5, total_steps=8, successor_weight=1.0)
    controller = controller_of(model)
    optimiser = torch.optim.AdamW(adapter_weights(model), lr=1e-2)
    train(model, X, Y, num_steps=3, optimiser=optimiser)
    assert controller.phase() == "joint"
    around = []
    rotate = controller.rotate

    def watched(optimiser):
        model.eval()
        around.append(model(X))
        rotate(optimiser)
        around.append(model(X))
        model.train()

    controller.rotate = watched
    train(model, X, Y, num_steps=5, optimiser=optimiser)
    assert controller.phase() == "split"
    assert len(around) == 2
    assert_close(*around, claim="rotation keeps the function")


@pytest.mark.parametrize("finish", ["deflate", "joint"])
def test_finish_says_how_training_ends(finish):
    model = grower(schedule="split", budget=12, init_r=4, finish=finish, finish_fraction=0.25, total_steps=8)
    phases = []
    for step in range(8):
        controller_of(model).step = step
        phases.append(controller_of(model).phase())
    assert phases == ["split"] * 6 + [{"deflate": "split", "joint": "joint"}[finish]] * 2


def test_where_the_length_is_unknown_the_phases_follow_the_budget():
    model = grower(schedule="split", budget=6, finish="joint")
    assert controller_of(model).phase() == "split"
    set_ranks(controller_of(model), (2, 2, 2))
    assert controller_of(model).phase() == "joint"


def test_pickled_and_copied_configurations_are_equal_and_work():
    config = AdaPaDConfig(target_modules=["0"], r=2, budget=1)
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):  # noqa: S301 - our own bytes
        assert twin.to_dict() == config.to_dict()
        assert active_ranks(get_peft_model(mlp(), twin)) == {"0": 1}


@pytest.mark.filterwarnings("ignore")  # dynamo warns about its own work
def test_a_compiled_model_trains_and_grows():
    model = grower(mlp(dtype=torch.float32), schedule="cycle", budget=6, **FAST)
    x, y = data(12, dtype=torch.float32)
    compiled = torch.compile(model, backend="eager")
    optimiser = torch.optim.AdamW(adapter_weights(model), lr=1e-2)
    for _ in range(8):
        functional.mse_loss(compiled(x), y).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert sum(ranks(model)) == 6
