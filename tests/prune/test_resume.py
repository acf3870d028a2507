"""A pruning that was stopped anywhere and resumed leaves the same bits as one that was never stopped."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from partwise.checks import InputError, RunError
from partwise.cli import main
from partwise.runs import RunFolder, Stopped
from prune_runs import (
    assert_same_run,
    decode_nothing,
    draw_nothing,
    flags_of_small,
    kill_in,
    run_small,
    sweep_small,
    without_clocks,
    write_llama,
    write_mamba2,
)
from serve_models import write_words
from stopped_runs import Killed, run_and_interrupt, run_and_kill, run_to_the_end


@pytest.fixture(autouse=True)
def no_clocks_and_no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partwise.report.write_report", draw_nothing)
    monkeypatch.setattr("partwise.prune._measuring.decode_speeds", decode_nothing)


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mamba2(tmp_path_factory.mktemp("models") / "mamba2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "words", num_files=12, num_words=60)


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process, as it were, once so many axes are saved in this one."""
    from partwise.prune import _recorder

    save, saved = _recorder.save_checkpoint, 0

    def save_and_die(*args: Any, **options: Any) -> Any:
        nonlocal saved
        path = save(*args, **options)
        saved += 1
        if saved == number:
            raise Killed
        return path

    monkeypatch.setattr(_recorder, "save_checkpoint", save_and_die)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ghost", {}),
        ("ghost", {"scope": "model", "keep": 0.6}),
        ("ghost", {"recalibrate": False, "factor": "controllability"}),
        ("magnitude", {"max_state_bytes": 2500}),
        ("taylor", {}),
        ("random", {"seed": 5}),
    ],
)
def test_a_run_killed_after_any_axis_leaves_the_same_bits(
    name: str, changes: dict[str, Any], mamba2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = {"model": mamba2, "calibration": words} | changes
    run_small(name, tmp_path / "whole", **asked)
    for number in range(2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(1, patch)
            run_small(name, tmp_path / "cut", resume=number > 0, **asked)
    assert [row["step"] for row in RunFolder(tmp_path / "cut").metrics()] == [1, 2]
    run_small(name, tmp_path / "cut", resume=True, **asked)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("name", ["greedy", "i-spasp"])
def test_factors_of_a_method_come_back_with_the_same_bits(name: str, llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_small(name, tmp_path / "whole", model=llama, calibration=words)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(1, patch)
        run_small(name, tmp_path / "cut", model=llama, calibration=words)
    run_small(name, tmp_path / "cut", model=llama, calibration=words, resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_axes_that_were_decided_before_are_not_scored_again(mamba2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from partwise.prune import GHOST

    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(2, patch)
        run_small("ghost", tmp_path / "run", model=mamba2, calibration=words)
    score, scored = GHOST.score, []

    def score_and_tell(self: GHOST, visit: Any) -> Any:
        scored.append(visit.axis.name)
        return score(self, visit)

    monkeypatch.setattr(GHOST, "score", score_and_tell)
    run_small("ghost", tmp_path / "run", model=mamba2, calibration=words, resume=True)
    assert scored == ["backbone.layers.2.mixer.state"]


@pytest.mark.parametrize("name", ["wanda", "lord"])
@pytest.mark.parametrize("phase", ["cutting", "evaluating", "writing"])
def test_a_run_killed_after_the_plan_does_not_plan_again_and_leaves_the_same_bits(
    name: str, phase: str, llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = {"model": llama, "calibration": words}
    run_small(name, tmp_path / "whole", **asked)
    with pytest.raises(Killed):
        run_small(name, tmp_path / "cut", report=kill_in(phase), **asked)
    assert not (tmp_path / "cut" / "result").exists()
    monkeypatch.setattr("partwise.prune.job.make_plan", None)
    run_small(name, tmp_path / "cut", resume=True, **asked)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_run_killed_between_a_row_and_its_checkpoint_leaves_the_same_rows(mamba2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_small("ghost", tmp_path / "whole", model=mamba2, calibration=words)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("partwise.prune._recorder.save_checkpoint", lambda *args, **options: (_ for _ in ()).throw(Killed))
        run_small("ghost", tmp_path / "cut", model=mamba2, calibration=words)
    assert len(RunFolder(tmp_path / "cut").metrics()) == 1
    run_small("ghost", tmp_path / "cut", model=mamba2, calibration=words, resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_ctrl_c_finishes_the_axis_saves_and_leaves_a_run_to_resume(mamba2: Path, words: Path, tmp_path: Path):
    def interrupt(phase: str, done: int, total: int, note: str) -> None:
        if phase == "pruning" and done == 1:
            signal.raise_signal(signal.SIGINT)

    run_small("ghost", tmp_path / "whole", model=mamba2, calibration=words)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        run_small("ghost", tmp_path / "cut", model=mamba2, calibration=words, report=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped.value.run == tmp_path / "cut"
    assert RunFolder(tmp_path / "cut").status == "interrupted"
    assert sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    run_small("ghost", tmp_path / "cut", model=mamba2, calibration=words, resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_ctrl_c_while_models_are_measured_leaves_a_run_to_resume(mamba2: Path, words: Path, tmp_path: Path):
    def interrupt(phase: str, done: int, total: int, note: str) -> None:
        if phase == "evaluating":
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        run_small("ghost", tmp_path / "cut", model=mamba2, calibration=words, report=interrupt)
    assert RunFolder(tmp_path / "cut").status == "interrupted"
    assert run_small("ghost", tmp_path / "cut", model=mamba2, calibration=words, resume=True)["result"]


def test_a_finished_run_is_only_reported(mamba2: Path, words: Path, tmp_path: Path):
    summary = run_small("ghost", tmp_path / "run", model=mamba2, calibration=words)
    written = (tmp_path / "run/result/model/model.safetensors").stat().st_mtime_ns
    (tmp_path / "run" / "report.html").unlink()
    assert run_small("ghost", tmp_path / "run", model=mamba2, calibration=words, resume=True, report=kill_in("cutting")) == summary
    assert (tmp_path / "run/result/model/model.safetensors").stat().st_mtime_ns == written
    assert (tmp_path / "run" / "report.html").exists()


def test_resuming_with_another_setting_model_or_text_names_the_difference(mamba2: Path, words: Path, tmp_path: Path):
    asked = {"model": mamba2, "calibration": words}
    with pytest.raises(Killed):
        run_small("ghost", tmp_path / "run", report=kill_in("evaluating"), **asked)
    other = write_mamba2(tmp_path / "mamba2", seed=1)
    for changes, said in [
        ({"keep": 0.25}, r"settings\.keep: got 0\.25, expected null"),
        ({"rows": 2}, r"settings\.rows: got 2, expected 3"),
        ({"seed": 1}, r"seed: got 1, expected 0"),
        ({"model": other}, r"data\.model_sha256: got "),
    ]:
        with pytest.raises(InputError, match=rf"(?s)was made with other settings:.*{said}"):
            run_small("ghost", tmp_path / "run", resume=True, **(asked | changes))
    with pytest.raises(InputError, match=r'settings\.method: got "random", expected "ghost"'):
        run_small("random", tmp_path / "run", resume=True, **asked)


def test_a_run_goes_on_where_its_files_were_moved_to(mamba2: Path, words: Path, tmp_path: Path):
    run_small("ghost", tmp_path / "whole", model=mamba2, calibration=words)
    with pytest.raises(Killed):
        run_small("ghost", tmp_path / "cut", model=mamba2, calibration=words, report=kill_in("evaluating"))
    (tmp_path / "elsewhere").mkdir()
    moved = write_mamba2(tmp_path / "elsewhere" / "mamba2")
    summary = run_small("ghost", tmp_path / "cut", model=moved, calibration=words, resume=True)
    assert summary["model"] == str(moved)


def test_a_damaged_checkpoint_is_named(mamba2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(2, patch)
        run_small("ghost", tmp_path / "run", model=mamba2, calibration=words)
    file = tmp_path / "run/checkpoints/step-00000002/tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(RunError, match=r"step-00000002.tensors\.safetensors is damaged.*Delete .*step-00000002 to go on from step-00000001"):
        run_small("ghost", tmp_path / "run", model=mamba2, calibration=words, resume=True)


def test_a_sweep_that_was_killed_measures_only_what_is_missing(mamba2: Path, words: Path, tmp_path: Path):
    asked = {"model": mamba2, "calibration": words, "methods": ("ghost,random",), "num_seeds": 2}
    whole = sweep_small(tmp_path / "whole", **asked)
    with pytest.raises(Killed):
        sweep_small(tmp_path / "cut", report=kill_in("4 of 9: ghost at 75 %"), **asked)
    assert len(RunFolder(tmp_path / "cut").metrics()) == 3
    phases: list[str] = []
    cut = sweep_small(tmp_path / "cut", resume=True, report=lambda phase, done, total, note: phases.append(phase), **asked)
    assert not [phase for phase in phases if phase.startswith(("1 of", "2 of", "3 of"))]
    assert without_clocks(cut) == without_clocks(whole)
    assert sweep_small(tmp_path / "cut", resume=True, **asked) == cut


def test_ctrl_c_leaves_a_sweep_to_resume(mamba2: Path, words: Path, tmp_path: Path):
    def interrupt(phase: str, done: int, total: int, note: str) -> None:
        if phase.startswith("2 of") and note == "evaluating" and done == total:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped):
        sweep_small(tmp_path / "cut", model=mamba2, calibration=words, report=interrupt)
    assert RunFolder(tmp_path / "cut").status == "interrupted"
    assert len(RunFolder(tmp_path / "cut").metrics()) == 2
    assert len(sweep_small(tmp_path / "cut", model=mamba2, calibration=words, resume=True)["measurements"]) == 6


def test_the_command_resumes_with_the_folder_alone(
    mamba2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = str(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(2, patch)
        main(["prune", "ghost", "--model", str(mamba2), "--calibration", str(words), "--keep", "0.25", "--protect", "*.1.*:0", "--out", out, *flags_of_small()])
    assert main(["prune", "--out", out, "--resume"]) == 0
    assert RunFolder(tmp_path / "run").header["settings"]["protect"] == ["*.1.*:0"]
    assert "6 " in capsys.readouterr().out
    assert main(["prune", "random", "--out", out, "--resume"]) == 2
    assert "made with the method ghost, got random" in capsys.readouterr().err
    assert main(["prune", "sweep", "--out", out, "--resume"]) == 2
    assert "made with the method ghost, got sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_the_same_bits(tmp_path: Path, words: Path):
    generator = random.Random(0)
    model = write_mamba2(tmp_path / "model", num_hidden_layers=24)
    flags = ["prune", "ghost", "--model", model, "--calibration", words, *flags_of_small(rows=8, tokens=24)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_to_the_end(*flags, "--out", whole)
    killed = sum(run_and_kill(*flags, out=cut, threshold=threshold, delay_s=generator.random() * 0.05) for threshold in (1, 9, 18))
    assert killed == 3
    run_to_the_end("prune", "--out", cut, "--resume")
    assert_same_run(cut, whole)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_says_how_to_go_on(tmp_path: Path, words: Path):
    model = write_mamba2(tmp_path / "model", num_hidden_layers=24)
    flags = ["prune", "ghost", "--model", model, "--calibration", words, *flags_of_small(rows=8, tokens=24)]
    code, said = run_and_interrupt(*flags, out=tmp_path / "run", threshold=2)
    assert code == 130
    assert f"--out {tmp_path}/run --resume" in said
    assert RunFolder(tmp_path / "run").status == "interrupted"
    run_to_the_end("prune", "--out", tmp_path / "run", "--resume")
