"""The job behind ``partwise decompose``: the files it leaves, and the input that it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from decompose_runs import METHOD, ROUNDS, SPECTRUM, draw_nothing, run_small, write_matrix
from matrices import matrix_with
from partwise.checks import InputError
from partwise.decompose._result import MAX_SCORES
from partwise.decompose.job import decompose
from partwise.engine.place import Place
from partwise.ledger import Ledger
from partwise.runs import RunFolder
from tolerances import assert_close


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partwise.report.write_report", draw_nothing)


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    return write_matrix(tmp_path / "matrix.npy")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
        (None, {"seed": -1}, r"--seed is -1, expected 0 to 4294967295\. Choose one of these"),
        (None, {"seed": 99_999_999_999}, "--seed is 99999999999, expected 0 to 4294967295"),
        (None, {"place": Place(timeout=9)}, "got timeout=9 for the inline engine, expected none"),
        (None, {"place": Place(engine="ray", timeout=0)}, "got timeout=0, expected more than 0 seconds"),
        (None, {"method": "sequential-rank-one-regression"}, "predicts a target y, and the command reads one matrix.* import SequentialRankOneRegression"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing_behind(make: Any, changes: dict[str, Any], message: str, tmp_path: Path, matrix: Path):
    path = matrix if make is None else make(tmp_path / "bad.npy")
    with pytest.raises(InputError, match=message):
        run_small(path, tmp_path / "runs" / "bad", **changes)
    assert not (tmp_path / "runs" / "bad").exists()


def test_entries_that_are_nan_are_named_with_their_file_and_column(tmp_path: Path):
    (tmp_path / "people.csv").write_text("height,weight\n1,2\n3,nan\n5,7\n")
    with pytest.raises(InputError, match=r"^people\.csv has 1 NaN or infinite entries out of 6, the first in row 1, column 1, 'weight' \(counted from 0\)"):
        run_small(tmp_path / "people.csv", tmp_path / "run", n_components=1)
    np.save(tmp_path / "x.npy", [[1.0, 2.0], [np.inf, 3.0], [1.0, 5.0]])
    with pytest.raises(InputError, match=r"^x\.npy has 1 NaN or infinite entries out of 6, the first in row 1, column 0 \(counted"):
        run_small(tmp_path / "x.npy", tmp_path / "run", n_components=1)


def test_a_key_without_a_file_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="--key x was given without a file"):
        run_small(None, tmp_path / "run", key="x")


def test_a_key_picks_one_array_of_several(tmp_path: Path, matrix: Path):
    np.savez(tmp_path / "several.npz", a=np.load(matrix), b=np.ones((4, 2)))
    summary = run_small(tmp_path / "several.npz", tmp_path / "run", key="a")
    assert (summary["num_samples"], summary["num_features"]) == (60, 8)


@pytest.mark.ray
def test_an_unreachable_cluster_is_refused_before_anything_is_written(tmp_path: Path, matrix: Path):
    with pytest.raises(InputError, match=r"no Ray cluster answers at address='127\.0\.0\.1:9'"):
        run_small(matrix, tmp_path / "run", place=Place(engine="ray", address="127.0.0.1:9"))
    assert not (tmp_path / "run").exists()
