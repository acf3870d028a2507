"""Claims about budgets: what is left is within them, nothing more would fit, and what cannot be met is refused with numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from partwise.checks import InputError
from partwise.models import CoupledAxis, coupled_axes, tensors_of
from partwise.models.cache_sizes import cache_sizes, total_cache_bytes
from partwise.prune import GHOST, Magnitude, Random, UnitPlan, apply
from partwise.prune._budget import CONTEXT
from tiny import tiny_decoder, tiny_gpt2, tiny_llama, tiny_mamba2, tiny_mlp, tiny_resnet, tiny_vit

# The whole grid of families is in tests/contracts; these stand for one kind of unit each.
MODELS: dict[str, Any] = {
    "neurons": lambda: tiny_mlp(6, 8, 12, 4, norm=True),
    "neurons-of-a-decoder": lambda: tiny_decoder("Llama", tie_word_embeddings=True),
    "filters": lambda: tiny_resnet(depths=(1, 1, 2, 1)),
    "states": tiny_mamba2,
    "states-in-two-groups": lambda: tiny_mamba2(n_groups=2),
}
EVERY_KIND = pytest.mark.parametrize("kind", MODELS)
BOTH_SCOPES = pytest.mark.parametrize("scope", ["layer", "model"])
FEW = settings(max_examples=5)


def parameters_of(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in tensors_of(model).values() if isinstance(tensor, nn.Parameter))


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(model).values())


def state_of(model: nn.Module) -> int:
    return total_cache_bytes(cache_sizes(model), num_tokens=CONTEXT)


PRICES = {"max_parameters": parameters_of, "max_bytes": bytes_of, "max_state_bytes": state_of}


def counts_of(plan: UnitPlan) -> dict[str, int]:
    return {name: len(units) for name, units in plan.units.items()}


def first_units(axes: Sequence[CoupledAxis], counts: dict[str, int]) -> UnitPlan:
    """As many units of every group."""
    units = {}
    for axis in axes:
        run = axis.size // axis.groups
        units[axis.name] = tuple(unit for unit in range(axis.size) if unit % run < counts[axis.name] // axis.groups)
    return UnitPlan(method="by hand", units=units)


def axes_in(model: nn.Module, plan: UnitPlan) -> list[Any]:
    return [axis for axis in coupled_axes(model) if axis.name in plan.units]


@EVERY_KIND
@FEW
@given(keep=st.floats(0.01, 1), round_to=st.sampled_from([1, 2, 3, 8]))
def test_a_fraction_of_every_axis_stays_rounded_to_the_step_halves_up(kind: str, keep: float, round_to: int):
    model = MODELS[kind]()
    plan = Magnitude(keep=keep, round_to=round_to).plan(model)
    for axis in axes_in(model, plan):
        step, count = round_to * axis.groups, len(plan.units[axis.name])
        nearest = [math.floor(keep * axis.size / step) * step, math.ceil(keep * axis.size / step) * step]
        assert count == axis.size or count % step == 0
        assert step <= count <= axis.size or count == axis.size
        assert min(axis.size, max(step, nearest[0])) <= count <= min(axis.size, max(step, nearest[1]))
        assert abs(count - keep * axis.size) <= step / 2 + 1e-6 or count in {step, axis.size}


@pytest.mark.parametrize(("keep", "size", "expected"), [(0.5, 5, 3), (0.29, 50, 15), (0.1, 8, 1), (0.01, 8, 1), (0.9, 15, 14), (1.0, 7, 7)])
def test_halves_go_up_and_one_unit_always_stays(keep: float, size: int, expected: int):
    assert counts_of(Magnitude(keep=keep).plan(tiny_mlp(3, size, 2))) == {"0": expected}


@pytest.mark.parametrize(("keep", "expected"), [(0.2, 8), (0.79, 8), (0.81, 15), (0.9, 15), (1.0, 15)])
def test_a_step_that_does_not_divide_the_axis_ends_with_the_whole_axis(keep: float, expected: int):
    assert counts_of(Magnitude(keep=keep, round_to=8).plan(tiny_mlp(3, 15, 2))) == {"0": expected}


def test_an_axis_that_is_narrower_than_the_step_stays_whole():
    assert counts_of(Magnitude(keep=0.5, round_to=8).plan(tiny_mlp(3, 7, 32, 2))) == {"0": 7, "2": 16}


def test_without_a_budget_half_of_the_units_stay_as_if_it_had_been_asked_for():
    model = tiny_mlp(6, 7, 9, 4)
    assert counts_of(Magnitude().plan(model)) == counts_of(Magnitude(keep=0.5).plan(model)) == {"0": 4, "2": 5}


@BOTH_SCOPES
@EVERY_KIND
@pytest.mark.parametrize("limit", PRICES)
def test_a_budget_is_kept_and_one_more_unit_of_every_axis_would_exceed_it(kind: str, limit: str, scope: str):
    model, price = MODELS[kind](), PRICES[limit]
    if limit == "max_state_bytes" and not kind.startswith("states"):
        with pytest.raises(InputError, match=rf"got max_state_bytes, but no {kind.split('-')[0]} of {type(model).__name__} hold anything of a sequence"):
            Magnitude(max_state_bytes=1000).plan(model)
        return
    axes = axes_in(model, Magnitude().plan(model))
    whole, least = price(model), price(apply(model, first_units(axes, {axis.name: axis.groups for axis in axes})))
    for share in (0.0, 0.501, 0.999):
        budget = int(least + share * (whole - least))
        plan = Magnitude(**{limit: budget}, scope=scope).plan(model)
        counts = counts_of(plan)
        assert price(apply(model, plan)) <= budget
        more = {axis.name: min(axis.size, counts[axis.name] + axis.groups) for axis in axes}
        assert price(apply(model, first_units(axes, more))) > budget
        if scope == "layer":
            fractions = [counts[axis.name] / axis.size for axis in axes]
            # The next larger fraction that changes anything.
            larger = min((counts[axis.name] + axis.groups) / axis.size for axis in axes if counts[axis.name] < axis.size)
            assert max(fractions) <= larger + max(axis.groups / axis.size for axis in axes)
            next_counts = {axis.name: max(axis.groups, int(larger * axis.size / axis.groups + 1e-9) * axis.groups) for axis in axes}
            assert price(apply(model, first_units(axes, next_counts))) > budget


@pytest.mark.parametrize("limit", PRICES)
def test_a_budget_of_the_whole_model_cuts_nothing_and_one_of_the_smallest_leaves_one_unit_each(limit: str):
    model = tiny_mamba2()
    whole = PRICES[limit](model)
    assert counts_of(Magnitude(**{limit: whole}).plan(model)) == dict.fromkeys(("backbone.layers.0.mixer.state", "backbone.layers.1.mixer.state"), 8)
    least = PRICES[limit](apply(model, Magnitude(keep=0.001).plan(model)))
    assert counts_of(Magnitude(**{limit: least}).plan(model)) == dict.fromkeys(("backbone.layers.0.mixer.state", "backbone.layers.1.mixer.state"), 1)
    text = rf"got {limit}={least - 1:,}, but the smallest model that can be cut here costs {least:,}, the whole one {whole:,}\. Pass a number between"
    with pytest.raises(InputError, match=text) as caught:
        Magnitude(**{limit: least - 1}).plan(model)
    assert caught.value.code == "budget-too-small"


def test_bytes_of_state_are_those_of_keys_and_values_where_heads_are_cut():
    model = tiny_decoder("Qwen3")
    plan = Random(max_state_bytes=state_of(model) // 2, kinds=("heads",)).plan(model)
    assert counts_of(plan) == {"model.layers.0.self_attn": 2, "model.layers.1.self_attn": 2}
    assert 2 * state_of(apply(model, plan)) == state_of(model)


def test_a_step_holds_with_a_budget_too():
    model = tiny_mlp(6, 32, 48, 4)
    for limit in range(400, parameters_of(model), 97):
        plan = Magnitude(max_parameters=limit, round_to=8).plan(model)
        assert all(count % 8 == 0 for count in counts_of(plan).values())
        assert parameters_of(apply(model, plan)) <= limit


@EVERY_KIND
def test_with_the_scope_of_the_model_the_fraction_is_that_of_all_units_together(kind: str):
    model = MODELS[kind]()
    for keep in (0.25, 0.5, 0.8):
        plan = Random(keep=keep, scope="model").plan(model)
        axes = axes_in(model, plan)
        total = sum(axis.size for axis in axes)
        # A layer never loses its last unit, and groups keep equal numbers.
        slack = sum(axis.groups for axis in axes)
        assert abs(sum(counts_of(plan).values()) - keep * total) <= slack


def test_with_the_scope_of_the_model_and_a_step_every_layer_holds_a_multiple():
    model = tiny_resnet()
    plan = Random(keep=0.5, scope="model", round_to=4).plan(model)
    assert all(count % 4 == 0 for count in counts_of(plan).values())
    assert len(set(counts_of(plan).values())) > 1
    apply(model, plan)


def test_a_wide_layer_is_not_cut_more_for_being_wide():
    """Chance gives every unit the same worth, so every layer must keep about the same fraction."""
    model = tiny_mlp(3, 16, 400, 100, 2)
    for seed in range(3):
        counts = counts_of(Random(keep=0.5, scope="model", seed=seed).plan(model))
        assert 0.4 < counts["2"] / 400 < 0.6
        assert 0.35 < counts["4"] / 100 < 0.65
        assert 0.2 < counts["0"] / 16 < 0.8


def test_a_layer_whose_units_matter_alike_gives_way_to_one_with_few_that_matter():
    """The scope of the model compares a unit with the mean of its layer."""
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
        model[0].weight[:] = 1.0  # all ten alike
        model[2].weight[:3] = 5.0  # three of ten
    plan = Magnitude(keep=0.15, scope="model").plan(model)
    assert plan.units["2"] == (0, 1, 2)
    assert len(plan.units["0"]) == 1


@BOTH_SCOPES
@EVERY_KIND
def test_protected_units_stay_whatever_they_are_worth(kind: str, scope: str):
    model = MODELS[kind]()
    [worst, *_] = axes_in(model, Magnitude(keep=0.5).plan(model))
    lowest = Magnitude(keep=0.5).plan(model).scores[worst.name].argsort()[:2].tolist()
    name = worst.name.replace("[", "[[]")
    plan = Magnitude(keep=0.5, scope=scope, protect=(f"{name}:{lowest[0]},{lowest[1]}",)).plan(model)
    assert set(lowest) <= set(plan.units[worst.name])
    if scope == "layer":
        assert counts_of(plan) == counts_of(Magnitude(keep=0.5).plan(model))


def test_with_the_scope_of_the_model_protected_units_of_a_worthless_layer_are_paid_by_the_others():
    model = tiny_mlp(4, 10, 10, 2)
    with torch.no_grad():
        model[2].weight[0] = 100.0
    alone = Magnitude(keep=0.4, scope="model").plan(model)
    plan = Magnitude(keep=0.4, scope="model", protect=("2:1-5",)).plan(model)
    assert len(alone.units["2"]) < 5
    assert set(range(1, 6)) <= set(plan.units["2"])
    assert sum(counts_of(plan).values()) == sum(counts_of(alone).values()) == 8


def test_protected_units_of_one_group_set_the_number_of_all_groups():
    model = tiny_mamba2(n_groups=2)
    plan = Magnitude(keep=0.25, scope="model", protect=("*.layers.0.*:0-4",)).plan(model)
    first = plan.units["backbone.layers.0.mixer.state"]
    assert set(range(5)) <= set(first)
    assert len(first) == 10
    with pytest.raises(InputError, match=r"10 of the 16 states of backbone\.layers\.0\.mixer\.state would have to stay .* but the budget leaves 4\. Raise"):
        Magnitude(keep=0.25, protect=("*.layers.0.*:0-4",)).plan(model)


def test_more_protected_units_than_the_budget_has_places_are_refused_with_both_numbers():
    text = r"6 of the 8 neurons of 0 would have to stay to protect what protect names, but the budget leaves 4\. Raise the budget, or protect fewer\."
    with pytest.raises(InputError, match=text) as caught:
        Random(keep=0.5, protect=("0:0-5",)).plan(tiny_mlp(6, 8, 12, 4))
    assert caught.value.code == "too-many-protected"


def test_axes_that_are_protected_as_a_whole_stay_whole_and_count_in_the_budget():
    model = tiny_decoder("Llama")
    plan = Random(keep=0.25, protect=("*.layers.0.*",)).plan(model)
    assert counts_of(plan) == {"model.layers.1.mlp": 6}
    limit = parameters_of(model) - 10
    small = apply(model, Random(max_parameters=limit, protect=("*.layers.0.*",)).plan(model))
    assert small.model.layers[0].mlp.down_proj.in_features == 24
    assert parameters_of(small) <= limit
    with pytest.raises(InputError, match=r"protect names all 2 axes, so that nothing can be cut\. Protect fewer\."):
        Random(keep=0.5, protect=("*",)).plan(model)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("*.layers.7.*", r"protect='\*\.layers\.7\.\*' fits none of the 2 axes of this model: model\.layers\.0\.mlp, model\.layers\.1\.mlp\. Use their names"),
        ("*.mlp:3,24", r"names the units '24' of model\.layers\.0\.mlp, expected numbers from 0 to 23\. Write them as 0,4-7\."),
        ("*.mlp:3,x", r"names the units 'x' of model\.layers\.0\.mlp, expected numbers from 0 to 23"),
        ("*.mlp:7-4", r"names the units '7-4' of model\.layers\.0\.mlp, expected numbers from 0 to 23"),
        ("*.mlp:-4", r"names the units '-4' of model\.layers\.0\.mlp, expected numbers from 0 to 23"),
    ],
)
def test_what_protect_does_not_find_is_refused_with_what_there_is(pattern: str, text: str):
    with pytest.raises(InputError, match=text) as caught:
        Random(protect=(pattern,)).plan(tiny_decoder("Llama"))
    assert caught.value.code == "protect-unknown"


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_fraction_that_is_none_is_refused(keep: float):
    text = rf"got keep={re.escape(str(keep))}, expected a fraction above 0 and at most 1\. Pass 0\.5 to keep half\."
    with pytest.raises(InputError, match=text):
        Magnitude(keep=keep)


def test_two_budgets_are_refused_by_name():
    with pytest.raises(InputError, match=r"got keep and max_bytes, expected one budget\. Leave the others out\."):
        Magnitude(keep=0.5, max_bytes=1000)
    with pytest.raises(InputError, match=r"got max_parameters and max_state_bytes, expected one budget"):
        GHOST(max_parameters=1000, max_state_bytes=1000)


def test_other_settings_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match=r"max_parameters=0 must be an integer of at least 1"):
        Magnitude(max_parameters=0)
    with pytest.raises(InputError, match=r"round_to=0 must be an integer of at least 1"):
        Magnitude(round_to=0)
    with pytest.raises(InputError, match=r"scope='global' is not known\. Choose one of: layer, model\."):
        Magnitude(scope="global")
    with pytest.raises(InputError, match=r"kind='legs' is not known\. Choose one of: states, neurons, filters, heads\."):
        Magnitude(kinds=("legs",))


@pytest.mark.parametrize("field", ["protect", "kinds"])
def test_one_text_where_a_tuple_of_names_belongs_is_refused(field: str):
    with pytest.raises(InputError, match=rf"got {field}='neurons', expected a tuple of names\. Pass \('neurons',\)\."):
        Magnitude(**{field: "neurons"})


def test_kinds_that_a_model_does_not_have_are_refused_with_those_that_it_has():
    with pytest.raises(InputError, match=r"Magnitude prunes heads, and GPT2LMHeadModel has neurons only\. Choose a method that is for those") as caught:
        Magnitude(kinds=("heads",)).plan(tiny_gpt2())
    assert caught.value.code == "kinds-absent"


def test_a_model_with_one_size_for_all_layers_refuses_the_scope_of_the_model_before_anything_is_scored():
    class Never(Random):
        def score(self, visit: Any) -> Tensor:
            raise AssertionError("scored")

    with pytest.raises(InputError, match=r"got scope='model', which leaves layers of different size, and a ViTForImageClassification has one size") as caught:
        Never(scope="model").plan(tiny_vit())
    assert caught.value.code == "uneven-layers"
    text = r"layers keep intermediate_size=\[24, 12\], expected the same in every layer .* Pass scope='layer', and protect no layer as a whole\."
    with pytest.raises(InputError, match=text):
        Never(protect=("vit.layers.0.mlp",)).plan(tiny_vit())


def test_numbers_of_heads_that_the_configuration_refuses_are_named_before_anything_is_scored():
    text = r"which LlamaConfig refuses: .* The nearest that it takes is 2 or 4\. Choose keep so that as many stay, or leave heads out of kinds\.$"
    with pytest.raises(InputError, match=text) as caught:
        Random(keep=0.75, kinds=("heads",)).plan(tiny_decoder("Llama"))
    assert caught.value.code == "config-refuses-heads"
    assert counts_of(Random(keep=0.5, kinds=("heads",)).plan(tiny_decoder("Llama"))) == {"model.layers.0.self_attn": 2, "model.layers.1.self_attn": 2}


def test_heads_and_neurons_can_be_cut_together():
    model = tiny_llama(num_attention_heads=4, num_key_value_heads=4)
    plan = Random(keep=0.5, kinds=("neurons", "heads")).plan(model)
    small = apply(model, plan)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.intermediate_size) == (2, 2, 16)
