"""The job behind ``partwise train``: the files it leaves, what they are worth, and the input that it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from partwise.checkpoint import latest_checkpoint
from partwise.checks import InputError, RunError
from partwise.engine.place import Place
from partwise.ledger import Ledger
from partwise.runs import RunFolder
from partwise.train import METHODS, job
from partwise.train._cut import cut_run, load_job
from partwise.train._flags import method_class, train_flags
from partwise.train._header import check_same_data
from partwise.train._local import task_loss
from partwise.train._metrics import accuracy, mean_loss
from partwise.train.job import DEFAULT_STEPS, default_rounds, for_new_model, starts_new
from partwise.train.task import Kind, TaskSettings
from partwise.train.ticket import load_ticket
from train_runs import ROUNDS, draw_nothing, run_small, write_decoder, write_rows, write_texts

SIZES = [1.0, 0.75, 0.5, 0.25]


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partwise.report.write_report", draw_nothing)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny decoder and texts for it."""
    folder = tmp_path_factory.mktemp("sources")
    return {"model": write_decoder(folder / "decoder"), "text": write_texts(folder / "texts")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.npz")


@pytest.fixture(scope="module")
def twist_run(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Path]) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("runs") / "twist"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("partwise.report.write_report", draw_nothing)
        return run_small("twist", out, command=["partwise", "train"], **sources), out


def quiet(phase: str, done: int, total: int, note: str) -> None:
    pass


def test_tickets_open_with_stock_transformers_and_are_worth_on_the_test_split_what_the_summary_says(twist_run: tuple[dict[str, Any], Path]):
    summary, out = twist_run
    task = load_job(RunFolder(out), report=quiet).task
    assert [row["keep"] for row in summary["tickets"]] == SIZES
    for row in summary["tickets"]:
        model = AutoModelForCausalLM.from_pretrained(row["folder"])
        assert sum(parameter.numel() for parameter in model.parameters()) == row["num_parameters"]
        assert math.exp(mean_loss(model, task.test, loss=task_loss)) == pytest.approx(row["metric"], rel=1e-6)
        assert mean_loss(model, task.calibration, loss=task_loss) == pytest.approx(row["calibration_loss"], rel=1e-6)
        assert row["speed"] > 0
        assert row["bytes"] == (Path(row["folder"]) / "model.safetensors").stat().st_size
    assert AutoTokenizer.from_pretrained(summary["tickets"][0]["folder"]).tokenize("the film") == ["the", "film"]
    sizes = [row["num_parameters"] for row in summary["tickets"]]
    assert sizes == sorted(sizes, reverse=True)
    assert json.loads((out / "summary.json").read_text()) == summary


def test_a_ticket_is_chosen_on_the_calibration_split_and_stands_beside_those_it_was_chosen_from(twist_run: tuple[dict[str, Any], Path]):
    summary, _ = twist_run
    assert summary["tickets"][0]["random"] is None, "there is one whole model"
    for row in summary["tickets"][1:]:
        spread = row["random"]
        facts = json.loads((Path(row["folder"]) / "ticket.json").read_text())
        assert spread["number"] == facts["kinds"].count("drawn") == 3
        assert {"wanda", "fluctuation"} & set(facts["kinds"])
        assert min(facts["scores"]) == row["calibration_loss"]
        assert facts["kinds"][facts["scores"].index(min(facts["scores"]))] == row["chosen"]
        assert spread["low"] <= spread["mean"] <= spread["high"]
        if row["chosen"] == "drawn":
            assert spread["low"] <= row["metric"] <= spread["high"]


def test_the_card_says_how_to_load_a_ticket_what_it_is_worth_and_the_totals_of_the_ledger(twist_run: tuple[dict[str, Any], Path]):
    summary, out = twist_run
    card = (out / "result" / "tickets" / "keep-50" / "README.md").read_text()
    assert 'transformers.LlamaForCausalLM.from_pretrained("this folder")' in card
    assert f"| {summary['tickets'][2]['num_parameters']:,} |" in card
    assert "library_name: transformers" in card
    assert f"{2 * ROUNDS} parts in {ROUNDS} rounds: {2 * ROUNDS} kept" in card


def test_the_ledger_lists_the_parts_of_every_round(twist_run: tuple[dict[str, Any], Path]):
    summary, _ = twist_run
    ledger = Ledger.from_json(summary["ledger"])
    assert [(part.where, part.index) for part in ledger.parts] == [(f"round {number}", index) for number in range(1, ROUNDS + 1) for index in (0, 1)]
    assert summary["bytes_down"] == ledger.total.bytes
    assert summary["ledger_total"]["parts"] == 2 * ROUNDS
    assert summary["data_parallel_bytes"] == 2 * summary["tickets"][0]["num_parameters"] * 4 * 2 * ROUNDS, "two steps a round"


def test_every_round_leaves_a_row_and_some_are_measured_on_the_validation_split(twist_run: tuple[dict[str, Any], Path]):
    summary, out = twist_run
    rows = RunFolder(out).metrics()
    assert [row["step"] for row in rows] == list(range(1, ROUNDS + 1))
    assert [row["step"] for row in rows if "valid_loss" in row] == [1, 3, 6]
    assert summary["valid_loss"] == rows[-1]["valid_loss"]
    assert all(row["kind"] == "round" and row["seconds"] > 0 and len(row["parts"]) == 2 for row in rows)
    counts = [count for units in summary["holders"].values() for count in units]
    assert sum(counts) == sum(len(units) for units in summary["holders"].values()) * ROUNDS  # two parts of one half each
    assert {row["coverage"] for row in rows} == {1.0}


def test_a_run_on_rows_leaves_networks_that_load_ticket_opens(tmp_path: Path, rows: Path):
    summary = run_small("ist", tmp_path / "run", data=rows)
    task = load_job(RunFolder(tmp_path / "run"), report=quiet).task
    assert summary["metric_name"] == "accuracy"
    assert summary["unit"] == "rows"
    for row in summary["tickets"]:
        assert accuracy(load_ticket(Path(row["folder"])), task.test) == pytest.approx(row["metric"])
        assert "load_ticket" in (Path(row["folder"]) / "README.md").read_text()


@pytest.mark.parametrize("method", ["local-sgd", "diloco"])
def test_methods_that_split_nothing_leave_the_whole_model_and_say_why_there_are_no_tickets(method: str, tmp_path: Path, rows: Path):
    summary = run_small(method, tmp_path / "run", data=rows)
    assert [row["keep"] for row in summary["tickets"]] == [1.0]
    assert [path.name for path in (tmp_path / "run" / "result").iterdir()] == ["model"]
    [missing] = summary["missing_tickets"]
    assert missing["code"] == "no-tickets"
    assert "splits nothing" in missing["reason"]


@pytest.mark.slow
def test_tickets_that_are_ranked_and_not_drawn_are_measured_once(tmp_path: Path):
    images = np.random.default_rng(0).normal(size=(120, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", x=images, y=np.arange(120) % 3)
    summary = run_small("loft", tmp_path / "run", data=tmp_path / "images.npz", num_rounds=2)
    assert [row["keep"] for row in summary["tickets"]] == SIZES
    assert all(row["random"] is None for row in summary["tickets"])
    facts = json.loads((Path(summary["tickets"][2]["folder"]) / "ticket.json").read_text())
    assert len(facts["scores"]) == 1


def test_statistics_of_normalisation_are_those_of_the_ticket(tmp_path: Path, rows: Path):
    summary = run_small("ist", tmp_path / "run", data=rows, num_rounds=2)
    job = load_job(RunFolder(tmp_path / "run"), report=quiet)
    ticket = load_ticket(Path(summary["tickets"][3]["folder"]))
    seen: list[torch.Tensor] = []
    ticket.norms[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        ticket(torch.cat([batch[0] for batch in job.task.loader]))
    torch.testing.assert_close(ticket.norms[1].running_mean, seen[0].mean(dim=0), rtol=0.2, atol=0.2)


def test_a_size_that_leaves_a_layer_empty_is_said_and_the_others_are_there(tmp_path: Path, sources: dict[str, Path]):
    summary = run_small("twist", tmp_path / "run", num_blocks=1, keep=1.0, **sources)
    assert [row["keep"] for row in summary["tickets"]] == [1.0, 0.75, 0.5]
    [missing] = summary["missing_tickets"]
    assert missing["keep"] == 0.25
    assert missing["code"] == "empty-layer"


def test_another_size_is_cut_out_of_a_finished_run(tmp_path: Path, twist_run: tuple[dict[str, Any], Path]):
    summary, out = twist_run
    cut = cut_run(out, keep=0.5, out=tmp_path / "half", num_candidates=3)
    assert {key: cut[key] for key in ("num_parameters", "metric", "random", "calibration_loss")} == {
        key: summary["tickets"][2][key] for key in ("num_parameters", "metric", "random", "calibration_loss")
    }, "the same candidates as those of the run"
    assert cut["whole"]["metric"] == summary["tickets"][0]["metric"]
    assert cut["folder"] == str(tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    other = cut_run(out, keep=0.25, out=tmp_path / "other", num_candidates=1, seed=7)
    assert other["random"] is None
    assert json.loads((out / "summary.json").read_text()) == summary, "the run is as it was"


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"keep": 0.0}, "keep-range", "got --keep 0, expected a fraction above 0"),
        ({"keep": 1.5}, "keep-range", r"got --keep 1\.5"),
        ({"keep": 0.01}, "empty-layer", "keep"),
        ({"num_candidates": 0}, "setting-out-of-range", "--candidates is 0"),
    ],
)
def test_a_ticket_that_cannot_be_cut_leaves_nothing_behind(
    changes: dict[str, Any], code: str, message: str, tmp_path: Path, twist_run: tuple[dict[str, Any], Path]
):
    with pytest.raises(InputError, match=message) as caught:
        cut_run(twist_run[1], **({"keep": 0.5, "out": tmp_path / "x"} | changes))
    assert caught.value.code == code
    assert not (tmp_path / "x").exists()


def test_a_ticket_needs_a_run_with_a_checkpoint_and_a_new_folder(tmp_path: Path, twist_run: tuple[dict[str, Any], Path]):
    with pytest.raises(InputError, match="exists already, expected a new folder"):
        cut_run(twist_run[1], keep=0.5, out=twist_run[1])
    with pytest.raises(InputError, match="holds no run"):
        cut_run(tmp_path / "nothing", keep=0.5, out=tmp_path / "x")
    fresh = RunFolder.create(tmp_path / "fresh", RunFolder(twist_run[1]).header)
    del fresh
    with pytest.raises(InputError, match=r"has no checkpoint yet \(running\), expected one to cut from.* --resume"):
        cut_run(tmp_path / "fresh", keep=0.5, out=tmp_path / "x")


def test_a_loss_that_is_no_number_names_its_part_and_keeps_the_last_good_state(tmp_path: Path, rows: Path):
    data = np.load(rows)
    x = data["x"].copy()
    x[:, 0] = 1e30  # too large to be squared in 32 bits
    np.savez(tmp_path / "large.npz", x=x, y=data["y"])
    settings: dict[str, Any] = {"data": tmp_path / "large.npz", "optimizer": "sgd", "lr": 1e30, "grad_clip": None, "warmup": 0.0}
    with pytest.raises(RunError, match=r"part \d in round \d.* local step \d"):
        run_small("local-sgd", tmp_path / "run", **settings)


def test_a_run_that_diverges_in_the_middle_says_what_to_do(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch):
    from partwise.train import _local

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        value = honest(model, batch)
        calls.append(1)
        return value * float("nan") if model.training and torch.is_grad_enabled() and len(calls) > 20 else value

    calls: list[int] = []
    honest = _local.task_loss
    with monkeypatch.context() as patch:
        patch.setattr("partwise.train.trainer.task_loss", loss)
        with pytest.raises(RunError, match=r"part \d in round (\d)") as caught:
            run_small("ist", tmp_path / "run", data=rows, checkpoint_every=100)
    said = str(caught.value)
    assert caught.value.code == "loss-not-finite"
    assert f"partwise train ticket {tmp_path / 'run'} --keep 1" in said
    assert "start again with a lower --lr and another --out" in said
    run = RunFolder(tmp_path / "run")
    assert run.status == "interrupted"
    rounds = run.metrics()[-1]["step"]
    assert f"Round {rounds} is saved" in said
    assert latest_checkpoint(run.checkpoints).name == f"step-{rounds:08d}"  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"settings\.lr: got 0\.001, expected 0\.01"):
        run_small("ist", tmp_path / "run", data=rows, lr=0.001, resume=True)
    assert cut_run(tmp_path / "run", keep=1.0, out=tmp_path / "kept")["round_number"] == rounds


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ist", {"data": "no.npz"}, "there is no file"),
        ("twist", {"text": "no.txt"}, "there is no file or folder"),
        ("ist", {"num_parts": 0}, "num_parts=0 must be an integer of at least 1"),
        ("ist", {"num_rounds": 0}, "--num-rounds is 0, expected at least 1"),
        ("ist", {"num_candidates": 0}, "--num-candidates is 0"),
        ("ist", {"valid_every": 0}, "--valid-every is 0"),
        ("ist", {"checkpoint_every": 0}, "--checkpoint-every is 0"),
        ("ist", {"seed": -1}, "--seed is -1, expected at least 0"),
        ("ist", {"seed": 2**63}, r"--seed is 9223372036854775808, expected 0 to 9223372036854775807\. Choose"),
        ("ist", {"lr": -1.0}, r"got lr=-1\.0, expected a number above 0"),
        ("ist", {"place": Place(num_workers=4)}, "num_workers=4 for 2 parts"),
        ("ist", {"place": Place(address="auto")}, "for the inline engine"),
        ("ist", {"place": Place(timeout=9)}, "got timeout=9 for the inline engine"),
        ("ist", {"max_staleness": 2}, "max_staleness=2 with mode='sync'"),
        ("ist", {"num_parts": 300}, "300"),
        ("twist", {}, "expected a transformer"),
        ("resist", {}, "expected"),
        ("ist", {"num_local_steps": (2, 2, 2)}, "got 3 numbers of local steps for 2 parts"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing_behind(name: str, changes: dict[str, Any], message: str, tmp_path: Path, rows: Path):
    data = {} if "text" in changes else {"data": rows}
    with pytest.raises(InputError, match=message):
        run_small(name, tmp_path / "runs" / "bad", **(data | changes))
    assert not (tmp_path / "runs" / "bad").exists()


def test_every_method_gets_as_many_local_steps_where_no_rounds_are_given():
    assert DEFAULT_STEPS.keys() == set(get_args(Kind))
    for name in METHODS:
        method = method_class(name)()
        per_round = sum(method.steps_of(part) for part in range(method.num_parts))
        for kind, steps in DEFAULT_STEPS.items():
            assert abs(default_rounds(method, kind) * per_round - steps) <= per_round / 2
    assert default_rounds(method_class("ist")(num_parts=2, num_local_steps=(1, 10_000)), "causal-lm") == 1


def test_a_new_model_begins_with_rounds_of_the_whole_unless_it_is_said_what_parts_hold():
    twist = method_class("twist")
    assert for_new_model(twist()) == twist(whole_share=0.7)
    for given in (twist(keep=0.5), twist(whole_share=0.2), method_class("ist")()):
        assert for_new_model(given) == given
    assert starts_new(TaskSettings())
    assert starts_new(TaskSettings(model="llama-small"))
    assert not starts_new(TaskSettings(model="a/folder"))


@pytest.mark.parametrize("method", METHODS)
def test_no_two_flags_of_a_method_have_the_same_name(method: str):
    from partwise.runs import flat_settings

    flags = train_flags(method_class(method))()
    assert len(flat_settings(flags)) == sum(len(vars(getattr(flags, part))) for part in vars(flags))


def test_workers_of_different_speed_and_size_are_told_by_lists(tmp_path: Path, sources: dict[str, Path]):
    summary = run_small("twist", tmp_path / "run", num_local_steps=(1, 3), keep=(0.25, 0.75), num_rounds=2, **sources)
    parts = [row["parts"] for row in RunFolder(tmp_path / "run").metrics()]
    assert [[part["num_steps"] for part in row] for row in parts] == [[1, 3], [1, 3]]
    assert all(row[0]["parameters"] < row[1]["parameters"] for row in parts)
    assert summary["num_steps"] == 8
    assert run_small("twist", tmp_path / "run", num_local_steps=(1, 3), keep=(0.25, 0.75), num_rounds=2, resume=True, **sources) == summary


def test_an_asynchronous_run_counts_arrivals(tmp_path: Path, rows: Path):
    summary = run_small("ist", tmp_path / "run", data=rows, mode="async", valid_every=2)
    kept = RunFolder(tmp_path / "run").metrics()
    assert [row["step"] for row in kept] == list(range(1, 2 * ROUNDS + 1))
    assert [row["step"] for row in kept if "valid_loss" in row] == [1, 4, 8, 12]
    assert summary["mode"] == "async"
    assert len(summary["ledger"]) == 2 * ROUNDS


def test_changed_flags_are_named_before_the_data_that_follow_from_them(tmp_path: Path):
    header = {"settings": {"split_seed": 0}, "data": {"name": "digits", "held_out": {"test": "a" * 64}, "names": ["x"] * 100}}
    run = RunFolder.create(tmp_path / "run", header)
    check_same_data(run, header | {"settings": {"split_seed": 1}, "data": {"name": "digits", "held_out": {"test": "b" * 64}}})
    with pytest.raises(InputError, match=r"held_out: got test bbbbbbbbbbbb, expected test aaaaaaaaaaaa; names: got None, expected 100 entries\. Restore"):
        check_same_data(run, header | {"data": {"name": "digits", "held_out": {"test": "b" * 64}}})


def test_a_run_that_another_process_began_meanwhile_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "run"

    def meanwhile(_: object, open_run) -> dict:  # type: ignore[no-untyped-def, type-arg]
        RunFolder.create(out, {"settings": {}, "data": {}})
        return open_run()  # type: ignore[no-any-return]

    monkeypatch.setattr(job, "work", meanwhile)
    with pytest.raises(InputError):
        job.start(object(), out, {"settings": {}, "data": {}})  # type: ignore[arg-type]
    assert (out / "run.json").exists()
