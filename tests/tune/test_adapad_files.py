"""What is saved is a plain LoRA that stock peft loads; what is loaded goes on growing."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from adapters import adapter_weights, data, grower, mlp, set_ranks, train
from partwise.checks import InputError
from partwise.tune import AdaPaDConfig, attach, check_servable, finalize, truncate
from partwise.tune.adapad import controller_of
from partwise.tune.finished import active_ranks
from partwise.tune.truncation import lora_layers, pattern_fields
from tiny import tiny_bert, tiny_llama
from tolerances import assert_close

FAST = {"growth_interval": 2, "growth_warmup": 2, "component_warmup": 0}
IDS = torch.randint(3, 20, (6, 9), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1, 0, 1])


def trained(base, *, task_type, labels, num_steps=8, **settings):
    """A tiny transformer whose ranks have grown to different sizes."""
    choices = {"target_modules": "all-linear", "target_r": 2, "preset": "balanced", "growth_modules": 4, "task_type": task_type} | FAST | settings
    model = get_peft_model(base, AdaPaDConfig(**choices)).train()
    optimiser = torch.optim.AdamW(adapter_weights(model), lr=2e-2)
    for _ in range(num_steps):
        model(input_ids=IDS, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert len(set(active_ranks(model).values())) > 1
    return model.eval()


@pytest.mark.parametrize("finished", [True, False], ids=["finalised", "growing"])
@pytest.mark.parametrize("advance_learning", [True, False], ids=["private", ""])
@pytest.mark.parametrize(("make", "task_type", "labels"), [(tiny_bert, "SEQ_CLS", LABELS), (tiny_llama, "CAUSAL_LM", IDS)], ids=["bert", "llama"])
def test_stock_peft_loads_the_folder_without_a_warning_and_computes_the_same(make, task_type, labels, advance_learning, finished, tmp_path):
    model = trained(make(), task_type=task_type, labels=labels, advance_learning=advance_learning)
    expected = model(input_ids=IDS).logits.detach()
    if finished:
        finalize(model)
        assert_close(model(input_ids=IDS).logits, expected, claim="finalize keeps the function", atol=2e-6)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()  # warnings are errors in this suite
    assert type(again.peft_config["default"]) is LoraConfig
    assert_close(again(input_ids=IDS).logits, expected, claim="stock peft", rtol=0, atol=2e-6 if finished else 1e-6)
    merged = again.merge_and_unload()
    assert_close(merged(input_ids=IDS).logits, expected, claim="merged", rtol=0, atol=1e-5)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(saved) <= set(LoraConfig().to_dict())
    assert saved["peft_type"] == "LORA"


def test_the_scale_is_one_number_for_all_modules_and_patterns_use_full_names(tmp_path):
    model = finalize(trained(tiny_llama(), task_type="CAUSAL_LM", labels=IDS))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = active_ranks(model)
    scales = {saved["alpha_pattern"].get(name, saved["lora_alpha"]) / saved["rank_pattern"].get(name, saved["r"]) for name in ranks}
    assert scales == {2.0}
    assert saved["r"] == max(ranks.values())
    assert saved["rank_pattern"] == {name: rank for name, rank in ranks.items() if rank != saved["r"]}
    assert all(name.startswith("model.layers.") for name in saved["rank_pattern"])
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in weights.values()) == sum(p.numel() for p in adapter_weights(model))
    check_servable(tmp_path)


def test_rank_stabilised_scaling_is_folded_into_alpha():
    config = AdaPaDConfig(target_modules=["0"], r=4, lora_alpha=8, use_rslora=True)
    assert (config.lora_alpha, config.use_rslora) == (16, False)
    assert lora_layers(get_peft_model(mlp(), config))["0"].scaling["default"] == 4.0


def test_a_module_whose_name_ends_anothers_keeps_its_own_rank(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)))

    model = grower(base(), scatter=0.3)
    set_ranks(controller_of(model), (2, 4))
    model.eval()
    x = torch.randn(3, 6)
    finalize(model).save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(base(), tmp_path).eval()(x), model(x), claim="0 and 1.0 have ranks 2 and 4", atol=1e-5)
    assert pattern_fields({"0": 2, "1.0": 4}, {"0": 1.0, "1.0": 1.0})["rank_pattern"] == {"^0": 2}


def resumed_by_state_dict(model, optimiser, twin):
    other = torch.optim.AdamW(adapter_weights(twin), lr=1e-2)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    return other


def resumed_by_recipe(model, optimiser, twin):
    from partwise.tune.adapad_recipe import AdaPaD

    extra = copy.deepcopy(AdaPaD().extra_state(model))
    other = torch.optim.AdamW(adapter_weights(twin), lr=1e-2)
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    AdaPaD().load_extra_state(twin, extra)
    return other


@pytest.mark.parametrize("settings", [{}, {"advance_learning": True}, {"joint_start": 0.6, "total_steps": 30}], ids=["split", "private", "rotated"])
@pytest.mark.parametrize("resume", [resumed_by_state_dict, resumed_by_recipe])
@pytest.mark.parametrize("stop_at", [5, 7, 19])
def test_a_resumed_run_ends_with_the_same_bits(stop_at, resume, settings):
    """Events at 6, 12, 18, ...: steps 5 and 7 lie in the middle of a scoring window, 19 after the rotation."""
    x, y = data(12)

    def fresh():
        return grower(budget=7, growth_interval=6, growth_warmup=0, growth_modules=1, component_warmup=3, **settings)

    straight = fresh()
    train(straight, x, y, num_steps=30)
    model = fresh()
    _, optimiser = train(model, x, y, num_steps=stop_at)
    twin = fresh()
    train(twin, x, y, num_steps=0, optimiser=resume(model, optimiser, twin))
    train(twin, x, y, num_steps=30 - stop_at, optimiser=resume(model, optimiser, twin))
    mine, theirs = twin.state_dict(), straight.state_dict()  # active components and the growth state
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_saving_while_growing_keeps_the_state_and_a_finished_adapter_has_none(tmp_path):
    model = trained(tiny_bert(), task_type="SEQ_CLS", labels=LABELS)
    model.save_pretrained(tmp_path / "growing")
    assert any(name.endswith("adapad_state") for name in load_file(tmp_path / "growing" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(
        tiny_bert(), tmp_path / "growing", config=AdaPaDConfig(target_modules="all-linear", task_type="SEQ_CLS"), is_trainable=True
    )
    assert controller_of(again).step == 8
    assert active_ranks(again) == active_ranks(model)
    finalize(model).save_pretrained(tmp_path / "done")
    assert not any(name.endswith("adapad_state") for name in load_file(tmp_path / "done" / "adapter_model.safetensors"))
    own = json.loads((tmp_path / "growing" / "adapad.json").read_text())
    assert (own["preset"], own["target_r"]) == ("balanced", 2)
    with pytest.raises(InputError, match="checkpoint of a growing adapter"):
        check_servable(tmp_path / "growing")


def test_loading_lower_ranks_takes_them_over():
    """What load_best_model_at_end does when the best checkpoint is older than the last growth."""
    x, y = data(12)
    model = grower(budget=6, **FAST)
    _, optimiser = train(model, x, y, num_steps=3)
    best, ranks = copy.deepcopy(model.state_dict()), active_ranks(model)
    train(model, x, y, num_steps=9, optimiser=optimiser)
    expected = active_ranks(model)
    model.load_state_dict(best)
    assert active_ranks(model) == ranks != expected
    assert controller_of(model).step == 3


def test_a_growing_state_dict_loads_strictly_and_in_either_form():
    model = grower(scatter=0.2, ranks=(1, 4, 2))
    twin = grower()
    assert not any(twin.load_state_dict(model.state_dict()))
    x, _ = data(4)
    assert_close(twin.eval()(x), model.eval()(x), claim="same weights, same ranks", rtol=0, atol=0)


def test_transformers_own_integration_installs_growing_layers(tmp_path):
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"add_adapter of this transformers needs peft {MIN_PEFT_VERSION}, and {peft.__version__} is installed; get_peft_model takes it")
    model = tiny_bert()
    model.add_adapter(AdaPaDConfig(target_modules=["query", "value"], budget=6, **FAST))
    model.train()
    optimiser = torch.optim.AdamW(adapter_weights(model), lr=1e-2)
    for _ in range(8):
        model(input_ids=IDS, labels=LABELS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert sum(active_ranks(model).values()) == 6
    model.eval()
    finalize(model)
    model.save_pretrained(tmp_path)
    expected = model(input_ids=IDS).logits
    again = tiny_bert()
    again.load_adapter(str(tmp_path))
    assert_close(again.eval()(input_ids=IDS).logits, expected, claim="reloaded by transformers", atol=1e-6)


def test_a_finalised_adapter_is_cut_and_saved(tmp_path):
    model = trained(tiny_llama(), task_type="CAUSAL_LM", labels=IDS)
    small = truncate(model, rank=1)
    assert set(active_ranks(small).values()) == {1}
    small.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert_close(again(input_ids=IDS).logits, small.eval()(input_ids=IDS).logits, claim="the cut adapter is a plain LoRA", atol=1e-6)


def test_two_growing_adapters_live_side_by_side():
    x, y = data(12, dtype=torch.float32)
    model = get_peft_model(mlp(dtype=torch.float32), AdaPaDConfig(target_modules=["0", "2"], budget=3, **FAST))
    model.add_adapter("second", AdaPaDConfig(target_modules=["0", "2"], budget=4, **FAST))
    attach(model, "second")
    for name, budget in (("default", 3), ("second", 4)):
        model.set_adapter(name)
        train(model.train(), x, y, num_steps=10)
        assert sum(active_ranks(model, name).values()) == budget
    finalize(model, "second")
    assert sum(active_ranks(model, "default").values()) == 3
    assert controller_of(model, "default").step == 10
