"""One small model of every family that can be cut, with an input, and how to read its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from partwise.models import Part, coupled_axes
from partwise.rounds import part_seed
from tiny import Bottleneck, PreActBlock, tiny_decoder, tiny_gpt2, tiny_mamba2, tiny_mlp, tiny_neox, tiny_resnet, tiny_vit

IDS = torch.tensor([[3, 7, 1, 12, 9], [5, 5, 2, 0, 20]])


def images(size: int) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(7))


def rows(width: int) -> Tensor:
    return torch.randn(4, width, generator=torch.Generator().manual_seed(7))


# Family -> (builder of a model from a seed, input).
FAMILIES: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "mlp": (lambda **options: tiny_mlp(6, 8, 12, 4, **options), rows(6)),
    "mlp-with-norms": (lambda **options: tiny_mlp(6, 8, 12, 4, norm=True, bias=False, **options), rows(6)),
    "resnet": (tiny_resnet, images(16)),
    "resnet-bottleneck": (lambda **options: tiny_resnet(Bottleneck, (1, 2, 3, 1), **options), images(16)),
    "resnet-preact": (lambda **options: tiny_resnet(PreActBlock, **options), images(16)),
    "llama": (lambda **options: tiny_decoder("Llama", **options), IDS),
    "llama-tied-with-biases": (lambda **options: tiny_decoder("Llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True, **options), IDS),
    "mistral": (lambda **options: tiny_decoder("Mistral", **options), IDS),
    "qwen2": (lambda **options: tiny_decoder("Qwen2", **options), IDS),
    "qwen3": (lambda **options: tiny_decoder("Qwen3", **options), IDS),
    "gpt2": (tiny_gpt2, IDS),
    "gpt-neox": (tiny_neox, IDS),
    "mamba2": (tiny_mamba2, IDS),
    "mamba2-without-biases": (lambda **options: tiny_mamba2(use_bias=False, use_conv_bias=False, tie_word_embeddings=True, **options), IDS),
    "vit": (tiny_vit, images(8)),
}
# Those whose norms and scans compute in float32 whatever the dtype of the weights.
IN_FLOAT32 = {"mamba2", "mamba2-without-biases"}
# Those of whose axes no layer reads the units: a sum over states has no place for a factor.
WITHOUT_READERS = {"mamba2", "mamba2-without-biases"}
TRANSFORMERS = [name for name in FAMILIES if not name.startswith(("mlp", "resnet"))]


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits."""
    result = model(inputs)
    return result if isinstance(result, Tensor) else result.logits


def generators(num_parts: int, *, seed: int = 0, round_number: int = 1) -> list[np.random.Generator]:
    """As a trainer makes them."""
    return [np.random.default_rng(part_seed(seed, round_number=round_number, part=part)) for part in range(num_parts)]


def any_part(model: nn.Module, seed: int) -> Part:
    """Of every axis some units, at least one; the same number on all axes of a kind and size, as configurations want it; heads that Llama allows."""
    generator = np.random.default_rng(seed)
    counts: dict[tuple[str, int], int] = {}
    units = {}
    for axis in coupled_axes(model):
        allowed = [1, 2, 4] if axis.kind == "heads" else range(1, axis.size + 1)
        count = counts.setdefault((axis.kind, axis.size), int(generator.choice(allowed)))
        units[axis.name] = tuple(sorted(generator.permutation(axis.size)[:count].tolist()))
    return Part(units)
