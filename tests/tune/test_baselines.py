"""peft's own methods, driven correctly: ranks meet the budget, allocation happens, what is saved is plain LoRA with the same function."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from partwise.checks import InputError
from partwise.tune.adalora import AdaLoRA, allocator, rank_masks
from partwise.tune.eva import EVA
from partwise.tune.lora import LoRA, lora_ranks
from partwise.tune.recipe import Plan, Recipe, spread_budget
from tiny import tiny_bert
from tolerances import assert_close

NUM_MODULES = 13  # two layers of six, and the pooler
RECIPES = [LoRA(), AdaLoRA(), EVA()]


def bert() -> BertForSequenceClassification:
    return tiny_bert(num_labels=3)


def batch(step: int, *, rows: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, 26, (rows, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3}


def plan(**changes: Any) -> Plan:
    values = {
        "num_steps": 20,
        "target_r": 2.0,
        "budget": None,
        "seed": 0,
        "task_type": "SEQ_CLS",
        "calibration": lambda: (batch(i) for i in range(4)),
    }
    return Plan(**(values | changes))


def no_held_out_rows() -> float:
    raise AssertionError("these methods look at no held-out rows")


def trained(recipe: Recipe, plan: Plan) -> PeftModel:
    model = recipe.wrap(bert(), plan)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(plan.num_steps):
        model(**batch(step)).loss.backward()
        optimizer.step()
        recipe.after_step(model, step, plan, held_out_loss=no_held_out_rows)
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**batch(99)).logits


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_what_is_saved_is_plain_lora_with_the_function_that_was_trained(recipe: Recipe, tmp_path: Path):
    model = trained(recipe, plan())
    before = logits(model)
    finished = recipe.finish(model).eval()
    assert_close(logits(finished), before, claim="finish keeps the function", rtol=0, atol=1e-6)
    assert lora_ranks(finished)
    finished.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert_close(logits(loaded), before, claim="stock peft loads the same function", rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True
    assert config["eva_config"] is None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_every_module_is_scaled_by_the_same_factor(recipe: Recipe, tmp_path: Path):
    recipe.finish(trained(recipe, plan(num_steps=4))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    patterns = config["rank_pattern"].keys() | config["alpha_pattern"].keys()
    scales = {config["alpha_pattern"].get(name, config["lora_alpha"]) / config["rank_pattern"].get(name, config["r"]) for name in patterns}
    assert scales | {config["lora_alpha"] / config["r"]} == {2.0}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
@pytest.mark.parametrize("budget", [NUM_MODULES, 20, 26])
def test_the_budget_is_met_exactly(recipe: Recipe, budget: int):
    chosen = plan(budget=budget)
    model = trained(recipe, chosen)
    assert sum(recipe.ranks(model).values()) == budget
    assert sum(lora_ranks(recipe.finish(model)).values()) == budget


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_the_adapter_changes_nothing_before_the_first_step(recipe: Recipe):
    expected = logits(bert())
    assert_close(logits(recipe.wrap(bert(), plan()).eval()), expected, claim="the update starts at zero")


def test_an_uneven_budget_gives_the_first_modules_one_more():
    assert spread_budget(3, plan(budget=7)) == [3, 2, 2]
    assert spread_budget(3, plan(target_r=1.5)) == [2, 1, 1]


def test_a_budget_below_one_component_per_module_is_refused():
    with pytest.raises(InputError, match=r"the budget is 12 components for 13 modules, expected at least one each\. Pass --budget 13"):
        LoRA().wrap(bert(), plan(budget=12))


def test_a_budget_above_what_a_weight_can_hold_names_the_module_and_its_limit():
    with pytest.raises(InputError, match=r"asks for rank 17 in bert.*query, whose weight is 16 x 16; expected at most 16"):
        LoRA().wrap(bert(), plan(target_r=17))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(InputError, match="the model Sequential has no linear layer to adapt"):
        LoRA().wrap(nn.Sequential(nn.Conv1d(3, 3, 1)), plan())


def test_target_modules_choose_layers_and_unknown_names_list_the_known():
    model = LoRA(target_modules="query, value").wrap(bert(), plan())
    assert {name.rpartition(".")[2] for name in lora_ranks(model)} == {"query", "value"}
    with pytest.raises(InputError, match=r"names 'qeury', which is no linear layer of the model\. It has: dense, key, query, value"):
        LoRA(target_modules="qeury").wrap(bert(), plan())


def test_lora_alpha_and_dropout_reach_peft():
    model = LoRA(lora_alpha=6, lora_dropout=0.25).wrap(bert(), plan())
    layer: Any = model.get_base_model().get_submodule("bert.pooler.dense")
    assert layer.scaling["default"] == 3.0
    assert layer.lora_dropout["default"].p == 0.25


def test_the_learning_rate_rises_and_falls_to_zero_as_a_function_of_the_step_alone():
    factors = [LoRA().lr_factor(step, plan(num_steps=100)) for step in range(101)]
    assert factors[:6] == [pytest.approx((step + 1) / 6) for step in range(6)]
    assert factors[6:] == sorted(factors[6:], reverse=True)
    assert factors[100] == 0
    assert min(factors[:100]) > 0


def test_adalora_starts_with_half_as_many_again_and_takes_components_away():
    recipe, chosen = AdaLoRA(), plan()
    model = recipe.wrap(bert(), chosen)
    assert sum(recipe.ranks(model).values()) == math.ceil(1.5 * 2) * NUM_MODULES
    assert not rank_masks(model)
    assert sum(recipe.ranks(trained(recipe, chosen)).values()) == 2 * NUM_MODULES


def test_adalora_scores_with_the_gradients_of_the_step():
    recipe, chosen = AdaLoRA(), plan()
    model = recipe.wrap(bert(), chosen)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch(0)).loss.backward()
    optimizer.step()
    name, parameter = next((n, p) for n, p in model.get_base_model().named_parameters() if "lora_E" in n)
    expected = (parameter * parameter.grad).abs().detach()
    recipe.after_step(model, 0, chosen, held_out_loss=no_held_out_rows)
    assert expected.max() > 0
    assert_close(allocator(model).ipt[name], expected, claim="importance is |parameter x gradient| of this step")


def test_adalora_options_decide_when_components_go():
    recipe, chosen = AdaLoRA(warmup_share=0.5, final_share=0.25, interval=3, orthogonality=0.1), plan(num_steps=40)
    config: Any = recipe.wrap(bert(), chosen).peft_config["default"]
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step, config.orth_reg_weight) == (20, 10, 3, 40, 0.1)


@pytest.mark.parametrize("num_steps", [2, 3, 5])
def test_adalora_meets_the_budget_in_very_short_runs(num_steps: int):
    recipe, chosen = AdaLoRA(), plan(num_steps=num_steps)
    assert sum(recipe.ranks(trained(recipe, chosen)).values()) == 2 * NUM_MODULES


def test_adalora_refuses_a_single_step():
    with pytest.raises(InputError, match="a step to score components and one to drop them: got --max-steps 1, expected 2 or more"):
        AdaLoRA().wrap(bert(), plan(num_steps=1))


def test_adalora_leaves_modules_without_components_out_of_the_adapter():
    recipe = AdaLoRA()
    model = trained(recipe, plan())
    masks = rank_masks(model)
    lost = next(iter(masks))
    model.peft_config["default"].rank_pattern = masks | {lost: [False] * len(masks[lost])}
    model.get_base_model().get_parameter(lost).data.zero_()
    before = logits(model)
    finished = recipe.finish(model)
    assert lost.removesuffix(".lora_E.default") not in lora_ranks(finished)
    assert_close(logits(finished.eval()), before, claim="a module of rank 0 changes nothing", rtol=0, atol=1e-6)


def test_adalora_resumes_with_its_importance_and_masks():
    recipe, chosen = AdaLoRA(), plan()
    model = recipe.wrap(bert(), chosen)
    for step in range(6):
        model(**batch(step)).loss.backward()
        recipe.after_step(model, step, chosen, held_out_loss=no_held_out_rows)
        model.zero_grad()
    other = recipe.wrap(bert(), chosen)
    state = {name: value.clone() for name, value in recipe.extra_state(model).items()}
    assert any(name.startswith("mask.") for name in state)
    other.load_state_dict(model.state_dict())
    recipe.load_extra_state(other, state)
    for twin in (model, other):
        twin(**batch(6)).loss.backward()
        recipe.after_step(twin, 6, chosen, held_out_loss=no_held_out_rows)
    after, resumed = recipe.extra_state(model), recipe.extra_state(other)
    assert after.keys() == resumed.keys()
    assert all(torch.equal(after[name], resumed[name]) for name in after)
    assert recipe.ranks(model) == recipe.ranks(other)


def test_eva_moves_ranks_to_where_the_inputs_need_more_directions():
    ranks = EVA().ranks(EVA().wrap(bert(), plan()))
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 4
    even = EVA(rho=1.0)
    assert set(even.ranks(even.wrap(bert(), plan())).values()) == {2}


def test_eva_starts_at_the_main_directions_of_the_inputs():
    rows: list[Tensor] = []
    base = bert()
    layer = base.bert.encoder.layer[0].intermediate.dense
    handle = layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].detach()))
    with torch.no_grad():
        for step in range(4):
            base(**batch(step))
    handle.remove()
    tokens = torch.cat([inputs[:, :9].reshape(-1, 16) for inputs in rows])  # (tokens, features), padding left out
    tokens = tokens - tokens.mean(dim=0)
    model = EVA(rho=1.0, tau=0.9999).wrap(bert(), plan())
    wrapped: Any = model.get_base_model().get_submodule("bert.encoder.layer.0.intermediate.dense")
    caught = (tokens @ wrapped.lora_A["default"].weight.detach().T).square().sum()
    best = torch.linalg.svdvals(tokens)[:2].square().sum()
    assert 0.97 < float(caught / best) < 1.0001


def test_eva_refuses_batches_with_fewer_rows_than_directions():
    with pytest.raises(InputError, match=r"EVA looks for 2 directions in batches of 1 rows, expected at least 2 rows\. Raise --batch-size to 2"):
        EVA().wrap(bert(), plan(calibration=lambda: [batch(0, rows=1)]))
