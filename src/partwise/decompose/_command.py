"""``partwise decompose``: what its arguments ask for."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from partwise.commands import Command, Report

USAGE = (("decompose [METHOD] [FILE]", "principal components with guaranteed intervals, on one machine or many"),)
EXAMPLES = ("partwise decompose data.npy --n-components 10          components of a matrix; without a file, of scikit-learn's digits",)
HELP = """\
usage: partwise decompose [METHOD] [FILE] [flags]

Finds the leading principal components of a matrix by parts: every component has a worker of its own, and nobody waits for the one in
front. Each eigenvalue comes with an interval that is sure to hold one, and a search tells whether a larger one was missed.

METHOD (left out: {default})
{methods}

FILE is .npy, .npz, .csv, .parquet, .mtx or .zarr; rows are samples. Without it the command runs on scikit-learn's digits. Files larger
than memory are read in chunks, sparse matrices stay sparse.

  partwise decompose data.csv                                        10 components, power steps, all parts in this process
  partwise decompose data.npy --n-components 30 --solver lanczos     by far the fastest in one process
  partwise decompose data.npz --key embeddings                       one array of several
  partwise decompose data.npy --engine ray --num-workers 4           the same bits from four workers on this machine
  partwise decompose data.npy --engine ray --address auto            on a cluster that runs already
  partwise decompose data.npy --engine ray --mode async              nobody waits for anybody
  partwise decompose data.npy --engine ray --timeout 30              a worker that takes longer is passed by
  partwise decompose data.npy --solver hebb --batch-size 1000        learn from batches
  partwise decompose data.npy --out runs/first                       where the run goes; Ctrl-C saves it,
  partwise decompose --out runs/first --resume                       and this goes on to the same bits
  partwise decompose --config settings.yaml --json                   names as the flags; one JSON object on standard output

{others} need a target and are called from Python.
All flags of a method, with their defaults: partwise decompose METHOD --help
"""


def pages() -> list[list[str]]:
    """The commands that have a help page, as words after ``partwise decompose``."""
    from partwise.decompose.job import methods_without_target

    return [[], *([method] for method in methods_without_target())]


def read(arguments: list[str]) -> Command | str:
    """The command that ``partwise decompose ARGUMENTS`` asks for, or a help text."""
    if arguments and arguments[0] in {"-h", "--help"}:
        return help_text()
    from partwise.decompose._flags import read_decompose_flags
    from partwise.decompose._terminal import summary_parts
    from partwise.flags import job_command

    name, flags = read_decompose_flags(arguments)
    return job_command(["partwise", "decompose", *arguments], name, flags.run, work=functools.partial(start, name, flags), show=summary_parts)


def start(name: str, flags: Any, *, out: Path, command: list[str], resume: bool, report: Report) -> dict[str, Any]:
    """Run the job with what the flags say."""
    from partwise.decompose.job import decompose

    settings = dict(vars(flags.method))
    seed = settings.pop("seed")
    return decompose(
        name,
        None if flags.data.file is None else Path(flags.data.file),
        settings,
        out=out,
        key=flags.data.key,
        seed=seed,
        place=flags.place,
        resume=resume,
        checkpoint_every=flags.run.checkpoint_every,
        command=command,
        report=report,
    )


def help_text() -> str:
    """Help of ``partwise decompose``: the methods, as the index of the room has them, and examples. Loads no method, since that takes a second."""
    from partwise import decompose
    from partwise.decompose.job import PARALLEL, methods_without_target

    names = methods_without_target()
    width = max(map(len, names), default=0) + 2
    index = dict(line.strip("- ").replace("`", "").split(" - ", 1) for line in (decompose.__doc__ or "").splitlines() if line.startswith("- ``"))
    methods = "\n".join(f"  {name:<{width}}{index[name].rpartition(' - ')[0]}" for name in names)
    others = " and ".join(name for name in decompose.METHODS if name not in names)
    return HELP.format(default=PARALLEL, methods=methods, others=others)
