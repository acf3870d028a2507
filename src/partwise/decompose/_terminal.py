"""How a finished decomposition looks in the terminal: eigenvalues with intervals, what they are worth, what was sent, where files are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

MANY_COMPONENTS = 40


def summary_parts(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Tables and lines for the terminal, from the content of ``summary.json``."""
    from rich.text import Text

    from partwise.decompose._report import verdict_of
    from partwise.report import format_bytes, format_seconds

    yield eigenvalue_table(summary)
    size = f"{summary['num_samples']:,} rows, {summary['num_features']:,} features"
    yield Text(f"{summary['method']} of {summary['data']}: {size}; {100 * summary['share']:.1f} % of the variance")
    test = summary["missed_value_test"]
    yield Text(verdict_of(summary), style="" if test is None or test["passed"] else "bold red")
    for warning in summary["warnings"]:
        yield Text(f"warning: {warning}", style="yellow")
    traffic = summary["traffic"]
    if traffic["bytes_down"]:
        counts = ", ".join(f"{count} {name}" for name, count in traffic.items() if count and "bytes" not in name)
        sent = f"{format_bytes(traffic['bytes_down'])} to the workers, {format_bytes(traffic['bytes_up'])} back"
        sent += f", {format_bytes(traffic['placed_bytes'])} of data once for all"
        yield Text(f"traffic: {sent}{f'; {counts}' if counts else ''}")
    yield Text(f"{summary['num_rounds']:,} rounds took {format_seconds(summary['seconds'])}")
    yield Text(f"result   {summary['result']}\nreport   {summary['report'] or 'not drawn'}\nrun      {summary['run']}")


def eigenvalue_table(summary: Mapping[str, Any]) -> Table:
    """A row per component: eigenvalue and how far off it can be, share of the variance, residual, where it sits, what became of it."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", footer_style="bold")
    total = f"{100 * summary['share']:.2f} %"
    labels = ("component", "eigenvalue", "off by at most", "share", "residual", "where", "status")
    for label, footer in zip(labels, ("total", "", "", total, "", "", ""), strict=True):
        table.add_column(label, footer=footer, justify="left" if label in ("where", "status") else "right", no_wrap=label not in ("where", "status"))
    found = {row["component"]: row for row in summary["components"]}
    for part in summary["ledger"][:MANY_COMPONENTS]:
        row = found.get(part["index"] + 1)
        cells = ["-"] * 4
        if row is not None:
            width = max(row["value"] - row["lower"], row["upper"] - row["value"])
            cells = [f"{row['value']:.6g}", f"{width:.1e}", f"{100 * row['share']:.2f} %", f"{row['residual']:.1e}"]
        table.add_row(str(part["index"] + 1), *cells, part["where"], part["status"])
    if len(summary["ledger"]) > MANY_COMPONENTS:
        table.caption = f"the first {MANY_COMPONENTS}; all {len(summary['ledger'])} are in eigenvalues.csv"
    return table
