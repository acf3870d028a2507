"""Drawings for the report, as compact SVG that reads well on light and on dark pages.

Every function takes numbers and returns the text of one ``<svg>`` element, for a page that defines the CSS variables of `PAGE_COLOURS`. Text and axes
take the page's text colour, marks are in Okabe and Ito's colours, and nothing is loaded from elsewhere. matplotlib (extra ``report``) draws.

References
----------
Okabe, Ito. Color Universal Design. 2008. https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

import functools
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple, ParamSpec

from partwise.checks import load_extra
from partwise.ledger import STATUSES, Ledger, Status
from partwise.models.names import locate_all

__all__ = ["Point", "growth", "losses", "part_map", "quality", "rank_map", "sizes"]

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"
MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
# Stand-ins that become CSS colours of the page once the SVG is written.
INK, MUTED, GRID, PAPER, ON_MIDDLE, ON_STRONG = "#010203", "#020304", "#030405", "#040506", "#050607", "#060708"
PAGE_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    ON_MIDDLE: "var(--on-middle)",  # text on a cell of middle strength
    ON_STRONG: "var(--on-strong)",  # text on a cell in full colour
    BLUE: "var(--blue)",  # a dark page swaps blue and sky blue, for contrast
    SKY: "var(--sky)",
}
LINES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
AREAS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, YELLOW)
STATUS_COLOURS: dict[Status, str] = {"kept": BLUE, "grown": GREEN, "late": ORANGE, "dropped": MUTED, "lost": VERMILLION}

WIDTH = 760.0  # of a full-width figure, in SVG units
SCALE = 1.28  # CSS pixels a unit, where the page is wide enough
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a module name is a dollar sign
    "font.size": 10,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
}


class Point(NamedTuple):
    """One point of the curve of quality against kept rank."""

    rank: int
    metric: float
    parameters: int
    bytes: int


Arguments = ParamSpec("Arguments")


def _styled(draw: Callable[Arguments, str]) -> Callable[Arguments, str]:
    """Draw with our style and leave the caller's matplotlib settings alone."""

    @functools.wraps(draw)
    def draw_in_style(*args: Arguments.args, **kwargs: Arguments.kwargs) -> str:
        with load_extra("matplotlib", extra="report").rc_context(STYLE):
            return draw(*args, **kwargs)

    return draw_in_style


@_styled
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
    gutter, top, cell_height = _text_width([_short(kind) for kind in kinds]), 22.0, 27.0
    cell = min(90.0, (WIDTH - gutter - 46) / len(layers))
    height = top + cell_height * len(kinds) + 34
    canvas = _Canvas(gutter + max(cell * len(layers) + 46, 250), height)  # the scale needs 250
    most = max(1, *ranks.values())
    every = math.ceil(20 / cell)
    for column, layer in enumerate(layers):
        if layer is None or column % every == 0:
            canvas.text(gutter + cell * (column + 0.5), top - 10, "none" if layer is None else str(layer), size=9, colour=MUTED, anchor="center")
    canvas.text(gutter - 8, top - 10, "layer", size=9, colour=MUTED, anchor="right")
    canvas.text(gutter + cell * len(layers) + 40, top - 10, "sum", size=9, colour=MUTED, anchor="right")
    for row, kind in enumerate(kinds):
        middle = top + cell_height * (row + 0.5)
        canvas.text(gutter - 8, middle, _short(kind), anchor="right")
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


@_styled
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
    groups = _stacked_groups(history[-1][1])
    rows = _label_rows(names, most=80)
    row_height = 11.0 if len(rows) <= 50 else 8.0
    upper, lower = 190.0, row_height * len(rows) + 20
    figure = _figure(WIDTH, upper + lower + 90)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(upper, lower))
    edges = [step for step, _ in history] + [max(num_steps, history[-1][0])]
    bottom = [0] * len(history)
    for colour, (kind, group) in zip(AREAS, groups.items(), strict=False):
        heights = [sum(ranks.get(name, 0) for name in group) for _, ranks in history]
        tops = [low + high for low, high in zip(bottom, heights, strict=True)]
        above.stairs(tops, edges, baseline=bottom, fill=True, facecolor=colour, alpha=0.85, edgecolor=PAPER, linewidth=0.5, label=_short(kind))
        bottom = tops
    above.set(title="components in the model, by kind of module", ylim=(0, max(bottom) * 1.08 or 1), xlim=(edges[0], edges[-1]))
    _legend_above(above, columns=4)
    most = max(1, *(sum(ranks.get(name, 0) for name in group) for _, ranks in history for group in rows.values()))
    patches = load_extra("matplotlib.patches", extra="report")
    for row, group in enumerate(rows.values()):
        for start, stop, rank in _runs([(step, sum(ranks.get(name, 0) for name in group)) for step, ranks in history], edges[-1]):
            below.add_patch(patches.Rectangle((start, row + 0.1), stop - start, 0.8, facecolor=_shade(rank / most), linewidth=0, clip_on=False))
    below.set(title="rank over time: the stronger the colour, the higher", xlabel="step", ylim=(len(rows), 0))
    below.set_yticks([row + 0.5 for row in range(len(rows))], list(rows), fontsize=8 if row_height > 10 else 6.5)
    below.tick_params(axis="y", length=0)
    below.grid(visible=False)
    return _to_svg(figure, f"components in the model against steps, from {sum(history[0][1].values())} to {sum(history[-1][1].values())}")


@_styled
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
    figure = _figure(WIDTH, 390 if metric else 260)
    axes = figure.subplots(1 + bool(metric), 1, sharex=True, height_ratios=(1.6, 1.0) if metric else (1.0,), squeeze=False)[:, 0]
    if train:
        steps, values = zip(*_thinned(train, num_points=400), strict=True)
        axes[0].plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.4)
        smooth_steps, smooth = zip(*_thinned(_smoothed(train), num_points=200), strict=True)
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
    return _to_svg(figure, f"loss while training and on held-out rows{f', and {metric_name}' if metric else ''}, against steps")


@_styled
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
    figure = _figure(WIDTH, 330)
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
    _legend_above(axis, columns=4)
    return _to_svg(figure, f"{metric_name} against kept rank for {', '.join(curves)}")


@_styled
def sizes(curve: Sequence[Point], *, metric_name: str) -> str:
    """Bytes of the adapter at every kept rank, as bars, with what is left of the metric.

    Parameters
    ----------
    curve : sequence of Point
        From the smallest kept rank to the whole adapter.
    metric_name : str
        Named beside each bar.
    """
    figure = _figure(WIDTH, 30.0 * len(curve) + 54)
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
    return _to_svg(figure, f"size of the adapter and {metric_name} at every kept rank")


@_styled
def part_map(ledger: Ledger) -> str:
    """Every part as a square beside the name of its module (of its layer, in huge models): colour tells what happened to it, shade what it is worth.

    Parameters
    ----------
    ledger : Ledger
        At least one part.
    """
    label_of = {
        name: label for label, names in _label_rows(list(dict.fromkeys(part.where for part in ledger.parts)), most=320).items() for name in names
    }
    groups: dict[str, list[tuple[Status, float | None]]] = {}
    for part in ledger.parts:
        groups.setdefault(label_of[part.where], []).append((part.status, part.score))
    most_parts = max(map(len, groups.values()))
    gutter, row_height, step = _text_width(list(groups), size=9), 15.0, 12.0
    columns = max(1, min(int(WIDTH // (gutter + most_parts * step + 20)), math.ceil(len(groups) / 8)))
    rows = math.ceil(len(groups) / columns)
    pitch = max(WIDTH / columns, gutter + step)
    step = min(step, (pitch - gutter - 12) / most_parts)
    canvas = _Canvas(WIDTH, rows * row_height + 34)
    best = max((abs(score) for parts in groups.values() for _, score in parts if score is not None), default=0.0)
    squares: dict[tuple[Status, int], list[tuple[float, float]]] = {}
    for number, (label, parts) in enumerate(groups.items()):
        left, middle = pitch * (number // rows) + gutter, row_height * (number % rows + 0.5)
        canvas.text(left - 6, middle, label, size=9, anchor="right")
        for index, (status, score) in enumerate(parts):
            level = 4 if score is None or not best else math.ceil(4 * abs(score) / best) or 1
            squares.setdefault((status, level), []).append((left + step * index, middle - step * 0.42))
    for (status, level), corners in squares.items():
        canvas.squares(corners, step * 0.84, status=status, share=level / 4)
    x, y = 0.0, rows * row_height + 16
    for status in (status for status in STATUSES if any(key[0] == status for key in squares)):
        canvas.squares([(x, y - 4.5)], 9, status=status, share=1.0)
        canvas.text(x + 14, y, status, size=9)
        x += 70
    canvas.text(x, y, "the stronger the colour, the higher the score" if best else "", size=9, colour=MUTED)
    return canvas.to_svg("every part, by module, with what happened to it")


class _Canvas:
    """A drawing without axes, in SVG units, y pointing down."""

    def __init__(self, width: float, height: float) -> None:
        self._figure = _figure(width, height, layout=None)
        self._axis = self._figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._axis.set(xlim=(0, width), ylim=(height, 0))
        self._axis.set_axis_off()
        self._tips: list[str] = []

    def text(self, x: float, y: float, text: str, *, size: float = 10, colour: str = INK, anchor: str = "left") -> None:
        self._axis.text(x, y, text, fontsize=size, color=colour, ha=anchor, va="center_baseline")

    def box(self, x: float, y: float, width: float, height: float, *, share: float, tip: str = "") -> None:
        patches = load_extra("matplotlib.patches", extra="report")
        empty = {"facecolor": "none", "edgecolor": GRID, "linewidth": 1.0}
        patch = patches.Rectangle((x, y), width, height, clip_on=False, **({"facecolor": _shade(share), "linewidth": 0} if share else empty))
        if tip:
            patch.set_gid(f"tip-{len(self._tips)}")
            self._tips.append(tip)
        self._axis.add_patch(patch)

    def squares(self, corners: Sequence[tuple[float, float]], side: float, *, status: Status, share: float) -> None:
        """Many squares as one path, which keeps large ledgers small."""
        patches, paths = load_extra("matplotlib.patches", extra="report"), load_extra("matplotlib.path", extra="report")
        inset = 0.0 if status in ("kept", "grown", "late") else 0.6
        vertices, codes = [], []
        for x, y in corners:
            near, far = (x + inset, y + inset), (x + side - inset, y + side - inset)
            vertices += [near, (far[0], near[1]), far, (near[0], far[1]), near]
            codes += [1, 2, 2, 2, 79]  # move, three lines, close
        colour = STATUS_COLOURS[status]
        looks = {"facecolor": _shade(share, colour), "linewidth": 0} if not inset else {"facecolor": "none", "edgecolor": colour, "linewidth": 1.0}
        self._axis.add_patch(patches.PathPatch(paths.Path(vertices, codes), clip_on=False, **looks))

    def scale(self, x: float, y: float, most: int, *, label: str) -> _Canvas:
        """A legend for shades from 0 to ``most``."""
        self.text(x, y, label, size=9, colour=MUTED)
        shown = sorted({round(most * quarter / 4) for quarter in range(5)})
        for index, value in enumerate(shown):
            left = x + 34 + index * 40
            self.box(left, y - 7, 14, 14, share=value / most)
            self.text(left + 19, y, str(value), size=9, colour=MUTED)
        return self

    def to_svg(self, label: str) -> str:
        return _to_svg(self._figure, label, tips=self._tips)


def _figure(width: float, height: float, *, layout: str | None = "constrained") -> Any:
    figures = load_extra("matplotlib.figure", extra="report")
    return figures.Figure(figsize=(width / 72, height / 72), layout=layout)


def _shade(share: float, colour: str = BLUE) -> tuple[str, float]:
    """A colour whose weight on any paper grows with ``share`` in [0, 1]; 0 stays invisible."""
    return colour, round(0.12 + 0.88 * min(share, 1.0), 2) if share else 0.0


def _to_svg(figure: Any, label: str, *, tips: Sequence[str] = ()) -> str:
    """Write a figure as one small ``<svg>`` element in the page's fonts and colours."""
    matplotlib = load_extra("matplotlib", extra="report")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # ids that differ between the figures of a page, and never between two runs
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    width, height = (72 * inches for inches in figure.get_size_inches())
    svg = buffer.getvalue()
    svg = re.sub(r"^.*?<svg[^>]*>|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="tip-(\d+)">', lambda match: f"<g><title>{html.escape(tips[int(match[1])])}</title>", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(?<= )(?:d|x|y|width|height|transform)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), svg)
    svg = re.sub(r' transform="rotate\(-?0(?:\.0*)? [^"]*"', "", svg)
    svg = re.sub(r"font(-family: [^;\"]*|: (?P<size>[\d.]+px) [^;\"]*)", lambda match: f"font-size: {match['size']}" if match["size"] else "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = re.sub(r"M (\S+) (\S+) L (\S+) \2 L \3 (\S+) L \1 \4 z", _rectangle, svg)
    svg = re.sub(r"(?<=>) (?=<)| (?=/>)|(?<=\") (?=\")", "", svg).replace('style="; ', 'style="').replace("; ;", ";")
    svg = svg.replace("<defs></defs>", "").replace("xlink:href", "href")
    for stand_in, colour in PAGE_COLOURS.items():
        svg = svg.replace(stand_in.lower(), colour)
    size = f"width:{SCALE * width:.0f}px;min-width:{min(width, 680.0):.0f}px"
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="{size}" role="img" aria-label="{html.escape(label)}">{svg.strip()}'


def _stacked_groups(ranks: Mapping[str, int]) -> dict[str, list[str]]:
    """Module names by kind; beyond as many kinds as there are colours, the smallest are taken together."""
    groups: dict[str, list[str]] = {}
    for name, (_, kind) in locate_all(ranks).items():
        groups.setdefault(kind, []).append(name)
    if len(groups) <= len(AREAS):
        return groups
    by_size = sorted(groups, key=lambda kind: -sum(ranks[name] for name in groups[kind]))
    large, small = by_size[: len(AREAS) - 1], by_size[len(AREAS) - 1 :]
    return {kind: groups[kind] for kind in large} | {"others": [name for kind in small for name in groups[kind]]}


def _rectangle(corners: re.Match[str]) -> str:
    """A rectangle as the shortest path: large ledgers have thousands."""
    left, top, right, bottom = map(float, corners.groups())
    return f"M{left:.1f} {top:.1f}h{right - left:.1f}v{bottom - top:.1f}h{left - right:.1f}z".replace(".0", "")


def _label_rows(names: Sequence[str], *, most: int) -> dict[str, list[str]]:
    """Module names by the label of their row: a module each, or a layer each where there are more than ``most`` modules."""
    rows: dict[str, list[str]] = {}
    for name, (layer, kind) in locate_all(names).items():
        prefix = "" if layer is None else f"{layer} "
        label = f"layer {layer}" if len(names) > most and layer is not None else f"{prefix}{_short(kind)}"
        rows.setdefault(label, []).append(name)
    return rows


def _short(kind: str) -> str:
    """The end of a long kind, which tells more than its beginning."""
    return kind if len(kind) <= 40 else f"...{kind[-37:]}"


def _runs(values: Sequence[tuple[int, int]], stop: int) -> list[tuple[int, int, int]]:
    """(start, stop, value) of every stretch in which a value stays the same and is not 0."""
    changes = [(step, value) for index, (step, value) in enumerate(values) if index == 0 or value != values[index - 1][1]]
    stops = [step for step, _ in changes[1:]] + [stop]
    return [(start, end, value) for (start, value), end in zip(changes, stops, strict=True) if value]


def _thinned(points: Sequence[tuple[int, float]], *, num_points: int) -> list[tuple[float, float]]:
    """At most about ``num_points`` points, each the mean of its neighbours."""
    size = math.ceil(len(points) / num_points)
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(step for step, _ in bucket), fmean(value for _, value in bucket)) for bucket in buckets]


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential moving average with a memory of a thirtieth of the run, without a bias towards its start."""
    decay = 1 - 1 / max(1.0, len(points) / 30)
    average, weight, smooth = 0.0, 0.0, []
    for step, value in points:
        average, weight = decay * average + value, decay * weight + 1
        smooth.append((step, average / weight))
    return smooth


def _legend_above(axis: Any, *, columns: int) -> None:
    lower = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0 if not axis.get_title(loc="left") else 1.1)}
    axis.legend(**lower, ncols=columns, borderaxespad=0.2, columnspacing=1.6)


def _text_width(labels: Sequence[str], *, size: float = 10) -> float:
    """Room for the longest label, with a gap, in SVG units."""
    return 0.56 * size * max(map(len, labels)) + 14
