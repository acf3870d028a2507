"""``partwise prune``: what its arguments ask for."""

from __future__ import annotations

import functools
from typing import Any

from partwise.commands import Command, Report

USAGE = (
    ("prune [METHOD]", "cut a trained model down to a smaller dense one, and measure both"),
    ("prune sweep", "quality against size for several methods, in one figure"),
)
EXAMPLES = ("partwise prune --model FOLDER --keep 0.5               half of a model's states or neurons, saved so that it loads",)
HELP = """\
usage: partwise prune [METHOD] --model FOLDER --keep 0.5 [flags]
       partwise prune sweep --model FOLDER [flags]

Takes whole units out of a trained language model, states of Mamba2 or feed-forward neurons and heads, so that a smaller dense model of
the same class is left. Nothing is trained. Both models are measured on text that the method has not seen: perplexity, parameters, bytes
of the weights and of what a sequence holds, tokens per second.

Of Mamba2, weights shrink by a percent or so; what shrinks is the state that every sequence holds.

METHOD (left out: {usual})
{methods}

Without --model: the newest finished run of `partwise train` under runs/. Without --calibration: the source of Python's standard library.

  partwise prune --model my/mamba2 --keep 0.5                       half of the states of every layer
  partwise prune --model my/llama --keep 0.75 --calibration notes/  choose by text like yours
  partwise prune taylor --model my/llama --kinds heads neurons      also heads; a Llama wants a number that divides the hidden size
  partwise prune --model my/mamba2 --max-state-bytes 400000         as many units as that leaves room for
  partwise prune --model my/llama --scope model                     the best of the whole model; layers differ in size then
  partwise prune --model my/llama --protect '*.layers.0.*'          the first layer stays whole
  partwise prune --out runs/first --model my/llama                  where the run goes; Ctrl-C saves it,
  partwise prune --out runs/first --resume                          and this goes on to the same bits
  partwise prune sweep --model my/mamba2 --methods ghost,magnitude,random --keeps 0.9,0.7,0.5,0.3,0.1 --num-seeds 3

The small model is in RUN/result/model. Where all layers keep as many units, stock from_pretrained opens it; otherwise partwise.load does.
In Python, also for perceptrons and ResNets: plan = GHOST(keep=0.5).plan(model, ids); small = apply(model, plan), from partwise.prune.

All flags of a method, with their defaults: partwise prune METHOD --help
"""
SWEEP = """\
Cuts a model with several methods to several sizes and measures each on the same text, beside the whole one. Leaves a table, and a run folder with a figure of
quality against size. Nothing is saved of the models themselves.\
"""


def pages() -> list[list[str]]:
    """The commands that have a help page, as words after ``partwise prune``."""
    from partwise.prune._sweep import command_names

    return [[], *([method] for method in command_names()), ["sweep"]]


def read(arguments: list[str]) -> Command | str:
    """The command that ``partwise prune ARGUMENTS`` asks for, or a help text."""
    if arguments and arguments[0] in {"-h", "--help"}:
        return help_text()
    return read_sweep(arguments[1:]) if arguments[:1] == ["sweep"] else read_prune(arguments)


def read_prune(arguments: list[str]) -> Command:
    """``partwise prune [METHOD]``."""
    from partwise.flags import job_command
    from partwise.prune._flags import read_prune_flags
    from partwise.prune._terminal import summary_parts

    name, flags = read_prune_flags(arguments)
    return job_command(["partwise", "prune", *arguments], name, flags.run, work=functools.partial(start, name, flags), show=summary_parts)


def start(name: str, flags: Any, *, out: Any, command: list[str], resume: bool, report: Report) -> dict[str, Any]:
    """Run the job with what the flags say."""
    from partwise.prune.job import prune

    return prune(flags.method, flags.source, flags.text, name=name, out=out, resume=resume, command=command, report=report)


def read_sweep(arguments: list[str]) -> Command:
    """``partwise prune sweep``."""
    from partwise.flags import job_command
    from partwise.prune._flags import read_sweep_flags
    from partwise.prune._terminal import sweep_parts

    flags = read_sweep_flags(arguments, about=SWEEP)
    return job_command(["partwise", "prune", "sweep", *arguments], "sweep", flags.run, work=functools.partial(start_sweep, flags), show=sweep_parts)


def start_sweep(flags: Any, *, out: Any, command: list[str], resume: bool, report: Report) -> dict[str, Any]:
    """Run the sweep with what the flags say."""
    from partwise.prune._flags import default_method
    from partwise.prune._sweep import sweep

    usual = default_method(flags.source.model)
    return sweep(flags.source, flags.sweep, flags.text, usual=usual, out=out, resume=resume, command=command, report=report)


def help_text() -> str:
    """Help of ``partwise prune``: the methods as the index of the room has them, and examples. Loads no method."""
    from partwise import prune
    from partwise.prune._flags import OTHERWISE, USUAL
    from partwise.prune._sweep import command_names

    names = command_names()
    width = max(map(len, names)) + 2
    index = dict(line.strip("- ").replace("`", "").split(" - ", 1) for line in (prune.__doc__ or "").splitlines() if line.startswith("- ``"))
    methods = "\n".join(f"  {name:<{width}}{index[name].rpartition(' - ')[0] or index[name]}" for name in names)
    usual = ", ".join(f"{method} for {family.capitalize()}" for family, method in USUAL.items()) + f", {OTHERWISE} for others"
    return HELP.format(usual=usual, methods=methods)
