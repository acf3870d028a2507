"""What ``run.json`` says about a training run, and what of it may differ when the run goes on."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise import __version__
from partwise.checks import InputError
from partwise.runs import RunFolder, flat_settings, installed_version

if TYPE_CHECKING:
    from partwise.train.job import Job
    from partwise.train.method import SubnetMethod

LIBRARIES = ("torch", "numpy", "transformers", "tokenizers", "scikit-learn", "safetensors")
LONGEST_SHOWN = 10  # entries of a list in an error
SOURCES = ("model", "text", "data")  # paths among the settings of a task


def run_header(job: Job, *, command: Sequence[str]) -> dict[str, Any]:
    """What ``run.json`` says about a run. Its result depends on ``settings``, ``seed`` and ``data``; ``place`` says where it ran and where its files lay."""
    sources = flat_settings(job.sources)
    paths = {name: None if sources[name] is None else _absolute(sources[name]) for name in SOURCES}
    sources = {name: value for name, value in sources.items() if name not in ("text", "data")}  # of these the fingerprint tells
    sources["model"] = None if paths["model"] is None else Path(paths["model"]).name
    settings = {"method": job.name} | flat_settings(job.method) | flat_settings(job.optimizer) | sources | flat_settings(job.settings)
    seed = settings.pop("seed")
    libraries = (*LIBRARIES, "ray") if job.place.engine == "ray" else LIBRARIES
    return {
        "partwise": __version__,
        "room": "train",
        "method": describe(job.method),
        "settings": settings,
        "seed": seed,
        "data": {"name": job.task.name, **job.task.fingerprint},
        "place": paths | flat_settings(job.place),
        "versions": {"python": platform.python_version()} | {library: installed_version(library) for library in libraries},
        "command": list(command),
    }


def _absolute(source: str) -> str:
    """A path that means the same in every folder; an id of a hub stays as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def describe(method: SubnetMethod) -> str:
    """The call that makes a method, without what is as usual."""
    given = [f"{item.name}={getattr(method, item.name)!r}" for item in fields(method) if getattr(method, item.name) != item.default]
    return f"{type(method).__name__}({', '.join(given)})"


def check_same_data(run: RunFolder, header: Mapping[str, Any]) -> None:
    """Refuse to go on with data that are not what they were, saying what about them changed."""
    if json.loads(json.dumps(header["settings"])) != run.header.get("settings"):
        return  # RunFolder.resume names them; other data may follow from them
    then, now = run.header.get("data", {}), header["data"]
    changed = [name for name in sorted({*then, *now}) if name != "name" and then.get(name) != now.get(name)]
    if changed:
        lines = "; ".join(f"{name}: got {_brief(now.get(name))}, expected {_brief(then.get(name))}" for name in changed)
        raise InputError(
            "data-changed",
            f"{now['name']} is no longer what the run in {run.path} was started with: {lines}. Restore the files, or start a new run with another --out.",
        )


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_brief(entry)}" for name, entry in value.items())
    if isinstance(value, list) and len(value) > LONGEST_SHOWN:
        return f"{len(value)} entries"
    return value[:12] if isinstance(value, str) else str(value)
