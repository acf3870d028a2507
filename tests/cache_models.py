"""Tiny decoders of all families that a cache with a budget serves, and what tests ask of them. Nothing is downloaded."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from partwise.models import Part, coupled_axes, extract

WORDS = 61
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 512}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "num_attention_heads": 2}),
    "qwen3": ("Qwen3", GROUPED),
    "mistral": ("Mistral", GROUPED | {"sliding_window": None}),
    "gemma2": ("Gemma2", GROUPED | {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3", GROUPED | WINDOWS | {"query_pre_attn_scalar": 32}),
    "phi3": ("Phi3", {"num_key_value_heads": 1, "num_attention_heads": 2, "sliding_window": None}),
    "opt": ("OPT", {"num_attention_heads": 2, "ffn_dim": 48, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "gpt-neox": ("GPTNeoX", {"num_attention_heads": 2, "rotary_pct": 0.5, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
}
KERNELS = [(name, kernel) for name in FAMILIES for kernel in ("sdpa", "eager") if (name, kernel) != ("gemma2", "sdpa")]  # soft capping is eager's


def decoder(name: str, *, kernel: str = "sdpa", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of a family, in evaluation mode. Attention is far from uniform. The global random state is left alone."""
    family, settings = FAMILIES[name]
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    settings = SIZES | {"vocab_size": WORDS, "initializer_range": 0.2} | ids | settings | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")(**settings)
        model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation=kernel).to(dtype)
    return model.eval()


def uneven_decoder(name: str, **changes: Any) -> PreTrainedModel:
    """As `decoder`, with half the key heads, where the family lets them differ, and half the neurons in its first layer."""
    model = decoder(name, **changes)
    units = {axis.name: tuple(range(axis.size // 2 if ".0." in axis.name else axis.size)) for axis in coupled_axes(model)}
    return extract(model, Part(units)).eval()


@functools.cache
def shared_decoder(name: str, kernel: str = "sdpa") -> PreTrainedModel:
    """As `decoder`, made once; for tests that leave it as it is but for its attention."""
    return decoder(name, kernel=kernel)


def words(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them padding."""
    return torch.randint(2, WORDS, shape, generator=torch.Generator().manual_seed(seed))


def padded(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows of these lengths, padded on the left."""
    width = max(lengths)
    ids, mask = words(len(lengths), width, seed=seed), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def continued(model: PreTrainedModel, cache: Any, ids: Tensor, *, new: int = 12, **settings: Any) -> Tensor:
    """Rows with the tokens that the model adds, the likeliest ones unless ``settings`` say otherwise."""
    settings = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids)} | settings
    return model.generate(input_ids=ids, cache=cache, **settings)


def plain(model: PreTrainedModel, ids: Tensor, **settings: Any) -> Tensor:
    """The same with transformers' own cache."""
    return continued(model, DynamicCache(config=model.config), ids, **settings)


@torch.no_grad()
def stepped(model: PreTrainedModel, cache: Any, ids: Tensor, *, blocks: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """Logits of all tokens, (batch, tokens, words): blocks of these lengths first, the others one by one."""
    parts, start = [], 0
    for length in [*blocks, *(1 for _ in range(ids.shape[1] - sum(blocks)))]:
        end = start + length
        extra = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]}
        parts.append(model(input_ids=ids[:, start:end], cache=cache, use_cache=True, **extra).logits)
        start = end
    return torch.cat(parts, dim=1)
