"""What the report of a decomposition shows: eigenvalues with intervals, convergence, the first two components, traffic, the ledger."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from partwise.decompose import _figures as figures
from partwise.figures import LINES
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

MANY_ROWS = 30  # above this a table is folded away
SURE = 0.01  # chance of a hidden eigenvalue below which the verdict calls it excluded
FAULTS = ("lost", "late", "duplicate", "refused", "reissued")


def describe(record: RunRecord) -> Content:
    """The content of the page; a section appears when its data exists."""
    summary = record.summary
    rounds = [row for row in record.metrics if row.get("kind") == "round"]
    settings = record.header.get("settings", {})
    unit = "publication" if settings.get("mode") == "async" else "round"
    sections = [
        _eigenvalue_section(summary),
        _convergence_section(rounds, settings, unit=unit),
        _score_section(record.run.result / "scores.csv", summary),
        _traffic_section(rounds, summary.get("traffic") or {}, unit=unit),
        ledger_section(Ledger.from_json(summary.get("ledger") or []), place="place"),
    ]
    return Content(verdict=_verdict(summary, rounds), cards=_cards(summary), sections=sections, unit=unit)


def verdict_of(summary: Mapping[str, Any]) -> str:
    """Whether the result can be trusted, in words: how far from eigenvectors, and whether one was missed."""
    worst = summary["worst_residual"]
    settled = "every component is" if summary["converged"] else "not every component is"
    held = f"{settled} within the tolerance; " if summary["converged"] or summary.get("tol") != 0 else ""  # with 0 there is nothing to hold
    sentence = f"After {summary['num_rounds']:,} rounds {held}the largest residual is {worst:.1e} of the largest eigenvalue."
    test = summary.get("missed_value_test")
    if test is None:
        return sentence
    if test["passed"] and test["missable"] <= SURE:
        return f"{sentence} No larger eigenvalue was missed; the chance that one stayed hidden is below {max(test['missable'], 1e-16):.0e}."
    if test["passed"]:
        return f"{sentence} No larger eigenvalue was found, but one hardly above the smallest that was kept could still be hidden."
    return (
        f"{sentence} An eigenvalue WAS MISSED: outside of the components found there is one of at least {format_metric(test['probe_value'])}, and the smallest "
        f"that was kept is {format_metric(test['smallest_kept'])}. Raise --num-rounds, or pass --solver lanczos."
    )


def _verdict(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    if summary.get("components"):
        return verdict_of(summary)
    return "The run is not finished." if rounds else ""


def _cards(summary: Mapping[str, Any]) -> list[Card]:
    components = summary.get("components") or []
    if not components:
        return []
    test = summary.get("missed_value_test")
    cards = [
        Card("share of the variance", f"{100 * summary['share']:.1f} %", f"in {len(components)} components of {summary['num_features']:,} features"),
        Card("largest eigenvalue", format_metric(components[0]["value"]), f"smallest kept: {format_metric(components[-1]['value'])}"),
        Card("largest residual", f"{summary['worst_residual']:.1e}", "of the largest eigenvalue"),
    ]
    if test is not None:
        cards.append(Card("missed-value test", "passed" if test["passed"] else "FAILED", f"{test['num_products']} products with the covariance"))
    return [*cards, Card("time", format_seconds(summary["seconds"]), f"{summary['num_rounds']:,} rounds")]


def _eigenvalue_section(summary: Mapping[str, Any]) -> Section | None:
    rows = summary.get("components") or []
    if not rows:
        return None
    figure = figures.scree([row["value"] for row in rows], [(row["lower"], row["upper"]) for row in rows], [row["share"] for row in rows])
    labels = ("component", "eigenvalue", "share of variance", "residual", "lower end", "upper end")
    columns = [Column(label, numeric=label != "component") for label in labels]
    cells = [
        [str(row["component"]), f"{row['value']:.8g}", f"{100 * row['share']:.2f} %", f"{row['residual']:.2e}", f"{row['lower']:.10g}", f"{row['upper']:.10g}"]
        for row in rows
    ]
    fold = f"Show the table of {len(rows)} components" if len(rows) > MANY_ROWS else ""
    grid = Grid("Every eigenvalue with the interval that is sure to hold one.", columns, [Group("", cells)], fold=fold)
    lead = "Variance along each component, and how far off it can be at most."
    caption = "An interval narrower than its mark cannot be seen; the table has its ends."
    return Section("eigenvalues", "Eigenvalues", lead, markup(figure), caption, [grid])


def _convergence_section(rounds: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], *, unit: str) -> Section | None:
    if settings.get("batch_size") is not None:
        return _estimate_section(rounds, unit=unit)
    traces = [(row["step"], _relative(row.get("residuals") or [], row.get("values") or [])) for row in rounds]
    if any(value is not None for _, trace in traces for value in trace):
        lead = "A component can settle only after those in front of it: lines come down one after the other."
        caption = "The stronger the colour, the further in front the component." if len(traces[-1][1]) > len(LINES) else ""
        return Section("convergence", "Convergence", lead, markup(figures.convergence(traces, tol=settings.get("tol"), unit=unit)), caption)
    return None


def _estimate_section(rounds: Sequence[Mapping[str, Any]], *, unit: str) -> Section | None:
    values = [(row["step"], [value or None for value in row.get("values") or []]) for row in rounds]
    if any(value is not None for _, trace in values for value in trace):
        lead = f"Vectors were learned from batches, which cannot tell how far they are from the goal: this is what every {unit} took the eigenvalues to be."
        return Section("convergence", "Convergence", lead, markup(figures.estimates(values, unit=unit)))
    return None


def _relative(residuals: Sequence[float | None], values: Sequence[float | None]) -> list[float | None]:
    """Residuals by the largest eigenvalue as it was known in that round."""
    largest = max((value for value in values if value is not None), default=0.0)
    return [None if residual is None or largest <= 0 else residual / largest for residual in residuals]


def _score_section(path: Path, summary: Mapping[str, Any]) -> Section | None:
    if not summary.get("components") or len(summary["components"]) < 2 or not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        points = [(float(row["component_1"]), float(row["component_2"])) for row in csv.DictReader(file)]
    shares = [100 * row["share"] for row in summary["components"][:2]]
    first, second = (f"component {index}, {share:.1f} % of the variance" for index, share in enumerate(shares, start=1))
    drawn = min(len(points), figures.MOST_POINTS)
    shown = "Every point is a row of the data."
    if drawn < summary["num_samples"]:
        shown = f"Points are {drawn:,} of the {summary['num_samples']:,} rows of the data, evenly spaced."
    return Section("scores", "First two components", shown, markup(figures.scores(points, labels=(first, second))))


def _traffic_section(rounds: Sequence[Mapping[str, Any]], totals: Mapping[str, Any], *, unit: str) -> Section | None:
    sent = [(row["step"], row["traffic"]) for row in rounds if row.get("traffic")]
    if not sent:
        return None
    by_worker: dict[int, list[int]] = {}
    for _, rows in sent:
        for worker, down, up in rows:
            total = by_worker.setdefault(worker, [0, 0, 0])
            by_worker[worker] = [total[0] + 1, total[1] + down, total[2] + up]
    per_round = [(step, sum(down for _, down, _ in rows), sum(up for _, _, up in rows)) for step, rows in sent]
    columns = (Column("worker", numeric=False), Column("messages"), Column("bytes sent to it"), Column("bytes sent back"))
    cells = [[f"worker {worker}", *(f"{number:,}" for number in by_worker[worker])] for worker in sorted(by_worker)]
    whole = [sum(total[index] for total in by_worker.values()) for index in range(3)]
    tables = [
        Grid("Bytes by worker.", columns, [Group("", cells)], ("total", *(f"{number:,}" for number in whole))),
        Grid(
            f"Bytes by {unit}, all workers together.",
            (Column(unit, numeric=False), Column("bytes sent to them"), Column("bytes sent back")),
            [Group("", [[str(step), f"{down:,}", f"{up:,}"] for step, down, up in per_round])],
            fold=f"Show all {len(per_round)} {unit}s",
        ),
    ]
    faults = [[name, str(totals[name])] for name in FAULTS if totals.get(name)]
    if faults:
        tables.append(Grid("Results that did not come as they should.", (Column("what", numeric=False), Column("how often")), [Group("", faults)]))
    lead = f"{format_bytes(whole[1])} to the workers and {format_bytes(whole[2])} back, in {len(per_round)} {unit}s."
    if totals.get("placed_bytes"):
        lead += f" The data and the method, {format_bytes(totals['placed_bytes'])}, were put once where all workers read them."
    return Section("traffic", "Traffic", lead, markup(figures.traffic(per_round, unit=unit)), tables=tables)
