"""Tiny runs of the main job for tests: a model of a few kilobytes, forty reviews, a dozen steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from partwise.tune._data import DataSettings
from partwise.tune.job import TuneSettings, tune
from partwise.tune.recipe import Recipe

NUM_STEPS = 12
LR = 0.01
NOUNS = ("film", "book", "song", "play", "game")


def run_tiny(recipe: Recipe, model: Path, data: Path, /, *, out: Path, **changes: Any) -> dict[str, Any]:
    """``tune`` with small numbers; settings may be overridden by name."""
    ours = {key: changes.pop(key) for key in ("resume", "report", "checkpoint_every", "task_data", "command") if key in changes}
    choices = {key: changes.pop(key) for key in DataSettings.__dataclass_fields__ if key in changes}
    settings = TuneSettings(**({"model": str(model), "max_steps": NUM_STEPS, "batch_size": 8, "lr": LR} | changes))
    ours.setdefault("checkpoint_every", 4)
    return tune(
        recipe, settings, DataSettings(**({"data": str(data), "max_length": 16} | choices)), name=type(recipe).__name__.lower(), out=out, **ours
    )


def tiny_flags(model: Path, data: Path, *, max_steps: int = NUM_STEPS) -> list[str]:
    """The same as flags of the command line."""
    flags = {"model": model, "data": data, "max-steps": max_steps, "batch-size": 8, "lr": LR, "max-length": 16, "checkpoint-every": 4}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def write_reviews(path: Path, *, num_rows: int = 40) -> Path:
    """A csv file whose label one word gives away."""
    rows = [f"the {NOUNS[index % 5]} is {('bad', 'good')[index % 2]} number {index},{('neg', 'pos')[index % 2]}" for index in range(num_rows)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


def write_tokenizer(folder: Path) -> int:
    """A tokenizer of whole words, saved. Returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "is", "it", "bad", "good", "number", "yes", "no", *NOUNS, *map(str, range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return len(words)


def write_encoder(folder: Path) -> Path:
    """A two-layer encoder from a seed, in a folder as transformers loads it."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32}
    BertModel(BertConfig(vocab_size=write_tokenizer(folder), **sizes)).save_pretrained(folder)
    return folder


def write_decoder(folder: Path) -> Path:
    """A two-layer causal model from a seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32}
    LlamaForCausalLM(LlamaConfig(vocab_size=write_tokenizer(folder), pad_token_id=0, bos_token_id=2, eos_token_id=3, **sizes)).save_pretrained(folder)
    return folder
