"""Flags of ``partwise train``: made from the dataclasses of the job, of the task, of the optimiser and of the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from partwise.checks import check_choice
from partwise.engine.place import Place
from partwise.flags import RunFlags, check_same_method, description, flag_value, load_target, read_config, read_flags, stored_settings
from partwise.runs import RunFolder
from partwise.train import METHODS
from partwise.train.job import DEFAULT_METHOD, TrainSettings
from partwise.train.method import SubnetMethod
from partwise.train.optimizer import OptimizerSettings
from partwise.train.task import TaskSettings


@dataclass(frozen=True, kw_only=True)
class TrainRunFlags(RunFlags):
    """Where a run goes and what is printed. None of this changes the result.

    Parameters
    ----------
    checkpoint_every : int or None
        Rounds between two checkpoints. Left out: some seconds, or more where saving is slow.
    """

    checkpoint_every: int | None = None


@dataclass(frozen=True, kw_only=True)
class TicketFlags:
    """Which ticket to cut, and where to.

    Parameters
    ----------
    keep : float
        Fraction of the units of every layer that stays, above 0 and at most 1.
    out : Path
        Folder for the ticket; must be new.
    candidates : int
        Random tickets that are tried on the calibration split; the best one is kept.
    seed : int or None
        Seed of the candidates. Left out: that of the run.
    json : bool
        Print one JSON object on standard output and nothing else.
    """

    keep: float
    out: Path
    candidates: int = 16
    seed: int | None = None
    json: bool = False


def method_class(name: str) -> type[SubnetMethod]:
    """A method by name; an unknown one lists those that exist."""
    check_choice(name, list(METHODS), name="method")
    found: type[SubnetMethod] = load_target(METHODS[name])
    return found


def train_flags(method: type[SubnetMethod]) -> type[Any]:
    """The dataclass whose fields, with those of its parts, are the flags of ``partwise train METHOD``."""
    parts: dict[str, type[Any]] = {
        "task": TaskSettings,
        "method": method,
        "training": TrainSettings,
        "optimizer": OptimizerSettings,
        "place": Place,
        "run": TrainRunFlags,
    }
    return make_dataclass("Flags", [(name, part, field(default_factory=part)) for name, part in parts.items()], frozen=True, kw_only=True)


def read_train_flags(arguments: list[str]) -> tuple[str, Any]:
    """Method and flags, from the command line, then ``--config``, then the run that is resumed, then the defaults."""
    given = arguments[0] if arguments and not arguments[0].startswith("-") else None
    rest = arguments if given is None else arguments[1:]
    config = read_config(flag_value(rest, "--config"))
    stored = stored_run(flag_value(rest, "--out"), engine=flag_value(rest, "--engine")) if "--resume" in rest else {}
    named = config.pop("method", None)
    name = given or named or stored.get("method") or DEFAULT_METHOD
    method = method_class(name)
    check_same_method(name, stored)
    return name, read_flags(train_flags(method), rest, prog=f"partwise train {name}", about=description(method), stored=stored, config=config)


def stored_run(out: str | None, *, engine: str | None) -> dict[str, Any]:
    """Flags of the run in ``out`` by name, from its ``run.json``; with another engine, those of a cluster do not count any more."""
    stored_settings(out, room="train")
    assert out is not None
    header = RunFolder.open(Path(out)).header
    if engine not in {None, header.get("place", {}).get("engine")}:
        header = header | {"place": {name: value for name, value in header["place"].items() if name not in {"address", "timeout"}}}
    return flags_of(header)


def flags_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all flags by name, from the ``run.json`` of a run."""
    values = {"seed": header.get("seed", 0), **header.get("settings", {}), **header.get("place", {})}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}  # JSON knows no tuples
