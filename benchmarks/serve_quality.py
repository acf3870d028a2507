"""What a budget costs in quality: perplexity, and KL divergence from the full cache, of every rule at equal sizes, on text that the models have not seen.

Rows of 512 tokens, dealt into four groups, are read token by token with every cache; scored are the tokens after the budget, the same ones for all. How
many tokens leave at once is chosen for Scissorhands and for SnapKV from the same four numbers, on other text, which `calibrate_budgets` reads too.
``bytes``: everything that a cache holds is counted, so rules that note less have more tokens. ``long``: rows of 2,048 tokens, of which these models can use
only the last few hundred. Run: ``python benchmarks/serve_quality.py [budgets] [bytes] [long] [--models WikiText-2]`` (half an hour a model on one core).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import serve_texts
from partwise.serve import (
    H2O,
    TOVA,
    BudgetedCache,
    KeyNorm,
    RandomTokens,
    Scissorhands,
    SlidingWindow,
    SnapKV,
    StreamingLLM,
    attached,
    calibrate_budgets,
)
from partwise.serve._packed_store import PackedStore
from partwise.serve.rule import EvictionRule
from rows import Row, append

NAME = "serve_quality"
SEEDS = (0, 1, 2, 3)  # groups of rows
FULL = "full cache"
NUM_TOKENS, BUDGETS, FEWER = 512, [51, 102, 205], 5
TUNED_AT = 102
LONG_TOKENS, LONG_BUDGET = 2048, 410
GOAL = 1.01  # times the perplexity of the full cache
PAPER = "up to 5x smaller with the quality kept, up to 20x with 4 bits; OPT models of 6.7 to 66 billion parameters"
PUBLISHED = Scissorhands(window=400, recent=10, drop=0.5, prompt_window=400)
RIVALS: dict[str, EvictionRule] = {
    "sliding window": SlidingWindow(),
    "StreamingLLM": StreamingLLM(),
    "H2O": H2O(),
    "TOVA": TOVA(),
    "SnapKV": SnapKV(window=64, pool=5, recent=32, drop=0.25),
    "key norm": KeyNorm(),
    "random tokens": RandomTokens(),
}
DROPS: tuple[int | float, ...] = (1, 2, 0.1, 0.25)
WITH_BUDGETS = ("sliding window", "StreamingLLM", "SnapKV, chosen")  # rivals that get calibrated budgets too, for information


@dataclass(frozen=True)
class Entry:
    """A cache to be measured."""

    name: str
    rule: EvictionRule
    budgets: tuple[int, ...] = ()
    """Of the layers, if they differ"""
    bits: int | None = None

    def cache(self, model: Any, budget: int, **settings: Any) -> BudgetedCache:
        """A new one; ``budget`` where the layers have no budgets of their own."""
        return BudgetedCache(model, self.rule, budget=self.budgets or budget, bits=self.bits, **settings)

    @property
    def method(self) -> str:
        """What rebuilds it."""
        budgets, bits = "calibrate_budgets(...)" if self.budgets else "the same in all layers", "" if self.bits is None else f", bits={self.bits}"
        return f"{self.rule!r}, budgets: {budgets}{bits}"


@dataclass(frozen=True)
class Found:
    """Loss and divergence of the tokens that are scored: (rows, tokens) each."""

    entry: Entry
    losses: Tensor
    kl: Tensor

    @property
    def perplexities(self) -> tuple[float, ...]:
        """Of the groups."""
        return tuple(float(group.mean().exp()) for group in serve_texts.dealt(self.losses, len(SEEDS)))

    @property
    def divergences(self) -> tuple[float, ...]:
        """Of the groups."""
        return tuple(float(group.mean()) for group in serve_texts.dealt(self.kl, len(SEEDS)))

    @property
    def perplexity(self) -> float:
        """Of all rows together."""
        return float(self.losses.mean().exp())

    @property
    def divergence(self) -> float:
        """Of all rows together."""
        return float(self.kl.mean())


def chosen(model: Any, rows: Tensor, *, budget: int) -> dict[str, EvictionRule]:
    """The setting of Scissorhands and of SnapKV that is nearest to the full cache, of four each, on text for calibration."""
    settings: dict[str, list[EvictionRule]] = {
        "Scissorhands, chosen": [Scissorhands(drop=drop) for drop in DROPS],
        "SnapKV, chosen": [SnapKV(drop=drop) for drop in DROPS],
    }
    entries = [Entry(title, rule) for title, group in settings.items() for rule in group]
    _, found = measured(model, rows, {entry: entry.cache(model, budget) for entry in entries}, first_scored=budget)
    print("settings", {repr(each.entry.rule): f"{each.divergence:.4f}" for each in found}, flush=True)
    return {title: min((each for each in found if each.entry.name == title), key=lambda each: each.divergence).entry.rule for title in settings}


def calibrated(model: Any, rows: Tensor, rule: EvictionRule, *, budget: int) -> tuple[int, ...]:
    """Budgets for the layers; with room for the last tokens that are not packed."""
    minimum = max(budget // 4, 24) if isinstance(rule, Scissorhands | SlidingWindow) else None
    return tuple(calibrate_budgets(model, rows, average=budget, rule=rule, minimum=minimum).budgets)


def measured(model: Any, rows: Tensor, caches: Mapping[Entry, BudgetedCache], *, first_scored: int) -> tuple[Found, list[Found]]:
    """The full cache, by one pass over the rows, then the others, token by token; scored is what is predicted after ``first_scored`` tokens."""
    with torch.no_grad():
        whole = model(input_ids=rows, use_cache=False).logits[:, first_scored - 1 : -1].float().log_softmax(dim=-1)  # (rows, scored, vocabulary)
        targets = rows[:, first_scored:, None]
        full = Found(Entry(FULL, PUBLISHED), -whole.gather(2, targets)[..., 0], torch.zeros(targets.shape[:2]))
        prefill = min(min(cache.budget) for cache in caches.values())
        others = [_decoded(model, rows, entry, cache, whole, prefill=prefill) for entry, cache in caches.items()]
    return full, others


def _decoded(model: Any, rows: Tensor, entry: Entry, cache: BudgetedCache, whole: Tensor, *, prefill: int) -> Found:
    losses, divergences = [], []
    first_scored = rows.shape[1] - whole.shape[1]
    blocks = [rows[:, :prefill], *rows[:, prefill:-1].split(1, dim=1)]
    for position, block in enumerate(blocks, start=prefill):
        found = model(input_ids=block, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float().log_softmax(dim=-1)
        if position >= first_scored:
            expected = whole[:, position - first_scored]  # (rows, vocabulary)
            losses.append(-found.gather(1, rows[:, position, None])[:, 0])
            divergences.append((expected.exp() * (expected - found)).sum(dim=-1))
    return Found(entry, torch.stack(losses, dim=1), torch.stack(divergences, dim=1))


def half_bytes(half: Any, entry: Entry, *, budget: int, num_tokens: int) -> tuple[float, float]:
    """How many times fewer bytes a row has than with a full cache, model in float16: keys and values alone, and with all notes."""
    cache = entry.cache(half, budget)
    config = half.config
    full = num_tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * half.dtype.itemsize
    return num_tokens * config.num_hidden_layers / sum(cache.budget), full / cache.max_bytes(1)


def quality_row(
    title: str, full: Found, found: Found, *, budget: int, num_tokens: int, half: Any, seconds: float, asked: bool, remark: str = ""
) -> Row:
    """Perplexity against that of the full cache."""
    ratio = found.perplexity / full.perplexity
    fewer, in_all = half_bytes(half, found.entry, budget=budget, num_tokens=num_tokens)
    layers = f" Budgets of the layers {', '.join(map(str, found.entry.budgets))}." if found.entry.budgets else ""
    return Row(
        claim=f"Perplexity with {budget} of {num_tokens} tokens: {title}, {found.entry.name}",
        method=found.entry.method,
        values=found.perplexities,
        unit="perplexity",
        seeds=SEEDS,
        seconds=seconds,
        baseline="full cache",
        baseline_values=full.perplexities,
        paper=PAPER if asked else None,
        expected=f"at most {GOAL - 1:.0%} above the full cache, over all rows" if asked else "",
        held=ratio <= GOAL if asked else None,
        note=f"{ratio - 1:+.2%}; KL {found.divergence:.4f} nats ({min(found.divergences):.4f} to {max(found.divergences):.4f}). Model in float16: {fewer:.1f}x "
        f"fewer tokens, {in_all:.1f}x fewer bytes with all notes, by formula. {len(found.losses)} rows.{layers}{remark}",
    )


def rival_rows(
    title: str, own: Found, rivals: Sequence[Found], *, budget: int, num_tokens: int, seconds: float, asked: bool, where: str = ""
) -> list[Row]:
    """Perplexity and divergence against the best of the rivals by each."""
    rows = []
    for unit, name, single, of in (
        ("perplexity", "Perplexity", lambda found: found.perplexity, lambda found: found.perplexities),
        ("nats", "KL from the full cache", lambda found: found.divergence, lambda found: found.divergences),
    ):
        best = min(rivals, key=single)
        rows.append(
            Row(
                claim=f"{name} with {where or f'{budget} of {num_tokens} tokens'}, beside the best rival as published: {title}, {own.entry.name}",
                method=own.entry.method,
                values=of(own),
                unit=unit,
                seeds=SEEDS,
                seconds=seconds,
                baseline=best.entry.name,
                baseline_values=of(best),
                expected="on or under the best rival, over all rows" if asked else "",
                held=single(own) <= single(best) if asked else None,
                note=f"{single(own):.5g} against {single(best):.5g}, the best of {len(rivals)}: {best.entry.method}.",
            )
        )
    return rows


def say(title: str, full: Found, found: Sequence[Found]) -> None:
    print(title, f"full {full.perplexity:.3f}", flush=True)
    for each in found:
        print(f"  {each.entry.name:40s} {each.perplexity / full.perplexity - 1:+.2%} KL {each.divergence:.4f} {each.entry.budgets or ''}", flush=True)


def budgets_of(title: str, model: Any, tokenizer: Any, half: Any, num_rows: int) -> None:
    """Every rule at three budgets."""
    take = partial(serve_texts.held_out, title, tokenizer, num_tokens=NUM_TOKENS)
    rows, other = take(num_rows=num_rows), take(num_rows=8, part="calibration")
    best = chosen(model, other, budget=TUNED_AT)
    for budget in BUDGETS:
        started = time.perf_counter()
        own = best["Scissorhands, chosen"]
        layers = calibrated(model, other, own, budget=budget)
        variants = [
            Entry("Scissorhands as published", PUBLISHED),
            Entry("Scissorhands, chosen", own),
            Entry("ours: Scissorhands, chosen, calibrated budgets", own, layers),
            *([Entry("Scissorhands by default", Scissorhands())] if Scissorhands() not in (PUBLISHED, own) else []),
            *([Entry(f"ours in {bits} bits", own, layers, bits) for bits in (8, 4)] if budget == NUM_TOKENS // FEWER else []),
        ]
        rivals = [Entry(name, rule) for name, rule in (RIVALS | {"SnapKV, chosen": best["SnapKV, chosen"]}).items()]
        lifted = [
            Entry(f"{entry.name}, calibrated budgets", entry.rule, calibrated(model, other, entry.rule, budget=budget))
            for entry in rivals
            if entry.name in WITH_BUDGETS
        ]
        caches = {entry: entry.cache(model, budget) for entry in (*variants, *rivals, *lifted)}
        full, found = measured(model, rows, caches, first_scored=budget)
        seconds = time.perf_counter() - started
        say(f"{title}, {budget} of {NUM_TOKENS}, {seconds:.0f} s", full, found)
        for each in found:
            asked = each.entry.name.startswith("ours") and budget == NUM_TOKENS // FEWER
            append(NAME, quality_row(title, full, each, budget=budget, num_tokens=NUM_TOKENS, half=half, seconds=seconds, asked=asked))
        against = [each for each in found if each.entry in rivals]
        for each in found[1:3]:
            for row in rival_rows(
                title, each, against, budget=budget, num_tokens=NUM_TOKENS, seconds=seconds, asked=each.entry.name.startswith("ours")
            ):
                append(NAME, row)


def largest_budget(cache_of: Callable[[int], BudgetedCache], limit: float) -> int:
    """The largest budget whose cache promises to stay within so many bytes."""
    budget = 64
    while cache_of(budget + 1).max_bytes(1) <= limit:
        budget += 1
    while cache_of(budget).max_bytes(1) > limit:
        budget -= 1
    return budget


def equal_bytes(title: str, model: Any, tokenizer: Any, half: Any, num_rows: int) -> None:
    """A fifth of the bytes of a full cache with everything counted: rules that note less get more tokens."""
    take = partial(serve_texts.held_out, title, tokenizer, num_tokens=NUM_TOKENS)
    rows, other, config = take(num_rows=num_rows), take(num_rows=8, part="calibration"), half.config
    best, started = chosen(model, other, budget=TUNED_AT), time.perf_counter()
    limit = NUM_TOKENS * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * half.dtype.itemsize / FEWER
    budgets, caches = {}, {}
    own = best["Scissorhands, chosen"]
    everyone = (
        RIVALS | {name: rule for name, rule in best.items() if name.startswith("SnapKV")} | {"ours: Scissorhands, chosen, calibrated budgets": own}
    )
    for name, rule in everyone.items():
        budget = largest_budget(partial(lambda rule, budget: BudgetedCache(half, rule, budget=budget, score_chunk=1), rule), limit)
        entry = Entry(name, rule, calibrated(model, other, rule, budget=budget) if name.startswith("ours") else ())
        budgets[entry], caches[entry] = budget, entry.cache(model, budget, score_chunk=1)
    full, found = measured(model, rows, caches, first_scored=max(budgets.values()))
    seconds = time.perf_counter() - started
    say(f"{title}, equal bytes, {seconds:.0f} s", full, found)
    where = f"a fifth of the bytes of the full cache after {NUM_TOKENS} tokens, everything counted"
    for row in rival_rows(title, found[-1], found[:-1], budget=0, num_tokens=NUM_TOKENS, seconds=seconds, asked=True, where=where):
        append(NAME, row)
    ratio, sizes = found[-1].perplexity / full.perplexity, ", ".join(f"{entry.name} {budget}" for entry, budget in budgets.items())
    append(
        NAME,
        Row(
            claim=f"Perplexity with {where}: {title}, {found[-1].entry.name}",
            method=f"{found[-1].entry.method}, score_chunk=1",
            values=found[-1].perplexities,
            unit="perplexity",
            seeds=SEEDS,
            seconds=seconds,
            baseline="full cache",
            baseline_values=full.perplexities,
            paper=PAPER,
            expected=f"at most {GOAL - 1:.0%} above the full cache, over all rows",
            held=ratio <= GOAL,
            note=f"{ratio - 1:+.2%}, KL {found[-1].divergence:.4f} nats. Bytes as with the model in float16, by max_bytes; tokens for each: {sizes}.",
        ),
    )


def long_texts(title: str, model: Any, tokenizer: Any, half: Any, num_rows: int) -> None:
    """Rows longer than what the model was trained on."""
    rows = serve_texts.held_out(title, tokenizer, num_rows=num_rows // 2, num_tokens=LONG_TOKENS)
    other = serve_texts.held_out(title, tokenizer, num_rows=8, num_tokens=NUM_TOKENS, part="calibration")
    started, best = time.perf_counter(), chosen(model, other, budget=TUNED_AT)
    own = best["Scissorhands, chosen"]
    entries = [
        Entry("Scissorhands as published", PUBLISHED),
        Entry("Scissorhands, chosen", own),
        Entry("ours: Scissorhands, chosen, calibrated budgets", own, calibrated(model, other, own, budget=LONG_BUDGET)),
        *(Entry(name, RIVALS[name]) for name in ("sliding window", "StreamingLLM", "H2O")),
        Entry("SnapKV, chosen", best["SnapKV, chosen"]),
    ]
    full, found = measured(model, rows, {entry: entry.cache(model, LONG_BUDGET) for entry in entries}, first_scored=LONG_BUDGET)
    seconds = time.perf_counter() - started
    say(f"{title}, {LONG_BUDGET} of {LONG_TOKENS}, {seconds:.0f} s", full, found)
    remark = " The model was trained on texts of at most 512 tokens, so the full cache is the worse one here."
    for each in found:
        append(
            NAME,
            quality_row(title, full, each, budget=LONG_BUDGET, num_tokens=LONG_TOKENS, half=half, seconds=seconds, asked=False, remark=remark),
        )
    for row in rival_rows(title, found[2], found[3:], budget=LONG_BUDGET, num_tokens=LONG_TOKENS, seconds=seconds, asked=False):
        append(NAME, row)


def total_ratio() -> None:
    """What 5 times fewer tokens in 4 bits come to in a model of common shape."""
    tokens, budget, shape = 8192, 8192 // FEWER, {"batch_size": 1, "num_heads": 8, "dim": 128, "value_dim": 128, "itemsize": 2}
    full = tokens * 8 * 128 * 2 * 2
    notes = (budget + 1) * (8 * (4 + 2 * 2) + 1) + 32 * 128 * 2 * 16  # positions, counts and flags; queries that wait
    packed = PackedStore.bound(limit=budget + 1, bits=4, residual=16, **shape)
    append(
        NAME,
        Row(
            claim="Times fewer bytes with a fifth of the tokens in 4 bits, 8 key heads of 128 dimensions, 8,192 tokens",
            method="Scissorhands(window=400), bits=4, residual=16",
            values=(full / (packed + notes),),
            unit="times",
            seeds=(0,),
            seconds=0.0,
            paper="20x, scales and positions not counted",
            note=f"By formula, float16: {full / packed:.1f} for keys and values with their scales, less with positions, counts and waiting queries.",
        ),
    )


def main() -> None:
    parts = {"budgets": budgets_of, "bytes": equal_bytes, "long": long_texts}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(parts)}; all if none is named")
    parser.add_argument("--models", default=",".join(serve_texts.FOLDERS))
    parser.add_argument("--rows", type=int, default=32, help="of 512 tokens; half as many of 2,048")
    parser.add_argument("--budgets", type=int, nargs="+", default=tuple(BUDGETS))
    options = parser.parse_args()
    BUDGETS[:] = options.budgets
    torch.set_num_threads(1)
    total_ratio()
    for title in serve_texts.present():
        if title in options.models.split(","):
            model, tokenizer = serve_texts.load(title)
            half, _ = serve_texts.load(title, dtype=torch.float16)
            with attached(model), attached(half):
                for name in options.parts or parts:
                    parts[name](title, model, tokenizer, half, options.rows)


if __name__ == "__main__":
    main()
