"""Claims about the bytes that a sequence holds: they are those of the cache that the model itself fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_families import FAMILIES
from partwise.models import Part, coupled_axes, extract
from partwise.models.cache_sizes import CacheSize, cache_sizes, total_cache_bytes, unit_cache_bytes
from tiny import tiny_decoder, tiny_mamba2, tiny_mlp, tiny_vit

WINDOW = {
    "mistral-with-a-window": lambda: tiny_decoder("Mistral", sliding_window=5),
    "qwen2-with-two-kinds-of-layers": lambda: tiny_decoder(
        "Qwen2", use_sliding_window=True, sliding_window=5, layer_types=["full_attention", "sliding_attention"]
    ),
    "mamba2-with-two-groups": lambda: tiny_mamba2(n_groups=2),
    "mamba2-with-uneven-layers": lambda: extract(tiny_mamba2(), Part({"backbone.layers.0.mixer.state": (0, 3, 4)})),
}
WRITERS: dict[str, Callable[..., Any]] = {
    name: builder for name, (builder, _) in FAMILIES.items() if not name.startswith(("mlp", "resnet", "vit"))
} | WINDOW


@torch.no_grad()
def bytes_of_the_cache(model: nn.Module, num_tokens: int) -> list[int]:
    """For each layer, what it holds after so many tokens that came one by one, as in generation."""
    outputs = model(torch.ones(1, 1, dtype=torch.int64), use_cache=True)
    for _ in range(num_tokens - 1):
        outputs = model(torch.ones(1, 1, dtype=torch.int64), use_cache=True, cache=outputs.cache)
    return [sum(tensor.nbytes for tensor in tensors_in(layer)) for layer in outputs.cache.layers]


def tensors_in(layer: object) -> list[Tensor]:
    """Those with a row for each sequence; a layer also has counters."""
    parts = [value for part in vars(layer).values() for value in (part.values() if isinstance(part, dict) else [part])]
    return [value for value in parts if isinstance(value, Tensor) and value.ndim > 1]


@pytest.mark.parametrize("num_tokens", [1, 4, 9])
@pytest.mark.parametrize("family", WRITERS)
def test_sizes_are_those_of_the_cache_after_any_number_of_tokens(family: str, num_tokens: int):
    model = WRITERS[family]()
    sizes = cache_sizes(model)
    expected = bytes_of_the_cache(model, num_tokens)
    assert [size.at(num_tokens) for size in sizes] == expected
    assert total_cache_bytes(sizes, num_tokens=num_tokens) == sum(expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-with-a-window", "mamba2", "mamba2-with-two-groups"])
def test_what_a_unit_holds_is_what_a_model_without_it_no_longer_holds(family: str):
    model = WRITERS[family]()
    sizes = cache_sizes(model)
    for layer, axis in enumerate(axis for axis in coupled_axes(model) if axis.kind in {"heads", "states"}):
        run = axis.size // axis.groups
        kept = tuple(unit for unit in range(axis.size) if unit % run)  # without the first unit of every group
        small = cache_sizes(extract(model, Part({axis.name: kept}), loadable=False))
        for num_tokens in (1, 100):
            saved = total_cache_bytes(sizes, num_tokens=num_tokens) - total_cache_bytes(small, num_tokens=num_tokens)
            assert saved == axis.groups * unit_cache_bytes(axis, sizes[layer], num_tokens=num_tokens) > 0


def test_half_of_the_states_halve_the_recurrent_state_to_the_byte():
    model = tiny_mamba2()
    part = Part({axis.name: (0, 2, 4, 6) for axis in coupled_axes(model)})
    whole, half = cache_sizes(model), cache_sizes(extract(model, part))
    assert [size.recurrent for size in whole] == [4 * 8 * 8 * 4] * 2, "heads, entries, states, bytes of float32"
    assert [2 * size.recurrent for size in half] == [size.recurrent for size in whole]
    assert [size.channels for size in half] == [32 + 2 * 4] * 2


def test_neurons_and_filters_hold_nothing_of_a_sequence():
    model = tiny_decoder("Llama")
    neurons = next(axis for axis in coupled_axes(model) if axis.kind == "neurons")
    assert unit_cache_bytes(neurons, cache_sizes(model)[0], num_tokens=100) == 0


def test_the_dtype_of_the_model_counts():
    wide, narrow = cache_sizes(tiny_decoder("Llama")), cache_sizes(tiny_decoder("Llama").to(torch.bfloat16))
    assert [2 * size.per_token for size in narrow] == [size.per_token for size in wide]


@pytest.mark.parametrize("builder", [tiny_vit, lambda: tiny_mlp(6, 8, 4)], ids=["vit", "mlp"])
def test_models_that_write_no_text_hold_nothing(builder: Callable[[], nn.Module]):
    assert cache_sizes(builder()) == ()
    assert total_cache_bytes((), num_tokens=1000) == 0


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_measuring_leaves_modes_as_mixed_as_they_were(family: str):
    model = WRITERS[family]().train()
    next(iter(model.children())).eval()  # one part is frozen
    before = [module.training for module in model.modules()]
    cache_sizes(model)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_a_window_bounds_what_attention_holds():
    size = CacheSize(per_token=10, window=4)
    assert [size.at(tokens) for tokens in (1, 4, 5, 1000)] == [10, 40, 40, 40]
