"""Claims about taking subnetworks out of models and putting them back, for every family."""

from __future__ import annotations

import copy
import importlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model_families import FAMILIES, IN_FLOAT32, any_part, generators, outputs
from partwise.checks import InputError
from partwise.models import (
    BlockAxis,
    DisjointSampler,
    FixedFractionSampler,
    Part,
    count_holders,
    coupled_axes,
    extract,
    mask,
    merge,
    merge_tensors,
    scale_readers,
    slice_tensors,
    tensors_of,
)
from tiny import tiny_bert, tiny_decoder, tiny_mlp
from tolerances import assert_close

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
SEEDS = st.integers(0, 10_000)
# One example costs up to a tenth of a second here: a model is built, copied and run.
FEW = settings(max_examples=5)


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def perturb(model: nn.Module, amount: float) -> Any:
    """A copy with every floating-point tensor moved by ``amount``."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in tensors_of(moved).values():
            if tensor.is_floating_point():
                tensor.add_(amount)
    return moved


@EVERY_FAMILY
@FEW
@given(seed=SEEDS)
def test_an_extracted_model_computes_what_the_masked_one_computes(family: str, seed: int):
    build, inputs = FAMILIES[family]
    model = build(seed=seed)
    part = any_part(model, seed)
    small = extract(model, part)
    assert type(small) is type(model)
    assert sum(tensor.numel() for tensor in small.parameters()) <= sum(tensor.numel() for tensor in model.parameters())
    exact = inputs.double() if inputs.is_floating_point() else inputs
    assert_close(outputs(small.double(), exact), outputs(mask(model, part).double(), exact), claim="slicing is masking")


@EVERY_FAMILY
@pytest.mark.parametrize("seed", range(4))
def test_in_float32_slicing_is_masking_to_a_millionth(family: str, seed: int):
    """Of fixed models: what rounding does to sums in another order has no bound that every model keeps to."""
    build, inputs = FAMILIES[family]
    model = build(seed=seed)
    part = any_part(model, seed)
    assert_close(outputs(extract(model, part), inputs), outputs(mask(model, part), inputs), claim="to 1e-6", rtol=0, atol=1e-6)


@EVERY_FAMILY
def test_what_is_masked_matters(family: str):
    build, inputs = FAMILIES[family]
    model = build()
    for axis in coupled_axes(model):
        without = outputs(mask(model, Part({axis.name: (0,)})), inputs)
        assert (without - outputs(model, inputs)).abs().max() > 1e-4, f"units of {axis.name} do nothing, so a test could not see a mistake"


@EVERY_FAMILY
def test_an_extracted_model_has_the_gradients_of_the_masked_one(family: str):
    build, inputs = FAMILIES[family]
    model = build(seed=3).double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    axes = coupled_axes(model)
    part = any_part(model, 5)
    small, masked = extract(model, part, axes=axes), mask(model, part, axes=axes)
    for either in (small, masked):
        outputs(either, inputs).square().sum().backward()
    gradients = {name: tensor.grad for name, tensor in masked.named_parameters() if tensor.grad is not None}
    inside = {"rtol": 1e-5, "atol": 1e-6} if family in IN_FLOAT32 else {}
    for name, gradient in slice_tensors(gradients, axes, part).items():
        assert_close(small.get_parameter(name).grad, gradient, claim=f"the gradient of {name}, in the precision that the model computes in", **inside)


@EVERY_FAMILY
@FEW
@given(seed=SEEDS, num_parts=st.integers(1, 4))
def test_extract_then_merge_is_the_identity_to_the_bit(family: str, seed: int, num_parts: int):
    model = FAMILIES[family][0](seed=seed)
    axes = coupled_axes(model)
    parts = [Part(any_part(model, seed + index).units, index=index) for index in range(num_parts)]
    merged = merge(model, [(part, extract(model, part, axes=axes)) for part in parts], axes=axes)
    assert same_bits(merged, model)
    assert type(merged) is type(model)


@EVERY_FAMILY
def test_a_part_that_names_no_axis_is_the_whole_model(family: str):
    build, inputs = FAMILIES[family]
    model = build()
    whole = extract(model, Part({}))
    assert same_bits(whole, model)
    assert torch.equal(outputs(whole, inputs), outputs(model, inputs))
    if hasattr(model, "config"):
        assert whole.config.to_dict() == model.config.to_dict()


@EVERY_FAMILY
def test_coordinates_without_a_holder_stay_with_one_are_copied_and_with_more_are_averaged(family: str):
    model = FAMILIES[family][0]()
    axes = coupled_axes(model)
    parts = [Part(any_part(model, seed).units, index=index) for index, seed in enumerate((1, 2, 3))]
    results = [(part, perturb(extract(model, part, axes=axes), 2.0**part.index)) for part in parts]  # moves of 1, 2 and 4
    old, new = tensors_of(model), tensors_of(merge(model, results, axes=axes))
    # Which parts hold a coordinate is found by sending a tensor of their number through the same way, one part at a time.
    moves = {name: torch.zeros_like(tensor) for name, tensor in old.items()}
    holders = {name: torch.zeros_like(tensor) for name, tensor in old.items()}
    for part in parts:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in old.items()}
        ones = {name: torch.ones_like(piece) for name, piece in slice_tensors(zeros, axes, part).items()}
        for name, held in merge_tensors(zeros, [(part, ones)], axes=axes).items():
            holders[name] += held
            moves[name] += held * 2**part.index
    for name, tensor in old.items():
        if tensor.is_floating_point():
            untouched = holders[name] == 0
            assert torch.equal(new[name][untouched], tensor[untouched])
            assert_close(new[name], tensor + moves[name] / holders[name].clamp(min=1), claim=f"mean over the holders of {name}")


@EVERY_FAMILY
def test_the_order_in_which_parts_arrive_does_not_matter(family: str):
    model = FAMILIES[family][0]()
    results = [(part, perturb(extract(model, part), 0.1 + part.index)) for part in (Part(any_part(model, seed).units, index=seed) for seed in range(3))]
    assert same_bits(merge(model, results), merge(model, results[::-1]))


@EVERY_FAMILY
def test_the_model_is_not_changed_and_shares_nothing_with_its_parts(family: str):
    build, _ = FAMILIES[family]
    model, untouched = build(), build()
    part = any_part(model, 1)
    for other in (extract(model, part), extract(model, Part({})), mask(model, part), merge(model, [])):
        with torch.no_grad():
            for tensor in tensors_of(other).values():
                tensor.zero_()
        if hasattr(other, "config"):
            other.config.intermediate_size = -1
    assert same_bits(model, untouched)
    if hasattr(model, "config"):
        assert model.config.to_dict() == untouched.config.to_dict()


def test_mode_and_frozen_parameters_carry_over():
    model = tiny_mlp(4, 6, 3).train()
    model[0].weight.requires_grad_(False)
    small = extract(model, Part({"0": (1, 2)}))
    assert small.training
    assert [tensor.requires_grad for tensor in small.parameters()] == [False, True, True, True]
    assert not extract(model.eval(), Part({})).training


def test_blending_goes_part_of_the_way_from_the_old_value_to_the_mean():
    model = tiny_mlp(4, 6, 3)
    part = Part({"0": (1, 2)})
    results = [(part, perturb(extract(model, part), 1.0))]
    half, whole = merge(model, results, blend=0.5), merge(model, results)
    for name, old in tensors_of(model).items():
        assert_close(tensors_of(half)[name], (old + tensors_of(whole)[name]) / 2, claim="half the way")


@pytest.mark.parametrize("family", ["mlp", "mistral", "vit"])
def test_the_mean_over_all_subnetworks_of_the_scaled_sum_is_the_sum_of_the_whole(family: str):
    build, inputs = FAMILIES[family]
    model = build().double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    axes = [axis for axis in coupled_axes(model) if axis.size <= 8][-1:]  # the last narrow one, so that nothing before it changes
    [axis] = axes
    reader, seen = axis.readers[0].removesuffix(".weight"), []
    for kept in itertools.combinations(range(axis.size), axis.size // 2):
        small = scale_readers(_extract_unchecked(model, Part({axis.name: kept}), axes), {axis.name: 2.0}, axes=axes)
        seen.append(_output_of(small, reader, inputs))
    assert_close(torch.stack(seen).mean(dim=0), _output_of(model, reader, inputs), claim="the corrected branch is unbiased, bias included once")


def _extract_unchecked(model: nn.Module, part: Part, axes: Any) -> nn.Module:
    """The masked model: one layer alone may be halved there, which the configuration of a transformer could not say."""
    return mask(model, part, axes=axes)


def _output_of(model: nn.Module, layer: str, inputs: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    outputs(model, inputs)
    handle.remove()
    return seen[0]


def test_disjoint_parts_train_one_in_num_parts_of_the_weights_between_hidden_layers():
    model = tiny_mlp(6, 8, 12, 4)
    axes = coupled_axes(model)
    parts = DisjointSampler()(axes, generators(4))
    assert all(count_holders(axis, parts) == (1,) * axis.size for axis in axes)
    results = [(part, perturb(extract(model, part, axes=axes), 1.0)) for part in parts]
    merged = merge(model, results, axes=axes)
    share = [float((new != old).double().mean()) for old, new in zip(model.parameters(), merged.parameters(), strict=True)]
    assert share == [1.0, 1.0, 0.25, 1.0, 1.0, 1.0], "rows, bias; hidden to hidden; bias; columns, output bias"


def test_half_the_head_groups_and_neurons_leave_the_parameters_that_the_formula_says():
    model = tiny_decoder("Mistral")
    [part] = FixedFractionSampler(keep=0.5)(coupled_axes(model), generators(1))
    small = extract(model, part)
    hidden, head_dim, vocabulary, layers = 32, 4, 24, 2
    attention = 2 * hidden * head_dim * 4 + 2 * hidden * head_dim * 2  # q and o for 4 heads, k and v for 2 groups
    pinned = 2 * vocabulary * hidden + (2 * layers + 1) * hidden
    assert sum(tensor.numel() for tensor in small.parameters()) == pinned + layers * (attention + 3 * hidden * 12)


def test_a_unit_of_an_axis_that_does_not_exist_is_refused_and_known_ones_are_listed():
    with pytest.raises(InputError, match=r"got units of 'fc1', expected one of the 2 axes of this model: 0, 2\. Use their names\."):
        extract(tiny_mlp(6, 8, 12, 4), Part({"fc1": (0,)}))


def test_a_part_without_units_is_refused():
    with pytest.raises(InputError, match=r"got a part without units of 2, expected 1 to 12 of them: a layer without units passes nothing on\."):
        extract(tiny_mlp(6, 8, 12, 4), Part({"0": (0,), "2": ()}))


@pytest.mark.parametrize(
    ("units", "text"), [((0, 8), "got unit 8 for 0, expected distinct units from 0 to 7"), ((3, 3), "rising order"), ((3, 1), "rising order")]
)
def test_units_that_are_out_of_range_repeated_or_unsorted_are_refused(units: tuple[int, ...], text: str):
    with pytest.raises(InputError, match=text):
        mask(tiny_mlp(6, 8, 4), Part({"0": units}))


def test_a_result_of_another_part_is_refused_by_name_and_shape():
    model = tiny_mlp(6, 8, 4)
    small = extract(model, Part({"0": (0, 1)}))
    with pytest.raises(InputError, match=r"got 0\.weight of part 3 of shape \(2, 6\), expected shape \(3, 6\)\. Merge what `extract` made"):
        merge(model, [(Part({"0": (0, 1, 2)}, index=3), small)])
    with pytest.raises(InputError, match=r"got 2\.weight of part 0 missing, expected shape \(4, 2\)"):
        merge(model, [(Part({"0": (0, 1)}), small[:1])])


@pytest.mark.parametrize("blend", [0.0, 1.5, float("nan")])
def test_a_blend_outside_its_range_is_refused(blend: float):
    with pytest.raises(InputError, match=r"got blend=.*, expected a number above 0 and at most 1"):
        merge(tiny_mlp(6, 8, 4), [], blend=blend)


def test_an_unknown_model_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(
        InputError,
        match=r"got a BertForSequenceClassification of type 'bert', expected one of: llama, mistral, qwen2, qwen3; gpt2; gpt_neox; mamba2; vit; "
        r"convolutional networks and ResNets; multilayer perceptrons\.",
    ):
        coupled_axes(tiny_bert())
    with pytest.raises(InputError, match=r"got a LSTM, expected one of"):
        coupled_axes(nn.LSTM(3, 3))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch itself, when torch.compile loads
@pytest.mark.parametrize("model", [tiny_decoder("Llama"), tiny_mlp(3, 4, 2)], ids=["llama", "mlp"])
@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (nn.DataParallel, r"got a DataParallel, .* Pass the model inside, model\.module\."),
        (torch.compile, r"got a OptimizedModule, .* Pass the model inside, model\._orig_mod\."),
    ],
)
def test_a_wrapped_model_is_refused_and_the_one_inside_is_named(model: nn.Module, wrap: Any, advice: str):
    with pytest.raises(InputError, match=advice):
        coupled_axes(wrap(model))


def test_a_model_with_an_adapter_is_refused_until_the_adapter_is_merged():
    peft = importlib.import_module("peft")
    wrapped = peft.get_peft_model(tiny_decoder("Llama"), peft.LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(InputError, match=r"got a PeftModel, .* Merge the adapter first, model\.merge_and_unload\(\)\."):
        coupled_axes(wrapped)
    assert len(coupled_axes(wrapped.merge_and_unload())) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY_FAMILY
def test_parts_stay_on_the_device_of_their_model(family: str):
    model = FAMILIES[family][0]().cuda()
    part = any_part(model, 1)
    small = extract(model, part)
    assert {tensor.device.type for tensor in [*small.parameters(), *small.buffers()]} == {"cuda"}
    assert same_bits(merge(model, [(part, small)]), model)


def test_a_kind_that_the_family_has_not_is_refused_and_its_kinds_are_listed():
    with pytest.raises(InputError, match=r"kind of axis of GPT2LMHeadModel='heads' is not known\. Choose one of: neurons\."):
        coupled_axes(FAMILIES["gpt2"][0](), kinds=["heads"])


@EVERY_FAMILY
def test_axes_of_chosen_kinds_are_those_of_all_kinds_that_have_it(family: str):
    model = FAMILIES[family][0]()
    everything = coupled_axes(model)
    for kind in {axis.kind for axis in everything}:
        assert coupled_axes(model, kinds=[kind]) == tuple(axis for axis in everything if axis.kind == kind)


@EVERY_FAMILY
def test_axes_name_tensors_that_exist_with_as_many_entries_as_their_units_have(family: str):
    model = FAMILIES[family][0]()
    tensors = tensors_of(model)
    for axis in coupled_axes(model):
        if isinstance(axis, BlockAxis):
            assert all(name in tensors for names in axis.closers for name in names)
            continue
        assert set(axis.readers) <= {member.tensor for member in axis.members}
        assert set(axis.closers) <= {member.tensor for member in axis.members}
        for member in axis.members:
            entries = tensors[member.tensor].shape[member.dim]
            assert entries == (axis.size * member.width if member.length is None else member.length)
            assert member.kept_entries(range(axis.size), size=axis.size).tolist() == list(range(entries))


def test_scaling_readers_leaves_whole_numbers_whole():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    axes = coupled_axes(model)
    scaled = scale_readers(model, {axes[0].name: 2.0}, axes=axes)
    assert scaled[1].num_batches_tracked.dtype == torch.int64
    assert torch.equal(scaled[3].weight, 2 * model[3].weight)
