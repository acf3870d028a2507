"""What the report of a pruning shows: before and after, what stayed of each layer, every part. Its texts serve terminal and model card, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from partwise.figures import part_map
from partwise.ledger import Ledger
from partwise.models.names import locate_all
from partwise.prune import _figures as figures
from partwise.report import Card, Column, Content, Grid, Group, RunRecord, Section, format_bytes, format_metric, format_seconds, markup
from partwise.text_files import LIBRARY

LAYER_LABELS = ["layer", "units", "kept", "of", "parameters", "share of the scores"]
SEQUENCE = {
    "recurrent_bytes": "recurrent states",
    "convolution_bytes": "last inputs of convolutions",
    "attention_bytes": "keys and values",
}


def describe(record: RunRecord) -> Content:
    """The content of the page; a section appears when its data exists."""
    if record.header.get("method", "").startswith("sweep("):
        from partwise.prune._sweep_report import describe_sweep

        return describe_sweep(record)
    summary = record.summary
    if not summary.get("after"):
        done = sum(row.get("kind") == "axis" for row in record.metrics)
        return Content(verdict=f"The run is not finished: {done} axes are decided.", unit="axis")
    return Content(verdict=verdict_of(summary), cards=_cards(summary), sections=[_comparison(summary), _layers(summary)], unit="axis")


def verdict_of(summary: Mapping[str, Any]) -> str:
    """What came out, in some short sentences: what stays, what that does to memory and weights, and what it costs."""
    before, after = summary["before"], summary["after"]

    def changed(key: str, form: Any) -> str:
        return f"{form(before[key])} to {form(after[key])} ({format_change(before, after, key)})"

    text = f"{kept_of(summary)} stay. Weights: {changed('weight_bytes', format_bytes)}. "
    if before["sequence_bytes"] != after["sequence_bytes"]:
        text += f"Memory of a sequence: {changed('sequence_bytes', format_bytes)}. "
    if after["perplexity"] is None or before["perplexity"] is None:
        return text + "Perplexity is no finite number."
    return text + f"Perplexity: {changed('perplexity', format_metric)}."


def kept_of(facts: Mapping[str, Any]) -> str:
    """How many units of which kinds stay."""
    kinds = list(dict.fromkeys(row["units"] for row in facts["layers"]))
    counts = [
        (kind, sum(row["kept"] for row in facts["layers"] if row["units"] == kind), sum(row["of"] for row in facts["layers"] if row["units"] == kind))
        for kind in kinds
    ]
    return " and ".join(f"{kept:,} of {of:,} {kind}" for kind, kept, of in counts) or "all layers as they were"


def format_change(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    """How much more or less, in percent.

    >>> format_change({"x": 200}, {"x": 150}, "x"), format_change({"x": 3}, {"x": 3}, "x"), format_change({"x": 0}, {"x": 3}, "x")
    ('-25.0 %', '0.0 %', '-')
    """
    if not before[key] or after[key] is None:
        return "-"
    change = 100 * (after[key] / before[key] - 1)
    if change >= 1000:
        return f"{after[key] / before[key]:,.0f} times"
    return f"{change:+.1f} %" if abs(change) >= 0.05 else "0.0 %"


def format_speed(speed: float) -> str:
    """Digits that count, without an exponent.

    >>> format_speed(1234.5), format_speed(21.396)
    ('1,234', '21.4')
    """
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def comparison_cells(facts: Mapping[str, Any]) -> list[list[str]]:
    """What is compared: name, before, after, change. What a model does not have is left out."""
    before, after = facts["before"], facts["after"]
    shown = [
        ("perplexity", "perplexity", format_metric),
        ("parameters", "num_parameters", lambda value: f"{value:,}"),
        (f"weights, {facts['saved_dtype']}", "weight_bytes", format_bytes),
        (f"a sequence holds, {facts['dtype']}", "sequence_bytes", format_bytes),
    ]
    held = [(key, name) for key, name in SEQUENCE.items() if before[key]]
    if len(held) > 1:
        shown += [(f"- {name}", key, format_bytes) for key, name in held]
    shown.append(("tokens per second", "tokens_per_second", format_speed))
    return [[name, form(before[key]), form(after[key]), format_change(before, after, key)] for name, key, form in shown]


def layer_cells(facts: Mapping[str, Any]) -> list[list[str]]:
    """A row for each axis: where, kind, kept, of how many, parameters of what stays, share of the scores."""
    places = locate_all(row["where"] for row in facts["layers"])
    return [
        [
            place_of(places[row["where"]]),
            row["units"],
            f"{row['kept']:,}",
            f"{row['of']:,}",
            f"{row['parameters']:,}",
            "-" if row["share"] is None else f"{100 * row['share']:.1f} %",
        ]
        for row in facts["layers"]
    ]


def total_cells(facts: Mapping[str, Any]) -> list[str]:
    """The sums of `layer_cells`; units of different kinds are not added up."""
    rows = facts["layers"]
    is_one = len({row["units"] for row in rows}) == 1
    counts = [f"{sum(row[key] for row in rows):,}" if is_one else "" for key in ("kept", "of")]
    return ["total", rows[0]["units"] if is_one else "", *counts, f"{sum(row['parameters'] for row in rows):,}", ""]


def place_of(place: tuple[int | None, str]) -> str:
    """Layer and kind of an axis.

    >>> place_of((3, "mlp")), place_of((None, "fc1"))
    ('3 mlp', 'fc1')
    """
    layer, kind = place
    return kind if layer is None else f"{layer} {kind}"


def text_of(data: str) -> str:
    """A name, or the standard library."""
    return f"the {data}" if data.startswith(LIBRARY) else data


def evaluated_on(facts: Mapping[str, Any]) -> str:
    """How much was read to measure."""
    read = facts["evaluation"]
    rows = "1 row" if read["num_rows"] == 1 else f"{read['num_rows']:,} rows"
    return f"{rows} of {read['num_tokens']:,} tokens of {text_of(read['data'])}"


def calibrated_on(facts: Mapping[str, Any]) -> str:
    """How much the method looked at, and how long it took, as a sentence."""
    read = facts["calibration"]
    took = format_seconds(read["seconds"])
    if not read["num_tokens"]:
        return f"It looked at weights only and took {took}."
    return f"It looked at {read['num_tokens']:,} tokens of {text_of(read['data'])} and took {took}; what is measured is other text."


def _cards(summary: Mapping[str, Any]) -> list[Card]:
    before, after, read = summary["before"], summary["after"], summary["calibration"]

    def card(label: str, key: str, form: Any) -> Card:
        return Card(label, form(after[key]), f"from {form(before[key])}, {format_change(before, after, key)}")

    return [
        card("perplexity", "perplexity", format_metric),
        card("a sequence holds", "sequence_bytes", format_bytes),
        card("weights", "weight_bytes", format_bytes),
        card("tokens per second", "tokens_per_second", format_speed),
        Card("decided in", format_seconds(read["seconds"]), f"on {read['num_tokens']:,} tokens" if read["num_tokens"] else "from the weights"),
    ]


def _comparison(summary: Mapping[str, Any]) -> Section:
    columns = (Column("", numeric=False), Column("before"), Column("after"), Column("change"))
    lead = f"Perplexity on {evaluated_on(summary)}. {calibrated_on(summary)}"
    if summary["before"]["attention_bytes"]:
        lead += f" A sequence is {summary['context']:,} tokens long."
    said = " ".join(summary["notes"])
    lines = [["model", summary["open"]], ["plan", f'partwise.prune.load_plan("{summary["plan"]}")']]
    opened = Grid("How to open them.", (Column("what", numeric=False), Column("line", numeric=False)), [Group("", lines)])
    caption = "Weights are counted as they are saved; what a sequence holds, as it was computed. Speed: one text at a time, both models by turns, medians."
    grid = Grid(caption, columns, [Group("", comparison_cells(summary))])
    return Section("comparison", "Before and after", f"{lead} {said}".strip(), tables=[grid, opened])


def _layers(summary: Mapping[str, Any]) -> Section:
    columns = [Column(label, numeric=label not in LAYER_LABELS[:2]) for label in LAYER_LABELS]
    rows = summary["layers"]
    fold = f"Show all {len(rows)} layers" if len(rows) > 64 else ""
    grid = Grid("What stayed of each layer.", columns, [Group("", layer_cells(summary))], total_cells(summary), fold)
    drawing, said = "", []
    if curves := [row for row in rows if row["curve"]]:
        drawing += figures.concentration(curves)
        said.append("A line for each layer, the first one pale, the last one strong; a dot where it was cut. Dotted: units of equal worth.")
    if summary["ledger"]:
        drawing += part_map(_in_each_layer(Ledger.from_json(summary["ledger"])))
        said.append("Each square is a unit, shaded by its score beside the best of its layer.")
    lead = "The method gives no scores that could be added up."
    if curves:
        lead = "How much of the sum of all scores the best units hold. The steeper a line rises, the fewer units of its layer matter to the method."
    return Section("layers", "Part ledger", lead, markup(drawing) if drawing else None, " ".join(said), [grid])


def _in_each_layer(ledger: Ledger) -> Ledger:
    """The same with scores beside the largest of their axis, so that shades of different layers can be compared."""
    best: dict[str, float] = {}
    for part in ledger.parts:
        best[part.where] = max(best.get(part.where, 0.0), abs(part.score or 0.0))
    return Ledger(tuple(replace(part, score=part.score / best[part.where]) if part.score and best[part.where] else part for part in ledger.parts))
