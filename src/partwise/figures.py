"""What drawings of every room share: colours, style, compact SVG that reads well on light and on dark pages, and the map of parts.

A room's figures are functions that take numbers and return the text of one ``<svg>`` element, for a page that defines the CSS variables of
`PAGE_COLOURS`. Text and axes take the page's text colour, marks are in Okabe and Ito's colours, and nothing is loaded from elsewhere. matplotlib (extra
``report``) draws.

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
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, ParamSpec

from partwise.checks import load_extra
from partwise.ledger import STATUSES, Ledger, Status
from partwise.models.names import locate_all

__all__ = ["Canvas", "label_rows", "legend_above", "new_figure", "part_map", "shade", "short_kind", "styled", "text_width", "thinned", "to_svg"]

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


Arguments = ParamSpec("Arguments")


def styled(draw: Callable[Arguments, str]) -> Callable[Arguments, str]:
    """Draw with our style and leave the caller's matplotlib settings alone."""

    @functools.wraps(draw)
    def draw_in_style(*args: Arguments.args, **kwargs: Arguments.kwargs) -> str:
        with load_extra("matplotlib", extra="report").rc_context(STYLE):
            return draw(*args, **kwargs)

    return draw_in_style


@styled
def part_map(ledger: Ledger) -> str:
    """Every part as a square beside the name of its module (of its layer, in huge models): colour tells what happened to it, shade what it is worth.

    Parameters
    ----------
    ledger : Ledger
        At least one part.
    """
    label_of = {
        name: label for label, names in label_rows(list(dict.fromkeys(part.where for part in ledger.parts)), most=320).items() for name in names
    }
    groups: dict[str, list[tuple[Status, float | None]]] = {}
    for part in ledger.parts:
        groups.setdefault(label_of[part.where], []).append((part.status, part.score))
    most_parts = max(map(len, groups.values()))
    gutter, row_height, step = text_width(list(groups), size=9), 15.0, 12.0
    columns = max(1, min(int(WIDTH // (gutter + most_parts * step + 20)), math.ceil(len(groups) / 8)))
    rows = math.ceil(len(groups) / columns)
    pitch = max(WIDTH / columns, gutter + step)
    step = min(step, (pitch - gutter - 12) / most_parts)
    canvas = Canvas(WIDTH, rows * row_height + 34)
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


class Canvas:
    """A drawing without axes, in SVG units, y pointing down."""

    def __init__(self, width: float, height: float) -> None:
        self._figure = new_figure(width, height, layout=None)
        self._axis = self._figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._axis.set(xlim=(0, width), ylim=(height, 0))
        self._axis.set_axis_off()
        self._tips: list[str] = []

    def text(self, x: float, y: float, text: str, *, size: float = 10, colour: str = INK, anchor: str = "left") -> None:
        """One line, centred on ``y``."""
        self._axis.text(x, y, text, fontsize=size, color=colour, ha=anchor, va="center_baseline")

    def box(self, x: float, y: float, width: float, height: float, *, share: float, tip: str = "") -> None:
        """A cell whose colour grows with ``share``; ``tip`` is shown when the mouse rests on it."""
        patches = load_extra("matplotlib.patches", extra="report")
        empty = {"facecolor": "none", "edgecolor": GRID, "linewidth": 1.0}
        patch = patches.Rectangle((x, y), width, height, clip_on=False, **({"facecolor": shade(share), "linewidth": 0} if share else empty))
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
        looks = {"facecolor": shade(share, colour), "linewidth": 0} if not inset else {"facecolor": "none", "edgecolor": colour, "linewidth": 1.0}
        self._axis.add_patch(patches.PathPatch(paths.Path(vertices, codes), clip_on=False, **looks))

    def scale(self, x: float, y: float, most: int, *, label: str) -> Canvas:
        """A legend for shades from 0 to ``most``."""
        self.text(x, y, label, size=9, colour=MUTED)
        shown = sorted({round(most * quarter / 4) for quarter in range(5)})
        for index, value in enumerate(shown):
            left = x + 34 + index * 40
            self.box(left, y - 7, 14, 14, share=value / most)
            self.text(left + 19, y, str(value), size=9, colour=MUTED)
        return self

    def to_svg(self, label: str) -> str:
        """The drawing as one ``<svg>`` element; ``label`` is read aloud."""
        return to_svg(self._figure, label, tips=self._tips)


def new_figure(width: float, height: float, *, layout: str | None = "constrained") -> Any:
    """An empty figure; sizes in SVG units."""
    figures = load_extra("matplotlib.figure", extra="report")
    return figures.Figure(figsize=(width / 72, height / 72), layout=layout)


def shade(share: float, colour: str = BLUE) -> tuple[str, float]:
    """A colour whose weight on any paper grows with ``share`` in [0, 1]; 0 stays invisible."""
    return colour, round(0.12 + 0.88 * min(share, 1.0), 2) if share else 0.0


def to_svg(figure: Any, label: str, *, tips: Sequence[str] = ()) -> str:
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


def _rectangle(corners: re.Match[str]) -> str:
    """A rectangle as the shortest path: large ledgers have thousands."""
    left, top, right, bottom = map(float, corners.groups())
    return f"M{left:.1f} {top:.1f}h{right - left:.1f}v{bottom - top:.1f}h{left - right:.1f}z".replace(".0", "")


def label_rows(names: Sequence[str], *, most: int) -> dict[str, list[str]]:
    """Module names by the label of their row: a module each, or a layer each where there are more than ``most`` modules."""
    rows: dict[str, list[str]] = {}
    for name, (layer, kind) in locate_all(names).items():
        prefix = "" if layer is None else f"{layer} "
        label = f"layer {layer}" if len(names) > most and layer is not None else f"{prefix}{short_kind(kind)}"
        rows.setdefault(label, []).append(name)
    return rows


def short_kind(kind: str) -> str:
    """The end of a long kind, which tells more than its beginning."""
    return kind if len(kind) <= 40 else f"...{kind[-37:]}"


def thinned(points: Sequence[tuple[int, float]], *, num_points: int) -> list[tuple[float, float]]:
    """At most about ``num_points`` points, each the mean of its neighbours."""
    size = math.ceil(len(points) / num_points)
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(step for step, _ in bucket), fmean(value for _, value in bucket)) for bucket in buckets]


def legend_above(axis: Any, *, columns: int) -> None:
    """The legend between title and axes, in ``columns`` columns."""
    lower = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0 if not axis.get_title(loc="left") else 1.1)}
    axis.legend(**lower, ncols=columns, borderaxespad=0.2, columnspacing=1.6)


def text_width(labels: Sequence[str], *, size: float = 10) -> float:
    """Room for the longest label, with a gap, in SVG units."""
    return 0.56 * size * max(map(len, labels)) + 14
