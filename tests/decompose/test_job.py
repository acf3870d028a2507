"""The job behind ``partwise decompose``: files, bad input, and runs that are stopped anywhere and go on to the same bits."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from matrices import matrix_with
from partwise.checkpoint import latest_checkpoint
from partwise.checks import InputError, RunError
from partwise.decompose._result import MAX_SCORES
from partwise.decompose.job import Place, decompose
from partwise.ledger import Ledger
from partwise.runs import RunFolder, Stopped
from tolerances import assert_close

METHOD = "parallel-deflation-pca"
SPECTRUM = [9.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5]
ROUNDS = 12


class Killed(BaseException):
    """Stands for a process that ends between two lines."""


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


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have their own tests; drawing one takes longer than a run of these."""

    def write_stub(path: Path, describe: Any) -> Path:
        (path / "report.html").write_text("drawn")
        return path / "report.html"

    monkeypatch.setattr("partwise.report.write_report", write_stub)


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    np.save(tmp_path / "matrix.npy", matrix_with(SPECTRUM, rows=60, columns=8))
    return tmp_path / "matrix.npy"


def run_small(path: Path | None, out: Path, **changes: Any) -> dict[str, Any]:
    """A run of twelve rounds with a checkpoint every four; settings of the estimator may be overridden by name."""
    ours = {key: changes.pop(key) for key in ("resume", "report", "checkpoint_every", "place", "seed", "key", "command") if key in changes}
    method = changes.pop("method", METHOD)
    settings = {"n_components": 3, "num_rounds": ROUNDS, "tol": 0.0, "num_local_steps": 2} | changes
    return decompose(method, path, settings, out=out, **({"checkpoint_every": 4} | ours))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_seconds(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "traffic")} for row in RunFolder(run).metrics()]


def assert_same_run(run: Path, expected: Path) -> None:
    for name in ("components.safetensors", "components.csv", "eigenvalues.csv", "scores.csv"):
        assert (run / "result" / name).read_bytes() == (expected / "result" / name).read_bytes(), name
    assert without_seconds(run) == without_seconds(expected)
    own, other = (json.loads((path / "summary.json").read_text()) for path in (run, expected))
    for key in ("components", "missed_value_test", "num_rounds", "converged", "share", "warnings", "ledger"):
        assert own[key] == other[key], key


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("runs") / "digits"
    return decompose(METHOD, None, {"n_components": 4, "rayleigh_ritz": True}, out=out, command=["partwise", "decompose"]), out


def test_without_a_file_it_runs_on_digits_and_finds_what_scikit_learn_finds(digits_run: tuple[dict[str, Any], Path]):
    summary, out = digits_run
    expected = PCA(4, svd_solver="full").fit(load_digits().data)
    arrays = safetensors.numpy.load_file(out / "result" / "components.safetensors")
    assert set(arrays) == {"components", "mean", "explained_variance", "residuals", "intervals"}
    assert_close(arrays["explained_variance"], expected.explained_variance_, claim="eigenvalues are scikit-learn's")
    assert_close(
        np.abs((arrays["components"] * expected.components_).sum(axis=1)), np.ones(4), claim="so are the components; the job stops at 1e-6", atol=1e-6
    )
    assert summary["converged"]
    assert summary["missed_value_test"]["passed"]
    assert summary == json.loads((out / "summary.json").read_text())


def test_tables_hold_the_same_numbers_as_the_arrays(digits_run: tuple[dict[str, Any], Path]):
    summary, out = digits_run
    arrays = safetensors.numpy.load_file(out / "result" / "components.safetensors")
    values = table(out / "result" / "eigenvalues.csv")
    assert [float(row["value"]) for row in values] == arrays["explained_variance"].tolist()
    assert [[float(row["lower"]), float(row["upper"])] for row in values] == arrays["intervals"].tolist()
    assert [{key: float(value) for key, value in row.items()} for row in values] == summary["components"]
    components = table(out / "result" / "components.csv")
    assert [row["feature"] for row in components] == load_digits().feature_names
    assert [float(row["component_2"]) for row in components] == arrays["components"][1].tolist()


def test_scores_are_the_first_two_coordinates_of_the_rows(digits_run: tuple[dict[str, Any], Path]):
    _, out = digits_run
    arrays = safetensors.numpy.load_file(out / "result" / "components.safetensors")
    rows = table(out / "result" / "scores.csv")
    assert [int(row["row"]) for row in rows] == list(range(1797))
    expected = (load_digits().data - arrays["mean"]) @ arrays["components"][:2].T
    got = np.array([[float(row["component_1"]), float(row["component_2"])] for row in rows])
    assert_close(got, expected, claim="scores are centred data times components", rtol=1e-8, atol=1e-10)


def test_many_rows_give_evenly_spaced_scores_and_a_wide_table_has_as_many_lines_as_features(tmp_path: Path):
    np.save(tmp_path / "tall.npy", np.random.default_rng(0).standard_normal((MAX_SCORES * 2, 3)))
    run_small(tmp_path / "tall.npy", tmp_path / "run", n_components=1)
    rows = table(tmp_path / "run" / "result" / "scores.csv")
    assert [int(row["row"]) for row in rows] == list(range(0, MAX_SCORES * 2, 2))
    assert list(rows[0]) == ["row", "component_1"]
    assert [row["feature"] for row in table(tmp_path / "run" / "result" / "components.csv")] == ["x0", "x1", "x2"]


def test_names_of_the_columns_stand_in_the_table_of_components(tmp_path: Path):
    data = matrix_with(SPECTRUM[:3], rows=20, columns=3)
    lines = ["height,weight,age", *(",".join(map(str, row)) for row in data.tolist())]
    (tmp_path / "people.csv").write_text("\n".join(lines) + "\n")
    run_small(tmp_path / "people.csv", tmp_path / "run", n_components=2)
    assert [row["feature"] for row in table(tmp_path / "run" / "result" / "components.csv")] == ["height", "weight", "age"]


def test_the_ledger_has_a_row_for_every_component_asked_for_and_says_which_the_data_lack(tmp_path: Path):
    np.save(tmp_path / "flat.npy", matrix_with([3.0, 2.0], rows=30, columns=6))
    summary = run_small(tmp_path / "flat.npy", tmp_path / "run", n_components=4, num_rounds=200, tol=1e-6)
    parts = Ledger.from_json(summary["ledger"]).parts
    assert [part.status for part in parts] == ["kept", "kept", "dropped", "dropped"]
    assert [(part.parameters, part.bytes) for part in parts] == [(6, 48), (6, 48), (0, 0), (0, 0)]
    assert [part.score for part in parts] == [*(row["share"] for row in summary["components"]), None, None]
    assert len(summary["components"]) == 2
    assert any("only 2 directions" in warning for warning in summary["warnings"])


def test_warnings_of_the_method_are_in_the_summary_and_nowhere_else(tmp_path: Path, matrix: Path):
    summary = run_small(matrix, tmp_path / "run", num_rounds=3, tol=1e-9)
    assert not summary["converged"]
    assert any("known less well than tol=1e-09" in warning for warning in summary["warnings"])


def test_every_round_leaves_a_row(tmp_path: Path, matrix: Path):
    run_small(matrix, tmp_path / "run")
    rows = RunFolder(tmp_path / "run").metrics()
    assert [row["step"] for row in rows] == list(range(1, ROUNDS + 1))
    assert [sum(value is not None for value in row["residuals"]) for row in rows[:4]] == [1, 2, 3, 3]
    assert all(row["kind"] == "round" and row["seconds"] > 0 for row in rows)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] != []


@pytest.mark.parametrize("method", ["parallel-deflation-pca", "eigengame"])
def test_a_run_killed_twice_leaves_the_same_bits(method: str, tmp_path: Path, matrix: Path):
    run_small(matrix, tmp_path / "whole", method=method)
    for number, step in enumerate((3, 8)):  # before the first checkpoint, and in the round that writes one
        with pytest.raises(Killed):
            run_small(matrix, tmp_path / "cut", method=method, resume=number > 0, report=kill_at(step))
    run_small(matrix, tmp_path / "cut", method=method, resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_run_on_batches_killed_in_the_middle_leaves_the_same_bits(tmp_path: Path, matrix: Path):
    settings: dict[str, Any] = {"solver": "hebb", "batch_size": 10, "seed": 3}
    run_small(matrix, tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        run_small(matrix, tmp_path / "cut", report=kill_at(7), **settings)
    run_small(matrix, tmp_path / "cut", resume=True, **settings)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("checkpoint_every", [1, 100])
def test_a_run_killed_while_it_writes_its_result_leaves_the_same_bits(checkpoint_every: int, tmp_path: Path, matrix: Path):
    run_small(matrix, tmp_path / "whole")
    with pytest.raises(Killed):
        run_small(matrix, tmp_path / "cut", report=kill_in("writing"), checkpoint_every=checkpoint_every)
    run_small(matrix, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_ctrl_c_finishes_the_round_saves_and_leaves_a_run_to_resume(tmp_path: Path, matrix: Path):
    def interrupt(phase: str, done: int, total: int, note: str) -> None:
        if phase == "rounds" and done == 5:
            signal.raise_signal(signal.SIGINT)

    run_small(matrix, tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        run_small(matrix, tmp_path / "cut", report=interrupt, checkpoint_every=100)
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped.value.run == tmp_path / "cut"
    assert RunFolder(tmp_path / "cut").status == "interrupted"
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000005"]
    run_small(matrix, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_finished_run_is_only_reported(tmp_path: Path, matrix: Path):
    summary = run_small(matrix, tmp_path / "run")
    written = (tmp_path / "run" / "result" / "components.safetensors").stat().st_mtime_ns
    (tmp_path / "run" / "report.html").unlink()
    assert run_small(matrix, tmp_path / "run", resume=True, report=kill_at(1)) == summary
    assert (tmp_path / "run" / "result" / "components.safetensors").stat().st_mtime_ns == written
    assert (tmp_path / "run" / "report.html").exists()


def test_resuming_with_another_setting_names_the_difference(tmp_path: Path, matrix: Path):
    run_small(matrix, tmp_path / "run")
    with pytest.raises(InputError, match=r"(?s)was made with other settings:.*settings.n_components: got 2, expected 3"):
        run_small(matrix, tmp_path / "run", resume=True, n_components=2)
    with pytest.raises(InputError, match=r"(?s)seed: got 1, expected 0"):
        run_small(matrix, tmp_path / "run", resume=True, seed=1)
    with pytest.raises(InputError, match=r"(?s)settings.method: got \"eigengame\", expected \"parallel-deflation-pca\""):
        run_small(matrix, tmp_path / "run", resume=True, method="eigengame")


def test_resuming_on_a_file_that_changed_says_what_about_it_changed(tmp_path: Path, matrix: Path):
    with pytest.raises(Killed):
        run_small(matrix, tmp_path / "run", report=kill_at(5))
    data = np.load(matrix)
    data[3, 3] += 1e-9
    np.save(matrix, data)
    with pytest.raises(InputError, match=r"matrix\.npy is no longer what the run in .* was started with: sha256: got \w{12}, expected \w{12}\. Restore"):
        run_small(matrix, tmp_path / "run", resume=True)
    np.save(matrix, data[:50])
    with pytest.raises(InputError, match=r"sha256: .*; shape: got \[50, 8\], expected \[60, 8\]; size: got"):
        run_small(matrix, tmp_path / "run", resume=True)


def test_a_run_may_go_on_in_another_folder_and_place(tmp_path: Path, matrix: Path):
    run_small(matrix, tmp_path / "whole")
    with pytest.raises(Killed):
        run_small(matrix, tmp_path / "cut", report=kill_at(6))
    (tmp_path / "elsewhere").mkdir()
    moved = matrix.rename(tmp_path / "elsewhere" / matrix.name)
    run_small(moved, tmp_path / "cut", resume=True, place=Place(num_workers=2))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_there_must_be_a_run_to_resume(tmp_path: Path, matrix: Path):
    with pytest.raises(InputError, match="holds no run"):
        run_small(matrix, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_can_be_used(tmp_path: Path, matrix: Path):
    run_small(matrix, tmp_path / "whole")
    with pytest.raises(Killed):
        run_small(matrix, tmp_path / "cut", report=kill_at(10))
    newest = latest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    data = (newest / "tensors.safetensors").read_bytes()
    (newest / "tensors.safetensors").write_bytes(data[:-40])
    with pytest.raises(RunError, match=r"step-00000008.tensors\.safetensors is damaged.*Delete .*step-00000008 to go on from step-00000004"):
        run_small(matrix, tmp_path / "cut", resume=True)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    run_small(matrix, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, matrix: Path):
    for place, num_components in (("small", 2), ("large", 3)):
        with pytest.raises(Killed):
            run_small(matrix, tmp_path / place, report=kill_at(5), n_components=num_components)
    (tmp_path / "small" / "checkpoints").rename(tmp_path / "aside")
    (tmp_path / "large" / "checkpoints").rename(tmp_path / "small" / "checkpoints")
    with pytest.raises(RunError, match="does not fit the run: it has 3 components, expected 2"):
        run_small(matrix, tmp_path / "small", resume=True, n_components=2)


def write_empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def write_truncated(path: Path) -> Path:
    np.save(path, np.ones((50, 4)))
    path.write_bytes(path.read_bytes()[:-100])
    return path


def write_with_nan(path: Path) -> Path:
    data = matrix_with(SPECTRUM, rows=20, columns=8)
    data[4, 2] = np.nan
    np.save(path, data)
    return path


def write_constant(path: Path) -> Path:
    np.save(path, np.full((20, 4), 0.1))
    return path


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (lambda path: path, {}, "there is no file"),
        (write_empty, {}, "is empty"),
        (write_truncated, {}, "is cut short: 100 bytes are missing"),
        (lambda path: path.with_suffix(".xlsx"), {}, r"has \.xlsx, expected one of \.npy"),
        (write_with_nan, {}, r"1 (NaN|of 160)"),
        (write_constant, {}, "every column is constant"),
        (None, {"n_components": 9}, r"n_components=9 does not fit data of 60 samples and 8 features"),
        (None, {"n_components": 0}, "n_components=0 must be an integer of at least 1"),
        (None, {"place": Place(num_workers=4)}, "num_workers=4 for 3 parts"),
        (None, {"place": Place(address="auto")}, "for the inline engine"),
        (None, {"batch_size": 5}, "batch_size=5 with solver='power'"),
        (None, {"mode": "async", "solver": "lanczos"}, "mode='async' with solver='lanczos'"),
        (None, {"checkpoint_every": 0}, "--checkpoint-every is 0, expected at least 1"),
        (None, {"method": "fly"}, "method='fly' is not known"),
        (None, {"method": "sequential-rank-one-regression"}, "predicts a target y, and the command reads one matrix.* import SequentialRankOneRegression"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing_behind(make: Any, changes: dict[str, Any], message: str, tmp_path: Path, matrix: Path):
    path = matrix if make is None else make(tmp_path / "bad.npy")
    with pytest.raises(InputError, match=message):
        run_small(path, tmp_path / "runs" / "bad", **changes)
    assert not (tmp_path / "runs" / "bad").exists()


def test_a_key_without_a_file_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="--key x was given without a file"):
        run_small(None, tmp_path / "run", key="x")


def test_a_key_picks_one_array_of_several(tmp_path: Path, matrix: Path):
    np.savez(tmp_path / "several.npz", a=np.load(matrix), b=np.ones((4, 2)))
    summary = run_small(tmp_path / "several.npz", tmp_path / "run", key="a")
    assert (summary["num_samples"], summary["num_features"]) == (60, 8)


@pytest.mark.ray
def test_four_workers_give_the_same_bits_and_count_their_bytes(tmp_path: Path, matrix: Path):
    run_small(matrix, tmp_path / "inline")
    with pytest.raises(Killed):
        run_small(matrix, tmp_path / "ray", report=kill_at(6))
    summary = run_small(matrix, tmp_path / "ray", resume=True, place=Place(engine="ray", num_workers=2))
    rows = RunFolder(tmp_path / "ray").metrics()
    assert ["traffic" in row for row in rows] == [False] * 4 + [True] * (ROUNDS - 4)
    assert {worker for row in rows[4:] for worker, _, _ in row["traffic"]} == {0, 1}
    assert summary["traffic"]["bytes_up"] == sum(up for row in rows[4:] for _, _, up in row["traffic"]) > 0
    assert summary["traffic"]["lost"] == 0
    assert [part["where"] for part in summary["ledger"]] == ["worker 0", "worker 1", "worker 0"]
    json_path = tmp_path / "ray" / "summary.json"
    json_path.write_text(json_path.read_text().replace("worker 0", "this process").replace("worker 1", "this process"))
    assert_same_run(tmp_path / "ray", tmp_path / "inline")


@pytest.mark.ray
def test_an_unreachable_cluster_is_refused_before_anything_is_written(tmp_path: Path, matrix: Path):
    with pytest.raises(InputError, match=r"no Ray cluster answers at address='127\.0\.0\.1:9'"):
        run_small(matrix, tmp_path / "run", place=Place(engine="ray", address="127.0.0.1:9"))
    assert not (tmp_path / "run").exists()


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "partwise", *map(str, arguments)]


def num_rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_and_kill(*arguments: object, run: Path, threshold: int, delay_s: float) -> bool:
    """Start a run and kill it a moment after it has written ``threshold`` rows; says whether the kill came before the end."""
    with subprocess.Popen(command(*arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and num_rows(run) < threshold:
            time.sleep(0.001)
        time.sleep(delay_s)
        process.kill()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_the_same_bits(tmp_path: Path):
    generator = random.Random(0)
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((500, 120)))
    flags = ["decompose", METHOD, tmp_path / "data.npy", "--n-components", 6, "--num-rounds", 600, "--tol", 0, "--checkpoint-every", 10]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = subprocess.run(command(*flags, "--out", whole), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    killed = 0
    for threshold in (1, 150, 400):
        resume = ["--resume"] if RunFolder.exists(cut) else []
        killed += run_and_kill(*flags, "--out", cut, *resume, run=cut, threshold=threshold, delay_s=generator.random() * 0.02)
    assert killed == 3
    done = subprocess.run(command("decompose", "--out", cut, "--resume"), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_run(cut, whole)
