"""What the report of a comparison shows: every method at every budget, quality against memory, divergence along the text, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from partwise.report import Card, Column, Content, Grid, Group, RunRecord, Section, format_bytes, format_metric, format_seconds, markup
from partwise.serve import _figures as figures
from partwise.text_files import LIBRARY

LABELS = (
    "method", "perplexity", "change", "KL", "same token", "attention kept", "most bytes", "bound", "times less", "evictions", "tokens/s", "of full cache's",
)  # fmt: skip
FEW = 0.01  # of perplexity, that a budget may cost and still be called near the full cache


def describe(record: RunRecord) -> Content:
    """The content of the page; a section appears when its data exists."""
    summary = record.summary
    if not summary.get("measurements"):
        return Content(verdict="The run is not finished.")
    return Content(
        verdict=verdict_of(summary), cards=_cards(summary), sections=[_quality(summary), _table(summary), _along(summary), _speed(summary)]
    )


def rows_of(summary: Mapping[str, Any]) -> str:
    """How much was read."""
    rows = "1 row" if summary["num_rows"] == 1 else f"{summary['num_rows']:,} rows"
    return f"{rows} of {summary['num_tokens']:,} tokens"


def text_of(summary: Mapping[str, Any]) -> str:
    """What was read: a name, or the standard library."""
    return f"the {summary['data']}" if summary["data"].startswith(LIBRARY) else summary["data"]


def verdict_of(summary: Mapping[str, Any]) -> str:
    """What came out, in a sentence or two: the best method at the smallest budget, and the smallest cache that is near the full one."""
    full, (budget, rows) = summary["full"], next(iter(by_budget(summary).items()))
    best = rows[0]
    text = (
        f"With {budget:,} tokens of {summary['num_tokens']:,} in the cache, {best['method']} predicts best: perplexity "
        f"{format_metric(best['perplexity'])} against {format_metric(full['perplexity'])} of the full cache ({format_change(best['perplexity_change'])}), "
        f"in {best['ratio']:.1f} times fewer bytes."
    )
    near = [row for row in summary["measurements"] if row["perplexity_change"] <= FEW]
    if near:
        least = min(near, key=lambda row: (row["peak_bytes"], row["perplexity"]))
        return f"{text} The smallest cache within {100 * FEW:g} % of the full one's perplexity is that of {least['method']} at {least['budget']:,} tokens."
    return f"{text} No budget here comes within {100 * FEW:g} % of the full cache's perplexity: try larger ones."


def by_budget(summary: Mapping[str, Any]) -> dict[int, list[Mapping[str, Any]]]:
    """Rows of each budget, the smallest budget first, in it the best perplexity first."""
    rows = sorted(summary["measurements"], key=lambda row: (row["budget"], row["perplexity"]))
    return {budget: [row for row in rows if row["budget"] == budget] for budget in dict.fromkeys(row["budget"] for row in rows)}


def format_change(change: float) -> str:
    """A relative change in percent, with a sign.

    >>> format_change(0.0123), format_change(-0.0001), format_change(1.5)
    ('+1.23 %', '-0.01 %', '+150 %')
    """
    return f"{100 * change:+.2f} %" if abs(change) < 0.1 else f"{100 * change:+.3g} %"


def format_speed(speed: float) -> str:
    """Digits that count, without an exponent.

    >>> format_speed(1234.5), format_speed(9.876)
    ('1,234', '9.9')
    """
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def methods_of(summary: Mapping[str, Any]) -> list[str]:
    """Methods in the order in which they were asked for."""
    return list(dict.fromkeys(row["method"] for row in summary["measurements"]))


def _cards(summary: Mapping[str, Any]) -> list[Card]:
    full, (budget, rows) = summary["full"], next(iter(by_budget(summary).items()))
    best = rows[0]
    return [
        Card("perplexity, full cache", format_metric(full["perplexity"]), f"{full['num_scored']:,} predictions"),
        Card(f"perplexity at {budget:,} tokens", format_metric(best["perplexity"]), f"{best['method']}, {format_change(best['perplexity_change'])}"),
        Card("bytes, full cache", format_bytes(full["peak_bytes"]), rows_of(summary)),
        Card(f"bytes at {budget:,} tokens", format_bytes(best["peak_bytes"]), f"{best['ratio']:.1f} times less"),
        Card("measured in", format_seconds(summary["seconds"]), f"on {summary['device']}, {summary['dtype']}"),
    ]


def _quality(summary: Mapping[str, Any]) -> Section:
    lead = (
        f"{rows_of(summary)} from {text_of(summary)}: {summary['num_prefill']:,} are read as one block, and every "
        "later one is predicted in a step of its own with each cache in turn. The full cache runs in the same loop."
    )
    drawing = figures.quality(methods_of(summary), summary["measurements"], summary["full"])
    caption = (
        f"Left: perplexity, with the full cache as a star; what lies above {figures.MOST:g} times its value is in the table only. Right: how far predictions "
        "are from those with the full cache, mean over tokens. "
        "Bytes are of all tensors that a cache holds, what it notes about tokens included."
    )
    return Section("quality", "Quality against memory", lead, markup(drawing), caption)


def _table(summary: Mapping[str, Any]) -> Section:
    columns = [Column(label, numeric=label != "method") for label in LABELS]
    full, empty = summary["full"], ""
    first = [
        "full cache",
        format_metric(full["perplexity"]),
        *[empty] * 4,
        f"{full['peak_bytes']:,}",
        *[empty] * 3,
        format_speed(full["tokens_per_second"]),
        empty,
    ]
    groups = [Group("", [first])]
    groups += [Group(f"Budget {budget:,}", [_cells(row) for row in rows]) for budget, rows in by_budget(summary).items()]
    settings = [Group("", [[row["method"], row["setting"]] for row in _one_each(summary)])]
    bits = f" Keys and values in {summary['bits']} bits." if summary["bits"] else ""
    lead = (
        f"Each method's cache keeps as many tokens in every layer and head as the budget says.{bits} Change: of perplexity. Same token: how often the "
        "likeliest next token is that of the full cache. Attention kept: on tokens that stay, at an eviction. Bound: bytes that the cache promises never "
        "to exceed."
    )
    tables = [
        Grid("Every method at every budget, the best perplexity first.", columns, groups),
        Grid("Settings.", (Column("method", numeric=False), Column("call", numeric=False)), settings),
    ]
    return Section("methods", "Methods", lead, tables=tables)


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["method"],
        format_metric(row["perplexity"]),
        format_change(row["perplexity_change"]),
        f"{row['kl']:.3g}",
        f"{100 * row['agreement']:.1f} %",
        "-" if row["mass_kept"] is None else f"{100 * row['mass_kept']:.1f} %",
        f"{row['peak_bytes']:,}",
        f"{row['max_bytes']:,}",
        f"{row['ratio']:.1f}",
        f"{row['evictions']:,}",
        format_speed(row["tokens_per_second"]),
        f"{100 * row['speed_against_full']:.0f} %",
    ]


def _one_each(summary: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """A row of each method."""
    return list({row["method"]: row for row in summary["measurements"]}.values())


def _along(summary: Mapping[str, Any]) -> Section:
    budget, rows = next(iter(by_budget(summary).items()))
    drawing = figures.along_the_text(methods_of(summary), rows, budget=budget)
    lead = f"How far predictions drift from those with the full cache as the text goes on, with {budget:,} tokens in the cache."
    caption = "Mean over rows and a stretch of positions. Dotted: where the cache is full and tokens begin to leave."
    return Section("drift", "Along the text", lead, markup(drawing), caption)


def _speed(summary: Mapping[str, Any]) -> Section:
    drawing = figures.speed(methods_of(summary), summary["measurements"], summary["full"])
    lead = "Steps of one token, all rows together, caches taking turns at every token, so that a machine that slows down slows all of them."
    caption = f"The full cache grows to {summary['num_tokens']:,} tokens only; longer texts slow it down, and not the others."
    return Section("speed", "Speed", lead, markup(drawing), caption)
