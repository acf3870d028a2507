"""Tiny runs of the main job for tests: a model of a few kilobytes, forty reviews, a dozen steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from partwise.tune._data import DataSettings
from partwise.tune.job import TuneSettings, tune
from partwise.tune.recipe import Recipe
from tiny import save_tiny, tiny_bert, tiny_bert_tokenizer, tiny_llama, tiny_llama_tokenizer

NUM_STEPS = 12
LR = 0.01


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
    rows = []
    for index in range(num_rows):
        colour, noun, number = (
            ("red", "green", "blue")[index % 3],
            ("film", "book")[index // 2 % 2],
            ("one", "two", "three", "four", "five")[index % 5],
        )
        rows.append(f"the {colour} {noun} is {('bad', 'good')[index % 2]} {number},{('neg', 'pos')[index % 2]}")
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


def write_encoder(folder: Path) -> Path:
    """A tiny encoder without a head, in a folder as transformers loads it."""
    return save_tiny(folder, tiny_bert().bert, tiny_bert_tokenizer())


def write_decoder(folder: Path) -> Path:
    """A tiny causal model."""
    return save_tiny(folder, tiny_llama(), tiny_llama_tokenizer())
