"""The ``partwise`` command. Flags are made from the dataclasses of the methods; nothing heavy loads before a job starts."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise import ROOMS, __version__
from partwise.checks import InputError, PartwiseError, check_choice

if TYPE_CHECKING:
    from partwise.tune._flags import RunFlags
    from partwise.tune.job import Report

HELP = """\
partwise works by parts: it cuts a model or a matrix into parts, works on them independently, puts them back together, and keeps the
parts that earn their place.

usage: partwise COMMAND [...]

  tune [METHOD]          fine-tune a model without choosing a rank; leaves a plain LoRA adapter
  tune truncate RUN      cut the adapter of a finished run and measure what that costs
  report RUN             write report.html of a run: one file, readable offline
  list [ROOM]            methods that exist, by room
  doctor                 versions, devices, optional libraries, disk space

  -h, --help             this text; every command has its own
  --version              version of partwise

Start here:

  partwise tune                                          a full run on built-in data, a few minutes, no network
  partwise tune --model bert-base-uncased --data my.csv --target-r 2
  partwise tune --help
"""

TUNE_HELP = """\
usage: partwise tune [METHOD] [flags]
       partwise tune truncate RUN (--rank K | --budget N) --out DIR

Fine-tunes a model with an adapter made of rank-one parts, measures it on held-out rows before and after, and cut to every rank. The
result is a plain LoRA adapter that peft loads.

METHOD (left out: {default})
{methods}

Without flags it runs on docstrings of Python's standard library with the small encoder of the extra `demo`.

  partwise tune --data reviews.csv --text review --label stars       columns named; left out, they are found
  partwise tune --model gpt2 --data chat.jsonl --task causal-lm      prompt and completion
  partwise tune --budget 72                                          72 rank-one parts over all modules together
  partwise tune --compare lora,adalora --num-seeds 3                 same data, steps, seeds and budget, one table
  partwise tune --out runs/first                                     where the run goes; Ctrl-C saves it,
  partwise tune --out runs/first --resume                            and this goes on to the same bits
  partwise tune --config settings.yaml --json                        names as the flags; one JSON object on standard output

All flags of a method, with their defaults: partwise tune METHOD --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 3 the run cannot go on, 4 an extra is missing, 130 stopped by Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {"tune": tune_command, "report": report_command, "list": list_command, "doctor": doctor_command}
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        print(f"partwise {__version__}")
        return 0
    try:
        check_choice(arguments[0], list(commands), name="command")
        return commands[arguments[0]](arguments[1:])
    except PartwiseError as error:
        print(f"error[{error.code}]: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def tune_command(arguments: list[str]) -> int:
    """``partwise tune [METHOD] [flags]``."""
    from partwise.tune._flags import read_tune_flags, resume_command
    from partwise.tune.job import Stopped, fresh_run

    if arguments[:1] == ["truncate"]:
        return truncate_command(arguments[1:])
    if arguments and arguments[0] in {"-h", "--help"}:
        print(tune_help(), end="")
        return 0
    name, flags = read_tune_flags(arguments)
    run: RunFlags = flags.run
    out = run.out or fresh_run(name)
    with quiet_libraries(), only_json(run.json), progress_bar(shown=not run.json) as report:
        try:
            summary = start_tune(name, flags, out=out, command=["partwise", "tune", *arguments], report=report)
        except Stopped:
            print(f"\nstopped; what was done is saved. Go on with:\n  {resume_command(arguments, out)}", file=sys.stderr)
            return 130
    if run.json:
        print_json(summary)
    else:
        print_summary(summary)
    return 0


def start_tune(name: str, flags: Any, *, out: Path, command: list[str], report: Any) -> dict[str, Any]:
    """Run one method, or a comparison of several."""
    from partwise.tune.job import tune

    run: RunFlags = flags.run
    if run.checkpoint_every < 1:
        raise InputError("setting-out-of-range", f"--checkpoint-every is {run.checkpoint_every}, expected at least 1. Raise it.")
    common: dict[str, Any] = {"out": out, "resume": run.resume, "checkpoint_every": run.checkpoint_every, "command": command, "report": report}
    if run.compare is None:
        if run.num_seeds != 1:
            raise InputError(
                "seeds-without-compare", f"--num-seeds {run.num_seeds} needs --compare, expected one seed. Pass --seed for another seed."
            )
        return tune(flags.method, flags.training, flags.data, name=name, **common)
    from partwise.tune._flags import recipe_class
    from partwise.tune.compare import compare

    others = [other.strip() for other in run.compare.split(",") if other.strip()]
    shared = {field: getattr(flags.method, field) for field in ("target_modules", "lora_dropout")}  # lora_alpha means another scale at another r
    recipes = {name: flags.method} | {other: recipe_class(other)(**shared) for other in others}
    return compare(recipes, flags.training, flags.data, num_seeds=run.num_seeds, **common)


def truncate_command(arguments: list[str]) -> int:
    """``partwise tune truncate RUN --rank K --out DIR``."""
    from partwise.tune._cut import truncate_run
    from partwise.tune._flags import CutFlags, parse_with_folder

    about = "Cuts the adapter of a finished run, writes the smaller one, and measures both on the run's own held-out rows."
    flags, folder = parse_with_folder(CutFlags, arguments, prog="partwise tune truncate RUN", about=about)
    with quiet_libraries(), only_json(flags.json):
        cut = truncate_run(folder, rank=flags.rank, budget=flags.budget, out=flags.out)
    if flags.json:
        print_json(cut)
        return 0
    from partwise.tune._terminal import cut_lines

    for line in cut_lines(cut):
        print(line)
    return 0


def report_command(arguments: list[str]) -> int:
    """``partwise report RUN``."""
    if arguments[:1] in (["-h"], ["--help"]) or len(arguments) != 1:
        if len(arguments) != 1:
            raise InputError("bad-flag", f"got {len(arguments)} arguments, expected one: the folder of a run. Try: partwise report runs/NAME")
        print(
            "usage: partwise report RUN\n\nWrites RUN/report.html: ranks, growth, losses, quality against kept rank, sizes. One file, readable offline."
        )
        return 0
    from partwise.report import write_report

    print(write_report(Path(arguments[0])))
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

    from partwise.tune._flags import first_line

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


def tune_help() -> str:
    """Help of ``partwise tune``: the methods and examples."""
    from partwise.tune import METHODS
    from partwise.tune._flags import DEFAULT_METHOD, first_line

    width = max(map(len, METHODS)) + 2
    methods = "\n".join(f"  {name:<{width}}{first_line(target)}" for name, target in METHODS.items())
    return TUNE_HELP.format(default=DEFAULT_METHOD, methods=methods)


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
    """A bar on standard error that a job reports to; nothing where no terminal is attached."""
    if not shown or not sys.stderr.isatty():
        yield lambda phase, done, total, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, loss="")

        def report(phase: str, done: int, total: int, loss: float | None) -> None:
            progress.update(task, description=phase, completed=done, total=total, loss="" if loss is None else f"loss {loss:.3f}")

        yield report


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    from partwise.checkpoint import to_json_bytes

    sys.stdout.write(to_json_bytes(value).decode())


def print_summary(summary: dict[str, Any]) -> None:
    """What a person wants to know at the end of a run."""
    from rich.console import Console

    from partwise.tune._terminal import summary_parts

    console = Console(highlight=False)
    for part in summary_parts(summary):
        console.print(part)
