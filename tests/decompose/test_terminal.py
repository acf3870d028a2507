"""How a decomposition looks in the terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from partwise.decompose._terminal import MANY_COMPONENTS, summary_parts


def a_summary(num_components: int = 2, **changes: Any) -> dict[str, Any]:
    rows = [
        {"component": number, "value": 10.0 / number, "share": 0.5 / num_components, "residual": 1e-7, "lower": 10.0 / number - 1e-5, "upper": 10.0 / number}
        for number in range(1, num_components + 1)
    ]
    parts = [
        {"where": "worker 0", "index": index, "parameters": 4, "bytes": 32, "score": 0.1, "status": "kept"} for index in range(num_components)
    ]
    return {
        "method": "parallel-deflation-pca",
        "data": "[bold]x.npy",
        "num_samples": 1000,
        "num_features": 4,
        "components": rows,
        "ledger": parts,
        "share": 0.5,
        "worst_residual": 1e-8,
        "converged": True,
        "num_rounds": 1234,
        "missed_value_test": {"passed": True, "probe_value": 1.0, "smallest_kept": 5.0, "missable": 1e-9, "num_products": 40},
        "warnings": [],
        "traffic": {"bytes_down": 0, "bytes_up": 0, "placed_bytes": 0, "lost": 0},
        "seconds": 7.25,
        "result": "runs/x/result",
        "report": None,
        "run": "runs/x",
    } | changes


def printed(summary: dict[str, Any]) -> str:
    console = Console(width=80, file=io.StringIO(), record=True, highlight=False)
    for part in summary_parts(summary):
        console.print(part, soft_wrap=True)
    return console.export_text()


def test_every_component_is_a_line_with_the_largest_distance_to_an_end_of_its_interval():
    lines = printed(a_summary()).splitlines()
    assert next(line for line in lines if line.strip().startswith("2")).split() == ["2", "5", "1.0e-05", "25.00", "%", "1.0e-07", "worker", "0", "kept"]
    assert any(line.split() == ["total", "50.00", "%"] for line in lines)


def test_a_component_that_the_data_lack_has_no_numbers():
    summary = a_summary()
    summary["components"].pop()
    summary["ledger"][1] |= {"status": "dropped", "score": None}
    assert any(line.split() == ["2", "-", "-", "-", "-", "worker", "0", "dropped"] for line in printed(summary).splitlines())


def test_many_components_are_cut_short_and_the_table_of_all_is_named():
    lines = printed(a_summary(100)).splitlines()
    assert sum("kept" in line for line in lines) == MANY_COMPONENTS
    assert any("the first 40; all 100 are in eigenvalues.csv" in line for line in lines)


def test_bytes_and_faults_are_said_where_there_were_workers():
    assert "traffic" not in printed(a_summary())
    sent = {"bytes_down": 2000, "bytes_up": 1000, "placed_bytes": 32_000, "lost": 2, "late": 0, "reissued": 3}
    assert "traffic: 2.0 kB to the workers, 1.0 kB back, 32.0 kB of data once for all; 2 lost, 3 reissued" in printed(a_summary(traffic=sent))


def test_warnings_names_and_files_are_shown_as_they_are():
    said = printed(a_summary(warnings=["known less well than tol asks for"]))
    assert "warning: known less well than tol asks for" in said
    assert "parallel-deflation-pca of [bold]x.npy: 1,000 rows, 4 features; 50.0 % of the variance" in said
    assert "1,234 rounds took 7.2 s" in said
    assert "report   not drawn" in said
