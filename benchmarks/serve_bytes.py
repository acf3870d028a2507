"""The memory of a cache over a generation of 4,096 tokens, against what it promised; and what a token costs as the context grows.

Every generation runs in a process of its own, through ``generate``, and after every token notes the bytes of all tensors that the cache holds and the resident
memory of the process. The model, of 5.5 million parameters and trained, is from ../shared (``PARTWISE_MODELS``); it was made for 2,048 positions, so what it
writes after that is of no worth, and nothing here is about what it writes. Run: ``python benchmarks/serve_bytes.py [bound] [lengths] [--only Scissorhands]``
(twenty minutes on two free cores; ``lengths``, a quarter of that, measures time).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import serve_texts
from partwise.serve import H2O, TOVA, BudgetedCache, KeyNorm, RandomTokens, Scissorhands, SlidingWindow, SnapKV, StreamingLLM, attached
from partwise.serve.rule import EvictionRule
from rows import ROOT, Row, append, latest, read
from serve_speed import timed

NAME = "serve_bytes"
SEEDS = (0, 1, 2)
MODEL = "standard library"
PROMPT, WRITTEN, BUDGET, LAST = 32, 4096, 256, 3000
CONTEXTS, STEPS, REPEATS = (256, 512, 1024, 2048, 4096), 24, 5
GROWTH = 1.0  # MiB that resident memory may grow over the last tokens; keys and values of a full cache grow by 35
LONGER = 1.05  # times the time per token at the longest context, against that at 512 tokens
FULL = "DynamicCache"
RULES: dict[str, EvictionRule] = {
    "Scissorhands": Scissorhands(),
    "Scissorhands as published": Scissorhands(drop=0.5),
    "SlidingWindow": SlidingWindow(),
    "StreamingLLM": StreamingLLM(),
    "H2O": H2O(),
    "TOVA": TOVA(),
    "SnapKV": SnapKV(),
    "KeyNorm": KeyNorm(),
    "RandomTokens": RandomTokens(),
}
SETTINGS: list[tuple[str, int | None]] = [
    ("Scissorhands", None),
    ("Scissorhands", 8),
    ("Scissorhands", 4),
    *((name, None) for name in list(RULES)[1:]),
]


def resident() -> float:
    """Resident memory of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def generate(name: str, bits: int | None, seed: int) -> None:
    """In a process of its own: write tokens, and print what was noted as JSON."""
    from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, logging, set_seed

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    model, _ = serve_texts.load(MODEL)
    model.generation_config.eos_token_id = None
    cache: Any = DynamicCache(config=model.config) if name == FULL else BudgetedCache(model, RULES[name], budget=BUDGET, bits=bits)  # type: ignore[arg-type]
    held: list[int] = []
    memory: list[float] = []

    class Note(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            if name != FULL:
                held.append(cache.nbytes)
            memory.append(resident())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    set_seed(seed)
    prompt = torch.randint(1, model.config.vocab_size, (1, PROMPT))
    settings = {"max_new_tokens": WRITTEN, "do_sample": True, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    model.generate(input_ids=prompt, cache=cache, stopping_criteria=StoppingCriteriaList([Note()]), **settings)
    growth = LAST * float(np.polyfit(np.arange(LAST), memory[-LAST:], 1)[0])
    bound = 0 if name == FULL else cache.max_bytes(1)
    noted = {"steps": len(memory), "most": max(held, default=0), "over": sum(size > bound for size in held), "bound": bound, "growth": growth}
    print(json.dumps(noted | {"evictions": 0 if name == FULL else cache.report().evictions, "change": max(memory[-LAST:]) - min(memory[-LAST:])}))


def generated(name: str, bits: int | None, seed: int) -> dict[str, float]:
    """What a process that generates has noted."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import serve_bytes as c; c.generate({name!r}, {bits!r}, {seed})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def bound(names: Sequence[str]) -> None:
    """Bytes of tensors, and resident memory, over the generation."""
    model, _ = serve_texts.load(MODEL)
    config = model.config
    tokens = PROMPT + WRITTEN - 1  # the last token that was written is not read
    full_bytes = float(tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * model.dtype.itemsize)
    started = time.perf_counter()
    full = [generated(FULL, None, seed) for seed in SEEDS]
    print(FULL, full[0], f"{time.perf_counter() - started:.0f} s", flush=True)
    for name, bits in SETTINGS:
        if name not in names:
            continue
        started = time.perf_counter()
        found = [generated(name, bits, seed) for seed in SEEDS]
        seconds = time.perf_counter() - started
        print(name, bits, found[0], f"{seconds:.0f} s", flush=True)
        packed, method = "" if bits is None else f" in {bits} bits", f"{RULES[name]!r}, budget={BUDGET}, bits={bits}"
        steps, promised = int(min(run["steps"] for run in found)), int(found[0]["bound"])
        append(
            NAME,
            Row(
                claim=f"Bytes of a cache of {BUDGET} tokens{packed} are never above the promised ones, at any of {WRITTEN:,} steps: {name}",
                method=method,
                values=tuple(run["most"] for run in found),
                unit="bytes at most",
                seeds=SEEDS,
                seconds=seconds,
                baseline="full cache, by formula",
                baseline_values=(full_bytes,) * len(SEEDS),
                expected=f"at most {promised:,} (max_bytes), at every step",
                held=not any(run["over"] for run in found) and steps == WRITTEN,
                note=f"{full_bytes / promised:.1f}x fewer; float32, {steps:,} steps, {int(found[0]['evictions']):,} evictions. Positions go past 2,048.",
            ),
        )
        growth = [run["growth"] for run in found]
        append(
            NAME,
            Row(
                claim=f"Resident memory of the process stays flat once the budget{packed} is reached: {name}, last {LAST:,} of {WRITTEN:,} tokens",
                method=method,
                values=tuple(growth),
                unit="MiB of growth, by a fitted line",
                seeds=SEEDS,
                seconds=seconds,
                baseline=FULL,
                baseline_values=tuple(run["growth"] for run in full),
                expected=f"at most {GROWTH:g} MiB, in every run",
                held=max(growth) <= GROWTH,
                note=f"Largest less smallest over these tokens: {max(run['change'] for run in found):.1f} MiB; the full cache: "
                f"{max(run['change'] for run in full):.1f} MiB.",
            ),
        )


def lengths() -> None:
    """Time per token against the length of the context."""
    from transformers import DynamicCache

    torch.set_num_threads(1)
    model, _ = serve_texts.load(MODEL)
    rules = {"Scissorhands": Scissorhands(), "SlidingWindow": SlidingWindow()}
    started, found = time.perf_counter(), {}
    with attached(model):
        makes = {FULL: partial(DynamicCache, config=model.config)}
        makes |= {name: partial(BudgetedCache, model, rule, budget=BUDGET) for name, rule in rules.items()}
        for context in CONTEXTS:
            ids = torch.randint(1, model.config.vocab_size, (1, context + STEPS), generator=torch.Generator().manual_seed(0))
            found[context] = timed(model, ids, makes, context=context, repeats=REPEATS)
            print(context, {name: f"{statistics.median(times.token) * 1e3:.2f} ms" for name, times in found[context].items()}, flush=True)
    seconds, repeats, short = time.perf_counter() - started, tuple(range(REPEATS)), CONTEXTS[1]
    for name, rule in rules.items():
        method = f"{rule!r}, budget={BUDGET}"
        for context in CONTEXTS:
            own, full = found[context][name].token, found[context][FULL].token
            ratio = statistics.median(own) / statistics.median(full)
            shared: dict[str, Any] = {"method": method, "seeds": repeats, "seconds": seconds, "baseline": FULL}
            claim = f"Time per token after {context:,} tokens, {BUDGET} of them kept: {name}, 1 thread"
            append(
                NAME, Row(claim=claim, values=own, unit="seconds per token", baseline_values=full, note=f"{ratio:.2f} times by medians.", **shared)
            )
        longer = {
            which: tuple(last / first for last, first in zip(found[CONTEXTS[-1]][which].token, found[short][which].token, strict=True))
            for which in (name, FULL)
        }
        growth = statistics.median(found[CONTEXTS[-1]][name].token) / statistics.median(found[short][name].token)
        append(
            NAME,
            Row(
                claim=f"A token costs as much after {CONTEXTS[-1]:,} tokens as after {short}: {name}, {BUDGET} kept, 1 thread",
                values=longer[name],
                unit="times the time",
                baseline_values=longer[FULL],
                expected=f"at most {LONGER:g} times, by medians",
                held=growth <= LONGER,
                note=f"{growth:.3f} times by medians. Positions go past the model's 2,048.",
                **shared,
            ),
        )


def figure() -> None:
    """Draw the time per token against the context, from the rows: docs/images/serve_cost.png."""
    from partwise.figures import LINES, new_figure

    measured = {row.claim: row for row in latest(read(NAME)) if row.claim.startswith("Time per token")}
    drawing = new_figure(520, 280)
    axis = drawing.subplots()
    series: dict[str, list[tuple[float, ...]]] = {}
    for context in CONTEXTS:
        for name in ("Scissorhands", "SlidingWindow"):
            row = measured[f"Time per token after {context:,} tokens, {BUDGET} of them kept: {name}, 1 thread"]
            series.setdefault(name, []).append(row.values)
            if name == "Scissorhands":
                series.setdefault(FULL, []).append(row.baseline_values)
    for (name, values), colour in zip(series.items(), LINES, strict=False):
        axis.plot(CONTEXTS, [1e3 * statistics.median(times) for times in values], marker="o", color=colour, label=name)
        axis.fill_between(
            CONTEXTS, [1e3 * min(times) for times in values], [1e3 * max(times) for times in values], color=colour, alpha=0.15, linewidth=0
        )
    axis.set(xscale="log", xlabel="tokens that passed", ylabel="milliseconds per token", ylim=(0, None), xticks=CONTEXTS)
    axis.set_xticklabels([f"{context:,}" for context in CONTEXTS])
    axis.minorticks_off()
    axis.legend(frameon=False)
    drawing.savefig(ROOT / "docs" / "images" / "serve_cost.png", dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="bound, lengths, figure; all if none is named")
    parser.add_argument("--only", default=",".join(RULES), help="rules whose generations are measured")
    options = parser.parse_args()
    if MODEL not in serve_texts.present():
        return
    if not options.parts or "bound" in options.parts:
        bound(options.only.split(","))
    if not options.parts or "lengths" in options.parts:
        lengths()
    if not options.parts or "figure" in options.parts:
        figure()


if __name__ == "__main__":
    main()
