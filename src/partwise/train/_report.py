"""What the report of a training by subnetworks shows: losses, coverage, traffic, tickets of every size, the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from partwise.train import _figures as figures
from partwise.train.round_report import RoundReport, ledger_of

MOST_AXES = 120  # of the map of units


def describe(record: RunRecord) -> Content:
    """The content of the page; a section appears when its data exists."""
    summary = record.summary
    rounds = [row for row in record.metrics if row.get("kind") == "round"]
    unit = "arrival" if record.header.get("settings", {}).get("mode") == "async" else "round"
    sections = [
        _ticket_section(summary),
        _learning_section(rounds, unit=unit),
        _coverage_section(rounds, summary.get("holders") or {}, unit=unit),
        _traffic_section(rounds, summary, unit=unit),
        ledger_section(_ledger_of(summary, rounds), place=unit),
    ]
    return Content(verdict=verdict_of(summary, rounds), cards=_cards(summary), sections=sections, unit=unit)


def verdict_of(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    """What came out, in a sentence or two: the whole model, what half of it is worth, and units that were never trained."""
    tickets = summary.get("tickets") or []
    if not tickets:
        return "The run is not finished." if rounds else ""
    name, whole = summary["metric_name"], tickets[0]
    text = f"After {summary['num_rounds']:,} rounds the whole model has a test {name} of {format_metric(whole['metric'])}"
    half = next((row for row in tickets if row["keep"] == 0.5), tickets[-1] if len(tickets) > 1 else None)
    if half is not None:
        text += f"; the ticket that keeps {100 * half['keep']:g} % of its units has {format_metric(half['metric'])}"
        if half["speed"] and whole["speed"]:
            faster = half["speed"] / whole["speed"]
            text += f" and is {f'{faster:.2g} times' if abs(faster - 1) > 0.05 else 'about'} as fast"
    text += "."
    never = num_untrained(summary)
    if never:
        text += f" {never:,} units were never trained: raise --num-rounds."
    if summary["num_lost"]:
        text += f" {summary['num_lost']:,} results of parts were lost, and the run went on without them."
    return text


def format_speed(speed: float) -> str:
    """Digits that count, without an exponent.

    >>> format_speed(99_487.3), format_speed(213.96)
    ('99,487', '214')
    """
    return f"{speed:,.0f}" if speed >= 100 else format_metric(speed)


def format_spread(spread: Mapping[str, float] | None) -> str:
    """What random tickets are worth: their mean, the lowest and the highest."""
    return "-" if spread is None else f"{format_metric(spread['mean'])} ({format_metric(spread['low'])} to {format_metric(spread['high'])})"


def num_untrained(summary: Mapping[str, Any]) -> int:
    """Units that no part ever held."""
    return sum(count == 0 for units in (summary.get("holders") or {}).values() for count in units)


def _cards(summary: Mapping[str, Any]) -> list[Card]:
    tickets = summary.get("tickets") or []
    if not tickets:
        return []
    name, whole = summary["metric_name"], tickets[0]
    return [
        Card(f"test {name}", format_metric(whole["metric"]), f"of the whole model, {whole['num_parameters']:,} parameters"),
        *(
            Card(f"{name} at {100 * row['keep']:g} %", format_metric(row["metric"]), f"{row['num_parameters']:,} parameters")
            for row in tickets[1:]
            if row["keep"] in (0.5, 0.25)
        ),
        Card("sent to parts and back", format_bytes(summary["bytes_down"] + summary["bytes_up"]), f"{summary['num_parts']} parts a round"),
        Card("training", format_seconds(summary["seconds"]), f"{summary['num_rounds']:,} rounds, {summary['num_steps']:,} local steps"),
    ]


def _ticket_section(summary: Mapping[str, Any]) -> Section | None:
    tickets = summary.get("tickets") or []
    if not tickets:
        return None
    name, speed = summary["metric_name"], f"{summary['unit']} per second"
    figure = markup(figures.tickets(tickets, metric_name=name, speed_name=speed)) if len(tickets) > 1 else None
    labels = ("units kept", "parameters", f"test {name}", "random ones: mean (range)", "chosen", speed, "bytes", "folder of result")
    columns = [Column(label, numeric=label not in ("chosen", labels[-1])) for label in labels]
    cells = [
        [
            f"{100 * row['keep']:g} %",
            f"{row['num_parameters']:,}",
            format_metric(row["metric"]),
            format_spread(row["random"]),
            row["chosen"],
            format_speed(row["speed"]),
            f"{row['bytes']:,}",
            row["folder"].removeprefix(f"{summary['result']}/"),
        ]
        for row in tickets
    ]
    lead = "Subnetworks of the trained model, cut out and used as they are. All numbers are from the test split, on which nothing was chosen."
    drawn = next((row["random"]["number"] for row in tickets if row["random"]), 0)
    if drawn:
        lead += (
            " Each ticket is the best on the calibration split among random ones and two that are ranked by their units' activations; beside it stand "
            f"{drawn} random ones that nobody chose."
        )
    notes = [*(note for row in tickets for note in row["notes"]), *(row["reason"] for row in summary.get("missing_tickets", []))]
    said = " ".join(dict.fromkeys(notes))
    if figure is None:
        lead = f"{said} The number is from the test split." if said else "The whole model, on the test split."
    return Section("tickets", "Tickets", lead, figure, said, [Grid("Every size.", columns, [Group("", cells)])])


def _learning_section(rounds: Sequence[Mapping[str, Any]], *, unit: str) -> Section | None:
    losses = [(row["step"], row.get("loss_after_split"), row.get("loss_after_local"), row.get("loss_after_merge")) for row in rounds]
    valid = [(row["step"], row["valid_loss"]) for row in rounds if row.get("valid_loss") is not None]
    if not valid and all(value is None for row in losses for value in row[1:]):
        return None
    lead = f"A {unit} has three moves: subnetworks are cut out, each takes its local steps, and they are put back."
    columns = (
        Column(unit, numeric=False),
        Column("after the split"),
        Column("after the local steps"),
        Column("after the merge"),
        Column("validation"),
    )
    measured = dict(valid)
    cells = [[str(step), *map(format_metric, moves), format_metric(measured.get(step))] for step, *moves in losses]
    grid = Grid(f"Loss by {unit}.", columns, [Group("", cells)], fold=f"Show all {len(cells)} {unit}s")
    caption = "The first three are measured on training batches of the parts, validation on the whole model."
    return Section("learning", "Learning curve", lead, markup(figures.learning(losses, valid, unit=unit)), caption, [grid])


def _coverage_section(rounds: Sequence[Mapping[str, Any]], holders: Mapping[str, Sequence[int]], *, unit: str) -> Section | None:
    shares = [(row["step"], row["coverage"]) for row in rounds if row.get("coverage") is not None]
    if not shares:
        return None
    drawing = figures.coverage(shares, unit=unit)
    if holders:
        drawing += figures.holders(dict(list(holders.items())[:MOST_AXES]))
    mean = sum(share for _, share in shares) / len(shares)
    lead = f"Every unit was trained in every {unit}."
    if mean < 1:
        lead = f"On average {100 * mean:.1f} % of the units were trained in a {unit}; the others kept their weights."
    if holders:
        low, high = (pick(count for units in holders.values() for count in units) for pick in (min, max))
        lead += f" Over the whole run a unit was trained {low:,}{f' to {high:,}' if high > low else ''} times."
    caption = "Below: how often each unit was trained, a row for every axis that is split." if holders else ""
    if len(holders) > MOST_AXES:
        caption += f" The first {MOST_AXES} of {len(holders)}."
    return Section("coverage", "Coverage", lead, markup(drawing), caption)


def _traffic_section(rounds: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], *, unit: str) -> Section | None:
    sent = [(row["step"], row["bytes_down"], row["bytes_up"]) for row in rounds if row.get("bytes_down")]
    if not sent:
        return None
    down, up = sum(row[1] for row in sent), sum(row[2] for row in sent)
    lead = f"Tensors of {format_bytes(down)} went to the parts and {format_bytes(up)} came back, in {len(sent):,} {unit}s."
    wire = summary.get("wire") or {}
    if wire.get("bytes_down"):
        lead += f" On the wire it was {format_bytes(wire['bytes_down'])} and {format_bytes(wire['bytes_up'])}, with names and numbers."
    else:
        lead += " All parts trained in one process, so nothing left the machine; between machines it would be this much."
    if summary.get("data_parallel_bytes"):
        lead += f" Data-parallel training of the same steps would have moved {format_bytes(summary['data_parallel_bytes'])} (by formula)."
    tables = [
        Grid(
            f"Bytes by {unit}, all parts together.",
            (Column(unit, numeric=False), Column("to the parts"), Column("back")),
            [Group("", [[str(step), f"{to:,}", f"{back:,}"] for step, to, back in sent])],
            ("total", f"{down:,}", f"{up:,}"),
            fold=f"Show all {len(sent)} {unit}s",
        )
    ]
    mishaps = [[name.replace("_", " "), f"{count:,}"] for name, count in (summary.get("mishaps") or {}).items() if name != "placed_bytes"]
    if mishaps:
        tables.append(Grid("Results that did not come as they should.", (Column("what", numeric=False), Column("how often")), [Group("", mishaps)]))
    return Section("traffic", "Traffic", lead, markup(figures.traffic(sent, unit=unit)), tables=tables)


def _ledger_of(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> Ledger:
    """From the summary, or from the rows of a run that is not finished."""
    if summary.get("ledger"):
        return Ledger.from_json(summary["ledger"])
    return ledger_of([RoundReport.from_json(row) for row in rounds if row.get("parts")])
