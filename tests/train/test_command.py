"""``partwise train``: what it reads, says and leaves behind."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from partwise.cli import main
from partwise.engine.place import Place
from partwise.runs import RunFolder
from partwise.train import METHODS
from partwise.train._command import pages
from partwise.train._flags import method_class, read_train_flags
from partwise.train.job import TrainSettings
from partwise.train.optimizer import OptimizerSettings
from partwise.train.task import TaskSettings
from stopped_runs import run_and_interrupt
from train_runs import flags_of_small, write_rows

HEAVY = ("torch", "transformers", "matplotlib", "sklearn", "numpy")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.npz")


def test_help_lists_every_method_with_what_it_does(capsys: pytest.CaptureFixture[str]):
    assert run("train", "--help") == 0
    said = capsys.readouterr().out
    for name in METHODS:
        assert f"\n  {name} " in said
    assert "partwise train ticket RUN --keep 0.4 --out DIR" in said
    assert "An asynchronous run that is resumed goes on, but not to the same bits" in said
    assert all(len(line) <= 140 for line in said.splitlines())
    assert pages() == [[], *([name] for name in METHODS), ["ticket"]]


@pytest.mark.parametrize("method", METHODS)
def test_flags_are_the_fields_of_the_method_the_task_and_the_job(method: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        run("train", method, "--help")
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for kind in (method_class(method), TaskSettings, TrainSettings, OptimizerSettings, Place):
        for field in dataclasses.fields(kind):
            flag = field.name.replace("_", "-")
            assert f"--{flag}" in said or f"--no-{flag}" in said
    for flag in ("--out", "--resume", "--config", "--json", "--checkpoint-every"):
        assert flag in said
    assert "References" not in said


@pytest.mark.parametrize("arguments", [["train", "--help"], ["train", "twist", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]):
    program = (
        f"import sys\nfrom partwise.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_a_training_ends_with_every_size_its_quality_speed_and_folder(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert run("train", "ist", "--data", rows, *flags_of_small("ist")) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    for keep, folder in (("100", "model"), ("75", "tickets/keep-75"), ("50", "tickets/keep-50"), ("25", "tickets/keep-25")):
        assert [keep, "%", f"runs/ist-001/result/{folder}"] in lines
        assert (tmp_path / "runs" / "ist-001" / "result" / folder / "model.safetensors").exists()
    assert "After 6 rounds the whole model has a test accuracy of" in said
    assert "other sizes: partwise train ticket runs/ist-001 --keep 0.4 --out runs/ist-001-keep-40" in said
    assert (tmp_path / "runs" / "ist-001" / "report.html").exists()
    assert run("train", "ticket", "runs/ist-001", "--keep", "0.4", "--candidates", "2", "--out", "small") == 0
    said = capsys.readouterr().out
    assert "cut to 40 % of the units" in said
    assert "2 random tickets of this size: " in said
    assert "ticket: small" in said


def test_a_training_goes_on_from_its_folder_alone_and_reports_as_json(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert run("train", "diloco", "--data", rows, *flags_of_small("diloco"), "--betas", "0.8", "0.9", "--out", out, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert run("train", "--out", out, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert run("train", "--out", out, "--resume", "--num-parts", "3") == 2
    assert "settings.num_parts: got 3, expected 2" in capsys.readouterr().err
    assert run("train", "ist", "--out", out, "--resume") == 2
    assert "was made with the method diloco, got ist" in capsys.readouterr().err
    assert run("tune", "--out", out, "--resume") == 2
    assert "holds a run of `partwise train`, got `partwise tune`" in capsys.readouterr().err
    assert run("train", "ticket", out, "--keep", "0.5", "--out", tmp_path / "x") == 2
    assert "error[no-tickets]" in capsys.readouterr().err
    assert run("train", "ticket", out, "--keep", "1", "--out", tmp_path / "x", "--json") == 0
    assert json.loads(capsys.readouterr().out)["metric"] == summary["tickets"][0]["metric"]
    assert run("report", out) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")


def test_without_a_method_it_is_twist_and_a_config_file_may_name_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name, flags = read_train_flags([])
    assert name == "twist"
    assert flags.training == TrainSettings()
    (tmp_path / "settings.yaml").write_text("method: ist\nnum-parts: 3\nnum-local-steps: [1, 2, 3]\nlr: 1e-2\nbetas: [0.5, 0.6]\n")
    name, flags = read_train_flags(["--config", str(tmp_path / "settings.yaml"), "--blend", "0.25"])
    assert (name, flags.method.num_local_steps, flags.method.blend) == ("ist", (1, 2, 3), 0.25)
    assert (flags.optimizer.lr, flags.optimizer.betas) == (0.01, (0.5, 0.6))
    assert main(["train", "--config", str(tmp_path / "settings.yaml"), "--num-parts", "8"]) == 2
    assert "got 3 numbers of local steps for 8 parts" in " ".join(capsys.readouterr().err.split())


def test_another_engine_leaves_the_cluster_of_the_stored_run_behind(tmp_path: Path):
    place = {"engine": "ray", "num_workers": 2, "address": "auto", "timeout": 30.0}
    settings = {"method": "twist", "keep": [0.25, 0.5], "num_parts": 2}
    RunFolder.create(
        tmp_path / "run", {"room": "train", "settings": settings, "seed": 4, "place": place | {"text": "/a", "model": None, "data": None}}
    )
    _, flags = read_train_flags(["--out", str(tmp_path / "run"), "--resume"])
    assert vars(flags.place) == place
    assert (flags.method.keep, flags.task.text, flags.training.seed) == ((0.25, 0.5), "/a", 4)
    _, flags = read_train_flags(["--out", str(tmp_path / "run"), "--resume", "--engine", "inline"])
    assert vars(flags.place) == {"engine": "inline", "num_workers": 2, "address": None, "timeout": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "twits"], "error[unknown-choice]: method='twits' is not known. Choose one of: twist, ist"),
        (["train", "twist", "--kep", "1"], "error[bad-flag]: Unrecognized options: --kep"),
        (["train", "--resume"], "error[resume-without-out]"),
        (["train", "--resume", "--out", "/no/run"], "error[run-not-found]: /no/run holds no run"),
        (["train", "--text", "a", "--data", "b"], "error["),
        (["train", "ticket", "--keep", "0.5"], "error[bad-flag]"),
        (["train", "ticket", "/no/run", "--keep", "0.5", "--out", "x"], "error[run-not-found]"),
        (["train", "ticket", "/no/run", "--out", "x"], "error[bad-flag]"),
        (["train", "--num-rounds", "0"], "error[setting-out-of-range]: --num-rounds is 0"),
    ],
)
def test_a_mistake_is_one_line_with_a_code(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("moment", ["partwise.runs.RunFolder.set_status", "partwise.train._recorder.Recorder.rewind"])
def test_ctrl_c_before_the_first_round_says_how_to_resume(
    moment: str, tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(moment, interrupt)
        assert run("train", "local-sgd", "--data", rows, *flags_of_small("local-sgd"), "--out", tmp_path / "run") == 130
    assert f"--out {tmp_path / 'run'} --resume" in capsys.readouterr().err
    assert run("train", "--out", tmp_path / "run", "--resume") == 0


@pytest.mark.slow
def test_ctrl_c_in_a_training_saves_and_says_how_to_resume(tmp_path: Path, rows: Path):
    out = tmp_path / "run"
    code, said = run_and_interrupt("train", "ist", "--data", rows, *flags_of_small("ist", num_rounds=100000), out=out, threshold=5)
    assert code == 130, said
    assert f"--out {out} --resume" in said
    assert "Traceback" not in said
    assert RunFolder(out).status == "interrupted"
