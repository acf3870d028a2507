"""What the report of a sweep shows: quality against size, every method at every size. Its texts serve the terminal, too."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from partwise.prune import _figures as figures
from partwise.prune._report import evaluated_on, format_change, text_of
from partwise.report import Card, Column, Content, Grid, Group, RunRecord, Section, format_bytes, format_metric, format_seconds, markup

LABELS = ("method", "perplexity", "lowest to highest", "change", "parameters", "weights", "a sequence holds", "seconds to decide")
NEAR = 0.1  # of perplexity, that a size may cost and still be called near the whole model


def describe_sweep(record: RunRecord) -> Content:
    """The content of the page."""
    summary = record.summary
    if not summary.get("measurements"):
        done = sum(row.get("kind") == "measurement" for row in record.metrics)
        return Content(verdict=f"The sweep is not finished: {done} models are measured.", unit="measurement")
    return Content(verdict=verdict_of(summary), cards=_cards(summary), sections=[_quality(summary), _table(summary)], unit="measurement")


def by_keep(summary: Mapping[str, Any]) -> dict[float, list[dict[str, Any]]]:
    """For each size, the largest first, a row per method with its mean over seeds, the best first."""
    found: dict[float, list[dict[str, Any]]] = {}
    for keep in sorted({row["keep"] for row in summary["measurements"]}, reverse=True):
        names = dict.fromkeys(row["method"] for row in summary["measurements"] if row["keep"] == keep)
        rows = [_mean([row for row in summary["measurements"] if row["keep"] == keep and row["method"] == name]) for name in names]
        found[keep] = sorted(rows, key=lambda row: (row["perplexity"] is None, row["perplexity"] or 0.0))
    return found


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of several seeds as one; a perplexity that is no finite number leaves none."""
    values = [row["perplexity"] for row in rows]
    finite = [value for value in values if value is not None]
    whole = len(finite) == len(values)
    return {
        **rows[0],
        "perplexity": statistics.fmean(finite) if whole else None,
        "lowest": min(finite, default=None),
        "highest": max(finite, default=None) if whole else None,
        "num_seeds": len(rows),
        "plan_seconds": statistics.fmean(row["plan_seconds"] for row in rows),
    }


def spread_of(row: Mapping[str, Any]) -> str:
    """Lowest and highest over the seeds; nothing where there is one."""
    return "" if row["num_seeds"] == 1 else f"{format_metric(row['lowest'])} to {format_metric(row['highest'])}"


def size_of(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Which size shrinks most over the sweep, as a key and as the label of an axis."""
    whole = summary["whole"]
    least = {key: min(row[key] for row in summary["measurements"]) / whole[key] for key in ("num_parameters", "sequence_bytes") if whole[key]}
    key = min(least, key=lambda name: least[name])
    if key == "num_parameters":
        return key, "parameters"
    return key, f"memory that a sequence holds ({figures.byte_unit(whole[key])[0]})"


def verdict_of(summary: Mapping[str, Any]) -> str:
    """The best method in the middle, and the smallest model that is near the whole one."""
    whole, rows = summary["whole"], by_keep(summary)
    keep = min(rows, key=lambda value: abs(value - 0.5))
    best = rows[keep][0]
    if best["perplexity"] is None or whole["perplexity"] is None:
        return f"At {100 * keep:g} % of the units no method leaves a perplexity that is a finite number."
    text = f"At {100 * keep:g} % of the units {best['method']} predicts best: perplexity {format_metric(best['perplexity'])} against "
    text += f"{format_metric(whole['perplexity'])} of the whole model ({format_change(whole, best, 'perplexity')})."
    near = [row for group in rows.values() for row in group if row["perplexity"] and row["perplexity"] <= (1 + NEAR) * whole["perplexity"]]
    if not near:
        return f"{text} None is within {100 * NEAR:g} % of the whole model: keep more, or train what is left."
    smallest = min(near, key=lambda row: (row["keep"], row["perplexity"]))
    return f"{text} The smallest within {100 * NEAR:g} % of the whole model is {smallest['method']} at {100 * smallest['keep']:g} %."


def cells_of(row: Mapping[str, Any], whole: Mapping[str, Any]) -> list[str]:
    """One method at one size."""
    return [
        row["method"],
        format_metric(row["perplexity"]),
        spread_of(row),
        format_change(whole, row, "perplexity"),
        f"{row['num_parameters']:,}",
        format_bytes(row["weight_bytes"]),
        format_bytes(row["sequence_bytes"]),
        f"{row['plan_seconds']:.1f}",
    ]


def whole_cells(summary: Mapping[str, Any]) -> list[str]:
    """The whole model as a row of the same table."""
    whole = summary["whole"]
    sizes = [f"{whole['num_parameters']:,}", format_bytes(whole["weight_bytes"]), format_bytes(whole["sequence_bytes"])]
    return ["whole model", format_metric(whole["perplexity"]), "", "", *sizes, ""]


def _cards(summary: Mapping[str, Any]) -> list[Card]:
    whole, rows = summary["whole"], by_keep(summary)
    keep = min(rows, key=lambda value: abs(value - 0.5))
    best = rows[keep][0]
    return [
        Card("perplexity, whole model", format_metric(whole["perplexity"]), evaluated_on(summary)),
        Card(f"perplexity at {100 * keep:g} %", format_metric(best["perplexity"]), f"{best['method']}, {format_change(whole, best, 'perplexity')}"),
        Card(f"a sequence holds at {100 * keep:g} %", format_bytes(best["sequence_bytes"]), f"from {format_bytes(whole['sequence_bytes'])}"),
        Card(f"weights at {100 * keep:g} %", format_bytes(best["weight_bytes"]), f"from {format_bytes(whole['weight_bytes'])}"),
        Card("measured in", format_seconds(summary["seconds"]), f"{len(summary['measurements'])} small models"),
    ]


def _quality(summary: Mapping[str, Any]) -> Section:
    size, label = size_of(summary)
    rows = [row for group in by_keep(summary).values() for row in group]
    order = list(dict.fromkeys(row["method"] for row in summary["measurements"]))
    rows.sort(key=lambda row: order.index(row["method"]))
    lead = f"Every model is measured on {evaluated_on(summary)}. Methods that look at text see {summary['calibration']['num_tokens']:,} tokens of "
    lead += f"{text_of(summary['calibration']['data'])}, other rows. Nothing was trained."
    seeds = max(row["num_seeds"] for row in rows)
    caption = "A star: the whole model." + (f" Lines are means over {seeds} seeds, bands reach from the lowest to the highest." if seeds > 1 else "")
    return Section("quality", "Quality against size", lead, markup(figures.quality(rows, summary["whole"], size=size, label=label)), caption)


def _table(summary: Mapping[str, Any]) -> Section:
    columns = [Column(label, numeric=label != "method") for label in LABELS]
    groups = [Group("", [whole_cells(summary)])]
    groups += [Group(f"{100 * keep:g} % of the units", [cells_of(row, summary["whole"]) for row in rows]) for keep, rows in by_keep(summary).items()]
    calls = [Group("", [list(item) for item in {row["method"]: row["call"] for row in summary["measurements"]}.items()])]
    lead = "Change: of perplexity. Methods whose scores do not depend on the size look at the text once: their first size has the seconds."
    if summary["left_out"]:
        lead += f" Nothing to cut in this model: {', '.join(summary['left_out'])}."
    tables = [
        Grid("Every method at every size, the best perplexity first.", columns, groups),
        Grid("Calls, at the smallest size and the last seed.", (Column("method", numeric=False), Column("call", numeric=False)), calls),
    ]
    return Section("methods", "Methods", lead, tables=tables)
