"""What the report of a decomposition shows, and when."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matrices import matrix_with
from partwise.atomic_files import read_json, write_json
from partwise.decompose import _figures as figures
from partwise.decompose._report import describe, verdict_of
from partwise.decompose.job import decompose
from partwise.report import write_report
from partwise.runs import RunFolder
from report_page import Page

ALL_SECTIONS = ["Eigenvalues", "Convergence", "First two components", "Part ledger", "Settings"]
OKABE_ITO = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442"}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "matrix.npy"
    np.save(path, matrix_with([9.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5], rows=60, columns=8))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, matrix: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    decompose("parallel-deflation-pca", matrix, {"n_components": 3}, out=out, command=["partwise", "decompose", "a b.npy"])
    return out


def small(matrix: Path, out: Path, **settings: Any) -> Page:
    decompose("parallel-deflation-pca", matrix, {"n_components": 3, "num_rounds": 10} | settings, out=out)
    return Page(out / "report.html")


def test_a_finished_run_shows_every_section_and_its_headline_numbers(finished: Path):
    page, summary = Page(finished / "report.html"), read_json(finished / "summary.json")
    assert page.inside("h2") == ALL_SECTIONS
    shown = page.inside("dd")
    assert f"{100 * summary['share']:.1f} %" in shown
    assert "passed" in shown
    assert f"{summary['components'][0]['upper']:.10g}" in page.source
    assert "partwise decompose &#39;a b.npy&#39;" in page.source
    assert "Every point is a row of the data." in page.source
    assert "No larger eigenvalue was missed" in page.source


def test_the_page_has_the_look_of_every_report_and_runs_nothing(finished: Path):
    page = Page(finished / "report.html")
    drawings = "".join(re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= OKABE_ITO
    assert not re.search(r"\b(black|white)\b", drawings)
    assert not {"script", "link", "img"} & {tag for tag, _ in page.tags}
    assert "mathdefault" not in page.source, "powers of ten are written so that a browser reads them"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_run_that_was_interrupted_shows_how_far_it_came(tmp_path: Path, matrix: Path):
    def stop(phase: str, done: int, total: int, note: str) -> None:
        if done == 6:
            raise OSError("stopped")

    with pytest.raises(OSError, match="stopped"):
        decompose("parallel-deflation-pca", matrix, {"n_components": 3, "tol": 0.0}, out=tmp_path / "half", report=stop)
    RunFolder(tmp_path / "half").set_status("interrupted")
    page = Page(write_report(tmp_path / "half", describe))
    assert page.inside("h2") == ["Convergence", "Settings"]
    assert "interrupted, at round 6" in page.inside("span")
    assert "The run is not finished." in page.source


def test_learning_from_batches_is_shown_by_the_estimates(tmp_path: Path, matrix: Path):
    page = small(matrix, tmp_path / "batches", solver="hebb", batch_size=20)
    assert "Vectors were learned from batches" in page.source
    assert "estimated eigenvalue of each component against rounds" in page.source


def test_an_asynchronous_run_counts_publications(tmp_path: Path, matrix: Path):
    page = small(matrix, tmp_path / "async", mode="async", num_rounds=40)
    assert ">publication<" in page.source
    assert (tmp_path / "async" / "result" / "schedule.json").exists()


def test_one_component_has_no_plane_to_show(tmp_path: Path, matrix: Path):
    assert "First two components" not in small(matrix, tmp_path / "one", n_components=1).inside("h2")


def test_bytes_are_shown_by_worker_and_by_round_with_what_went_wrong(tmp_path: Path, finished: Path):
    run = RunFolder.create(tmp_path / "ray", {"room": "decompose", "settings": {}})
    for step in (1, 2):
        run.append_metrics({"kind": "round", "step": step, "values": [1.0], "residuals": [0.1], "traffic": [[0, 1000, 500], [1, 2000, 600]]})
    write_json(run.summary, read_json(finished / "summary.json") | {"traffic": {"lost": 3, "late": 0, "placed_bytes": 4000}})
    page = Page(write_report(run.path, describe))
    assert "Traffic" in page.inside("h2")
    assert "6.0 kB to the workers and 2.2 kB back, in 2 rounds. The data and the method, 4.0 kB, were put once" in page.source
    cells = page.inside("td")
    assert [cells[index + 1 : index + 3] for index, cell in enumerate(cells) if cell == "2"][:2] == [["2,000", "1,000"], ["4,000", "1,200"]]
    assert cells[-2:] != ["late", "0"]
    assert "lost" in page.inside("th")
    assert "late" not in page.inside("th")


def test_a_missed_eigenvalue_is_the_headline(finished: Path):
    summary = read_json(finished / "summary.json")
    test = summary["missed_value_test"] | {"passed": False, "probe_value": 8.25, "smallest_kept": 5.0}
    assert "An eigenvalue WAS MISSED: outside of the components found there is one of at least 8.25" in verdict_of(summary | {"missed_value_test": test})
    unsure = summary["missed_value_test"] | {"missable": 0.7}
    assert "could still be hidden" in verdict_of(summary | {"missed_value_test": unsure})
    assert "not every component is within the tolerance" in verdict_of(summary | {"converged": False})
    assert "rounds the largest residual is" in verdict_of(summary | {"converged": False, "tol": 0.0})  # nobody asked for a tolerance


@pytest.mark.parametrize(("values", "is_logarithmic"), [([3.0, 2.0, 1.0], False), ([1000.0, 10.0, 1.0], True), ([2.0, 1.0, 0.0], False), ([1.0], False)])
def test_eigenvalues_of_many_sizes_go_on_a_logarithmic_axis(values: list[float], is_logarithmic: bool):
    drawing = figures.scree(values, [(value - 0.5, value + 0.5) for value in values], [value / sum(values) for value in values])
    assert (">1000<" in drawing) == is_logarithmic


def test_many_components_share_one_colour_and_many_rounds_are_thinned():
    rounds = [(step, [10.0 ** -(step / 100) if step >= index else None for index in range(30)]) for step in range(1, 5001)]
    drawing = figures.convergence(rounds, tol=1e-6)
    assert len(drawing) < 400_000
    assert re.findall(r">(component \d+)</text>", drawing) == ["component 1", "component 30"]


def test_a_component_that_is_exact_stays_on_the_axis():
    drawing = figures.convergence([(1, [0.5, None]), (2, [0.0, 0.0])], tol=None)
    assert "nan" not in drawing
    assert "tolerance" not in drawing
