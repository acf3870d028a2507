"""Small runs of the decomposition job for tests: eight features, three components, a dozen rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from matrices import matrix_with
from partwise.decompose.job import decompose
from partwise.runs import RunFolder
from stopped_runs import Killed

METHOD = "parallel-deflation-pca"
SPECTRUM = [9.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5]
ROUNDS = 12


def kill_at(round_number: int) -> Any:
    def report(phase: str, done: int, total: int, note: str) -> None:
        if phase == "rounds" and done == round_number:
            raise Killed

    return report


def kill_in(wanted: str) -> Any:
    def report(phase: str, done: int, total: int, note: str) -> None:
        if phase == wanted:
            raise Killed

    return report


def write_matrix(path: Path) -> Path:
    """Sixty rows."""
    np.save(path, matrix_with(SPECTRUM, rows=60, columns=8))
    return path


def draw_nothing(path: Path, describe: Any) -> Path:
    """In place of ``write_report``: reports have their own tests, and drawing one takes longer than a run of these."""
    (path / "report.html").write_text("drawn")
    return path / "report.html"


def run_small(path: Path | None, out: Path, **changes: Any) -> dict[str, Any]:
    """A run of twelve rounds with a checkpoint every four; settings of the estimator may be overridden by name."""
    ours = {key: changes.pop(key) for key in ("resume", "report", "checkpoint_every", "place", "seed", "key", "command") if key in changes}
    method = changes.pop("method", METHOD)
    settings = {"n_components": 3, "num_rounds": ROUNDS, "tol": 0.0, "num_local_steps": 2} | changes
    return decompose(method, path, settings, out=out, **({"checkpoint_every": 4} | ours))


def without_seconds(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "traffic")} for row in RunFolder(run).metrics()]


def assert_same_run(run: Path, expected: Path) -> None:
    for name in ("components.safetensors", "components.csv", "eigenvalues.csv", "scores.csv"):
        assert (run / "result" / name).read_bytes() == (expected / "result" / name).read_bytes(), name
    assert without_seconds(run) == without_seconds(expected)
    own, other = (json.loads((path / "summary.json").read_text()) for path in (run, expected))
    for key in ("components", "missed_value_test", "num_rounds", "converged", "share", "warnings", "ledger"):
        assert own[key] == other[key], key
