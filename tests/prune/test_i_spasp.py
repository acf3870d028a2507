"""Claims about i-SpaSP on models: importance is a gradient, what is alive is found, and half of the units or more means the largest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from model_families import FAMILIES, IDS, WITHOUT_READERS, outputs, rows
from partwise.checks import InputError
from partwise.linalg.sparse_recovery import recover_units
from partwise.models import tensors_of
from partwise.prune import ISpaSP, apply
from reading_layers import CASES, Case
from tiny import tiny_decoder, tiny_mamba2, tiny_mlp, tiny_resnet
from tolerances import assert_close

READ = [name for name in FAMILIES if name not in WITHOUT_READERS]
WINDOWS = {"steps and gaps", "a norm without weights", "pooling between", "two readers"}
LINEAR = [name for name in CASES if "border" not in name and "filters" not in name and name not in WINDOWS]


def gradients(case: Case, left: Tensor) -> dict[str, Tensor]:
    """Of half the squared distance between readers on everything and readers on the units that are not left, with respect to everything."""
    found = {}
    for reader, hidden in case.hidden().items():
        values = hidden.clone().requires_grad_()
        rest = case.output(reader, case.only(hidden, 1 - left)).detach()
        [found[reader]] = torch.autograd.grad(0.5 * (case.output(reader, values) - rest).square().sum(), [values])
    return found


def by_unit(case: Case, values: Tensor) -> Tensor:
    """(units, everything else)."""
    channels = values.movedim(1, 0) if values.ndim == 4 else values.movedim(-1, 0)
    return channels.reshape(case.axis.size, -1)


def importance_of(case: Case, left: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    with case.visit() as visit:
        sizes, importance = ISpaSP(**options)._gather(visit, with_sums=True)
    return sizes, importance(left)


def some(size: int, seed: int) -> Tensor:
    return (torch.rand(size, generator=torch.Generator().manual_seed(seed)) > 0.4).double()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_importance_is_the_gradient_that_autograd_finds_summed_over_inputs(name: str, seed: int):
    """Through real blocks, with borders, strides, norms and shortcuts."""
    case = CASES[name]()
    left = some(case.axis.size, seed)
    expected = torch.stack([by_unit(case, gradient).sum(1) for gradient in gradients(case, left).values()]).sum(0)
    sizes, found = importance_of(case, left)
    assert_close(found, expected, claim="signed sum over inputs and places", rtol=1e-8, atol=1e-9)
    expected = torch.stack([by_unit(case, hidden).abs().sum(1) for hidden in case.hidden().values()]).sum(0)
    assert_close(sizes, expected, claim="sum of absolute values", rtol=1e-9)


@pytest.mark.parametrize("name", LINEAR)
def test_the_size_of_importance_is_that_of_the_gradient_at_every_input(name: str):
    case = CASES[name]()
    left = some(case.axis.size, 0)
    expected = torch.stack([by_unit(case, gradient).square().sum(1) for gradient in gradients(case, left).values()]).sum(0).sqrt()
    assert_close(importance_of(case, left, importance="size")[1], expected, claim="nothing cancels", rtol=1e-8, atol=1e-9)


def test_the_size_of_importance_of_a_convolution_is_over_the_patches_that_it_reads():
    case = CASES["a border of zeros"]()
    left = some(case.axis.size, 0)
    [(reader, hidden)] = case.hidden().items()
    patches = torch.nn.functional.unfold(hidden, 3, padding=1).requires_grad_()  # (images, 6 * 9, places)
    weight: Any = case.model.get_submodule(reader.removesuffix(".weight")).weight.flatten(1)
    rest = (weight @ (patches * (1 - left).repeat_interleave(9)[:, None])).detach()
    [gradient] = torch.autograd.grad(0.5 * (weight @ patches - rest).square().sum(), [patches])
    expected = gradient.square().sum((0, 2)).view(6, 9).sum(1).sqrt()
    assert_close(importance_of(case, left, importance="size")[1], expected, claim="a value is counted at every place that reads it", rtol=1e-8)


def test_importance_of_neurons_is_what_the_head_sends_back_of_the_residual():
    """``W^T (U - U_S)``, summed over inputs."""
    case = CASES["neurons of a perceptron"]()
    left = some(case.axis.size, 3)
    [(reader, hidden)] = case.hidden().items()
    weight = tensors_of(case.model)[reader].detach()
    residual = hidden @ weight.T - (hidden * (1 - left)) @ weight.T
    assert_close(importance_of(case, left)[1], (residual @ weight).sum(0), claim="a linear head", rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "importance"), [*((name, "signed") for name in CASES), *((name, "size") for name in LINEAR)])
def test_units_are_those_of_the_iteration_on_autograd_s_gradients(name: str, importance: str):
    case = CASES[name]()

    def slowly(left: Tensor) -> Tensor:
        found = [by_unit(case, gradient) for gradient in gradients(case, left).values()]
        if importance == "signed":
            return torch.stack([each.sum(1) for each in found]).sum(0)
        return torch.stack([each.square().sum(1) for each in found]).sum(0).sqrt()

    sizes = torch.stack([by_unit(case, hidden).abs().sum(1) for hidden in case.hidden().values()]).sum(0)
    keep = max(1, int(0.3 * case.axis.size + 0.5))
    plan = ISpaSP(keep=0.3, importance=importance, kinds=(case.axis.kind,)).plan(case.model, [case.inputs])  # type: ignore[arg-type]
    assert plan.units[case.axis.name] == recover_units(slowly, sizes, keep=keep, num_iterations=20).units


@pytest.mark.parametrize("importance", ["signed", "size"])
def test_neurons_that_are_never_on_go_and_nothing_changes(importance: str):
    model = tiny_mlp(6, 60, 3, seed=2)
    with torch.no_grad():
        alive = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:12]
        dead = torch.ones(60, dtype=torch.bool)
        dead[alive] = False
        model[0].bias[dead] = -100.0
        model[0].bias[~dead] = 1.0
    plan = ISpaSP(keep=0.2, importance=importance).plan(model, rows(6))  # type: ignore[arg-type]
    assert plan.units["0"] == tuple(sorted(alive.tolist()))
    assert_close(apply(model, plan)(rows(6)), model(rows(6)), claim="all that is on is kept")


@pytest.mark.parametrize("family", READ)
@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_slicing_equals_masking(family: str, keep: float):
    build, inputs = FAMILIES[family]
    model = build(seed=2)
    plan = ISpaSP(keep=keep).plan(model, inputs)
    assert not plan.factors
    small, masked = apply(model, plan), apply(model, plan, as_mask=True)
    assert_close(outputs(small, inputs), outputs(masked, inputs), claim=f"{family}: the small model is the masked one", rtol=1e-5, atol=1e-5)


def test_keeping_everything_changes_no_bit():
    model = tiny_resnet()
    same = tensors_of(apply(model, ISpaSP(keep=1.0).plan(model, FAMILIES["resnet"][1])))
    assert all(torch.equal(same[name], tensor) for name, tensor in tensors_of(model).items())


@pytest.mark.parametrize("importance", ["signed", "size"])
def test_with_half_of_the_units_to_keep_the_largest_stay_whatever_reads_them(importance: str):
    model = tiny_mlp(6, 16, 4, seed=1)
    plan = ISpaSP(keep=0.5, importance=importance).plan(model, rows(6))  # type: ignore[arg-type]
    assert set(plan.units["0"]) == set(plan.scores["0"].topk(8).indices.tolist())
    with torch.no_grad():
        model[2].weight.normal_()
    assert ISpaSP(keep=0.5, importance=importance).plan(model, rows(6)).units == plan.units  # type: ignore[arg-type]
    few = ISpaSP(keep=0.2, importance=importance).plan(model, rows(6))  # type: ignore[arg-type]
    with torch.no_grad():
        model[2].weight[:, list(few.units["0"])] *= 1e-6
    assert ISpaSP(keep=0.2, importance=importance).plan(model, rows(6)).units != few.units, "with fewer it matters"  # type: ignore[arg-type]


def test_units_with_both_signs_are_large_by_their_absolute_values():
    model = tiny_decoder("Llama")
    found: list[Tensor] = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, arguments, output: found.append(arguments[0]))
    model(IDS)
    handle.remove()
    hidden = found[0].detach().double().flatten(0, 1)
    scores = ISpaSP().plan(model, IDS).scores["model.layers.0.mlp"]
    assert_close(scores, hidden.abs().sum(0), claim="the plain sum would cancel", rtol=1e-5)
    assert bool((hidden < 0).any())


def test_protected_units_stay_even_when_they_do_nothing():
    model = tiny_mlp(6, 20, 4)
    with torch.no_grad():
        model[0].bias[[3, 11]] = -100.0
    for keep in (0.2, 0.5):
        assert {3, 11}.isdisjoint(ISpaSP(keep=keep).plan(model, rows(6)).units["0"])
        plan = ISpaSP(keep=keep, protect=("0:3,11",)).plan(model, rows(6))
        assert {3, 11} < set(plan.units["0"])
        assert len(plan.units["0"]) == 20 * keep


def test_the_order_of_batches_makes_no_difference():
    for build, data in ((lambda: tiny_mlp(6, 16, 12, 4), torch.randn(24, 6)), (tiny_resnet, torch.randn(6, 3, 16, 16))):
        for importance in ("signed", "size"):
            method = ISpaSP(keep=0.25, importance=importance)  # type: ignore[arg-type]
            assert method.plan(build(), data.split(2)).units == method.plan(build(), data.split(2)[::-1]).units


def test_padding_counts_for_nothing():
    model = tiny_decoder("Llama")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    padded = ISpaSP(keep=0.25).plan(model, [{"input_ids": IDS, "attention_mask": mask}])
    apart = ISpaSP(keep=0.25).plan(model, [IDS[:1], IDS[1:, :3]])
    assert padded.num_tokens == apart.num_tokens == 8
    assert padded.units == apart.units


def test_a_model_in_training_mode_is_looked_at_in_evaluation_mode_and_left_as_it_was():
    model = tiny_resnet()
    quiet = ISpaSP(keep=0.25).plan(model, FAMILIES["resnet"][1])
    other = copy.deepcopy(model).train()
    before = {name: tensor.clone() for name, tensor in tensors_of(other).items()}
    assert ISpaSP(keep=0.25).plan(other, FAMILIES["resnet"][1]).units == quiet.units
    assert other.training
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(other).items())


def test_blocks_with_a_stride_and_a_shortcut_are_cut_like_any_other():
    """The published code leaves them out."""
    model = tiny_resnet()
    plan = ISpaSP(keep=0.25).plan(model, FAMILIES["resnet"][1])
    assert model.layer2[0].conv1.stride == (2, 2)
    assert len(plan.units["layer2.0.conv1"]) == 2


def test_images_of_different_sizes_may_be_mixed():
    model = tiny_resnet()
    plan = ISpaSP(keep=0.25).plan(model, [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 24, 16)])
    assert plan.num_tokens == 4


def test_what_no_layer_reads_is_refused():
    with pytest.raises(InputError, match=r"ISpaSP prunes neurons or filters, and Mamba2ForCausalLM has states only") as raised:
        ISpaSP().plan(tiny_mamba2(), IDS)
    assert raised.value.code == "kinds-absent"
    with pytest.raises(InputError, match=r"no layer reads the states of backbone\.layers\.0\.mixer\.state") as raised:
        ISpaSP(kinds=("states",)).plan(tiny_mamba2(), IDS)
    assert raised.value.code == "no-readers"


def test_bad_settings_are_refused_with_what_was_got():
    with pytest.raises(InputError, match=r"num_iterations=0 must be an integer of at least 1"):
        ISpaSP(num_iterations=0)
    with pytest.raises(InputError, match=r"importance='loud' is not known. Choose one of: signed, size"):
        ISpaSP(importance="loud")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"got keep=1.5, expected a fraction above 0 and at most 1"):
        ISpaSP(keep=1.5)
    with pytest.raises(InputError, match=r"expected at least one batch of inputs"):
        ISpaSP().plan(tiny_mlp(6, 8, 4))
