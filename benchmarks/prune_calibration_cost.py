"""What calibration costs: memory against the depth of a model, and time against calibration tokens, width and depth.

``memory``: the peak of a process of its own beyond what it held before, weights included, and the bytes of activations that a walk holds between layers. The
models are random: cost does not depend on what was learned. ``tokens``, ``width`` and ``depth``: fitted exponents, the slopes of lines through the logarithms
of size and seconds; methods and sizes take their turns in one process, several times over, so that a machine that slows down slows all of them.
Run: ``OMP_NUM_THREADS=1 python benchmarks/prune_calibration_cost.py [memory] [tokens] [width] [depth]`` (about ten minutes on a free core).
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from partwise.prune import METHODS
from partwise.prune.unit_method import UnitMethod, Visit
from rows import Row, append

NAME = "prune_calibration_cost"
REPEATS = (0, 1, 2)
KEEP, VOCABULARY, ROW_TOKENS = 0.5, 512, 128
# Kind of model -> the methods that are measured on it, those that walk from layer to layer first.
MEASURED = {"Mamba2": ("ghost", "taylor", "magnitude"), "Llama": ("i-spasp", "greedy", "wanda", "taylor", "magnitude")}
DEPTHS, WIDTHS, ROWS = (2, 4, 8, 16), (64, 128, 256), (16, 32, 64, 128)
WIDTH, DEPTH, NUM_ROWS = 128, 4, 32  # where something else is varied
FLAT, LINEAR = 1.15, 0.15  # times the memory from the first to the last depth; how far from 1 an exponent may be


def model_of(kind: str, *, width: int, depth: int) -> Any:
    """A random model whose sizes all follow from its width, in evaluation mode."""
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    shared = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": depth, "eos_token_id": None, "pad_token_id": None}
    if kind == "Mamba2":
        sizes = {"head_dim": 32, "num_heads": 2 * width // 32, "state_size": 64, "n_groups": 1, "chunk_size": 16}
        return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**shared, **sizes)).eval()
    sizes = {"num_attention_heads": width // 16, "intermediate_size": 3 * width, "max_position_embeddings": ROW_TOKENS}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, **sizes)).eval()


def texts_of(num_rows: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (num_rows, ROW_TOKENS), generator=torch.Generator().manual_seed(0))


def method_of(name: str) -> Any:
    """A method by the name that the command line knows."""
    module, _, kind = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), kind)(keep=KEEP)


def available(kind: str) -> list[str]:
    return [name for name in MEASURED[kind] if name in METHODS]


def kilobytes(name: str) -> int:
    """Of this process, as the system counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def memory_of(name: str, kind: str, depth: int) -> tuple[float, float]:
    """Megabytes that planning adds to this process at its peak, and that a walk holds between layers."""
    held = [0]

    def note(method: Any) -> Any:
        """The method, which also notes what the walk holds wherever it scores."""

        def choose(visit: Visit, **options: Any) -> Any:
            held[0] = max(held[0], 0 if visit.walk is None else visit.walk.activation_bytes)
            return type(method).choose(method, visit, **options)

        object.__setattr__(method, "choose", choose)
        return method

    torch.set_num_threads(1)
    method_of(name).plan(model_of(kind, width=32, depth=1), texts_of(2))  # whatever is loaded once
    model, rows = model_of(kind, width=WIDTH, depth=depth), texts_of(NUM_ROWS)
    method: UnitMethod = note(method_of(name))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = kilobytes("VmRSS")
    method.plan(model, rows)
    return (kilobytes("VmHWM") - before) * 1024 / 1e6, held[0] / 1e6


def memory_apart(name: str, kind: str, depth: int) -> tuple[float, float]:
    """`memory_of` in a process of its own, which gives every large tensor back as soon as nobody holds it."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "measure", name, kind, str(depth)]
    peak, held = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()[-2:]
    return float(peak), float(held)


def memory(*, depths: Sequence[int] = DEPTHS, repeats: Sequence[int] = REPEATS) -> None:
    """Rows of every method on its kind of model."""
    for kind in MEASURED:
        for name in available(kind):
            if name == "magnitude":
                continue  # reads no data
            started = time.perf_counter()
            found = {depth: [memory_apart(name, kind, depth) for _ in repeats] for depth in depths}
            for row in memory_rows(kind, name, found, repeats, time.perf_counter() - started):
                append(NAME, row)


def memory_rows(kind: str, name: str, found: Mapping[int, list[tuple[float, float]]], repeats: Sequence[int], seconds: float) -> list[Row]:
    """The peak of the deepest model against the shallowest, and what the walk holds."""
    first, last = min(found), max(found)
    peaks = {depth: [peak for peak, _ in of_depth] for depth, of_depth in found.items()}
    held = {depth: [between for _, between in of_depth] for depth, of_depth in found.items()}
    walks, middle = name != "taylor", {depth: statistics.median(of_depth) for depth, of_depth in peaks.items()}
    print(kind, name, {depth: f"{value:.1f} MB" for depth, value in middle.items()}, "held", {depth: of[0] for depth, of in held.items()}, flush=True)
    each = ", ".join(f"{value:.1f} with {depth}" for depth, value in middle.items())
    shared = {"unit": "MB", "seeds": tuple(repeats), "seconds": seconds, "method": repr_of(name)}
    rows = [
        Row(
            claim=f"Peak memory of calibration does not grow with depth, {last} layers against {first}: {kind}, {name}"
            if walks
            else f"Peak memory of calibration, {last} layers against {first}: {kind}, {name}",
            values=tuple(peaks[last]),
            baseline=f"{first} layers",
            baseline_values=tuple(peaks[first]),
            expected=f"at most {FLAT:g} times, by medians" if walks else "",
            held=middle[last] <= FLAT * middle[first] if walks else None,
            note=f"{middle[last] / middle[first]:.2f} times by medians; MB {each} layers, beyond what the process held before. Width {WIDTH}, {NUM_ROWS} rows "
            f"of {ROW_TOKENS} tokens in batches of 8." + ("" if walks else " One backward pass holds the activations of all layers for one batch."),
            **shared,
        )
    ]
    if walks:
        formula = NUM_ROWS * ROW_TOKENS * WIDTH * 4 / 1e6
        rows.append(
            Row(
                claim=f"Between layers a walk holds the activations of one layer: {kind} of {last} layers, {name}",
                values=tuple(held[last]),
                baseline="tokens times width, float32",
                baseline_values=(formula,) * len(repeats),
                expected="the same number at every depth, and the formula's",
                held=all(abs(value - formula) < 1e-9 for of_depth in held.values() for value in of_depth),
                note=f"Depths {', '.join(map(str, found))}.",
                **shared,
            )
        )
    return rows


def repr_of(name: str) -> str:
    return f"{type(method_of(name)).__name__}(keep={KEEP})"


def seconds_of(name: str, model: Any, rows: Tensor) -> float:
    method = method_of(name)
    started = time.perf_counter()
    method.plan(model, rows)
    return time.perf_counter() - started


def by_turns(cases: Mapping[tuple[str, int], tuple[Any, Tensor]], *, repeats: Sequence[int]) -> dict[tuple[str, int], list[float]]:
    """Seconds of (method, size) in every turn, after one turn that is not counted; every other turn goes backwards."""
    found: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for turn in range(len(repeats) + 1):
        for case in list(cases)[:: 1 if turn % 2 else -1]:
            seconds = seconds_of(case[0], *cases[case])
            if turn:
                found[case].append(seconds)
    return found


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def times(what: str, *, sizes: Sequence[int], repeats: Sequence[int] = REPEATS) -> None:
    """Rows of every method: how its time grows with one size."""
    fixed = {"tokens": NUM_ROWS, "width": WIDTH, "depth": DEPTH}
    for kind in MEASURED:
        started, names = time.perf_counter(), available(kind)
        cases = {}
        for size in sizes:
            at = fixed | {what: size}
            pair = (model_of(kind, width=at["width"], depth=at["depth"]), texts_of(at["tokens"]))
            cases |= {(name, size): pair for name in names}
        found = by_turns(cases, repeats=repeats)
        for name in names:
            append(NAME, times_row(what, kind, name, {size: found[name, size] for size in sizes}, repeats, time.perf_counter() - started))


def times_row(what: str, kind: str, name: str, found: Mapping[int, list[float]], repeats: Sequence[int], seconds: float) -> Row:
    """The exponent of every turn."""
    sizes = list(found)
    exponents = tuple(exponent(sizes, [found[size][turn] for size in sizes]) for turn in range(len(repeats)))
    middle = {size * (ROW_TOKENS if what == "tokens" else 1): statistics.median(of_size) for size, of_size in found.items()}
    asked = what == "tokens" and name == "ghost"
    each = ", ".join(f"{value:.3g} s at {size:,}" for size, value in middle.items())
    fixed = {"tokens": f"width {WIDTH}, {DEPTH} layers", "width": f"{DEPTH} layers, {NUM_ROWS * ROW_TOKENS:,} tokens"}
    fixed["depth"] = f"width {WIDTH}, {NUM_ROWS * ROW_TOKENS:,} tokens"
    print(what, kind, name, [f"{value:.2f}" for value in exponents], each, flush=True)
    return Row(
        claim=f"Time of calibration against {'calibration tokens' if what == 'tokens' else what}: {kind}, {name}",
        method=repr_of(name),
        values=exponents,
        unit="exponent",
        seeds=tuple(repeats),
        seconds=seconds,
        paper="about 8 minutes for 1.3 billion parameters" if name == "ghost" and what == "tokens" else None,
        expected=f"linear: within {LINEAR:g} of 1, the median" if asked else "",
        held=abs(statistics.median(exponents) - 1) <= LINEAR if asked else None,
        note=f"{each}; {fixed[what]}." + (" All sizes of the model grow with its width, but not the number of states." if what == "width" else ""),
    )


def main() -> None:
    sizes = {"tokens": ROWS, "width": WIDTHS, "depth": DEPTHS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"any of memory, {', '.join(sizes)}; all if none is named")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.parts or ("memory", *sizes):
        if name == "memory":
            memory()
        else:
            times(name, sizes=sizes[name])


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(*memory_of(sys.argv[2], sys.argv[3], int(sys.argv[4])))
    else:
        main()
