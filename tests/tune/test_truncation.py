"""Cutting trailing components: what stays the same, what is best, what is put back."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters import LAYERS, data, grower, mlp, train
from partwise.tune import rank_table, truncate
from partwise.tune.truncation import component_energy, factors, keep_components, lora_layers, plan_cut, ranks_of, singular_order
from tolerances import assert_close

X, _ = data(9)


def plain(*, r: int = 3, sizes: tuple[int, ...] = (6, 8, 8, 5)):
    """A plain LoRA model with random factors, in float64."""
    model = get_peft_model(mlp(sizes=sizes), LoraConfig(target_modules=LAYERS, r=r, lora_alpha=2 * r)).to(torch.float64).eval()
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    return model


def updates(model):
    return {name: scale * up @ down for name, layer in lora_layers(model).items() for down, up, scale in [factors(layer, "default")]}


def test_singular_order_keeps_the_function_and_sorts_components():
    model = plain()
    before, energy = model(X), {name: sum(values) for name, values in component_energy(model).items()}
    singular_order(model)
    assert_close(model(X), before, claim="a rotation inside each module")
    for name, values in component_energy(model).items():
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(float(updates(model)[name].norm() ** 2))
        assert sum(values) != pytest.approx(energy[name])


def test_singular_order_of_an_adapter_wider_than_its_layer_keeps_the_function():
    model = plain(r=8, sizes=(6, 3, 4, 2))
    before = model(X)
    singular_order(model)
    assert_close(model(X), before, claim="components without room become zero")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_cut_at_rank_k_is_the_best_rank_k_approximation_of_every_module(rank):
    model = plain()
    small = updates(truncate(model, rank=rank))
    for name, update in updates(model).items():
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        assert_close(small[name], left[:, :rank] * values[:rank] @ right[:rank], claim="Eckart-Young", atol=1e-10)


def test_truncate_leaves_the_original_alone_and_shares_its_base_weights():
    model = grower(scatter=0.3, init_r=3, r=4).eval()
    before, weights = model(X), [p.detach().clone() for p in model.parameters()]
    small = truncate(model, rank=1)
    assert all(torch.equal(mine, old) for mine, old in zip(model.parameters(), weights, strict=True))
    assert torch.equal(model(X), before)
    bases = [(layer.get_base_layer().weight, lora_layers(small)[name].get_base_layer().weight) for name, layer in lora_layers(model).items()]
    assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in bases)
    train(small.train(), *data(9), num_steps=2)
    assert torch.equal(model(X), before)
    assert set(ranks_of(small).values()) == {1}


def test_a_budget_goes_where_the_energy_is_and_leaves_one_component_everywhere():
    model = plain()
    for factor, layer in zip((0.01, 1.0, 5.0), lora_layers(model).values(), strict=True):
        layer.lora_B["default"].weight.data *= factor
    singular_order(model)
    kept = plan_cut(model, budget=6)
    assert sum(kept.values()) == 6
    assert kept["0"] == 1
    assert kept["4"] == 3
    assert plan_cut(model, budget=3) == dict.fromkeys(LAYERS, 1)
    assert plan_cut(model, budget=9) == dict.fromkeys(LAYERS, 3)
    assert plan_cut(model, rank=2) == dict.fromkeys(LAYERS, 2)
    small = truncate(model, budget=6)
    assert ranks_of(small) == kept
    assert len(rank_table(small).parts) == 6


def test_a_cut_saves_less_and_its_configuration_says_so():
    small = truncate(plain(), budget=5)
    config = small.peft_config["default"]
    assert config.r == max(ranks_of(small).values())
    assert {config.alpha_pattern.get(name, config.lora_alpha) / config.rank_pattern.get(name, config.r) for name in LAYERS} == {2.0}


def test_components_that_were_left_out_for_a_moment_come_back_to_the_bit():
    model = plain()
    before, weights = model(X), [p.detach().clone() for p in model.parameters()]
    with keep_components(model, dict.fromkeys(LAYERS, 1)):
        inside = model(X)
    assert torch.equal(model(X), before)
    with pytest.raises(ZeroDivisionError), keep_components(model, dict.fromkeys(LAYERS, 2)):
        raise ZeroDivisionError
    assert all(torch.equal(mine, old) for mine, old in zip(model.parameters(), weights, strict=True))
    singular_order(model)
    assert not torch.allclose(inside, before)


def test_keeping_for_a_moment_equals_cutting():
    model = plain()
    singular_order(model)
    kept = {"0": 1, "2": 2, "4": 3}
    with keep_components(model, kept):
        inside = model(X)
    assert_close(inside, truncate_to(model, kept)(X), claim="zeroed or cut", rtol=1e-12)


def truncate_to(model, kept):
    from partwise.tune.truncation import compact, copy_sharing_base

    small = copy_sharing_base(model)
    compact(small, kept)
    return small.eval()
