"""``partwise train``: what its arguments ask for."""

from __future__ import annotations

import functools
from typing import Any

from partwise.commands import Command, Report

USAGE = (
    ("train [METHOD]", "train a model by subnetworks, on one machine or many; leaves tickets of several sizes"),
    ("train ticket RUN", "cut a ticket of any other size out of a run"),
)
EXAMPLES = ("partwise train                                         a small language model on Python's own source, and half and quarter of it",)
HELP = """\
usage: partwise train [METHOD] [flags]
       partwise train ticket RUN --keep 0.4 --out DIR

Cuts a network into subnetworks, trains them apart for a while, puts them back together, and cuts anew. Workers meet once a round, not
once a step; most methods spare them a part of the model. At the end smaller models, tickets, are cut out of the trained one and used as
they are, without more training.

METHOD (left out: {default})
{methods}

Without --text and --data, twist, local-sgd and diloco train a small Llama on the source of Python's standard library, and the others a
small network on scikit-learn's digits.

  partwise train --text my/notes --context 256                       a text file, or a folder of them
  partwise train --model my/llama --text my/notes                    go on with a model that exists
  partwise train ist --data images.npz                               arrays x_train, y_train, x_test, y_test
  partwise train twist --num-parts 8 --keep 0.25                     more and smaller subnetworks
  partwise train --num-parts 2 --engine ray --num-threads 1          two subnetworks a round in two workers; the same bits as here
  partwise train --engine ray --address auto --timeout 60            on a cluster; slow workers are passed by
  partwise train --engine ray --mode async                           nobody waits for anybody
  partwise train --out runs/first                                    where the run goes; Ctrl-C saves it,
  partwise train --out runs/first --resume                           and this goes on to the same bits
  partwise train ticket runs/first --keep 0.4 --out small            another size; also from a run that was stopped
  partwise train --config settings.yaml --json                       names as the flags; one JSON object on standard output

An asynchronous run that is resumed goes on, but not to the same bits: the order in which parts arrive decides its result.

All flags of a method, with their defaults: partwise train METHOD --help
"""


def pages() -> list[list[str]]:
    """The commands that have a help page, as words after ``partwise train``."""
    from partwise.train import METHODS

    return [[], *([method] for method in METHODS), ["ticket"]]


def read(arguments: list[str]) -> Command | str:
    """The command that ``partwise train ARGUMENTS`` asks for, or a help text."""
    if arguments and arguments[0] in {"-h", "--help"}:
        return help_text()
    if arguments[:1] == ["ticket"]:
        return read_ticket(arguments[1:])
    from partwise.flags import job_command
    from partwise.train._flags import read_train_flags
    from partwise.train._terminal import summary_parts

    name, flags = read_train_flags(arguments)
    return job_command(["partwise", "train", *arguments], name, flags.run, work=functools.partial(start, name, flags), show=summary_parts)


def start(name: str, flags: Any, *, out: Any, command: list[str], resume: bool, report: Report) -> dict[str, Any]:
    """Run the job with what the flags say."""
    from partwise.train.job import train

    return train(
        flags.method,
        flags.task,
        flags.training,
        flags.optimizer,
        name=name,
        out=out,
        place=flags.place,
        resume=resume,
        checkpoint_every=flags.run.checkpoint_every,
        command=command,
        report=report,
    )


def read_ticket(arguments: list[str]) -> Command:
    """``partwise train ticket RUN --keep 0.4 --out DIR``."""
    from rich.text import Text

    from partwise.flags import parse_with_folder
    from partwise.train._cut import cut_run
    from partwise.train._flags import TicketFlags
    from partwise.train._terminal import ticket_lines

    about = "Cuts a ticket out of a run, finished or stopped: the best of some random ones on the calibration split. Measures it on the run's own test split."
    flags, folder = parse_with_folder(TicketFlags, arguments, prog="partwise train ticket RUN", about=about)
    return Command(
        work=lambda report: cut_run(folder, keep=flags.keep, out=flags.out, num_candidates=flags.candidates, seed=flags.seed, report=report),
        show=lambda cut: map(Text, ticket_lines(cut)),
        json=flags.json,
    )


def help_text() -> str:
    """Help of ``partwise train``: the methods, as the index of the room has them, and examples. Loads no method, since that takes a second."""
    from partwise import train
    from partwise.train.job import DEFAULT_METHOD

    width = max(map(len, train.METHODS)) + 2
    index = dict(line.strip("- ").replace("`", "").split(" - ", 1) for line in (train.__doc__ or "").splitlines() if line.startswith("- ``"))
    methods = "\n".join(f"  {name:<{width}}{index[name].rpartition(' - ')[0]}" for name in train.METHODS)
    return HELP.format(default=DEFAULT_METHOD, methods=methods)
