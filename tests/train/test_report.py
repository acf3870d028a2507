"""What the report of a training shows, and when."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from partwise.atomic_files import read_json, write_json
from partwise.report import write_report
from partwise.runs import RunFolder
from partwise.train import _figures as figures
from partwise.train._report import describe, format_speed, verdict_of
from report_page import Page
from stopped_runs import Killed
from train_runs import ROUNDS, kill_at, run_small, write_rows

ALL_SECTIONS = ["Tickets", "Learning curve", "Coverage", "Traffic", "Part ledger", "Settings"]
OKABE_ITO = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.npz")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    run_small("ist", out, data=rows, command=["partwise", "train", "--data", "a b.npz"])
    return out


def test_a_finished_run_shows_every_section_and_its_headline_numbers(finished: Path):
    page, summary = Page(finished / "report.html"), read_json(finished / "summary.json")
    assert page.inside("h2") == ALL_SECTIONS
    shown = page.inside("dd")
    assert f"{summary['tickets'][0]['metric']:.4g}" in shown
    cells = page.inside("td")
    for row in summary["tickets"]:
        assert f"{row['num_parameters']:,}" in cells
        assert Path(row["folder"]).relative_to(finished / "result").as_posix() in cells
    assert f"After {ROUNDS} rounds the whole model has a test accuracy of" in page.source
    assert "partwise train --data &#39;a b.npz&#39;" in page.source
    assert f"12 parts in {ROUNDS} rounds: 12 kept." in page.source
    assert "round 6" in page.source
    assert "All parts trained in one process" in page.source
    assert "Data-parallel training of the same steps would have moved" in page.source


def test_every_drawing_of_the_page_can_be_read_aloud(finished: Path):
    labels = [drawing["aria-label"] or "" for drawing in Page(finished / "report.html").named("svg")]
    for words in ("tickets of 4 sizes", "loss after split", "share of the units", "how often each unit", "bytes sent to the parts", "every part"):
        assert any(words in label for label in labels), words


def test_the_page_has_the_look_of_every_report_and_runs_nothing(finished: Path):
    page = Page(finished / "report.html")
    drawings = "".join(re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= OKABE_ITO
    assert not re.search(r"\b(black|white)\b", drawings)
    assert not {"script", "link", "img"} & {tag for tag, _ in page.tags}
    assert "mathdefault" not in page.source
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_run_that_was_stopped_shows_how_far_it_came(tmp_path: Path, rows: Path):
    with pytest.raises(Killed):
        run_small("ist", tmp_path / "half", data=rows, report=kill_at(4))
    RunFolder(tmp_path / "half").set_status("interrupted")
    page = Page(write_report(tmp_path / "half", describe))
    assert page.inside("h2") == ["Learning curve", "Coverage", "Traffic", "Part ledger", "Settings"]
    assert "interrupted, at round 4" in page.inside("span")
    assert "The run is not finished." in page.source
    assert f"8 parts in {4} rounds: 8 kept." in page.source


def test_an_asynchronous_run_counts_arrivals(tmp_path: Path, rows: Path):
    run_small("ist", tmp_path / "run", data=rows, mode="async", num_rounds=2)
    page = Page(tmp_path / "run" / "report.html")
    assert ">arrival<" in page.source
    assert "in 4 arrivals" in page.source


def test_a_method_that_splits_nothing_has_one_size_and_no_map_of_units(tmp_path: Path, rows: Path):
    run_small("local-sgd", tmp_path / "run", data=rows, num_rounds=2)
    page = Page(tmp_path / "run" / "report.html")
    assert page.inside("h2") == ALL_SECTIONS
    assert "splits nothing" in page.source
    assert "how often each unit" not in page.source


def test_what_went_over_the_wire_and_wrong_is_shown(tmp_path: Path, finished: Path):
    run = RunFolder.create(tmp_path / "ray", {"room": "train", "settings": {}})
    for row in RunFolder(finished).metrics():
        run.append_metrics(row | {"wire": {"bytes_down": 1000, "bytes_up": 500}})
    wire = {"bytes_down": 6000, "bytes_up": 3000}
    write_json(run.summary, read_json(finished / "summary.json") | {"wire": wire, "mishaps": {"lost": 2, "placed_bytes": 77}, "num_lost": 2})
    page = Page(write_report(run.path, describe))
    assert "On the wire it was 6.0 kB and 3.0 kB" in page.source
    cells = page.inside("td")
    assert "lost" in page.inside("th")
    assert "2" in cells
    assert "placed" not in page.source
    assert "2 results of parts were lost" in page.source


def test_the_verdict_names_units_that_were_never_trained(finished: Path):
    summary = read_json(finished / "summary.json")
    assert "never trained" not in verdict_of(summary, ())
    holders = {name: [0, *units[1:]] for name, units in summary["holders"].items()}
    assert "2 units were never trained: raise --num-rounds." in verdict_of(summary | {"holders": holders}, ())


def test_the_map_of_units_has_a_row_for_every_axis_and_says_the_least_and_the_most():
    drawing = figures.holders({"layers.0.mlp": [1, 2, 3, 4], "layers.1.mlp": [5, 5, 5, 5], "layers.2.mlp": [0, 4, 4, 4]})
    assert ">1 to 4<" in drawing
    assert ">5<" in drawing
    assert "layers.2.mlp, unit 0: 0 times" in drawing
    assert "from 0 to 5 times" in drawing


def test_many_units_share_a_cell_and_large_maps_stay_small():
    drawing = figures.holders({f"layers.{layer}.mlp": [layer + unit % 7 for unit in range(4096)] for layer in range(48)})
    assert len(drawing) < 400_000
    assert "layers.0.mlp, units 0 to " in drawing


def test_rounds_in_which_nothing_was_measured_leave_gaps_and_many_are_thinned():
    rounds: Any = [(step, 3.0, None if step % 2 else 2.0, 2.5) for step in range(1, 5001)]
    drawing = figures.learning(rounds, [(1, 3.1), (5000, 2.6)])
    assert len(drawing) < 200_000
    assert "nan" not in drawing
    only_merge = figures.learning([(1, None, None, 2.0)], [])
    assert ">after the merge<" in only_merge
    assert ">after the split<" not in only_merge


def test_coverage_goes_from_bars_to_an_area_where_there_are_many_rounds():
    few, many = ([(step, 0.5) for step in range(1, number + 1)] for number in (5, 2000))
    assert len(figures.coverage(many)) < 100_000
    assert "share of the units" in figures.coverage(few)


@pytest.mark.parametrize(("speed", "expected"), [(99_487.3, "99,487"), (213.96, "214"), (12.345, "12.35"), (0.5, "0.5")])
def test_speeds_have_no_exponents(speed: float, expected: str):
    assert format_speed(speed) == expected
