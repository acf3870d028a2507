"""The ``partwise`` command. Commands of a room live in the room and return what to print; nothing heavy loads before a job starts."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise import ROOMS, __version__
from partwise.checks import InputError, PartwiseError, check_choice

if TYPE_CHECKING:
    from partwise.commands import Command, Report

HELP = """\
partwise works by parts: it cuts a model or a matrix into parts, works on them independently, puts them back together, and keeps the
parts that earn their place.

usage: partwise COMMAND [...]

{usage}

  -h, --help             this text; every command has its own
  --version              version of partwise

Start here:

{examples}
"""
USAGE = (
    ("report RUN", "write report.html of a run: one file, readable offline"),
    ("list [ROOM]", "methods that exist, by room"),
    ("doctor", "versions, devices, optional libraries, disk space"),
)
SECONDS_BETWEEN_LINES = 0.1  # of a status line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 3 the run cannot go on, 4 an extra is missing, 130 stopped by Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(help_text(), end="")
        return 0
    if arguments[0] == "--version":
        print(f"partwise {__version__}")
        return 0
    own: dict[str, Callable[[list[str]], int]] = {"report": report_command, "list": list_command, "doctor": doctor_command}
    try:
        check_choice(arguments[0], [*rooms_with("_command"), *own], name="command")
        if arguments[0] in own:
            return own[arguments[0]](arguments[1:])
        return room_command(arguments[0], arguments[1:])
    except PartwiseError as error:
        print(f"error[{error.code}]: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def rooms_with(module: str) -> list[str]:
    """Rooms that bring a module of that name, such as ``_command`` or ``_report``."""
    return [room for room in ROOMS if importlib.util.find_spec(f"partwise.{room}.{module}") is not None]


def help_text() -> str:
    """Help of ``partwise``: the commands of all rooms, then those that belong to none."""
    rooms = [importlib.import_module(f"partwise.{room}._command") for room in rooms_with("_command")]
    usage = [*(line for room in rooms for line in room.USAGE), *USAGE]
    width = max(23, *(len(command) + 2 for command, _ in usage))
    return HELP.format(
        usage="\n".join(f"  {command:<{width}}{what}" for command, what in usage),
        examples="\n".join(f"  {line}" for room in rooms for line in room.EXAMPLES),
    )


def room_command(room: str, arguments: list[str]) -> int:
    """``partwise ROOM ...``: do what the room reads in the arguments, and print what it says."""
    from partwise.runs import Stopped

    command = importlib.import_module(f"partwise.{room}._command").read(arguments)
    if isinstance(command, str):
        print(command, end="")
        return 0
    streams = command.stream is not None and not command.json
    try:
        with quiet_libraries(), only_json(command.json):
            result = streamed(command) if streams else worked(command)
    except Stopped:
        print(f"\nstopped; what was done is saved. Go on with:\n  {command.resume}", file=sys.stderr)
        return 130
    if command.json:
        print_json(result)
        return 0
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, stderr=streams)
    for part in command.show(result):
        console.print(part, soft_wrap=isinstance(part, str | Text))  # a path that was broken cannot be copied
    return 0


def worked(command: Command) -> dict[str, Any]:
    """Do what a command does, under a bar that shows how far it is."""
    with progress_bar(shown=not command.json) as report:
        return command.work(report)


def streamed(command: Command) -> dict[str, Any]:
    """Do what a command does that hands on text, above a line that shows how far it is. The text ends with a line break, whatever happens."""
    last = "\n"

    def write(text: str) -> None:
        nonlocal last
        if text:
            sys.stdout.write(as_shown(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
            last = text[-1]

    assert command.stream is not None
    with status_line() as report:
        try:
            return command.stream(report, write)
        finally:
            if last != "\n":
                write("\n")


def as_shown(text: str) -> str:
    r"""Text that a terminal shows and does not obey: control characters, which could move the cursor or worse, become a sign that something was there.

    >>> as_shown("\x1b[31mred\n").encode("ascii", "replace")
    b'?[31mred\n'
    """
    return "".join("\ufffd" if unicodedata.category(letter) == "Cc" and letter not in "\n\t" else letter for letter in text)


def report_command(arguments: list[str]) -> int:
    """``partwise report RUN``."""
    if arguments[:1] in (["-h"], ["--help"]) or len(arguments) != 1:
        if len(arguments) != 1:
            raise InputError("bad-flag", f"got {len(arguments)} arguments, expected one: the folder of a run. Try: partwise report runs/NAME")
        print("usage: partwise report RUN\n\nWrites RUN/report.html: what the run's room draws, its ledger and its settings. One file, readable offline.")
        return 0
    from partwise.report import nothing_to_say, write_report
    from partwise.runs import RunFolder

    run = RunFolder.open(Path(arguments[0]))
    room = run.header.get("room")
    describe = importlib.import_module(f"partwise.{room}._report").describe if room in rooms_with("_report") else nothing_to_say
    print(write_report(run.path, describe))
    return 0


def list_command(arguments: list[str]) -> int:
    """``partwise list [ROOM]``."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: partwise list [ROOM]\n\nLists methods with what each does. Rooms: {', '.join(ROOMS)}.")
        return 0
    for room in arguments:
        check_choice(room, ROOMS, name="room")
    from rich.console import Console
    from rich.table import Table

    from partwise.flags import first_line

    table = Table("room", "method", "what it does", box=None)
    for room in arguments or ROOMS:
        methods = importlib.import_module(f"partwise.{room}").METHODS
        for name, target in methods.items():
            table.add_row(room, name, first_line(target))
    Console(highlight=False).print(table)
    return 0


def doctor_command(arguments: list[str]) -> int:
    """``partwise doctor``. Exit code 0 also where optional things are missing."""
    if arguments:
        print(
            "usage: partwise doctor\n\nShows versions, devices, optional libraries, the demo model and disk space, and what to do about what is missing."
        )
        return 0
    from rich.console import Console
    from rich.table import Table

    from partwise.doctor import examine

    table = Table("", "what", "found", "do", box=None)
    for finding in examine():
        table.add_row("ok" if finding.ok else "--", finding.name, finding.found, finding.advice)
    Console(highlight=False).print(table)
    return 0


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep other libraries' progress bars and notes to their own developers off the terminal."""
    for name, value in {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """Inside the block everything printed goes to standard error, where standard output is promised to hold one JSON object."""
    if not wanted:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def progress_bar(*, shown: bool) -> Iterator[Report]:
    """A bar on standard error that a job reports to; nothing where no terminal is attached, or before the first report."""
    if not shown or not sys.stderr.isatty():
        yield lambda phase, done, total, note: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def report(phase: str, done: int, total: int, note: str) -> None:
            task = progress.task_ids[0] if progress.task_ids else progress.add_task("", total=None, note="")
            progress.update(task, description=phase, completed=done, total=total, note=note)

        yield report


@contextlib.contextmanager
def status_line() -> Iterator[Report]:
    """The last line of the terminal, kept free of what is printed meanwhile, for a job to report to; nothing where no terminal is attached.

    A bar would be torn apart by text that ends in the middle of a line, so the lines above become the part of the terminal that scrolls.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield lambda phase, done, total, note: None
        return
    height, drawn, last = 0, 0.0, ""

    def say(sequence: str) -> None:
        sys.stderr.write(f"\x1b7{sequence}\x1b8")  # the cursor is where it was
        sys.stderr.flush()

    def report(phase: str, done: int, total: int, note: str) -> None:
        nonlocal height, drawn, last
        now = time.monotonic()
        if now - drawn < SECONDS_BETWEEN_LINES and phase == last and done != total:
            return
        columns, lines = os.get_terminal_size(sys.stderr.fileno())
        if lines < 2:
            return
        drawn, last = now, phase
        if lines != height:  # at the start, and when the window changed
            sys.stderr.write("\n\x1b[1A" if not height else "")  # room below, where the cursor was on the last line
            height = lines
            say(f"\x1b[1;{lines - 1}r")
        words = f"{phase}  {done:,} of {total:,}  {note}" if total > 1 else f"{phase}  {note}"
        say(f"\x1b[{lines};1H\x1b[2m{words[: columns - 1]}\x1b[0m\x1b[K")

    try:
        yield report
    finally:
        if height:
            say(f"\x1b[r\x1b[{height};1H\x1b[K")


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    from partwise.atomic_files import to_json_bytes

    sys.stdout.write(to_json_bytes(value).decode())
