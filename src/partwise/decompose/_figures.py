"""Drawings of a decomposition: eigenvalues with their intervals, convergence, the first two components, bytes sent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from partwise.checks import load_extra
from partwise.figures import (
    BLUE,
    DASHES,
    GREEN,
    LINES,
    MUTED,
    ORANGE,
    PAPER,
    VERMILLION,
    WIDTH,
    legend_above,
    new_figure,
    shade,
    styled,
    to_svg,
)

MANY_DECADES = 100.0  # eigenvalues that differ by more than this factor go on a logarithmic axis
LEAST = 1e-17  # of what is drawn on a logarithmic axis, which has no place for 0
MOST_POINTS = 1500
MOST_ROUNDS = 300

Trace = Sequence[tuple[int, Sequence["float | None"]]]


@styled
def scree(values: Sequence[float], intervals: Sequence[tuple[float, float]], shares: Sequence[float]) -> str:
    """Eigenvalues with the intervals that hold them above, the share of the variance that they add up to below, and the widths of the intervals.

    Parameters
    ----------
    values : sequence of float
        From the largest.
    intervals : sequence of (low, high)
        Guaranteed, one for each value.
    shares : sequence of float
        Of the total variance, one for each value.
    """
    figure = new_figure(WIDTH, 500)
    above, below, widths = figure.subplots(3, 1, sharex=True, height_ratios=(1.7, 1.0, 0.8))
    numbers = range(1, len(values) + 1)
    logarithmic = values[-1] > 0 and values[0] / values[-1] > MANY_DECADES
    floor = values[-1] / 3 if logarithmic else 0.0  # an interval that reaches 0 has no end on a logarithmic axis
    if logarithmic:
        _logarithmic(above)
    for number, (low, high) in zip(numbers, intervals, strict=True):
        above.plot([number, number], [max(low, floor), high], color=VERMILLION, linewidth=5, alpha=0.45, solid_capstyle="butt")
    above.plot(numbers, values, color=BLUE, marker="o", markeredgecolor=PAPER, linewidth=1.2)
    above.plot([], [], color=BLUE, marker="o", markeredgecolor=PAPER, linewidth=1.2, label="eigenvalue")
    above.plot([], [], color=VERMILLION, linewidth=5, alpha=0.45, label="interval that is sure to hold one")
    if not logarithmic:
        above.set_ylim(0, 1.08 * max(high for _, high in intervals) or 1)
    legend_above(above, columns=2)
    below.bar(numbers, [100 * total for total in accumulate(shares)], width=0.62, facecolor=shade(0.45))
    below.set(title="share of the variance, added up (%)", ylim=(0, 108), xlim=(0.4, len(values) + 0.6))
    _logarithmic(widths)
    off = [max(high - value, value - low) / (values[0] or 1) for value, (low, high) in zip(values, intervals, strict=True)]
    off = [max(width, LEAST) for width in off]
    widths.set_ylim(10 ** math.floor(math.log10(min(off)) - 0.2), 10 ** math.ceil(math.log10(max(off)) + 0.2))  # at least one whole decade
    widths.plot(numbers, off, color=VERMILLION, linestyle="none", marker="o", markeredgecolor=PAPER)
    widths.set(title="off by at most, as a share of the largest eigenvalue", xlabel="component")
    widths.set_xticks(_ticks(len(values)))
    for axis in (above, below, widths):
        axis.grid(visible=False, axis="x")
    return to_svg(figure, f"scree plot: {len(values)} eigenvalues with intervals, and the share of the variance that they add up to")


@styled
def convergence(rounds: Trace, *, tol: float | None, unit: str = "round") -> str:
    """How far each component is from an eigenvector, round after round, on a logarithmic axis.

    Parameters
    ----------
    rounds : sequence of (round, residuals)
        Residuals relative to the largest eigenvalue, one for each component; None where it has not been published.
    tol : float, optional
        Drawn as a line.
    unit : str
        What the horizontal axis counts.
    """
    figure = new_figure(WIDTH, 330)
    axis = figure.subplots()
    _logarithmic(axis)
    for index, points in enumerate(_traces(rounds)):
        shown = [(step, max(value, LEAST)) for step, value in points]
        axis.plot(*zip(*shown, strict=True), **_look(index, len(rounds[-1][1]), len(shown)))
    if tol:
        axis.axhline(tol, color=MUTED, linestyle=":", linewidth=1.2, label=f"tolerance {tol:g}")
    axis.set(xlabel=unit, ylabel="residual / largest eigenvalue")
    axis.margins(x=0.015)
    legend_above(axis, columns=5)
    return to_svg(figure, "residual of each component against rounds, on a logarithmic axis")


@styled
def estimates(rounds: Trace, *, unit: str = "round") -> str:
    """The estimate of each eigenvalue, round after round: what there is to see where vectors are learned from batches.

    Parameters
    ----------
    rounds : sequence of (round, values)
        One value for each component; None where it has not been published.
    unit : str
        What the horizontal axis counts.
    """
    figure = new_figure(WIDTH, 330)
    axis = figure.subplots()
    for index, points in enumerate(_traces(rounds)):
        axis.plot(*zip(*points, strict=True), **_look(index, len(rounds[-1][1]), len(points)))
    axis.set(xlabel=unit, ylabel="estimated eigenvalue", ylim=(0, None))
    axis.margins(x=0.015)
    legend_above(axis, columns=5)
    return to_svg(figure, "estimated eigenvalue of each component against rounds")


@styled
def scores(points: Sequence[tuple[float, float]], *, labels: tuple[str, str]) -> str:
    """The rows of the data along the first two components.

    Parameters
    ----------
    points : sequence of (float, float)
        Scores; at most 1500 of them are drawn, evenly spaced.
    labels : (str, str)
        Of the axes.
    """
    thin = [points[index * len(points) // MOST_POINTS] for index in range(MOST_POINTS)] if len(points) > MOST_POINTS else points
    figure = new_figure(WIDTH, 430)
    axis = figure.subplots()
    axis.axhline(0, color=MUTED, linewidth=0.6)
    axis.axvline(0, color=MUTED, linewidth=0.6)
    size = 4.5 if len(thin) < 500 else 3.2
    axis.plot(*zip(*thin, strict=True), linestyle="none", marker="o", markersize=size, markeredgewidth=0, color=BLUE, alpha=0.55)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    axis.set_aspect("equal", adjustable="datalim")  # a unit is as long upwards as sideways, or the cloud would lie
    return to_svg(figure, f"{len(thin)} rows of the data along the first two components")


@styled
def traffic(rounds: Sequence[tuple[int, int, int]], *, unit: str = "round") -> str:
    """Bytes sent to the workers and back, round after round.

    Parameters
    ----------
    rounds : sequence of (round, bytes down, bytes up)
        Summed over workers.
    unit : str
        What the horizontal axis counts.
    """
    figure = new_figure(WIDTH, 240)
    axis = figure.subplots()
    thin = rounds[:: max(1, math.ceil(len(rounds) / MOST_ROUNDS))]
    steps = [step for step, _, _ in thin]
    most = max(max(down, up) for _, down, up in thin)
    size, divisor = next(((name, size) for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if most >= size), ("bytes", 1.0))
    marker = {"marker": "o", "markeredgecolor": PAPER} if len(thin) == 1 else {}
    axis.plot(steps, [down / divisor for _, down, _ in thin], color=GREEN, label="to the workers", **marker)
    axis.plot(steps, [up / divisor for _, _, up in thin], color=ORANGE, linestyle="--", label="back", **marker)
    axis.set(xlabel=unit, ylabel=f"{size} in a {unit}", ylim=(0, None))
    axis.margins(x=0.015)
    legend_above(axis, columns=2)
    return to_svg(figure, "bytes sent to the workers and back, against rounds")


def _logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain labels: powers are written as formulas otherwise, which no browser reads."""
    tickers = load_extra("matplotlib.ticker", extra="report")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(tickers.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(tickers.NullLocator())


def _traces(rounds: Trace) -> list[list[tuple[int, float]]]:
    """The points of each component; of many rounds every so-manieth, and always the last."""
    pitch = max(1, math.ceil(len(rounds) / MOST_ROUNDS))
    chosen = [*rounds[:-1:pitch], rounds[-1]]
    every = [[(step, row[index]) for step, row in chosen if index < len(row)] for index in range(len(rounds[-1][1]))]
    return [points for trace in every if (points := [(step, value) for step, value in trace if value is not None])]


def _look(index: int, num_components: int, num_points: int) -> dict[str, Any]:
    """A colour for each of few components; of many, one colour that fades from the first to the last."""
    marker = {"marker": "o", "markersize": 4} if num_points < 12 else {}
    if num_components <= len(LINES):
        return {"color": LINES[index], "linestyle": DASHES[index], "linewidth": 1.6, "label": f"component {index + 1}"} | marker
    weight = 1 - 0.82 * index / (num_components - 1)
    look: dict[str, Any] = {"color": shade(weight), "linewidth": 1.4} | marker
    return look | {"label": f"component {index + 1}"} if index in (0, num_components - 1) else look


def _ticks(num_components: int) -> list[int]:
    pitch = math.ceil(num_components / 20)
    return [1, *range(pitch, num_components + 1, pitch)] if pitch > 1 else list(range(1, num_components + 1))
