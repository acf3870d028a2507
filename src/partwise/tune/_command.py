"""``partwise tune``: what its arguments ask for."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.commands import Command, Report

if TYPE_CHECKING:
    from partwise.tune import job

USAGE = (
    ("tune [METHOD]", "fine-tune a model without choosing a rank; leaves a plain LoRA adapter"),
    ("tune truncate RUN", "cut the adapter of a finished run and measure what that costs"),
)
EXAMPLES = (
    "partwise tune                                          a full run on built-in data, a few minutes, no network",
    "partwise tune --model bert-base-uncased --data my.csv --target-r 2",
    "partwise tune --help",
)
HELP = """\
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


def pages() -> list[list[str]]:
    """The commands that have a help page, as words after ``partwise tune``."""
    from partwise.tune import METHODS

    return [[], *([method] for method in METHODS), ["truncate"]]


def read(arguments: list[str]) -> Command | str:
    """The command that ``partwise tune ARGUMENTS`` asks for, or a help text."""
    if arguments and arguments[0] in {"-h", "--help"}:
        return help_text()
    if arguments[:1] == ["truncate"]:
        return read_truncate(arguments[1:])
    from partwise.flags import job_command
    from partwise.tune._flags import read_tune_flags
    from partwise.tune._terminal import summary_parts

    name, flags = read_tune_flags(arguments)
    return job_command(["partwise", "tune", *arguments], name, flags.run, work=functools.partial(start, name, flags), show=summary_parts)


def start(name: str, flags: Any, *, out: Path, command: list[str], resume: bool, report: Report) -> dict[str, Any]:
    """Run one method, or a comparison of several."""
    from partwise.tune.job import tune

    run = flags.run
    if run.checkpoint_every < 1:
        raise InputError("setting-out-of-range", f"--checkpoint-every is {run.checkpoint_every}, expected at least 1. Raise it.")
    common: dict[str, Any] = {
        "out": out,
        "resume": resume,
        "checkpoint_every": run.checkpoint_every,
        "command": command,
        "report": with_loss(report),
    }
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


def with_loss(report: Report) -> job.Report:
    """Show the training loss as the note of the progress bar."""
    return lambda phase, done, total, loss: report(phase, done, total, "" if loss is None else f"loss {loss:.3f}")


def read_truncate(arguments: list[str]) -> Command:
    """``partwise tune truncate RUN --rank K --out DIR``."""
    from rich.text import Text

    from partwise.flags import parse_with_folder
    from partwise.tune._cut import truncate_run
    from partwise.tune._flags import CutFlags
    from partwise.tune._terminal import cut_lines

    about = "Cuts the adapter of a finished run, writes the smaller one, and measures both on the run's own held-out rows."
    flags, folder = parse_with_folder(CutFlags, arguments, prog="partwise tune truncate RUN", about=about)
    return Command(
        work=lambda report: truncate_run(folder, rank=flags.rank, budget=flags.budget, out=flags.out),
        show=lambda cut: map(Text, cut_lines(cut)),
        json=flags.json,
    )


def help_text() -> str:
    """Help of ``partwise tune``: the methods and examples."""
    from partwise.flags import first_line
    from partwise.tune import METHODS
    from partwise.tune._flags import DEFAULT_METHOD

    width = max(map(len, METHODS)) + 2
    methods = "\n".join(f"  {name:<{width}}{first_line(target)}" for name, target in METHODS.items())
    return HELP.format(default=DEFAULT_METHOD, methods=methods)
