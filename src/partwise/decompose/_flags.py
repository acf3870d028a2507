"""Flags of ``partwise decompose``: made from the arguments and the docstring of the method's estimator, and from the dataclasses of the job."""

from __future__ import annotations

import inspect
import re
import sys
import types
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from tyro.conf import Positional

from partwise.decompose import METHODS
from partwise.decompose.job import PARALLEL, estimator_class
from partwise.engine.place import Place
from partwise.flags import RunFlags, check_same_method, description, first_line, flag_value, read_config, read_flags, stored_settings
from partwise.runs import RunFolder

NUM_COMPONENTS = 10
OWN_FLAGS = {"engine", "num_workers", "random_state"}  # of the estimator, which the command has under other names or in another group


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Which matrix to decompose; rows are samples.

    Parameters
    ----------
    file : str or None
        A .npy, .npz, .csv, .parquet or .mtx file, or a .zarr folder. Left out: scikit-learn's digits, 1797 images of 8 x 8 pixels.
    key : str or None
        Name of the array in an .npz file or a .zarr folder that holds several.
    """

    file: Positional[str | None] = None
    key: str | None = None


@dataclass(frozen=True, kw_only=True)
class DecomposeRunFlags(RunFlags):
    """Where a run goes and what is printed. None of this changes the result.

    Parameters
    ----------
    checkpoint_every : int or None
        Rounds between two checkpoints. Left out: about a second, or more where saving is slow.
    """

    checkpoint_every: int | None = None


def estimator_flags(estimator: type[Any]) -> type[Any]:
    """The dataclass whose fields are the arguments of an estimator, with the help that its docstring has for them."""
    parameters = {name: parameter for name, parameter in inspect.signature(estimator).parameters.items() if name not in OWN_FLAGS}
    annotations = {name: parameter.annotation for name, parameter in parameters.items()}
    # The annotations of these arguments alone, since those of others may name what is imported for type checking only.
    source = types.SimpleNamespace(__annotations__=annotations)
    hints = get_type_hints(source, globalns=vars(sys.modules[estimator.__module__])) | choices_of(estimator)
    defaults = {name: parameter.default for name, parameter in parameters.items()} | {"n_components": NUM_COMPONENTS}
    made = make_dataclass(
        estimator.__name__,
        [*((name, hints[name], field(default=defaults[name])) for name in parameters), ("seed", int, field(default=0))],
        frozen=True,
        kw_only=True,
    )
    made.__doc__ = with_parameters(estimator)
    return made


def choices_of(estimator: type[Any]) -> dict[str, Any]:
    """Types of the arguments that take one of a few words, which the docstring lists as ``{"a", "b"}``."""
    lists = re.findall(r"^(\w+) : \{(.*?)\}", inspect.getdoc(estimator) or "", flags=re.MULTILINE)
    return {name: Literal[tuple(re.findall(r'"([^"]+)"', words))] for name, words in lists if name not in OWN_FLAGS}


def with_parameters(estimator: type[Any]) -> str:
    """Description and parameters of an estimator's docstring, with the help of ``--seed`` at their end."""
    text = inspect.getdoc(estimator) or ""
    parameters = text.partition("\nParameters\n----------\n")[2].partition("\n\n")[0]
    return f"{description(estimator)}\n\nParameters\n----------\n{parameters}\nseed : int\n    Seed of everything random: the start, and the batches.\n"


def decompose_flags(estimator: type[Any]) -> type[Any]:
    """The dataclass whose fields, with those of its parts, are the flags of ``partwise decompose METHOD``."""
    parts: dict[str, type[Any]] = {"data": DataFlags, "method": estimator_flags(estimator), "place": Place, "run": DecomposeRunFlags}
    return make_dataclass("Flags", [(name, part, field(default_factory=part)) for name, part in parts.items()], frozen=True, kw_only=True)


def read_decompose_flags(arguments: list[str]) -> tuple[str, Any]:
    """Method and flags, from the command line, then ``--config``, then the run that is resumed, then the defaults."""
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    given = None if first is None or is_file(first) else first
    rest = arguments if given is None else arguments[1:]
    config = read_config(flag_value(rest, "--config"))
    stored = stored_run(flag_value(rest, "--out"), engine=flag_value(rest, "--engine")) if "--resume" in rest else {}
    named = config.pop("method", None)
    name = given or named or stored.get("method") or PARALLEL
    estimator = estimator_class(name)
    check_same_method(name, stored)
    if "file" in config:  # FILE is no flag
        stored = stored | {"file": config.pop("file")}
    return name, read_flags(
        decompose_flags(estimator), rest, prog=f"partwise decompose {name}", about=first_line(estimator), stored=stored, config=config
    )


def is_file(word: str) -> bool:
    """Whether the first word is the data and not the method."""
    return word not in METHODS and ("/" in word or bool(Path(word).suffix) or Path(word).exists())


def stored_run(out: str | None, *, engine: str | None) -> dict[str, Any]:
    """Flags of the run in ``out`` by name, from its ``run.json``; with another engine, those of a cluster do not count any more."""
    settings = stored_settings(out, room="decompose")
    assert out is not None
    header = RunFolder.open(Path(out)).header
    place = header.get("place", {})
    if engine not in {None, place.get("engine")}:
        place = {name: value for name, value in place.items() if name not in {"address", "timeout"}}
    return {"seed": header.get("seed", 0), **settings, **place}
