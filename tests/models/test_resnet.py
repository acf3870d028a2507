"""Claims about filters and residual blocks of convolutional networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model_families import images
from partwise.checks import InputError
from partwise.models import BlockAxis, DisjointSampler, Member, Part, coupled_axes, extract, mask, merge, tensors_of
from tiny import BasicBlock, Bottleneck, PreActBlock, tiny_mlp, tiny_resnet
from tolerances import assert_close

INPUTS = images(16)


def by_name(model: nn.Module, **options: Any) -> dict[str, Any]:
    return {axis.name: axis for axis in coupled_axes(model, **options)}


class PlainNet(nn.Module):
    """Convolutions, pooling and two linear layers, with a flattening that gives each channel several columns."""

    def __init__(self, *, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, groups=groups)
        self.hidden, self.last = nn.Linear(6 * 16, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = nn.functional.avg_pool2d(torch.relu(self.conv2(x)), 2)
        return self.last(torch.relu(self.hidden(x.view(x.size(0), -1))))


def test_the_inner_width_of_a_block_is_an_axis_and_its_outputs_are_not():
    axes = by_name(tiny_resnet(), kinds=["filters"])
    assert list(axes) == [f"layer{section}.{block}.conv1" for section, depth in enumerate((2, 1, 4, 1), start=1) for block in range(depth)]
    inner = axes["layer3.1.conv1"]
    of_norm = {Member(f"layer3.1.bn1.{tensor}", 0) for tensor in ("weight", "bias", "running_mean", "running_var")}
    assert set(inner.members) == {Member("layer3.1.conv1.weight", 0), Member("layer3.1.conv2.weight", 1)} | of_norm
    assert inner.readers == ("layer3.1.conv2.weight",)


def test_a_bottleneck_has_two_inner_widths():
    names = [axis for axis in by_name(tiny_resnet(Bottleneck), kinds=["filters"]) if axis.startswith("layer3.2")]
    assert names == ["layer3.2.conv1", "layer3.2.conv2"]


@pytest.mark.parametrize(
    ("block", "closers"),
    [
        (BasicBlock, ("layer3.2.bn2.weight", "layer3.2.bn2.bias")),
        (Bottleneck, ("layer3.2.bn3.weight", "layer3.2.bn3.bias")),
        (PreActBlock, ("layer3.2.conv2.weight",)),
    ],
)
def test_blocks_that_keep_their_input_can_be_left_out_and_strided_ones_cannot(block: Any, closers: tuple[str, ...]):
    section = by_name(tiny_resnet(block), kinds=["blocks"])["layer3"]
    assert isinstance(section, BlockAxis)
    assert section.blocks == ("layer3.1", "layer3.2", "layer3.3")
    assert section.children == ("layer3.0", "layer3.1", "layer3.2", "layer3.3")
    assert section.closers[1] == closers


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck, PreActBlock])
def test_a_part_without_a_block_is_the_network_that_goes_round_it(block: Any):
    model = tiny_resnet(block)
    small = extract(model, Part({"layer3": (0, 2)}))
    assert [type(child) for child in small.layer3] == [block] * 3
    assert list(small.layer3._modules) == ["0", "1", "2"]
    assert torch.equal(small.layer3[2].conv1.weight, model.layer3[3].conv1.weight)
    model.layer3[2] = nn.Identity()
    assert_close(small(INPUTS), model(INPUTS), claim="the same layers in the same order", rtol=0, atol=0)


def test_blocks_behind_an_absent_one_go_back_to_their_own_place():
    model = tiny_resnet()
    part = Part({"layer3": (1,), "layer3.2.conv1": (0, 5)})
    small = extract(model, part)
    with torch.no_grad():
        small.layer3[1].conv1.weight.fill_(7.0)
    merged = merge(model, [(part, small)])
    changed = {name for name, old in tensors_of(model).items() if not torch.equal(old, tensors_of(merged)[name])}
    assert changed == {"layer3.2.conv1.weight"}
    assert (merged.layer3[2].conv1.weight == 7.0).all(dim=3).all(dim=2).all(dim=1).nonzero().flatten().tolist() == [0, 5]


@settings(max_examples=8)
@given(
    block=st.sampled_from([BasicBlock, Bottleneck, PreActBlock]),
    depths=st.tuples(*[st.integers(1, 3)] * 4),
    width=st.integers(2, 5),
    num_parts=st.integers(1, 2),
    seed=st.integers(0, 100),
)
def test_any_resnet_dealt_to_parts_slices_as_it_masks_and_merges_to_itself(block: Any, depths: tuple[int, ...], width: int, num_parts: int, seed: int):
    model = tiny_resnet(block, depths, width=width, seed=seed).double()
    axes = coupled_axes(model)
    parts = DisjointSampler()(axes, [np.random.default_rng((seed, part)) for part in range(num_parts)])
    smalls = [extract(model, part, axes=axes) for part in parts]
    for part, small in zip(parts, smalls, strict=True):
        assert_close(small(INPUTS.double()), mask(model, part, axes=axes)(INPUTS.double()), claim="slicing is masking")
    merged = merge(model, zip(parts, smalls, strict=True), axes=axes)
    assert all(torch.equal(old, new) for old, new in zip(tensors_of(model).values(), tensors_of(merged).values(), strict=True))


def test_linear_blocks_at_one_over_num_parts_are_the_mean_of_the_parts_to_first_order():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    model = nn.Sequential(nn.Sequential(*[Branch() for _ in range(4)])).double()
    for branch in model[0]:
        branch.conv.weight.data *= 1e-4
    [axis] = coupled_axes(model, kinds=["blocks"])
    parts = DisjointSampler()([axis], [np.random.default_rng(part) for part in range(2)])
    inputs = images(4)[:, :2].double()
    mean = torch.stack([extract(model, part)(inputs) for part in parts]).mean(dim=0)
    for branch in model[0]:
        branch.conv.weight.data /= 2
    assert_close(mean, model(inputs), claim="what is left is of second order in the branches", rtol=0, atol=1e-7)


def test_channels_keep_all_their_columns_where_images_are_flattened():
    axes = by_name(PlainNet())
    assert {name: (axis.kind, axis.size) for name, axis in axes.items()} == {
        "conv1": ("filters", 4),
        "conv2": ("filters", 6),
        "hidden": ("neurons", 10),
    }
    assert Member("hidden.weight", 1, 16) in axes["conv2"].members
    model, part = PlainNet(), Part({"conv1": (0, 3), "conv2": (1, 4, 5), "hidden": (2, 9)})
    small = extract(model, part)
    assert repr(small.hidden) == "Linear(in_features=48, out_features=2, bias=True)"
    assert_close(small(images(16)), mask(model, part)(images(16)), claim="slicing is masking", rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (PlainNet(groups=2), r"conv1 is read by conv2, a convolution in 2 groups"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1)), r"0 is a convolution in 4 groups"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)), r"0 passes 1, a GroupNorm"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)), r"0 is read by 2, which has 4 inputs for its 4 units in an order that is not theirs"),
    ],
)
def test_filters_that_are_tied_together_are_refused_by_name(model: nn.Module, text: str):
    with pytest.raises(InputError, match=text):
        coupled_axes(model)


def test_a_block_shared_between_two_places_is_refused_by_name():
    model = tiny_resnet()
    model.layer3[2].bn2.weight = model.layer3[1].bn2.weight
    with pytest.raises(InputError, match=r"layer3\.1\.bn2\.weight and layer3\.2\.bn2\.weight are one tensor"):
        coupled_axes(model)


def test_a_section_without_a_block_is_refused():
    with pytest.raises(InputError, match=r"got a part without units of layer3, expected 1 to 3 of them"):
        extract(tiny_resnet(), Part({"layer3": ()}))


def test_perceptrons_are_no_convolutional_networks():
    with pytest.raises(InputError, match=r"kind of axis of Sequential='filters' is not known\. Choose one of: neurons\."):
        coupled_axes(tiny_mlp(3, 4, 2), kinds=["filters"])
