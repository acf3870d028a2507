"""Claims about the baselines: magnitude, chance, the first-order change of the loss, and Wanda's score; each beside the loop that a student would write."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from model_families import FAMILIES, IDS, images, rows
from partwise.checks import InputError
from partwise.models import Part, coupled_axes, mask
from partwise.prune import Magnitude, Random, Taylor, WandaStructured, apply
from tiny import tiny_decoder, tiny_mamba2, tiny_mlp, tiny_resnet, tiny_vit
from tolerances import assert_close

ROWS, LABELS = rows(6), torch.tensor([0, 3, 1, 1])


def inputs_of(model: nn.Module, name: str, *calls: Any) -> list[Tensor]:
    """What a module gets in ordinary calls of the model."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, arguments, output: found.append(arguments[0].detach().double()))
    with torch.no_grad():
        for call in calls:
            _ = model(**call) if isinstance(call, dict) else model(call)
    handle.remove()
    return found


# Magnitude


def test_magnitude_is_the_norm_of_everything_that_goes_with_a_neuron():
    model = tiny_mlp(6, 8, 12, 4, norm=True)
    scores = Magnitude().plan(model).scores
    for unit in range(8):
        pieces = [model[0].weight[unit], *(tensor[unit : unit + 1] for tensor in (model[0].bias, model[1].weight, model[1].bias)), model[3].weight[:, unit]]
        assert_close(torch.cat(pieces).double().norm().detach(), scores["0"][unit], claim=f"neuron {unit}: running statistics are no weights")


def test_magnitude_of_a_filter_counts_kernels_that_make_it_and_that_read_it():
    model = tiny_resnet()
    scores = Magnitude().plan(model).scores["layer1.0.conv1"]
    block = model.layer1[0]
    for unit in range(4):
        pieces = [block.conv1.weight[unit].flatten(), block.bn1.weight[unit : unit + 1], block.bn1.bias[unit : unit + 1], block.conv2.weight[:, unit].flatten()]
        assert_close(torch.cat(pieces).double().norm().detach(), scores[unit], claim=f"filter {unit}")


def test_magnitude_of_a_head_counts_its_queries_keys_values_and_what_reads_them():
    model = tiny_decoder("Llama")
    scores = Magnitude(kinds=("heads",)).plan(model).scores["model.layers.1.self_attn"]
    attention = model.model.layers[1].self_attn
    for unit in range(4):  # 2 query heads of 4 entries for each key-value head
        queries, keys = slice(8 * unit, 8 * unit + 8), slice(4 * unit, 4 * unit + 4)
        pieces = [attention.q_proj.weight[queries], attention.k_proj.weight[keys], attention.v_proj.weight[keys], attention.o_proj.weight[:, queries]]
        norm = torch.cat([piece.flatten() for piece in pieces]).double().norm().detach()
        assert_close(norm, scores[unit], claim=f"head {unit}")


@pytest.mark.parametrize("groups", [1, 2])
def test_magnitude_of_a_state_is_the_product_of_the_norms_of_what_writes_and_what_reads_it(groups: int):
    model = tiny_mamba2(n_groups=groups)
    scores = Magnitude().plan(model).scores["backbone.layers.0.mixer.state"]
    mixer, size = model.backbone.layers[0].mixer, 8 * groups
    for unit in range(size):
        norms = []
        for row, channel in ((64 + unit, 32 + unit), (64 + size + unit, 32 + size + unit)):
            biases = mixer.in_proj.bias[row : row + 1], mixer.conv1d.bias[channel : channel + 1]
            pieces = [mixer.in_proj.weight[row], mixer.conv1d.weight[channel].flatten(), *biases]
            norms.append(torch.cat(pieces).double().norm().detach())
        assert_close(norms[0] * norms[1], scores[unit], claim=f"state {unit}")


def test_magnitude_reads_no_data():
    model = tiny_mlp(6, 8, 4)
    assert Magnitude().plan(model, [torch.full((2, 6), float("nan"))]).units == Magnitude().plan(model).units
    assert Magnitude().plan(model, ROWS).num_tokens == 0


# Chance


def test_every_seed_draws_others_and_every_layer_is_drawn_apart():
    model = tiny_mlp(6, 20, 20, 4)
    plans = [Random(seed=seed).plan(model) for seed in range(5)]
    assert len({plan.units["0"] for plan in plans}) == 5
    assert all(plan.units["0"] != plan.units["2"] for plan in plans)
    assert plans[0].units == Random(seed=0).plan(tiny_mlp(6, 20, 20, 4, seed=7)).units, "weights do not matter"


def test_chance_is_fair():
    model = tiny_mlp(6, 8, 4)
    counts = Counter(unit for seed in range(400) for unit in Random(keep=0.25, seed=seed).plan(model).units["0"])
    assert sum(counts.values()) == 800
    assert all(70 <= counts[unit] <= 130 for unit in range(8)), "100 each; the standard deviation is 9"


def test_a_draw_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Random().plan(tiny_mlp(6, 8, 4))
    assert torch.equal(torch.rand(2), expected)


# Taylor


def switched_down(model: nn.Module, axis: Any, unit: int, by: float) -> nn.Module:
    """A copy in which the entries that switch a unit off are multiplied by ``1 - by``."""
    other = copy.deepcopy(model)
    tensors = dict(other.named_parameters())
    with torch.no_grad():
        for member in axis.members:
            if member.tensor in (axis.closers or axis.readers):
                entries = member.entries_of([unit])
                tensor = tensors[member.tensor]
                tensor.index_copy_(member.dim, entries, tensor.index_select(member.dim, entries) * (1 - by))
    return other


def loss_of_rows(model: nn.Module) -> float:
    return cross_entropy(model(ROWS.double()), LABELS).item()


def loss_of_images(model: nn.Module) -> float:
    outputs = model(images(8 if hasattr(model, "vit") else 16).double())
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    return cross_entropy(logits, torch.tensor([0, 1, 1])).item()


def loss_of_text(model: Any) -> float:
    logits = model(input_ids=IDS).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()


DIFFERENTIABLE: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[Any], float], tuple[str, ...]]] = {
    "mlp": (lambda: tiny_mlp(6, 8, 12, 4, norm=True), [(ROWS.double(), LABELS)], loss_of_rows, ()),
    "resnet": (lambda: tiny_resnet(depths=(1, 1, 2, 1)), [(images(16).double(), torch.tensor([0, 1, 1]))], loss_of_images, ()),
    "vit": (tiny_vit, [(images(8).double(), torch.tensor([0, 1, 1]))], loss_of_images, ()),
    "gpt2": (FAMILIES["gpt2"][0], [IDS], loss_of_text, ()),
    "llama": (FAMILIES["llama-tied-with-biases"][0], [IDS], loss_of_text, ()),
    "llama heads": (lambda: tiny_decoder("Llama"), [IDS], loss_of_text, ("heads",)),
    "mamba2": (lambda: tiny_mamba2(n_groups=2), [IDS], loss_of_text, ()),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_taylor_is_the_squared_derivative_of_the_loss_when_a_unit_is_switched_down(name: str):
    build, data, loss, kinds = DIFFERENTIABLE[name]
    model = build().double()
    plan = Taylor(kinds=kinds).plan(model, data)
    # Norms of transformers, and all of Mamba2, compute in float32, so that differences have to be larger there.
    step, tolerance = {"mlp": (1e-5, 1e-5), "resnet": (1e-5, 1e-5), "mamba2": (0.1, 0.03)}.get(name, (1e-2, 2e-2))
    for axis in [axis for axis in coupled_axes(model) if axis.name in plan.units][:2]:
        scale = plan.scores[axis.name].sqrt().max()
        for unit in range(0, axis.size, max(1, axis.size // 6)):
            slope = (loss(switched_down(model, axis, unit, step)) - loss(switched_down(model, axis, unit, -step))) / (2 * step)
            found = plan.scores[axis.name][unit].sqrt() / scale
            assert_close(found, abs(slope) / scale, claim=f"{axis.name}, unit {unit}: a central difference", rtol=0, atol=tolerance)


def test_of_small_units_the_root_of_the_score_is_the_change_of_the_loss_when_they_go():
    model = tiny_mlp(6, 8, 4).double()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    plan = Taylor().plan(model, [(ROWS.double(), LABELS)])
    before = cross_entropy(model(ROWS.double()), LABELS)
    for unit in range(8):
        kept = Part({"0": tuple(other for other in range(8) if other != unit)})
        change = cross_entropy(mask(model, kept)(ROWS.double()), LABELS) - before
        assert_close(change.abs().detach(), plan.scores["0"][unit].sqrt(), claim=f"neuron {unit}, to first order", rtol=1e-2, atol=1e-9)


def test_taylor_averages_over_batches():
    model = tiny_mlp(6, 8, 4)
    first, second = (ROWS[:1], LABELS[:1]), (ROWS[1:], LABELS[1:])
    one, other, both = (Taylor().plan(model, data).scores["0"] for data in ([first], [second], [first, second]))
    assert_close(both, (one + other) / 2, claim="mean of the squares")


def test_language_models_predict_the_next_token_and_labels_that_come_with_the_batch_are_used():
    model = tiny_decoder("Llama")
    plain = Taylor().plan(model, [IDS]).scores
    named = Taylor().plan(model, [{"input_ids": IDS, "labels": IDS}]).scores
    ignored = IDS.masked_fill(torch.arange(5) > 2, -100)
    short = Taylor().plan(model, [{"input_ids": IDS, "labels": ignored}]).scores
    cut = Taylor().plan(model, [IDS[:, :3]]).scores
    for name, scores in plain.items():
        assert torch.equal(scores, named[name])
        assert_close(short[name], cut[name], claim="tokens that are ignored do not count, in float32", rtol=1e-4, atol=1e-12)


def test_taylor_leaves_no_gradients_and_needs_none_to_be_wanted():
    model = tiny_decoder("Llama")
    expected = Taylor().plan(model, [IDS]).units
    frozen = tiny_decoder("Llama").requires_grad_(False)
    assert Taylor().plan(frozen, [IDS]).units == expected
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_taylor_is_one_shot():
    model = tiny_decoder("Llama")
    first, second = Taylor(recalibrate=True).plan(model, [IDS]), Taylor(recalibrate=False).plan(model, [IDS])
    assert all(torch.equal(scores, second.scores[name]) for name, scores in first.scores.items())


@pytest.mark.parametrize("family", ["mlp", "resnet", "vit"])
def test_taylor_without_labels_says_what_it_needs(family: str):
    build, inputs = FAMILIES[family]
    text = r"got batches without labels, expected them: the loss is cross-entropy\. Pass pairs \(inputs, labels\), or a method without gradients\."
    with pytest.raises(InputError, match=text) as caught:
        Taylor().plan(build(), inputs)
    assert caught.value.code == "no-labels"


# Wanda


def wanda_by_hand(weight: Tensor, inputs: Tensor, *, metric: str) -> list[float]:
    """For each entry that a layer reads: (entries, outputs) and (places, entries), one weight at a time."""
    scores = []
    for entry in range(len(weight)):
        values = inputs[:, entry]
        if metric == "wanda":
            size = (values.square().sum() / len(values)).sqrt()
            scores.append(float(sum(abs(float(one)) for one in weight[entry]) / weight.shape[1] * size))
        else:
            variance = ((values - values.mean()) ** 2).sum() / len(values)
            scores.append(float(sum(float(one) ** 2 for one in weight[entry]) * variance))
    return scores


def per_unit(entries: list[float], width: int) -> Tensor:
    return torch.tensor([sum(entries[start : start + width]) for start in range(0, len(entries), width)], dtype=torch.float64)


METRICS = pytest.mark.parametrize("metric", ["wanda", "fluctuation"])


@METRICS
def test_wanda_of_neurons_is_the_loop_over_single_weights(metric: str):
    model = tiny_mlp(6, 8, 12, 4)
    plan = WandaStructured(metric=metric, recalibrate=False).plan(model, ROWS.split(3))
    for producer, reader in (("0", "2"), ("2", "4")):
        inputs = torch.cat(inputs_of(model, reader, ROWS))
        expected = wanda_by_hand(model.get_submodule(reader).weight.detach().T.double(), inputs, metric=metric)
        assert_close(plan.scores[producer], per_unit(expected, 1), claim=producer, rtol=1e-6, atol=1e-12)


@METRICS
def test_wanda_of_filters_takes_every_place_of_the_image_and_every_weight_of_the_kernel(metric: str):
    model = tiny_resnet()
    plan = WandaStructured(metric=metric, recalibrate=False).plan(model, images(16))
    [inputs] = inputs_of(model, "layer2.0.conv2", images(16))  # (images, channels, height, width)
    weight = model.layer2[0].conv2.weight.detach().double().transpose(0, 1).flatten(1)  # (channels, outputs * window)
    expected = wanda_by_hand(weight, inputs.movedim(1, -1).flatten(0, -2), metric=metric)
    assert_close(plan.scores["layer2.0.conv1"], per_unit(expected, 1), claim="filters", rtol=1e-6, atol=1e-12)


class Flattened(nn.Sequential):
    """Filters that a linear layer reads, four places each."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 5, 3, stride=8, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4))


@METRICS
def test_wanda_of_filters_that_a_linear_layer_reads_sums_over_their_places(metric: str):
    torch.manual_seed(0)
    model = Flattened().eval()
    plan = WandaStructured(metric=metric).plan(model, images(16))
    [inputs] = inputs_of(model, "3", images(16))
    expected = wanda_by_hand(model[3].weight.detach().T.double(), inputs, metric=metric)
    assert_close(plan.scores["0"], per_unit(expected, 4), claim="four entries each", rtol=1e-6, atol=1e-12)


@METRICS
@pytest.mark.parametrize("kind", ["neurons", "heads"])
def test_wanda_in_a_decoder_counts_every_token_that_is_no_padding(kind: str, metric: str):
    model = tiny_decoder("Llama")
    padded = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}
    plan = WandaStructured(metric=metric, kinds=(kind,), recalibrate=False).plan(model, padded)
    reader, width = ("mlp.down_proj", 1) if kind == "neurons" else ("self_attn.o_proj", 8)
    [inputs] = inputs_of(model, f"model.layers.1.{reader}", padded)
    weight = model.get_submodule(f"model.layers.1.{reader}").weight.detach().T.double()
    expected = wanda_by_hand(weight, inputs[padded["attention_mask"].bool()], metric=metric)
    name = "model.layers.1.mlp" if kind == "neurons" else "model.layers.1.self_attn"
    assert_close(plan.scores[name], per_unit(expected, width), claim=name, rtol=1e-6, atol=1e-12)


def test_wanda_reads_layers_as_pruned_layers_before_them_leave_them():
    model = tiny_mlp(6, 8, 12, 4)
    plan = WandaStructured(keep=0.25).plan(model, ROWS)
    pruned = mask(model, Part({"0": plan.units["0"]}))
    by_hand = WandaStructured(keep=0.25, recalibrate=False).plan(pruned, ROWS)
    assert torch.equal(plan.scores["2"], by_hand.scores["2"])
    dense = WandaStructured(keep=0.25, recalibrate=False).plan(model, ROWS)
    assert not torch.allclose(plan.scores["2"], dense.scores["2"])


def test_a_neuron_that_is_never_active_goes_first_and_a_constant_one_does_by_its_fluctuation():
    model = tiny_mlp(6, 8, 4)
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, -1.0  # behind the ReLU always 0
        model[0].weight[5], model[0].bias[5] = 0.0, 3.0  # always 3
    plan = WandaStructured(keep=7 / 8).plan(model, ROWS)
    assert set(range(8)) - set(plan.units["0"]) == {2}
    assert_close(apply(model, plan)(ROWS).detach(), model(ROWS).detach(), claim="it is not missed")
    assert set(range(8)) - set(WandaStructured(keep=6 / 8, metric="fluctuation").plan(model, ROWS).units["0"]) == {2, 5}


def test_wanda_finds_nothing_that_reads_states():
    text = r"no layer reads the states of backbone\.layers\.0\.mixer\.state, expected neurons, filters or heads\. Prune states with ghost, magnitude, random or"
    with pytest.raises(InputError, match=text) as caught:
        WandaStructured(kinds=("states",)).plan(tiny_mamba2(), IDS)
    assert caught.value.code == "no-readers"
    with pytest.raises(InputError, match=r"metric='noise' is not known\. Choose one of: wanda, fluctuation\."):
        WandaStructured(metric="noise")
