"""Flags of ``partwise tune``: made from the dataclasses of the job and of the method."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from partwise.checks import check_choice
from partwise.flags import RunFlags, check_same_method, description, flag_value, load_target, read_config, read_flags, stored_settings
from partwise.tune import METHODS
from partwise.tune._data import DataSettings
from partwise.tune.job import TuneSettings
from partwise.tune.recipe import Recipe

DEFAULT_METHOD = "adapad"


@dataclass(frozen=True, kw_only=True)
class TuneRunFlags(RunFlags):
    """Where a run goes and what is printed. None of this changes the result.

    Parameters
    ----------
    compare : str or None
        Other methods, separated by commas, to run with the same data, steps, seeds and budget.
    num_seeds : int
        Seeds of a comparison.
    checkpoint_every : int
        Steps between two checkpoints.
    """

    compare: str | None = None
    num_seeds: int = 1
    checkpoint_every: int = 50


@dataclass(frozen=True, kw_only=True)
class CutFlags:
    """How much of an adapter stays.

    Parameters
    ----------
    rank : int or None
        Keep at most this many components in every module.
    budget : int or None
        Keep this many components over all modules together, where they matter most.
    out : Path
        Folder for the smaller adapter.
    json : bool
        Print one JSON object on standard output and nothing else.
    """

    rank: int | None = None
    budget: int | None = None
    out: Path
    json: bool = False


def recipe_class(name: str) -> type[Recipe]:
    """The recipe of a tuning method by name; an unknown one lists those that exist."""
    check_choice(name, list(METHODS), name="method")
    found: type[Recipe] = load_target(METHODS[name])
    return found


def tune_flags(recipe: type[Recipe]) -> type[Any]:
    """The dataclass whose fields, with those of its parts, are the flags of ``partwise tune METHOD``."""
    parts: dict[str, type[Any]] = {"training": TuneSettings, "data": DataSettings, "method": recipe, "run": TuneRunFlags}
    return make_dataclass("Flags", [(name, part, field(default_factory=part)) for name, part in parts.items()], frozen=True, kw_only=True)


def read_tune_flags(arguments: list[str]) -> tuple[str, Any]:
    """Method and flags, from the command line, then ``--config``, then the run that is resumed, then the defaults."""
    given = arguments[0] if arguments and not arguments[0].startswith("-") else None
    rest = arguments if given is None else arguments[1:]
    config = read_config(flag_value(rest, "--config"))
    stored = stored_settings(flag_value(rest, "--out"), room="tune") if "--resume" in rest else {}
    named = config.pop("method", None)
    name = given or named or stored.get("method") or DEFAULT_METHOD
    recipe = recipe_class(name)
    check_same_method(name, stored)
    return name, read_flags(tune_flags(recipe), rest, prog=f"partwise tune {name}", about=description(recipe), stored=stored, config=config)
