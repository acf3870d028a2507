"""Claims about GHOST: its scores are what its paper defines, the identity behind them holds, and what it cuts is gone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import partwise
from model_families import IDS
from partwise.checks import InputError
from partwise.models import CoupledAxis, Part, coupled_axes, extract, mask
from partwise.models.cache_sizes import cache_sizes
from partwise.prune import GHOST, UnitPlan, apply, save
from partwise.prune.ghost import Scan
from tiny import tiny_decoder, tiny_mamba2
from tolerances import assert_close

LAYER = "backbone.layers.{}.mixer.state"
GROUPS = pytest.mark.parametrize("groups", [1, 2])
ROWS = torch.randint(3, 24, (3, 11), generator=torch.Generator().manual_seed(3))  # no multiple of the chunk size 4
RAGGED = [(11, 0), (7, 1), (2, 2)]  # (tokens, row)


def ragged(*, left: bool = False) -> dict[str, Tensor]:
    ids, seen = torch.full((3, 11), 2), torch.zeros(3, 11, dtype=torch.int64)
    for length, row in RAGGED:
        place = slice(11 - length, 11) if left else slice(0, length)
        ids[row, place], seen[row, place] = ROWS[row, :length], 1
    return {"input_ids": ids, "attention_mask": seen}


def axes_of(model: Any) -> list[CoupledAxis]:
    return list(coupled_axes(model))


@torch.no_grad()
def seen_by(model: Any, layer: int, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What ``in_proj`` of a layer gives, and what the library's scan gives, (batch, tokens, heads * entries), direct path included."""
    mixer, found = model.backbone.layers[layer].mixer, []
    handles = [
        mixer.in_proj.register_forward_hook(lambda module, arguments, output: found.append(output)),
        mixer.norm.register_forward_pre_hook(lambda module, arguments: found.append(arguments[0])),
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found[0], found[1]


@torch.no_grad()
def direct_path(model: Any, layer: int, projected: Tensor, real: Tensor | None = None) -> Tensor:
    """``D x``, which passes the states by, (batch, tokens, heads * entries)."""
    mixer = model.backbone.layers[layer].mixer
    width = mixer.intermediate_size
    x = projected[..., width : 2 * width].transpose(1, 2)
    weight, bias = mixer.conv1d.weight[:width], None if mixer.conv1d.bias is None else mixer.conv1d.bias[:width]
    x = torch.nn.functional.silu(torch.nn.functional.conv1d(x, weight, bias, padding=weight.shape[-1] - 1, groups=width)[..., : projected.shape[1]])
    x = x.transpose(1, 2) if real is None else x.transpose(1, 2) * real[..., None]
    return x * mixer.D.repeat_interleave(mixer.head_dim)


def scores_by_hand(model: Any, layer: int, ids: Tensor, lengths: list[int]) -> dict[str, list[float]]:
    """The definition, one number at a time, in Python's floats; rows as long as they are, padding never seen."""
    mixer = model.backbone.layers[layer].mixer
    groups, states, heads, entries, width = mixer.n_groups, mixer.ssm_state_size, mixer.num_heads, mixer.head_dim, mixer.intermediate_size
    kernel = mixer.conv1d.weight.shape[-1]
    sums = {name: [0.0] * (groups * states) for name in ("both", "controllability", "observability")}

    def activated(channel: int, token: int, values: list[list[float]]) -> float:
        total = float(mixer.conv1d.bias[channel]) if mixer.conv1d.bias is not None else 0.0
        for tap in range(kernel):
            if token - kernel + 1 + tap >= 0:
                total += float(mixer.conv1d.weight[channel, 0, tap]) * values[token - kernel + 1 + tap][width + channel]
        return total / (1 + math.exp(-total))

    for row, length in zip(ids, lengths, strict=True):
        projected, _ = seen_by(model, layer, {"input_ids": row[None, :length]})
        values = projected[0].tolist()
        held = [[[0.0] * entries for _ in range(states)] for _ in range(heads)]
        for token in range(length):
            for head in range(heads):
                group = head // (heads // groups)
                step = math.log1p(math.exp(values[token][-heads + head] + float(mixer.dt_bias[head])))
                step = min(max(step, mixer.time_step_limit[0]), mixer.time_step_limit[1])
                decay = math.exp(-step * math.exp(float(mixer.A_log[head])))
                x = [activated(head * entries + entry, token, values) for entry in range(entries)]
                for state in range(states):
                    write = activated(width + group * states + state, token, values)
                    read = activated(width + groups * states + group * states + state, token, values)
                    held[head][state] = [decay * old + step * new * write for old, new in zip(held[head][state], x, strict=True)]
                    energy = sum(value * value for value in held[head][state])
                    sums["both"][group * states + state] += energy * read * read
                    sums["controllability"][group * states + state] += energy
                    sums["observability"][group * states + state] += read * read / (heads // groups)  # once for each group, not for each head
    means = {name: [value / sum(lengths) for value in total] for name, total in sums.items()}
    means["product_of_means"] = [one * other for one, other in zip(means["controllability"], means["observability"], strict=True)]
    return {name: [math.sqrt(value) for value in total] for name, total in means.items()}


@pytest.mark.parametrize("factor", ["both", "controllability", "observability", "product_of_means"])
@GROUPS
def test_scores_are_those_of_the_definition_computed_one_number_at_a_time(groups: int, factor: str):
    model, lengths = tiny_mamba2(n_groups=groups, state_size=4).requires_grad_(False), [5, 3]
    data = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    plan = GHOST(keep=0.5, factor=factor, recalibrate=False).plan(model, data)
    assert plan.num_tokens == 8
    for layer in range(2):
        expected = torch.tensor(scores_by_hand(model, layer, IDS, lengths)[factor], dtype=torch.float64)
        assert_close(plan.scores[LAYER.format(layer)], expected, claim=f"{factor} of layer {layer}, which is float32", rtol=2e-6, atol=0)


@pytest.mark.parametrize("inputs", [{"input_ids": ROWS}, ragged(), ragged(left=True)], ids=["whole rows", "padded behind", "padded in front"])
@GROUPS
def test_the_recurrence_is_the_library_s_chunked_scan(groups: int, inputs: dict[str, Tensor]):
    model = tiny_mamba2(n_groups=groups)
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    for layer in range(2):
        projected, scanned = seen_by(model, layer, inputs)
        with torch.no_grad():
            own = Scan.of(model.backbone.layers[layer].mixer, projected, real).outputs().flatten(2)
        assert_close(own + direct_path(model, layer, projected, real), scanned, claim=f"layer {layer}", rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.5, 0.8)])
def test_the_limits_of_the_time_step_are_kept(limit: tuple[float, float]):
    model = tiny_mamba2(time_step_limit=limit)
    projected, scanned = seen_by(model, 0, {"input_ids": ROWS})
    with torch.no_grad():
        own = Scan.of(model.backbone.layers[0].mixer, projected, None).outputs().flatten(2)
    assert_close(own + direct_path(model, 0, projected), scanned, claim=str(limit), rtol=1e-5, atol=1e-6)


@GROUPS
def test_the_squared_score_is_the_mean_squared_change_of_the_scan_when_that_state_alone_goes(groups: int):
    model = tiny_mamba2(n_groups=groups)
    scores = GHOST(keep=0.5, recalibrate=False).plan(model, ragged()).scores
    real = ragged()["attention_mask"].bool()
    for layer, axis in enumerate(axes_of(model)):
        _, whole = seen_by(model, layer, ragged())
        for unit in range(axis.size):
            rest = tuple(other for other in range(axis.size) if other != unit)
            _, without = seen_by(mask(model, Part({axis.name: rest})), layer, ragged())
            changes = (whole - without)[real].double().square().sum(-1)  # (tokens,)
            assert_close(changes.mean(), scores[axis.name][unit].square(), claim=f"{axis.name}, state {unit}, in float32", rtol=1e-4, atol=1e-10)


@GROUPS
def test_leaving_a_state_out_of_the_recurrence_is_the_same_identity(groups: int):
    model = tiny_mamba2(n_groups=groups)
    projected, _ = seen_by(model, 1, {"input_ids": ROWS})
    with torch.no_grad():
        scan = Scan.of(model.backbone.layers[1].mixer, projected, None)
        energies = sum((states * reads).sum(0).double() for states, reads, _ in scan.energies()) / ROWS.numel()  # (groups, states)
        for group, state in itertools.product(range(groups), range(8)):
            change = (scan.outputs() - scan.outputs(without=(group, state))).double().square().sum((2, 3, 4)).mean()
            assert_close(change, energies[group, state], claim=f"group {group}, state {state}, in float32", rtol=1e-5, atol=0)


@GROUPS
def test_layers_of_different_size_are_what_zeroed_ones_compute_and_generate(groups: int):
    model = tiny_mamba2(n_groups=groups)
    plan = GHOST(keep=0.5, scope="model").plan(model, ROWS)
    if len(set(map(len, plan.units.values()))) == 1:  # by chance; make them differ
        plan = GHOST(keep=0.5, scope="model", protect=(f"{LAYER.format(0)}:0-5",)).plan(model, ROWS)
    assert len(set(map(len, plan.units.values()))) == 2
    small, masked = apply(model, plan), apply(model, plan, as_mask=True)
    assert_close(small(ROWS).logits, masked(ROWS).logits, claim="logits", rtol=0, atol=1e-6)
    words = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(small.generate(ROWS, **words), masked.generate(ROWS, **words))
    assert torch.equal(small.generate(ROWS, num_beams=3, **words), masked.generate(ROWS, num_beams=3, **words))
    sizes = [cache_sizes(small)[layer].recurrent for layer in range(2)]
    assert sizes == [4 * 4 * 8 * len(plan.units[LAYER.format(layer)]) // groups for layer in range(2)], "4 heads of 8 entries in float32"


def test_half_of_the_states_are_half_of_the_recurrent_state_and_nearly_all_of_the_weights():
    model = tiny_mamba2(hidden_size=64, num_heads=16, head_dim=8, state_size=16)
    small = apply(model, GHOST(keep=0.5).plan(model, ROWS))
    assert [2 * size.recurrent for size in cache_sizes(small)] == [size.recurrent for size in cache_sizes(model)]
    assert small.num_parameters() > 0.9 * model.num_parameters()


@pytest.mark.parametrize("use_conv_bias", [True, False])
def test_zero_rows_of_the_projection_remove_a_state_only_where_the_convolution_has_no_bias(use_conv_bias: bool):
    model = tiny_mamba2(use_bias=False, use_conv_bias=use_conv_bias, n_groups=1)
    zeroed = tiny_mamba2(use_bias=False, use_conv_bias=use_conv_bias, n_groups=1)
    with torch.no_grad():
        zeroed.backbone.layers[0].mixer.in_proj.weight[2 * 32 + 8 + 3] = 0  # row of C, state 3
    removed = mask(model, Part({LAYER.format(0): tuple(unit for unit in range(8) if unit != 3)}))
    difference = (zeroed(ROWS).logits - removed(ROWS).logits).abs().max().item()
    score = float(GHOST(recalibrate=False).plan(zeroed, ROWS).scores[LAYER.format(0)][3])
    if use_conv_bias:
        assert difference > 1e-3
        assert score > 0, "the score knows of silu(bias)"
    else:
        assert difference < 1e-6
        assert score == 0


def constant_model(seed: int = 0) -> Any:
    """One head; B, C and the time step do not depend on the input, the time step not even on the token."""
    model = tiny_mamba2(num_heads=1, head_dim=32, seed=seed)
    for layer in model.backbone.layers:
        mixer = layer.mixer
        with torch.no_grad():
            mixer.in_proj.weight[64:] = 0  # B, C and the time step
            mixer.in_proj.bias[64:] = 0
            mixer.conv1d.weight[32:] = 0
            mixer.conv1d.bias[32:] = torch.randn(16, generator=torch.Generator().manual_seed(seed))
    return model


@given(st.integers(0, 100))
@settings(max_examples=5)
def test_where_nothing_depends_on_the_input_the_score_is_the_product_of_the_two_maps(seed: int):
    model = constant_model(seed)
    plan = GHOST(keep=0.5, recalibrate=False).plan(model, ROWS)
    for layer in range(2):
        writes, reads = torch.nn.functional.silu(model.backbone.layers[layer].mixer.conv1d.bias.detach()[32:].double()).view(2, 8)
        ratio = plan.scores[LAYER.format(layer)] / (writes * reads).abs()
        assert_close(ratio, ratio.mean().expand(8), claim="one factor for all states, in float32", rtol=1e-5, atol=0)
        best = sorted((writes * reads).abs().argsort(descending=True)[:4].tolist())
        assert list(plan.units[LAYER.format(layer)]) == best


def test_a_dead_state_is_worth_nothing_goes_first_and_is_not_missed():
    model = tiny_mamba2()
    mixer = model.backbone.layers[1].mixer
    with torch.no_grad():
        for state in (2, 5):
            mixer.in_proj.weight[64 + state] = 0
            mixer.in_proj.bias[64 + state] = 0
            mixer.conv1d.weight[32 + state] = 0
            mixer.conv1d.bias[32 + state] = 0
    plan = GHOST(keep=0.75, protect=(LAYER.format(0),)).plan(model, ROWS)
    assert plan.scores[LAYER.format(1)][[2, 5]].tolist() == [0.0, 0.0]
    assert plan.units == {LAYER.format(1): (0, 1, 3, 4, 6, 7)}
    assert_close(apply(model, plan)(ROWS).logits, model(ROWS).logits, claim="nothing is missed", rtol=0, atol=1e-6)


@given(st.floats(0.01, 100), st.integers(0, 7))
@settings(max_examples=10)
def test_what_is_multiplied_when_written_and_divided_when_read_keeps_its_score(factor: float, state: int):
    model = tiny_mamba2()
    projected, _ = seen_by(model, 0, {"input_ids": ROWS})
    with torch.no_grad():
        scan = Scan.of(model.backbone.layers[0].mixer, projected, None)
        scale = torch.ones(8)
        scale[state] = factor
        other = dataclasses.replace(scan, writes=scan.writes * scale, reads=scan.reads / scale)
        for (states, reads, _), (other_states, other_reads, _) in zip(scan.energies(), other.energies(), strict=True):
            assert_close(other_states * other_reads, states * reads, claim="energy times read", rtol=1e-5, atol=0)


def test_rows_with_padding_score_as_rows_without():
    for groups, left, bias in ((1, False, True), (2, False, True), (1, True, False)):
        # In front of the text only without biases of the projection: the model itself lets them leak from padding into the convolution.
        model = tiny_mamba2(n_groups=groups, use_bias=bias)
        padded = GHOST(keep=0.5).plan(model, ragged(left=left))
        plain = GHOST(keep=0.5).plan(model, [ROWS[row : row + 1, :length] for length, row in RAGGED])
        assert padded.num_tokens == plain.num_tokens == 20
        assert padded.units == plain.units
        for name, scores in plain.scores.items():
            assert_close(padded.scores[name], scores, claim="of float32 models", rtol=1e-5, atol=0)


def test_later_layers_are_scored_on_what_pruned_layers_pass_on():
    model = tiny_mamba2(num_hidden_layers=3)
    plan = GHOST(keep=0.25).plan(model, ROWS)
    units: dict[str, tuple[int, ...]] = {}
    for layer in range(3):
        name = LAYER.format(layer)
        by_hand = GHOST(keep=0.25, recalibrate=False).plan(mask(model, Part(units)), ROWS)
        assert torch.equal(plan.scores[name], by_hand.scores[name])
        units[name] = plan.units[name]
    dense = GHOST(keep=0.25, recalibrate=False).plan(model, ROWS)
    assert torch.equal(plan.scores[LAYER.format(0)], dense.scores[LAYER.format(0)])
    assert not torch.allclose(plan.scores[LAYER.format(2)], dense.scores[LAYER.format(2)])


def test_every_group_keeps_its_own_best_states_and_all_keep_equally_many():
    model = tiny_mamba2(n_groups=2)
    plan = GHOST(keep=0.25).plan(model, ROWS)
    for name, scores in plan.scores.items():
        first, second = scores.view(2, 8)
        best = [*sorted(first.topk(2).indices.tolist()), *sorted(8 + unit for unit in second.topk(2).indices.tolist())]
        assert list(plan.units[name]) == best


def test_over_the_whole_model_layers_are_compared_by_their_energy():
    method, scores = GHOST(scope="model"), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert_close(method.shares(scores), torch.tensor([3.0, 12.0, 27.0], dtype=torch.float64) / 14, claim="squares beside their mean")
    louder = torch.tensor([7.0, 14.0, 21.0], dtype=torch.float64)
    assert_close(method.shares(louder), method.shares(scores), claim="a loud layer is not worth more for being loud")


class LargestResult(TorchDispatchMode):
    """Notes how many numbers the largest result of any operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, result.numel() if isinstance(result, Tensor) else 0)
        return result


def test_states_of_one_token_only_are_held_however_long_the_text():
    model = tiny_mamba2(state_size=64)
    largest = []
    for length in (8, 64):
        projected, _ = seen_by(model, 0, {"input_ids": torch.randint(3, 24, (1, length))})
        with torch.no_grad():
            scan = Scan.of(model.backbone.layers[0].mixer, projected, None)
            with LargestResult() as noted:
                for _ in scan.energies():
                    pass
        largest.append(noted.numbers)
    assert largest == [32 * 64, 32 * 64], "heads, entries, states"


def test_sums_are_kept_in_float64_so_that_small_tokens_behind_a_large_one_count(monkeypatch: pytest.MonkeyPatch):
    def energies(self: Scan) -> Any:
        for energy in (2.0**30, *[1.0] * 10):
            yield torch.full((1, 1, 8), energy), torch.ones(1, 1, 8), 1.0

    monkeypatch.setattr(Scan, "energies", energies)
    scores = GHOST(keep=0.5).plan(tiny_mamba2(), ROWS[:1]).scores[LAYER.format(0)]
    assert_close(scores.square() * 11, torch.full((8,), 2.0**30 + 10, dtype=torch.float64), claim="no token was lost")


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_saved_and_loaded_the_small_model_gives_the_same_bits(scope: str, tmp_path: Path):
    model = tiny_mamba2()
    plan = GHOST(keep=0.5, scope=scope, protect=(f"{LAYER.format(0)}:0-5",) if scope == "model" else ()).plan(model, ROWS)
    small = apply(model, plan)
    save(small, tmp_path / "small", plan=plan)
    loaded = partwise.load(tmp_path / "small")
    assert torch.equal(loaded(ROWS).logits, small(ROWS).logits)
    assert torch.equal(loaded.generate(ROWS, max_new_tokens=5, do_sample=False), small.generate(ROWS, max_new_tokens=5, do_sample=False))
    if scope == "layer":
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
        assert stock.config.state_size == 4
        assert torch.equal(stock(ROWS).logits, small(ROWS).logits)


def test_keeping_everything_changes_no_bit_and_keeping_next_to_nothing_leaves_one_state_a_group():
    model = tiny_mamba2(n_groups=2)
    assert torch.equal(apply(model, GHOST(keep=1.0).plan(model, ROWS))(ROWS).logits, model(ROWS).logits)
    small = apply(model, GHOST(keep=1e-6).plan(model, ROWS))
    assert small.config.state_size == 1
    assert small.generate(ROWS, max_new_tokens=3, do_sample=False).shape == (3, 14)


def test_a_model_without_its_language_head_and_one_in_training_mode_score_the_same():
    model = tiny_mamba2()
    plan = GHOST(keep=0.5).plan(model, ROWS)
    base = GHOST(keep=0.5).plan(model.backbone, ROWS)
    assert {name.removeprefix("backbone."): units for name, units in plan.units.items()} == base.units
    training = GHOST(keep=0.5).plan(model.train(), ROWS)
    assert all(torch.equal(scores, training.scores[name]) for name, scores in plan.scores.items())


def test_another_activation_of_the_convolution_is_used_in_scores_too():
    model = tiny_mamba2(hidden_act="gelu")
    projected, scanned = seen_by(model, 0, {"input_ids": ROWS})
    scores = GHOST(recalibrate=False).plan(model, ROWS).scores[LAYER.format(0)]
    _, without = seen_by(mask(model, Part({LAYER.format(0): tuple(range(1, 8))})), 0, {"input_ids": ROWS})
    assert projected.shape[:2] == ROWS.shape
    assert_close((scanned - without).double().square().sum(-1).mean(), scores[0].square(), claim="the identity, in float32", rtol=1e-4, atol=0)


def test_models_without_states_are_refused():
    with pytest.raises(InputError, match=r"GHOST prunes states, and LlamaForCausalLM has heads, neurons only\. Choose a method that is for those") as caught:
        GHOST().plan(tiny_decoder("Llama"), IDS)
    assert caught.value.code == "kinds-absent"
    sizes = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    mamba1 = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    with pytest.raises(InputError, match=r"got a MambaForCausalLM of type 'mamba', expected one of: .*mamba2"):
        GHOST().plan(mamba1, IDS)
    with pytest.raises(InputError, match=r"GHOST prunes the states of Mamba2, got kinds=neurons\. Leave kinds out, or choose another method\."):
        GHOST(kinds=("states", "neurons"))
    with pytest.raises(InputError, match=r"factor='loudness' is not known\. Choose one of: both, controllability, observability, product_of_means\."):
        GHOST(factor="loudness")


def test_what_a_plan_says_about_itself():
    plan = GHOST(keep=0.5).plan(tiny_mamba2(), ROWS)
    assert isinstance(plan, UnitPlan)
    assert plan.method.startswith("GHOST(keep=0.5,")
    assert plan.num_tokens == ROWS.numel()
    assert [len(scores) for scores in plan.scores.values()] == [8, 8]
    small = extract(tiny_mamba2(), Part(plan.units))
    assert_close(apply(tiny_mamba2(), plan)(ROWS).logits, small(ROWS).logits, claim="a plan is a part", rtol=0, atol=0)
