"""A decomposition that was stopped anywhere and resumed leaves the same bits as one that was never stopped."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decompose_runs import METHOD, ROUNDS, assert_same_run, draw_nothing, kill_at, kill_in, run_small, write_matrix
from partwise.checkpoint import latest_checkpoint
from partwise.checks import InputError, RunError
from partwise.engine.place import Place
from partwise.runs import RunFolder, Stopped
from stopped_runs import Killed, run_and_kill, run_to_the_end


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partwise.report.write_report", draw_nothing)


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    return write_matrix(tmp_path / "matrix.npy")


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


def test_checkpoints_are_a_pause_apart_where_no_number_of_rounds_is_given(tmp_path: Path, matrix: Path, monkeypatch: pytest.MonkeyPatch):
    run_small(matrix, tmp_path / "quick", checkpoint_every=None)
    assert not (tmp_path / "quick" / "checkpoints").exists()
    monkeypatch.setattr("partwise.decompose._recorder.LEAST_PAUSE", 0.0)
    monkeypatch.setattr("partwise.decompose._recorder.RARITY", 0)
    with pytest.raises(Killed):
        run_small(matrix, tmp_path / "slow", checkpoint_every=None, report=kill_at(5))
    assert [path.name for path in sorted((tmp_path / "slow" / "checkpoints").iterdir())] == ["step-00000003", "step-00000004"]


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


@pytest.mark.ray
@pytest.mark.slow
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


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_the_same_bits(tmp_path: Path):
    generator = random.Random(0)
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((500, 120)))
    flags = ["decompose", METHOD, tmp_path / "data.npy", "--n-components", 6, "--num-rounds", 600, "--tol", 0, "--checkpoint-every", 10]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_to_the_end(*flags, "--out", whole)
    killed = sum(run_and_kill(*flags, out=cut, threshold=threshold, delay_s=generator.random() * 0.02) for threshold in (1, 150, 400))
    assert killed == 3
    run_to_the_end("decompose", "--out", cut, "--resume")
    assert_same_run(cut, whole)
