"""Which samples see which components, and which components learn from them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from adapters import (
    LAYERS,
    SPECTRUM,
    component_errors,
    data,
    fit_one_layer,
    grower,
    levels_in_use,
    lora,
    loss_of,
    mlp,
    own_gradients,
    relative_error,
    train,
    truncated_gradients,
)
from partwise.tune import RepeatForLevels, level_passes
from partwise.tune._levels import deal_levels
from partwise.tune.adapad import controller_of
from tolerances import assert_close

X, Y = data(12)


@pytest.mark.parametrize("schedule", ["exact", "split", "cycle", "joint"])
def test_with_one_component_per_module_every_schedule_is_rank_one_lora(schedule):
    model = grower(budget=3, schedule=schedule, lora_alpha=8, r=4, component_warmup=0)
    plain = lora(mlp(), names=LAYERS, r=1, like=model)
    if schedule == "exact":
        with RepeatForLevels(model):
            losses, _ = train(model, X, Y, num_steps=20)
    else:
        losses, _ = train(model, X, Y, num_steps=20)
    assert losses == train(plain, X, Y, num_steps=20)[0]


def test_joint_without_growth_is_lora_with_a_rank_pattern_to_the_bit():
    model = grower(schedule="joint", budget=7, growth_warmup=1000, ranks=(1, 4, 2))
    plain = lora(mlp(), names=LAYERS, r=1, ranks={"2": 4, "4": 2}, like=model)
    assert train(model, X, Y, num_steps=20)[0] == train(plain, X, Y, num_steps=20)[0]


@pytest.mark.parametrize("successor_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("top_share", [0.0, 0.5])
@pytest.mark.parametrize("schedule", ["split", "cycle"])
def test_the_gradient_equals_brute_force_over_truncated_models(schedule, top_share, successor_weight):
    model = grower(scatter=0.3, ranks=(1, 4, 2), schedule=schedule, successor_weight=successor_weight, top_share=top_share)
    for step in (0, 1):
        controller_of(model).step = step
        controller_of(model).force_level(None)
        model.zero_grad()
        levels = levels_in_use(model, len(X))
        loss_of(model, X, Y).backward()
        expected = truncated_gradients(model, X, Y, levels, successor_weight=successor_weight)
        assert relative_error(own_gradients(model), expected) < 1e-12


def test_private_components_learn_from_their_own_samples_and_from_nobody_else():
    model = grower(scatter=0.3, ranks=(1, 4, 2), schedule="split", advance_learning=True, budget=12)
    levels = levels_in_use(model, len(X))
    assert set(levels.tolist()) == {0, 1, 2, 3, 4}
    loss_of(model, X, Y).backward()
    assert relative_error(own_gradients(model), truncated_gradients(model, X, Y, levels)) < 1e-12


def test_exact_passes_sum_the_gradients_of_all_truncated_models():
    model = grower(scatter=0.3, ranks=(1, 4, 2), schedule="exact", advance_learning=True, budget=12)
    visited = []
    for level in level_passes(model):
        loss_of(model, X, Y).backward()
        visited.append(level)
    assert visited == [1, 2, 3, 4, 0]
    passes = [truncated_gradients(model, X, Y, torch.full((len(X),), level)) for level in visited]
    assert relative_error(own_gradients(model), {name: sum(one[name] for one in passes) for name in passes[0]}) < 1e-12


def test_repeating_samples_gives_the_mean_of_the_exact_passes():
    model = grower(scatter=0.3, ranks=(1, 4, 2), schedule="exact", advance_learning=True, budget=12)
    for _ in level_passes(model):
        loss_of(model, X, Y).backward()
    passes = {name: value / 5 for name, value in own_gradients(model).items()}
    model.zero_grad()
    with RepeatForLevels(model):
        out = model(X)  # (batch * levels, out)
        functional.mse_loss(out, Y.repeat_interleave(5, dim=0)).backward()
    assert relative_error(own_gradients(model), passes) < 1e-12
    model.eval()
    with RepeatForLevels(model):
        assert model(X).shape == Y.shape  # evaluation is left alone


def test_a_flattened_batch_gives_each_token_the_level_of_its_sample():
    model = grower(scatter=0.3, ranks=(1, 4, 2))
    x = torch.randn(8, 3, 6, dtype=torch.float64)
    y = torch.randn(8, 3, 5, dtype=torch.float64)
    functional.mse_loss(model(x), y).backward()
    straight = own_gradients(model)
    model.zero_grad()
    inner = model.base_model.model
    hidden = inner[1](inner[0](x)).flatten(0, 1)  # (batch * seq, hidden): the second layer sees rows of tokens
    out = inner[4](inner[3](inner[2](hidden))).view(8, 3, 5)
    functional.mse_loss(out, y).backward()
    assert relative_error(own_gradients(model), straight) < 1e-12


def test_under_autocast_the_gradient_equals_the_form_without_functions_of_our_own():
    x, y = data(12, dtype=torch.float32)
    model = grower(mlp(dtype=torch.float32), scatter=0.3, ranks=(1, 4, 2))
    levels = levels_in_use(model, len(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(model, x, y).backward()
    actual = own_gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        functional.mse_loss(_without_functions(model, x, levels), y).backward()
    expected = own_gradients(model)
    for name, value in expected.items():
        assert_close(actual[name], value, claim=f"{name}: the same products in bfloat16", rtol=0, atol=0)


def _without_functions(model, x, levels):
    """``z * sees + (x A^T - same.detach()) * learns``, as plain autograd; the same for lora_B."""
    controller = controller_of(model)
    slots = {slot.name: slot for slot in controller.slots}
    for name, module in model.base_model.model.named_children():
        if name not in slots:
            x = module(x)
            continue
        slot = slots[name]
        component = torch.arange(slot.rank)[None, :]
        sees = (component < levels[:, None]).float()
        learns = (component == levels[:, None] - 1).float()
        down, up = slot.down.weight[: slot.rank], slot.up.weight[:, : slot.rank]
        z = functional.linear(x, down.detach())
        own = functional.linear(x.detach(), down)
        z = z * sees.to(z.dtype) + (own - own.detach()) * learns.to(own.dtype)
        out = functional.linear(z, up.detach())
        part = functional.linear(z.detach() * learns.to(z.dtype), up)
        x = slot.base(x) + controller.scale * (out + (part - part.detach()))
    return x


def test_the_head_learns_from_the_mean_of_the_passes_also_when_gradients_accumulate():
    model = get_peft_model_with_head()
    head = next(p for name, p in model.named_parameters() if "modules_to_save.default.weight" in name)
    parts = []
    for half in (slice(0, 6), slice(6, 12)):
        for level in (1, 2):
            controller_of(model).force_level(level)
            parts.append(torch.autograd.grad(loss_of(model, X[half], Y[half]), head)[0] / 2)
    controller_of(model).force_level(None)
    for half in (slice(0, 6), slice(6, 12)):
        for _ in level_passes(model):
            loss_of(model, X[half], Y[half]).backward()
    assert_close(head.grad, sum(parts), claim="two micro-batches, mean over two levels each")


def get_peft_model_with_head():
    from partwise.tune import AdaPaDConfig

    config = AdaPaDConfig(
        target_modules=["0", "2"], modules_to_save=["4"], init_r=2, budget=4, r=2, schedule="exact", joint_start=0.0, finish="deflate"
    )
    model = get_peft_model(mlp(), config).to(torch.float64).train()
    for slot in controller_of(model).slots:
        torch.nn.init.normal_(slot.up.weight, std=0.3)
    return model


@pytest.mark.parametrize("top_share", [0.0, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(("schedule", "batch"), [("split", 8), ("split", 5), ("cycle", 1)])
def test_levels_below_the_top_get_equal_shares_of_what_the_top_leaves(schedule, batch, private, top_share):
    num_steps, num_groups = 400, 4 + private
    dealt = torch.cat([deal_levels(schedule, batch=batch, step=t, num_levels=4, private=private, top_share=top_share) for t in range(num_steps)])
    shares = torch.bincount(dealt, minlength=5).double() / len(dealt)
    expected = torch.full((5,), (1 - top_share) / num_groups, dtype=torch.float64)
    expected[4] += top_share
    expected[0] *= private
    assert_close(shares, expected, claim="up to the remainder of the last round", atol=0.02, rtol=0)


def test_split_gives_sample_n_the_level_n_plus_step():
    levels = deal_levels("split", batch=6, step=3, num_levels=4, private=False, top_share=0.0)
    assert levels.tolist() == [(n + 3) % 4 + 1 for n in range(6)]
    second_worker = deal_levels("split", batch=6, step=3, num_levels=4, private=False, top_share=0.0, offset=6)
    assert second_worker.tolist() == [(n + 3) % 4 + 1 for n in range(6, 12)]


def test_which_samples_are_at_the_top_changes_from_step_to_step():
    is_top = [deal_levels("split", batch=8, step=t, num_levels=4, private=False, top_share=0.25) == 4 for t in range(8)]
    assert all(bool(torch.stack(is_top)[:, position].any()) for position in range(8))


@pytest.mark.parametrize(("num_steps", "tolerance"), [(400, 3e-2), pytest.param(3000, 1e-10, marks=pytest.mark.slow)], ids=["quick", "card"])
def test_exact_training_of_one_layer_finds_the_singular_components(num_steps, tolerance):
    x, y, down, up = fit_one_layer("exact", num_steps)
    assert max(component_errors(x, y, down, up)) < tolerance
    values = torch.tensor(SPECTRUM, dtype=torch.float64)
    for k in range(1, 5):
        residual = (y.T - up[:, :k] @ down[:k] @ x.T).norm()
        assert_close(
            residual, values[k:].norm(), claim=f"{k} components leave the Eckart-Young residual, as far as training went", rtol=tolerance, atol=0
        )


def test_joint_training_of_one_layer_does_not_identify_components():
    x, y, down, up = fit_one_layer("joint", 600)
    assert max(component_errors(x, y, down, up)) > 0.5


def test_split_training_of_one_layer_comes_close_to_the_singular_components():
    x, y, down, up = fit_one_layer("split", 1500)
    assert max(component_errors(x, y, down, up)) < 0.1


def test_two_devices_with_their_own_levels_add_up_to_one_exact_step_also_with_clipping():
    whole, parts = grower(scatter=0.3, ranks=(1, 4, 2), schedule="exact"), grower(scatter=0.3, ranks=(1, 4, 2), schedule="exact")
    for _ in level_passes(whole):
        loss_of(whole, X, Y).backward()
    sums = {name: torch.zeros_like(value) for name, value in own_gradients(parts).items()}
    for device in range(2):
        for level in (1, 2, 3, 4):
            if (level - 1) % 2 == device:
                controller_of(parts).force_level(level)
                loss_of(parts, X, Y).backward()
        sums = {name: sums[name] + value for name, value in own_gradients(parts).items()}
        parts.zero_grad()
    assert relative_error(sums, own_gradients(whole)) == 0.0
    norm = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None])
    assert_close(torch.nn.utils.get_total_norm(list(sums.values())), norm, claim="one norm over both devices", rtol=1e-12)


def test_evaluation_sees_all_active_components_and_no_waiting_or_private_one():
    model = grower(scatter=0.3, ranks=(1, 4, 2), advance_learning=True, budget=12).eval()
    plain = lora(mlp(), names=LAYERS, r=1, ranks={"2": 4, "4": 2}, like=model).eval()
    assert_close(model(X), plain(X), claim="the deployed network")


def test_peft_still_has_the_private_names_that_we_use():
    from peft.tuners.lora.model import LoraModel

    config = LoraConfig()
    config._register_custom_module({torch.nn.Linear: torch.nn.Linear})
    assert config._custom_modules == {torch.nn.Linear: torch.nn.Linear}
    assert isinstance(vars(LoraModel)["_create_new_module"], staticmethod)
