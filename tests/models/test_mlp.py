"""Claims about axes of perceptrons, and about what ties their units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from partwise.checks import InputError
from partwise.models import DisjointSampler, Member, Part, coupled_axes, extract, mask, merge, tensors_of
from tiny import tiny_mlp
from tolerances import assert_close


class Handwritten(nn.Module):
    """Hidden layers in a forward pass of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        x = nn.functional.relu(self.norm(self.first(x)))
        x = torch.tanh(0.5 * self.second(x) + 1)
        return torch.log_softmax(self.last(nn.functional.dropout(x, training=self.training)), dim=-1)


@settings(max_examples=40)
@given(
    widths=st.lists(st.integers(1, 9), min_size=3, max_size=5),
    norm=st.booleans(),
    bias=st.booleans(),
    num_parts=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_any_perceptron_dealt_to_any_parts_slices_as_it_masks_and_merges_to_itself(
    widths: list[int], norm: bool, bias: bool, num_parts: int, seed: int
):
    model = tiny_mlp(*widths, norm=norm, bias=bias, seed=seed).double()
    axes = coupled_axes(model)
    assert [axis.size for axis in axes] == widths[1:-1]
    narrowest = min(axis.size for axis in axes)
    parts = DisjointSampler()(axes, [np.random.default_rng((seed, part)) for part in range(min(num_parts, narrowest))])
    inputs = torch.randn(3, widths[0], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    smalls = [extract(model, part, axes=axes) for part in parts]
    for part, small in zip(parts, smalls, strict=True):
        assert_close(small(inputs), mask(model, part, axes=axes)(inputs), claim="slicing is masking")
        assert [layer.out_features for layer in small if isinstance(layer, nn.Linear)][:-1] == [len(part.units[axis.name]) for axis in axes]
    merged = merge(model, zip(parts, smalls, strict=True), axes=axes)
    assert all(torch.equal(old, new) for old, new in zip(tensors_of(model).values(), tensors_of(merged).values(), strict=True))


def test_hidden_layers_are_found_by_following_the_data_whatever_their_names():
    first, second = coupled_axes(Handwritten())
    assert (first.name, first.kind, first.size) == ("first", "neurons", 6)
    of_norm = {Member(f"norm.{tensor}", 0) for tensor in ("weight", "bias", "running_mean", "running_var")}
    assert set(first.members) == {Member("first.weight", 0), Member("first.bias", 0), Member("second.weight", 1)} | of_norm
    assert set(second.members) == {Member("second.weight", 0), Member("last.weight", 1)}
    assert (first.readers, second.readers) == (("second.weight",), ("last.weight",))


def test_a_handwritten_network_slices_as_it_masks():
    model = Handwritten().eval()
    part = Part({"first": (0, 2, 5), "second": (1, 4)})
    inputs = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    assert_close(extract(model, part)(inputs), mask(model, part)(inputs), claim="slicing is masking", rtol=0, atol=1e-6)


def test_layers_know_their_new_sizes():
    small = extract(tiny_mlp(6, 8, 4, norm=True), Part({"0": (1, 2, 3)}))
    assert repr(small[0]) == "Linear(in_features=6, out_features=3, bias=True)"
    assert small[1].num_features == 3
    assert repr(small[3]) == "Linear(in_features=3, out_features=4, bias=True)"


def test_training_a_part_leaves_the_other_units_as_they_were():
    model = tiny_mlp(6, 8, 4)
    part = Part({"0": (1, 2, 3)})
    small = extract(model, part).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    merged = merge(model, [(part, small)])
    others = [0, 4, 5, 6, 7]
    assert torch.equal(merged[0].weight[others], model[0].weight[others])
    assert torch.equal(merged[0].weight[[1, 2, 3]], small[0].weight)
    assert not torch.equal(small[0].weight, model[0].weight[[1, 2, 3]])


@pytest.mark.parametrize(
    ("between", "text"),
    [
        (nn.LayerNorm(6), r"0 passes 1, a LayerNorm, expected its units to pass one by one"),
        (nn.GroupNorm(2, 6), r"0 passes 1, a GroupNorm"),
        (nn.Softmax(dim=1), r"0 passes 1, a Softmax"),
        (nn.MaxPool2d(1), r"0 passes 1, a MaxPool2d"),
        (nn.BatchNorm1d(7), r"0 passes 1, which normalises 7 features instead of its 6 units"),
    ],
)
def test_what_mixes_the_units_of_a_hidden_layer_is_refused_by_name(between: nn.Module, text: str):
    with pytest.raises(InputError, match=text):
        coupled_axes(nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 3)))


def test_a_layer_used_twice_is_refused_by_name():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.inner(torch.relu(self.inner(x)))))

    with pytest.raises(InputError, match=r"inner is used 2 times in one pass, expected once\. Give each place a layer of its own\."):
        coupled_axes(Twice())


def test_weights_tied_along_an_axis_are_refused_by_both_names():
    model = tiny_mlp(6, 6, 6, 4)
    model[2].weight = model[0].weight
    with pytest.raises(InputError, match=r"0\.weight and 2\.weight are one tensor, expected every tensor along an axis to be used in one place\."):
        coupled_axes(model)


def test_flattened_features_of_a_sequence_are_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    with pytest.raises(InputError, match=r"0 is read by 3, which has 18 inputs for its 6 units in an order that is not theirs"):
        coupled_axes(model)


def test_a_forward_pass_that_branches_on_its_input_is_refused():
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(InputError, match=r"got a Branching whose forward pass cannot be followed by torch\.fx \(.*\), expected one without branches"):
        coupled_axes(Branching(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)))


def test_a_network_without_hidden_layers_is_refused():
    with pytest.raises(InputError, match=r"Linear has no neurons that could be left out, expected a hidden layer that only other layers read"):
        coupled_axes(nn.Linear(3, 2))


def test_layers_whose_units_join_a_shared_stream_make_no_axis():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up, self.down, self.head = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.down(torch.relu(self.up(x))))

    assert [axis.name for axis in coupled_axes(Residual())] == ["up"]
