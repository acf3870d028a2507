"""What a run looks like: the part ledger for terminal and model card, and ``report.html``.

A section of the report appears when its data exists, so that every room can use it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from partwise import __version__, figures
from partwise.checkpoint import read_json, write_atomic
from partwise.checks import load_extra
from partwise.figures import Point
from partwise.ledger import Ledger, ModuleTotal
from partwise.models.names import locate_all
from partwise.runs import RunFolder

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["format_bytes", "format_metric", "format_seconds", "ledger_markdown", "ledger_table", "write_report"]

TEMPLATE = Path(__file__).with_name("report_template.html")
MANY_MODULES = 64  # above this a table of modules is folded away, or shown by layer
LEDGER_COLUMNS = ("module", "rank", "score", "parameters", "bytes", "status")


def format_bytes(num_bytes: float) -> str:
    """A size in decimal units.

    >>> format_bytes(147_456), format_bytes(12)
    ('147.5 kB', '12 bytes')
    """
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= divisor:
            return f"{num_bytes / divisor:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def format_metric(value: float | None) -> str:
    """Four digits that count; a dash where nothing was measured.

    >>> format_metric(0.87162), format_metric(None)
    ('0.8716', '-')
    """
    return "-" if value is None else f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """A duration.

    >>> format_seconds(7.25), format_seconds(192), format_seconds(7384)
    ('7.2 s', '3 min 12 s', '2 h 3 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def ledger_table(ledger: Ledger, *, max_rows: int = MANY_MODULES) -> Table:
    """The ledger for a terminal of 80 columns: a row per module, grouped by layer, or a row per layer when there are more than ``max_rows`` modules."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    modules = ledger.by_module()
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", footer_style="bold")
    for label, text in zip(LEDGER_COLUMNS, (f"total of {len(modules)} modules", *_cells(ledger.total, brief=True)), strict=True):
        is_text = label in ("module", "status")
        table.add_column(label, footer=Text(text), justify="left" if is_text else "right", no_wrap=label != "status", overflow="fold")
    for layer, members in _by_layer(modules):
        heading = "outside the layers" if layer is None else f"layer {layer}"
        if len(modules) > max_rows:
            name = members[0][0] if len(members) == 1 else f"{heading} ({len(members)} modules)"
            table.add_row(Text(name), *map(Text, _cells(_total_of(ledger, members), brief=True)))
            continue
        table.add_row(Text(heading, style="bold"))
        for kind, module in members:
            table.add_row(Text(f"  {kind}"), *map(Text, _cells(module, brief=True)))
    return table


def ledger_markdown(ledger: Ledger) -> str:
    """The ledger as a Markdown table for the model card, a row per module, totals last."""
    rows = [[f"`{module.where}`".replace("|", r"\|"), *_cells(module)] for module in ledger.by_module()]
    rows.append([f"**{cell}**" if cell not in ("", "-") else cell for cell in ("total", *_cells(ledger.total))])
    lines = [LEDGER_COLUMNS, ("---", *["---:"] * 4, "---"), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_report(path: Path) -> Path:
    """Write ``report.html`` of a run: one file without scripts that loads nothing.

    Parameters
    ----------
    path : Path
        The run's folder, finished or not.

    Returns
    -------
    Path
        The report.

    Raises
    ------
    InputError
        ``run-not-found`` when there is no run.
    RunError
        ``file-damaged`` when a file of the run is damaged, ``disk-full``, ``cannot-write``.
    MissingExtra
        When matplotlib or jinja2 is not installed.
    """
    run = RunFolder.open(path)
    jinja2 = load_extra("jinja2", extra="report")
    header, metrics = run.header, run.metrics()
    summary = read_json(run.summary) if run.summary.exists() else {}
    data = _RunData(header, summary, metrics)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=run.path.resolve().name,
        method=str(header.get("method", "")),
        status=str(header.get("status", "")),
        status_text=_status_text(data),
        verdict=_verdict(data),
        cards=_cards(data),
        sections=[section for section in _sections(data) if section],
        version=__version__,
    )
    write_atomic(run.report, page.encode())
    return run.report


@dataclass(frozen=True)
class _Column:
    label: str
    numeric: bool = True


@dataclass(frozen=True)
class _Group:
    heading: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Grid:
    """A table of texts; ``fold`` is the line to click when it starts folded away."""

    caption: str
    columns: Sequence[_Column]
    groups: Sequence[_Group]
    total: Sequence[str] = ()
    fold: str = ""


@dataclass(frozen=True)
class _Section:
    id: str
    title: str
    lead: str = ""
    figure: Any = None
    caption: str = ""
    tables: Sequence[_Grid] = ()


@dataclass(frozen=True)
class _Card:
    label: str
    value: str
    note: str


class _RunData:
    """What the files of a run hold, in the shape that the sections want."""

    def __init__(self, header: Mapping[str, Any], summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> None:
        self.header, self.summary = header, summary
        self.train = _series(metrics, "train", "loss")
        self.held_out = _series(metrics, "eval", "loss")
        self.metric = _series(metrics, "eval", "metric")
        self.history: list[tuple[int, dict[str, int]]] = [(row["step"], row["ranks"]) for row in metrics if row.get("kind") == "growth"]
        self.ranks: dict[str, int] = summary.get("ranks") or (self.history[-1][1] if self.history else {})
        self.ledger = Ledger.from_json(summary.get("ledger") or [])
        self.metric_name = str(summary.get("metric_name") or header.get("metric_name") or "metric")
        self.curve = _curve(summary.get("kept_rank_curve") or [])
        self.method = str(summary.get("method") or header.get("method") or "this run").split("(")[0]
        self.comparison: list[Mapping[str, Any]] = summary.get("comparison") or []
        self.last_step = max((row.get("step", 0) for row in metrics), default=0)
        self.num_steps = int(summary.get("num_steps") or self.last_step)


def _series(metrics: Iterable[Mapping[str, Any]], kind: str, key: str) -> list[tuple[int, float]]:
    """The finite values of one quantity; a diverged step has null."""
    return [(row["step"], row[key]) for row in metrics if row.get("kind") == kind and row.get(key) is not None]


def _curve(points: Sequence[Mapping[str, Any]]) -> list[Point]:
    complete = [point for point in points if point.get("metric") is not None]
    found = [Point(point["rank"], point["metric"], point.get("parameters", 0), point.get("bytes", 0)) for point in complete]
    return sorted(found)


def _by_layer(modules: Sequence[ModuleTotal]) -> list[tuple[int | None, list[tuple[str, ModuleTotal]]]]:
    """(layer, [(kind, module)]) in the order of layers; modules outside the stack come last."""
    places = locate_all(module.where for module in modules)
    groups: dict[int | None, list[tuple[str, ModuleTotal]]] = {}
    for module in modules:
        layer, kind = places[module.where]
        groups.setdefault(layer, []).append((kind, module))
    return sorted(groups.items(), key=lambda group: (group[0] is None, group[0] or 0))


def _total_of(ledger: Ledger, members: Sequence[tuple[str, ModuleTotal]]) -> ModuleTotal:
    names = {module.where for _, module in members}
    return Ledger(tuple(part for part in ledger.parts if part.where in names)).total


def _cells(module: ModuleTotal, *, brief: bool = False) -> list[str]:
    """Rank, score, parameters, bytes and status as texts; brief ones break well in a narrow terminal."""
    counts = module.statuses.items()
    statuses = " ".join(f"{status}:{count}" for status, count in counts) if brief else ", ".join(f"{count} {status}" for status, count in counts)
    score = "-" if module.score is None else f"{module.score:#.4g}".rstrip(".")
    size = format_bytes(module.bytes) if brief else f"{module.bytes:,}"
    return [str(module.rank), score, f"{module.parameters:,}", size, statuses or "-"]


def _status_text(data: _RunData) -> str:
    status = str(data.header.get("status", "unknown"))
    if status == "finished":
        return status
    return f"{status}, at step {data.last_step}"


def _verdict(data: _RunData) -> str:
    """The result in two sentences."""
    before, after = data.summary.get("metric_before"), data.summary.get("metric_after")
    sentences = []
    if before is not None and after is not None:
        verb = "rose" if after > before else "fell" if after < before else "stayed the same:"
        sentences.append(f"On held-out rows {data.metric_name} {verb} from {format_metric(before)} to {format_metric(after)}.")
    elif data.metric:
        step, value = data.metric[-1]
        sentences.append(f"On held-out rows {data.metric_name} was {format_metric(value)} at step {step}. The run is not finished.")
    if len(data.curve) > 1:
        smallest = data.curve[0]
        sentences.append(
            f"Cut to rank {smallest.rank}, the adapter takes {format_bytes(smallest.bytes)} and reaches {format_metric(smallest.metric)}."
        )
    return " ".join(sentences)


def _cards(data: _RunData) -> list[_Card]:
    summary, cards = data.summary, []
    if summary.get("metric_after") is not None:
        before = summary.get("metric_before")
        note = f"before: {format_metric(before)}" if before is not None else "held-out rows"
        cards.append(_Card(data.metric_name, format_metric(summary["metric_after"]), note))
    if summary.get("saved_bytes") is not None:
        cards.append(_Card("size on disk", format_bytes(summary["saved_bytes"]), f"{summary.get('saved_parameters', 0):,} parameters"))
    if data.ranks:
        used = sum(rank > 0 for rank in data.ranks.values())
        cards.append(_Card("components", str(sum(data.ranks.values())), f"in {used} of {len(data.ranks)} modules"))
    if len(data.curve) > 1:
        smallest = data.curve[0]
        cards.append(_Card(f"cut to rank {smallest.rank}", format_metric(smallest.metric), format_bytes(smallest.bytes)))
    if summary.get("seconds") is not None:
        note = f"{data.num_steps:,} steps" if data.num_steps else ""
        cards.append(_Card("time", format_seconds(summary["seconds"]), note))
    return cards


def _sections(data: _RunData) -> list[_Section | None]:
    return [
        _rank_section(data),
        _growth_section(data),
        _loss_section(data),
        _quality_section(data),
        _size_section(data),
        _ledger_section(data),
        _settings_section(data),
    ]


def _rank_section(data: _RunData) -> _Section | None:
    if not data.ranks:
        return None
    lead = "How many components every module was given. The stronger the colour, the more a module needs."
    return _Section(
        "ranks",
        "Rank map",
        lead,
        _markup(figures.rank_map(data.ranks)),
        "Columns are layers, rows are kinds of modules. Hover over a cell for its name.",
    )


def _growth_section(data: _RunData) -> _Section | None:
    if not data.history or all(ranks == data.history[0][1] for _, ranks in data.history):
        return None
    totals = [sum(ranks.values()) for _, ranks in data.history]
    lead = f"From {totals[0]} components to {totals[-1]}: where and when they were added."
    figure = _markup(figures.growth(data.history, num_steps=data.num_steps))
    return _Section("growth", "Growth over time", lead, figure, "Below: a row per module (layer and name), or per layer in deep models.")


def _loss_section(data: _RunData) -> _Section | None:
    if not data.train and not data.held_out:
        return None
    figure = _markup(figures.losses(data.train, data.held_out, data.metric, metric_name=data.metric_name))
    return _Section("loss", "Loss", "", figure, "The thin line is the loss of single batches, the thick one its moving average.")


def _quality_section(data: _RunData) -> _Section | None:
    curves: dict[str, list[list[Point]]] = {}
    for entry in data.comparison:
        curves[str(entry["method"])] = [curve for curve in map(_curve, entry.get("kept_rank_curve") or []) if curve]
    if data.curve:
        curves.setdefault(data.method, [data.curve])
    curves = {label: seeds for label, seeds in curves.items() if seeds}
    if not curves:
        return None
    lead = "What the result is worth when only its first components are kept: cutting needs no retraining."
    figure = _markup(figures.quality(curves, metric_name=data.metric_name, before=data.summary.get("metric_before")))
    caption = "Lines are means over seeds, bands one standard deviation. " if any(len(seeds) > 1 for seeds in curves.values()) else ""
    if data.summary.get("metric_before") is not None:
        caption += f"Before training {data.metric_name} was {format_metric(data.summary['metric_before'])}."
    return _Section("quality", "Quality against kept rank", lead, figure, caption, _comparison_tables(data))


def _comparison_tables(data: _RunData) -> list[_Grid]:
    if not data.comparison:
        return []
    columns = (_Column("method", numeric=False), _Column(data.metric_name), _Column("seeds"), _Column("saved parameters"), _Column("seconds a step"))
    rows = [
        [
            str(entry["method"]),
            _with_spread(entry.get("metric") or []),
            str(len(entry.get("seeds") or [])),
            f"{fmean(entry['saved_parameters']):,.0f}" if entry.get("saved_parameters") else "-",
            _with_spread(entry.get("seconds_per_step") or []),
        ]
        for entry in data.comparison
    ]
    return [_Grid("Methods side by side, with the same data and steps: mean and standard deviation over seeds.", columns, [_Group("", rows)])]


def _with_spread(values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    return format_metric(fmean(present)) + (f" \u00b1 {stdev(present):.2g}" if len(present) > 1 else "")


def _size_section(data: _RunData) -> _Section | None:
    if not data.curve:
        return None
    whole = data.curve[-1]
    columns = [_Column(label, numeric=label != "kept rank") for label in ("kept rank", "parameters", "bytes", data.metric_name, "against the whole")]
    rows = [
        [
            str(point.rank),
            f"{point.parameters:,}",
            f"{point.bytes:,}",
            format_metric(point.metric),
            "-" if point is whole else f"{point.metric - whole.metric:+.4f}",
        ]
        for point in data.curve
    ]
    grid = _Grid("What each kept rank costs and reaches.", columns, [_Group("", rows)])
    return _Section("sizes", "Sizes", "", _markup(figures.sizes(data.curve, metric_name=data.metric_name)), tables=[grid])


def _ledger_section(data: _RunData) -> _Section | None:
    if not data.ledger.parts:
        return None
    total, modules = data.ledger.total, data.ledger.by_module()
    columns = [_Column(label, numeric=label not in ("module", "status")) for label in LEDGER_COLUMNS]
    groups = [
        _Group("Outside the layers" if layer is None else f"Layer {layer}", [[kind, *_cells(module)] for kind, module in members])
        for layer, members in _by_layer(modules)
    ]
    fold = f"Show the table of {len(modules)} modules" if len(modules) > MANY_MODULES else ""
    grid = _Grid("Every module: what it costs, what it is worth, what happened to its parts.", columns, groups, ("total", *_cells(total)), fold)
    lead = f"{len(data.ledger.parts)} parts in {len(modules)} modules: {_cells(total)[-1]}."
    return _Section("ledger", "Part ledger", lead, _markup(figures.part_map(data.ledger)), "Each square is one part.", [grid])


def _settings_section(data: _RunData) -> _Section:
    columns = (_Column("name", numeric=False), _Column("value", numeric=False))
    header = dict(data.header)
    command = header.pop("command", None)
    groups = [
        _Group(key, [[name, _plain(value)] for name, value in header.pop(key).items()]) for key in ("settings", "data", "versions") if header.get(key)
    ]
    rest = [[key, _plain(value)] for key, value in header.items() if key != "status"]
    if command:
        rest.append(["command", shlex.join(map(str, command))])
    return _Section("settings", "Settings", "", tables=[_Grid("What the run was asked to do, and with what.", columns, [_Group("", rest), *groups])])


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _markup(svg: str) -> Any:
    """Drawings are ours and escape their labels: the template takes them as they are."""
    return load_extra("markupsafe", extra="report").Markup(svg)
