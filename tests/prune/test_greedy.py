"""Claims about greedy forward selection on models: it keeps what is alive, sharpens what it keeps, and comes closest to what the layer was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_families import FAMILIES, IDS, WITHOUT_READERS, outputs, rows
from partwise.checks import InputError
from partwise.linalg.greedy_selection import greedy_subset
from partwise.models import tensors_of
from partwise.prune import GreedyForwardSelection, Random, UnitPlan, WandaStructured, apply
from reading_layers import CASES, Case
from tiny import tiny_decoder, tiny_mamba2, tiny_mlp, tiny_resnet
from tolerances import assert_close

READ = [name for name in FAMILIES if name not in WITHOUT_READERS]
WAYS: list[dict[str, Any]] = [{}, {"allow_repeats": False}, {"amounts": "equal"}, {"amounts": "equal", "allow_repeats": False}]


def plan_of_case(case: Case, **options: Any) -> UnitPlan:
    return GreedyForwardSelection(kinds=(case.axis.kind,), **options).plan(case.model, [case.inputs])


def layer_error(case: Case, units: tuple[int, ...], factors: Tensor | None) -> float:
    """Relative squared distance of what the readers give from what they gave, without biases."""
    added = case.contributions()
    weights = torch.zeros(len(added), dtype=torch.float64)
    weights[list(units)] = 1.0 if factors is None else factors
    return float((weights @ added - added.sum(0)).square().sum() / added.sum(0).square().sum())


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_units_and_factors_are_those_that_what_each_unit_adds_leads_to(name: str, options: dict[str, Any]):
    case = CASES[name]()
    plan = plan_of_case(case, **options)
    size, added = case.axis.size, case.contributions()
    phi, target = added * size, added.sum(0)
    keep = int(0.5 * size + 0.5)
    subset = greedy_subset(phi @ phi.T, phi @ target, float(target @ target), num_units=keep, max_steps=4 * size, **({"amounts": "fitted"} | options))
    assert plan.units[case.axis.name] == subset.units
    assert_close(plan.factors[case.axis.name], subset.weights * size, claim="weights of a mean, times the width", rtol=1e-7)
    assert_close(plan.scores[case.axis.name], added.square().sum(1), claim="scores: what is missing without the unit", rtol=1e-8)
    assert layer_error(case, subset.units, plan.factors[case.axis.name]) == pytest.approx(2 * subset.loss / float(target @ target), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("family", READ)
def test_slicing_equals_masking_with_the_factors_in_the_readers(family: str, options: dict[str, Any]):
    build, inputs = FAMILIES[family]
    model = build(seed=2)
    plan = GreedyForwardSelection(keep=0.5, **options).plan(model, inputs)
    small, masked = apply(model, plan), apply(model, plan, as_mask=True)
    assert plan.factors.keys() == plan.units.keys()
    assert sum(map(torch.Tensor.numel, tensors_of(small).values())) < sum(map(torch.Tensor.numel, tensors_of(masked).values()))
    assert_close(outputs(small, inputs), outputs(masked, inputs), claim=f"{family}: the small model is the masked one", rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_keeping_everything_changes_no_bit(options: dict[str, Any]):
    for family in ("mlp", "resnet", "llama"):
        build, inputs = FAMILIES[family]
        model = build()
        plan = GreedyForwardSelection(keep=1.0, **options).plan(model, inputs)
        assert not plan.factors
        same = tensors_of(apply(model, plan))
        assert all(torch.equal(same[name], tensor) for name, tensor in tensors_of(model).items())


def own_outputs(num_alive: int, width: int, *, seed: int = 0) -> nn.Sequential:
    """A perceptron in which each of the first neurons has an output of its own, and the others are read by nobody."""
    model = tiny_mlp(6, width, num_alive, seed=seed)
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].weight[:, :num_alive] = torch.diag(torch.linspace(0.5, 2, num_alive))
        model[0].bias.fill_(0.5)
    return model


def test_neurons_that_nobody_reads_go_and_nothing_changes():
    model = own_outputs(12, 60)
    for options in ({}, {"allow_repeats": False}):
        plan = GreedyForwardSelection(keep=0.2, **options).plan(model, rows(6))
        assert plan.units["0"] == tuple(range(12))
        assert_close(plan.factors["0"], torch.ones(12, dtype=torch.float64), claim="as much as there was", rtol=1e-9)
        assert_close(apply(model, plan)(rows(6)), model(rows(6)), claim="nothing is lost")


def test_a_neuron_that_does_all_the_work_is_chosen_first_and_alone_it_is_enough():
    model = tiny_mlp(6, 20, 3, seed=4)
    with torch.no_grad():
        model[2].weight[:, [unit for unit in range(20) if unit != 13]] *= 1e-6
    plan = GreedyForwardSelection(keep=0.05).plan(model, rows(6).abs())
    assert plan.units["0"] == (13,)
    assert_close(apply(model, plan)(rows(6).abs()), model(rows(6).abs()), claim="the others add next to nothing", rtol=1e-3, atol=1e-4)


def test_twins_are_replaced_by_one_that_counts_twice():
    model = own_outputs(4, 8)
    with torch.no_grad():  # neuron 4 + i is neuron i
        model[0].weight[4:] = model[0].weight[:4]
        model[0].bias[4:] = model[0].bias[:4]
        model[2].weight[:, 4:] = model[2].weight[:, :4]
    plan = GreedyForwardSelection(keep=0.5, allow_repeats=False).plan(model, rows(6))
    assert {unit % 4 for unit in plan.units["0"]} == {0, 1, 2, 3}
    assert_close(plan.factors["0"], torch.full((4,), 2.0, dtype=torch.float64), claim="twice each", rtol=1e-9)
    assert_close(apply(model, plan)(rows(6)), model(rows(6)), claim="half the width, the same network")


def test_with_equal_amounts_factors_add_up_to_the_width_so_that_the_layer_keeps_its_scale():
    model = tiny_mlp(6, 30, 20, 4, seed=1)
    for repeats in (True, False):
        plan = GreedyForwardSelection(amounts="equal", keep=0.3, allow_repeats=repeats).plan(model, rows(6))
        for name, width in (("0", 30), ("2", 20)):
            assert float(plan.factors[name].sum()) == pytest.approx(width)
    assert_close(plan.factors["0"], torch.full((9,), 30 / 9, dtype=torch.float64), claim="once each")


@pytest.mark.parametrize("name", ["neurons of a perceptron", "filters before a sum", "Llama", "ViT", "a border of zeros"])
def test_fitted_amounts_come_closer_to_the_layer_than_equal_ones_and_than_wanda_or_chance(name: str):
    case = CASES[name]()
    kinds = (case.axis.kind,)
    plans = {
        "fitted": plan_of_case(case),
        "once each": plan_of_case(case, allow_repeats=False),
        "equal": plan_of_case(case, amounts="equal"),
        "wanda": WandaStructured(kinds=kinds).plan(case.model, [case.inputs]),
        "chance": Random(kinds=kinds).plan(case.model),
    }
    errors = {way: layer_error(case, plan.units[case.axis.name], plan.factors.get(case.axis.name)) for way, plan in plans.items()}
    assert errors["fitted"] <= errors["once each"] + 1e-9
    assert errors["fitted"] < min(errors["equal"], errors["wanda"], errors["chance"]), errors


def test_the_target_of_a_layer_is_what_it_gives_on_what_the_pruned_layers_before_it_pass_on():
    model = tiny_mlp(6, 16, 16, 4, seed=3)
    plan = GreedyForwardSelection(keep=0.5).plan(model, rows(6))
    first = UnitPlan(method="", units={"0": plan.units["0"]}, factors={"0": plan.factors["0"]})
    before = apply(model, first)
    assert_close(GreedyForwardSelection(protect=("0",)).plan(before, rows(6)).scores["2"], plan.scores["2"], claim="the inputs of the pruned model", rtol=1e-4)
    not_again = GreedyForwardSelection(keep=0.5, recalibrate=False).plan(model, rows(6))
    assert not torch.allclose(not_again.scores["2"], plan.scores["2"], rtol=1e-2)


def test_a_layer_to_which_nothing_arrives_keeps_its_weights():
    model = tiny_mlp(6, 16, 4)
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    plan = GreedyForwardSelection().plan(model, rows(6))
    assert len(plan.units["0"]) == 8
    assert not plan.factors


def test_protected_units_stay_and_the_others_are_chosen_around_them():
    model = own_outputs(6, 24)
    plan = GreedyForwardSelection(keep=0.25, protect=("0:20-22",)).plan(model, rows(6))
    assert {20, 21, 22} < set(plan.units["0"])
    assert len(plan.units["0"]) == 6
    assert set(plan.units["0"]) - {20, 21, 22} < set(range(6))


def test_the_order_of_batches_makes_no_difference():
    for build, data in ((lambda: tiny_mlp(6, 16, 12, 4), torch.randn(24, 6)), (tiny_resnet, torch.randn(6, 3, 16, 16))):
        model = build()
        forwards, backwards = (GreedyForwardSelection().plan(model, batches) for batches in (data.split(2), data.split(2)[::-1]))
        assert forwards.units == backwards.units
        for name, factors in forwards.factors.items():
            assert_close(factors, backwards.factors[name], claim="sums in another order", rtol=1e-6)


def test_padding_counts_for_nothing():
    model = tiny_decoder("Llama")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    padded = GreedyForwardSelection().plan(model, [{"input_ids": IDS, "attention_mask": mask}])
    apart = GreedyForwardSelection().plan(model, [IDS[:1], IDS[1:, :3]])
    assert padded.num_tokens == apart.num_tokens == 8
    assert padded.units == apart.units
    for name, factors in padded.factors.items():
        assert_close(factors, apart.factors[name], claim="only real tokens", rtol=1e-3)


def test_a_model_in_training_mode_is_looked_at_in_evaluation_mode_and_left_as_it_was():
    model = tiny_resnet()
    quiet = GreedyForwardSelection().plan(model, FAMILIES["resnet"][1])
    other = copy.deepcopy(model).train()
    before = {name: tensor.clone() for name, tensor in tensors_of(other).items()}
    plan = GreedyForwardSelection().plan(other, FAMILIES["resnet"][1])
    assert plan.units == quiet.units
    assert other.training
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(other).items())


def test_blocks_with_a_stride_and_a_shortcut_are_cut_like_any_other():
    model = tiny_resnet()
    plan = GreedyForwardSelection().plan(model, FAMILIES["resnet"][1])
    assert model.layer2[0].conv1.stride == (2, 2)
    assert len(plan.units["layer2.0.conv1"]) == 4


def test_the_best_units_of_the_whole_model_differ_in_number_from_layer_to_layer():
    model = tiny_mlp(6, 24, 24, 4, seed=5)
    with torch.no_grad():
        model[4].weight[:, :20] *= 1e-3
    plan = GreedyForwardSelection(keep=0.5, scope="model").plan(model, rows(6))
    assert len(plan.units["2"]) < 12 < len(plan.units["0"])
    assert len(plan.units["0"]) + len(plan.units["2"]) == 24


def test_a_plan_is_the_same_every_time():
    model = tiny_mlp(6, 16, 12, 4)
    assert GreedyForwardSelection().plan(model, rows(6)).units == GreedyForwardSelection().plan(model, rows(6)).units


def test_what_no_layer_reads_is_refused():
    with pytest.raises(InputError, match=r"GreedyForwardSelection prunes neurons or filters, and Mamba2ForCausalLM has states only") as raised:
        GreedyForwardSelection().plan(tiny_mamba2(), IDS)
    assert raised.value.code == "kinds-absent"
    with pytest.raises(InputError, match=r"no layer reads the states of backbone\.layers\.0\.mixer\.state, expected neurons, filters or heads") as raised:
        GreedyForwardSelection(kinds=("states",)).plan(tiny_mamba2(), IDS)
    assert raised.value.code == "no-readers"


def test_bad_settings_are_refused_with_what_was_got():
    with pytest.raises(InputError, match=r"amounts='some' is not known. Choose one of: equal, fitted"):
        GreedyForwardSelection(amounts="some")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"steps_per_unit=0 must be an integer of at least 1"):
        GreedyForwardSelection(steps_per_unit=0)
    with pytest.raises(InputError, match=r"got keep=0, expected a fraction above 0 and at most 1"):
        GreedyForwardSelection(keep=0)
    with pytest.raises(InputError, match=r"expected at least one batch of inputs"):
        GreedyForwardSelection().plan(tiny_mlp(6, 8, 4), [])
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(InputError, match=r"a convolution in 2 groups"):
        GreedyForwardSelection().plan(grouped, torch.randn(2, 2, 9, 9))
    with pytest.raises(InputError, match=r"got NaN or infinite activations in"):
        GreedyForwardSelection().plan(tiny_mlp(6, 8, 4), torch.full((2, 6), torch.nan))
