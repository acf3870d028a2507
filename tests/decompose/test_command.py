"""``partwise decompose``: what it reads, says and leaves behind."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from partwise.cli import main
from partwise.decompose import METHODS
from partwise.decompose._flags import read_decompose_flags
from partwise.flags import load_target
from partwise.runs import RunFolder
from stopped_runs import run_and_interrupt


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    np.save(tmp_path / "matrix.npy", np.random.default_rng(0).standard_normal((80, 6)) * [6, 5, 4, 3, 2, 1])
    return tmp_path / "matrix.npy"


def test_help_of_decompose_lists_the_methods_of_one_matrix_and_says_where_the_others_are(capsys: pytest.CaptureFixture[str]):
    assert run("decompose", "--help") == 0
    said = capsys.readouterr().out
    for name in ("parallel-deflation-pca", "hotelling-deflation-pca", "eigengame"):
        assert f"\n  {name} " in said
    assert "sequential-rank-one-regression need a target and are called from Python" in said
    assert all(len(line) <= 140 for line in said.splitlines())


@pytest.mark.parametrize("method", ["parallel-deflation-pca", "hotelling-deflation-pca", "eigengame"])
def test_flags_of_a_decomposition_are_the_arguments_of_its_estimator(method: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        run("decompose", method, "--help")
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for name in inspect.signature(load_target(METHODS[method])).parameters:
        flag = "--seed" if name == "random_state" else f"--{name.replace('_', '-')}"
        assert flag in said
    for flag in ("--key", "--address", "--timeout", "--out", "--resume", "--json", "--checkpoint-every"):
        assert flag in said
    assert "References" not in said


def test_a_decomposition_ends_with_eigenvalues_intervals_a_verdict_and_the_files(
    tmp_path: Path, matrix: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert run("decompose", matrix, "--n-components", "3") == 0
    said = capsys.readouterr().out
    assert "off by at most" in said
    assert "every component is within the tolerance" in said
    assert "No larger eigenvalue was" in said
    assert "runs/parallel-deflation-pca-001/result" in said
    assert "runs/parallel-deflation-pca-001/report.html" in said
    assert (tmp_path / "runs" / "parallel-deflation-pca-001" / "report.html").exists()


def test_a_decomposition_goes_on_from_its_folder_alone_and_reports_as_json(
    tmp_path: Path, matrix: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    assert run("decompose", "eigengame", matrix, "--n-components", "2", "--variant", "alpha", "--out", out, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert run("decompose", "--out", out, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert run("decompose", "--out", out, "--resume", "--n-components", "3") == 2
    assert "settings.n_components: got 3, expected 2" in capsys.readouterr().err
    assert run("decompose", "hotelling-deflation-pca", "--out", out, "--resume") == 2
    assert "was made with the method eigengame, got hotelling-deflation-pca" in capsys.readouterr().err
    assert run("tune", "--out", out, "--resume") == 2
    assert "holds a run of `partwise decompose`, got `partwise tune`" in capsys.readouterr().err
    np.save(matrix, np.load(matrix)[:70])
    assert run("decompose", "--out", out, "--resume") == 2
    assert "error[data-changed]: matrix.npy is no longer what the run" in capsys.readouterr().err
    assert run("report", out) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["x.npy"], ("parallel-deflation-pca", "x.npy")),
        (["eigengame", "folder/x.csv"], ("eigengame", "folder/x.csv")),
        (["--n-components", "4", "x.npy"], ("parallel-deflation-pca", "x.npy")),
        (["eigengame", "--n-components", "4"], ("eigengame", None)),
    ],
)
def test_method_and_file_are_told_apart(arguments: list[str], expected: tuple[str, str | None]):
    name, flags = read_decompose_flags(arguments)
    assert (name, flags.data.file) == expected


def test_a_config_file_may_name_method_and_file(tmp_path: Path):
    (tmp_path / "settings.yaml").write_text("method: eigengame\nfile: x.npy\nn-components: 7\ntol: 1e-3\n")
    name, flags = read_decompose_flags(["--config", str(tmp_path / "settings.yaml"), "--n-components", "8"])
    assert (name, flags.data.file, flags.method.n_components, flags.method.tol) == ("eigengame", "x.npy", 8, 1e-3)


def test_several_step_numbers_are_read_as_a_list():
    assert tuple(read_decompose_flags(["hotelling-deflation-pca", "--num-steps", "3", "5"])[1].method.num_steps) == (3, 5)


def test_another_engine_leaves_the_cluster_of_the_stored_run_behind(tmp_path: Path):
    place = {"engine": "ray", "num_workers": 2, "address": "auto", "timeout": 30.0}
    RunFolder.create(tmp_path / "run", {"room": "decompose", "settings": {"method": "eigengame"}, "place": place})
    _, flags = read_decompose_flags(["--out", str(tmp_path / "run"), "--resume"])
    assert vars(flags.place) == place
    _, flags = read_decompose_flags(["--out", str(tmp_path / "run"), "--resume", "--engine", "inline"])
    assert vars(flags.place) == {"engine": "inline", "num_workers": 2, "address": None, "timeout": None}


@pytest.mark.parametrize("moment", ["partwise.runs.RunFolder.set_status", "partwise.decompose._recorder.Recorder.restore"])
def test_ctrl_c_before_the_first_round_says_how_to_resume(
    moment: str, tmp_path: Path, matrix: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(moment, interrupt)
        assert run("decompose", matrix, "--n-components", 2, "--out", tmp_path / "run") == 130
    said = capsys.readouterr().err
    assert f"--n-components 2 --out {tmp_path / 'run'} --resume" in said
    assert run("decompose", "--out", tmp_path / "run", "--resume") == 0


def test_ctrl_c_before_there_is_a_run_only_stops(
    tmp_path: Path, matrix: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("partwise.decompose._covariance.covariance_of", interrupt)
    assert run("decompose", matrix, "--out", tmp_path / "run") == 130
    assert capsys.readouterr().err.strip() == "stopped."
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ctrl_c_in_a_decomposition_saves_and_says_how_to_resume(tmp_path: Path):
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((500, 100)))
    out = tmp_path / "run"
    code, said = run_and_interrupt("decompose", tmp_path / "data.npy", "--num-rounds", 100000, "--tol", 0, out=out, threshold=5)
    assert code == 130, said
    assert f"--out {out} --resume" in said
    assert "Traceback" not in said
    assert RunFolder(out).status == "interrupted"
