"""Drawings of training by subnetworks: losses at the three moves of a round, which units were trained, bytes sent, tickets of every size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from partwise.figures import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    SKY,
    VERMILLION,
    WIDTH,
    Canvas,
    label_rows,
    legend_above,
    new_figure,
    shade,
    styled,
    text_width,
    to_svg,
)

MOST_POINTS = 300  # of a line
MOST_CELLS = 900  # of the map of units
MOST_COLUMNS = 64
MOVES = (("after the split", ORANGE, ":"), ("after the local steps", SKY, "--"), ("after the merge", BLUE, "-"))

Losses = Sequence[tuple[int, "float | None", "float | None", "float | None"]]


@styled
def learning(rounds: Losses, valid: Sequence[tuple[int, float]], *, unit: str = "round") -> str:
    """Training loss at the three moves of each round, and the loss of the whole model on the validation split.

    Parameters
    ----------
    rounds : sequence of (round, after split, after local steps, after merge)
        None where nothing was measured.
    valid : sequence of (round, loss)
        Of the whole model.
    unit : str
        What the horizontal axis counts.
    """
    figure = new_figure(WIDTH, 340)
    axis = figure.subplots()
    for position, (label, colour, dash) in enumerate(MOVES, start=1):
        points = [(row[0], value) for row in thin(rounds) if (value := row[position]) is not None]
        if points:
            marker = {"marker": "o", "markersize": 4, "markeredgecolor": PAPER} if len(points) < 3 else {}
            axis.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=1.6, label=label, **marker)
    if valid:
        axis.plot(*zip(*valid, strict=True), color=VERMILLION, marker="s", markersize=4.5, markeredgecolor=PAPER, linewidth=1.2, label="validation")
    axis.set(xlabel=unit, ylabel="loss")
    axis.margins(x=0.015)
    legend_above(axis, columns=4)
    return to_svg(figure, f"loss after split, after local steps and after merge, and on the validation split, against {unit}s")


@styled
def coverage(rounds: Sequence[tuple[int, float]], *, unit: str = "round") -> str:
    """Share of all units that some part trained, round after round.

    Parameters
    ----------
    rounds : sequence of (round, share)
        Shares from 0 to 1.
    unit : str
        What the horizontal axis counts.
    """
    figure = new_figure(WIDTH, 200)
    axis = figure.subplots()
    thinned = thin(rounds)
    steps, shares = [step for step, _ in thinned], [100 * share for _, share in thinned]
    if len(rounds) <= 120:
        axis.bar(steps, shares, width=0.72, facecolor=shade(0.45))
    else:
        axis.fill_between(steps, shares, step="mid", facecolor=shade(0.45), linewidth=0)
    axis.set(xlabel=unit, ylabel="units trained (%)", ylim=(0, 105), xlim=(steps[0] - 0.7, steps[-1] + 0.7))
    axis.grid(visible=False, axis="x")
    return to_svg(figure, f"share of the units that were trained in each {unit}")


@styled
def holders(counts: Mapping[str, Sequence[float]]) -> str:
    """How often each unit was trained: a row per axis, a cell per unit, or per few neighbours where an axis has many.

    Parameters
    ----------
    counts : mapping of str to sequence of float
        Axis name -> for each unit, how often a part held it.
    """
    label_of = {name: label for label, names in label_rows(list(counts), most=len(counts)).items() for name in names}
    most = max(max(units) for units in counts.values()) or 1
    columns = max(8, min(MOST_COLUMNS, MOST_CELLS // len(counts)))
    height = 16.0 if len(counts) <= 40 else 11.0
    gutter, margin = text_width(list(label_of.values()), size=9), 86.0
    canvas = Canvas(WIDTH, len(counts) * height + 40)
    for row, (name, units) in enumerate(counts.items()):
        middle, num_cells = row * height + height / 2, min(len(units), columns)
        step = (WIDTH - gutter - margin) / num_cells
        canvas.text(gutter - 6, middle, label_of[name], size=9, anchor="right")
        for cell in range(num_cells):
            first, last = cell * len(units) // num_cells, (cell + 1) * len(units) // num_cells - 1
            mean = sum(units[first : last + 1]) / (last + 1 - first)
            tip = f"{name}, unit{f' {first}' if first == last else f's {first} to {last}'}: {mean:.3g} times"
            canvas.box(gutter + cell * step, row * height + 1.5, step - min(1.5, step / 4), height - 3, share=mean / most, tip=tip)
        canvas.text(WIDTH - margin + 6, middle, _range_of(units), size=9, colour=MUTED)
    canvas.scale(gutter, len(counts) * height + 22, round(most), label="times")
    return canvas.to_svg(f"how often each unit of {len(counts)} axes was trained, from {min(map(min, counts.values())):g} to {most:g} times")


@styled
def traffic(rounds: Sequence[tuple[int, int, int]], *, unit: str = "round") -> str:
    """Bytes that parts took to their workers and back, round after round.

    Parameters
    ----------
    rounds : sequence of (round, bytes down, bytes up)
        Summed over parts.
    unit : str
        What the horizontal axis counts.
    """
    figure = new_figure(WIDTH, 230)
    axis = figure.subplots()
    thinned = thin(rounds)
    steps = [step for step, _, _ in thinned]
    most = max(max(down, up) for _, down, up in rounds)
    size, divisor = next(((name, size) for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if most >= size), ("bytes", 1.0))
    marker = {"marker": "o", "markeredgecolor": PAPER} if len(thinned) == 1 else {}
    axis.plot(steps, [down / divisor for _, down, _ in thinned], color=GREEN, label="to the parts", **marker)
    axis.plot(steps, [up / divisor for _, _, up in thinned], color=ORANGE, linestyle="--", label="back", **marker)
    axis.set(xlabel=unit, ylabel=f"{size} in a {unit}", ylim=(0, 1.1 * most / divisor or 1))
    axis.margins(x=0.015)
    legend_above(axis, columns=2)
    return to_svg(figure, f"bytes sent to the parts and back in each {unit}")


@styled
def tickets(rows: Sequence[Mapping[str, Any]], *, metric_name: str, speed_name: str) -> str:
    """Quality and speed of every size: the chosen ticket, and what random ones of that size are worth.

    Parameters
    ----------
    rows : sequence of mapping
        Each with ``keep``, ``num_parameters``, ``metric``, ``speed``, and ``random``: None, or ``mean``, ``low`` and ``high``.
    metric_name, speed_name : str
        Labels of the axes.
    """
    figure = new_figure(WIDTH, 310)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1.0))
    size, divisor = ("million", 1e6) if max(row["num_parameters"] for row in rows) >= 2e6 else ("thousand", 1e3)
    sizes = [row["num_parameters"] / divisor for row in rows]
    drawn = [(at, row["random"]) for at, row in zip(sizes, rows, strict=True) if row.get("random")]
    for at, spread in drawn:
        left.plot([at, at], [spread["low"], spread["high"]], color=PURPLE, linewidth=6, alpha=0.4, solid_capstyle="butt")
        left.plot([at], [spread["mean"]], color=PURPLE, marker="_", markersize=11, markeredgewidth=2)
    if drawn:
        left.plot([], [], color=PURPLE, linewidth=6, alpha=0.4, label="random tickets: range and mean")
    left.plot(sizes, [row["metric"] for row in rows], color=BLUE, marker="o", markeredgecolor=PAPER, label="chosen")
    left.set(xlabel=f"parameters ({size})", ylabel=f"{metric_name} on the test split")
    left.set_xlim(0, 1.08 * max(sizes))
    legend_above(left, columns=2)
    measured = [row for row in rows if row.get("speed") is not None]
    places = range(len(measured))
    right.bar(places, [row["speed"] for row in measured], width=0.6, facecolor=shade(0.45))
    for place, row in zip(places, measured, strict=True):
        right.annotate(
            f"{row['speed']:,.0f}" if row["speed"] >= 100 else f"{row['speed']:.3g}",
            (place, row["speed"]),
            ha="center",
            va="bottom",
            xytext=(0, 2),
            textcoords="offset points",
            fontsize=9,
            color=INK,
        )
    right.set_xticks(list(places), [f"{100 * row['keep']:.0f} %" for row in measured])
    right.set(xlabel="units kept", ylabel=speed_name)
    right.margins(y=0.12)
    right.grid(visible=False, axis="x")
    return to_svg(figure, f"{metric_name} and {speed_name} of tickets of {len(rows)} sizes")


def thin(rows: Sequence[Any]) -> list[Any]:
    """Of many rows every so-manieth, and always the last."""
    pitch = max(1, math.ceil(len(rows) / MOST_POINTS))
    return [*rows[:-1:pitch], *rows[-1:]]


def _range_of(units: Sequence[float]) -> str:
    low, high = min(units), max(units)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
