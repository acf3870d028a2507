"""Claims about walks: what they show is what an ordinary forward pass computes, and they hold one layer of it."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_families import FAMILIES, IDS, outputs, rows
from partwise.checks import InputError
from partwise.models import BlockAxis, CoupledAxis, Part, coupled_axes, masked_tensors, tensors_of, with_tensors
from partwise.models.walks import Batch, Walk, start_walk
from tiny import tiny_decoder, tiny_llama, tiny_mamba2, tiny_mlp, tiny_resnet

PADDED = {"input_ids": torch.tensor([[3, 7, 1, 12, 9], [5, 5, 2, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
ON_THE_LEFT = {"input_ids": torch.tensor([[3, 7, 1, 12, 9], [0, 0, 5, 5, 2]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])}
# A window that is shorter than the rows, in all layers or in the second one.
WINDOWS = {
    "mistral-with-a-window": lambda: tiny_decoder("Mistral", sliding_window=3),
    "qwen2-with-two-kinds-of-layers": lambda: tiny_decoder(
        "Qwen2", use_sliding_window=True, sliding_window=3, layer_types=["full_attention", "sliding_attention"]
    ),
}
BUILDERS = {name: builder for name, (builder, _) in FAMILIES.items()} | WINDOWS
TEXT = [name for name in BUILDERS if not name.startswith(("mlp", "resnet", "vit"))]


def axes_of(model: nn.Module) -> list[CoupledAxis]:
    return [axis for axis in coupled_axes(model) if not isinstance(axis, BlockAxis)]


def batches_for(family: str) -> list[Batch]:
    if family in WINDOWS:
        return [Batch({"input_ids": IDS}), Batch({"input_ids": IDS[:1, :4]})]
    inputs = FAMILIES[family][1]
    pieces = [inputs, inputs[:1]]
    return [Batch(piece if family.startswith(("mlp", "resnet")) else {"pixel_values" if family == "vit" else "input_ids": piece}) for piece in pieces]


def places_of(axis: CoupledAxis) -> list[str]:
    """Modules whose inputs are worth a look: those that read the units, or the one behind which states begin."""
    if axis.kind == "states":
        return [f"{axis.name.removesuffix('.state')}.{module}" for module in ("in_proj", "out_proj")]
    return [reader.removesuffix(".weight") for reader in axis.readers]


def shown_by(walk: Walk, axis: CoupledAxis) -> dict[tuple[str, str], list[Tensor]]:
    """(input or output, module) -> what the walk shows of it, batch by batch."""
    found: dict[tuple[str, str], list[Tensor]] = {}

    def note(side: str, name: str) -> Any:
        return lambda values, batch: found.setdefault((side, name), []).append(values.clone())

    walk.observe(axis, inputs={name: note("input", name) for name in places_of(axis)}, outputs={name: note("output", name) for name in places_of(axis)})
    return found


def seen_in_forward_passes(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[tuple[str, str], list[Tensor]]:
    """The same from ordinary forward passes of the whole model."""
    found: dict[tuple[str, str], list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.setdefault(("input", name), []).append(inputs[0].clone())
            found.setdefault(("output", name), []).append(output.clone())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            _ = model(**batch.inputs) if isinstance(batch.inputs, dict) else model(batch.inputs)
    for handle in handles:
        handle.remove()
    return found


def assert_same(found: dict[tuple[str, str], list[Tensor]], expected: dict[tuple[str, str], list[Tensor]], *, claim: str) -> None:
    assert found
    for place, values in found.items():
        assert len(values) == len(expected[place]), (claim, place)
        assert all(torch.equal(one, other) for one, other in zip(values, expected[place], strict=True)), (claim, place)


@pytest.mark.parametrize("family", BUILDERS)
def test_at_every_stop_a_walk_shows_what_an_ordinary_forward_pass_computes(family: str):
    model, batches = BUILDERS[family](), batches_for(family)
    axes = axes_of(model)
    expected = seen_in_forward_passes(model, [name for axis in axes for name in places_of(axis)], batches)
    with start_walk(model, axes, batches) as walk:
        assert {axis.name for axis in walk.axes} == {axis.name for axis in axes}
        for axis in walk.axes:
            walk.go_to(axis)
            assert_same(shown_by(walk, axis), expected, claim="shown at the first look")
            assert_same(shown_by(walk, axis), expected, claim="a second look sees the same")


@pytest.mark.parametrize("padded", [PADDED, ON_THE_LEFT], ids=["right", "left"])
@pytest.mark.parametrize("family", TEXT)
def test_padding_masks_reach_every_layer(family: str, padded: dict[str, Tensor]):
    model, batches = BUILDERS[family](), [Batch(padded, real=padded["attention_mask"].bool())]
    axes = axes_of(model)
    expected = seen_in_forward_passes(model, [name for axis in axes for name in places_of(axis)], batches)
    with start_walk(model, axes, batches) as walk:
        for axis in walk.axes:
            walk.go_to(axis)
            assert_same(shown_by(walk, axis), expected, claim="with padding")


@pytest.mark.parametrize("family", BUILDERS)
def test_what_was_replaced_takes_effect_further_on_and_the_model_stays_as_it_was(family: str):
    model, batches = BUILDERS[family](), batches_for(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    axes, units = axes_of(model), {}
    with start_walk(model, axes, batches) as walk:
        for axis in walk.axes:
            walk.go_to(axis)
            pruned = with_tensors(model, tensors_of(model) | masked_tensors(tensors_of(model), axes, Part(units)))
            assert_same(shown_by(walk, axis), seen_in_forward_passes(pruned, places_of(axis), batches), claim="behind what was replaced")
            units[axis.name] = (0,)
            walk.replace(masked_tensors(tensors_of(model) | walk.replaced, [axis], Part({axis.name: (0,)})))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", BUILDERS)
def test_tensors_that_were_replaced_are_let_go_when_the_walk_has_passed_them(family: str):
    model = BUILDERS[family]()
    axes = axes_of(model)
    with start_walk(model, axes, batches_for(family)) as walk:
        for axis in walk.axes:
            walk.go_to(axis)
            walk.replace(masked_tensors(tensors_of(model) | walk.replaced, [axis], Part({axis.name: (0,)})))
        last = max(len(masked_tensors(tensors_of(model), [axis], Part({axis.name: (0,)}))) for axis in axes)
        assert len(walk.replaced) <= 2 * last  # those of one block: heads and neurons, or of the axes that overlap


def test_a_walk_through_blocks_holds_the_hidden_states_of_one_layer_whatever_the_depth():
    for depth in (2, 6):
        model = tiny_decoder("Llama", num_hidden_layers=depth)
        with start_walk(model, axes_of(model), [Batch({"input_ids": IDS}), Batch({"input_ids": IDS[:1]})]) as walk:
            for axis in walk.axes:
                walk.go_to(axis)
                assert walk.activation_bytes == (IDS.numel() + IDS[:1].numel()) * 32 * 4


def test_a_walk_through_a_graph_holds_only_what_is_still_to_be_used():
    model = tiny_mlp(6, *[8] * 12, 4)
    with start_walk(model, axes_of(model), [Batch(rows(6))] * 3) as walk:
        for axis in walk.axes:
            walk.go_to(axis)
            assert walk.activation_bytes <= 3 * 4 * 8 * 4, "three batches of four rows of eight numbers"
    residual = tiny_resnet(depths=(2, 2, 2, 2))
    images = torch.randn(3, 3, 16, 16)
    with start_walk(residual, axes_of(residual), [Batch(images)]) as walk:
        for axis in walk.axes:
            walk.go_to(axis)
            assert walk.activation_bytes <= 3 * 4 * 16 * 16 * 4, "the stream before a block, which the block and its shortcut read"


def test_outputs_of_layers_that_nobody_reads_any_more_are_freed_on_the_way():
    model = tiny_mlp(6, *[8] * 12, 4)
    made: list[weakref.ref[Tensor]] = []
    alive = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        made.append(weakref.ref(output))
        alive.append(sum(reference() is not None for reference in made))

    axes = axes_of(model)
    for module in model:
        module.register_forward_hook(note)
    with start_walk(model, axes, [Batch(rows(6))]) as walk:
        walk.go_to(axes[-1])
    assert len(made) == 22
    assert max(alive) <= 3


class InPlace(nn.Module):
    """Writes into its input, and into a stream that a later layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.third, self.fourth = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mul_(2)
        kept = self.first(x)
        x += self.second(kept.relu_())
        kept = self.third(x)
        x.add_(1)
        return self.last(x + self.fourth(torch.nn.functional.relu(kept)))


def test_networks_that_write_into_their_activations_show_the_same_at_every_look_and_leave_the_data_alone():
    torch.manual_seed(0)
    model, data = InPlace().eval(), rows(6)
    axes, before = axes_of(model), data.clone()
    expected = seen_in_forward_passes(model, ["second", "fourth"], [Batch(data.clone())])
    with start_walk(model, axes, [Batch(data)]) as walk:
        for axis in walk.axes:
            walk.go_to(axis)
            for look in range(3):
                assert_same(shown_by(walk, axis), expected, claim=f"look {look}")
    assert torch.equal(data, before)


class Backwards(nn.Module):
    """Modules are made in another order than the data pass them."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.second, self.first = nn.Linear(5, 2), nn.Linear(7, 5), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def test_stops_are_in_the_order_in_which_the_data_pass_whatever_the_order_of_axes():
    model = Backwards()
    axes = axes_of(model)
    for order in (axes, axes[::-1]):
        with start_walk(model, order, [Batch(rows(6))]) as walk:
            assert [axis.name for axis in walk.axes] == ["first", "second"]


@contextlib.contextmanager
def state_of_everything(model: nn.Module) -> Iterator[None]:
    """Assert that a block changes neither modes, hooks, instance attributes, weights nor whether gradients are on."""
    def facts() -> list[tuple[Any, ...]]:
        return [
            (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)), "forward" in vars(module))
            for module in model.modules()
        ]

    before, weights, gradients = facts(), copy.deepcopy(model.state_dict()), torch.is_grad_enabled()
    yield
    assert facts() == before
    assert torch.is_grad_enabled() == gradients
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "mamba2", "resnet"])
def test_a_walk_runs_without_gradients_in_evaluation_mode_and_leaves_modes_as_mixed_as_they_were(family: str):
    model, batches = BUILDERS[family](), batches_for(family)
    model.train()
    next(iter(model.children())).eval()  # one part is frozen
    with state_of_everything(model), start_walk(model, axes_of(model), batches) as walk:
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        walk.go_to(walk.axes[-1])
        assert not any(values.requires_grad for values in next(iter(shown_by(walk, walk.axes[-1]).values())))


@pytest.mark.parametrize("family", ["llama", "mamba2", "resnet"])
def test_a_hook_that_fails_leaves_no_traces(family: str):
    def fail(values: Tensor, batch: Batch) -> None:
        raise RuntimeError("of the hook")

    model = BUILDERS[family]().train()
    with state_of_everything(model), pytest.raises(RuntimeError, match="of the hook"), start_walk(model, axes_of(model), batches_for(family)) as walk:
        walk.go_to(walk.axes[1])
        walk.observe(walk.axes[1], inputs={places_of(walk.axes[1])[0]: fail})


def test_data_that_a_model_cannot_read_leave_no_traces_either():
    model = tiny_llama().train()
    with state_of_everything(model), pytest.raises(IndexError), start_walk(model, axes_of(model), [Batch({"input_ids": torch.tensor([[10**6]])})]):
        pass


def test_hooks_of_the_user_are_called_as_ever_and_stay():
    model, calls = tiny_llama(), []
    handle = model.model.layers[0].register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    with start_walk(model, axes_of(model), [Batch({"input_ids": IDS})]) as walk:
        walk.go_to(walk.axes[-1])
    assert calls
    assert handle.id in model.model.layers[0]._forward_hooks


@pytest.mark.parametrize(
    ("builder", "tensor", "where"),
    [
        (tiny_llama, "model.layers.0.mlp.down_proj.weight", r"in model\.layers\.0,"),
        (tiny_llama, "model.layers.1.mlp.up_proj.weight", r"in the input of model\.layers\.1\.mlp\.down_proj,"),
        (tiny_mamba2, "backbone.layers.0.mixer.A_log", r"in backbone\.layers\.0,"),
        (tiny_mamba2, "backbone.layers.1.mixer.in_proj.weight", r"in the output of backbone\.layers\.1\.mixer\.in_proj,"),
        (lambda: tiny_mlp(6, 8, 12, 4), "0.weight", r"in 0,"),
        (tiny_resnet, "layer2.0.bn1.bias", r"in layer2\.0\.bn1,"),
    ],
)
def test_activations_that_are_no_numbers_are_refused_where_they_arise(builder: Any, tensor: str, where: str):
    model = builder()
    with torch.no_grad():
        model.state_dict()[tensor].view(-1)[0] = float("nan")
    family = {"LlamaForCausalLM": "llama", "Mamba2ForCausalLM": "mamba2", "Sequential": "mlp", "ResNet": "resnet"}[type(model).__name__]
    text = rf"got NaN or infinite activations {where} expected finite numbers\. Check the calibration data, and load the model in float32"
    with pytest.raises(InputError, match=text) as caught, start_walk(model, axes_of(model), batches_for(family)) as walk:
        for axis in walk.axes:
            walk.go_to(axis)
            walk.observe(axis, **looks(axis))
    assert caught.value.code == "not-finite"


def looks(axis: CoupledAxis) -> dict[str, dict[str, Any]]:
    """As methods look: at the outputs of a projection for states, at the inputs of readers for the rest."""
    if axis.kind == "states":
        return {"outputs": {places_of(axis)[0]: lambda values, batch: None}}
    return {"inputs": {name: lambda values, batch: None for name in places_of(axis)}}


def test_a_walk_does_not_change_what_the_model_computes_afterwards():
    for family in ("llama", "mamba2", "resnet"):
        model, inputs = BUILDERS[family](), FAMILIES[family][1]
        before = outputs(model, inputs)
        with start_walk(model, axes_of(model), batches_for(family)) as walk:
            walk.go_to(walk.axes[-1])
        assert torch.equal(outputs(model, inputs), before)
