"""Drawings of a comparison of caches: quality against memory, divergence along the text, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from partwise.checks import load_extra
from partwise.figures import DASHES, INK, LINES, MARKERS, MUTED, PAPER, WIDTH, legend_above, new_figure, shade, styled, to_svg

MOST = 1.6  # times the full cache's perplexity that the frame shows; above it differences of a percent could not be seen

Rows = Sequence[Mapping[str, Any]]


def look_of(number: int) -> dict[str, Any]:
    """Colour, marker and dash of a method: no two of the first fifty look the same."""
    colour, turn = LINES[number % len(LINES)], number // len(LINES)
    marks = {"marker": MARKERS[(number + turn) % len(MARKERS)], "markersize": 5.0, "markeredgecolor": PAPER}
    return {"color": colour, "linestyle": DASHES[turn % len(DASHES)], "linewidth": 1.6} | marks


@styled
def quality(methods: Sequence[str], rows: Rows, full: Mapping[str, Any]) -> str:
    """Perplexity, and divergence from the full cache, against the bytes that a cache held at most.

    Parameters
    ----------
    methods : sequence of str
        In the order of the legend.
    rows : sequence of mapping
        Each with ``method``, ``peak_bytes``, ``perplexity`` and ``kl``.
    full : mapping
        The same of the full cache.
    """
    figure = new_figure(WIDTH, 360)
    left, right = figure.subplots(1, 2)
    unit, divisor = byte_unit(full["peak_bytes"])
    for axis, name in ((left, "perplexity"), (right, "kl")):
        for number, method in enumerate(methods):
            points = sorted((row["peak_bytes"] / divisor, row[name]) for row in rows if row["method"] == method and row[name] is not None)
            points = [point for point in points if name != "kl" or point[1] > 0]  # the axis is logarithmic, and equal predictions diverge by 0
            if points:
                axis.plot(*zip(*points, strict=True), label=method if axis is left else None, **look_of(number))
        axis.set(xlabel=f"most that the cache held ({unit})")
        _logarithmic(axis.xaxis)
        axis.set_xlim(right=1.25 * full["peak_bytes"] / divisor)
    left.axhline(full["perplexity"], color=MUTED, linewidth=1.0, linestyle=":")
    left.plot([full["peak_bytes"] / divisor], [full["perplexity"]], color=MUTED, marker="*", markersize=10, linestyle="none", label="full cache")
    left.set(ylabel="perplexity")
    left.set_ylim(top=min(left.get_ylim()[1], MOST * full["perplexity"]))
    right.set(ylabel="KL(full || budget), nats per token")
    if any(row["kl"] for row in rows):
        _logarithmic(right.yaxis)
    figure.legend(loc="outside upper left", ncols=5, frameon=False)
    return to_svg(figure, f"perplexity and divergence of {len(methods)} methods against bytes of the cache")


@styled
def along_the_text(methods: Sequence[str], rows: Rows, *, budget: int) -> str:
    """Divergence from the full cache along the text, at one budget.

    Parameters
    ----------
    methods : sequence of str
        In the order of the legend.
    rows : sequence of mapping
        Of this budget, each with ``method`` and ``kl_curve``.
    budget : int
        Where the cache is full.
    """
    figure = new_figure(WIDTH, 300)
    axis = figure.subplots()
    for number, method in enumerate(methods):
        for row in rows:
            points = [(position, value) for position, value in row["kl_curve"] if value]
            if row["method"] == method and points:
                axis.plot(*zip(*points, strict=True), label=method, **(look_of(number) | {"markersize": 3.5, "linewidth": 1.3}))
    axis.axvline(budget, color=MUTED, linewidth=1.0, linestyle=":")
    axis.set(xlabel="position in the text", ylabel="KL(full || budget), nats")
    if any(value for row in rows for _, value in row["kl_curve"]):
        _logarithmic(axis.yaxis)
        legend_above(axis, columns=5)
    return to_svg(figure, f"divergence of {len(methods)} methods along the text at a budget of {budget} tokens")


@styled
def speed(methods: Sequence[str], rows: Rows, full: Mapping[str, Any]) -> str:
    """Tokens per second of every method, at the smallest and at the largest budget, beside the full cache.

    Parameters
    ----------
    methods : sequence of str
        From left to right.
    rows : sequence of mapping
        Each with ``method``, ``budget`` and ``tokens_per_second``.
    full : mapping
        The same of the full cache.
    """
    budgets = sorted({row["budget"] for row in rows})
    budgets = budgets if len(budgets) < 3 else [budgets[0], budgets[-1]]
    figure = new_figure(WIDTH, 260)
    axis = figure.subplots()
    width = 0.8 / len(budgets)
    for place, budget in enumerate(budgets):
        speeds = {row["method"]: row["tokens_per_second"] for row in rows if row["budget"] == budget}
        places = [number + (place - (len(budgets) - 1) / 2) * width for number in range(len(methods))]
        strength = shade(0.3 + 0.5 * place / max(1, len(budgets) - 1))
        axis.bar(places, [speeds[method] for method in methods], width=0.92 * width, facecolor=strength, label=f"budget {budget:,}")
    axis.axhline(full["tokens_per_second"], color=INK, linewidth=1.2, linestyle="--", label="full cache")
    axis.set_xticks(range(len(methods)), [method.replace("-", "-\n", 1) for method in methods])
    axis.set(ylabel="tokens per second")
    axis.margins(y=0.12)
    axis.grid(visible=False, axis="x")
    legend_above(axis, columns=3)
    return to_svg(figure, f"tokens per second of {len(methods)} methods beside the full cache")


def _logarithmic(axis: Any) -> None:
    """A logarithmic scale with plain labels: powers are written as formulas otherwise, which no browser reads."""
    ticker = load_extra("matplotlib.ticker", extra="report")
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = sorted(axis.get_data_interval())
    digits = (1, 2, 3, 5) if low > 0 and high / low < 100 else (1,)
    plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_locator(ticker.LogLocator(subs=digits))
    axis.set_major_formatter(plain)
    axis.set_minor_locator(ticker.NullLocator())


def byte_unit(most: float) -> tuple[str, float]:
    """The unit in which a number of bytes reads well, and its size."""
    return next(((name, size) for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if most >= size), ("bytes", 1.0))
