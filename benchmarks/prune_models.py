"""Trained models to prune, and text that they have not seen.

A small Llama and a small Mamba2 of the source of Python's standard library, with the files that were held out when they were trained, and the same Mamba2
trained further on WikiText-2, which this program makes. They are in ../shared or in runs/ (``PARTWISE_MODELS``, ``PARTWISE_DATA``).

Run: ``python benchmarks/prune_models.py`` (40 minutes on one core; nothing is done where the model exists).
"""

from __future__ import annotations

import dataclasses
import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from images import loaders
from partwise.atomic_files import read_json
from partwise.models.uneven_files import save_uneven
from partwise.prune._budget import count_units
from partwise.prune._choosing import best_units
from rows import ROOT

SHARED = Path(os.environ.get("PARTWISE_MODELS", ROOT.parent / "shared" / "models"))
MAMBA2, LLAMA = SHARED / "mamba2-stdlib-2m", SHARED / "llama-stdlib-5m"
WIKITEXT_MAMBA2 = ROOT / "runs" / "prune_models" / "mamba2-wikitext2"
# Title of a model -> its folder and the text that it was trained on.
MODELS: dict[str, tuple[Path, str]] = {
    "Mamba2 of the standard library": (MAMBA2, "standard library"),
    "Mamba2 of WikiText-2": (WIKITEXT_MAMBA2, "WikiText-2"),
    "Llama of the standard library": (LLAMA, "standard library"),
}
Use = Literal["calibration", "test"]
NUM_STEPS, BATCH_SIZE, CONTEXT, PEAK = 1400, 16, 256, 2e-3


def load(folder: Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # Mamba2 says on every load that it runs without its CUDA kernels
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


def texts(name: str, use: Use | Literal["train"]) -> Sequence[str]:
    """Text by what it is for. Source: of the held-out files every other one is for calibration. WikiText-2: its three parts."""
    if name == "WikiText-2":
        return [loaders().wikitext2({"train": "train", "calibration": "valid", "test": "test"}[use])]
    folder, names = Path(sysconfig.get_path("stdlib")), read_json(MAMBA2 / "partwise_base.json")["held_out_files"]
    by_size = sorted((path for file in names if (path := folder / file).exists()), key=lambda path: (-path.stat().st_size, path))
    return [path.read_text(errors="replace") for path in by_size[{"test": 0, "calibration": 1}[use] :: 2]]


def rows_of(name: str, tokenizer: Any, *, use: Use, num_rows: int, num_tokens: int) -> Tensor:
    """Rows of consecutive tokens, none of them twice, spread over the text: (num_rows, num_tokens)."""
    stretches = [piece for text in texts(name, use) for piece in _stretches(tokenizer, text, num_tokens)]
    if len(stretches) < num_rows:
        raise ValueError(f"got {len(stretches)} stretches of {num_tokens} tokens in {name}, {use}; expected {num_rows}. Ask for fewer rows.")
    return torch.tensor([stretches[number * len(stretches) // num_rows] for number in range(num_rows)])


def _stretches(tokenizer: Any, text: str, num_tokens: int) -> list[list[int]]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[start : start + num_tokens] for start in range(0, len(ids) - num_tokens + 1, num_tokens)]


@torch.no_grad()
def perplexity(model: Any, rows: Tensor, *, batch_size: int = 8) -> float:
    """Over all predicted tokens of some rows."""
    losses = [float(model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch) for batch in rows.split(batch_size)]
    return math.exp(sum(losses) / len(rows))


def draws_of(name: str, tokenizer: Any, *, num_draws: int, num_rows: int, num_tokens: int) -> list[Tensor]:
    """Calibration rows, dealt like cards, so that no two draws have a row in common: (num_rows, num_tokens) each."""
    rows = rows_of(name, tokenizer, use="calibration", num_rows=num_draws * num_rows, num_tokens=num_tokens)
    return [rows[draw::num_draws] for draw in range(num_draws)]


def present() -> list[str]:
    """Models that are on this machine; says in a line which are not."""
    for title, (folder, _) in MODELS.items():
        if not folder.exists():
            print(f"skipped {title}: there is no {folder}; set PARTWISE_MODELS, or run benchmarks/prune_models.py", flush=True)
    return [title for title, (folder, _) in MODELS.items() if folder.exists()]


def written(method: Any) -> str:
    """What makes a method, without what it has by default.

    >>> from partwise.prune import Magnitude
    >>> written(Magnitude(keep=0.5))
    'Magnitude(keep=0.5)'
    """
    given = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    changed = [f"{field.name}={given[field.name]!r}" for field in dataclasses.fields(method) if given[field.name] != field.default]
    return f"{type(method).__name__}({', '.join(changed)})"


def plans_at(method: Any, model: Any, data: Any, keeps: Sequence[float]) -> Iterator[tuple[float, Any]]:
    """A plan for every size. Where scores do not depend on the size, they are made once, and the best units are taken anew for each."""
    axes = {axis.name: axis for axis in method.find_axes(model)}
    once = None
    for keep in keeps:
        wanted = dataclasses.replace(method, keep=keep)
        if once is None or (method.recalibrate and method.WALKS and method.NEEDS_DATA):
            once = wanted.plan(model, data)
            yield keep, once
        else:
            counts = count_units(wanted, model, list(axes.values()), {}, None)
            units = {name: best_units(scores, axes[name], keep=counts[name], protect=None) for name, scores in once.scores.items()}
            yield keep, dataclasses.replace(once, units=units, method=repr(wanted))


def make_wikitext_model() -> None:
    """Train the Mamba2 of the standard library on WikiText-2, on one core."""
    if WIKITEXT_MAMBA2.exists():
        return
    model, tokenizer = load(MAMBA2)
    for layer in model.backbone.layers:
        layer.mixer.chunk_size = 32  # the same numbers as with 64, and the fastest on a CPU
    [text] = texts("WikiText-2", "train")
    lines = text.splitlines(keepends=True)
    pieces = ["".join(lines[start : start + 1000]) for start in range(0, len(lines), 1000)]  # long strings take the tokenizer long
    ids = torch.tensor([token for piece in tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] for token in piece])
    blocks = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=PEAK, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=NUM_STEPS, pct_start=0.05)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(NUM_STEPS * BATCH_SIZE // len(blocks) + 1)])
    held_out = rows_of("WikiText-2", tokenizer, use="calibration", num_rows=32, num_tokens=CONTEXT)
    model.train()
    for step in range(NUM_STEPS):
        batch = blocks[order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1} of {NUM_STEPS}: loss {float(loss):.3f}, held-out perplexity {perplexity(model.eval(), held_out):.1f}", flush=True)
            model.train()
    for layer in model.backbone.layers:
        layer.mixer.chunk_size = model.config.chunk_size
    save_uneven(model.eval(), WIKITEXT_MAMBA2, tokenizer=tokenizer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make_wikitext_model()
