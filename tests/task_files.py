"""Data files for tests, and short ways to read them or to see them refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from partwise.checks import InputError
from partwise.tune._data import DataSettings, TaskData, read_task_data

ROWS = [{"text": f"the film number {number} is {'good' if number % 2 else 'bad'}", "label": "pos" if number % 2 else "neg"} for number in range(20)]


def write_csv(path: Path, rows: list[dict[str, Any]], separator: str = ",") -> Path:
    lines = [separator.join(rows[0]), *(separator.join(str(value) for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="writes a parquet file")
    pytest.importorskip("pyarrow.parquet", reason="writes a parquet file").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path: Path | str, **settings: Any) -> TaskData:
    return read_task_data(DataSettings(data=str(path), **settings))


def refused(code: str, path: Path | str, match: str, **settings: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read(path, **settings)
    assert caught.value.code == code


def labelled(tmp_path: Path, labels: list[Any], **settings: Any) -> TaskData:
    rows = [{"text": f"row {number}", "label": label} for number, label in enumerate(labels)]
    return read(write_json_lines(tmp_path / "rows.jsonl", rows), **settings)
