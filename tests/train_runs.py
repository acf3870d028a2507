"""Small runs of the training job for tests: a decoder of a few kilobytes on thirty short texts, a perceptron on rows, half a dozen rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from partwise.engine.place import Place
from partwise.flags import from_settings
from partwise.runs import RunFolder
from partwise.train._flags import method_class
from partwise.train.job import TrainSettings, train
from partwise.train.optimizer import OptimizerSettings
from partwise.train.task import TaskSettings
from stopped_runs import Killed
from tiny import WORDS, save_tiny, tiny_decoder, tiny_llama_tokenizer

ROUNDS = 6
OURS = ("resume", "report", "checkpoint_every", "place", "command")
SMALL = {
    "num_rounds": ROUNDS,
    "num_parts": 2,
    "num_local_steps": 2,
    "num_candidates": 3,
    "valid_every": 3,
    "num_threads": 1,
    "context": 16,
    "batch_size": 4,
    "lr": 0.01,
}
SMALL_TWIST = SMALL | {"num_blocks": 4, "keep": 0.5}


def write_texts(folder: Path, *, num_files: int = 30) -> Path:
    """Short texts of the words that the tiny tokenizer knows, each followed by one of two."""
    folder.mkdir(parents=True)
    for number in range(num_files):
        chance = np.random.default_rng(number)
        starts = chance.integers(len(WORDS), size=60)
        words = [WORDS[index % len(WORDS)] for start in starts for index in (start, start + 1 + chance.integers(2))]
        (folder / f"text_{number:02}.txt").write_text(" ".join(words))
    return folder


def write_decoder(folder: Path) -> Path:
    """A decoder of two layers with four head groups and 24 neurons each, in a folder as transformers loads it."""
    return save_tiny(folder, tiny_decoder("Llama"), tiny_llama_tokenizer())


def write_rows(path: Path, *, num_rows: int = 240) -> Path:
    """Rows of six features in three classes that a line separates."""
    chance = np.random.default_rng(0)
    classes = np.arange(num_rows) % 3
    np.savez(path, x=(chance.normal(size=(num_rows, 6)) + 2 * np.eye(6)[classes]).astype(np.float32), y=classes)
    return path


def kill_at(round_number: int) -> Any:
    """A report that ends the process, as it were, after a round has written its row and before it is saved."""

    def report(phase: str, done: int, total: int, note: str) -> None:
        if phase == "rounds" and done == round_number:
            raise Killed

    return report


def kill_in(wanted: str) -> Any:
    def report(phase: str, done: int, total: int, note: str) -> None:
        if phase == wanted:
            raise Killed

    return report


def draw_nothing(path: Path, describe: Any) -> Path:
    """In place of ``write_report``: reports have their own tests, and drawing one takes longer than a run of these."""
    (path / "report.html").write_text("drawn")
    return path / "report.html"


def run_small(name: str, out: Path, **changes: Any) -> dict[str, Any]:
    """A run of six rounds of two parts with a checkpoint every two; settings may be overridden by name."""
    ours = {key: changes.pop(key) for key in OURS if key in changes}
    values = (SMALL_TWIST if name == "twist" else SMALL) | {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}
    made = [from_settings(kind, values) for kind in (method_class(name), TaskSettings, TrainSettings, OptimizerSettings)]
    return train(*made, name=name, out=out, **({"checkpoint_every": 2, "place": Place()} | ours))


def flags_of_small(name: str, **changes: Any) -> list[str]:
    """The same as flags of the command line."""
    values = (SMALL_TWIST if name == "twist" else SMALL) | {"checkpoint_every": 2} | changes
    return [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def without_seconds(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "wire", "mishaps")} for row in RunFolder(run).metrics()]


def assert_same_run(run: Path, expected: Path) -> None:
    """The same bits in every model, the same rows, the same numbers but for what a clock says."""
    models = sorted(path.relative_to(expected) for path in (expected / "result").rglob("*.safetensors"))
    assert models
    assert models == sorted(path.relative_to(run) for path in (run / "result").rglob("*.safetensors"))
    for name in models:
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    assert without_seconds(run) == without_seconds(expected)
    own, other = (json.loads((path / "summary.json").read_text()) for path in (run, expected))
    for key in ("num_rounds", "num_steps", "num_samples", "bytes_down", "bytes_up", "holders", "valid_loss", "ledger", "missing_tickets"):
        assert own[key] == other[key], key
    for mine, its in zip(own["tickets"], other["tickets"], strict=True):
        assert {key: mine[key] for key in mine.keys() - {"speed", "folder"}} == {key: its[key] for key in its.keys() - {"speed", "folder"}}
