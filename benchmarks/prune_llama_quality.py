"""What neurons and heads of a trained Llama are worth: held-out perplexity after every method at equal sizes, without any fine-tuning.

``neurons``: 90, 75 and 50 % of the neurons of every layer. ``heads``: half of the neurons and half of the groups of heads, a number that LlamaConfig takes.
Low-rank layers get as many parameters as the pruned model has. Each draw of calibration text shares no row with another; random units have a seed for each
draw. Run: ``python benchmarks/prune_llama_quality.py [neurons] [heads] [--resume]`` (twenty minutes on one core).
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from partwise.prune import METHODS, apply
from prune_models import MODELS, draws_of, load, perplexity, present, rows_of, written
from resumable import KeptValues
from rows import Row, append

NAME, TITLE = "prune_llama_quality", "Llama of the standard library"
DRAWS = (0, 1, 2)
CALIBRATION, TEST = (128, 128), (64, 256)  # rows, tokens
# Part -> kinds of units, and the sizes.
PARTS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {"neurons": (("neurons",), (0.9, 0.75, 0.5)), "heads": (("heads", "neurons"), (0.5,))}
# Name in the rows -> name of the method, and settings.
MEASURED: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "random": ("random", {}),
    "taylor": ("taylor", {}),
    "wanda": ("wanda", {}),
    "wanda, fluctuation": ("wanda", {"metric": "fluctuation"}),
    "i-spasp": ("i-spasp", {}),
    "i-spasp, size": ("i-spasp", {"importance": "size"}),
    "greedy": ("greedy", {}),
    "lord": ("lord", {}),
    "lord in the feed-forward layers": ("lord", {"layers": ("*.mlp.*",)}),
}
LOW_RANK = "lord"
ASKED, BASELINES = ("wanda", "i-spasp", "greedy", "lord"), ("magnitude", "random")


def method_of(name: str, kinds: Sequence[str], keep: float, *, seed: int = 0, num_parameters: int = 0) -> Any:
    """A method of one size; low-rank layers get a number of parameters."""
    known, settings = MEASURED[name]
    module, _, kind = METHODS[known].partition(":")
    method = getattr(importlib.import_module(module), kind)(**settings)
    if known == LOW_RANK:
        return replace(method, max_parameters=num_parameters)
    return replace(method, keep=keep, kinds=tuple(kinds), **({"seed": seed} if known == "random" else {}))


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measured(model: Any, method: Any, rows: Tensor, test: Tensor) -> list[float]:
    """Perplexity, and parameters."""
    small = apply(model, method.plan(model, rows))
    return [perplexity(small, test), count(small)]


def run(part: str, values: KeptValues, *, calibration: tuple[int, int] = CALIBRATION, test: tuple[int, int] = TEST, names: Sequence[str] = ()) -> None:
    """All rows of one part."""
    folder, text = MODELS[TITLE]
    model, tokenizer = load(folder)
    draws = draws_of(text, tokenizer, num_draws=len(DRAWS), num_rows=calibration[0], num_tokens=calibration[1])
    tested = rows_of(text, tokenizer, use="test", num_rows=test[0], num_tokens=test[1])
    whole = values.of("whole model", lambda: perplexity(model, tested))
    kinds, sizes = PARTS[part]
    for keep in sizes:
        found: dict[str, list[list[float]]] = {}
        methods: dict[str, Any] = {}
        num_parameters = 0
        for name in names or [name for name, (known, _) in MEASURED.items() if known in METHODS]:
            for draw in DRAWS:
                method = method_of(name, kinds, keep, seed=draw, num_parameters=num_parameters)
                if draw and name == "magnitude":  # reads no data
                    continue
                found.setdefault(name, []).append(values.of(f"{name}, keep {keep}, draw {draw}", partial(measured, model, method, draws[draw], tested)))
                methods.setdefault(name, method)
            num_parameters = num_parameters or int(found[name][0][1])  # of the first one, magnitude
        for name in found:
            append(NAME, quality_row(kinds, keep, name, methods[name], found, whole, values.seconds, count(model)))
        order = sorted(found, key=lambda name: statistics.median(value for value, _ in found[name]))
        print(part, keep, [f"{name} {statistics.median(value for value, _ in found[name]) / whole - 1:+.1%}" for name in order], flush=True)


def quality_row(
    kinds: Sequence[str], keep: float, name: str, method: Any, found: Mapping[str, list[list[float]]], whole: float, seconds: float, num_whole: int
) -> Row:
    """One method at one size, beside the whole model."""
    middle = {other: statistics.median(value for value, _ in of_draws) for other, of_draws in found.items()}
    baselines = min(value for other in BASELINES if other in found for value, _ in found[other])
    asked = name in ASKED and keep == 0.5 and tuple(kinds) == ("neurons",)
    place = sorted(middle, key=lambda other: middle[other]).index(name) + 1
    return Row(
        claim=f"Perplexity with {keep:.0%} of the {' and '.join(kinds)}: {TITLE}, {name}",
        method=written(method),
        values=tuple(value for value, _ in found[name]),
        unit="perplexity",
        seeds=tuple(range(len(found[name]))),
        seconds=seconds,
        baseline="whole model",
        baseline_values=(whole,) * len(found[name]),
        expected="below random units and magnitude, in every draw" if asked else "",
        held=all(value < baselines for value, _ in found[name]) if asked else None,
        note=f"{middle[name] / whole - 1:+.1%} by medians, place {place} of {len(middle)}; {found[name][0][1]:,.0f} of {num_whole:,} parameters. {TEST[0]} "
        f"held-out rows of {TEST[1]} tokens; calibration of {CALIBRATION[0]} rows of {CALIBRATION[1]}, no fine-tuning.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--resume", action="store_true", help="use values that were measured before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if TITLE not in present():
        return
    for part in options.parts or PARTS:
        run(part, KeptValues(f"{NAME}/{part}", resume=options.resume))


if __name__ == "__main__":
    main()
