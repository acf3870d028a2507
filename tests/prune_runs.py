"""Small runs of the pruning job for tests: models of a few kilobytes, files of words that their tokenizer knows, a second or less each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from partwise.flags import from_settings
from partwise.prune._flags import method_class
from partwise.prune._subject import ModelFlags
from partwise.prune._sweep import SweepSettings, sweep
from partwise.prune._texts import TextSettings
from partwise.prune.job import prune
from partwise.runs import RunFolder
from stopped_runs import Killed
from tiny import save_tiny, tiny_decoder, tiny_llama_tokenizer, tiny_mamba2

OURS = ("resume", "report", "command")
SMALL = {"rows": 3, "evaluation_rows": 4, "tokens": 16}
CLOCKS = ("seconds", "plan_seconds", "tokens_per_second")


def write_mamba2(folder: Path, **changes: Any) -> Path:
    """A Mamba2 of three layers with 8 states each, in a folder as transformers loads it."""
    return save_tiny(folder, tiny_mamba2(**({"num_hidden_layers": 3} | changes)), tiny_llama_tokenizer())


def write_llama(folder: Path, **changes: Any) -> Path:
    """A Llama of two layers with 24 neurons and four groups of two heads each."""
    return save_tiny(folder, tiny_decoder("Llama", **({"initializer_range": 0.3} | changes)), tiny_llama_tokenizer())


def kill_in(wanted: str, *, number: int = 1) -> Any:
    """A report that ends the process, as it were, when a phase is told of for the ``number``-th time."""
    told = 0

    def report(phase: str, done: int, total: int, note: str) -> None:
        nonlocal told
        told += phase == wanted
        if told == number:
            raise Killed

    return report


def draw_nothing(path: Path, describe: Any) -> Path:
    """In place of ``write_report``: reports have their own tests, and drawing one takes longer than a run of these."""
    (path / "report.html").write_text("drawn")
    return path / "report.html"


def decode_nothing(models: Any) -> list[float]:
    """In place of ``decode_speeds``, which takes its time."""
    return [100.0 for _ in models]


def run_small(name: str, out: Path, **changes: Any) -> dict[str, Any]:
    """A run; settings may be overridden by name."""
    ours = {key: changes.pop(key) for key in OURS if key in changes}
    values = SMALL | {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}
    return prune(from_settings(method_class(name), values), from_settings(ModelFlags, values), from_settings(TextSettings, values), name=name, out=out, **ours)


def sweep_small(out: Path, **changes: Any) -> dict[str, Any]:
    """A sweep; settings may be overridden by name."""
    ours = {key: changes.pop(key) for key in (*OURS, "usual") if key in changes}
    values = SMALL | {"keeps": ("0.75", "0.25")} | {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}
    made = [from_settings(kind, values) for kind in (ModelFlags, SweepSettings, TextSettings)]
    return sweep(*made, out=out, **({"usual": "ghost"} | ours))


def flags_of_small(**changes: Any) -> list[str]:
    """The same as flags of the command line."""
    return [word for key, value in (SMALL | changes).items() for word in (f"--{key.replace('_', '-')}", str(value))]


def without_clocks(value: Any) -> Any:
    """The same without what a clock says and without the folder."""
    if isinstance(value, dict):
        return {key: without_clocks(entry) for key, entry in value.items() if key not in (*CLOCKS, "run", "result", "plan", "open", "report")}
    return [without_clocks(entry) for entry in value] if isinstance(value, list) else value


def assert_same_run(run: Path, expected: Path) -> None:
    """The same bits in every file of the result but for the card, which says how long it took; the same rows; the same numbers but for clocks."""
    files = sorted(path.relative_to(expected) for path in (expected / "result").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(run) for path in (run / "result").rglob("*") if path.is_file())
    for name in files:
        assert name.name == "README.md" or (run / name).read_bytes() == (expected / name).read_bytes(), name
    assert without_clocks(RunFolder(run).metrics()) == without_clocks(RunFolder(expected).metrics())
    assert without_clocks(json.loads((run / "summary.json").read_text())) == without_clocks(json.loads((expected / "summary.json").read_text()))
