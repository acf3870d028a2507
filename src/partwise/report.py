"""What a run looks like: the part ledger for terminal and model card, and ``report.html``.

This file knows no room. A room describes its run as a `Content` of cards, sections, figures and tables; the page is built from it here, with the settings of
the run at the end.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise import __version__, figures
from partwise.atomic_files import read_json, write_atomic, write_json
from partwise.checks import MissingExtra, load_extra
from partwise.ledger import Ledger, ModuleTotal
from partwise.models.names import locate_all
from partwise.runs import RunFolder

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Card",
    "Column",
    "Content",
    "Grid",
    "Group",
    "RunRecord",
    "Section",
    "format_bytes",
    "format_metric",
    "format_seconds",
    "ledger_markdown",
    "ledger_section",
    "ledger_table",
    "markup",
    "publish",
    "write_report",
]

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Column:
    """Head of a column; numbers stand to the right."""

    label: str
    numeric: bool = True


@dataclass(frozen=True)
class Group:
    """Rows of texts under one heading; an empty heading is left out."""

    heading: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Grid:
    """A table of texts; ``fold`` is the line to click when it starts folded away."""

    caption: str
    columns: Sequence[Column]
    groups: Sequence[Group]
    total: Sequence[str] = ()
    fold: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the page: a heading with a figure (from `markup`), tables, or both."""

    id: str
    title: str
    lead: str = ""
    figure: Any = None
    caption: str = ""
    tables: Sequence[Grid] = ()


@dataclass(frozen=True)
class Card:
    """A headline number."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a room says about its run.

    Parameters
    ----------
    verdict : str
        The result in a sentence or two.
    cards : sequence of Card
        Headline numbers.
    sections : sequence of Section or None
        In the order of the page; None where the data for a section do not exist.
    unit : str
        What the run counts: steps, rounds.
    """

    verdict: str = ""
    cards: Sequence[Card] = ()
    sections: Sequence[Section | None] = ()
    unit: str = "step"


@dataclass(frozen=True)
class RunRecord:
    """What the files of a run hold: its folder, ``run.json``, ``summary.json`` (empty while there is none) and the rows of ``metrics.jsonl``."""

    run: RunFolder
    header: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def last_step(self) -> int:
        """The last step, or round, that was recorded."""
        return max((row.get("step", 0) for row in self.metrics), default=0)


def nothing_to_say(record: RunRecord) -> Content:
    """The content of a run whose room draws nothing: settings alone."""
    return Content()


def write_report(path: Path, describe: Callable[[RunRecord], Content] = nothing_to_say) -> Path:
    """Write ``report.html`` of a run: one file without scripts that loads nothing.

    Parameters
    ----------
    path : Path
        The run's folder, finished or not.
    describe : callable
        What the run's room has to say about it. Left out: the page shows the settings alone.

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
    record = RunRecord(run, run.header, read_json(run.summary) if run.summary.exists() else {}, run.metrics())
    content = describe(record)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=run.path.resolve().name,
        method=str(record.header.get("method", "")),
        status=str(record.header.get("status", "")),
        status_text=_status_text(record, content.unit),
        verdict=content.verdict,
        cards=content.cards,
        sections=[section for section in (*content.sections, _settings_section(record.header)) if section],
        version=__version__,
    )
    write_atomic(run.report, page.encode())
    return run.report


def publish(run: RunFolder, summary: dict[str, Any], describe: Callable[[RunRecord], Content]) -> dict[str, Any]:
    """Write ``summary.json``, call the run finished, and draw the report. Without the extra that draws, ``report`` is None and a warning says how to get it."""
    write_json(run.summary, summary | {"report": str(run.report)})
    run.set_status("finished")
    try:
        write_report(run.path, describe)
    except MissingExtra as missing:
        logger.warning("no report was drawn: %s Then: partwise report %s", missing, run.path)
        write_json(run.summary, summary | {"report": None})
        return summary | {"report": None}
    return summary | {"report": str(run.report)}


def ledger_section(ledger: Ledger, *, place: str = "module") -> Section | None:
    """The map and the table of all parts, or None where the run has no ledger yet; ``place`` is what parts sit in."""
    if not ledger.parts:
        return None
    total, modules = ledger.total, ledger.by_module()
    columns = [Column(place if label == "module" else label, numeric=label not in ("module", "status")) for label in LEDGER_COLUMNS]
    layers = _by_layer(modules)
    has_layers = any(layer is not None for layer, _ in layers)
    groups = [
        Group(f"Layer {layer}" if layer is not None else "Outside the layers" if has_layers else "", [[kind, *_cells(module)] for kind, module in members])
        for layer, members in layers
    ]
    fold = f"Show the table of {len(modules)} {place}s" if len(modules) > MANY_MODULES else ""
    grid = Grid(f"Every {place}: what it costs, what it is worth, what happened to its parts.", columns, groups, ("total", *_cells(total)), fold)
    lead = f"{len(ledger.parts)} parts in {len(modules)} {place}{'s' * (len(modules) != 1)}: {_cells(total)[-1]}."
    return Section("ledger", "Part ledger", lead, markup(figures.part_map(ledger)), "Each square is one part.", [grid])


def markup(svg: str) -> Any:
    """Drawings are ours and escape their labels: the template takes them as they are."""
    return load_extra("markupsafe", extra="report").Markup(svg)


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


def _status_text(record: RunRecord, unit: str) -> str:
    status = str(record.header.get("status", "unknown"))
    return status if status == "finished" else f"{status}, at {unit} {record.last_step}"


def _settings_section(header: Mapping[str, Any]) -> Section:
    columns = (Column("name", numeric=False), Column("value", numeric=False))
    rest = {key: value for key, value in header.items() if key not in ("status", "command")}
    groups = [Group(key, [[name, _plain(value)] for name, value in rest.pop(key).items()]) for key in list(rest) if rest[key] and isinstance(rest[key], dict)]
    rows = [[key, _plain(value)] for key, value in rest.items()]
    if header.get("command"):
        rows.append(["command", shlex.join(map(str, header["command"]))])
    return Section("settings", "Settings", "", tables=[Grid("What the run was asked to do, and with what.", columns, [Group("", rows), *groups])])


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
