"""How a finished run looks in the terminal: the ledger, the metric before and after, what a smaller adapter would lose, where files are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def summary_parts(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Tables and lines for the terminal, from the content of ``summary.json``."""
    from partwise.ledger import Ledger
    from partwise.report import format_bytes, format_seconds, ledger_table

    if summary.get("ledger"):
        yield ledger_table(Ledger.from_json(summary["ledger"]))
    if summary.get("comparison"):
        yield comparison_table(summary["comparison"], metric_name=summary["metric_name"])
    name, before, after = summary["metric_name"], summary["metric_before"], summary["metric_after"]
    yield f"[bold]{name}[/bold] on held-out rows: {before:.4f} before, [bold]{after:.4f}[/bold] after {summary['num_steps']} steps of {summary['method']}"
    size = f"{summary['saved_parameters']:,} numbers, {format_bytes(summary['saved_bytes'])}"
    yield f"adapter: {size}, {sum(summary['ranks'].values())} components in {len(summary['ranks'])} modules"
    if len(summary["kept_rank_curve"]) > 1:
        yield curve_table(summary)
    yield f"training took {format_seconds(summary['seconds'])}"
    yield f"adapter  {summary['adapter']}\nreport   {summary['report'] or 'not drawn'}\nrun      {summary['run']}"
    yield f"smaller: partwise tune truncate {summary['run']} --rank 1 --out {summary['run']}-rank-1"


def curve_table(summary: Mapping[str, Any]) -> Table:
    """What the adapter loses when it is cut to rank 1, 2, ...: as it stands, and by SVD; what ``truncate`` does is marked."""
    from rich.table import Table

    from partwise.report import format_bytes

    after = summary["metric_after"]
    table = Table(
        "cut to rank",
        "numbers",
        "bytes",
        f"{summary['metric_name']}, cut as it stands{' *' * (summary['cut'] == 'as it stands')}",
        f"cut by SVD{' *' * (summary['cut'] == 'by SVD')}",
        title="what a smaller adapter loses",
        caption="* what `partwise tune truncate` does",
        box=None,
    )
    for point, rotated in zip(summary["kept_rank_curve"], summary["kept_rank_curve_svd"], strict=True):
        changes = [f"{row['metric']:.4f} ({row['metric'] - after:+.4f})" for row in (point, rotated)]
        table.add_row(str(point["rank"]), f"{point['parameters']:,}", format_bytes(point["bytes"]), *changes)
    return table


def comparison_table(comparison: Sequence[Mapping[str, Any]], *, metric_name: str) -> Table:
    """One row per method: metric, saved numbers, time per step against the first, and the metric cut to each rank; mean and standard error."""
    from rich.table import Table

    highest = max(len(curve) for row in comparison for curve in row["kept_rank_curve"])
    num_seeds = len(comparison[0]["seeds"])
    table = Table(
        "method",
        metric_name,
        "numbers saved",
        "time per step",
        *[f"rank {rank}" for rank in range(1, highest)],
        title=f"same data, steps, budget; {num_seeds} seeds",
        box=None,
    )
    pace = statistics.median(comparison[0]["seconds_per_step"])
    for row in comparison:
        by_rank = [[point["metric"] for curve in row["kept_rank_curve"] for point in curve if point["rank"] == rank] for rank in range(1, highest)]
        table.add_row(
            row["method"],
            spread(row["metric"]),
            f"{statistics.mean(row['saved_parameters']):,.0f}",
            f"{statistics.median(row['seconds_per_step']) / pace:.2f} x" if pace else "",
            *[spread(values) for values in by_rank],
        )
    return table


def spread(values: Sequence[float]) -> str:
    """Mean and standard error of the mean."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def cut_lines(cut: Mapping[str, Any]) -> list[str]:
    """What ``partwise tune truncate`` says."""
    from partwise.report import format_bytes

    change = cut["metric_after"] - cut["metric_before"]
    return [
        f"{cut['metric_name']} on held-out rows: {cut['metric_before']:.4f} whole, {cut['metric_after']:.4f} cut ({change:+.4f})",
        f"numbers saved: {cut['parameters_before']:,} -> {cut['saved_parameters']:,}",
        f"bytes: {format_bytes(cut['bytes_before'])} -> {format_bytes(cut['saved_bytes'])}",
        f"adapter: {cut['adapter']}",
    ]
