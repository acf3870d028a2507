"""What a command of a room is to the command line: something to do and something to show for it. It prints nothing itself.

A room that has commands brings ``partwise/<room>/_command.py`` with

* ``USAGE``: (command, what it does) pairs for ``partwise --help``,
* ``EXAMPLES``: lines to start with,
* ``pages()``: the commands that have a help page, each as its words after ``partwise <room>``,
* ``read(arguments)``: the `Command` that the arguments after ``partwise <room>`` ask for, or the text of a help page.

Light to import: whatever is heavy loads inside ``read``, or when the command does its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Command", "Report", "Write"]

Report = Callable[[str, int, int, str], None]
Write = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command with its flags read.

    Parameters
    ----------
    work : callable
        Does it. Told where to report (phase, done, total, note), returns the JSON object that ``--json`` prints. May raise ``partwise.runs.Stopped``.
    show : callable
        Turns that object into what a person reads: texts and rich tables.
    json : bool
        Whether to print the object instead.
    resume : str
        The command that goes on when this one was stopped; empty where nothing can go on.
    stream : callable, optional
        For a command whose result is text that comes bit by bit: does the same as ``work``, and hands each piece to its second argument, which puts it on
        standard output. Called instead of ``work`` unless ``json`` is set; what ``show`` gives then goes to standard error, and the output is the text alone.
    """

    work: Callable[[Report], dict[str, Any]]
    show: Callable[[Mapping[str, Any]], Iterable[RenderableType]]
    json: bool = False
    resume: str = ""
    stream: Callable[[Report, Write], dict[str, Any]] | None = None
