from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from fake_run import bert_names, llama_names, make_run
from partwise.atomic_files import read_json, write_json
from partwise.checks import InputError, MissingExtra, RunError
from partwise.figures import part_map, thinned
from partwise.ledger import Ledger, Part
from partwise.report import format_bytes, format_metric, format_seconds, ledger_markdown, ledger_table
from partwise.report import write_report as write_page
from partwise.runs import RunFolder
from partwise.tune import _figures as figures
from partwise.tune._figures import Point
from partwise.tune._report import describe
from report_page import Page

ALL_SECTIONS = ["Rank map", "Growth over time", "Loss", "Quality against kept rank", "Sizes", "Part ledger", "Settings"]
OKABE_ITO = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442"}


def write_report(path: Path) -> Path:
    return write_page(path, describe)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "compared", num_steps=80, compare=["adapad", "lora", "lora, cut by SVD", "adalora"])
    return write_report(run.path)


def test_a_finished_run_shows_every_section_and_its_headline_numbers(compared: Path) -> None:
    page, summary = Page(compared), read_json(compared.parent / "summary.json")
    assert page.inside("h2") == ALL_SECTIONS
    assert page.inside("h1") == ["compared"]
    shown = page.inside("dd")
    for value in (format_metric(summary["metric_after"]), format_bytes(summary["saved_bytes"]), str(sum(summary["ranks"].values())), "3 min 12 s"):
        assert value in shown
    assert f"On held-out rows accuracy rose from 0.0612 to {format_metric(summary['metric_after'])}." in page.source
    assert all(
        text in page.source for text in ("lora, cut by SVD", "one standard deviation", "partwise tune adapad --target-r 2 --out &#39;runs/a b&#39;")
    )


def test_the_page_runs_no_script_and_loads_nothing(compared: Path) -> None:
    page = Page(compared)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in {"src", "srcset", "data", "action", "background"}]
        assert (attributes.get("href") or "#").startswith("#")
    assert set(re.findall(r"url\(([^)]?)", page.source)) <= {"#"}
    assert "@import" not in page.source
    assert "://" not in page.source
    policy = next(meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_ids_are_unique_and_every_reference_finds_one(compared: Path) -> None:
    page = Page(compared)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = [href.removeprefix("#") for _, attributes in page.tags if (href := attributes.get("href"))]
    references += re.findall(r"url\(#([^)]*)\)", page.source)
    references += [str(attributes["aria-labelledby"]) for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert set(references) <= set(ids)
    assert len(references) > 20


def test_figures_tables_and_the_page_can_be_read_aloud(compared: Path) -> None:
    page = Page(compared)
    drawings = page.named("svg")
    assert len(drawings) == 6
    assert all(drawing["role"] == "img" and len(drawing["aria-label"] or "") > 20 for drawing in drawings)
    assert len(page.named("table")) == len(page.named("caption")) == len(page.inside("caption"))
    assert all(header.get("scope") in {"col", "row", "rowgroup"} for header in page.named("th"))
    assert page.named("html") == [{"lang": "en"}]
    assert page.inside("title")[0] == "compared - partwise report"


def test_figures_follow_light_and_dark_and_use_only_the_colours_of_okabe_and_ito(compared: Path) -> None:
    source = compared.read_text(encoding="utf-8")
    drawings = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= OKABE_ITO
    assert not re.search(r"\b(black|white)\b", drawings)
    assert "currentColor" in drawings
    used = set(re.findall(r"var\((--[a-z-]+)\)", source))
    light, dark = re.findall(r":root \{(.*?)\}", source, flags=re.DOTALL)
    assert used <= set(re.findall(r"(--[a-z-]+):", light))
    assert {"--page", "--paper", "--ink", "--muted", "--grid", "--blue"} <= set(re.findall(r"(--[a-z-]+):", dark))


def test_every_module_has_its_cell_and_the_cell_tells_its_rank() -> None:
    ranks = {name: index % 4 for index, name in enumerate(bert_names(2))} | {"classifier": 2}
    drawing = figures.rank_map(ranks)
    assert re.findall(r"<title>(.*?)</title>", drawing) == [f"{name}: rank {rank}" for name, rank in ranks.items()]


def test_the_same_run_gives_the_same_bytes(compared: Path) -> None:
    before = compared.read_bytes()
    assert write_report(compared.parent) == compared
    assert compared.read_bytes() == before
    assert not [path for path in compared.parent.iterdir() if path.name.startswith(".tmp")]


@pytest.mark.slow
def test_a_report_on_hundreds_of_modules_stays_small_and_folds_its_table(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "large", names=[*llama_names(43), "lm_head"], num_steps=400, compare=["adapad", "lora"]).path)
    page = Page(path)
    assert path.stat().st_size < 400_000
    assert page.inside("summary") == ["Show the table of 302 modules"]
    assert "Outside the layers" in page.inside("th")


def test_a_run_that_was_interrupted_shows_how_far_it_came(tmp_path: Path) -> None:
    run = make_run(tmp_path / "half", num_steps=40, finished=False)
    run.set_status("interrupted")
    page = Page(write_report(run.path))
    assert page.inside("h2") == ["Rank map", "Growth over time", "Loss", "Settings"]
    assert "interrupted, at step 24" in page.inside("span")
    assert "at step 20. The run is not finished." in page.source


def test_ranks_that_never_change_have_no_growth_section(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "lora", num_steps=20, grows=False).path))
    assert page.inside("h2") == [title for title in ALL_SECTIONS if title != "Growth over time"]


def test_a_run_that_only_began_still_has_a_report(tmp_path: Path) -> None:
    page = Page(write_report(RunFolder.create(tmp_path / "new", {"room": "prune", "method": "Magnitude()", "settings": {}}).path))
    assert page.inside("h2") == ["Settings"]
    assert "running, at step 0" in page.inside("span")


def test_names_from_outside_are_shown_and_never_run(tmp_path: Path) -> None:
    hostile = "layer.0.<script>alert('$x_1$')</script>&\"q"
    run = RunFolder.create(tmp_path / "<b>run", {"method": "<img src=x onerror=alert(1)>", "settings": {"a": "<svg onload=alert(1)>"}})
    run.append_metrics({"kind": "growth", "step": 0, "ranks": {hostile: 1}})
    run.append_metrics({"kind": "growth", "step": 5, "ranks": {hostile: 2}})
    part = Part(where=hostile, index=0, parameters=1, bytes=4, score=None, status="lost")
    point = {"rank": 1, "metric": 0.5, "parameters": 1, "bytes": 4}
    summary = {"metric_name": "</svg><script>", "metric_before": 0.5, "metric_after": 0.5, "ledger": [part.__dict__], "kept_rank_curve": [point]}
    write_json(run.summary, summary)
    page = Page(write_report(run.path))
    assert not {"script", "img", "b"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert any("$x_1$" in text for text in page.inside("title")), "no mathematics is read into names"


def test_steps_and_metrics_without_a_number_are_left_out(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "diverged", {"method": "LoRA()", "settings": {}})
    for step, loss in enumerate([1.0, float("nan"), float("inf"), 2.0]):
        run.append_metrics({"kind": "train", "step": step, "loss": loss})
    write_json(
        run.summary, {"metric_name": "pearson", "metric_before": float("nan"), "metric_after": 0.5, "kept_rank_curve": [{"rank": 1, "metric": None}]}
    )
    page = Page(write_report(run.path))
    assert page.inside("h2") == ["Loss", "Settings"]
    assert "nan" not in page.source


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path)


def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"settings": {}})
    run.summary.write_text("{")
    with pytest.raises(RunError, match=r"summary\.json is damaged"):
        write_report(run.path)
    assert not run.report.exists()


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_names_the_extra(compared: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=rf"{library}.* is not installed.*pip install 'partwise\[report\]'"):
        write_report(compared.parent)


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="figures are drawn by matplotlib")
    before = dict(matplotlib.rcParams)
    figures.rank_map({"a": 1})
    assert dict(matplotlib.rcParams) == before


def curve(*metrics: float) -> list[Point]:
    return [Point(rank, metric, 10 * rank, 40 * rank) for rank, metric in enumerate(metrics, start=1)]


def test_the_level_before_training_is_drawn_only_where_it_does_not_flatten_the_curves() -> None:
    near = figures.quality({"lora": [curve(0.6, 0.8)]}, metric_name="accuracy", before=0.5)
    far = figures.quality({"lora": [curve(0.79, 0.8)]}, metric_name="accuracy", before=0.0)
    assert "before training" in near
    assert "before training" not in far


def test_several_seeds_are_drawn_with_a_band_and_one_seed_without() -> None:
    band = "fill-opacity: 0.16"
    assert band in figures.quality({"lora": [curve(0.6, 0.8), curve(0.7, 0.8)]}, metric_name="accuracy")
    assert band not in figures.quality({"lora": [curve(0.6, 0.8)]}, metric_name="accuracy")


def test_many_kinds_of_modules_are_taken_together_beyond_the_colours() -> None:
    ranks = {f"layers.0.kind_{index}": index + 1 for index in range(9)}
    drawing = figures.growth([(0, dict.fromkeys(ranks, 1)), (5, ranks)], num_steps=10)
    legend = [kind for kind in re.findall(r">(kind_\d|others)</text>", drawing) if kind]
    assert legend == ["kind_8", "kind_7", "kind_6", "kind_5", "kind_4", "kind_3", "others"]


@pytest.mark.parametrize(
    "names",
    [["q"], ["0"], ["x" * 300], [f"layers.{layer}.{'y' * 90}.q" for layer in range(3)], ["a.layers.0.q", "b.layers.0.q"]],
    ids=["no layers", "a bare number", "a long name", "long kinds", "two towers"],
)
def test_models_of_any_shape_are_drawn_inside_the_figure(names: list[str]) -> None:
    ledger = ledger_of(names, num_parts=30)
    ranks = dict.fromkeys(names, 30)
    for drawing in (figures.rank_map(ranks), part_map(ledger), figures.growth([(0, dict.fromkeys(names, 1)), (3, ranks)], num_steps=9)):
        width = float(ElementTree.fromstring(drawing).attrib["viewBox"].split()[2])
        right_edges = [float(left) + float(size) for left, size in re.findall(r"M([\d.]+) [\d.]+h([\d.]+)v", drawing)]
        assert right_edges
        assert 0 < max(right_edges) <= width


def test_huge_models_show_parts_by_layer() -> None:
    names = [f"model.layers.{layer}.experts.{expert}.up" for layer in range(8) for expert in range(60)]
    drawing = part_map(ledger_of(names, num_parts=1))
    assert re.findall(r">(layer \d)</text>", drawing) == [f"layer {layer}" for layer in range(8)]


@pytest.mark.parametrize("num_points", [1, 2, 7, 401, 5000])
def test_thinning_keeps_the_mean_and_bounds_the_number_of_points(num_points: int) -> None:
    points = [(step, float(step % 5)) for step in range(num_points)]
    thin = thinned(points, num_points=400)
    assert len(thin) <= 400
    size = -(-num_points // 400)
    full = points[: len(points) // size * size]
    assert sum(value for _, value in thin[: len(full) // size]) * size == pytest.approx(sum(value for _, value in full))


def test_smoothing_has_no_bias_towards_the_start() -> None:
    assert [value for _, value in figures.smoothed([(step, 3.0) for step in range(90)])] == pytest.approx([3.0] * 90)


def test_a_stretch_of_equal_ranks_is_one_bar() -> None:
    assert figures.stretches([(0, 0), (2, 1), (4, 1), (6, 3)], 10) == [(2, 6, 1), (6, 10, 3)]


def printed(ledger: Ledger, **options: Any) -> list[str]:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(ledger_table(ledger, **options))
        return [line.rstrip() for line in console.export_text().splitlines()]


def ledger_of(names: list[str], num_parts: int = 2) -> Ledger:
    return Ledger(
        tuple(
            Part(where=name, index=index, parameters=768, bytes=3072, score=0.25 * (index + 1), status="grown" if index else "kept")
            for name in names
            for index in range(num_parts)
        )
    )


def test_the_terminal_shows_every_module_on_one_line_of_80_columns() -> None:
    lines = printed(ledger_of(bert_names()))
    rows = [line.split() for line in lines if line.startswith("   ")]
    assert [row[0] for row in rows] == [name.split(".", 3)[3] for name in bert_names()]
    assert rows[0][1:] == ["2", "0.7500", "1,536", "6.1", "kB", "kept:1", "grown:1"]
    assert [line.strip() for line in lines if line.startswith(" layer")] == [f"layer {layer}" for layer in range(6)]
    assert next(line for line in lines if "total" in line).split()[:9] == ["total", "of", "36", "modules", "72", "27.00", "55,296", "221.2", "kB"]


def test_the_terminal_shows_layers_when_the_modules_are_too_many() -> None:
    lines = printed(ledger_of([*llama_names(40), "lm_head"]))
    rows = [line.strip() for line in lines if line.startswith((" layer", " lm_head"))]
    assert len(rows) == 41
    assert rows[39].split() == ["layer", "39", "(7", "modules)", "14", "5.250", "10,752", "43.0", "kB", "kept:7", "grown:7"]
    assert rows[40].split() == ["lm_head", "2", "0.7500", "1,536", "6.1", "kB", "kept:1", "grown:1"]
    assert len(lines) < 50


def test_brackets_in_a_module_name_are_no_markup() -> None:
    assert any("[bold]q" in line for line in printed(ledger_of(["layer.0.[bold]q"])))


def test_the_model_card_lists_every_module_and_the_total() -> None:
    lines = ledger_markdown(ledger_of(["a.0.q", "a|b"], num_parts=1)).splitlines()
    assert lines == [
        "| module | rank | score | parameters | bytes | status |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        "| `a.0.q` | 1 | 0.2500 | 768 | 3,072 | 1 kept |",
        r"| `a\|b` | 1 | 0.2500 | 768 | 3,072 | 1 kept |",
        "| **total** | **2** | **0.5000** | **1,536** | **6,144** | **2 kept** |",
    ]


def test_an_empty_ledger_is_a_table_without_rows() -> None:
    assert ledger_markdown(Ledger(())).splitlines()[2:] == ["| **total** | **0** | - | **0** | **0** | - |"]
    assert any("total of 0 modules" in line for line in printed(Ledger(())))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_bytes(999), "999 bytes"),
        (format_bytes(1_000), "1.0 kB"),
        (format_bytes(2_500_000_000), "2.5 GB"),
        (format_metric(12.3456), "12.35"),
        (format_seconds(59.94), "59.9 s"),
        (format_seconds(59.96), "1 min 0 s"),
        (format_seconds(3599.7), "1 h 0 min"),
    ],
)
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text == expected
