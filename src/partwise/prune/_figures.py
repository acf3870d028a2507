"""Drawings of a pruning: how scores are spread over the units of each layer, and quality against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from partwise.checks import load_extra
from partwise.figures import INK, LINES, MARKERS, MUTED, PAPER, WIDTH, legend_above, new_figure, shade, styled, to_svg

Rows = Sequence[Mapping[str, Any]]


@styled
def concentration(layers: Rows) -> str:
    """Share of the scores against share of the units, best ones first, a line for each layer.

    Parameters
    ----------
    layers : sequence of mapping
        Each with ``curve``, ``kept`` and ``of``.
    """
    figure = new_figure(WIDTH, 300)
    axis = figure.subplots()
    for number, row in enumerate(layers):
        curve = row["curve"]
        colour = shade(0.2 + 0.8 * number / max(1, len(layers) - 1))
        places = [100 * point / (len(curve) - 1) for point in range(len(curve))]
        axis.plot(places, [100 * value for value in curve], color=colour, linewidth=1.5)
        place = 100 * row["kept"] / row["of"]
        look = {"color": colour, "marker": "o", "markersize": 5.0, "markeredgecolor": PAPER, "clip_on": False, "zorder": 3}
        axis.plot([place], [100 * _at(curve, row["kept"] / row["of"])], **look)
    axis.plot([0, 100], [0, 100], color=MUTED, linewidth=1.0, linestyle=":")
    axis.set(xlabel="units that stay, best first (%)", ylabel="of the sum of scores (%)", xlim=(0, 100), ylim=(0, 102))
    return to_svg(figure, f"share of the scores that the best units hold, in {len(layers)} layers")


def _at(curve: Sequence[float], share: float) -> float:
    """A curve between its points."""
    place = share * (len(curve) - 1)
    low = min(int(place), len(curve) - 2)
    return curve[low] + (place - low) * (curve[low + 1] - curve[low])


@styled
def quality(rows: Rows, whole: Mapping[str, Any], *, size: str, label: str) -> str:
    """Perplexity against size, a line for each method: the mean over seeds, and where there are several, the range between them.

    Parameters
    ----------
    rows : sequence of mapping
        One for each method and fraction, with ``method``, ``keep``, ``perplexity`` (mean, or None), ``lowest``, ``highest`` and the size.
    whole : mapping
        The same of the whole model.
    size : str
        Which key the size is.
    label : str
        What the axis is called, with its unit.
    """
    figure = new_figure(WIDTH, 380)
    axis = figure.subplots()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    divisor = byte_unit(whole[size])[1] if size.endswith("bytes") else 1.0
    start = whole[size] / divisor
    for number, method in enumerate(methods):
        finite = [row for row in rows if row["method"] == method and row["perplexity"]]
        points = sorted((row[size] / divisor, row["perplexity"], row["lowest"], row["highest"]) for row in finite)
        if not points:
            continue
        places, means, lows, highs = zip(*points, strict=True)
        colour = LINES[number % len(LINES)]
        look = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markeredgecolor": PAPER, "linewidth": 1.8}
        axis.plot([*places, start], [*means, whole["perplexity"]], label=method, markevery=range(len(places)), **look)
        if any(high > low for low, high in zip(lows, highs, strict=True)):
            axis.fill_between([*places, start], [*lows, whole["perplexity"]], [*highs, whole["perplexity"]], color=colour, alpha=0.14, linewidth=0)
    axis.axhline(whole["perplexity"], color=MUTED, linewidth=1.0, linestyle=":")
    axis.plot([start], [whole["perplexity"]], color=INK, marker="*", markersize=11, linestyle="none", label="whole model", zorder=4)
    axis.set(xlabel=label, ylabel="perplexity")
    if size == "sequence_bytes":
        axis.set_xlim(left=0)
    if divisor == 1.0:
        axis.xaxis.set_major_formatter(load_extra("matplotlib.ticker", extra="report").EngFormatter())
    _logarithmic(axis, [row["perplexity"] for row in rows if row["perplexity"]] + [whole["perplexity"]])
    legend_above(axis, columns=6)
    return to_svg(figure, f"perplexity of {len(methods)} methods against {label}")


def _logarithmic(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic scale with plain labels where values lie far apart: powers are written as formulas otherwise, which no browser reads."""
    ticker = load_extra("matplotlib.ticker", extra="report")
    axis.set_yscale("log")
    digits = (1, 1.5, 2, 3, 5, 7) if max(values) / min(values) < 30 else (1, 3)
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=digits))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}"))
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def byte_unit(most: float) -> tuple[str, float]:
    """The unit in which a number of bytes reads well, and its size."""
    return next(((name, size) for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if most >= size), ("bytes", 1.0))
