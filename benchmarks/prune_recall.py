"""Does a pruned Mamba2 still remember? Small models that learned to look up a value by its key, to perfection, with 10 to 90 % of their states removed.

A text tells four pairs of a key and a value, drawn by chance, and then asks for all four in another order; scored are the answers. Perplexity of ordinary text
hides such losses, because little of it is recall. Models of two layers with 32 states each are trained here, one for each seed, and stay in runs/.
Run: ``OMP_NUM_THREADS=1 python benchmarks/prune_recall.py [--resume]`` (ten minutes on one core).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import partwise
from partwise.models.uneven_files import save_uneven
from partwise.prune import GHOST, Magnitude, Random, Taylor, apply
from prune_models import plans_at, written
from resumable import KeptValues
from rows import ROOT, Row, append

NAME = "prune_recall"
SEEDS, DRAWN = (0, 1, 2), (0, 1, 2, 3, 4)  # of models; of random states
REMOVED = (0.1, 0.3, 0.5, 0.7, 0.9)
KEYS, PAIRS = 16, 4  # keys, and as many values
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32, "state_size": 32, "n_groups": 1, "chunk_size": 16}
NUM_STEPS, BATCH_SIZE, RATE = 1000, 64, 5e-3
CALIBRATION, TEST = 128, 1024  # texts
ENTRIES: dict[str, Any] = {
    "GHOST": GHOST(),
    "controllability": GHOST(factor="controllability"),
    "observability": GHOST(factor="observability"),
    "product of means": GHOST(factor="product_of_means"),
    "Taylor": Taylor(),
    "Magnitude": Magnitude(),
    "Random": Random(),
}


def texts(num_rows: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids, and labels of what is answered: (rows, 4 * pairs) each."""
    draws = torch.Generator().manual_seed(seed)
    keys = torch.rand(num_rows, KEYS, generator=draws).argsort(1)[:, :PAIRS]  # (rows, pairs)
    found = KEYS + torch.randint(KEYS, (num_rows, PAIRS), generator=draws)
    order = torch.rand(num_rows, PAIRS, generator=draws).argsort(1)
    told, asked = torch.stack([keys, found], 2).flatten(1), torch.stack([keys.gather(1, order), found.gather(1, order)], 2).flatten(1)
    labels = torch.full((num_rows, 4 * PAIRS), -100)
    labels[:, 2 * PAIRS + 1 :: 2] = found.gather(1, order)
    return torch.cat([told, asked], 1), labels


@torch.no_grad()
def accuracy(model: Any, rows: tuple[Tensor, Tensor]) -> float:
    """Share of the answers that are right."""
    ids, labels = rows
    guessed = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)  # the logits at a token tell the next one
    asked = labels[:, 1:] != -100
    return float((guessed == labels[:, 1:])[asked].double().mean())


def trained(seed: int, *, num_steps: int = NUM_STEPS, folder: Path = ROOT / "runs" / NAME) -> Any:
    """A model that looks values up, from its file where there is one."""
    path = folder / f"mamba2-{num_steps}-steps-{seed}"
    if not path.exists():
        transformers.utils.logging.set_verbosity_error()
        torch.manual_seed(seed)
        config = transformers.Mamba2Config(vocab_size=2 * KEYS, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False, **SIZES)
        model = transformers.Mamba2ForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=num_steps, pct_start=0.1)
        for step in range(num_steps):
            ids, labels = texts(BATCH_SIZE, seed=1000 * seed + step)
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        save_uneven(model.eval(), path)
    return partwise.load(path)


def found_by(model: Any, method: Any, values: KeptValues, name: str, removed: Sequence[float]) -> list[float]:
    """Accuracy with each share of the states removed."""
    test = texts(TEST, seed=10**6)
    missing = [share for share in removed if not values.has(f"{name}, {share:.0%}")]
    plans = plans_at(method, model, texts(CALIBRATION, seed=10**6 + 1)[0], [round(1 - share, 6) for share in missing])

    def measure() -> float:
        return accuracy(apply(model, next(plans)[1]), test)

    return [values.of(f"{name}, {share:.0%}", measure) for share in removed]


def run(models: Mapping[int, Any], values: KeptValues, *, removed: Sequence[float] = REMOVED) -> None:
    """A row for each method and size; random states: for each model the mean over several draws."""
    whole = [values.of(f"whole, model {seed}", partial(accuracy, model, texts(TEST, seed=10**6))) for seed, model in models.items()]
    found: dict[str, list[list[float]]] = {}  # method -> for each model, accuracy at each share
    for name, method in ENTRIES.items():
        variants = [replace(method, seed=draw) for draw in DRAWN] if name == "Random" else [method]
        for seed, model in models.items():
            drawn = [found_by(model, each, values, f"{name} {draw}, model {seed}", removed) for draw, each in enumerate(variants)]
            found.setdefault(name, []).append([statistics.fmean(at) for at in zip(*drawn, strict=True)])
    for number, share in enumerate(removed):
        at = {name: [of_model[number] for of_model in of_models] for name, of_models in found.items()}
        for name, ours in at.items():
            append(NAME, row_of(name, share, ours, at, whole, tuple(models), values.seconds))
        print(f"{share:.0%} removed", {name: f"{statistics.median(ours):.3f}" for name, ours in at.items()}, flush=True)


def row_of(
    name: str, share: float, ours: Sequence[float], at: Mapping[str, list[float]], whole: Sequence[float], seeds: tuple[int, ...], seconds: float
) -> Row:
    """One method at one size; GHOST against magnitude and random states."""
    rivals = [max(pair) for pair in zip(at["Magnitude"], at["Random"], strict=True)]
    asked = name == "GHOST" and share in (0.5, 0.7)
    return Row(
        claim=f"Values that are looked up with {share:.0%} of the states removed: {name}",
        method=written(replace(ENTRIES[name], keep=round(1 - share, 6))),
        values=tuple(ours),
        unit="share of the answers",
        seeds=seeds,
        seconds=seconds,
        baseline="the better of Magnitude and Random" if name == "GHOST" else "whole model",
        baseline_values=tuple(rivals if name == "GHOST" else whole),
        paper="LAMBADA loses 14 points at 50 % (1.3 billion parameters)" if asked and share == 0.5 else None,
        expected="no lower in every model" if asked else "",
        held=all(mine >= other for mine, other in zip(ours, rivals, strict=True)) if asked else None,
        note=f"The whole models find {min(whole):.1%}; by chance {1 / KEYS:.1%}. {PAIRS} pairs of {KEYS} keys and {KEYS} values, Mamba2 of "
        f"{SIZES['num_hidden_layers']} layers with {SIZES['state_size']} states." + (f" Means over {len(DRAWN)} draws." if name == "Random" else ""),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", action="store_true", help="use values that were measured before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run({seed: trained(seed) for seed in SEEDS}, KeptValues(NAME, resume=options.resume))


if __name__ == "__main__":
    main()
