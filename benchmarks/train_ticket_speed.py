"""How much faster tickets decode than the model they were cut from, and how much smaller they are on disk.

Speed does not depend on what a model has learned: the small model is a trained one from ../shared (``PARTWISE_MODELS``), the larger one is fresh. The
limit is the ratio of weights that are read for a token. Run: ``python benchmarks/train_ticket_speed.py [small] [large]`` (some minutes on two free cores).
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from partwise.train import TwIST
from partwise.train._local import with_threads
from partwise.train._metrics import _by_turns, _decode
from partwise.train.ticket import Ticket, cut, save_ticket
from rows import ROOT, Row, append

NAME = "train_ticket_speed"
MODEL = Path(os.environ.get("PARTWISE_MODELS", ROOT.parent / "shared" / "models")) / "llama-stdlib-5m"
SIZES = (0.75, 0.5, 0.25)
GOAL = 1.5  # times the speed, at half the size
REPEATS, PROMPT, WRITTEN = 7, 32, 32


def small() -> Any:
    """5.5 million parameters."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def large() -> Any:
    """The blocks of GPT-2's smallest model as a Llama, with a smaller vocabulary: 98 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16384, hidden_size=768, num_hidden_layers=12, intermediate_size=2048, tie_word_embeddings=True, **heads)
    )


def tickets(model: Any) -> list[Ticket]:
    """The whole model and its tickets, the largest first; at 1 everything is kept."""
    method = TwIST(choice="nested")
    axes = method.find_axes(model)
    return [cut(method, model, axes, keep) for keep in (1.0, *SIZES)]


def speeds(models: Sequence[Any], *, batch_size: int, threads: int, repeats: int = REPEATS) -> list[list[float]]:
    """Tokens per second of every model in every turn; all models take part in a turn."""
    with with_threads(threads):
        seconds = _by_turns([partial(_decode, model, batch_size, PROMPT, WRITTEN) for model in models], repeats=repeats)
    return [[batch_size * WRITTEN / second for second in of_model] for of_model in seconds]


def bytes_on_disk(ticket: Ticket) -> int:
    """Of the file of weights that `save_ticket` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save_ticket(ticket, Path(folder) / "ticket")
        return sum(path.stat().st_size for path in (Path(folder) / "ticket").glob("*.safetensors"))


def compare(title: str, found: Sequence[Ticket], *, batch_size: int, threads: int) -> None:
    """A row for each size."""
    started, where = time.perf_counter(), f"{title}, batch {batch_size}, {threads} thread{'s' if threads > 1 else ''}"
    whole, *others = speeds([ticket.model for ticket in found], batch_size=batch_size, threads=threads)
    seconds = time.perf_counter() - started
    for ticket, values in zip(found[1:], others, strict=True):
        ratio, limit = statistics.median(values) / statistics.median(whole), found[0].num_parameters / ticket.num_parameters
        is_goal = ticket.keep == 0.5
        row = Row(
            claim=f"A ticket of {ticket.keep:.0%} decodes faster than the whole model: {where}",
            method="TwIST(choice='nested')",
            values=tuple(values),
            unit="tokens per second",
            seeds=tuple(range(len(values))),
            seconds=seconds,
            baseline="whole model",
            baseline_values=tuple(whole),
            expected=f"at least {GOAL} times the speed, by medians" if is_goal else "",
            held=ratio >= GOAL if is_goal else None,
            note=f"{ratio:.2f} times by medians; as many weights fewer would be {limit:.2f} times. {' '.join(ticket.notes)}".strip(),
        )
        append(NAME, row)
        print(row.claim, f"{ratio:.2f} of {limit:.2f}", flush=True)


def sizes(title: str, found: Sequence[Ticket]) -> None:
    """A row for each size: bytes of the weights on disk."""
    started = time.perf_counter()
    whole = bytes_on_disk(found[0])
    for ticket in found[1:]:
        row = Row(
            claim=f"Bytes on disk of a ticket of {ticket.keep:.0%}: {title}",
            method="TwIST(choice='nested')",
            values=(float(bytes_on_disk(ticket)),),
            unit="bytes, float32",
            seeds=(0,),
            seconds=time.perf_counter() - started,
            baseline="whole model",
            baseline_values=(float(whole),),
            note=f"{ticket.num_parameters / 1e6:.2f} of {found[0].num_parameters / 1e6:.2f} million parameters; embeddings are never cut.",
        )
        append(NAME, row)


def run(title: str, model: Any) -> None:
    """All rows of one model."""
    found = tickets(model.eval())
    sizes(title, found)
    for threads in (1, 2):
        for batch_size in (1, 8):
            compare(title, found, batch_size=batch_size, threads=threads)


if __name__ == "__main__":
    for name, make, words in (
        ("small", small, "trained Llama of 5.5 million parameters"),
        ("large", large, "fresh Llama of {:.0f} million parameters"),
    ):
        if not sys.argv[1:] or name in sys.argv[1:]:
            made = make()
            run(words.format(sum(parameter.numel() for parameter in made.parameters()) / 1e6), made)
