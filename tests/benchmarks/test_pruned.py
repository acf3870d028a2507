"""Claims about the pruning that tickets are compared with: it removes what does not matter, and changes nothing where nothing is removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pruned
from partwise.models import Part, coupled_axes, mask, tensors_of
from tiny import tiny_decoder, tiny_llama
from tolerances import assert_close

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def texts(number: int = 3, *, seed: int = 0) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(24, (number, 4, 12), generator=torch.Generator().manual_seed(seed))]


def planted(family: str = "Llama", *, seed: int = 0, **options: Any) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """A model of which half the units are almost zero in every tensor, and the other half."""
    model = tiny_decoder(family, seed=seed, intermediate_size=32, **options)
    generator = torch.Generator().manual_seed(seed)
    matters = {}
    with torch.no_grad():
        for axis in coupled_axes(model):
            order = torch.randperm(axis.size, generator=generator)
            for member in axis.members:
                rows = tensors_of(model)[member.tensor].movedim(member.dim, 0)
                rows.view(axis.size, member.width, -1)[order[axis.size // 2 :]] *= 1e-3
            matters[axis.name] = tuple(sorted(order[: axis.size // 2].tolist()))
    return model, matters


@pytest.mark.parametrize("name", ["magnitude", "wanda", "flap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_nobody_listens_to_are_removed(family: str, name: str):
    model, matters = planted(family)
    small = pruned.METHODS[name](model, 0.5, texts(), num_blocks=4)
    expected = mask(model, Part(matters))
    assert small.config.intermediate_size == 16
    assert small.config.num_key_value_heads == 2
    ids = texts(1, seed=1)[0]["input_ids"]
    assert_close(small(ids).logits, expected(ids).logits, claim=f"{name} keeps the half that matters", rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", pruned.METHODS)
def test_keeping_everything_changes_nothing(name: str):
    model = tiny_decoder("Llama", intermediate_size=32)
    before = {key: tensor.clone() for key, tensor in tensors_of(model).items()}
    same = pruned.METHODS[name](model, 1.0, texts(), num_blocks=4)
    after = tensors_of(same)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert same is not model


@pytest.mark.parametrize("name", pruned.METHODS)
def test_the_dense_model_is_left_alone(name: str):
    model = tiny_decoder("Llama", intermediate_size=32, tie_word_embeddings=True)
    before = {key: tensor.clone() for key, tensor in tensors_of(model).items()}
    pruned.METHODS[name](model, 0.5, texts(), num_blocks=4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors_of(model).items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_wanda_looks_at_what_comes_in_and_magnitude_does_not():
    """Units with the largest readers, but inputs that are almost zero."""
    model = tiny_decoder("Llama", intermediate_size=32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:16] *= 1e-4
            layer.mlp.down_proj.weight[:, :16] *= 100
    part = {name: kept_neurons(model, pruned.METHODS[name](model, 0.5, texts(), num_blocks=4)) for name in ("magnitude", "wanda", "flap")}
    assert part["magnitude"] == set(range(16))
    assert part["wanda"] == part["flap"] == set(range(16, 32))


def kept_neurons(model: Any, small: Any) -> set[int]:
    """Of the first layer, by the rows of its gate, which no method changes."""
    whole = {tuple(row.tolist()): index for index, row in enumerate(model.model.layers[0].mlp.gate_proj.weight)}
    return {whole[tuple(row.tolist())] for row in small.model.layers[0].mlp.gate_proj.weight}


def test_flap_removes_what_does_not_fluctuate_and_leaves_its_mean_as_a_bias():
    """A neuron with a constant output is free for FLAP, however large it is: its bias says the same."""
    model = tiny_decoder("Llama", intermediate_size=32, num_hidden_layers=1, mlp_bias=True)
    with torch.no_grad():
        mlp = model.model.layers[0].mlp
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight[:16] = 0
            layer.bias[:16] = 3.0
    small = pruned.flap(model, 0.5, texts(), num_blocks=4)
    assert kept_neurons(model, small) == set(range(16, 32))
    assert small.model.layers[0].self_attn.o_proj.bias is not None
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    assert_close(small.model.layers[0].mlp(hidden), mlp(hidden), claim="exact for constants", rtol=1e-4, atol=1e-4)


def loss_after(model: Any, dense: Any, batches: list[dict[str, Tensor]]) -> float:
    """How far the logits moved."""
    return sum(float((pruned.forward(model, batch) - pruned.forward(dense, batch)).square().mean()) for batch in batches)


@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_compensation_lowers_the_loss_against_none(keep: float):
    gaps = []
    for seed in range(3):
        dense = tiny_llama(seed=seed, hidden_size=32, num_attention_heads=4, intermediate_size=64, initializer_range=0.3, hidden_act="relu")
        with torch.no_grad():
            for layer in dense.model.layers:
                layer.mlp.up_proj.weight.copy_(layer.mlp.gate_proj.weight)  # squares of what is positive: their means are far from zero
        both = [pruned.flap(dense, keep, texts(6), num_blocks=4, compensate=compensate) for compensate in (True, False)]
        gaps.append([loss_after(model, dense, texts(4, seed=9)) for model in both])
    assert all(with_bias < without for with_bias, without in gaps), gaps
    assert sum(with_bias for with_bias, _ in gaps) < 0.9 * sum(without for _, without in gaps)


def test_pruned_models_are_as_small_as_a_ticket_and_decode():
    model = tiny_decoder("Llama", intermediate_size=32)
    axes, counts = pruned.axes_and_counts(model, 0.5, 4)
    assert set(counts.values()) == {2, 16}
    for name in ("magnitude", "wanda", "flap"):
        small = pruned.METHODS[name](model, 0.5, texts(), num_blocks=4)
        assert {len(pruned.reader_of(small, axis).weight.T) for axis in axes} == {16}  # two groups of two heads of four; sixteen neurons
        assert small.generate(texts()[0]["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (4, 15)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_turning_the_stream_without_cutting_it_changes_nothing(family: str):
    model = tiny_decoder(family, tie_word_embeddings=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and "q_norm" not in name and "k_norm" not in name:
                parameter.uniform_(0.5, 1.5)
    ids = texts(1, seed=1)[0]["input_ids"]
    assert_close(pruned.sliced(model, 32, texts())(ids).logits, model(ids).logits, claim="rotations cancel", rtol=0, atol=1e-4)


def test_slicing_keeps_the_subspace_that_the_stream_lies_in():
    """Everything is written into 8 of 32 directions, which are hidden by a rotation: a stream of 8 components is enough."""
    model = tiny_decoder("Llama", num_hidden_layers=2)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0][:, :8]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ basis @ basis.T)
        for layer in model.model.layers:
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight.copy_(basis @ basis.T @ output.weight)
    ids = texts(1, seed=1)[0]["input_ids"]
    small = pruned.sliced(model, 8, texts())
    assert_close(small(ids).logits, model(ids).logits, claim="nothing is lost", rtol=0, atol=1e-4)
    assert not torch.allclose(pruned.sliced(model, 4, texts())(ids).logits, model(ids).logits, atol=1e-3)
    assert (
        small.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).tolist()
        == model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).tolist()
    )


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_a_sliced_model_has_at_least_the_parameters_of_a_ticket_in_its_blocks(keep: float):
    model = tiny_decoder("Qwen2", intermediate_size=96)
    ticket = pruned.magnitude(model, keep, [], num_blocks=4)
    small = pruned.slicegpt(model, keep, texts(), num_blocks=4)
    width = small.model.embed_tokens.embedding_dim
    assert pruned.num_block_parameters(small) == pruned.sliced_block_parameters(model, width)
    assert pruned.sliced_block_parameters(model, width - 1) < pruned.num_block_parameters(ticket) <= pruned.num_block_parameters(small)
