"""Train a tiny language model, write with a cache of a fixed size, and print what every method's cache costs in quality and saves in memory.

Run: ``python examples/serve.py`` (under a minute on a core of its own, no network). The text is the source of a few modules of Python's standard library,
characters are tokens. Everything that matters is in ``main``: replace model, text and sizes by your own.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import statistics
import string
import tempfile
import textwrap

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from partwise.serve import H2O, Scissorhands, ScissorhandsCache, SlidingWindow, StreamingLLM
from partwise.serve.compare import compare

CONTEXT, BATCH_SIZE, STEPS_PER_ROUND = 192, 8, 10
BUDGETS = (24, 96)
MODULES = (argparse, inspect, json, shutil, statistics, string, tempfile, textwrap)


def blocks_of_text() -> torch.Tensor:
    """Characters of some modules as numbers (block, position)."""
    text = "".join(inspect.getsource(module) for module in MODULES)
    numbers = torch.tensor([byte for byte in text.encode() if byte < 128])
    return numbers[: len(numbers) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def trained_model(blocks: torch.Tensor, *, num_steps: int) -> LlamaForCausalLM:
    """Two layers whose heads have 32 dimensions each, as storing in 4 bits wants it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=4 * CONTEXT, bos_token_id=None, eos_token_id=None, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(num_steps):
        batch = blocks[torch.randint(len(blocks), (BATCH_SIZE,))]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main(num_rounds: int = 24) -> None:
    """Train, compare methods on unseen text, and write on with a cache that stays small."""
    console, blocks = Console(), blocks_of_text()
    train, test = blocks[:-40], blocks[-4:]
    model = trained_model(train, num_steps=STEPS_PER_ROUND * num_rounds)

    rules = {"scissorhands": Scissorhands(recent=16, drop=0.25), "streaming-llm": StreamingLLM(), "h2o": H2O(), "sliding-window": SlidingWindow()}
    found = compare(model, test, rules, budgets=BUDGETS)
    table = Table("budget", "method", "perplexity", "KL", "bytes", title=f"unseen source, character by character, {CONTEXT} a row")
    full = found[0].full
    table.add_row("-", "full cache", f"{full.perplexity:.3f}", "", f"{full.peak_bytes:,}")
    for one in found:
        measured = one.measured
        table.add_row(str(one.budget), one.method, f"{measured.perplexity:.3f}", f"{measured.kl:.4f}", f"{measured.peak_bytes:,}")
    console.print(table)

    prompt = test[:1, :64]
    # The first 8 characters never leave; keys and values older than the last 16 are stored in 4 bits.
    cache = ScissorhandsCache(model, budget=64, drop=0.25, pinned=8, bits=4)
    with torch.no_grad():
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), cache=cache, max_new_tokens=CONTEXT, do_sample=True, temperature=0.6, pad_token_id=0
        )
    console.print(f"written: {bytes(ids[0, 64:].tolist()).decode().split()[:8]} ...", markup=False, highlight=False)
    report, promised = cache.report(), cache.max_bytes()
    console.print(f"{report.tokens_seen} tokens passed: {report.bytes:,} bytes in the cache (never above {promised:,}), {report.bytes_full:,} in a full one")
    console.print(f"kept by the first head of the first layer: {cache.kept_positions(layer=0)[0, 0].tolist()}")

    wide = ScissorhandsCache(model, budget=CONTEXT)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    same = torch.equal(model.generate(prompt, cache=wide, **options), model.generate(prompt, cache=DynamicCache(), **options))
    console.print(f"with room for every token: {'the same text as a full cache' if same else 'ANOTHER TEXT'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A key-value cache of fixed size on a tiny model, and what methods differ in.")
    parser.add_argument("--num-rounds", type=int, default=24)
    main(parser.parse_args().num_rounds)
