"""Claims about plans: what they are before anything is cut, how they are kept, compared and joined, and what applying one does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model_families import FAMILIES, IDS, outputs
from partwise.checks import InputError
from partwise.models import coupled_axes, tensors_of
from partwise.prune import GHOST, Magnitude, Random, UnitPlan, apply, load_plan
from tiny import tiny_decoder, tiny_llama, tiny_mamba2, tiny_mlp, tiny_resnet
from tolerances import assert_close

UNITS = st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True).map(lambda units: tuple(sorted(units)))
FEW = settings(max_examples=10)


def plan_of(units: dict[str, tuple[int, ...]], **facts: Any) -> UnitPlan:
    return UnitPlan(method="by hand", units=units, **facts)


def scored(units: dict[str, tuple[int, ...]], *, size: int = 8) -> UnitPlan:
    return plan_of(units, scores={name: torch.arange(size, dtype=torch.float64) for name in units})


def same_plan(first: UnitPlan, second: UnitPlan) -> bool:
    tensors = (first.scores, second.scores), (first.factors, second.factors)
    return (first.method, first.num_tokens, dict(first.units)) == (second.method, second.num_tokens, dict(second.units)) and all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one) for one, other in tensors
    )


def test_a_plan_goes_through_files_without_a_change(tmp_path: Path):
    plan = plan_of(
        {"0": (1, 4), "2": (0, 3, 5)},
        num_tokens=12,
        scores={"0": torch.tensor([0.1, 2.0, 1e-300, 3.0, 1 / 3], dtype=torch.float64)},
        factors={"2": torch.tensor([1.5, 0.25, -2.0], dtype=torch.float64)},
    )
    plan.save(tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    assert isinstance(loaded, UnitPlan)
    assert same_plan(loaded, plan)
    plan.save(tmp_path / "plan")  # once more, over what is there
    assert same_plan(load_plan(tmp_path / "plan"), plan)
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["plan.json", "plan.safetensors"]
    facts = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert facts == {"kind": "units", "method": "by hand", "num_tokens": 12}


def test_a_plan_from_a_file_cuts_the_same_model(tmp_path: Path):
    model = tiny_mamba2(n_groups=2)
    plan = GHOST(keep=0.5).plan(model, IDS)
    plan.save(tmp_path)
    assert torch.equal(outputs(apply(model, load_plan(tmp_path)), IDS), outputs(apply(model, plan), IDS))


def test_folders_that_hold_no_plan_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere holds no plan\.json with a plan\.safetensors, expected what PrunePlan\.save wrote\. Check the path\."):
        load_plan(tmp_path / "nowhere")
    plan_of({"0": (0,)}).save(tmp_path)
    (tmp_path / "plan.json").write_text('{"kind": "poetry"}')
    with pytest.raises(InputError, match=r"does not say which kind of plan it is, expected one of units, .*\. Make the plan again\.") as caught:
        load_plan(tmp_path)
    assert caught.value.code == "no-plan"
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(InputError, match="does not say which kind of plan it is"):
        load_plan(tmp_path)
    plan_of({"0": (0,)}).save(tmp_path)
    (tmp_path / "plan.safetensors").write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"plan\.safetensors cannot be read .*\. Make the plan again\."):
        load_plan(tmp_path)


@given(UNITS, UNITS)
@FEW
def test_the_intersection_keeps_what_both_keep(first: tuple[int, ...], second: tuple[int, ...]):
    common = tuple(sorted(set(first) & set(second)))
    one, other = scored({"a": first, "b": (0,)}), scored({"a": second, "c": (1, 2)})
    if not common:
        with pytest.raises(InputError, match=r"the two plans have no unit of a in common, expected at least one\. Use plans that keep more"):
            one.intersect(other)
        return
    both = one.intersect(other)
    assert dict(both.units) == {"a": common, "b": (0,), "c": (1, 2)}
    assert both.units["a"] == other.intersect(one).units["a"]
    assert both.method == "by hand & by hand"


def test_factors_of_units_that_leave_at_an_intersection_leave_with_them():
    plan = plan_of({"a": (0, 2, 5)}, factors={"a": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)})
    both = plan.intersect(plan_of({"a": (0, 5, 6)}))
    assert both.units["a"] == (0, 5)
    assert both.factors["a"].tolist() == [1.0, 3.0]


def test_a_plan_and_itself_agree_and_a_plan_and_its_opposite_do_not():
    plan = scored({"a": (0, 1, 2, 3), "b": (7,)})
    assert plan.agreement(plan) == 1.0
    assert scored({"a": (0, 1)}, size=4).agreement(scored({"a": (2, 3)}, size=4)) == 0.0
    # Of 8 units in a, 2 are decided otherwise; the axis that only one names does not count.
    assert plan.agreement(scored({"a": (0, 1, 2, 4), "c": (0,)})) == 6 / 8


@given(UNITS, UNITS)
@FEW
def test_agreement_is_the_share_of_units_with_the_same_fate(first: tuple[int, ...], second: tuple[int, ...]):
    one, other = scored({"a": first}), scored({"a": second})
    assert one.agreement(other) == other.agreement(one) == sum((unit in first) == (unit in second) for unit in range(8)) / 8


def test_plans_of_other_units_cannot_be_compared():
    with pytest.raises(InputError, match=r"the two plans share no axis with scores, expected plans of one model\. Compare plans of the same kind"):
        scored({"a": (0,)}).agreement(scored({"b": (0,)}))


@pytest.mark.parametrize("family", ["mlp-with-norms", "resnet", "llama", "gpt2", "mamba2"])
def test_the_ledger_has_a_row_for_each_unit_with_what_the_small_model_saves(family: str):
    model = FAMILIES[family][0]()
    for axis in coupled_axes(model):
        if axis.kind in {"blocks", "heads"}:
            continue
        kept = tuple(range(1, axis.size))
        plan = plan_of({axis.name: kept}, scores={axis.name: torch.arange(axis.size, dtype=torch.float64)})
        ledger = plan.ledger(model)
        assert [(part.where, part.index, part.score, part.status) for part in ledger.parts] == [
            (axis.name, unit, float(unit), "kept" if unit else "dropped") for unit in range(axis.size)
        ]
        small = apply(model, plan) if family != "mamba2" or axis.size > 1 else model
        saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
        saved_bytes = sum(tensor.nbytes for tensor in tensors_of(model).values()) - sum(tensor.nbytes for tensor in tensors_of(small).values())
        assert (ledger.parts[0].parameters, ledger.parts[0].bytes) == (saved, saved_bytes)


def test_a_unit_without_scores_has_none_in_the_ledger():
    assert {part.score for part in plan_of({"0": (0, 1)}).ledger(tiny_mlp(6, 8, 4)).parts} == {None}


def test_factors_multiply_what_readers_get_in_the_small_model_and_in_the_masked_one():
    model = tiny_mlp(6, 8, 12, 4)
    plan = plan_of({"0": (1, 4, 6)}, factors={"0": torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64)})
    rows = torch.randn(5, 6)
    hidden = torch.relu(model[0](rows))  # (rows, 8)
    weight = torch.zeros(8)
    weight[[1, 4, 6]] = torch.tensor([2.0, 0.5, -1.0])
    expected = model[2:](hidden * 0 + hidden * weight)
    small, masked = apply(model, plan), apply(model, plan, as_mask=True)
    assert_close(small(rows).detach(), expected.detach(), claim="factors of the small model")
    assert_close(masked(rows).detach(), expected.detach(), claim="factors of the masked model")


@pytest.mark.parametrize("as_mask", [False, True])
def test_applying_a_plan_keeps_mode_and_dtype_and_shares_nothing(as_mask: bool):
    for model in (tiny_decoder("Llama").train(), tiny_mlp(6, 8, 4).double(), tiny_mamba2().to(torch.bfloat16), tiny_resnet().train()):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        result = apply(model, Random(keep=0.5).plan(model), as_mask=as_mask)
        assert type(result) is type(model)
        assert [module.training for module in result.modules()] == [module.training for module in model.modules()]
        assert {tensor.dtype for tensor in result.state_dict().values()} == {tensor.dtype for tensor in model.state_dict().values()}
        assert not {tensor.data_ptr() for tensor in result.parameters()} & {tensor.data_ptr() for tensor in model.parameters()}
        with torch.no_grad():
            for parameter in result.parameters():
                parameter.zero_()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_plan_for_a_model_of_other_sizes_is_refused_as_what_it_is():
    model = tiny_mamba2()
    plan = GHOST(keep=0.5).plan(model, IDS)
    small = apply(model, plan)
    text = (
        r"the plan was made for 8 states in backbone\.layers\.0\.mixer\.state, but this model has 4, expected the model that it was made for\. "
        r"A model that was pruned before needs a new plan"
    )
    for use in (lambda: apply(small, plan), lambda: apply(small, plan, as_mask=True), lambda: plan.ledger(small)):
        with pytest.raises(InputError, match=text) as caught:
            use()
        assert caught.value.code == "plan-for-another-model"
    again = GHOST(keep=0.5).plan(small, IDS)  # a new plan is fine
    assert apply(small, again).config.state_size == 2


def test_a_plan_for_another_architecture_names_the_axis_that_is_missing():
    plan = Magnitude().plan(tiny_llama())
    with pytest.raises(InputError, match=r"got units of 'model\.layers\.0\.mlp', expected one of the 2 axes of this model: backbone\.layers"):
        apply(tiny_mamba2(), plan)


@pytest.mark.parametrize(("units", "text"), [((), "without units of 0"), ((3, 1), "units that are not in rising order"), ((1, 8), "unit 8")])
def test_plans_made_by_hand_are_checked(units: tuple[int, ...], text: str):
    with pytest.raises(InputError, match=re.escape(text)):
        apply(tiny_mlp(6, 8, 4), plan_of({"0": units}))


def test_axes_that_a_plan_does_not_name_stay_whole():
    model = tiny_mlp(6, 8, 12, 4)
    small: Any = apply(model, plan_of({"2": (0, 1)}))
    assert [layer.out_features for layer in small if isinstance(layer, nn.Linear)] == [8, 2, 4]
