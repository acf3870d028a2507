"""Flags of the commands: made from dataclasses, read from the command line, a YAML file, and the run to resume."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.commands import Command, Report
from partwise.runs import RunFolder, Stopped, flat_settings, fresh_run

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Where a run goes and what is printed. None of this changes the result.

    Parameters
    ----------
    out : Path or None
        Folder of the run. Left out: the first free ``runs/METHOD-001``, ``-002``, ...
    resume : bool
        Continue the run in ``--out``; flags that are left out keep the values of that run.
    config : Path or None
        YAML file with flags as keys. Flags on the command line win.
    json : bool
        Print one JSON object on standard output and nothing else.
    """

    out: Path | None = None
    resume: bool = False
    config: Path | None = None
    json: bool = False


def read_flags(kind: type[Any], arguments: list[str], *, prog: str, about: str, stored: Mapping[str, Any], config: dict[str, Any]) -> Any:
    """A dataclass of flags: from the command line, then ``--config``, then the run that is resumed, then the defaults.

    Parameters
    ----------
    kind : type
        The dataclass; the fields of the dataclasses in its fields are the flags.
    arguments : list of str
        What follows the name of the method.
    prog, about : str
        Name and description of the command, for its help.
    stored : mapping
        Settings of the run to resume by name; empty for a new run.
    config : dict
        What ``--config`` holds, see `read_config`.
    """
    defaults = from_settings(kind, stored) if stored else kind()
    if config:
        defaults = parse(kind, config_arguments(config, defaults), prog=prog, about=about, default=defaults)
    return parse(kind, arguments, prog=prog, about=about, default=defaults)


def check_same_method(name: str, stored: Mapping[str, Any]) -> None:
    """Refuse to go on with another method than the run was made with; ``stored`` are its settings, empty for a new run."""
    if stored and name != stored["method"]:
        raise InputError(
            "resume-differs",
            f"the run to resume was made with the method {stored['method']}, got {name}. Leave the method out, or choose another --out.",
        )


def load_target(target: Any) -> Any:
    """The class behind an entry of ``METHODS``: ``module:Class``, or the class itself."""
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def first_line(target: Any) -> str:
    """First line of the docstring of a method's class."""
    return str(load_target(target).__doc__ or "").strip().split("\n")[0]


def description(kind: type[Any]) -> str:
    """Docstring of a class without its sections (Parameters, References), which help shows elsewhere or not at all."""
    return re.split(r"\n\s*\w+\n\s*-{3,}", inspect.getdoc(kind) or "")[0].strip()


def from_settings(kind: type[Any], settings: Mapping[str, Any]) -> Any:
    """A dataclass, and the dataclasses in its fields, with the values that a flat mapping holds for their fields."""
    default = kind()
    chosen = {}
    for item in fields(kind):
        value = getattr(default, item.name)
        if is_dataclass(value):
            chosen[item.name] = from_settings(type(value), settings)
        elif item.name in settings:
            chosen[item.name] = settings[item.name]
    return replace(default, **chosen)


def stored_settings(out: str | None, *, room: str) -> dict[str, Any]:
    """Settings of the run in ``out``, from its ``run.json``; a run of another room is refused."""
    if out is None:
        raise InputError("resume-without-out", "--resume was given without --out, expected the run to continue. Pass --out runs/NAME.")
    header = RunFolder.open(Path(out)).header
    if header["room"] != room:
        raise InputError("resume-differs", f"{out} holds a run of `partwise {header['room']}`, got `partwise {room}`. Call the other, or pass another --out.")
    settings: dict[str, Any] = header["settings"]
    return settings


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """Value of ``--flag value`` or ``--flag=value``, the last one given."""
    value = None
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
    return value


def read_config(path: str | None) -> dict[str, Any]:
    """Keys and values of a YAML file, keys with underscores.

    Raises
    ------
    InputError
        When the file cannot be read, or is no mapping.
    """
    if path is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            "config-unreadable", f"--config {path} cannot be read: got {error}, expected a YAML file. Check the path and the file."
        ) from error
    if not isinstance(content, dict):
        raise InputError("config-unreadable", f"--config {path} holds {type(content).__name__}, expected lines like `max-steps: 200`. Rewrite it so.")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def config_arguments(config: dict[str, Any], defaults: Any) -> list[str]:
    """The command-line arguments that say the same as a config file, so that values are checked in one place.

    Raises
    ------
    InputError
        For a key that is no flag; the message lists the flags.
    """
    known = flat_settings(defaults)
    known.pop("config")
    unknown = sorted(config.keys() - known.keys())
    if unknown:
        names = ", ".join(sorted(name.replace("_", "-") for name in known))
        raise InputError("unknown-setting", f"the config file has {', '.join(unknown)}, which are no flags of this method. Known: {names}.")
    arguments = []
    for key, value in config.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            arguments += [f"--{flag}" if value else f"--no-{flag}"] if value != known[key] else []
        elif value is not None:
            arguments += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def parse(kind: type[Any], arguments: list[str], *, prog: str, about: str, default: Any = None) -> Any:
    """Turn arguments into a dataclass; what tyro says about a bad one becomes an ``InputError``."""
    import tyro

    said = io.StringIO()
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=prog, description=about, config=config, **extra)
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise InputError("bad-flag", plain_sentences(said.getvalue())) from None


def plain_sentences(boxed: str) -> str:
    """What tyro draws as a box with a title and ruled sections, as one line of text without the title."""
    lines = [line.strip("\u2502 ") for line in boxed.splitlines()]
    ruled = [bool(re.fullmatch("[-\u2500\u256d\u256e\u2570\u256f ]+|[\u256d\u2570+].*", line)) for line in lines]
    first = ruled.index(True) + 1 if True in ruled else 0  # what stands before the first rule is the title
    return " ".join(line for line, rule in zip(lines[first:], ruled[first:], strict=True) if line and not rule)


def parse_with_folder(kind: type[Any], arguments: list[str], *, prog: str, about: str) -> tuple[Any, Path]:
    """Flags after one positional folder."""
    if arguments and not arguments[0].startswith("-"):
        return parse(kind, arguments[1:], prog=prog, about=about), Path(arguments[0])
    parse(kind, arguments if {"-h", "--help"} & set(arguments) else [*arguments, "--out", "."], prog=prog, about=about)
    raise InputError("bad-flag", f"the folder of a run is missing. Try: {prog.replace('RUN', 'runs/NAME')} --help")


def job_command(
    words: list[str], name: str, run: RunFlags, *, work: Callable[..., dict[str, Any]], show: Callable[[Mapping[str, Any]], Iterable[RenderableType]]
) -> Command:
    """The command of a job that fills a run folder.

    Parameters
    ----------
    words : list of str
        The whole command, ``["partwise", "tune", ...]``.
    name : str
        Method, which names the folder where no ``--out`` is given.
    run : RunFlags
        Where the run goes.
    work : callable
        Called with ``out``, ``command``, ``resume`` and ``report`` by name; returns the summary.
    show : callable
        See `Command`.
    """
    out = run.out or fresh_run(name)
    is_ours = run.resume or not RunFolder.exists(out)

    def work_or_stop(report: Report) -> dict[str, Any]:
        try:
            return work(out=out, command=words, resume=run.resume, report=report)
        except KeyboardInterrupt as error:
            if isinstance(error, Stopped) or not (is_ours and RunFolder.exists(out)):
                raise
            raise Stopped(out) from error  # before the first step, or while it was leaving

    return Command(work=work_or_stop, show=show, json=run.json, resume=resume_command(words, out))


def resume_command(command: Sequence[str], out: Path) -> str:
    """The command that continues an interrupted run; ``command`` is the one that started it, ``["partwise", "tune", ...]``."""
    again = [argument for argument in command if argument != "--resume"]
    if flag_value(again, "--out") is None:
        again += ["--out", str(out)]
    return shlex.join([*again, "--resume"])
