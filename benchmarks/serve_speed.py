"""What a budget costs or saves in time: per generated token at 2,048 tokens of context, and for a prompt of 2,000 tokens.

All caches take their turn at every token in one process, so that a machine that slows down slows all of them; a repetition is the median of its tokens.
Speed does not depend on what a model has learned: it is a trained one of 5.5 million parameters from ../shared (``PARTWISE_MODELS``). Positions go past the
2,048 that it was made for. Run: ``python benchmarks/serve_speed.py [--repeats 7]`` (ten minutes on two free cores).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import serve_texts
from partwise.serve import H2O, TOVA, BudgetedCache, Scissorhands, SlidingWindow, SnapKV, StreamingLLM, attached
from partwise.train._local import with_threads
from rows import Row, append

NAME = "serve_speed"
MODEL = "standard library"
CONTEXT, STEPS, PROMPT, BUDGET = 2048, 48, 2000, 256
FULL, WINDOW, THEIRS = "DynamicCache", f"SlidingWindow, budget={BUDGET}", f"sliding layers of transformers, {BUDGET} tokens"
OURS = {
    f"Scissorhands by default, budget={BUDGET}": Scissorhands(),
    f"Scissorhands as published, budget={BUDGET}": Scissorhands(window=400, recent=10, drop=0.5),
}
INFORMATION = {"StreamingLLM": StreamingLLM(), "H2O": H2O(), "TOVA": TOVA(), "SnapKV": SnapKV()}
SLOWER = {FULL: 1.0, WINDOW: 1.05}  # times the time per token that is allowed
PREFILL = 1.10

Make = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition: a token, by the median of its steps, and the prompt."""

    token: tuple[float, ...]
    prompt: tuple[float, ...]


def caches(model: Any) -> dict[str, Make]:
    """By name, what makes an empty one."""
    window = partial(DynamicSlidingWindowLayer, sliding_window=BUDGET)
    makes: dict[str, Make] = {
        FULL: partial(DynamicCache, config=model.config),
        WINDOW: partial(BudgetedCache, model, SlidingWindow(), budget=BUDGET),
        THEIRS: lambda: Cache(layers=[window() for _ in range(model.config.num_hidden_layers)]),
    }
    makes |= {name: partial(BudgetedCache, model, rule, budget=BUDGET) for name, rule in OURS.items()}
    makes |= {f"{name}, budget={BUDGET}": partial(BudgetedCache, model, rule, budget=BUDGET) for name, rule in INFORMATION.items()}
    makes |= {
        f"Scissorhands by default, budget={BUDGET}, bits={bits}": partial(BudgetedCache, model, Scissorhands(), budget=BUDGET, bits=bits)
        for bits in (8, 4)
    }
    return makes


@torch.no_grad()
def timed(model: Any, ids: Tensor, makes: Mapping[str, Make], *, context: int, repeats: int) -> dict[str, Times]:
    """Read ``context`` tokens as one block, then the others one by one; the first turn goes round."""
    names, tokens, prompts = list(makes), {name: [] for name in makes}, {name: [] for name in makes}  # type: ignore[var-annotated]
    for repeat in range(repeats + 1):
        held = {name: make() for name, make in makes.items()}
        order = names[repeat % len(names) :] + names[: repeat % len(names)]
        blocks = {name: _seconds(model, ids[:, :context], held[name]) for name in order}
        steps: dict[str, list[float]] = {name: [] for name in names}
        for position in range(context, ids.shape[1]):
            turn = position % len(names)
            for name in names[turn:] + names[:turn]:
                steps[name].append(_seconds(model, ids[:, position : position + 1], held[name]))
        if repeat:  # the first one warms up
            for name in names:
                tokens[name].append(statistics.median(steps[name]) if steps[name] else 0.0)
                prompts[name].append(blocks[name])
    return {name: Times(tuple(tokens[name]), tuple(prompts[name])) for name in names}


def _seconds(model: Any, ids: Tensor, cache: Any) -> float:
    started = time.perf_counter()
    model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started


def compared(
    title: str,
    name: str,
    own: Sequence[float],
    other: str,
    theirs: Sequence[float],
    *,
    unit: str,
    limit: float | None,
    seconds: float,
    note: str = "",
) -> Row:
    """One cache against another, by medians."""
    ratio = statistics.median(own) / statistics.median(theirs)
    return Row(
        claim=f"{title}: {name}",
        method=name,
        values=tuple(own),
        unit=unit,
        seeds=tuple(range(len(own))),
        seconds=seconds,
        baseline=other,
        baseline_values=tuple(theirs),
        expected="" if limit is None else f"at most {limit:g} times the time, by medians",
        held=None if limit is None else ratio <= limit,
        note=f"{ratio:.3f} times by medians.{note}",
    )


def run(model: Any, *, threads: int, repeats: int) -> None:
    """All rows for one number of threads."""
    words = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (1, CONTEXT + STEPS), generator=words)
    where = f"{threads} thread{'s' if threads > 1 else ''}"
    started, makes = time.perf_counter(), caches(model)
    with with_threads(threads):
        found = timed(model, ids, makes, context=CONTEXT, repeats=repeats)
        prompts = timed(model, ids[:, :PROMPT], makes, context=PROMPT, repeats=repeats)
    seconds = time.perf_counter() - started
    for name in makes:
        for other in (FULL, WINDOW, THEIRS):
            if name in (FULL, other) or (other == THEIRS and name not in OURS and name != WINDOW):
                continue
            limit = SLOWER.get(other) if name in OURS else None
            title = f"Time per token at {CONTEXT} tokens of context, {where}"
            append(NAME, compared(title, name, found[name].token, other, found[other].token, unit="seconds per token", limit=limit, seconds=seconds))
        if name != FULL:
            limit = PREFILL if name in OURS else None
            title = f"Time to read a prompt of {PROMPT} tokens, {where}"
            append(NAME, compared(title, name, prompts[name].prompt, FULL, prompts[FULL].prompt, unit="seconds", limit=limit, seconds=seconds))
    for name in makes:
        print(
            f"{where} {name:50s} {statistics.median(found[name].token) * 1e3:.3f} ms a token, {statistics.median(prompts[name].prompt) * 1e3:.1f} ms a prompt",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if MODEL not in serve_texts.present():
        return
    model, _ = serve_texts.load(MODEL)
    with attached(model):
        for threads in (1, 2):
            run(model, threads=threads, repeats=options.repeats)


if __name__ == "__main__":
    main()
