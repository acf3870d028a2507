"""What the report of a tuning run shows: ranks, growth, losses, quality against kept rank, sizes, the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from partwise.ledger import Ledger
from partwise.report import (
    Card,
    Column,
    Content,
    Grid,
    Group,
    RunRecord,
    Section,
    format_bytes,
    format_metric,
    format_seconds,
    ledger_section,
    markup,
)
from partwise.tune import _figures as figures
from partwise.tune._figures import Point


def describe(record: RunRecord) -> Content:
    """The content of the page; a section appears when its data exists."""
    data = RunData(record)
    sections = [
        _rank_section(data),
        _growth_section(data),
        _loss_section(data),
        _quality_section(data),
        _size_section(data),
        ledger_section(data.ledger),
    ]
    return Content(verdict=_verdict(data), cards=_cards(data), sections=sections)


class RunData:
    """What the files of a run hold, in the shape that the sections want."""

    def __init__(self, record: RunRecord) -> None:
        header, summary, metrics = record.header, record.summary, record.metrics
        self.summary = summary
        self.train = _series(metrics, "train", "loss")
        self.held_out = _series(metrics, "eval", "loss")
        self.metric = _series(metrics, "eval", "metric")
        self.history: list[tuple[int, dict[str, int]]] = [(row["step"], row["ranks"]) for row in metrics if row.get("kind") == "growth"]
        self.ranks: dict[str, int] = summary.get("ranks") or (self.history[-1][1] if self.history else {})
        self.ledger = Ledger.from_json(summary.get("ledger") or [])
        self.metric_name = str(summary.get("metric_name") or header.get("metric_name") or "metric")
        self.curve = _curve(summary.get("kept_rank_curve") or [])
        self.method = str(summary.get("method") or header.get("method") or "this run").split("(")[0]
        self.comparison: list[Mapping[str, Any]] = summary.get("comparison") or []
        self.num_steps = int(summary.get("num_steps") or record.last_step)


def _series(metrics: Iterable[Mapping[str, Any]], kind: str, key: str) -> list[tuple[int, float]]:
    """The finite values of one quantity; a diverged step has null."""
    return [(row["step"], row[key]) for row in metrics if row.get("kind") == kind and row.get(key) is not None]


def _curve(points: Sequence[Mapping[str, Any]]) -> list[Point]:
    complete = [point for point in points if point.get("metric") is not None]
    found = [Point(point["rank"], point["metric"], point.get("parameters", 0), point.get("bytes", 0)) for point in complete]
    return sorted(found)


def _verdict(data: RunData) -> str:
    """The result in two sentences."""
    before, after = data.summary.get("metric_before"), data.summary.get("metric_after")
    sentences = []
    if before is not None and after is not None:
        verb = "rose" if after > before else "fell" if after < before else "stayed the same:"
        sentences.append(f"On held-out rows {data.metric_name} {verb} from {format_metric(before)} to {format_metric(after)}.")
    elif data.metric:
        step, value = data.metric[-1]
        sentences.append(f"On held-out rows {data.metric_name} was {format_metric(value)} at step {step}. The run is not finished.")
    if len(data.curve) > 1:
        smallest = data.curve[0]
        sentences.append(
            f"Cut to rank {smallest.rank}, the adapter takes {format_bytes(smallest.bytes)} and reaches {format_metric(smallest.metric)}."
        )
    return " ".join(sentences)


def _cards(data: RunData) -> list[Card]:
    summary, cards = data.summary, []
    if summary.get("metric_after") is not None:
        before = summary.get("metric_before")
        note = f"before: {format_metric(before)}" if before is not None else "held-out rows"
        cards.append(Card(data.metric_name, format_metric(summary["metric_after"]), note))
    if summary.get("saved_bytes") is not None:
        cards.append(Card("size on disk", format_bytes(summary["saved_bytes"]), f"{summary.get('saved_parameters', 0):,} parameters"))
    if data.ranks:
        used = sum(rank > 0 for rank in data.ranks.values())
        cards.append(Card("components", str(sum(data.ranks.values())), f"in {used} of {len(data.ranks)} modules"))
    if len(data.curve) > 1:
        smallest = data.curve[0]
        cards.append(Card(f"cut to rank {smallest.rank}", format_metric(smallest.metric), format_bytes(smallest.bytes)))
    if summary.get("seconds") is not None:
        note = f"{data.num_steps:,} steps" if data.num_steps else ""
        cards.append(Card("time", format_seconds(summary["seconds"]), note))
    return cards


def _rank_section(data: RunData) -> Section | None:
    if not data.ranks:
        return None
    lead = "How many components every module was given. The stronger the colour, the more a module needs."
    return Section(
        "ranks",
        "Rank map",
        lead,
        markup(figures.rank_map(data.ranks)),
        "Columns are layers, rows are kinds of modules. Hover over a cell for its name.",
    )


def _growth_section(data: RunData) -> Section | None:
    if not data.history or all(ranks == data.history[0][1] for _, ranks in data.history):
        return None
    totals = [sum(ranks.values()) for _, ranks in data.history]
    lead = f"From {totals[0]} components to {totals[-1]}: where and when they were added."
    figure = markup(figures.growth(data.history, num_steps=data.num_steps))
    return Section("growth", "Growth over time", lead, figure, "Below: a row per module (layer and name), or per layer in deep models.")


def _loss_section(data: RunData) -> Section | None:
    if not data.train and not data.held_out:
        return None
    figure = markup(figures.losses(data.train, data.held_out, data.metric, metric_name=data.metric_name))
    return Section("loss", "Loss", "", figure, "The thin line is the loss of single batches, the thick one its moving average.")


def _quality_section(data: RunData) -> Section | None:
    curves: dict[str, list[list[Point]]] = {}
    for entry in data.comparison:
        curves[str(entry["method"])] = [curve for curve in map(_curve, entry.get("kept_rank_curve") or []) if curve]
    if data.curve:
        curves.setdefault(data.method, [data.curve])
    curves = {label: seeds for label, seeds in curves.items() if seeds}
    if not curves:
        return None
    lead = "What the result is worth when only its first components are kept: cutting needs no retraining."
    figure = markup(figures.quality(curves, metric_name=data.metric_name, before=data.summary.get("metric_before")))
    caption = "Lines are means over seeds, bands one standard deviation. " if any(len(seeds) > 1 for seeds in curves.values()) else ""
    if data.summary.get("metric_before") is not None:
        caption += f"Before training {data.metric_name} was {format_metric(data.summary['metric_before'])}."
    return Section("quality", "Quality against kept rank", lead, figure, caption, _comparison_tables(data))


def _comparison_tables(data: RunData) -> list[Grid]:
    if not data.comparison:
        return []
    columns = (Column("method", numeric=False), Column(data.metric_name), Column("seeds"), Column("saved parameters"), Column("seconds a step"))
    rows = [
        [
            str(entry["method"]),
            _with_spread(entry.get("metric") or []),
            str(len(entry.get("seeds") or [])),
            f"{fmean(entry['saved_parameters']):,.0f}" if entry.get("saved_parameters") else "-",
            _with_spread(entry.get("seconds_per_step") or []),
        ]
        for entry in data.comparison
    ]
    return [Grid("Methods side by side, with the same data and steps: mean and standard deviation over seeds.", columns, [Group("", rows)])]


def _with_spread(values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    return format_metric(fmean(present)) + (f" \u00b1 {stdev(present):.2g}" if len(present) > 1 else "")


def _size_section(data: RunData) -> Section | None:
    if not data.curve:
        return None
    whole = data.curve[-1]
    columns = [Column(label, numeric=label != "kept rank") for label in ("kept rank", "parameters", "bytes", data.metric_name, "against the whole")]
    rows = [
        [
            str(point.rank),
            f"{point.parameters:,}",
            f"{point.bytes:,}",
            format_metric(point.metric),
            "-" if point is whole else f"{point.metric - whole.metric:+.4f}",
        ]
        for point in data.curve
    ]
    grid = Grid("What each kept rank costs and reaches.", columns, [Group("", rows)])
    return Section("sizes", "Sizes", "", markup(figures.sizes(data.curve, metric_name=data.metric_name)), tables=[grid])
