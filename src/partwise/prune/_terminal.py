"""How a pruning looks in the terminal: what stayed of each layer, before and after, where the small model is and how to open it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

MOST_LAYERS = 64  # above which the table of layers is in the report only


def summary_parts(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Tables and lines for the terminal, from the content of ``summary.json``."""
    from rich.text import Text

    from partwise.prune._report import calibrated_on, evaluated_on

    if len(summary["layers"]) <= MOST_LAYERS:
        yield layer_table(summary)
    else:
        yield Text(f"what stayed of each of {len(summary['layers'])} layers is in the report")
    yield comparison_table(summary)
    yield Text(f"{summary['call']} on {summary['model']}")
    yield Text(f"Perplexity on {evaluated_on(summary)}. {calibrated_on(summary)}", style="dim")
    for note in summary["notes"]:
        yield Text(f"note: {note}", style="yellow")
    yield Text(f"\nmodel    {summary['result']}\nopen     {summary['open']}\nreport   {summary['report'] or 'not drawn'}\nrun      {summary['run']}")


def layer_table(summary: Mapping[str, Any]) -> Table:
    """A row for each axis, and their sum."""
    from rich.text import Text

    from partwise.prune._report import LAYER_LABELS, layer_cells, total_cells

    table = _plain_table(show_footer=True)
    for label, total in zip(LAYER_LABELS, total_cells(summary), strict=True):
        table.add_column(label, footer=total, justify="left" if label in LAYER_LABELS[:2] else "right", no_wrap=True)
    for cells in layer_cells(summary):
        table.add_row(*map(Text, cells))
    return table


def comparison_table(summary: Mapping[str, Any]) -> Table:
    """What the model is worth and what it costs, before and after."""
    from rich.text import Text

    from partwise.prune._report import comparison_cells

    table = _plain_table()
    for label in ("", "before", "after", "change"):
        table.add_column(label, justify="right" if label else "left", no_wrap=True)
    for cells in comparison_cells(summary):
        table.add_row(*map(Text, cells))
    return table


def _plain_table(**options: Any) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", footer_style="bold", **options)


def sweep_parts(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Table and lines of a sweep."""
    from rich.text import Text

    from partwise.prune._report import evaluated_on
    from partwise.prune._sweep_report import verdict_of
    from partwise.report import format_seconds

    yield sweep_table(summary)
    yield Text(verdict_of(summary))
    took = format_seconds(summary["seconds"])
    yield Text(f"{summary['model']} on {evaluated_on(summary)}; {len(summary['measurements'])} small models, took {took}", style="dim")
    if summary["left_out"]:
        yield Text(f"nothing to cut in this model: {', '.join(summary['left_out'])}", style="yellow")
    yield Text(f"\nreport   {summary['report'] or 'not drawn'}\nrun      {summary['run']}")


def sweep_table(summary: Mapping[str, Any]) -> Table:
    """The whole model, then for each size a row per method, the best perplexity first."""
    from rich.text import Text

    from partwise.prune._sweep_report import by_keep, cells_of, size_of, whole_cells

    has_spread = len({row["seed"] for row in summary["measurements"]}) > 1
    shrinks = {"weights": 5} if size_of(summary)[0] == "num_parameters" else {"a sequence holds": 6}
    labels = {"method": 0, "perplexity": 1, "lowest to highest": 2, "change": 3, "parameters": 4} | shrinks
    shown = {label: place for label, place in labels.items() if label != "lowest to highest" or has_spread}
    table = _plain_table()
    for label in shown:
        table.add_column(label, justify="left" if label == "method" else "right", no_wrap=True)
    table.add_row(*(whole_cells(summary)[place] for place in shown.values()))
    for keep, rows in by_keep(summary).items():
        table.add_row(Text(f"{100 * keep:g} %", style="bold"))
        for row in rows:
            cells = cells_of(row, summary["whole"])
            table.add_row(f"  {cells[0]}", *(cells[place] for place in list(shown.values())[1:]))
    return table
