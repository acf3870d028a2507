"""A training run that was stopped anywhere and resumed leaves the same bits as one that was never stopped."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partwise.checkpoint import latest_checkpoint
from partwise.checks import InputError, RunError
from partwise.engine.place import Place
from partwise.runs import RunFolder, Stopped
from partwise.train._cut import cut_run
from stopped_runs import Killed, run_and_kill, run_to_the_end
from train_runs import ROUNDS, assert_same_run, draw_nothing, flags_of_small, kill_at, kill_in, run_small, write_decoder, write_rows, write_texts


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partwise.report.write_report", draw_nothing)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.npz")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {"model": write_decoder(folder / "decoder"), "text": write_texts(folder / "texts")}


@pytest.mark.parametrize(("method", "changes"), [("ist", {}), ("diloco", {}), ("ist", {"optimizer": "sgd", "optimizer_state": "reset", "seed": 3})])
def test_a_run_killed_twice_leaves_the_same_bits(method: str, changes: dict[str, Any], tmp_path: Path, rows: Path):
    run_small(method, tmp_path / "whole", data=rows, **changes)
    for number, step in enumerate((1, 4)):  # before the first checkpoint, and in the round that writes one
        with pytest.raises(Killed):
            run_small(method, tmp_path / "cut", data=rows, resume=number > 0, report=kill_at(step), **changes)
    run_small(method, tmp_path / "cut", data=rows, resume=True, **changes)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_language_model_killed_in_the_middle_leaves_the_same_bits(tmp_path: Path, sources: dict[str, Path]):
    run_small("twist", tmp_path / "whole", **sources)
    with pytest.raises(Killed):
        run_small("twist", tmp_path / "cut", report=kill_at(5), **sources)
    run_small("twist", tmp_path / "cut", resume=True, **sources)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("phase", ["measuring", "writing"])
def test_a_run_killed_after_its_last_round_leaves_the_same_bits(phase: str, tmp_path: Path, rows: Path):
    run_small("ist", tmp_path / "whole", data=rows)
    with pytest.raises(Killed):
        run_small("ist", tmp_path / "cut", data=rows, report=kill_in(phase), checkpoint_every=100)
    assert not (tmp_path / "cut" / "result").exists()
    run_small("ist", tmp_path / "cut", data=rows, resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_ctrl_c_finishes_the_round_saves_and_leaves_a_run_to_resume_or_to_cut_from(tmp_path: Path, rows: Path):
    def interrupt(phase: str, done: int, total: int, note: str) -> None:
        if phase == "rounds" and done == 3:
            signal.raise_signal(signal.SIGINT)

    run_small("ist", tmp_path / "whole", data=rows)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        run_small("ist", tmp_path / "cut", data=rows, report=interrupt, checkpoint_every=100)
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped.value.run == tmp_path / "cut"
    assert RunFolder(tmp_path / "cut").status == "interrupted"
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000003"]
    assert cut_run(tmp_path / "cut", keep=0.5, out=tmp_path / "half", num_candidates=2)["round_number"] == 3
    assert RunFolder(tmp_path / "cut").status == "interrupted"
    run_small("ist", tmp_path / "cut", data=rows, resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_ctrl_c_while_tickets_are_measured_leaves_a_run_to_resume(tmp_path: Path, rows: Path):
    def interrupt(phase: str, done: int, total: int, note: str) -> None:
        if phase == "measuring":
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        run_small("ist", tmp_path / "cut", data=rows, report=interrupt)
    assert RunFolder(tmp_path / "cut").status == "interrupted"
    assert run_small("ist", tmp_path / "cut", data=rows, resume=True)["num_rounds"] == ROUNDS


def test_a_finished_run_is_only_reported(tmp_path: Path, rows: Path):
    summary = run_small("ist", tmp_path / "run", data=rows)
    model = tmp_path / "run" / "result" / "model" / "model.safetensors"
    written = model.stat().st_mtime_ns
    (tmp_path / "run" / "report.html").unlink()
    assert run_small("ist", tmp_path / "run", data=rows, resume=True, report=kill_in("rounds")) == summary
    assert model.stat().st_mtime_ns == written
    assert (tmp_path / "run" / "report.html").exists()


def test_resuming_with_another_setting_names_the_difference(tmp_path: Path, rows: Path):
    with pytest.raises(Killed):
        run_small("ist", tmp_path / "run", data=rows, report=kill_at(3))
    for changes, said in [
        ({"num_parts": 4}, r"settings\.num_parts: got 4, expected 2"),
        ({"lr": 0.5}, r"settings\.lr: got 0\.5, expected 0\.01"),
        ({"num_rounds": 9}, r"settings\.num_rounds: got 9, expected 6"),
        ({"seed": 1}, r"seed: got 1, expected 0"),
    ]:
        with pytest.raises(InputError, match=rf"(?s)was made with other settings:.*{said}"):
            run_small("ist", tmp_path / "run", data=rows, resume=True, **changes)
    with pytest.raises(InputError, match=r'settings\.method: got "local-sgd", expected "ist"'):
        run_small("local-sgd", tmp_path / "run", data=rows, resume=True)


def test_a_run_goes_on_with_another_number_of_workers_in_another_folder(tmp_path: Path, rows: Path):
    run_small("ist", tmp_path / "whole", data=rows)
    with pytest.raises(Killed):
        run_small("ist", tmp_path / "cut", data=rows, report=kill_at(3))
    (tmp_path / "elsewhere").mkdir()
    moved = rows.rename(tmp_path / "elsewhere" / rows.name)
    run_small("ist", tmp_path / "cut", data=moved, resume=True, place=Place(num_workers=2))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_resuming_on_data_that_changed_says_what_about_them_changed(tmp_path: Path, rows: Path):
    with pytest.raises(Killed):
        run_small("ist", tmp_path / "run", data=rows, report=kill_at(3))
    held = dict(np.load(rows))
    held["x"][3, 3] += 1e-3
    np.savez(rows, **held)
    with pytest.raises(
        InputError, match=r"is no longer what the run in .* was started with: .*sha256: got \w{12}, expected \w{12}.*Restore the files"
    ):
        run_small("ist", tmp_path / "run", data=rows, resume=True)
    with pytest.raises(InputError, match="is no longer what the run"):
        cut_run(tmp_path / "run", keep=0.5, out=tmp_path / "x")


def test_an_asynchronous_run_goes_on_from_its_checkpoint(tmp_path: Path, rows: Path):
    with pytest.raises(Killed):
        run_small("ist", tmp_path / "run", data=rows, mode="async", report=kill_at(7))
    run_small("ist", tmp_path / "run", data=rows, mode="async", resume=True)
    assert [row["step"] for row in RunFolder(tmp_path / "run").metrics()] == list(range(1, 2 * ROUNDS + 1))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_can_be_used(tmp_path: Path, rows: Path):
    run_small("ist", tmp_path / "whole", data=rows)
    with pytest.raises(Killed):
        run_small("ist", tmp_path / "cut", data=rows, report=kill_at(5))
    newest = latest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    content = (newest / "tensors.safetensors").read_bytes()
    (newest / "tensors.safetensors").write_bytes(content[:-40])
    with pytest.raises(RunError, match=r"step-00000004.tensors\.safetensors is damaged.*Delete .*step-00000004 to go on from step-00000002"):
        run_small("ist", tmp_path / "cut", data=rows, resume=True)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    run_small("ist", tmp_path / "cut", data=rows, resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_give_the_same_bits_and_count_their_bytes(tmp_path: Path, rows: Path):
    run_small("ist", tmp_path / "inline", data=rows)
    with pytest.raises(Killed):
        run_small("ist", tmp_path / "ray", data=rows, report=kill_at(3))
    summary = run_small("ist", tmp_path / "ray", data=rows, resume=True, place=Place(engine="ray", num_workers=2))
    kept = RunFolder(tmp_path / "ray").metrics()
    assert ["wire" in row for row in kept] == [False] * 2 + [True] * (ROUNDS - 2)
    assert summary["wire"]["bytes_up"] == sum(row["wire"]["bytes_up"] for row in kept[2:]) > 0
    assert summary["mishaps"].get("lost", 0) == 0
    assert_same_run(tmp_path / "ray", tmp_path / "inline")


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_the_same_bits(tmp_path: Path, rows: Path):
    generator = random.Random(0)
    flags = ["train", "ist", "--data", rows, *flags_of_small("ist", num_rounds=60, checkpoint_every=7, num_candidates=2)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_to_the_end(*flags, "--out", whole)
    killed = sum(run_and_kill(*flags, out=cut, threshold=threshold, delay_s=generator.random() * 0.05) for threshold in (1, 20, 45))
    assert killed == 3
    run_to_the_end("train", "--out", cut, "--resume")
    assert_same_run(cut, whole)
