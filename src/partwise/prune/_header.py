"""What ``run.json`` says about a run, and the flags that follow from it when the run goes on."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise import __version__
from partwise.runs import flat_settings, installed_version

if TYPE_CHECKING:
    from partwise.prune._subject import ModelFlags, Subject
    from partwise.prune._texts import Texts, TextSettings

__all__ = ["describe_method", "run_header", "stored_flags"]

LIBRARIES = ("torch", "numpy", "transformers", "tokenizers", "safetensors")


def run_header(
    subject: Subject, texts: Texts, settings: TextSettings, source: ModelFlags, *, name: str, call: str, method: Any, command: Sequence[str]
) -> dict[str, Any]:
    """The result of a run depends on ``settings``, ``seed`` and ``data``; ``place`` says where it ran and where its files lay.

    Parameters
    ----------
    subject, texts
        What was opened and read.
    settings, source
        What was asked for.
    name : str
        Of the method, or of the command.
    call : str
        What the run does, as a call that rebuilds it.
    method : dataclass
        Its fields are settings of the run.
    command : sequence of str
        The whole command.
    """
    opened = subject.opened
    asked = {"method": name} | flat_settings(method) | flat_settings(settings)
    paths = {"model": opened.name, "calibration": asked.pop("calibration"), "evaluation": asked.pop("evaluation")}
    seed = asked.pop("seed")
    return {
        "partwise": __version__,
        "room": "prune",
        "method": call,
        "settings": asked | {"dtype": source.dtype, "computed_on": opened.model.device.type, "computed_in": str(opened.model.dtype).removeprefix("torch.")},
        "seed": seed,
        "data": {
            "model": Path(opened.name).name,
            "model_sha256": subject.fingerprint(),
            "calibration": texts.calibration.name,
            "calibration_sha256": texts.calibration.sha256(),
            "evaluation": texts.evaluation.name,
            "evaluation_sha256": texts.evaluation.sha256(),
        },
        "place": {key: None if path is None else _absolute(path) for key, path in paths.items()} | {"device": source.device},
        "versions": {"python": platform.python_version()} | {library: installed_version(library) for library in LIBRARIES},
        "command": list(command),
    }


def stored_flags(header: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all flags by name, from the ``run.json`` of a run."""
    values = {"seed": header.get("seed", 0), **header.get("settings", {}), **header.get("place", {})}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}  # JSON knows no tuples


def describe_method(method: Any) -> str:
    """The call that makes a method, without what is as usual."""
    given = [f"{item.name}={getattr(method, item.name)!r}" for item in fields(method) if getattr(method, item.name) != item.default]
    return f"{type(method).__name__}({', '.join(given)})"


def _absolute(source: str) -> str:
    """A path that means the same in every folder; an id of a hub stays as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
