"""A server around a model of a few kilobytes, for tests: the parts in this process, or listening in a thread."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
NAME = "tiny"


def letter_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, so that lengths are plain to see."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def tiny_llama(*, positions: int = 256, head_dim: int = 8, seed: int = 0) -> Any:
    """Two layers of 32. It writes small letters only, and its answers end at their longest, since it knows no last token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=head_dim,         max_position_embeddings=positions, bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    vocabulary = letter_tokenizer().get_vocab()
    model.generation_config.suppress_tokens = sorted(
        number for letter, number in vocabulary.items() if letter not in "abcdefghijklmnopqrstuvwxyz\u0120"
    )
    return model


async def calm(parts: Any, *, seconds: float = 10.0) -> None:
    """Wait until nobody is answered any more."""
    async with asyncio.timeout(seconds):
        while parts.turnstile.num_inside or parts.turnstile.is_busy:
            await asyncio.sleep(0.002)
