"""Train a tiny Mamba2, cut its states with several methods to several sizes, and print what each is worth on unseen text; save half of it and open it again.

Run: ``python examples/prune.py`` (under a minute on a core of its own, no network). The text is the source of a few modules of Python's standard library,
characters are tokens. Everything that matters is in ``main``: replace model, text and sizes by your own.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import shutil
import statistics
import string
import tempfile
import textwrap
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM
from transformers.utils import logging

import partwise
from partwise.models.cache_sizes import cache_sizes, total_cache_bytes
from partwise.prune import GHOST, Magnitude, Random, Taylor, apply, save

CONTEXT, BATCH_SIZE, STEPS_PER_ROUND = 64, 16, 10
SIZES = (0.5, 0.25, 0.1)
MODULES = (argparse, inspect, json, shutil, statistics, string, tempfile, textwrap)
logging.set_verbosity_error()  # Mamba2 says on every load that it runs without its CUDA kernels
logging.disable_progress_bar()


def blocks_of_text() -> torch.Tensor:
    """Characters of some modules as numbers (block, position)."""
    text = "".join(inspect.getsource(module) for module in MODULES)
    numbers = torch.tensor([byte for byte in text.encode() if byte < 128])
    return numbers[: len(numbers) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def trained_model(blocks: torch.Tensor, *, num_steps: int) -> Mamba2ForCausalLM:
    """Two layers with 4 heads of 32 entries and 32 states each."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32, "state_size": 32, "n_groups": 1, "chunk_size": 32}
    model = Mamba2ForCausalLM(Mamba2Config(vocab_size=128, bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=num_steps, pct_start=0.1)
    for _ in range(num_steps):
        batch = blocks[torch.randint(len(blocks), (BATCH_SIZE,))]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def perplexity(model: torch.nn.Module, blocks: torch.Tensor) -> float:
    """Per character."""
    with torch.no_grad():
        return math.exp(float(model(input_ids=blocks, labels=blocks).loss))


def bytes_of_a_sequence(model: torch.nn.Module) -> int:
    """What a text holds in memory while the model writes, however long it gets."""
    return total_cache_bytes(cache_sizes(model), num_tokens=CONTEXT)


def main(num_rounds: int = 24) -> None:
    """Train, cut in several ways, save, open."""
    console, blocks = Console(highlight=False), blocks_of_text()
    train, calibration, test = blocks[:-132], blocks[-132:-100], blocks[-100:]  # nothing is tested on what it was chosen by
    model = trained_model(train, num_steps=STEPS_PER_ROUND * num_rounds)

    table = Table("states", "a sequence holds", "GHOST", "Taylor", "Magnitude", "Random", title=f"perplexity on {len(test)} blocks of unseen source")
    table.add_row("100 %", f"{bytes_of_a_sequence(model):,} bytes", f"{perplexity(model, test):.3f}")
    for keep in SIZES:
        small = [apply(model, method.plan(model, calibration)) for method in (GHOST(keep=keep), Taylor(keep=keep), Magnitude(keep=keep), Random(keep=keep))]
        table.add_row(f"{100 * keep:g} %", f"{bytes_of_a_sequence(small[0]):,} bytes", *(f"{perplexity(one, test):.3f}" for one in small))
    console.print(table)

    plan = GHOST(keep=0.5).plan(model, calibration)
    half = apply(model, plan)
    for module in plan.ledger(model).by_module():
        console.print(f"{module.where}: {module.statuses}")
    weights, fewer = (sum(parameter.numel() for parameter in one.parameters()) for one in (model, half))
    console.print(f"of the weights {100 * fewer / weights:.1f} % stay: a state is cheap to store, and dear to hold for every text")

    # As many states in every layer: an ordinary checkpoint. Chosen over the whole model, layers differ, and partwise opens it.
    uneven = apply(model, GHOST(keep=0.5, scope="model").plan(model, calibration))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save(half, Path(folder) / "half", plan=plan)
        save(uneven, Path(folder) / "uneven")
        for small, opened in (
            (half, AutoModelForCausalLM.from_pretrained(Path(folder) / "half")),  # stock transformers
            (uneven, partwise.load(Path(folder) / "uneven")),
        ):
            same = torch.equal(small(test).logits, opened(test).logits)
            states = [layer.mixer.ssm_state_size for layer in opened.backbone.layers]
            console.print(f"opened again, states of each layer {states}: {'the same logits' if same else 'OTHER LOGITS'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Cuts of a tiny Mamba2 with several methods, and how to save and open them.")
    parser.add_argument("--num-rounds", type=int, default=24)
    main(parser.parse_args().num_rounds)
