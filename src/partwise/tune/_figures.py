"""Drawings of a tuning run: ranks, growth, losses, quality against kept rank, sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from partwise.checks import load_extra
from partwise.figures import (
    AREAS,
    BLUE,
    DASHES,
    INK,
    LINES,
    MARKERS,
    MUTED,
    ON_MIDDLE,
    ON_STRONG,
    PAPER,
    VERMILLION,
    WIDTH,
    Canvas,
    label_rows,
    legend_above,
    new_figure,
    shade,
    short_kind,
    styled,
    text_width,
    thinned,
    to_svg,
)
from partwise.models.names import locate_all


class Point(NamedTuple):
    """One point of the curve of quality against kept rank."""

    rank: int
    metric: float
    parameters: int
    bytes: int


@styled
def rank_map(ranks: Mapping[str, int]) -> str:
    """Heat map of the rank of every module: a row per kind of module, a column per layer.

    Parameters
    ----------
    ranks : mapping of str to int
        Rank by module name.
    """
    places = locate_all(ranks)
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    layers: list[int | None] = [*sorted({layer for layer, _ in places.values() if layer is not None})]
    layers += [None] if any(layer is None for layer, _ in places.values()) else []
    gutter, top, cell_height = text_width([short_kind(kind) for kind in kinds]), 22.0, 27.0
    cell = min(90.0, (WIDTH - gutter - 46) / len(layers))
    height = top + cell_height * len(kinds) + 34
    canvas = Canvas(gutter + max(cell * len(layers) + 46, 250), height)  # the scale needs 250
    most = max(1, *ranks.values())
    every = math.ceil(20 / cell)
    for column, layer in enumerate(layers):
        if layer is None or column % every == 0:
            canvas.text(gutter + cell * (column + 0.5), top - 10, "none" if layer is None else str(layer), size=9, colour=MUTED, anchor="center")
    canvas.text(gutter - 8, top - 10, "layer", size=9, colour=MUTED, anchor="right")
    canvas.text(gutter + cell * len(layers) + 40, top - 10, "sum", size=9, colour=MUTED, anchor="right")
    for row, kind in enumerate(kinds):
        middle = top + cell_height * (row + 0.5)
        canvas.text(gutter - 8, middle, short_kind(kind), anchor="right")
        canvas.text(gutter + cell * len(layers) + 40, middle, str(sum(ranks[name] for name in ranks if places[name][1] == kind)), anchor="right")
    for name, rank in ranks.items():
        layer, kind = places[name]
        left, upper, share = gutter + cell * layers.index(layer), top + cell_height * kinds.index(kind), rank / most
        gap = 1.5 if cell > 12 else 0.5
        canvas.box(left + gap, upper + 1.5, cell - 2 * gap, cell_height - 3, share=share, tip=f"{name}: rank {rank}")
        if cell >= 14:
            colour = ON_STRONG if share > 0.85 else ON_MIDDLE if share > 0.55 else INK
            canvas.text(left + cell / 2, upper + cell_height / 2, str(rank), size=9.5, colour=colour, anchor="center")
    return canvas.scale(gutter, height - 13, most, label="rank").to_svg("rank of every module, by layer and kind of module")


@styled
def growth(history: Sequence[tuple[int, Mapping[str, int]]], *, num_steps: int) -> str:
    """Components over time: stacked by kind of module above, module by module (or layer by layer) below.

    Parameters
    ----------
    history : sequence of (step, ranks)
        Ranks by module name from that step on, steps rising.
    num_steps : int
        Where the time axis ends.
    """
    names = list(history[-1][1])
    groups = stacked_groups(history[-1][1])
    rows = label_rows(names, most=80)
    row_height = 11.0 if len(rows) <= 50 else 8.0
    upper, lower = 190.0, row_height * len(rows) + 20
    figure = new_figure(WIDTH, upper + lower + 90)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(upper, lower))
    edges = [step for step, _ in history] + [max(num_steps, history[-1][0])]
    bottom = [0] * len(history)
    for colour, (kind, group) in zip(AREAS, groups.items(), strict=False):
        heights = [sum(ranks.get(name, 0) for name in group) for _, ranks in history]
        tops = [low + high for low, high in zip(bottom, heights, strict=True)]
        above.stairs(tops, edges, baseline=bottom, fill=True, facecolor=colour, alpha=0.85, edgecolor=PAPER, linewidth=0.5, label=short_kind(kind))
        bottom = tops
    above.set(title="components in the model, by kind of module", ylim=(0, max(bottom) * 1.08 or 1), xlim=(edges[0], edges[-1]))
    legend_above(above, columns=4)
    most = max(1, *(sum(ranks.get(name, 0) for name in group) for _, ranks in history for group in rows.values()))
    patches = load_extra("matplotlib.patches", extra="report")
    for row, group in enumerate(rows.values()):
        for start, stop, rank in stretches([(step, sum(ranks.get(name, 0) for name in group)) for step, ranks in history], edges[-1]):
            below.add_patch(patches.Rectangle((start, row + 0.1), stop - start, 0.8, facecolor=shade(rank / most), linewidth=0, clip_on=False))
    below.set(title="rank over time: the stronger the colour, the higher", xlabel="step", ylim=(len(rows), 0))
    below.set_yticks([row + 0.5 for row in range(len(rows))], list(rows), fontsize=8 if row_height > 10 else 6.5)
    below.tick_params(axis="y", length=0)
    below.grid(visible=False)
    return to_svg(figure, f"components in the model against steps, from {sum(history[0][1].values())} to {sum(history[-1][1].values())}")


@styled
def losses(
    train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]], metric: Sequence[tuple[int, float]], *, metric_name: str
) -> str:
    """Training loss (thin: as measured; thick: smoothed) and held-out loss above, the held-out metric below.

    Parameters
    ----------
    train, held_out, metric : sequence of (step, value)
        Any of them may be empty.
    metric_name : str
        Label of the lower axis.
    """
    figure = new_figure(WIDTH, 390 if metric else 260)
    axes = figure.subplots(1 + bool(metric), 1, sharex=True, height_ratios=(1.6, 1.0) if metric else (1.0,), squeeze=False)[:, 0]
    if train:
        steps, values = zip(*thinned(train, num_points=400), strict=True)
        axes[0].plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.4)
        smooth_steps, smooth = zip(*thinned(smoothed(train), num_points=200), strict=True)
        axes[0].plot(smooth_steps, smooth, color=BLUE, label="training, smoothed")
    if held_out:
        axes[0].plot(*zip(*held_out, strict=True), color=VERMILLION, marker="o", markeredgecolor=PAPER, label="held out")
    axes[0].set(title="loss")
    axes[0].legend(loc="lower right", bbox_to_anchor=(1.01, 1.0), ncols=2, borderaxespad=0.2)
    if metric:
        axes[1].plot(*zip(*metric, strict=True), color=VERMILLION, marker="o", markeredgecolor=PAPER)
        axes[1].set(title=f"{metric_name}, held out")
    axes[-1].set(xlabel="step")
    for axis in axes:
        axis.margins(x=0.015)
    return to_svg(figure, f"loss while training and on held-out rows{f', and {metric_name}' if metric else ''}, against steps")


@styled
def quality(curves: Mapping[str, Sequence[Sequence[Point]]], *, metric_name: str, before: float | None = None) -> str:
    """Held-out metric against kept rank, a line per method; with several seeds their mean, and a band of one standard deviation.

    Parameters
    ----------
    curves : mapping of str to sequence of curves
        For each method one curve per seed.
    metric_name : str
        Label of the vertical axis.
    before : float, optional
        The metric before training, drawn as a dotted line unless it is so far off that it would flatten the curves.
    """
    figure = new_figure(WIDTH, 330)
    axis = figure.subplots()
    all_ranks = sorted({point.rank for seeds in curves.values() for curve in seeds for point in curve})
    for index, (label, seeds) in enumerate(curves.items()):
        values = {rank: [point.metric for curve in seeds for point in curve if point.rank == rank] for rank in all_ranks}
        ranks = [rank for rank in all_ranks if values[rank]]
        means = [fmean(values[rank]) for rank in ranks]
        spreads = [stdev(values[rank]) if len(values[rank]) > 1 else 0.0 for rank in ranks]
        series = index % len(LINES)
        colour = LINES[series]
        if any(spreads):
            lows, highs = zip(*((mean - spread, mean + spread) for mean, spread in zip(means, spreads, strict=True)), strict=True)
            axis.fill_between(ranks, lows, highs, color=colour, alpha=0.16, linewidth=0)
        axis.plot(ranks, means, color=colour, marker=MARKERS[series], linestyle=DASHES[series], markeredgecolor=PAPER, label=label)
    metrics = [point.metric for seeds in curves.values() for curve in seeds for point in curve]
    span = max(metrics) - min(metrics)
    if before is not None and min(metrics) - span <= before <= max(metrics) + span:
        axis.axhline(before, color=MUTED, linestyle=":", linewidth=1.2, label="before training")
    axis.set(xlabel="kept rank (components per module, at most)", ylabel=metric_name)
    axis.set_xticks(all_ranks if len(all_ranks) <= 16 else all_ranks[:: math.ceil(len(all_ranks) / 16)])
    legend_above(axis, columns=4)
    return to_svg(figure, f"{metric_name} against kept rank for {', '.join(curves)}")


@styled
def sizes(curve: Sequence[Point], *, metric_name: str) -> str:
    """Bytes of the adapter at every kept rank, as bars, with what is left of the metric.

    Parameters
    ----------
    curve : sequence of Point
        From the smallest kept rank to the whole adapter.
    metric_name : str
        Named beside each bar.
    """
    figure = new_figure(WIDTH, 30.0 * len(curve) + 54)
    axis = figure.subplots()
    unit, divisor = next(((unit, divisor) for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if curve[-1].bytes >= divisor), ("bytes", 1.0))
    widths = [point.bytes / divisor for point in curve]
    axis.barh(range(len(curve)), widths, height=0.62, color=BLUE)
    for row, (point, width) in enumerate(zip(curve, widths, strict=True)):
        axis.text(width + max(widths) * 0.012, row, f"{width:.3g} {unit}, {metric_name} {point.metric:.4g}", va="center")
    axis.set_yticks(range(len(curve)), [f"rank {point.rank}" for point in curve])
    axis.set(xlabel=f"size of the saved adapter ({unit})", xlim=(0, max(widths) * 1.38 or 1), ylim=(len(curve) - 0.4, -0.6))
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    return to_svg(figure, f"size of the adapter and {metric_name} at every kept rank")


def stacked_groups(ranks: Mapping[str, int]) -> dict[str, list[str]]:
    """Module names by kind; beyond as many kinds as there are colours, the smallest are taken together."""
    groups: dict[str, list[str]] = {}
    for name, (_, kind) in locate_all(ranks).items():
        groups.setdefault(kind, []).append(name)
    if len(groups) <= len(AREAS):
        return groups
    by_size = sorted(groups, key=lambda kind: -sum(ranks[name] for name in groups[kind]))
    large, small = by_size[: len(AREAS) - 1], by_size[len(AREAS) - 1 :]
    return {kind: groups[kind] for kind in large} | {"others": [name for kind in small for name in groups[kind]]}


def stretches(values: Sequence[tuple[int, int]], stop: int) -> list[tuple[int, int, int]]:
    """(start, stop, value) of every stretch in which a value stays the same and is not 0."""
    changes = [(step, value) for index, (step, value) in enumerate(values) if index == 0 or value != values[index - 1][1]]
    stops = [step for step, _ in changes[1:]] + [stop]
    return [(start, end, value) for (start, value), end in zip(changes, stops, strict=True) if value]


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential moving average with a memory of a thirtieth of the run, without a bias towards its start."""
    decay = 1 - 1 / max(1.0, len(points) / 30)
    average, weight, smooth = 0.0, 0.0, []
    for step, value in points:
        average, weight = decay * average + value, decay * weight + 1
        smooth.append((step, average / weight))
    return smooth
