"""``partwise prune sweep``: quality against size for several methods."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from partwise.atomic_files import write_json
from partwise.checks import InputError
from partwise.cli import main
from partwise.opened_models import open_model
from partwise.prune import GHOST, Magnitude, Random, Taylor, WandaStructured
from partwise.prune._calibration import batches_of
from partwise.prune._report import describe
from partwise.prune._sweep import Point, SweepSettings, _Scored, command_names
from partwise.prune._sweep_report import by_keep, verdict_of
from partwise.prune._texts import TextSettings, read_texts
from partwise.prune.unit_method import UnitMethod
from partwise.report import write_report
from partwise.runs import RunFolder
from prune_runs import draw_nothing, flags_of_small, sweep_small, write_llama, write_mamba2
from report_page import Page
from serve_models import write_words


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mamba2(tmp_path_factory.mktemp("models") / "mamba2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "words", num_files=12, num_words=60)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, mamba2: Path, words: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sweep"
    flags = ["--methods", "ghost,magnitude,random,taylor", "--keeps", "0.75,0.5,0.25", "--num-seeds", "2", *flags_of_small()]
    assert main(["prune", "sweep", "--model", str(mamba2), "--calibration", str(words), *flags, "--out", str(out), "--json"]) == 0
    return out


def test_every_method_is_measured_at_every_size_with_seeds_where_they_matter(finished: Path):
    summary = json.loads((finished / "summary.json").read_text())
    found = [(row["method"], row["seed"], row["keep"]) for row in summary["measurements"]]
    seeds = {"ghost": 2, "magnitude": 1, "random": 2, "taylor": 2}
    assert found == [(name, seed, keep) for name, number in seeds.items() for seed in range(number) for keep in (0.75, 0.5, 0.25)]
    rows = RunFolder(finished).metrics()
    assert [row["step"] for row in rows] == list(range(len(found) + 1))
    assert rows[0]["perplexity"] == summary["whole"]["perplexity"]
    for row in summary["measurements"]:
        assert (row["kept"], row["of"]) == (24 * row["keep"], 24)
        assert row["sequence_bytes"] < summary["whole"]["sequence_bytes"]
    assert len({row["perplexity"] for row in summary["measurements"] if row["method"] == "random" and row["keep"] == 0.25}) == 2


def test_a_measurement_is_that_of_a_run_with_the_same_settings(
    finished: Path, mamba2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from prune_runs import decode_nothing, run_small

    monkeypatch.setattr("partwise.report.write_report", draw_nothing)
    monkeypatch.setattr("partwise.prune._measuring.decode_speeds", decode_nothing)
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("ghost", "taylor", "random"):
        single = run_small(name, tmp_path / name, model=mamba2, calibration=words, keep=0.25, seed=1)
        row = next(row for row in summary["measurements"] if (row["method"], row["keep"], row["seed"]) == (name, 0.25, 1))
        for key in ("perplexity", "num_parameters", "weight_bytes", "sequence_bytes"):
            assert row[key] == single["after"][key]
            assert summary["whole"][key] == single["before"][key]


SETTINGS: list[Any] = [Magnitude(), Random(seed=3), Taylor(), Taylor(scope="model"), GHOST(recalibrate=False), GHOST(recalibrate=False, scope="model")]


@pytest.mark.parametrize("method", SETTINGS, ids=repr)
def test_scores_that_do_not_depend_on_the_size_are_made_once_and_give_the_same_plan(
    method: Any, mamba2: Path, words: Path, monkeypatch: pytest.MonkeyPatch
):
    opened = open_model(str(mamba2))
    ids = read_texts(opened, TextSettings(calibration=str(words), rows=3, evaluation_rows=4, tokens=16)).calibration.ids
    scored, calls = _Scored(), []
    monkeypatch.setattr("partwise.prune.unit_method.batches_of", lambda model, data: calls.append(1) or batches_of(model, data))
    for keep in (0.75, 0.4, 0.125):
        point = Point(name="any", method=dataclasses.replace(method, keep=keep), keep=keep, seed=0)
        plan: Any = scored.plan(point, opened.model, ids, lambda phase, done, total, note: None)
        assert len(calls) == (1 if method.NEEDS_DATA else 0)
        expected: Any = point.method.plan(opened.model, ids)
        del calls[1:]
        assert (plan.units, plan.method) == (expected.units, expected.method)
        assert all(values.equal(plan.scores[name]) for name, values in expected.scores.items())


def test_a_method_that_recalibrates_looks_at_the_text_for_every_size(mamba2: Path, words: Path, monkeypatch: pytest.MonkeyPatch):
    opened = open_model(str(mamba2))
    ids = read_texts(opened, TextSettings(calibration=str(words), rows=3, evaluation_rows=4, tokens=16)).calibration.ids
    told: list[Any] = []
    monkeypatch.setattr(UnitMethod, "plan", lambda self, model, data, report: told.append((self, len(data))))
    for method in (GHOST(keep=0.25), WandaStructured(keep=0.25)):
        _Scored().plan(Point(name="any", method=method, keep=0.25, seed=0), opened.model, ids, lambda phase, done, total, note: None)
        assert told.pop() == (method, 3)


def test_without_names_the_usual_method_meets_the_baselines(llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("partwise.report.write_report", draw_nothing)
    summary = sweep_small(tmp_path / "a", usual="wanda", model=llama, calibration=words)
    assert list(dict.fromkeys(row["method"] for row in summary["measurements"])) == ["wanda", "magnitude", "random"]
    every = sweep_small(tmp_path / "b", model=llama, calibration=words, methods=("all",), keeps=("0.5",))
    assert every["left_out"] == ["ghost"]
    assert {row["method"] for row in every["measurements"]} == set(command_names()) - {"ghost"}


def test_settings_of_a_sweep_are_read_and_refused():
    settings = SweepSettings(methods=("ghost, random",), keeps=("0.3,0.9", "0.3"), kinds=("heads,neurons",), scope="model", recalibrate=False)
    assert settings.fractions() == [0.9, 0.3]
    assert settings.names("wanda") == ["ghost", "random"]
    assert SweepSettings().names("wanda") == ["wanda", "magnitude", "random"]
    assert SweepSettings().names("random") == ["random", "magnitude"]
    assert settings.method("taylor", 0.3, 5) == Taylor(keep=0.3, kinds=("heads", "neurons"), scope="model", recalibrate=False)
    assert SweepSettings().method("random", 0.3, 5) == Random(keep=0.3, seed=5)
    with pytest.raises(InputError, match="num_seeds=0 must be an integer of at least 1"):
        SweepSettings(num_seeds=0)
    with pytest.raises(InputError, match=r"--keeps is empty, expected fractions above 0 and at most 1"):
        SweepSettings(keeps=()).fractions()


def test_the_terminal_shows_every_size_with_the_best_method_first(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "90")
    assert main(["prune", "sweep", "--out", str(finished), "--resume"]) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["method", "perplexity", "lowest", "to", "highest", "change", "parameters", "a", "sequence", "holds"] in lines
    assert lines.index(["75", "%"]) < lines.index(["50", "%"]) < lines.index(["25", "%"])
    summary = json.loads((finished / "summary.json").read_text())
    for rows in by_keep(summary).values():
        means = [row["perplexity"] for row in rows]
        assert means == sorted(means)
    assert "At 50 % of the units " in said
    assert "words; 21 small models, took " in said
    assert "\u2026" not in said


def test_the_report_draws_quality_against_size_and_lists_every_number(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(finished)]) == 0
    page, summary = Page(finished / "report.html"), json.loads((finished / "summary.json").read_text())
    assert page.inside("h2") == ["Quality against size", "Methods", "Settings"]
    [drawing] = page.named("svg")
    assert drawing["aria-label"] == "perplexity of 4 methods against memory that a sequence holds (kB)"
    cells = page.inside("td")
    for row in summary["measurements"]:
        assert f"{row['num_parameters']:,}" in cells
    assert "GHOST(keep=0.25)" in page.source
    assert "mathdefault" not in page.source
    assert not {"script", "link", "img"} & {tag for tag, _ in page.tags}
    assert "means over 2 seeds" in page.source


def test_a_perplexity_that_is_no_number_is_a_dash_and_comes_last(finished: Path, tmp_path: Path):
    summary = json.loads((finished / "summary.json").read_text())
    rows = [row | ({"perplexity": None} if row["method"] == "ghost" else {}) for row in summary["measurements"]]
    broken = summary | {"measurements": rows}
    assert all(group[-1]["method"] == "ghost" for group in by_keep(broken).values())
    nothing = summary | {"measurements": [row | {"perplexity": None} for row in rows]}
    assert verdict_of(nothing) == "At 50 % of the units no method leaves a perplexity that is a finite number."
    for number, content in enumerate((broken, nothing)):
        run = RunFolder.create(tmp_path / str(number), {"room": "prune", "method": "sweep()", "settings": {}})
        write_json(run.summary, content)
        assert "<svg" in write_report(run.path, describe).read_text()


def test_a_sweep_that_is_not_finished_says_so(tmp_path: Path):
    run = RunFolder.create(tmp_path / "half", {"room": "prune", "method": "sweep()", "settings": {}})
    run.append_metrics({"kind": "measurement", "step": 0})
    assert "The sweep is not finished: 1 models are measured." in write_report(run.path, describe).read_text()


def test_the_verdict_names_the_smallest_model_near_the_whole_one_or_says_that_there_is_none(finished: Path):
    summary = json.loads((finished / "summary.json").read_text())
    whole = summary["whole"]["perplexity"]
    near = [row | {"perplexity": whole * (1.05 if row["keep"] > 0.3 else 1.5)} for row in summary["measurements"]]
    assert "The smallest within 10 % of the whole model is ghost at 50 %." in verdict_of(summary | {"measurements": near})
    far = [row | {"perplexity": 2 * whole} for row in near]
    assert "None is within 10 % of the whole model" in verdict_of(summary | {"measurements": far})
