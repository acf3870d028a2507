"""Claims about what a unit is worth, and about sorting units by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_families import FAMILIES, WITHOUT_READERS, outputs
from partwise.checks import InputError
from partwise.models import CoupledAxis, Part, coupled_axes, mask, tensors_of
from partwise.train import TwIST
from partwise.train._scores import METRICS, sort_units, unit_scores
from partwise.train.ticket import search
from tiny import tiny_decoder, tiny_mlp
from tolerances import assert_close


def texts(number: int = 3, *, seed: int = 0) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(24, (number, 4, 12), generator=torch.Generator().manual_seed(seed))]


def batches_for(inputs: Tensor) -> list[Any]:
    return [{"input_ids": inputs}] if not inputs.is_floating_point() else [{"pixel_values": inputs}] if inputs.shape[-1] == 8 else [(inputs, None)]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT_READERS])
def test_sorting_units_changes_their_order_and_nothing_else(family: str):
    build, inputs = FAMILIES[family]
    model = build()
    axes = tuple(axis for axis in coupled_axes(model) if isinstance(axis, CoupledAxis))
    scores = unit_scores(model, axes, batches_for(inputs))["wanda"]
    ordered = sort_units(model, axes, scores)
    assert_close(outputs(ordered, inputs), outputs(model, inputs), claim="units are exchangeable", rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(tensors_of(ordered)[name], tensor) for name, tensor in tensors_of(model).items())
    for axis in axes:
        again = unit_scores(ordered, axes, batches_for(inputs))["wanda"][axis.name]
        assert_close(again, scores[axis.name].sort(descending=True).values, claim="highest first", rtol=1e-3, atol=1e-6)


def test_scores_are_those_of_the_papers_by_a_loop_over_units():
    """One hidden layer: mean |w| times the root mean square of the input, and variance times squared norm."""
    model = tiny_mlp(6, 5, 3).double()
    rows = [torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    scores = unit_scores(model, coupled_axes(model), [(batch, None) for batch in rows])
    hidden = torch.relu(model[0](torch.cat(rows))).detach()
    weight = model[2].weight.detach()
    for unit in range(5):
        assert scores["wanda"]["0"][unit].item() == pytest.approx(float(weight[:, unit].abs().mean() * hidden[:, unit].square().mean().sqrt()))
        assert scores["fluctuation"]["0"][unit].item() == pytest.approx(float(hidden[:, unit].var(unbiased=False) * weight[:, unit].square().sum()))


@pytest.mark.parametrize("metric", METRICS)
def test_units_that_nobody_listens_to_are_ranked_last(metric: Any):
    model = tiny_decoder("Qwen3", intermediate_size=32)
    axes = coupled_axes(model)
    with torch.no_grad():
        for axis in axes:
            weight = tensors_of(model)[axis.readers[0]]
            weight.view(len(weight), axis.size, -1)[:, ::2] *= 1e-4
    scores = unit_scores(model, axes, texts(), metrics=[metric])[metric]
    for axis in axes:
        assert scores[axis.name][::2].max() < scores[axis.name][1::2].min()
    half = Part({axis.name: tuple(range(axis.size // 2)) for axis in axes})
    ids = texts(1, seed=3)[0]["input_ids"]
    ordered = sort_units(model, axes, scores)
    assert_close(mask(ordered, half)(ids).logits, model(ids).logits, claim="the first half says it all", rtol=0, atol=1e-3)


def test_a_search_with_calibration_data_tries_what_the_data_rank_highest():
    model = tiny_decoder("Llama", intermediate_size=32)
    method = TwIST(keep=0.5, num_blocks=4, correction="none")
    axes = method.find_axes(model)
    with torch.no_grad():
        for axis in axes:
            weight = tensors_of(model)[axis.readers[0]]
            weight.view(len(weight), axis.size, -1)[:, ::2] *= 1e-4
    target = texts(1, seed=3)[0]["input_ids"]

    def distance(candidate: Any) -> float:
        return float((candidate(target).logits - model(target).logits).detach().square().mean())

    found = search(method, model, axes, 0.5, evaluate=distance, num_candidates=4, calibration=texts())
    assert found.kinds[: found.kinds.count("drawn")] == ("drawn",) * 4
    assert found.kinds[found.scores.index(min(found.scores))] != "drawn"
    assert found.part.units["model.layers.0.mlp"] == tuple(range(1, 32, 2))
    assert found.part.units["model.layers.1.self_attn"] == (1, 3)


def test_a_ticket_that_is_always_the_same_is_tried_once():
    model = tiny_decoder("Llama", intermediate_size=32)
    method = TwIST(num_blocks=4, choice="nested")
    found = search(method, model, method.find_axes(model), 0.5, evaluate=lambda _: 1.0, num_candidates=8)
    assert (found.scores, found.kinds) == ((1.0,), ("drawn",))


def test_scoring_leaves_the_model_as_it_was():
    model = tiny_decoder("Llama").train()
    unit_scores(model, coupled_axes(model), texts(1))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match="got no batches to score units on"):
        unit_scores(model, coupled_axes(model), [])
    with pytest.raises(InputError, match=r"metric='size' is not known\. Choose one of: wanda, fluctuation"):
        unit_scores(nn.Identity(), (), [], metrics=["size"])  # type: ignore[list-item]
