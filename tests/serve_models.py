"""A decoder of a few kilobytes with texts of the words that it knows, and what a comparison of caches on them says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tiny import WORDS, save_tiny, tiny_decoder, tiny_llama_tokenizer

POSITIONS = 128


def small_decoder(**changes: Any) -> PreTrainedModel:
    """A Llama of two layers, eight heads in four groups, whose attention is anything but uniform."""
    return tiny_decoder("Llama", **({"max_position_embeddings": POSITIONS, "initializer_range": 0.5} | changes))


def write_model(folder: Path) -> Path:
    """The same in a folder, with a tokenizer of whole words."""
    return save_tiny(folder, small_decoder(), tiny_llama_tokenizer())


def write_words(folder: Path, *, num_files: int = 4, num_words: int = 200) -> Path:
    """Files of random words."""
    folder.mkdir(parents=True)
    for number in range(num_files):
        drawn = torch.randint(len(WORDS), (num_words,), generator=torch.Generator().manual_seed(number)).tolist()
        (folder / f"words_{number}.txt").write_text(" ".join(WORDS[index] for index in drawn))
    return folder


def random_ids(num_rows: int = 2, num_tokens: int = 40, *, seed: int = 0) -> torch.Tensor:
    """Rows of tokens of the small decoder."""
    return torch.randint(3, 3 + len(WORDS), (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))
