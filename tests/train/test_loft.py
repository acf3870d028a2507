"""Claims about LoFT: residual blocks by filters, and the ticket of the largest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model_families import generators, images
from partwise.checks import InputError
from partwise.linalg.rankings import filter_distance
from partwise.models import extract, mask, merge, tensors_of
from partwise.train import LoFT, OptimizerSettings, SubnetTrainer
from partwise.train.loft import TicketMonitor
from partwise.train.ticket import cut
from subnet_runs import SGD, same_bits
from subnet_twins import MOMENTUM, cut_and_merged, image_loader, plain_training, preact_resnet, sizes_of
from tiny import BasicBlock, Bottleneck, PreActBlock, tiny_decoder, tiny_mlp, tiny_resnet
from tolerances import assert_close

INPUTS = images(16)
SPLIT = ["layer2.1.conv1", "layer3.1.conv1", "layer3.2.conv1", "layer3.3.conv1"]  # of depths 2, 2, 4, 1


def names(method: LoFT, model: nn.Module) -> list[str]:
    return [axis.name for axis in method.find_axes(model)]


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM], ids=["sgd", "momentum"])
def test_one_part_is_ordinary_training_to_the_bit(optimizer: OptimizerSettings):
    model = preact_resnet()
    trainer = SubnetTrainer(model, LoFT(num_parts=1, num_local_steps=2), optimizer=optimizer, probe_every=0).fit(image_loader(), num_rounds=2)
    assert same_bits(trainer.state.tensors, tensors_of(plain_training(model, trainer, num_rounds=2)))


@pytest.mark.parametrize("block", [PreActBlock, BasicBlock, Bottleneck])
def test_parts_that_were_not_trained_merge_to_the_same_bits(block: Any):
    model = tiny_resnet(block, (2, 2, 4, 1))
    assert same_bits(cut_and_merged(model, LoFT(num_parts=3), generators(3)), tensors_of(model))


@pytest.mark.parametrize("block", [PreActBlock, BasicBlock])
def test_inner_filters_of_blocks_without_a_stride_are_split_from_the_second_section_on(block: Any):
    model = tiny_resnet(block, (2, 2, 4, 1))
    assert names(LoFT(num_parts=2), model) == SPLIT
    assert names(LoFT(num_parts=2, include_first_section=True), model) == ["layer1.0.conv1", "layer1.1.conv1", *SPLIT]
    strided = names(LoFT(num_parts=2, include_strided=True), model)
    assert strided == ["layer2.0.conv1", "layer2.1.conv1", "layer3.0.conv1", *SPLIT[1:], "layer4.0.conv1"]
    everything = names(LoFT(num_parts=2, include_first_section=True, include_strided=True), model)
    assert set(everything) == {*strided, "layer1.0.conv1", "layer1.1.conv1"}
    assert not any(name.startswith("conv") for name in everything)


def test_of_a_bottleneck_only_the_first_width_is_split():
    assert names(LoFT(num_parts=2), tiny_resnet(Bottleneck, (2, 2, 4, 1))) == SPLIT


class NestedBlock(nn.Module):
    """A block that keeps its layers in a list of its own."""

    def __init__(self, inputs: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride=stride, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, width, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def test_blocks_are_found_whatever_they_and_their_sections_are_called():
    sections = [nn.Sequential(NestedBlock(4, 4), NestedBlock(4, 4)), nn.Sequential(NestedBlock(4, 8, stride=2), NestedBlock(8, 8))]
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ModuleDict({"a": sections[0]})["a"], nn.Sequential(nn.ReLU(), sections[1]), nn.Flatten(), nn.Linear(8, 2)
    )
    assert names(LoFT(num_parts=2), model) == ["2.1.1.body.0"]


@given(num_parts=st.integers(1, 8), round_number=st.integers(1, 30))
def test_every_filter_is_in_exactly_one_part(num_parts: int, round_number: int):
    parts = LoFT(num_parts=num_parts).deal(AXES, generators(num_parts, round_number=round_number))
    for axis in AXES:
        assert sorted(unit for part in parts for unit in part.units[axis.name]) == list(range(axis.size))


AXES = LoFT().find_axes(preact_resnet())


def test_filters_are_copied_and_shared_layers_are_the_mean():
    model = preact_resnet()
    method = LoFT(num_parts=2)
    axes = method.find_axes(model)
    parts = method.deal(axes, generators(2))
    results = []
    for part in parts:
        small = extract(model, part, axes=axes)
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(1 + 2 * part.index)
        results.append((part, small))
    new, old = tensors_of(merge(model, results, axes=axes)), tensors_of(model)
    split = {member.tensor: (axis.name, member.dim) for axis in axes for member in axis.members}
    for name, _ in model.named_parameters():
        shift = torch.full_like(old[name], 2.0)
        if name in split:
            axis, dim = split[name]
            for part in parts:
                shift.index_fill_(dim, torch.tensor(part.units[axis]), 1.0 + 2 * part.index)
        assert_close(new[name].detach(), (old[name] + shift).detach(), claim=name)


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_bytes_of_a_round_are_those_of_the_formula(num_parts: int):
    trainer = SubnetTrainer(preact_resnet(), LoFT(num_parts=num_parts, num_local_steps=1), optimizer=SGD).fit(image_loader(), num_rounds=1)
    tensors = tensors_of(preact_resnet())
    of_axes = {member.tensor for axis in trainer.axes for member in axis.members}
    split = sum(tensors[name].nbytes for name in of_axes)
    shared = sum(tensor.nbytes for name, tensor in tensors.items() if name not in of_axes)
    assert trainer.history[0].bytes_down + trainer.history[0].bytes_up == 2 * (num_parts * shared + split)


def plant(model: nn.Module, name: str, norms: list[float]) -> None:
    """Give the filters of a convolution these norms."""
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        directions = weight.flatten(1) / weight.flatten(1).norm(dim=1, keepdim=True)
        weight.copy_((directions * torch.tensor(norms)[:, None]).view_as(weight))


@given(keep=st.floats(0.01, 1.0), seed=st.integers(0, 30))
@settings(max_examples=25)
def test_a_ticket_keeps_exactly_the_filters_with_the_largest_norms(keep: float, seed: int):
    model, method = preact_resnet(), LoFT()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed)) + 1  # norms 1 to 16
    plant(model, "layer3.2.conv1", order.double().tolist())
    part = method.ticket_part(model, AXES, keep, generators(1)[0])
    number = max(1, int(16 * keep + 0.5))
    assert part.units["layer3.2.conv1"] == tuple(sorted((order > 16 - number).nonzero().flatten().tolist()))
    assert len(part.units["layer2.1.conv1"]) == max(1, int(8 * keep + 0.5))
    assert method.ranking_of(tensors_of(model), AXES)["layer3.2.conv1"] == tuple(order.argsort(descending=True).tolist())


def test_equal_filters_rank_in_their_order():
    model = preact_resnet()
    plant(model, "layer2.1.conv1", [1.0] * 8)
    with torch.no_grad():
        model.layer2[1].conv1.weight.fill_(1.0)
    assert LoFT().ranking(model)["layer2.1.conv1"] == tuple(range(8))


def test_a_filter_that_its_normalisation_turns_down_ranks_lower_where_asked():
    model = preact_resnet()
    plant(model, "layer2.1.conv1", [1, 2, 3, 4, 5, 6, 7, 8])
    with torch.no_grad():
        model.layer2[1].bn2.weight.copy_(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -2.0, 0.1]))
    assert LoFT().ranking(model)["layer2.1.conv1"] == (7, 6, 5, 4, 3, 2, 1, 0)
    assert LoFT(score="bn_scaled").ranking(model)["layer2.1.conv1"] == (6, 5, 4, 3, 2, 1, 0, 7)


@pytest.mark.parametrize("block", [PreActBlock, BasicBlock, Bottleneck])
@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_a_ticket_is_the_masked_network_in_evaluation_mode(block: Any, keep: float):
    model, method = tiny_resnet(block, (2, 2, 4, 1)), LoFT()
    axes = method.find_axes(model)
    ticket = cut(method, model, axes, keep)
    assert_close(ticket.model(INPUTS), mask(model, ticket.part, axes=axes)(INPUTS), claim="slicing is masking", rtol=0, atol=1e-5)
    assert {len(units) for name, units in ticket.part.units.items() if name.startswith("layer3")} == {int(16 * keep + 0.5)}


def test_half_of_the_filters_save_the_parameters_of_the_formula():
    model, method = preact_resnet(), LoFT()
    ticket = cut(method, model, method.find_axes(model), 0.5)
    # A filter: 3 x 3 on each input, 3 x 3 on each output, weight and bias of its norm.
    saved = sum(blocks * (width // 2) * (9 * width + 9 * width + 2) for width, blocks in ((8, 1), (16, 3)))
    assert ticket.num_parameters == sizes_of(model) - saved


def test_a_ticket_that_keeps_everything_is_the_network_and_one_that_keeps_next_to_nothing_has_a_filter_left():
    model, method = preact_resnet(), LoFT()
    axes = method.find_axes(model)
    assert same_bits(tensors_of(cut(method, model, axes, 1.0).model), tensors_of(model))
    smallest = cut(method, model, axes, 1e-6)
    assert {len(units) for units in smallest.part.units.values()} == {1}
    assert smallest.model(INPUTS).shape == (3, 5)


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(keep: float):
    model, method = preact_resnet(), LoFT()
    with pytest.raises(InputError, match=rf"got keep={keep}, expected a fraction above 0 and at most 1"):
        cut(method, model, method.find_axes(model), keep)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_it_learns_with_and_without_a_barrier(mode: Any):
    data = image_loader(48, batch_size=16)
    method = LoFT(num_parts=2, num_local_steps=4)
    trainer = SubnetTrainer(preact_resnet((1, 2, 2, 1)), method, optimizer=OptimizerSettings(lr=0.02), mode=mode).fit(data, num_rounds=6)
    assert trainer.history[-1].loss_after_local < 0.5 * trainer.history[0].loss_after_split
    assert trainer.ticket(0.5).model(images(8)).isfinite().all()


def test_the_monitor_tells_how_far_each_rounds_ticket_is_from_the_last():
    monitor = TicketMonitor(LoFT(num_parts=2, num_local_steps=2), every=2)
    trainer = SubnetTrainer(preact_resnet(), monitor.method, optimizer=OptimizerSettings(lr=0.05)).fit(image_loader(), num_rounds=5, progress=monitor)
    assert list(monitor.rankings) == [2, 4]
    assert monitor.rankings[4].keys() == {axis.name for axis in trainer.axes}
    distances = monitor.distances()
    assert distances[4] == 0.0
    one_by_one = [filter_distance(monitor.rankings[4][name], monitor.rankings[2][name]) for name in SPLIT]
    assert distances[2] == pytest.approx(sum(one_by_one) / 4)
    assert distances[2] > 0


def test_a_monitor_of_one_ranking_is_at_no_distance_and_one_of_none_knows_none():
    monitor = TicketMonitor(LoFT())
    assert monitor.distances() == {}
    model = preact_resnet()
    trainer: Any = SimpleNamespace(state=SimpleNamespace(tensors=tensors_of(model)), axes=LoFT().find_axes(model))
    report: Any = SimpleNamespace(round_number=1)
    monitor(report, trainer)
    assert monitor.rankings == {1: LoFT().ranking(model)}
    assert monitor.distances() == {1: 0.0}
    with pytest.raises(InputError, match=r"every=0 must be an integer of at least 1"):
        TicketMonitor(LoFT(), every=0)


def grouped() -> nn.Module:
    model = preact_resnet()
    model.layer3[1].conv1 = nn.Conv2d(16, 16, 3, padding=1, groups=2)
    return model


def without_norms() -> nn.Module:
    model = preact_resnet()
    model.layer3[2].bn2 = nn.BatchNorm2d(16, affine=False)
    return model


@pytest.mark.parametrize(
    ("method", "model", "code", "text"),
    [
        (LoFT(num_parts=9), preact_resnet(), "too-many-parts", r"got 9 parts, but layer2\.1\.conv1 has 8 filters, .*Use 8 parts or fewer"),
        (LoFT(), grouped(), "unsupported-sharing", r"layer3\.1\.conv1 is a convolution in 2 groups"),
        (
            LoFT(score="bn_scaled"),
            without_norms(),
            "no-norm",
            r"got score='bn_scaled', but no .* follows layer3\.2\.conv1, expected one\. Pass score='l2'",
        ),
        (
            LoFT(),
            preact_resnet((3, 1, 1, 1)),
            "no-axes",
            r"got a ResNet without a block to split, .* include_first_section=True or include_strided=True",
        ),
        (LoFT(), tiny_mlp(6, 8, 4), "no-axes", r"got a Sequential without a block to split, .* Use a ResNet"),
        (LoFT(), tiny_decoder("Llama"), "no-axes", r"got a LlamaForCausalLM without a block to split"),
        (
            LoFT(),
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)),
            "no-axes",
            r"expected residual blocks of two convolutions in two or more sections",
        ),
    ],
)
def test_models_that_it_cannot_split_are_refused_before_the_first_round(method: LoFT, model: nn.Module, code: str, text: str):
    with pytest.raises(InputError, match=text) as caught:
        SubnetTrainer(model, method, optimizer=SGD)
    assert caught.value.code == code


def test_settings_that_cannot_be_used_are_refused_at_once():
    with pytest.raises(InputError, match=r"score='l1' is not known\. Choose one of: l2, bn_scaled"):
        LoFT(score="l1")  # type: ignore[arg-type]


def test_its_repr_builds_it_again():
    method = LoFT(num_parts=2, score="bn_scaled", include_strided=True)
    assert eval(repr(method)) == method  # noqa: S307 - our own repr
