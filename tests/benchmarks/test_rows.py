from __future__ import annotations

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import rows
from rows import Row, append, latest, read

ROOT = Path(__file__).parents[2]
FACTS: dict[str, Any] = {
    "claim": "two parts are as good as one", "method": "Parts(num_parts=2)", "values": (0.5, 0.75), "unit": "accuracy", "seeds": (0, 1), "seconds": 1.5,
    "baseline": "Whole()", "baseline_values": (0.5, 0.5), "paper": "0.8 on other data", "expected": "at least the baseline", "held": True,
}  # fmt: skip


def test_a_row_comes_back_as_it_was_written(tmp_path: Path):
    row = Row(**FACTS)
    append("some_claim", row, folder=tmp_path / "new")
    assert read("some_claim", folder=tmp_path / "new") == [row]


def test_rows_written_at_the_same_time_all_arrive_whole(tmp_path: Path):
    facts = [FACTS | {"note": "x" * 5000, "claim": str(index)} for index in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda fact: append("busy", Row(**fact, commit="c", machine="m"), folder=tmp_path), facts))
    assert sorted(int(row.claim) for row in read("busy", folder=tmp_path)) == list(range(24))


def test_a_row_knows_its_commit_and_machine():
    row = Row(**FACTS)
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", row.commit)
    assert re.fullmatch(r"[\d.]+ CPU cores, \d+ GiB, \w+", row.machine)


def test_outside_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert rows.current_commit() == "unknown"


def test_the_newest_row_of_a_claim_replaces_the_older_one_in_its_place():
    first, other, second = Row(**FACTS), Row(**FACTS | {"claim": "other"}), Row(**FACTS | {"seconds": 9.0})
    assert latest([first, other, second]) == [second, other]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": (0.5,)}, "got 1 values for 2 seeds"),
        ({"values": (), "seeds": ()}, "got 0 values for 0 seeds, expected one per seed and at least one"),
        ({"baseline_values": (0.5,)}, "got 1 baseline_values for 2 seeds"),
        ({"baseline": ""}, "values without a baseline"),
        ({"values": (0.5, float("nan"))}, "got NaN or an infinite value"),
    ],
)
def test_a_row_that_would_mislead_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Row(**FACTS | change)


def test_committed_rows_are_readable_and_have_a_program():
    for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        assert (ROOT / "benchmarks" / f"{path.stem}.py").exists(), f"{path.name} was written by no program that is here"
        for line in path.read_text().splitlines():
            assert set(json.loads(line)) == {field.name for field in dataclasses.fields(Row)}
        assert read(path.stem)
