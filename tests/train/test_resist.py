"""Claims about ResIST: a deep ResNet from shallower ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from model_families import generators, images
from partwise.checks import InputError
from partwise.models import BlockAxis, coupled_axes, extract, merge, tensors_of
from partwise.train import OptimizerSettings, ResIST, SubnetTrainer
from subnet_runs import SGD, loader, same_bits
from subnet_twins import MOMENTUM, cut_and_merged, image_loader, plain_training, preact_resnet, sizes_of
from tiny import BasicBlock, PreActBlock, ResNet, tiny_decoder, tiny_mlp, tiny_resnet
from tolerances import assert_close

INPUTS = images(16)


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM], ids=["sgd", "momentum"])
def test_one_part_is_ordinary_training_to_the_bit(optimizer: OptimizerSettings):
    model = preact_resnet()
    trainer = SubnetTrainer(model, ResIST(num_parts=1, num_local_steps=2), optimizer=optimizer, probe_every=0).fit(image_loader(), num_rounds=2)
    assert same_bits(trainer.state.tensors, tensors_of(plain_training(model, trainer, num_rounds=2)))
    assert trainer.method.branch_scale(3) == 1


@pytest.mark.parametrize("min_blocks", [0, 2])
def test_parts_that_were_not_trained_merge_to_the_same_bits(min_blocks: int):
    model = preact_resnet()
    assert same_bits(cut_and_merged(model, ResIST(num_parts=3, min_blocks=min_blocks), generators(3)), tensors_of(model))


@pytest.mark.parametrize("block", [PreActBlock, BasicBlock])
def test_a_part_is_the_network_that_goes_round_the_blocks_it_does_not_hold(block: Any):
    model = tiny_resnet(block)
    method = ResIST(num_parts=2, allow_post_activation=True)
    axes = method.find_axes(model)
    part = method.deal(axes, generators(2))[1]
    small = extract(model, part, axes=axes)
    for missing in set(range(3)) - set(part.units["layer3"]):
        model.layer3[1 + missing] = nn.Identity()
    assert_close(small(INPUTS), model(INPUTS), claim="the same layers in the same order", rtol=0, atol=0)


class Weighted(nn.Module):
    """A block whose branch is multiplied: what it adds to its input, a little louder or softer."""

    def __init__(self, block: Any, scale: float) -> None:
        super().__init__()
        self.block, self.scale = block, scale

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        if isinstance(block, PreActBlock):
            return x + self.scale * (block(x) - x)
        out = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
        return torch.relu(x + self.scale * out)


@pytest.mark.parametrize("block", [PreActBlock, BasicBlock])
@pytest.mark.parametrize("min_blocks", [0, 2])
def test_the_deployed_network_runs_all_blocks_at_the_share_that_a_part_holds(block: Any, min_blocks: int):
    model = tiny_resnet(block).double()
    before = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
    method = ResIST(num_parts=3, min_blocks=min_blocks, allow_post_activation=True)
    deployed = method.deployed(model, method.find_axes(model))
    assert same_bits(tensors_of(model), before)
    scale = {0: 1 / 3, 2: 2 / 3}[min_blocks]
    for number in (1, 2, 3):
        model.layer3[number] = Weighted(model.layer3[number], scale)
    assert_close(deployed(INPUTS.double()), model(INPUTS.double()), claim="branches of the split blocks, and no others")


@given(num_parts=st.integers(1, 30), min_blocks=st.integers(0, 22))
def test_the_scale_is_the_mean_share_of_the_blocks_that_a_part_holds(num_parts: int, min_blocks: int):
    method = ResIST(num_parts=num_parts, min_blocks=min_blocks)
    assert method.branch_scale(22) == pytest.approx(max(22 / num_parts, min_blocks) / 22)


class LinearBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_the_deployed_network_is_the_mean_of_the_parts_up_to_second_order_in_the_branches():
    def distance(size: float) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Sequential(*[LinearBranch() for _ in range(6)])).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(size)
        method = ResIST(num_parts=3)
        axes = method.find_axes(model)
        inputs = images(4)[:, :2].double()
        mean = torch.stack([extract(model, part, axes=axes)(inputs) for part in method.deal(axes, generators(3))]).mean(0)
        return float((mean - method.deployed(model, axes)(inputs)).detach().norm())

    assert 3.9 < distance(1e-3) / distance(5e-4) < 4.1


@given(num_parts=st.integers(1, 7), min_blocks=st.integers(0, 7), round_number=st.integers(1, 20))
def test_every_block_is_dealt_once_or_as_often_as_the_minimum_needs(num_parts: int, min_blocks: int, round_number: int):
    axis = BlockAxis("layer3", tuple(f"layer3.{k}" for k in range(1, 8)), tuple(f"layer3.{k}" for k in range(8)), ((),) * 7)
    parts = ResIST(num_parts=num_parts, min_blocks=min_blocks).deal((axis,), generators(num_parts, round_number=round_number))
    held = [part.units["layer3"] for part in parts]
    holders = Counter(block for blocks in held for block in blocks)
    assert set(holders) == set(range(7))
    assert all(list(blocks) == sorted(set(blocks)) for blocks in held)
    sizes = sorted(map(len, held))
    assert sizes == sorted(max(7 // num_parts + (part < 7 % num_parts), min_blocks) for part in range(num_parts))
    if min_blocks <= 7 // num_parts:
        assert set(holders.values()) == {1}


def test_more_parts_than_blocks_share_them_when_a_minimum_is_given():
    model = preact_resnet()
    method = ResIST(num_parts=5, min_blocks=1)
    parts = method.deal(method.find_axes(model), generators(5))
    assert [len(part.units["layer3"]) for part in parts] == [1] * 5


def test_a_block_is_the_mean_over_its_holders_and_shared_layers_over_all():
    model = preact_resnet()
    method = ResIST(num_parts=3, min_blocks=2)
    axes = method.find_axes(model)
    parts = method.deal(axes, generators(3))
    results = []
    for part in parts:
        small = extract(model, part, axes=axes)
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(10**part.index)
        results.append((part, small))
    new = tensors_of(merge(model, results, axes=axes))
    for name, old in model.named_parameters():
        block = next((unit for unit in range(3) if name.startswith(f"layer3.{unit + 1}.")), None)
        shifts = [10.0**part.index for part in parts if block is None or block in part.units["layer3"]]
        assert_close(new[name].detach(), old.detach() + sum(shifts) / len(shifts), claim=name, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_parts", "gigabytes"), [(2, 0.4546), (4, 0.7013), (8, 1.1948)])
def test_bytes_of_a_round_of_the_paper_are_those_of_the_formula(num_parts: int, gigabytes: float):
    """The paper reports 0.454 for two parts; for four and eight it gives blocks to several parts."""
    with torch.device("meta"):
        model = ResNet(PreActBlock, (3, 4, 23, 3), width=64, num_classes=100)
    model.bn1 = nn.Identity()  # as in the released code
    method = ResIST(num_parts=num_parts)
    axes = method.find_axes(model)
    sent = sum(2 * 4 * sizes_of(extract(model, part, axes=axes)) for part in method.deal(axes, generators(num_parts)))
    split, whole = 22 * 1_180_672, sizes_of(model)
    assert whole == 41_396_900
    assert sent == 2 * 4 * (num_parts * (whole - split) + split)
    assert round(sent / 1e9, 4) == gigabytes


def test_a_copy_of_a_block_costs_its_bytes_and_no_more():
    trainer = SubnetTrainer(preact_resnet(), ResIST(num_parts=3, num_local_steps=1, min_blocks=2), optimizer=SGD).fit(image_loader(), num_rounds=1)
    model, block = preact_resnet(), sizes_of(preact_resnet().layer3[1])
    assert sum(part.parameters for part in trainer.history[0].parts) == 3 * (sizes_of(model) - 3 * block) + 6 * block


def test_the_section_with_the_most_blocks_is_split_unless_another_is_named():
    model = preact_resnet((3, 3, 5, 3))
    assert [axis.name for axis in coupled_axes(model, kinds=["blocks"])] == ["layer1", "layer2", "layer3", "layer4"]
    assert [axis.name for axis in ResIST().find_axes(model)] == ["layer3"]
    assert [axis.name for axis in ResIST(num_parts=2, section="layer2").find_axes(model)] == ["layer2"]
    assert [axis.name for axis in ResIST(num_parts=2).find_axes(preact_resnet((3, 4, 4, 3)))] == ["layer1"]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_it_learns_with_and_without_a_barrier(mode: Any):
    method = ResIST(num_parts=2, num_local_steps=4)
    data = image_loader(48, batch_size=16)
    trainer = SubnetTrainer(preact_resnet((1, 1, 5, 1)), method, optimizer=OptimizerSettings(lr=0.02), mode=mode).fit(data, num_rounds=6)
    assert trainer.history[-1].loss_after_local < 0.5 * trainer.history[0].loss_after_split
    assert trainer.model(images(8)).isfinite().all()


def test_a_ticket_is_a_shallower_network():
    trainer = SubnetTrainer(preact_resnet((1, 1, 5, 1)), ResIST(num_parts=2, num_local_steps=1), optimizer=SGD).fit(image_loader(), num_rounds=1)
    ticket = trainer.ticket(0.5).model
    assert len(ticket.layer3) == 3
    assert ticket(images(8)).shape == (3, 5)


@pytest.mark.parametrize(
    ("method", "model", "code", "text"),
    [
        (ResIST(), tiny_resnet(), "post-activation", r"got layer3\.1 with an activation behind its addition, .* or pass allow_post_activation=True"),
        (
            ResIST(num_parts=4),
            preact_resnet(),
            "too-many-parts",
            r"got 4 parts, but layer3 has 3 blocks, .*Use 3 parts or fewer, or pass min_blocks=1",
        ),
        (ResIST(min_blocks=4), preact_resnet(), "minimum-above-size", r"got min_blocks=4, but layer3 has 3 blocks\. Pass min_blocks=3 or less"),
        (
            ResIST(section="layer2"),
            preact_resnet(),
            "unknown-section",
            r"got section='layer2', expected one with two or more residual blocks that keep the shape of their input: layer1 \(2 blocks\), layer3 \(3 blocks\)",
        ),
        (ResIST(), preact_resnet((1, 2, 2, 2)), "no-axes", r"got a ResNet without a section of two or more residual blocks that keep the shape"),
        (ResIST(), tiny_mlp(6, 8, 4), "no-axes", r"got a Sequential without a section .* or IST for other networks"),
        (ResIST(), tiny_decoder("Llama"), "no-axes", r"got a LlamaForCausalLM without a section"),
    ],
)
def test_models_that_it_cannot_split_are_refused_before_the_first_round(method: ResIST, model: nn.Module, code: str, text: str):
    with pytest.raises(InputError, match=text) as caught:
        SubnetTrainer(model, method, optimizer=SGD)
    assert caught.value.code == code


def test_settings_that_cannot_be_used_are_refused_at_once():
    with pytest.raises(InputError, match=r"min_blocks=-1 must be an integer of at least 0"):
        ResIST(min_blocks=-1)
    with pytest.raises(InputError, match=r"got optimizer_state='none' with sgd and momentum 0\.9, .*choose 'reset' or 'carry'"):
        SubnetTrainer(preact_resnet(), ResIST(num_parts=2, optimizer_state="none"), optimizer=MOMENTUM).fit(loader(), num_rounds=1)


def test_blocks_that_change_their_input_are_in_every_part():
    model = preact_resnet()
    [axis] = ResIST(num_parts=3).find_axes(model)
    assert axis.blocks == ("layer3.1", "layer3.2", "layer3.3")
    for part in ResIST(num_parts=3).deal((axis,), generators(3)):
        small = extract(model, part, axes=(axis,))
        assert torch.equal(small.layer3[0].conv1.weight, model.layer3[0].conv1.weight)
        assert len(small.layer3) == 2


def test_its_repr_builds_it_again():
    method = ResIST(num_parts=2, section="layer3", min_blocks=3, allow_post_activation=True)
    assert eval(repr(method)) == method  # noqa: S307 - our own repr
