"""Shared claims of methods that prune whole units, for every such method and family of models.

A method joins by being in ``partwise.prune.METHODS``, a family by being in ``tests/model_families.py``.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from model_families import FAMILIES, IN_FLOAT32, TRANSFORMERS, outputs
from partwise.checks import InputError
from partwise.models import BlockAxis, CoupledAxis, coupled_axes, tensors_of
from partwise.prune import METHODS, Taylor, UnitPlan, apply, load_plan
from partwise.prune.unit_method import Choice, Steps, UnitMethod
from tiny import tiny_bert, tiny_mamba2, tiny_mlp, tiny_resnet
from tolerances import assert_close


def load_method(target: str) -> type[Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


UNIT_METHODS = {name: method for name, target in METHODS.items() if issubclass(method := load_method(target), UnitMethod)}
# A shallow ResNet is followed as the deep one is, in a third of the time.
MODELS = FAMILIES | {"resnet": (lambda **options: tiny_resnet(depths=(1, 1, 2, 1), **options), FAMILIES["resnet"][1])}
KIND_OF = {name: "states" if "mamba2" in name else "filters" if name.startswith("resnet") else "neurons" for name in FAMILIES}
TEXT = [name for name in TRANSFORMERS if name != "vit"]
# One family of each way through a model: a graph, a graph with branches, blocks with attention, blocks with a recurrence.
FEW = ("mlp-with-norms", "resnet", "llama", "mamba2")
EVERY = [(method, family) for family in FAMILIES for method, kind in UNIT_METHODS.items() if KIND_OF[family] in kind.DEFAULT_KINDS]
SOME = [(method, family) for method, family in EVERY if family in FEW]
EVERY_CASE = pytest.mark.parametrize(("method", "family"), EVERY)
SOME_CASES = pytest.mark.parametrize(("method", "family"), SOME)
EVERY_METHOD = pytest.mark.parametrize("method", UNIT_METHODS)
# Its score squares a sum over a batch, as in the paper, so that it depends on how rows are dealt.
BY_BATCH = {name for name, kind in UNIT_METHODS.items() if issubclass(kind, Taylor)}
# Methods that choose units together and not by scores alone.
TOGETHER = {name for name, kind in UNIT_METHODS.items() if kind.choose is not UnitMethod.choose}


def taking_heads() -> Iterator[tuple[str, str]]:
    for name, kind in UNIT_METHODS.items():
        try:
            kind(kinds=("heads",))
        except InputError:
            continue  # the method is for other units
        yield from ((name, family) for family in ("llama", "qwen3", "vit"))


def data_for(family: str) -> list[Any]:
    """Two batches, with classes where the model has some."""
    inputs = MODELS[family][1]
    pieces = [inputs, inputs.flip(0)[:1]]
    return pieces if family in TEXT else [(piece, torch.arange(len(piece)) % 2) for piece in pieces]


def axes_of(model: nn.Module, plan: UnitPlan) -> list[CoupledAxis]:
    return [axis for axis in coupled_axes(model) if not isinstance(axis, BlockAxis) and axis.name in plan.units]


def facts_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """Mode, hooks and attributes of every module."""
    return [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)), [p.requires_grad for p in module.parameters()])
        for module in model.modules()
    ]


def same_scores(first: UnitPlan, second: UnitPlan, *, claim: str) -> None:
    assert first.scores.keys() == second.scores.keys()
    for name, scores in first.scores.items():
        scale = float(scores.abs().max()) or 1.0
        assert_close(scores / scale, second.scores[name] / scale, claim=f"{claim}: {name}", rtol=0, atol=1e-5)  # models compute in float32


# A ViT has one size for all layers: tests/prune/test_budget.py. Of the three ResNets one is enough for the second scope.
@pytest.mark.parametrize(
    ("method", "family", "scope"),
    [(*case, "layer") for case in EVERY] + [(*case, "model") for case in EVERY if case[1] not in {"vit", "resnet-bottleneck", "resnet-preact"}],
)
def test_slicing_equals_masking_to_a_hundred_thousandth_and_the_model_stays_as_it_was(method: str, family: str, scope: str):
    build, inputs = MODELS[family]
    model = build().train()
    next(iter(model.children())).eval()  # modes are mixed
    before, weights = facts_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = UNIT_METHODS[method](keep=0.5, scope=scope).plan(model, data_for(family))
    small, masked = apply(model, plan), apply(model, plan, as_mask=True)
    assert facts_of(model) == before
    assert torch.is_grad_enabled()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert_close(outputs(small.eval(), inputs), outputs(masked.eval(), inputs), claim="slicing is masking", rtol=0, atol=1e-5)
        if family not in IN_FLOAT32:
            exact = inputs.double() if inputs.is_floating_point() else inputs
            assert_close(outputs(small.double(), exact), outputs(masked.double(), exact), claim="in float64", rtol=0, atol=1e-7 if family in TEXT else 1e-12)
        assert (outputs(masked.float(), inputs) - outputs(model.eval(), inputs)).abs().max() > 1e-6, "something was cut"
    if scope == "layer":
        assert {axis.name: len(plan.units[axis.name]) for axis in axes_of(model, plan)} == {axis.name: axis.size // 2 for axis in axes_of(model, plan)}
    for axis in axes_of(small, plan):
        assert axis.size == len(plan.units[axis.name])


@pytest.mark.parametrize(("method", "family"), list(taking_heads()))
def test_slicing_equals_masking_where_heads_go(method: str, family: str):
    build, inputs = MODELS[family]
    model = build()
    plan = UNIT_METHODS[method](keep=0.5, kinds=("heads",)).plan(model, data_for(family))
    assert {len(units) for units in plan.units.values()} == {2}
    with torch.no_grad():
        assert_close(outputs(apply(model, plan), inputs), outputs(apply(model, plan, as_mask=True), inputs), claim="heads", rtol=0, atol=1e-5)


@EVERY_CASE
def test_keeping_everything_gives_the_same_bits(method: str, family: str):
    build, inputs = MODELS[family]
    model = build()
    plan = UNIT_METHODS[method](keep=1.0).plan(model, data_for(family))
    assert all(plan.units[axis.name] == tuple(range(axis.size)) for axis in axes_of(model, plan))
    assert torch.equal(outputs(apply(model, plan), inputs), outputs(model, inputs))
    assert torch.equal(outputs(apply(model, plan, as_mask=True), inputs), outputs(model, inputs))


@SOME_CASES
def test_the_same_settings_and_data_give_the_same_plan_and_files_keep_it(method: str, family: str, tmp_path: Path):
    model, settings = MODELS[family][0](), UNIT_METHODS[method](keep=0.5)
    first, again = settings.plan(model, data_for(family)), settings.plan(model, data_for(family))
    first.save(tmp_path)
    for other in (again, load_plan(tmp_path)):
        assert (first.units, first.method, first.num_tokens) == (other.units, other.method, other.num_tokens)
        assert all(torch.equal(scores, other.scores[name]) for name, scores in first.scores.items())
        assert all(torch.equal(factors, other.factors[name]) for name, factors in first.factors.items())
    assert first.method == repr(settings)
    assert all(scores.dtype == torch.float64 for scores in first.scores.values())


@SOME_CASES
def test_a_plan_that_was_interrupted_goes_on_to_the_same_bits(method: str, family: str):
    model, settings, made = MODELS[family][0](), UNIT_METHODS[method](keep=0.5), {}
    whole = settings.plan(model, data_for(family), steps=Steps(note=made.__setitem__))
    assert list(made) == list(whole.units)
    first = dict(itertools.islice(made.items(), 1))
    more: dict[str, Choice] = {}
    again = settings.plan(model, data_for(family), steps=Steps(done=first, note=more.__setitem__))
    assert list(more) == list(whole.units)[1:]
    assert again.units == whole.units
    assert all(torch.equal(scores, again.scores[name]) for name, scores in whole.scores.items())
    assert all(torch.equal(factors, again.factors[name]) for name, factors in whole.factors.items())


@pytest.mark.parametrize(("method", "family"), [case for case in SOME if case[0] not in BY_BATCH])
def test_the_plan_does_not_depend_on_how_rows_are_dealt_into_batches(method: str, family: str):
    model, settings = MODELS[family][0](), UNIT_METHODS[method](keep=0.5)
    inputs = MODELS[family][1]
    one = settings.plan(model, [inputs])
    for other in (settings.plan(model, inputs), settings.plan(model, inputs.split(1)), settings.plan(model, DataLoader(list(inputs), batch_size=2))):
        assert one.units == other.units
        same_scores(one, other, claim="rows by other batches")
        assert one.num_tokens == other.num_tokens


RAGGED = [torch.tensor([3, 7, 1, 12, 9]), torch.tensor([5, 5, 2, 0, 20, 4, 8]), torch.tensor([6, 1])]


def padded(rows: list[Tensor], *, left: bool = False) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), 2), torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("method", "family"), [(method, family) for method, family in EVERY if family in TEXT])
def test_padding_changes_nothing(method: str, family: str):
    model, settings = MODELS[family][0](), UNIT_METHODS[method](keep=0.5)
    plain = settings.plan(model, [row[None] for row in RAGGED])
    batches = [padded([row, torch.zeros(9)])["input_ids"][:1] for row in RAGGED]
    masks = [(torch.arange(9) < len(row)).long()[None] for row in RAGGED]
    by_row = settings.plan(model, [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(batches, masks, strict=True)])
    together = by_row if method in BY_BATCH else settings.plan(model, padded(RAGGED))
    for other in (by_row, together):
        assert plain.units == other.units
        assert plain.num_tokens == other.num_tokens == (14 if settings.NEEDS_DATA else 0)
        same_scores(plain, other, claim="with padding behind the text")
    # In front of it, where the model itself computes the same then: GPT-2 counts positions from the first token, padded or not, and the biases of Mamba2
    # leak from padding into the convolution.
    if method not in BY_BATCH and family not in {"gpt2", "mamba2"}:
        left = settings.plan(model, padded(RAGGED, left=True))
        assert plain.units == left.units
        same_scores(plain, left, claim="with padding in front of the text")


def test_a_mask_of_ones_is_no_mask():
    inputs = MODELS["llama"][1]
    for method in UNIT_METHODS:
        if "neurons" in UNIT_METHODS[method].DEFAULT_KINDS:
            model, settings = MODELS["llama"][0](), UNIT_METHODS[method](keep=0.5)
            plan = settings.plan(model, [{"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}])
            assert plan.units == settings.plan(model, [inputs]).units


@pytest.mark.parametrize(("method", "family"), [case for case in SOME if case[0] not in TOGETHER])
def test_a_larger_fraction_keeps_the_same_units_and_more(method: str, family: str):
    model, data = MODELS[family][0](), data_for(family)
    plans = [UNIT_METHODS[method](keep=keep, recalibrate=False).plan(model, data) for keep in (0.1, 0.4, 0.7)]
    for small, large in itertools.pairwise(plans):
        assert all(set(units) <= set(large.units[name]) for name, units in small.units.items())
        assert all(torch.equal(scores, large.scores[name]) for name, scores in small.scores.items())


@pytest.mark.parametrize("scope", ["layer", "model"])
@SOME_CASES
def test_protected_units_stay_and_the_number_of_units_is_the_one_asked_for(method: str, family: str, scope: str):
    model, data = MODELS[family][0](), data_for(family)
    free = UNIT_METHODS[method](keep=0.5).plan(model, data)
    axis = axes_of(model, free)[-1]
    lost = sorted(set(range(axis.size)) - set(free.units[axis.name]))[:2]
    plan = UNIT_METHODS[method](keep=0.5, scope=scope, protect=(f"{axis.name}:{lost[0]},{lost[-1]}",)).plan(model, data)
    assert set(lost) <= set(plan.units[axis.name])
    if scope == "layer":
        assert {name: len(units) for name, units in plan.units.items()} == {name: len(units) for name, units in free.units.items()}
    whole = UNIT_METHODS[method](keep=0.5, protect=(axis.name,)).plan(model, data)
    assert axis.name not in whole.units
    apply(model, plan)


@SOME_CASES
def test_numbers_of_units_are_multiples_where_that_is_asked_for(method: str, family: str):
    model = MODELS[family][0]()
    plan = UNIT_METHODS[method](keep=0.6, round_to=4).plan(model, data_for(family))
    for axis in axes_of(model, plan):
        assert len(plan.units[axis.name]) % 4 == 0 or len(plan.units[axis.name]) == axis.size


@SOME_CASES
def test_a_budget_of_parameters_is_kept(method: str, family: str):
    model = MODELS[family][0]()
    total = sum(parameter.numel() for parameter in model.parameters())
    least = sum(parameter.numel() for parameter in apply(model, UNIT_METHODS[method](keep=0.001).plan(model, data_for(family))).parameters())
    limit = (total + 2 * least) // 3
    plan = UNIT_METHODS[method](max_parameters=limit).plan(model, data_for(family))
    assert least < sum(parameter.numel() for parameter in apply(model, plan).parameters()) <= limit


@SOME_CASES
def test_a_failure_in_the_middle_leaves_no_traces_even_while_the_error_is_being_looked_at(method: str, family: str, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fail_at_the_second(self: UnitMethod, visit: Any, **wishes: Any) -> Any:
        calls.append(visit.axis.name)
        if len(calls) == 2:
            raise RuntimeError("in the middle")
        return original(self, visit, **wishes)

    original = UNIT_METHODS[method].choose
    monkeypatch.setattr(UNIT_METHODS[method], "choose", fail_at_the_second)
    model = MODELS[family][0]().train()
    before = facts_of(model)
    try:
        UNIT_METHODS[method](keep=0.5).plan(model, data_for(family))
    except RuntimeError as error:
        assert str(error) == "in the middle"
        assert torch.is_grad_enabled()
        assert facts_of(model) == before
    else:
        pytest.fail("the failure got lost")


@EVERY_METHOD
def test_inside_a_block_without_gradients_the_plan_is_the_same(method: str):
    family = "mamba2" if UNIT_METHODS[method].DEFAULT_KINDS == ("states",) else "llama"
    model, settings = MODELS[family][0](), UNIT_METHODS[method](keep=0.5)
    with torch.no_grad():
        inside = settings.plan(model, data_for(family))
    assert inside.units == settings.plan(model, data_for(family)).units


@EVERY_METHOD
def test_models_in_bfloat16_can_be_pruned(method: str):
    family = "mamba2" if UNIT_METHODS[method].DEFAULT_KINDS == ("states",) else "llama"
    build, inputs = MODELS[family]
    model = build().to(torch.bfloat16)
    plan = UNIT_METHODS[method](keep=0.5).plan(model, [inputs])
    assert_close(outputs(apply(model, plan), inputs), outputs(apply(model, plan, as_mask=True), inputs), claim="in bfloat16")


@EVERY_METHOD
def test_a_model_that_was_pruned_before_can_be_pruned_again_but_not_with_the_old_plan(method: str):
    family = "mamba2" if UNIT_METHODS[method].DEFAULT_KINDS == ("states",) else "llama"
    model, settings = MODELS[family][0](), UNIT_METHODS[method](keep=0.5)
    plan = settings.plan(model, data_for(family))
    small = apply(model, plan)
    with pytest.raises(InputError, match=r"the plan was made for \d+ \w+ in \S+, but this model has \d+, expected the model that it was made for") as caught:
        apply(small, plan)
    assert caught.value.code == "plan-for-another-model"
    smaller = apply(small, settings.plan(small, data_for(family)))
    assert sum(map(torch.numel, smaller.parameters())) < sum(map(torch.numel, small.parameters()))


NEEDING_DATA = [name for name, kind in UNIT_METHODS.items() if kind.NEEDS_DATA]


@pytest.mark.parametrize("data", [None, [], torch.empty(0, 5, dtype=torch.int64), {}, [{"input_ids": torch.ones(1, 3), "attention_mask": torch.zeros(1, 3)}]])
@pytest.mark.parametrize("method", NEEDING_DATA)
def test_no_calibration_data_are_refused(method: str, data: Any):
    family = "mamba2" if UNIT_METHODS[method].DEFAULT_KINDS == ("states",) else "llama"
    with pytest.raises(InputError, match=r"got no calibration data, expected at least one batch of inputs\. Pass a tensor \(rows, \.\.\.\)") as caught:
        UNIT_METHODS[method](keep=0.5).plan(MODELS[family][0](), data)
    assert caught.value.code == "no-calibration"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (torch.tensor([1, 2, 3]), r"got a tensor of shape \(3,\), expected one row per input, \(rows, \.\.\.\)\. For a single row pass tensor\[None\]\."),
        (["some text"], r"got a batch that is a str, expected a tensor, a pair \(inputs, labels\), or a mapping such as a tokenizer gives\. Collate"),
        ([[1, 2, 3]], r"got a batch that is a list, expected a tensor"),
    ],
)
@pytest.mark.parametrize("method", NEEDING_DATA)
def test_data_that_are_no_batches_are_refused(method: str, data: Any, text: str):
    family = "mamba2" if UNIT_METHODS[method].DEFAULT_KINDS == ("states",) else "llama"
    with pytest.raises(InputError, match=text) as caught:
        UNIT_METHODS[method](keep=0.5).plan(MODELS[family][0](), data)
    assert caught.value.code == "calibration-data"


def test_what_users_have_is_read_as_batches_and_read_once():
    model, rows = tiny_mlp(6, 8, 4), torch.randn(20, 6)
    settings = UNIT_METHODS["wanda"](keep=0.5)
    expected = settings.plan(model, rows)
    assert expected.num_tokens == 20
    labels = torch.zeros(20, dtype=torch.int64)
    loaders = [
        DataLoader(torch.utils.data.TensorDataset(rows), batch_size=7),  # lists of one tensor
        DataLoader(torch.utils.data.TensorDataset(rows, labels), batch_size=7),
        iter(rows.split(6)),
        (batch for batch in [rows[:3], rows[:0], rows[3:]]),
    ]
    for data in loaders:
        assert settings.plan(model, data).units == expected.units
    decoder, ids = MODELS["llama"][0](), torch.arange(20 * 3).view(20, 3) % 20
    as_a_tokenizer_gives = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert settings.plan(decoder, as_a_tokenizer_gives).units == settings.plan(decoder, ids).units
    assert settings.plan(decoder, as_a_tokenizer_gives).num_tokens == 60


@pytest.mark.parametrize(("method", "family"), [(method, family) for method, family in SOME if UNIT_METHODS[method].NEEDS_DATA])
def test_activations_that_are_no_numbers_are_refused_with_the_place(method: str, family: str):
    model = MODELS[family][0]()
    names = {"mlp-with-norms": "0.weight", "resnet": "layer2.0.bn1.bias", "llama": "model.layers.1.mlp.up_proj.weight"}
    with torch.no_grad():
        tensors_of(model)[names.get(family, "backbone.layers.1.mixer.in_proj.weight")].view(-1)[0] = float("nan")
    text = r"got NaN or infinite activations in (the (input|output) of )?[\w.]+, expected finite numbers|the scores of \S+ has \d+ NaN or infinite entries"
    with pytest.raises(InputError, match=text) as caught:
        UNIT_METHODS[method](keep=0.5).plan(model, data_for(family))
    assert caught.value.code == "not-finite"


@EVERY_METHOD
def test_an_architecture_that_cannot_be_cut_is_named_with_those_that_can(method: str):
    text = r"got a BertForSequenceClassification of type 'bert', expected one of: llama, mistral, qwen2, qwen3; gpt2; gpt_neox; mamba2; vit; convolutional"
    with pytest.raises(InputError, match=text) as caught:
        UNIT_METHODS[method](keep=0.5).plan(tiny_bert(), MODELS["llama"][1])
    assert caught.value.code == "unknown-model"


class QuantisedLinear(nn.Linear):
    """As quantisation packages put in the place of a linear layer."""


@EVERY_METHOD
def test_quantised_layers_are_refused_by_name(method: str):
    states = UNIT_METHODS[method].DEFAULT_KINDS == ("states",)
    model = MODELS["mamba2" if states else "llama"][0]()
    name = "backbone.layers.1.mixer.in_proj" if states else "model.layers.1.mlp.down_proj"
    model.get_submodule(name).__class__ = QuantisedLinear
    with pytest.raises(InputError, match=rf"{name} is a \S+QuantisedLinear, expected a plain Linear\. Dequantise the model") as caught:
        UNIT_METHODS[method](keep=0.5).plan(model, MODELS["llama"][1])
    assert caught.value.code == "unsupported-layer"


@EVERY_METHOD
def test_kinds_that_do_not_exist_and_those_that_the_model_lacks_are_refused(method: str):
    with pytest.raises(InputError, match=r"kind='legs' is not known\. Choose one of: states, neurons, filters, heads\."):
        UNIT_METHODS[method](kinds=("legs",))
    states = "states" in UNIT_METHODS[method].DEFAULT_KINDS
    other = tiny_mlp(6, 8, 4) if UNIT_METHODS[method].DEFAULT_KINDS == ("states",) else tiny_mamba2()
    kinds: Mapping[str, Any] = {"kinds": ("neurons",)} if states and isinstance(other, type(tiny_mamba2())) else {}
    with pytest.raises(InputError, match=r"prunes [\w ]+, and \w+ has (states|neurons) only\. Choose a method that is for those, or pass them as kinds"):
        UNIT_METHODS[method](keep=0.5, **kinds).plan(other, MODELS["llama"][1])


@EVERY_METHOD
def test_budgets_that_cannot_be_are_refused_by_every_method(method: str):
    with pytest.raises(InputError, match=r"got keep=0, expected a fraction above 0 and at most 1"):
        UNIT_METHODS[method](keep=0)
    with pytest.raises(InputError, match=r"got keep and max_bytes, expected one budget"):
        UNIT_METHODS[method](keep=0.5, max_bytes=1)
    family = "mamba2" if UNIT_METHODS[method].DEFAULT_KINDS == ("states",) else "llama"
    model, data = MODELS[family][0](), data_for(family)
    with pytest.raises(InputError, match=r"got max_bytes=1, but the smallest model that can be cut here costs [\d,]+, the whole one [\d,]+"):
        UNIT_METHODS[method](max_bytes=1).plan(model, data)
    with pytest.raises(InputError, match=r"protect='nothing' fits none of the 2 axes of this model"):
        UNIT_METHODS[method](protect=("nothing",)).plan(model, data)
    with pytest.raises(InputError, match=r"would have to stay to protect what protect names, but the budget leaves \d+\. Raise the budget, or protect fewer"):
        UNIT_METHODS[method](keep=0.25, protect=("*:0-6",)).plan(model, data)
