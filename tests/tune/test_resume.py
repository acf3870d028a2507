"""A run that was stopped anywhere and resumed leaves the same bits as one that was never stopped."""

from __future__ import annotations

import errno
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from partwise.checks import InputError, RunError
from partwise.runs import RunFolder, Stopped
from partwise.tune.adalora import AdaLoRA
from partwise.tune.adapad_recipe import AdaPaD
from partwise.tune.eva import EVA
from partwise.tune.increlora import IncreLoRA
from partwise.tune.lora import LoRA
from partwise.tune.one_rank_at_a_time import OneRank
from partwise.tune.recipe import Recipe
from stopped_runs import Killed, num_rows, run_and_kill, run_to_the_end
from tune_runs import NUM_STEPS, run_tiny, tiny_flags

RECIPES: list[Recipe] = [
    LoRA(lora_dropout=0.2),
    AdaLoRA(lora_dropout=0.2),
    EVA(),
    AdaPaD(lora_dropout=0.2),
    IncreLoRA(),
    OneRank(),
]
name_of = lambda recipe: type(recipe).__name__  # noqa: E731 - an id, no function of its own


def kill_at(step: int) -> Any:
    def report(phase: str, done: int, total: int, loss: float | None) -> None:
        if phase == "training" and done == step:
            raise Killed

    return report


def kill_in(wanted: str) -> Any:
    def report(phase: str, done: int, total: int, loss: float | None) -> None:
        if phase == wanted:
            raise Killed

    return report


def weights(run: Path) -> bytes:
    return (run / "result" / "adapter_model.safetensors").read_bytes()


def assert_same_run(run: Path, expected: Path) -> None:
    assert weights(run) == weights(expected)
    assert RunFolder(run).metrics() == RunFolder(expected).metrics()
    assert (run / "result" / "adapter_config.json").read_text() == (expected / "result" / "adapter_config.json").read_text()
    own, other = (json.loads((path / "summary.json").read_text()) for path in (run, expected))
    for key in ("metric_before", "metric_after", "kept_rank_curve", "kept_rank_curve_svd", "ranks", "ledger"):
        assert own[key] == other[key], key


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_run_killed_twice_leaves_the_same_bits(recipe: Recipe, tmp_path: Path, model_folder: Path, reviews: Path):
    run_tiny(recipe, model_folder, reviews, out=tmp_path / "whole")
    for number, step in enumerate((3, 8)):  # between two checkpoints, and in the step that writes one
        with pytest.raises(Killed):
            run_tiny(recipe, model_folder, reviews, out=tmp_path / "cut", resume=number > 0, report=kill_at(step))
    run_tiny(recipe, model_folder, reviews, out=tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("phase", ["measuring before", "measuring after", "cutting to every rank"])
def test_a_run_killed_while_it_measures_leaves_the_same_bits(phase: str, tmp_path: Path, model_folder: Path, reviews: Path):
    run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "whole")
    with pytest.raises(Killed):
        run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "cut", report=kill_in(phase))
    run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_how_often_checkpoints_are_written_does_not_change_the_result(tmp_path: Path, model_folder: Path, reviews: Path):
    for every in (1, 100):
        run_tiny(AdaLoRA(), model_folder, reviews, out=tmp_path / str(every), checkpoint_every=every)
    assert_same_run(tmp_path / "1", tmp_path / "100")


def test_a_full_disk_keeps_what_was_saved_and_the_run_goes_on_once_there_is_room(
    tmp_path: Path, model_folder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
):
    run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "whole")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill_disk(phase: str, done: int, total: int, loss: float | None) -> None:
        if phase == "training" and done == 7:
            monkeypatch.setattr("os.fsync", full)

    with pytest.raises(RunError, match="No space left on device") as stopped:
        run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "cut", report=fill_disk)
    assert stopped.value.code == "disk-full"
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000004"]
    run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_ctrl_c_saves_after_the_step_and_the_run_goes_on_from_there(tmp_path: Path, model_folder: Path, reviews: Path):
    def interrupt(phase: str, done: int, total: int, loss: float | None) -> None:
        if phase == "training" and done == 5:
            signal.raise_signal(signal.SIGINT)

    run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "cut", checkpoint_every=100, report=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped.value.run == tmp_path / "cut"
    run = RunFolder(tmp_path / "cut")
    assert run.status == "interrupted"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000005"]
    run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_finished_run_is_only_reported(tmp_path: Path, model_folder: Path, reviews: Path):
    summary = run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run")
    written = (tmp_path / "run" / "result" / "adapter_model.safetensors").stat().st_mtime_ns
    assert run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run", resume=True, report=kill_in("training")) == summary
    assert (tmp_path / "run" / "result" / "adapter_model.safetensors").stat().st_mtime_ns == written


def test_resuming_with_another_setting_names_the_difference(tmp_path: Path, model_folder: Path, reviews: Path):
    run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"(?s)was made with other settings:.*lr: got 0.5, expected 0.01"):
        run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run", resume=True, lr=0.5)
    with pytest.raises(InputError, match=r"(?s)lora_dropout: got 0.5, expected 0.0"):
        run_tiny(LoRA(lora_dropout=0.5), model_folder, reviews, out=tmp_path / "run", resume=True)


def test_resuming_on_changed_data_names_the_fingerprint(tmp_path: Path, model_folder: Path, reviews: Path):
    run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run")
    reviews.write_text(reviews.read_text().replace("good", "fine", 1))
    with pytest.raises(InputError, match=r"(?s)data.fingerprint: got"):
        run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run", resume=True)


def test_there_must_be_a_run_to_resume(tmp_path: Path, model_folder: Path, reviews: Path):
    with pytest.raises(InputError, match="holds no run"):
        run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path, model_folder: Path, reviews: Path):
    for budget, place in ((13, "small"), (26, "large")):
        with pytest.raises(Killed):
            run_tiny(LoRA(), model_folder, reviews, out=tmp_path / place, budget=budget, report=kill_at(6))
    (tmp_path / "small" / "checkpoints").rename(tmp_path / "aside")
    (tmp_path / "large" / "checkpoints").rename(tmp_path / "small" / "checkpoints")
    with pytest.raises(RunError, match=r"does not fit the model: \d+ of \d+ trained parameters are missing or of another shape"):
        run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "small", budget=13, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adapad"])
def test_kill_9_at_random_moments_leaves_the_same_bits(method: str, tmp_path: Path, model_folder: Path, reviews: Path):
    generator = random.Random(method)
    flags = tiny_flags(model_folder, reviews, max_steps=NUM_STEPS * 4)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_to_the_end("tune", method, *flags, "--out", whole)
    for threshold in sorted(generator.sample(range(1, num_rows(whole)), 3)):
        run_and_kill("tune", method, *flags, out=cut, threshold=threshold, delay_s=generator.random() * 0.02)
    run_to_the_end("tune", "--out", cut, "--resume")
    assert_same_run(cut, whole)
