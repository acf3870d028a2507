"""Tickets of frozen weights: what they are in the limits, that nothing else changes, and what their plans hold."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from partwise.checks import InputError, RunError
from partwise.models import tensors_of
from partwise.prune import EdgePopup, WeightMaskPlan, apply, load_plan
from partwise.prune.edge_popup import maskable_weights, top_share
from tiny import tiny_llama, tiny_mlp, tiny_resnet
from tolerances import assert_close

FAST = {"num_epochs": 3, "perturb_epochs": 2}


def batches(*, num_batches: int = 4, rows: int = 16, width: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Which of the first three entries is the largest."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_batches * rows, width, generator=generator)
    return list(zip(inputs.split(rows), inputs[:, :3].argmax(1).split(rows), strict=True))


def image_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 5) for _ in range(2)]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def cosine(lr: float, step: int, num_steps: int) -> float:
    return lr * (1 + math.cos(math.pi * step / num_steps)) / 2


# --- limits


class Straight(torch.autograd.Function):
    """The step whose gradient is that of a line."""

    @staticmethod
    def forward(ctx: Any, sizes: Tensor, keep: float) -> Tensor:
        number = int(keep * sizes.numel() + 0.5)
        chosen = torch.zeros(sizes.numel())
        chosen[sizes.flatten().argsort(descending=True, stable=True)[:number]] = 1
        return chosen.view_as(sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def edge_popup_slowly(model: nn.Module, data: list[tuple[Tensor, Tensor]], method: EdgePopup) -> dict[str, Tensor]:
    """Edge-popup on an MLP of linear layers and ReLU, layer by layer, without this package."""
    layers = [module for module in model if isinstance(module, nn.Linear)]  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(method.seed)
    scores = []
    for layer in layers:
        limit = 1 / math.sqrt(layer.in_features)  # Kaiming uniform with a = sqrt(5)
        scores.append(torch.empty(layer.weight.shape).uniform_(-limit, limit, generator=generator).requires_grad_())
    speeds = [torch.zeros_like(score) for score in scores]
    num_steps, step = method.num_epochs * len(data), 0
    for _ in range(method.num_epochs):
        for inputs, labels in data:
            x = inputs
            for number, (layer, score) in enumerate(zip(layers, scores, strict=True)):
                x = nn.functional.linear(x, layer.weight.detach() * Straight.apply(score.abs(), method.keep), layer.bias.detach())
                x = x if number == len(layers) - 1 else x.relu()
            gradients = torch.autograd.grad(nn.functional.cross_entropy(x, labels), scores)
            for score, speed, gradient in zip(scores, speeds, gradients, strict=True):
                with torch.no_grad():
                    speed.mul_(method.momentum).add_(gradient + method.weight_decay * score)
                    score -= cosine(method.lr, step, num_steps) * speed
            step += 1
    return {f"{2 * number}.weight": Straight.apply(score.detach().abs(), method.keep).bool() for number, score in enumerate(scores)}


@pytest.mark.parametrize(("keep", "weight_decay", "momentum"), [(0.5, 0.0, 0.9), (0.3, 0.0, 0.0), (0.7, 0.05, 0.9)])
def test_with_radius_0_it_is_plain_edge_popup(keep: float, weight_decay: float, momentum: float) -> None:
    model = tiny_mlp(6, 12, 8, 3)
    method = EdgePopup(keep=keep, weight_decay=weight_decay, momentum=momentum, num_epochs=4)
    plan, expected = method.plan(model, batches()), edge_popup_slowly(model, batches(), method)
    assert same(dict(plan.masks), expected)
    assert not plan.moved
    start = edge_popup_slowly(model, batches(), EdgePopup(keep=keep, num_epochs=1, lr=1e-12))
    assert not same(expected, start), "otherwise training the scores did nothing"


def test_weight_decay_of_the_scores_changes_the_ticket() -> None:
    plain, decayed = (EdgePopup(weight_decay=decay).plan(tiny_mlp(6, 12, 8, 3), batches()) for decay in (0.0, 0.05))
    assert not same(dict(plain.masks), dict(decayed.masks))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_an_infinite_radius_the_weights_are_those_of_plain_sgd(momentum: float) -> None:
    model, theirs, data = tiny_mlp(6, 12, 8, 3), tiny_mlp(6, 12, 8, 3), batches()
    plan = EdgePopup(radius=math.inf, keep=1.0, momentum=momentum, **FAST).plan(model, data)
    weights = [module.weight for module in theirs if isinstance(module, nn.Linear)]
    optimizer, num_steps = torch.optim.SGD(weights, lr=0.1, momentum=momentum), 2 * len(data)
    for step, (inputs, labels) in enumerate([*data, *data]):
        optimizer.param_groups[0]["lr"] = cosine(0.1, step, num_steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(inputs), labels).backward()
        optimizer.step()
    assert same(tensors(apply(model, plan)), tensors(theirs))
    assert plan.moved.keys() == plan.masks.keys(), "biases do not move"


def test_with_all_weights_and_radius_0_the_ticket_is_the_model_itself() -> None:
    for model, data in ((tiny_mlp(6, 8, 3, norm=True), batches()), (tiny_resnet(), image_batches())):
        plan = EdgePopup(keep=1.0).plan(model, data)
        assert all(mask.all() for mask in plan.masks.values())
        assert same(tensors(apply(model, plan)), tensors(model))


@given(st.floats(1e-4, 0.3), st.integers(0, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_weight_of_a_plan_is_further_from_its_start_than_the_radius(radius: float, seed: int, dtype: torch.dtype) -> None:
    model = tiny_mlp(6, 8, 3, seed=seed).to(dtype)
    data = [(inputs.to(dtype), labels) for inputs, labels in batches(num_batches=2)]
    plan = EdgePopup(radius=radius, perturb_epochs=2, num_epochs=1, perturb_lr=1.0).plan(model, data)
    before = tensors(model)
    for name, moved in plan.moved.items():
        assert float((moved.double() - before[name].double()).abs().max()) <= radius


def test_the_first_step_is_the_same_whatever_is_chosen_afterwards() -> None:
    model = tiny_mlp(6, 12, 8, 3)
    some, others = (EdgePopup(radius=0.05, keep=keep, **FAST).plan(model, batches()) for keep in (0.5, 0.2))
    assert same(dict(some.moved), dict(others.moved))


# --- what is chosen


@given(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_top_share_is_what_a_stable_sort_puts_first(values: list[float], keep: float) -> None:
    number = max(1, int(Fraction(keep) * len(values) + Fraction(1, 2)))
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))
    chosen = top_share(torch.tensor(values), keep)
    assert chosen.nonzero().flatten().tolist() == sorted(order[:number])


@given(st.floats(0.01, 1), st.integers(0, 3))
def test_every_layer_keeps_the_same_share(keep: float, seed: int) -> None:
    plan = EdgePopup(keep=keep, num_epochs=1, seed=seed).plan(tiny_mlp(6, 9, 3), batches(num_batches=1))
    assert {name: int(mask.sum()) for name, mask in plan.masks.items()} == {
        "0.weight": max(1, int(keep * 54 + 0.5)),
        "2.weight": max(1, int(keep * 27 + 0.5)),
    }


def test_kept_weights_have_the_bits_of_the_model_and_the_others_are_zero() -> None:
    model = tiny_mlp(6, 12, 8, 3)
    plan = EdgePopup(**FAST).plan(model, batches())
    ticket, before = tensors(apply(model, plan)), tensors(model)
    for name, mask in plan.masks.items():
        assert torch.equal(ticket[name], before[name] * mask)
    assert all(torch.equal(ticket[name], before[name]) for name in before if name not in plan.masks)


def test_a_ticket_of_an_untrained_network_is_better_than_the_network() -> None:
    data, wide = batches(num_batches=8, rows=32), tiny_mlp(6, 64, 64, 3)
    ticket = apply(wide, EdgePopup(num_epochs=20).plan(wide, data))
    inputs, labels = (torch.cat(parts) for parts in zip(*batches(num_batches=8, seed=1), strict=True))

    def accuracy(model: nn.Module) -> float:
        return float((model(inputs).argmax(1) == labels).float().mean())

    assert accuracy(wide) < 0.5
    assert accuracy(ticket) > 0.8


def test_convolutions_and_linear_layers_are_chosen_in_and_norms_and_biases_are_not() -> None:
    model = tiny_resnet()
    plan = EdgePopup(num_epochs=1).plan(model, image_batches())
    assert set(plan.masks) == {name for name, tensor in model.named_parameters() if tensor.ndim in (2, 4)}
    assert {name.rpartition(".")[2] for name in plan.moved} == {"running_mean", "running_var", "num_batches_tracked"}


def test_the_plan_holds_the_statistics_of_norms_that_belong_to_the_ticket() -> None:
    """With scores that hardly move, one network is masked all the time, so its statistics are known."""
    model, [(inputs, labels)] = tiny_mlp(6, 12, 3, norm=True), batches(num_batches=1, rows=64)
    ticket = apply(model, EdgePopup(num_epochs=200, lr=1e-9).plan(model, [(inputs, labels)]))
    hidden = ticket[0](inputs).detach()
    assert_close(ticket[1].running_mean, hidden.mean(0), claim="means of what the norm gets")
    assert_close(ticket[1].running_var, hidden.var(0), claim="and their variances")


def test_a_weight_that_an_embedding_shares_stays_whole() -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & set(maskable_weights(tied))
    assert "lm_head.weight" in maskable_weights(tiny_llama(tie_word_embeddings=False))
    first = nn.Linear(4, 4)
    shared = nn.Sequential(first, nn.ReLU(), nn.Linear(4, 4))
    shared[2].weight = first.weight
    assert maskable_weights(shared) == ("0.weight",), "one tensor in two layers has one mask"


def test_text_needs_no_labels() -> None:
    model = tiny_llama()
    plan = EdgePopup(num_epochs=2).plan(model, torch.arange(64).view(4, 16) % 20)
    assert (plan.num_tokens, len(plan.masks)) == (64, 15)
    assert type(apply(model, plan)) is type(model)


# --- nothing else changes


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_global_random_state_are_left_as_they_were(training: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)).train(training)
    model[3].eval()
    before, random, places = tensors(model), torch.random.get_rng_state(), [id(tensor) for tensor in model.parameters()]
    EdgePopup(radius=0.01, **FAST).plan(model, batches())
    assert same(tensors(model), before)
    assert [module.training for module in model] == [training, training, training, False, training]
    assert [id(tensor) for tensor in model.parameters()] == places
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations") for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_the_model_is_left_alone_when_it_fails() -> None:
    model = tiny_mlp(6, 8, 3, norm=True)
    before = tensors(model)
    with pytest.raises(InputError, match="batches without labels"):
        EdgePopup(radius=0.01).plan(model, [torch.ones(4, 6)])
    assert same(tensors(model), before)
    assert not model.training


def test_the_ticket_is_of_the_class_and_in_the_mode_of_the_model_and_shares_nothing_with_it() -> None:
    model = tiny_resnet()
    ticket = apply(model, EdgePopup(num_epochs=1).plan(model, image_batches()))
    assert (type(ticket), ticket.training) == (type(model), False)
    assert not {tensor.data_ptr() for tensor in tensors_of(ticket).values()} & {tensor.data_ptr() for tensor in tensors_of(model).values()}


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_ticket() -> None:
    loader = DataLoader(TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True))), batch_size=8, shuffle=True)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))
    plans = []
    for seed in (1, 1, 2):
        torch.rand(3)  # the global random state does not matter
        plans.append(EdgePopup(radius=0.05, seed=seed, **FAST).plan(model, loader))
    assert same(dict(plans[0].masks) | dict(plans[0].moved), dict(plans[1].masks) | dict(plans[1].moved))
    assert not same(dict(plans[0].masks), dict(plans[2].masks))


def test_a_generator_and_a_loader_are_read_as_the_list_of_their_batches() -> None:
    model, data = tiny_mlp(6, 8, 3), batches()
    plans = [EdgePopup(**FAST).plan(model, each) for each in (data, iter(data), DataLoader(data, batch_size=None))]
    assert plans[0].num_tokens == 64
    assert all(same(dict(plan.masks), dict(plans[0].masks)) and plan.num_tokens == 64 for plan in plans[1:])


def test_progress_is_reported_step_by_step() -> None:
    seen: list[tuple[str, int, int, str]] = []
    EdgePopup(radius=0.01, **FAST).plan(tiny_mlp(6, 8, 3), batches(), report=lambda *step: seen.append(step))
    for phase, total in (("moving weights", 8), ("choosing weights", 12)):
        steps = [(done, total_told) for name, done, total_told, _ in seen if name == phase]
        assert steps == [(done, total) for done in range(total + 1)]
    assert seen[1][3].startswith("loss ")


# --- plans


def test_a_saved_plan_gives_the_same_ticket_and_a_mask_takes_one_bit_for_each_weight(tmp_path: Path) -> None:
    model = tiny_mlp(6, 11, 3, norm=True)
    plan = EdgePopup(radius=0.05, **FAST).plan(model, batches())
    plan.save(tmp_path / "plan")
    again = load_plan(tmp_path / "plan")
    assert isinstance(again, WeightMaskPlan)
    assert (again.method, again.num_tokens) == (plan.method, plan.num_tokens)
    assert same(dict(again.masks), dict(plan.masks))
    assert same(tensors(apply(model, again)), tensors(apply(model, plan)))
    stored = load_file(tmp_path / "plan" / "plan.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items() if name.startswith("masks/")} == {"masks/0.weight": (9,), "masks/3.weight": (5,)}


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_packing_loses_no_bit(bits: list[bool]) -> None:
    plan = WeightMaskPlan(method="by hand", masks={"weight": torch.tensor(bits)})
    _, packed, facts = plan.contents()
    assert packed["masks/weight"].numel() == -(-len(bits) // 8)
    again = WeightMaskPlan.from_contents(packed, {"method": "by hand", "num_tokens": 0, **facts})
    assert again.masks["weight"].tolist() == bits


def test_as_a_mask_it_is_the_same_because_it_is_one() -> None:
    model = tiny_mlp(6, 8, 3)
    plan = EdgePopup(num_epochs=1).plan(model, batches())
    assert same(tensors(apply(model, plan)), tensors(apply(model, plan, as_mask=True)))
    assert (WeightMaskPlan.apply.__doc__ or "").splitlines()[0].endswith("it saves neither memory nor time.")


def test_the_ledger_counts_what_is_kept_and_dropped_and_no_byte_is_saved() -> None:
    model = tiny_mlp(6, 8, 3)
    ledger = EdgePopup(keep=0.25, num_epochs=1).plan(model, batches()).ledger(model)
    assert [(part.where, part.status, part.parameters, part.bytes) for part in ledger.parts] == [
        ("0.weight", "kept", 12, 192),
        ("0.weight", "dropped", 36, 0),
        ("2.weight", "kept", 6, 96),
        ("2.weight", "dropped", 18, 0),
    ]


@pytest.mark.parametrize(("other", "found"), [((6, 7, 3), r"has \(7, 6\) there"), ((6, 3), "has no such tensor")])
def test_a_plan_for_another_model_is_refused(other: tuple[int, ...], found: str) -> None:
    plan = WeightMaskPlan(method="by hand", masks={"2.weight": torch.ones(3, 8, dtype=torch.bool), "0.weight": torch.ones(8, 6, dtype=torch.bool)})
    model = tiny_mlp(*other)
    text = rf"the plan was made for [02]\.weight of shape \(\d, \d\), but Sequential ({found}|has \(3, 7\) there)"
    for use in (lambda: apply(model, plan), lambda: plan.ledger(model)):
        with pytest.raises(InputError, match=text) as caught:
            use()
        assert caught.value.code == "plan-for-another-model"


def test_a_plan_whose_mask_lost_bytes_is_refused(tmp_path: Path) -> None:
    WeightMaskPlan(method="by hand", masks={"a": torch.ones(20, dtype=torch.bool)}).save(tmp_path / "plan")
    for tensors_left, got in (({"masks/a": torch.zeros(2, dtype=torch.uint8)}, "a mask of 2 bytes"), ({"x": torch.zeros(1)}, "no mask")):
        save_file(tensors_left, tmp_path / "plan" / "plan.safetensors")
        with pytest.raises(InputError, match=rf"the plan holds {got} for a, expected 3 bytes for 20 weights") as caught:
            load_plan(tmp_path / "plan")
        assert caught.value.code == "no-plan"


# --- bad input


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"keep": 0.0}, "keep-range", r"got keep=0\.0, expected a fraction above 0 and at most 1"),
        ({"keep": 1.5}, "keep-range", r"got keep=1\.5, expected a fraction above 0 and at most 1"),
        ({"keep": math.nan}, "keep-range", r"got keep=nan"),
        ({"radius": -0.01}, "radius-range", r"got radius=-0\.01, expected 0 or more.*infinity for no limit"),
        ({"radius": math.nan}, "radius-range", r"got radius=nan"),
        ({"num_epochs": 0}, "below-minimum", r"num_epochs=0 must be an integer of at least 1"),
        ({"perturb_epochs": 0}, "below-minimum", r"perturb_epochs=0 must be an integer of at least 1"),
        ({"seed": -1}, "below-minimum", r"seed=-1 must be an integer of at least 0"),
        ({"lr": 0.0}, "optimizer-setting", r"got lr=0\.0, expected a number above 0"),
        ({"perturb_lr": math.inf}, "optimizer-setting", r"got perturb_lr=inf, expected a number above 0"),
        ({"momentum": 1.0}, "optimizer-setting", r"got momentum=1\.0, expected at least 0 and below 1"),
        ({"weight_decay": -1.0}, "optimizer-setting", r"got weight_decay=-1\.0, expected 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], code: str, text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        EdgePopup(**changes)
    assert caught.value.code == code


@pytest.mark.parametrize("data", [None, [], iter(()), torch.zeros(0, 6), [(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))]])
def test_empty_data_are_refused(data: Any) -> None:
    with pytest.raises(InputError, match="got no calibration data, expected at least one batch of inputs") as caught:
        EdgePopup().plan(tiny_mlp(6, 8, 3), data)
    assert caught.value.code == "no-calibration"


@pytest.mark.parametrize("data", [torch.ones(8, 6), [torch.ones(8, 6)]], ids=["a tensor", "batches"])
def test_data_without_labels_are_refused(data: Any) -> None:
    with pytest.raises(InputError, match=r"got batches without labels, expected them.*Pass pairs \(inputs, labels\)") as caught:
        EdgePopup().plan(tiny_mlp(6, 8, 3), data)
    assert caught.value.code == "no-labels"


def test_batches_of_another_kind_are_refused() -> None:
    with pytest.raises(InputError, match="got a batch that is a ndarray, expected a tensor, a pair") as caught:
        EdgePopup().plan(tiny_mlp(6, 8, 3), [np.ones((8, 6))])
    assert caught.value.code == "calibration-data"


def test_a_model_without_linear_or_convolutional_layers_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    with pytest.raises(InputError, match=r"Sequential has no torch\.nn\.Linear or Conv2d with a weight of its own, expected at least one") as caught:
        EdgePopup().plan(model, batches())
    assert caught.value.code == "no-weights"


@pytest.mark.parametrize("radius", [0.0, math.inf])
def test_a_loss_that_is_no_number_ends_it_with_the_step(radius: float) -> None:
    data = batches()
    data[1][0][0, 0] = math.nan
    phase = "moving weights" if radius else "choosing weights"
    with pytest.raises(RunError, match=rf"the loss is nan at step 2 of \d+ while {phase}, expected a finite number") as caught:
        EdgePopup(radius=radius).plan(tiny_mlp(6, 8, 3), data)
    assert caught.value.code == "diverged"
