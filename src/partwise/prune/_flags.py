"""Flags of ``partwise prune``: made from the dataclasses of model, text and run, and from that of the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from partwise.checks import check_choice
from partwise.flags import RunFlags, check_same_method, first_line, flag_value, load_target, read_config, read_flags, stored_settings
from partwise.prune import METHODS
from partwise.prune._header import stored_flags
from partwise.prune._subject import ModelFlags, model_type
from partwise.prune._sweep import SweepSettings, command_names
from partwise.prune._texts import TextSettings
from partwise.prune.method import PruneMethod
from partwise.runs import RunFolder

__all__ = ["SweepFlags", "default_method", "method_class", "prune_flags", "read_prune_flags", "read_sweep_flags"]

USUAL = {"mamba2": "ghost"}  # method where none is named, by what config.json calls the family
OTHERWISE = "greedy"


@dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """Flags of ``partwise prune sweep``."""

    source: ModelFlags = field(default_factory=ModelFlags)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    text: TextSettings = field(default_factory=TextSettings)
    run: RunFlags = field(default_factory=RunFlags)


def method_class(name: str) -> type[PruneMethod]:
    """A method by name; an unknown one lists those that this command has."""
    check_choice(name, command_names(), name="method")
    found: type[PruneMethod] = load_target(METHODS[name])
    return found


def default_method(model: str | None) -> str:
    """What is taken for a model where no method is named."""
    return USUAL.get(model_type(model) or "", OTHERWISE)


def prune_flags(method: type[PruneMethod]) -> type[Any]:
    """The dataclass whose fields, with those of its parts, are the flags of ``partwise prune METHOD``."""
    taken = {item.name for part in (ModelFlags, TextSettings, RunFlags) for item in fields(part)}
    parts: dict[str, type[Any]] = {
        "source": ModelFlags,
        "method": _hiding(method, [item.name for item in fields(method) if item.name in taken]),
        "text": TextSettings,
        "run": RunFlags,
    }
    return make_dataclass("Flags", [(name, part, field(default_factory=part)) for name, part in parts.items()], frozen=True, kw_only=True)


def _hiding(method: type[Any], names: Sequence[str]) -> type[Any]:
    """The dataclass without flags for these fields: another flag of the same name, ``--seed``, says them."""
    import tyro

    hidden = [(name, Annotated[Any, tyro.conf.Fixed, tyro.conf.Suppress], field(default=getattr(method, name))) for name in names]
    return make_dataclass(method.__name__, hidden, bases=(method,), frozen=True, kw_only=True) if hidden else method


def _with_method(flags: Any, method: type[PruneMethod]) -> Any:
    """The flags with the method itself, which takes what it was not asked for from flags of the same name."""
    said = vars(flags.method) | {name: value for part in (flags.source, flags.text, flags.run) for name, value in vars(part).items()}
    return replace(flags, method=method(**{item.name: said[item.name] for item in fields(method)}))


def read_prune_flags(arguments: list[str]) -> tuple[str, Any]:
    """Method and flags, from the command line, then ``--config``, then the run that is resumed, then the defaults."""
    given = arguments[0] if arguments and not arguments[0].startswith("-") else None
    rest = arguments if given is None else arguments[1:]
    config = read_config(flag_value(rest, "--config"))
    stored = stored_run(flag_value(rest, "--out")) if "--resume" in rest else {}
    named = given or config.pop("method", None) or stored.get("method")
    name = named or default_method(flag_value(rest, "--model") or config.get("model"))
    method = method_class(name)
    check_same_method(name, stored)
    about = f"{first_line(method)} Without a budget, half stays."
    return name, _with_method(read_flags(prune_flags(method), rest, prog=f"partwise prune {name}", about=about, stored=stored, config=config), method)


def read_sweep_flags(arguments: list[str], *, about: str) -> SweepFlags:
    """Flags of ``partwise prune sweep``, in the same order."""
    config = read_config(flag_value(arguments, "--config"))
    stored = stored_run(flag_value(arguments, "--out")) if "--resume" in arguments else {}
    check_same_method("sweep", stored)
    flags: SweepFlags = read_flags(SweepFlags, arguments, prog="partwise prune sweep", about=about, stored=stored, config=config)
    return flags


def stored_run(out: str | None) -> dict[str, Any]:
    """Flags of the run in ``out`` by name, from its ``run.json``."""
    stored_settings(out, room="prune")
    assert out is not None
    return stored_flags(RunFolder.open(Path(out)).header)
