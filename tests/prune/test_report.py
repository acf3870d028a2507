"""The report of a pruning, and texts that terminal and model card share with it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from partwise.atomic_files import write_json
from partwise.cli import main
from partwise.prune._report import comparison_cells, describe, format_change, kept_of, total_cells, verdict_of
from partwise.prune._terminal import summary_parts
from partwise.report import write_report
from partwise.runs import RunFolder
from prune_runs import decode_nothing, run_small, write_llama, write_mamba2
from report_page import Page
from serve_models import write_words

HEADER = {"room": "prune", "method": "GHOST()", "settings": {}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("partwise.prune._measuring.decode_speeds", decode_nothing)
        run_small("ghost", folder / "run", model=write_mamba2(folder / "model"), calibration=write_words(folder / "words", num_files=12, num_words=60))
    return folder / "run"


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Heads and neurons of a Llama, by a method whose scores are random numbers."""
    folder = tmp_path_factory.mktemp("heads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("partwise.prune._measuring.decode_speeds", decode_nothing)
        source = {"model": write_llama(folder / "model"), "calibration": write_words(folder / "words", num_files=12, num_words=60)}
        return run_small("random", folder / "run", kinds=("heads", "neurons"), **source)


def with_summary(path: Path, summary: dict[str, Any]) -> Page:
    run = RunFolder.create(path, HEADER)
    write_json(run.summary, summary)
    return Page(write_report(run.path, describe))


def test_the_report_shows_before_and_after_and_every_layer_and_is_drawn_again_from_the_run(finished: Path, capsys: pytest.CaptureFixture[str]):
    first = (finished / "report.html").read_text()
    assert main(["report", str(finished)]) == 0
    assert capsys.readouterr().out.strip() == str(finished / "report.html")
    assert (finished / "report.html").read_text() == first
    page, summary = Page(finished / "report.html"), json.loads((finished / "summary.json").read_text())
    assert page.inside("h2") == ["Before and after", "Part ledger", "Settings"]
    assert [drawing["aria-label"] for drawing in page.named("svg")] == [
        "share of the scores that the best units hold, in 3 layers",
        "every part, by module, with what happened to it",
    ]
    for cell in ("12", "24", f"{summary['after']['num_parameters']:,}", "-50.0 %"):
        assert cell in page.inside("td")
    assert page.inside("dt") == ["perplexity", "a sequence holds", "weights", "tokens per second", "decided in"]
    text = page.source.replace("&#34;", '"')
    assert f'AutoModelForCausalLM.from_pretrained("{finished}/result/model")' in text
    assert "States are a small part of the weights." in text
    assert "mathdefault" not in page.source
    assert not {"script", "link", "img"} & {tag for tag, _ in page.tags}


def test_units_of_several_kinds_are_counted_by_kind(heads: dict[str, Any]):
    assert total_cells(heads)[:4] == ["total", "", "", ""]
    assert kept_of(heads) == "4 of 8 heads and 24 of 48 neurons"
    assert verdict_of(heads).startswith("4 of 8 heads and 24 of 48 neurons stay. Weights: ")
    assert "Memory of a sequence: 262.1 kB to 131.1 kB (-50.0 %)." in verdict_of(heads)
    names = [cells[0] for cells in comparison_cells(heads)]
    assert names == ["perplexity", "parameters", "weights, float32", "a sequence holds, float32", "tokens per second"]


def test_a_model_with_many_layers_or_units_has_a_small_page_and_a_short_terminal(finished: Path, tmp_path: Path):
    summary = json.loads((finished / "summary.json").read_text())
    many = [summary["layers"][0] | {"where": f"backbone.layers.{number}.mixer.state"} for number in range(80)]
    page = with_summary(tmp_path / "run", summary | {"layers": many, "ledger": []})
    assert "Show all 80 layers" in page.inside("summary")
    assert len(page.named("svg")) == 1
    assert len(page.source) < 200_000
    console = Console(width=100, record=True, file=io.StringIO())
    for part in summary_parts(summary | {"layers": many}):
        console.print(part)
    said = console.export_text()
    assert "what stayed of each of 80 layers is in the report" in said
    assert "mixer.state" not in said


def test_scores_that_do_not_add_up_draw_no_lines(finished: Path, tmp_path: Path):
    summary = json.loads((finished / "summary.json").read_text())
    layers = [row | {"curve": [], "share": None} for row in summary["layers"]]
    page = with_summary(tmp_path / "run", summary | {"layers": layers, "ledger": []})
    assert "The method gives no scores that could be added up." in page.source
    assert not page.named("svg")


def test_a_perplexity_that_is_no_number_is_said_in_words(finished: Path, tmp_path: Path):
    summary = json.loads((finished / "summary.json").read_text())
    summary["after"]["perplexity"] = None
    assert verdict_of(summary).endswith("Perplexity is no finite number.")
    assert comparison_cells(summary)[0][2:] == ["-", "-"]
    assert with_summary(tmp_path / "run", summary)


def test_a_run_that_is_not_finished_says_how_far_it_is(tmp_path: Path):
    run = RunFolder.create(tmp_path / "half", HEADER)
    run.append_metrics({"kind": "axis", "step": 1, "where": "a", "seconds": 1.0})
    page = write_report(run.path, describe).read_text()
    assert "The run is not finished: 1 axes are decided." in page
    assert "running, at axis 1" in page


def test_changes_are_told_in_percent_or_times():
    assert format_change({"x": 10}, {"x": 600}, "x") == "60 times"
    assert format_change({"x": 10}, {"x": 60}, "x") == "+500.0 %"
    assert format_change({"x": None}, {"x": 1}, "x") == "-"
