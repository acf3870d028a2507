"""Trained models and text that they have not seen, for the programs that measure caches.

A small Llama of the source of Python's standard library, with the files that were held out when it was trained, and the same one trained further on
WikiText-2 (``train_twist_tickets.py base`` makes it). Both are in ../shared or in runs/ (``PARTWISE_MODELS``, ``PARTWISE_DATA``).
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from images import loaders
from partwise.atomic_files import read_json
from train_twist_tickets import BASE, MODEL

FOLDERS: dict[str, Path] = {"standard library": MODEL, "WikiText-2": BASE}


def present() -> list[str]:
    """Models that are on this machine; says in a line which are not."""
    found = [title for title, folder in FOLDERS.items() if folder.exists()]
    for title in FOLDERS.keys() - found:
        print(f"skipped {title}: there is no {FOLDERS[title]}; set PARTWISE_MODELS, or run benchmarks/train_twist_tickets.py base", flush=True)
    return found


def load(title: str, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = FOLDERS[title]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


def held_out(title: str, tokenizer: Any, *, num_rows: int, num_tokens: int, part: Literal["test", "calibration"] = "test") -> Tensor:
    """Rows of consecutive tokens, none of them twice, spread over the text: (num_rows, num_tokens).

    Source: every other held-out file is for calibration, the others for testing, and a row is from one file. WikiText-2: its validation and test parts.
    """
    stretches = [piece for text in _texts(title, part) for piece in _stretches(tokenizer, text, num_tokens)]
    if len(stretches) < num_rows:
        raise ValueError(f"got {len(stretches)} stretches of {num_tokens} tokens in {title}, {part}; expected {num_rows}. Ask for fewer rows.")
    return torch.tensor([stretches[number * len(stretches) // num_rows] for number in range(num_rows)])


def dealt(rows: Tensor, num_groups: int) -> list[Tensor]:
    """Rows in groups of equal size, as cards are dealt."""
    return [rows[group::num_groups] for group in range(num_groups)]


def _texts(title: str, part: str) -> Sequence[str]:
    if title == "WikiText-2":
        return [loaders().wikitext2({"test": "test", "calibration": "valid"}[part])]
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / name for name in read_json(MODEL / "partwise_base.json")["held_out_files"]]
    by_size = sorted((path for path in files if path.exists()), key=lambda path: (-path.stat().st_size, path))
    return [path.read_text(errors="replace") for path in by_size[{"test": 0, "calibration": 1}[part] :: 2]]


def _stretches(tokenizer: Any, text: str, num_tokens: int) -> list[list[int]]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[start : start + num_tokens] for start in range(0, len(ids) - num_tokens + 1, num_tokens)]
