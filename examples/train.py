"""Train a tiny language model by subnetworks, cut it to three sizes, and print what each is worth beside pruning of one trained densely on as many tokens.

Run: ``python examples/train.py`` (under a minute on a core of its own, no network). The text is the source of a few modules of Python's standard library,
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
from partwise.train.ticket import cut, search

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


def main(num_rounds: int = 32) -> None:
    """Train twice, by subnetworks and densely, and compare what is left when both are cut."""
    blocks = blocks_of_text()
    train, choose, test = blocks[:-200], blocks[-200:-100], blocks[-100:]  # tickets are not chosen on what they are tested on
    loader = DataLoader([{"input_ids": block, "labels": block} for block in train], batch_size=BATCH_SIZE, shuffle=True)
    optimizer = OptimizerSettings(lr=3e-3)

    # One part at a time: on one machine each step then builds on the one before. Workers: num_parts=4 and SubnetTrainer(..., engine="ray").
    # The first 70 % of the rounds train the whole model, because it starts from random weights; leave that out for one that is trained already.
    method = TwIST(num_parts=1, whole_share=0.7, num_local_steps=LOCAL_STEPS)
    subnets = SubnetTrainer(small_llama(), method, optimizer=optimizer, probe_every=0).fit(loader, num_rounds=num_rounds)
    # The same batches in the same order: dense training in the same code.
    alone = LocalSGD(num_parts=1, num_local_steps=LOCAL_STEPS)
    dense = SubnetTrainer(small_llama(), alone, optimizer=optimizer, probe_every=0).fit(loader, num_rounds=num_rounds)
    assert sum(report.num_samples for report in subnets.history) == sum(report.num_samples for report in dense.history)

    table = Table("units", "parameters", "TwIST", "dense, pruned", "dense, random units", title=f"loss on {len(test)} blocks of unseen source")
    whole = sum(parameter.numel() for parameter in dense.model.parameters())
    table.add_row("100 %", f"{whole:,}", f"{loss_on(subnets.model, test):.3f}", f"{loss_on(dense.model, test):.3f}")
    for keep in SIZES:
        small = subnets.ticket(keep).model
        pruned, random = pruned_and_random(dense.model, keep, choose, test)
        number = sum(parameter.numel() for parameter in small.parameters())
        table.add_row(f"{100 * keep:g} %", f"{number:,}", f"{loss_on(small, test):.3f}", f"{pruned:.3f}", f"{random:.3f}")
    Console().print(table)

    ticket = subnets.search_ticket(SIZES[-1], evaluate=lambda model: loss_on(model, choose))
    with tempfile.TemporaryDirectory() as folder:
        ticket.save(Path(folder) / "ticket")
        opened = LlamaForCausalLM.from_pretrained(Path(folder) / "ticket")  # stock transformers
        with torch.no_grad():
            same = torch.equal(opened(test).logits, ticket.model(test).logits)
    Console().print(f"the smallest, opened again by transformers: {'the same logits' if same else 'OTHER LOGITS'}")


def pruned_and_random(model: torch.nn.Module, keep: float, choose: torch.Tensor, test: torch.Tensor) -> tuple[float, float]:
    """Loss of a dense model cut to its best-ranked units, and the mean over some random cuts of the same size."""
    units = TwIST(choice="random", correction="none")
    axes = units.find_axes(model)
    calibration = [{"input_ids": choose}]
    ranked = search(units, model, axes, keep, evaluate=lambda small: loss_on(small, choose), num_candidates=1, calibration=calibration)
    random = statistics.mean(loss_on(cut(units, model, axes, keep, seed=seed).model, test) for seed in range(4))
    return loss_on(ranked.model, test), random


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="TwIST on a tiny model, and its tickets beside pruning of a dense one.")
    parser.add_argument("--num-rounds", type=int, default=32)
    main(parser.parse_args().num_rounds)
