"""Claims about TwIST: what a part holds, what its correction does, and what training by parts comes to in the limits that are known."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from model_families import IDS, generators, images, outputs
from partwise.checks import InputError, PartwiseError
from partwise.models import CoupledAxis, Part, count_holders, coupled_axes, extract, mask, merge, scale_readers, tensors_of
from partwise.train import OptimizerSettings, SubnetTrainer, TwIST
from partwise.train._local import scaled_inputs, task_loss
from partwise.train._metrics import mean_loss
from tiny import tiny_bert, tiny_decoder, tiny_gpt2, tiny_llama, tiny_mlp, tiny_resnet, tiny_vit
from tolerances import assert_close

DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3")
PLAIN = OptimizerSettings(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0, grad_clip=None)
ADAMW = OptimizerSettings(lr=0.01, schedule="constant", warmup=0.0, grad_clip=None)


def texts(number: int, *, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(24, (number, 3, 6), generator=generator)
    return [{"input_ids": rows, "labels": rows} for rows in ids]


def trained(model: nn.Module, batches: list[dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> nn.Module:
    """The loop that everybody writes."""
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


def same_weights(model: nn.Module, expected: dict[str, Tensor], *, claim: str) -> None:
    found = tensors_of(model)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert_close(tensor.detach(), expected[name].detach(), claim=f"{claim}: {name}")


def test_one_part_that_keeps_everything_is_ordinary_training():
    start, batches = tiny_decoder("Llama").double(), texts(6)
    ours = SubnetTrainer(start, TwIST(num_parts=1, keep=1.0, num_blocks=6, num_local_steps=3), optimizer=ADAMW).fit(batches, num_rounds=2)
    plain = copy.deepcopy(start)
    trained(plain, batches, torch.optim.AdamW(plain.parameters(), lr=0.01))
    same_weights(ours.model, tensors_of(plain), claim="the moments are carried from round to round")


def test_several_parts_that_keep_everything_are_periodic_averaging():
    start, batches = tiny_decoder("Qwen2").double(), texts(12)
    ours = SubnetTrainer(start, TwIST(num_parts=2, keep=1.0, num_blocks=6, num_local_steps=3), optimizer=PLAIN).fit(batches, num_rounds=2)
    average = copy.deepcopy(start)
    for round_batches in (batches[:6], batches[6:]):
        workers = [copy.deepcopy(average) for _ in range(2)]
        for worker, own in zip(workers, (round_batches[:3], round_batches[3:]), strict=True):
            trained(worker, own, torch.optim.SGD(worker.parameters(), lr=0.1))
        with torch.no_grad():
            for mine, *theirs in zip(average.parameters(), *(worker.parameters() for worker in workers), strict=True):
                mine.copy_(sum(theirs) / 2)
    same_weights(ours.model, tensors_of(average), claim="the mean after every third step")


@pytest.mark.parametrize("correction", ["inverse_keep", "inverse_sqrt_keep", "none"])
def test_a_round_trains_the_masked_model_with_the_corrected_sums(correction: Any):
    """One part, one step: the slow twin is the whole model whose readers see missing units as zeros and the others times the factor."""
    start, [batch] = tiny_decoder("Qwen3").double(), texts(1)
    method = TwIST(num_parts=1, keep=0.5, num_blocks=6, num_local_steps=1, correction=correction)
    trainer = SubnetTrainer(start, method, optimizer=PLAIN)
    [part] = method.deal(trainer.axes, generators(1))
    factors = method.factors(trainer.axes, part)
    whole = copy.deepcopy(start).train()
    for axis in trainer.axes:
        [reader] = axis.readers
        width = next(member.width for member in axis.members if member.tensor == reader)
        held = torch.isin(torch.arange(axis.size), torch.tensor(part.units[axis.name])).repeat_interleave(width).double()
        scaled = held * factors.get(axis.name, 1.0)
        whole.get_submodule(reader.removesuffix(".weight")).register_forward_pre_hook(lambda _, args, scaled=scaled: (args[0] * scaled,))
    trained(whole, [batch], torch.optim.SGD(whole.parameters(), lr=0.1))
    same_weights(trainer.fit([batch], num_rounds=1).model, tensors_of(whole), claim="what nobody held did not move")


@pytest.mark.parametrize(("correction", "exponent"), [("inverse_keep", 1.0), ("inverse_sqrt_keep", 0.5)])
def test_the_factor_is_one_over_the_share_that_is_really_kept(correction: Any, exponent: float):
    method = TwIST(num_blocks=6, keep=0.3, correction=correction)
    axes = method.find_axes(tiny_decoder("Llama"))
    [part] = method.deal(axes, generators(1))
    factors = method.factors(axes, part)
    assert factors["model.layers.0.self_attn"] == pytest.approx(4.0**exponent)  # 0.3 of 4 groups is 1
    assert factors["model.layers.0.mlp"] == pytest.approx(3.0**exponent)  # 0.3 of 6 blocks is 2
    assert TwIST(num_blocks=6, keep=0.3, correction="none").factors(axes, part) == {}
    assert method.factors(axes, Part({axis.name: tuple(range(axis.size)) for axis in axes})) == {}


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "output-bias"])
@pytest.mark.parametrize("kind", ["mlp", "self_attn"])
def test_the_mean_of_the_corrected_branch_over_all_twenty_choices_is_the_whole_branch(kind: str, bias: bool):
    model = tiny_llama(num_attention_heads=6, head_dim=4, hidden_size=24, attention_bias=bias, mlp_bias=bias, intermediate_size=24).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    name = f"model.layers.0.{kind}"
    [axis] = [axis for axis in coupled_axes(model) if axis.name == name]
    width = axis.size // 6  # six heads, or six blocks of four neurons
    method, seen = TwIST(num_blocks=6, keep=0.5), []
    hidden = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def branch(whole: Any) -> Tensor:
        module = whole.get_submodule(name)
        if kind == "mlp":
            return module(hidden)
        places = torch.arange(5)[None]
        causal = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        return module(hidden, position_embeddings=whole.model.rotary_emb(hidden, places), attention_mask=causal)[0]

    for choice in itertools.combinations(range(6), 3):
        units = tuple(block * width + unit for block in choice for unit in range(width))
        part = Part({name: units})
        small = extract(model, part, axes=[axis], loadable=False)
        seen.append(branch(scale_readers(small, method.factors([axis], part), axes=[axis])))
    assert len(seen) == 20
    assert_close(torch.stack(seen).mean(0), branch(model), claim="unbiased", atol=1e-12)
    assert (seen[0] - branch(model)).abs().max() > 1e-3


@pytest.mark.parametrize("correction", ["inverse_keep", "inverse_sqrt_keep", "none"])
@pytest.mark.parametrize("family", [*DECODERS, "gpt2", "vit", "biases"])
def test_weights_with_the_correction_folded_in_are_the_subnetwork_that_trained(family: str, correction: Any):
    built: dict[str, Any] = {"gpt2": tiny_gpt2, "vit": tiny_vit, "biases": lambda: tiny_decoder("Llama", attention_bias=True, mlp_bias=True)}
    model = built.get(family, lambda: tiny_decoder(family))()
    inputs = images(8) if family == "vit" else IDS
    method = TwIST(keep=0.5, num_blocks=4, correction=correction)
    axes = method.find_axes(model)
    part = method.deal(axes, generators(2))[1]
    small = extract(model, part, axes=axes)
    factors = method.factors(axes, part)
    readers = {reader: factors[axis.name] for axis in axes if axis.name in factors for reader in axis.readers}
    with scaled_inputs(small, readers):
        training = outputs(small, inputs)
    folded = outputs(scale_readers(small, factors, axes=axes), inputs)
    assert_close(folded, training, claim="a factor on the input of a layer is one on its weights", rtol=0, atol=1e-5)
    if correction != "none":
        assert not torch.allclose(training, outputs(small, inputs))
    assert_close(outputs(small, inputs), outputs(mask(model, part, axes=axes), inputs), claim="slicing is masking", rtol=0, atol=1e-6)


def test_merging_takes_the_mean_over_holders_and_leaves_alone_what_nobody_held():
    model = tiny_decoder("Llama")
    axes = TwIST(num_blocks=6).find_axes(model)
    name, row = "model.layers.0.mlp", "model.layers.0.mlp.up_proj.weight"
    parts = [Part({name: (0, 1)}, index=0), Part({name: (1, 2)}, index=1)]
    results = []
    for part, shift in zip(parts, (1.0, 3.0), strict=True):
        small = extract(model, part, axes=axes, loadable=False)
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(shift)
        results.append((part, small))
    old, new = tensors_of(model)[row], tensors_of(merge(model, results, axes=axes))[row]
    assert torch.equal(new[3:], old[3:])
    assert torch.equal(new[0], old[0] + 1)
    assert torch.equal(new[2], old[2] + 3)
    assert_close(new[1], old[1] + 2, claim="the mean of two")


def test_balanced_parts_whose_fractions_add_up_to_one_cover_everything_once():
    method = TwIST(num_parts=4, keep=0.25, num_blocks=4)
    axes = method.find_axes(tiny_decoder("Llama"))
    parts = method.deal(axes, generators(4))
    assert [set(count_holders(axis, parts)) for axis in axes] == [{1}] * 4


@settings(max_examples=30)
@given(
    keep=st.floats(0.13, 1.0),
    num_parts=st.integers(1, 5),
    num_blocks=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]),
    balanced=st.booleans(),
    round_number=st.integers(1, 50),
)
def test_parts_hold_whole_blocks_as_many_in_every_layer_and_as_evenly_as_can_be(
    keep: float, num_parts: int, num_blocks: int, balanced: bool, round_number: int
):
    method = TwIST(num_parts=num_parts, keep=keep, num_blocks=num_blocks, balanced=balanced)
    if keep * num_blocks < 0.5:
        with pytest.raises(InputError, match=r"leaves .* with none of its 24 neurons"):
            method.find_axes(DECODER)
        return
    axes = method.find_axes(DECODER)
    parts = method.deal(axes, generators(num_parts, round_number=round_number))
    assert [part.index for part in parts] == list(range(num_parts))
    width = 24 // num_blocks
    for part, axis in itertools.product(parts, axes):
        units = part.units[axis.name]
        if axis.kind == "heads":
            assert len(units) == int(keep * 4 + 0.5)
            continue
        blocks = sorted({unit // width for unit in units})
        assert units == tuple(block * width + unit for block in blocks for unit in range(width))
        assert len(blocks) == int(keep * num_blocks + 0.5)
    if balanced:
        assert all(max(counts) - min(counts) <= 1 for axis in axes for counts in [count_holders(axis, parts)])
    assert parts == method.deal(axes, generators(num_parts, round_number=round_number))


DECODER = tiny_decoder("Qwen2")


def test_layers_are_dealt_independently_and_rounds_differ():
    method = TwIST(num_parts=2, keep=0.5, num_blocks=24)
    axes = method.find_axes(tiny_decoder("Llama"))
    [part, _] = method.deal(axes, generators(2))
    assert part.units["model.layers.0.mlp"] != part.units["model.layers.1.mlp"]
    assert part != method.deal(axes, generators(2, round_number=2))[0]


def test_workers_of_different_size_get_the_fractions_they_asked_for():
    method = TwIST(num_parts=3, keep=(1.0, 0.5, 0.25), num_blocks=4)
    axes = method.find_axes(tiny_decoder("Llama"))
    parts = method.deal(axes, generators(3))
    assert [[len(part.units[axis.name]) for axis in axes[:2]] for part in parts] == [[4, 24], [2, 12], [1, 6]]
    assert method.factors(axes, parts[0]) == {}
    assert set(method.factors(axes, parts[2]).values()) == {4.0}


def sizes_of(parts: list[Part], axes: Any) -> list[float]:
    """The fraction that each part holds of every axis."""
    for part in parts:
        assert len({len(part.units[axis.name]) / axis.size for axis in axes}) == 1
    return [len(part.units[axes[0].name]) / axes[0].size for part in parts]


def test_without_keep_one_part_is_whole_and_the_others_draw_a_size_in_every_round():
    method = TwIST(num_parts=3, num_whole=1, num_blocks=4)
    axes = method.find_axes(tiny_decoder("Llama"))
    rounds = [sizes_of(method.deal(axes, generators(3, round_number=number)), axes) for number in range(1, 40)]
    assert {sizes[0] for sizes in rounds} == {1.0}
    assert {sizes[1] for sizes in rounds} == {sizes[2] for sizes in rounds} == {0.25, 0.5, 0.75}
    assert any(sizes[1] != sizes[2] for sizes in rounds)
    assert rounds[5] == sizes_of(method.deal(axes, generators(3, round_number=6)), axes)
    two = TwIST(num_parts=3, num_whole=2, sizes=(0.5,), num_blocks=4)
    assert sizes_of(two.deal(axes, generators(3)), axes) == [1.0, 1.0, 0.5]
    half = TwIST(num_parts=4, sizes=(0.25,), num_blocks=4)
    assert sizes_of(half.deal(axes, generators(4)), axes) == [1.0, 1.0, 0.25, 0.25]


@pytest.mark.parametrize(("num_whole", "sizes"), [(1, {1.0, 0.25, 0.5, 0.75}), (0, {0.25, 0.5, 0.75})])
def test_a_part_that_is_alone_draws_its_own_size(num_whole: int, sizes: set[float]):
    method = TwIST(num_parts=1, num_whole=num_whole, num_blocks=4, choice="random")
    axes = method.find_axes(tiny_decoder("Llama"))
    assert {size for number in range(40) for size in sizes_of(method.deal(axes, generators(1, round_number=number)), axes)} == sizes


def test_nested_parts_hold_the_first_units_and_lie_within_each_other():
    method = TwIST(num_parts=3, keep=(0.25, 0.5, 1.0), num_blocks=4, choice="nested")
    model = tiny_decoder("Llama")
    axes = method.find_axes(model)
    parts = method.deal(axes, generators(3))
    for axis in axes:
        held = [part.units[axis.name] for part in parts]
        assert all(units == tuple(range(len(units))) for units in held)
        assert [len(units) / axis.size for units in held] == [0.25, 0.5, 1.0]
    ticket = method.ticket_part(model, axes, 0.5, np.random.default_rng(8))
    assert ticket.units == parts[1].units


def test_nested_units_are_corrected_only_when_asked():
    part = Part({"model.layers.0.mlp": tuple(range(12))})
    axes = TwIST(num_blocks=4).find_axes(tiny_decoder("Llama"))
    assert TwIST(choice="nested").factors(axes, part) == {}
    assert TwIST(choice="nested", correction="inverse_keep").factors(axes, part) == {"model.layers.0.mlp": 2.0}
    assert TwIST(keep=0.5).factors(axes, part) == {"model.layers.0.mlp": 2.0}


def test_units_are_nested_unless_keep_says_what_every_part_holds():
    assert TwIST().deal(AXES, generators(4))[3].units["0"] in {tuple(range(count)) for count in (4, 8, 12)}
    assert TwIST(keep=0.5).deal(AXES, generators(4))[3].units["0"] != tuple(range(8))
    assert TwIST(choice="random").ticket_part(nn.Identity(), AXES, 0.5, np.random.default_rng(0)).units["0"] != tuple(range(8))
    assert TwIST(keep=0.5, choice="random") != TwIST(keep=0.5)


AXES = [CoupledAxis("0", "neurons", 16, (), ())]


def test_settings_that_come_from_json_are_the_same_settings():
    method = TwIST(num_parts=2, keep=(1.0, 0.5), sizes=(0.5,), pinned=("first", 2))
    again = TwIST(**json.loads(json.dumps(dataclasses.asdict(method))))
    assert again == method
    assert repr(again) == repr(method)


@pytest.mark.parametrize(("pinned", "split"), [(("first",), {1, 2}), (("first", "last"), {1}), ((1,), {0, 2}), (("2", 0), {1})])
def test_pinned_layers_are_whole_in_every_part(pinned: tuple[str | int, ...], split: set[int]):
    model = tiny_decoder("Llama", num_hidden_layers=3)
    axes = TwIST(num_blocks=6, pinned=pinned).find_axes(model)
    assert {axis.name for axis in axes} == {f"model.layers.{layer}.{kind}" for layer in split for kind in ("self_attn", "mlp")}
    small = extract(model, TwIST(num_blocks=6, keep=0.5).deal(axes, generators(1))[0], axes=axes, loadable=False)
    for layer, block in enumerate(small.model.layers):
        assert block.mlp.down_proj.in_features == (12 if layer in split else 24)


def test_pinning_works_for_every_family_that_names_its_layers_otherwise():
    assert {axis.name for axis in TwIST(num_blocks=4, pinned=("last",)).find_axes(tiny_gpt2())} == {"transformer.h.0.mlp"}
    assert len(TwIST(num_blocks=4, pinned=(0,)).find_axes(tiny_vit())) == 2


def test_a_gpt2_keeps_its_heads_and_says_so(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        axes = TwIST().find_axes(tiny_gpt2())
    assert {axis.kind for axis in axes} == {"neurons"}
    assert "The heads of a GPT2LMHeadModel stay whole in every part" in caplog.text


@pytest.mark.parametrize(
    ("hidden", "groups", "keep", "kept"), [(32, 4, 0.75, 2), (32, 4, 0.8, 4), (24, 8, 0.75, 6), (32, 8, 0.4, 4), (32, 8, 0.5, 4)]
)
def test_a_ticket_of_a_llama_has_the_nearest_number_of_heads_that_its_configuration_loads(hidden: int, groups: int, keep: float, kept: int):
    """LlamaConfig wants heads that divide the hidden size: 6 do not divide 32; 2 and 4 are as near to 3, and the smaller is taken."""
    model = tiny_llama(hidden_size=hidden, num_attention_heads=groups, head_dim=4)
    method = TwIST(num_blocks=8)
    part = method.ticket_part(model, method.find_axes(model), keep, np.random.default_rng(0))
    assert {len(units) for name, units in part.units.items() if name.endswith("self_attn")} == {kept}
    assert {len(units) for name, units in part.units.items() if name.endswith("mlp")} == {4 * int(keep * 8 + 0.5)}


def test_a_ticket_of_a_family_without_that_rule_has_the_fraction_it_was_asked_for():
    model = tiny_decoder("Qwen3", num_attention_heads=8, num_key_value_heads=8)
    method = TwIST(num_blocks=8)
    part = method.ticket_part(model, method.find_axes(model), 0.75, np.random.default_rng(0))
    assert {len(units) for name, units in part.units.items() if name.endswith("self_attn")} == {6}


def test_a_fraction_that_leaves_no_heads_is_refused_for_tickets_too():
    model = tiny_llama(num_attention_heads=4, head_dim=4)
    method = TwIST(num_blocks=16)
    with pytest.raises(InputError, match=r"keep=0\.1, which leaves model\.layers\.0\.self_attn with none of its 4 heads\. Pass keep=0\.125 or more"):
        method.ticket_part(model, method.find_axes(model), 0.1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"keep": 0.0}, r"got keep=0\.0, expected a fraction above 0 and at most 1"),
        ({"keep": 1.5}, r"got keep=1\.5, expected a fraction above 0"),
        ({"keep": (0.5, -1.0), "num_parts": 2}, r"got keep=-1\.0"),
        ({"keep": (0.5, 0.5), "num_parts": 3}, "got 2 keep fractions for 3 parts, expected one each. Pass 3, or one for all"),
        ({"sizes": (0.5, 2.0)}, r"got keep=2\.0, expected a fraction above 0"),
        ({"sizes": ()}, r"got sizes=\(\), expected parts that draw from at least one size"),
        ({"num_parts": 2, "num_whole": 2}, "got num_whole=2 for 2 parts, expected parts that draw from at least one size. Lower num_whole"),
        ({"keep": 0.5, "choice": "nested"}, "choice='nested' where no part keeps more than 0.5, .* the last units would never be trained"),
        ({"num_whole": 0, "choice": "nested"}, "choice='nested' where no part keeps more than 0.75"),
        ({"num_whole": -1}, "num_whole=-1 must be an integer of at least 0"),
        ({"choice": "first"}, "choice='first' is not known. Choose one of: random, nested"),
        ({"num_blocks": 0}, "num_blocks=0 must be an integer of at least 1"),
        ({"correction": "inverse"}, "correction='inverse' is not known. Choose one of: inverse_keep, inverse_sqrt_keep, none"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_at_once(settings: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text):
        TwIST(**settings)


def tied_across_layers() -> nn.Module:
    model = tiny_decoder("Llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def quantised() -> nn.Module:
    model = tiny_decoder("Llama")

    class Linear4bit(nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj = Linear4bit(32, 24)
    return model


def mixture() -> nn.Module:
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 8,
        "num_local_experts": 2,
    }
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=8, **sizes))


def fused_qkv() -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8, "pad_token_id": 0}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(vocab_size=8, bos_token_id=1, eos_token_id=2, **sizes))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: tiny_mlp(6, 48, 4), "got a Sequential, expected a transformer.* Use IST for perceptrons"),
        (tiny_resnet, "got a ResNet, expected a transformer"),
        (lambda: torch.compile(tiny_decoder("Llama"), backend="eager"), r"got a OptimizedModule.* Pass the model inside, model\._orig_mod"),
        (quantised, r"model\.layers\.0\.mlp\.up_proj is a .*Linear4bit, expected a plain Linear. Dequantise the model"),
        (tied_across_layers, r"layers\.0\.mlp\.up_proj\.weight and model\.layers\.1\.mlp\.up_proj\.weight are one tensor.* Untie them"),
        (mixture, "got a MixtralForCausalLM of type 'mixtral', expected one of: llama, mistral, qwen2, qwen3"),
        (fused_qkv, "got a Phi3ForCausalLM of type 'phi3', expected one of: llama"),
        (tiny_bert, "got a BertForSequenceClassification of type 'bert', expected one of"),
    ],
)
def test_models_that_it_cannot_split_are_refused_with_what_to_do(build: Any, text: str):
    with pytest.raises(InputError, match=text):
        TwIST(num_blocks=4).find_axes(build())


def test_fractions_that_leave_a_layer_empty_are_refused_before_anything_is_trained():
    with pytest.raises(InputError, match=r"keep=0\.1, which leaves model\.layers\.0\.self_attn with none of its 4 heads\. Pass keep=0\.125 or more"):
        SubnetTrainer(tiny_decoder("Llama"), TwIST(keep=0.1, num_blocks=6))


def test_blocks_that_do_not_divide_the_neurons_name_the_nearest_number_that_does():
    with pytest.raises(InputError, match=r"got num_blocks=16 for the 24 neurons of model\.layers\.0\.mlp, .* The nearest is 12\."):
        TwIST().find_axes(tiny_decoder("Llama"))


def test_pinned_layers_that_are_not_there_or_leave_nothing_are_refused():
    with pytest.raises(InputError, match="got 5 in pinned, expected 'first', 'last' or layers from 0 to 1"):
        TwIST(num_blocks=6, pinned=(5,)).find_axes(tiny_decoder("Llama"))
    with pytest.raises(PartwiseError, match="got all 2 layers in pinned, expected at least one to split"):
        TwIST(num_blocks=6, pinned=("first", "last")).find_axes(tiny_decoder("Llama"))


def source_text() -> Tensor:
    """Characters of some modules of the standard library, as numbers."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "dataclasses", "inspect", "pathlib", "typing", "textwrap", "shutil")
    text = "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in names)
    return torch.tensor([min(ord(character), 127) for character in text])


@pytest.mark.slow
def test_random_half_tickets_are_nearly_as_good_as_the_whole_model_and_those_of_an_ordinary_model_are_not():
    """The tiny end-to-end run of the design: characters of Python source, one part, a new subnetwork every ten steps."""
    text, context = source_text(), 48
    rows = text[: len(text) // context * context].view(-1, context)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    train, held_out = rows[order[200:]], rows[order[:200]]
    loader = DataLoader([{"input_ids": row, "labels": row} for row in train], batch_size=16, shuffle=True)
    valid = [{"input_ids": held_out, "labels": held_out}]
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 256}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    optimizer = OptimizerSettings(lr=3e-3)
    losses: dict[float, tuple[float, float]] = {}
    for keep in (0.5, 1.0):
        method = TwIST(num_parts=1, keep=keep, num_local_steps=10)
        trainer = SubnetTrainer(model, method, optimizer=optimizer, probe_every=0).fit(loader, num_rounds=30)
        tickets = [mean_loss(trainer.ticket(0.5, seed=seed).model, valid, loss=task_loss) for seed in range(10)]
        losses[keep] = mean_loss(trainer.model, valid, loss=task_loss), sum(tickets) / 10
    (whole, ticket), (_, ordinary) = losses[0.5], losses[1.0]
    assert ticket <= 1.05 * whole  # 1.03 at the 900 steps of the design
    assert ticket <= ordinary - 0.2


def test_one_size_or_pinned_layer_needs_no_tuple():
    assert (TwIST(sizes=0.5).sizes, TwIST(pinned="first").pinned) == ((0.5,), ("first",))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_rounds", [1, 2, 3, 10])
def test_the_last_round_is_never_one_of_whole_models(num_rounds: int):
    assert not TwIST(whole_share=0.9).is_whole_round(num_rounds, num_rounds)
