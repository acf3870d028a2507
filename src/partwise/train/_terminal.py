"""How a finished training looks in the terminal: tickets with size, quality and speed, what was sent, where files are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def summary_parts(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Tables and lines for the terminal, from the content of ``summary.json``."""
    from rich.text import Text

    from partwise.report import format_bytes, format_seconds
    from partwise.train._report import verdict_of

    yield ticket_table(summary)
    for row in summary["tickets"]:
        yield Text(f"{100 * row['keep']:>4g} %  {row['folder']}")
    yield Text(f"\n{summary['call']} on {summary['data']}")
    yield Text(verdict_of(summary, ()))
    for note in dict.fromkeys(
        [*(note for row in summary["tickets"] for note in row["notes"]), *(row["reason"] for row in summary["missing_tickets"])]
    ):
        yield Text(note, style="yellow")
    sent = f"{format_bytes(summary['bytes_down'])} to the parts, {format_bytes(summary['bytes_up'])} back"
    wire, mishaps = summary["wire"], {name: count for name, count in summary["mishaps"].items() if name != "placed_bytes"}
    if wire["bytes_down"]:
        sent += f" (on the wire {format_bytes(wire['bytes_down'])} and {format_bytes(wire['bytes_up'])})"
    counts = ", ".join(f"{count:,} {name}" for name, count in mishaps.items())
    yield Text(f"traffic: {sent}{f'; {counts}' if counts else ''}; {100 * summary['coverage']:.1f} % of the units trained per round")
    steps = f"{summary['num_rounds']:,} rounds of {summary['num_parts']} part{'s' * (summary['num_parts'] != 1)}, {summary['num_steps']:,} local steps"
    yield Text(f"{steps}, took {format_seconds(summary['seconds'])}")
    yield Text(f"report   {summary['report'] or 'not drawn'}\nrun      {summary['run']}")
    if len(summary["tickets"]) > 1:
        yield Text(f"other sizes: partwise train ticket {summary['run']} --keep 0.4 --out {summary['run']}-keep-40")


def ticket_table(summary: Mapping[str, Any]) -> Table:
    """A row per size: parameters, quality on the test split beside that of random tickets of the size, speed, bytes."""
    from rich import box
    from rich.table import Table

    from partwise.report import format_bytes, format_metric
    from partwise.train._report import format_speed, format_spread

    name = summary["metric_name"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for label in ("units", "parameters", name, "random: mean (range)", f"{summary['unit']}/s", "size"):
        table.add_column(label, justify="right", no_wrap=True)
    for row in summary["tickets"]:
        size = f"{row['num_parameters']:,}"
        table.add_row(
            f"{100 * row['keep']:g} %",
            size,
            format_metric(row["metric"]),
            format_spread(row["random"]),
            format_speed(row["speed"]),
            format_bytes(row["bytes"]),
        )
    return table


def ticket_lines(cut: Mapping[str, Any]) -> list[str]:
    """What ``partwise train ticket`` says."""
    from partwise.report import format_bytes, format_metric
    from partwise.train._report import format_speed

    name, spread = cut["metric_name"], cut["random"]
    lines = [
        f"{name} on the test split: {format_metric(cut['whole']['metric'])} whole, {format_metric(cut['metric'])} cut to {100 * cut['keep']:g} % of the units",
        f"parameters: {cut['whole']['num_parameters']:,} -> {cut['num_parameters']:,}, {format_bytes(cut['bytes'])}",
        f"speed: {format_speed(cut['whole']['speed'])} -> {format_speed(cut['speed'])} {cut['unit']} per second",
    ]
    if spread:
        drawn = f"{format_metric(spread['mean'])} on average, {format_metric(spread['low'])} to {format_metric(spread['high'])}"
        lines.append(f"{spread['number']} random tickets of this size: {drawn}; chosen on the calibration split: {cut['chosen']}")
    return [*lines, *cut["notes"], f"ticket: {cut['folder']}"]
