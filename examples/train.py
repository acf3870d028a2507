"""Train a tiny language model by subnetworks, cut it to three sizes, and print what each is worth beside dense training on as many tokens.

Run: ``python examples/train.py`` (under a minute on two cores, no network). The text is the source of a few modules of Python's standard library,
characters are tokens. Everything that matters is in ``main``: replace model, data and sizes by your own.
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
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from partwise.train import LocalSGD, OptimizerSettings, SubnetTrainer, TwIST
from partwise.train.ticket import Ticket, cut, save_ticket

CONTEXT, BATCH_SIZE, LOCAL_STEPS = 48, 16, 10
SIZES = (0.75, 0.5, 0.25)
MODULES = (argparse, inspect, json, shutil, statistics, string, tempfile, textwrap)


def blocks_of_text() -> torch.Tensor:
    """Characters of some modules as numbers (block, position)."""
    text = "".join(inspect.getsource(module) for module in MODULES)
    numbers = torch.tensor([byte for byte in text.encode() if byte < 128])
    return numbers[: len(numbers) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def small_llama() -> LlamaForCausalLM:
    """Eight heads, so that 75, 50 and 25 % of them divide the hidden size, as LlamaConfig wants it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=CONTEXT, **sizes))


def loss_on(model: torch.nn.Module, blocks: torch.Tensor) -> float:
    """Mean loss per character."""
    with torch.no_grad():
        return float(model.eval()(input_ids=blocks, labels=blocks).loss)


def main(num_rounds: int = 20) -> None:
    """Train twice, densely and by subnetworks, and compare tickets."""
    blocks = blocks_of_text()
    train, choose, test = blocks[:-200], blocks[-200:-100], blocks[-100:]  # tickets are not chosen on what they are tested on
    loader = DataLoader([{"input_ids": block, "labels": block} for block in train], batch_size=BATCH_SIZE, shuffle=True)
    optimizer = OptimizerSettings(lr=3e-3)

    method = TwIST(num_parts=2, num_local_steps=LOCAL_STEPS)
    subnets = SubnetTrainer(small_llama(), method, optimizer=optimizer, probe_every=0).fit(loader, num_rounds=num_rounds)
    # As many tokens, in as many steps of one worker: dense training in the same code.
    alone = LocalSGD(num_parts=1, num_local_steps=LOCAL_STEPS * method.num_parts)
    dense = SubnetTrainer(small_llama(), alone, optimizer=optimizer, probe_every=0).fit(loader, num_rounds=num_rounds)
    assert sum(report.num_samples for report in subnets.history) == sum(report.num_samples for report in dense.history)

    table = Table("units", "parameters", "TwIST, best of 8", "TwIST, random", "dense, random", title=f"loss on {len(test)} blocks of unseen source")
    whole = sum(parameter.numel() for parameter in dense.model.parameters())
    table.add_row("100 %", f"{whole:,}", f"{loss_on(subnets.model, test):.3f}", "", f"{loss_on(dense.model, test):.3f}")
    best: Ticket | None = None
    for keep in SIZES:
        best = subnets.search_ticket(keep, evaluate=lambda model: loss_on(model, choose), num_candidates=8)
        random = [
            statistics.mean(loss_on(cut(method, trainer.model, subnets.axes, keep, seed=seed).model, test) for seed in range(4))
            for trainer in (subnets, dense)
        ]
        row = (f"{keep:.0%}".replace("%", " %"), f"{best.num_parameters:,}", f"{loss_on(best.model, test):.3f}", *(f"{loss:.3f}" for loss in random))
        table.add_row(*row)
    Console().print(table)

    assert best is not None
    with tempfile.TemporaryDirectory() as folder:
        save_ticket(best, Path(folder) / "ticket")
        opened = LlamaForCausalLM.from_pretrained(Path(folder) / "ticket")  # stock transformers
        with torch.no_grad():
            same = torch.equal(opened(test).logits, best.model(test).logits)
    Console().print(f"the smallest, opened again by transformers: {'the same logits' if same else 'OTHER LOGITS'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="TwIST on a tiny model, and its tickets beside those of dense training.")
    parser.add_argument("--num-rounds", type=int, default=20)
    main(parser.parse_args().num_rounds)
