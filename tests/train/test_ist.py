"""Claims about independent subnetwork training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model_families import FAMILIES, IDS, WITHOUT_READERS, generators, rows
from partwise.checks import InputError
from partwise.models import Part, coupled_axes, extract, mask, merge, scale_readers, tensors_of
from partwise.train import IST, LocalSGD, OptimizerSettings, SubnetTrainer
from partwise.train.ticket import cut
from subnet_runs import ADAMW, SGD, loader, perceptron, same_bits
from subnet_twins import MOMENTUM, cut_and_merged, image_loader, plain_training, preact_resnet, sizes_of
from tiny import tiny_decoder, tiny_mlp, tiny_vit
from tolerances import assert_close

SAMPLERS = [IST(num_parts=3), IST(num_parts=3, sampler="stratified"), IST(num_parts=3, sampler="bernoulli", keep=0.4)]


def sampler_of(method: IST) -> str:
    return method.sampler


@pytest.mark.parametrize("method", [IST(num_parts=1), IST(num_parts=1, sampler="stratified"), IST(num_parts=1, sampler="bernoulli")], ids=sampler_of)
@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM], ids=["sgd", "momentum"])
@pytest.mark.parametrize("scale", ["inverse_keep", "test_time"])
def test_one_part_is_ordinary_training_to_the_bit(method: IST, optimizer: OptimizerSettings, scale: str):
    method = IST(num_parts=1, num_local_steps=3, sampler=method.sampler, scale=scale)
    trainer = SubnetTrainer(perceptron(), method, optimizer=optimizer).fit(loader(), num_rounds=4)
    twin = plain_training(perceptron(), trainer, num_rounds=4)
    assert same_bits(trainer.state.tensors, tensors_of(twin))
    assert same_bits(tensors_of(trainer.model), tensors_of(twin))


# Layers of a ViT must be of one size, which chance does not give them.
SPLIT = [family for family in FAMILIES if family not in WITHOUT_READERS]
FITTING = [(family, method) for family in SPLIT for method in SAMPLERS if (family, method.sampler) != ("vit", "bernoulli")]


@pytest.mark.parametrize(("family", "method"), FITTING, ids=[f"{family}-{method.sampler}" for family, method in FITTING])
def test_parts_that_were_not_trained_merge_to_the_same_bits(family: str, method: IST):
    model = FAMILIES[family][0]()
    assert same_bits(cut_and_merged(model, method, generators(3)), tensors_of(model))


@given(
    widths=st.lists(st.integers(5, 40), min_size=1, max_size=3),
    num_parts=st.integers(1, 5),
    sampler=st.sampled_from(["disjoint", "stratified"]),
    round_number=st.integers(1, 50),
)
def test_every_neuron_is_in_exactly_one_part_and_parts_are_as_equal_as_can_be(widths: list[int], num_parts: int, sampler: Any, round_number: int):
    method = IST(num_parts=num_parts, sampler=sampler)
    axes = method.find_axes(tiny_mlp(4, *widths, 3))
    parts = method.deal(axes, generators(num_parts, round_number=round_number))
    assert [axis.size for axis in axes] == widths
    for axis in axes:
        held = [part.units[axis.name] for part in parts]
        assert sorted(unit for units in held for unit in units) == list(range(axis.size))
        assert max(map(len, held)) - min(map(len, held)) <= 1


def test_one_in_num_parts_of_a_matrix_between_hidden_layers_is_trained_and_all_of_the_first_and_last():
    model = tiny_mlp(6, 20, 40, 3)
    method = IST(num_parts=4)
    axes = method.find_axes(model)
    results = []
    for part in method.deal(axes, generators(4)):
        small = extract(model, part, axes=axes)
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(1)
        results.append((part, small))
    trained = {name: float((new != tensors_of(model)[name]).double().mean()) for name, new in tensors_of(merge(model, results, axes=axes)).items()}
    assert trained == {"0.weight": 1.0, "0.bias": 1.0, "2.weight": 0.25, "2.bias": 1.0, "4.weight": 1.0, "4.bias": 1.0}


def test_layers_are_shuffled_each_by_itself_and_anew_every_round():
    method = IST(num_parts=2)
    axes = method.find_axes(tiny_mlp(4, 20, 20, 3))
    [part, _] = method.deal(axes, generators(2))
    assert part.units[axes[0].name] != part.units[axes[1].name]
    assert part != method.deal(axes, generators(2, round_number=2))[0]
    assert part == method.deal(axes, generators(2))[0]


def test_stratified_parts_get_as_many_neurons_from_every_shard():
    method = IST(num_parts=4, sampler="stratified")
    [axis] = method.find_axes(tiny_mlp(4, 32, 3))
    for part in method.deal([axis], generators(4)):
        assert [sum(unit // 8 == shard for unit in part.units[axis.name]) for shard in range(4)] == [2, 2, 2, 2]


def test_bernoulli_parts_keep_what_they_are_told_to_and_one_in_num_parts_by_default():
    [axis] = IST().find_axes(tiny_mlp(4, 1000, 3))
    for keep, expected in ((0.7, 0.7), (None, 0.25)):
        parts = IST(sampler="bernoulli", keep=keep).deal([axis], generators(4))
        share = np.mean([len(part.units[axis.name]) / 1000 for part in parts])
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)


@pytest.mark.parametrize("method", SAMPLERS, ids=sampler_of)
@pytest.mark.parametrize("norm", [False, True])
def test_a_subnetwork_is_the_masked_network_and_has_its_gradients(method: IST, norm: bool):
    model = tiny_mlp(6, 12, 20, 4, norm=norm)
    axes = method.find_axes(model)
    part = method.deal(axes, generators(3))[1]
    small, masked = extract(model, part, axes=axes), mask(model, part, axes=axes)
    inputs = rows(6)
    assert_close(small(inputs), masked(inputs), claim="the same outputs", rtol=0, atol=1e-6)
    for network in (small, masked):
        network(inputs).square().sum().backward()
    gradients = ({name: tensor.grad for name, tensor in network.named_parameters()} for network in (small, masked))
    part_of, whole = gradients
    spread = merge_into_zeros(model, part, axes, part_of)
    held = merge_into_zeros(model, part, axes, {name: torch.ones_like(tensor) for name, tensor in part_of.items()})
    for name, tensor in whole.items():
        assert_close(spread[name], tensor * held[name], claim=f"{name}: the same gradient on shared entries", rtol=0, atol=1e-5)


def merge_into_zeros(model: nn.Module, part: Part, axes: Any, tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    from partwise.models import merge_tensors

    return merge_tensors({name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}, [(part, tensors)], axes=axes)


@given(widths=st.tuples(st.integers(3, 12), st.integers(3, 12)), keep=st.floats(0.34, 1.0), seed=st.integers(0, 20))
@settings(max_examples=20)
def test_the_mean_of_parameters_over_holders_is_the_old_value_and_the_mean_of_changes(widths: tuple[int, int], keep: float, seed: int):
    model = tiny_mlp(5, *widths, 3).double()
    method = IST(num_parts=3, sampler="bernoulli", keep=keep)
    axes = method.find_axes(model)
    parts = method.deal(axes, generators(3, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    old, results, changes, counts = tensors_of(model), [], [], []
    for part in parts:
        small = extract(model, part, axes=axes)
        change = {name: torch.randn(tensor.shape, dtype=torch.float64, generator=generator) for name, tensor in small.named_parameters()}
        with torch.no_grad():
            for name, parameter in small.named_parameters():
                parameter.add_(change[name])
        results.append((part, small))
        changes.append(merge_into_zeros(model, part, axes, change))
        counts.append(merge_into_zeros(model, part, axes, {name: torch.ones_like(tensor) for name, tensor in change.items()}))
    for name, new in tensors_of(merge(model, results, axes=axes)).items():
        holders = sum(count[name] for count in counts)
        mean = sum(change[name] for change in changes) / holders.clamp(min=1)
        assert_close(new.detach(), old[name].detach() + mean, claim=f"{name}: who nobody held did not move")


@pytest.mark.parametrize("sampler", ["disjoint", "stratified"])
def test_with_inverse_keep_the_mean_over_the_parts_is_the_whole_network(sampler: Any):
    model, inputs = tiny_mlp(6, 12, 4).double(), rows(6).double()
    method = IST(num_parts=3, sampler=sampler)
    axes = method.find_axes(model)
    parts = method.deal(axes, generators(3))
    mean = torch.stack([scale_readers(extract(model, part), method.factors(axes, part), axes=axes)(inputs) for part in parts]).mean(0)
    assert_close(mean, method.deployed(model, axes)(inputs), claim="every neuron is in one part, three times as loud")


def test_with_test_time_the_mean_over_the_parts_is_the_deployed_network():
    model, inputs = tiny_mlp(6, 12, 4).double(), rows(6).double()
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    method = IST(num_parts=3, scale="test_time")
    axes = method.find_axes(model)
    parts = method.deal(axes, generators(3))
    assert all(method.factors(axes, part) == {} for part in parts)
    mean = torch.stack([extract(model, part)(inputs) for part in parts]).mean(0)
    assert_close(mean, method.deployed(model, axes)(inputs), claim="the deployed network is a third as loud as the sum")
    assert same_bits(tensors_of(model), before)


def test_where_norms_follow_inverse_keep_is_the_same_function_as_no_scale_at_all():
    model, inputs = tiny_mlp(6, 16, 16, 4, norm=True).double().train(), rows(6).double() * 100
    with torch.no_grad():  # a large network, beside whose variances the constant in a norm is nothing
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(100)
    plain, scaled = IST(num_parts=4, scale="norm"), IST(num_parts=4)
    axes = plain.find_axes(model)
    part = plain.deal(axes, generators(4))[0]
    assert plain.factors(axes, part) == {}
    assert set(scaled.factors(axes, part).values()) == {4.0}
    small = extract(model, part, axes=axes)
    loud = scale_readers(small, scaled.factors(axes, part), axes=axes)
    assert_close(loud(inputs), small(inputs), claim="a norm takes the scale away", rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", ["inverse_keep", "test_time"])
def test_a_ticket_as_large_as_a_part_is_what_was_trained(scale: Any):
    model = tiny_mlp(6, 12, 8, 4)
    method = IST(num_parts=4, scale=scale)
    axes = method.find_axes(model)
    ticket = cut(method, method.deployed(model, axes), axes, 0.25)
    trained = scale_readers(extract(model, ticket.part, axes=axes), method.factors(axes, ticket.part), axes=axes)
    assert_close(ticket.model(rows(6)), trained(rows(6)), claim="at 1/S, deployed and cut is what a part trains")
    whole = cut(method, method.deployed(model, axes), axes, 1.0)
    assert_close(whole.model(rows(6)), method.deployed(model, axes)(rows(6)), claim="at 1, it is the deployed network")


def test_a_worker_of_eight_holds_a_nineteenth_of_the_speech_network():
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(4096, 8192, bias=False), nn.ReLU(), nn.Linear(8192, 8192, bias=False), nn.ReLU(), nn.Linear(8192, 35, bias=False)
        )
    method = IST(num_parts=8)
    axes = method.find_axes(model)
    assert sizes_of(model) == 100_950_016
    assert {sizes_of(extract(model, part, axes=axes)) for part in method.deal(axes, generators(8))} == {5_278_720}


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_bytes_of_a_round_are_those_of_the_formula(num_parts: int):
    widths = (6, 16, 32, 3)
    model = tiny_mlp(*widths, bias=False)
    trainer = SubnetTrainer(model, IST(num_parts=num_parts, num_local_steps=1), optimizer=SGD).fit(loader(), num_rounds=1)
    formula = 2 * 4 * (6 * 16 + 16 * 32 // num_parts + 32 * 3)
    assert trainer.history[0].bytes_down + trainer.history[0].bytes_up == formula


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("method", SAMPLERS, ids=sampler_of)
def test_it_learns_with_and_without_a_barrier(method: IST, mode: Any):
    method = IST(num_parts=3, num_local_steps=5, sampler=method.sampler, keep=method.keep)
    trainer = SubnetTrainer(perceptron(width=24), method, optimizer=OptimizerSettings(lr=0.02), mode=mode).fit(loader(), num_rounds=20)
    first, last = trainer.history[:3], trainer.history[-3:]
    assert np.mean([report.loss_after_merge for report in last]) < 0.75 * np.mean([report.loss_after_split for report in first])


def test_filters_and_head_groups_are_dealt_like_neurons():
    trainer = SubnetTrainer(preact_resnet(), IST(num_parts=2, num_local_steps=1), optimizer=SGD).fit(image_loader(), num_rounds=2)
    assert {axis.kind for axis in trainer.axes} == {"filters"}
    assert trainer.history[-1].coverage == 1.0
    batches = [{"input_ids": IDS, "labels": IDS}] * 4
    trainer = SubnetTrainer(tiny_decoder("Llama"), IST(num_parts=2, num_local_steps=1), optimizer=ADAMW).fit(batches, num_rounds=2)
    assert {axis.kind for axis in trainer.axes} == {"heads", "neurons"}
    assert np.isfinite(trainer.history[-1].loss_after_merge)


def test_inputs_and_outputs_of_a_network_are_on_no_axis():
    for widths in ((7, 12, 5), (7, 12, 11, 5)):
        along = {(member.tensor, member.dim) for axis in IST().find_axes(tiny_mlp(*widths)) for member in axis.members}
        last = 2 * (len(widths) - 2)
        assert not along & {("0.weight", 1), (f"{last}.weight", 0), (f"{last}.bias", 0)}


@pytest.mark.slow
def test_on_digits_the_whole_network_and_random_quarters_of_it_both_work():
    """300 rounds of 5 steps by 4 parts: 6,000 steps, as many as the dense network gets."""
    sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="needs the digits of scikit-learn")
    digits = sklearn_datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    inputs = torch.tensor(digits.data[order] / 16, dtype=torch.float32)  # (1797, 64)
    classes = torch.tensor(digits.target[order])
    rows_of_epochs = [torch.randperm(1400, generator=torch.Generator().manual_seed(epoch)).split(32) for epoch in range(20)]
    data = [(inputs[rows], classes[rows]) for rows_of_epoch in rows_of_epochs for rows in rows_of_epoch]

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(inputs[1400:]).argmax(1) == classes[1400:]).double().mean())

    method = IST(num_parts=4, num_local_steps=5)
    whole = SubnetTrainer(tiny_mlp(64, 64, 10), method, optimizer=SGD, probe_every=0).fit(data, num_rounds=300).model
    dense = (
        SubnetTrainer(tiny_mlp(64, 64, 10), LocalSGD(num_parts=1, num_local_steps=20), optimizer=SGD, probe_every=0).fit(data, num_rounds=300).model
    )
    axes = method.find_axes(whole)

    def quarters(model: nn.Module) -> float:
        return float(np.mean([accuracy(cut(method, model, axes, 0.25, seed=seed).model) for seed in range(20)]))

    assert accuracy(whole) > 0.95
    assert accuracy(dense) > 0.95
    assert quarters(whole) > 0.75
    assert quarters(dense) < 0.55


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sampler": "random"}, r"sampler='random' is not known\. Choose one of: disjoint, stratified, bernoulli"),
        ({"scale": "none"}, r"scale='none' is not known\. Choose one of: inverse_keep, test_time, norm"),
        ({"keep": 0.5}, r"got keep=0\.5 with sampler='disjoint', .*expected it with sampler='bernoulli' only\. Leave keep out, or change num_parts"),
        ({"sampler": "bernoulli", "keep": 0.0}, r"got keep=0\.0, expected a fraction above 0 and at most 1"),
        ({"sampler": "bernoulli", "keep": float("nan")}, r"got keep=nan, expected a fraction above 0"),
        ({"sampler": "bernoulli", "require_equal": True}, r"got require_equal=True with sampler='bernoulli', whose parts differ in size by chance"),
        ({"num_local_steps": 0}, r"num_local_steps=0 must be an integer of at least 1"),
        ({"num_local_steps": (1, 2)}, r"got 2 numbers of local steps for 4 parts, expected one each\. Pass 4"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_at_once(settings: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text):
        IST(**settings)


def tied() -> nn.Module:
    model = tiny_mlp(8, 8, 8, 8)
    model[2].weight = model[4].weight
    return model


@pytest.mark.parametrize(
    ("method", "model", "code", "text"),
    [
        (IST(num_parts=9), tiny_mlp(6, 12, 8, 4), "too-many-parts", r"got 9 parts, but 2 has 8 neurons, .*Use 8 parts or fewer"),
        (IST(num_parts=9, sampler="stratified"), tiny_mlp(6, 8, 4), "too-many-parts", r"got 9 parts, but 0 has 8 neurons"),
        (IST(sampler="bernoulli", keep=0.1), tiny_mlp(6, 8, 4), "empty-layer", r"got keep=0\.1, which leaves 0 with none of its 8 neurons\. Pass keep=0\.125"),
        (IST(require_equal=True), tiny_mlp(6, 10, 4), "parts-do-not-divide", r"got 4 parts for the 10 neurons of 0, .* The nearest is 5\."),
        (IST(require_equal=True, sampler="stratified"), tiny_mlp(6, 10, 4), "parts-do-not-divide", r"got 4 parts for the 10 neurons of 0"),
        (IST(), nn.Sequential(nn.Linear(3, 2)), "no-axes", r"Sequential has no neurons that could be left out, .* Use a deeper model"),
        (IST(), tied(), "unsupported-sharing", r"2\.weight and 4\.weight are one tensor, .* Untie them"),
        (IST(), nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1)), "unsupported-sharing", r"0 is a convolution in 4 groups"),
        (IST(sampler="bernoulli"), tiny_vit(), "uneven-layers", r"layers keep .*, expected the same in every layer of a ViT.* Keep equal numbers"),
        (IST(), nn.LSTM(3, 3), "unknown-model", r"got a LSTM, expected one of: .*multilayer perceptrons"),
    ],
)  # fmt: skip
def test_models_that_it_cannot_split_are_refused_before_the_first_round(method: IST, model: nn.Module, code: str, text: str):
    with pytest.raises(InputError, match=text) as caught:
        SubnetTrainer(model, method, optimizer=SGD)
    assert caught.value.code == code


class OnlyBlocks(nn.Module):
    """Residual blocks of one convolution each: nothing inside them is read by another layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


def test_a_network_of_bare_residual_blocks_has_nothing_for_it_and_something_for_resist():
    model = nn.Sequential(nn.Sequential(OnlyBlocks(), OnlyBlocks()))
    assert [axis.kind for axis in coupled_axes(model)] == ["blocks"]
    with pytest.raises(InputError, match=r"got a Sequential without hidden neurons, filters or heads of its own, .*or ResIST for residual blocks"):
        IST().find_axes(model)


def normed(last: nn.Module, *, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4, bias=bias), last)


@pytest.mark.parametrize(
    "model", [tiny_mlp(6, 8, 8, 4, norm=True), normed(nn.LayerNorm(4)), normed(nn.GroupNorm(2, 4)), normed(nn.BatchNorm1d(4), bias=True)]
)
def test_a_norm_behind_every_reader_is_enough_for_no_scale(model: nn.Module):
    assert IST(scale="norm").find_axes(model)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (tiny_mlp(6, 8, 8, 4), r"got scale='norm', but 2 of 2 layers that read split neurons \(2 first\) have no norm layer behind them"),
        (normed(nn.Identity()), r"but 1 of 1 layers that read split neurons \(3 first\) .* Pass scale='inverse_keep', or add norms"),
        (normed(nn.LayerNorm(4), bias=True), r"expected batch normalisation, or another norm behind a layer without bias"),
        (tiny_decoder("Llama"), r"but 4 of 4 layers that read split neurons \(model\.layers\.0\.self_attn\.o_proj first\)"),
        (preact_resnet(), r"layers that read split neurons \(layer1\.0\.conv2 first\)"),
    ],
)
def test_no_scale_without_norms_that_take_it_away_is_refused(model: nn.Module, text: str):
    with pytest.raises(InputError, match=text) as caught:
        IST(scale="norm", num_parts=2).find_axes(model)
    assert caught.value.code == "no-norm"


def test_its_repr_builds_it_again():
    method = IST(num_parts=2, num_local_steps=(3, 4), sampler="bernoulli", keep=0.3, scale="test_time")
    assert eval(repr(method)) == method  # noqa: S307 - our own repr
