"""Rows from outside: files, folders and Hugging Face data sets become columns of plain Python values.

A cell of a csv or tsv file is always a string here; what it means is decided per column, in ``_columns.py``.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from partwise.checks import InputError, load_extra

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
VALID_NAMES = ("validation", "valid", "val", "dev", "validation_matched", "test")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Parameters
    ----------
    name : str
        Where the rows come from, for messages.
    columns : mapping of str to sequence
        Column name to its values, one per row.
    class_names : mapping of str to tuple of str
        Names of the classes, for the columns whose source keeps them beside the numbers.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def read_tables(data: str) -> tuple[Table, Table | None]:
    """Read the rows to train on and, where the source has them, the rows to measure on.

    Parameters
    ----------
    data : str
        A file (csv, tsv, jsonl, json, parquet; the text formats also with ``.gz``), a folder, or the id of a Hugging Face data set (``id`` or
        ``id:configuration``). A folder holds ``train.*`` and perhaps ``validation.*``, or is a downloaded data set.

    Returns
    -------
    tuple of (Table, Table or None)
        Training rows, and held-out rows or None.

    Raises
    ------
    InputError
        ``data-not-found``, ``file-unreadable``, ``unknown-format``, ``wrong-encoding``, ``broken-file``, ``no-rows``, ``several-files`` or
        ``data-set-unavailable``.
    """
    path = Path(data).expanduser()
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        return _read_folder(path)
    if mode:
        return read_file(path), None
    if data.startswith(("/", ".", "~")) or _format(path) in SUFFIXES or not _HUB_ID.fullmatch(data):
        raise InputError(
            "data-not-found",
            f"there is no file or folder {data!r} in {Path.cwd()}. Check --data; it takes a file, a folder or a Hugging Face data set id.",
        )
    name, _, configuration = data.partition(":")
    return _load_data_set(name, configuration or None)


def read_file(path: Path) -> Table:
    """Read one file in the format that its name tells."""
    reader = _READERS.get(_format(path))
    if reader is None:
        ending = path.suffix or "no ending"
        raise InputError("unknown-format", f"{path} has {ending}, expected one of {', '.join(SUFFIXES)}. Save the rows in one of these formats.")
    columns = reader(_content(path), path)
    table = Table(path.name, columns)
    if not len(table):
        raise InputError("no-rows", f"{path} has no rows, expected at least 2. Check that --data names the right file.")
    return table


def _mode(path: Path) -> int:
    """File mode, 0 where there is nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise InputError("file-unreadable", f"cannot look at {path}: {error.strerror}. Check the path and the permissions of its folders.") from error


def _format(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _broken(path, f"it cannot be unpacked ({error})") from error
    except OSError as error:
        raise InputError("file-unreadable", f"cannot read {path}: {error.strerror}. Check its permissions.") from error


def _broken(path: Path, why: str) -> InputError:
    return InputError("broken-file", f"{path} is not a sound {_format(path)} file: {why}. Repair it or export it again.")


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            "wrong-encoding",
            f"{path} has byte 0x{content[error.start]:02x} in line {line}, expected text in UTF-8. "
            f"Convert it, for example: iconv -f latin1 -t utf-8 {path.name} > converted{_format(path)}",
        ) from error


def _read_separated(content: bytes, path: Path) -> dict[str, list[Any]]:
    """Comma-separated text with quotes as RFC 4180 has them; tab-separated text without, so that a lone quotation mark swallows no rows."""
    text = io.StringIO(_text(content, path), newline="")
    if _format(path) == ".csv":
        reader = csv.reader(text, strict=True)
    else:
        reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    rows: list[list[str]] = []
    header: list[str] = []
    try:
        header = next(reader, [])
        for row in reader:
            if row and len(row) != len(header):
                raise _broken(path, f"line {reader.line_num} has {len(row)} fields, but the header has {len(header)}")
            if row:
                rows.append(row)
    except csv.Error as error:
        raise _broken(path, f"line {reader.line_num}: {error}") from error
    if len(set(header)) != len(header):
        raise _broken(path, f"two columns have the same name in its header ({', '.join(header)})")
    return {name: [row[index] for row in rows] for index, name in enumerate(header)}


def _read_json(content: bytes, path: Path) -> dict[str, list[Any]]:
    """A list of objects, the same under one key, or an object of equally long lists."""
    try:
        value = json.loads(_text(content, path))
    except json.JSONDecodeError as error:
        raise _broken(path, f"line {error.lineno}: {error.msg}") from error
    if isinstance(value, dict) and len(value) == 1 and _all_are(dict, next(iter(value.values()))):
        value = next(iter(value.values()))
    if _all_are(dict, value):
        return _columns(value)
    if (
        isinstance(value, dict)
        and all(isinstance(column, list) for column in value.values())
        and len({len(column) for column in value.values()}) == 1
    ):
        return value
    raise _broken(path, "it must be a list of objects, or an object of equally long lists")


def _read_json_lines(content: bytes, path: Path) -> dict[str, list[Any]]:
    rows = []
    for number, line in enumerate(_text(content, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _broken(path, f"line {number}: {error.msg} at character {error.colno}") from error
        if not isinstance(row, dict):
            raise _broken(path, f"line {number} is not an object but {type(row).__name__}")
        rows.append(row)
    return _columns(rows)


def _read_parquet(content: bytes, path: Path) -> dict[str, list[Any]]:
    pyarrow, parquet = load_extra("pyarrow", extra="hf"), load_extra("pyarrow.parquet", extra="hf")
    try:
        columns: dict[str, list[Any]] = parquet.read_table(pyarrow.BufferReader(content)).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise _broken(path, str(error).splitlines()[0].rstrip(".")) from error
    return columns


_READERS: dict[str, Callable[[bytes, Path], dict[str, list[Any]]]] = {
    ".csv": _read_separated,
    ".tsv": _read_separated,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}


def _all_are(kind: type, value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows to columns; a key that a row lacks becomes None."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_folder(folder: Path) -> tuple[Table, Table | None]:
    train = _file_of(folder, "train")
    if train is None:
        return _load_data_set(str(folder), None)
    valid = next(filter(None, (_file_of(folder, name) for name in VALID_NAMES)), None)
    return read_file(train), None if valid is None else read_file(valid)


def _file_of(folder: Path, split: str) -> Path | None:
    try:
        found = sorted(path for path in folder.iterdir() if path.name.lower().removesuffix(".gz") in {split + suffix for suffix in SUFFIXES})
    except OSError as error:
        raise InputError("file-unreadable", f"cannot list {folder}: {error.strerror}. Check its permissions.") from error
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError("several-files", f"{folder} has several files for {split}: {names}. Keep one, or pass a single file with --data.")
    return found[0] if found else None


def _load_data_set(source: str, configuration: str | None) -> tuple[Table, Table | None]:
    """Load from the Hugging Face hub, or a folder laid out like a repository there."""
    datasets = load_extra("datasets", extra="hf")
    try:
        with _no_progress_bars(datasets):
            splits = datasets.load_dataset(source, configuration)
            tables = {name: _table_of(f"{source} ({name})", split) for name, split in splits.items()}
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = "folder" if Path(source).is_dir() else "Hugging Face data set"
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise InputError(
            "data-set-unavailable",
            f"cannot load the {what} {source!r}: {reason}. A folder must hold train.csv (or .tsv, .jsonl, .json, .parquet); an id must exist on the hub. "
            f"Without a network, download it elsewhere first (hf download --repo-type dataset {source} --local-dir FOLDER) and pass --data FOLDER.",
        ) from error
    if "train" not in tables or not len(tables["train"]):
        raise InputError(
            "no-rows", f"{source} has no rows to train on; its splits are: {', '.join(tables) or 'none'}. Pass one that has a train split, or a file."
        )
    valid = next((tables[name] for name in VALID_NAMES if name in tables), None)
    return tables["train"], valid


def _table_of(name: str, split: Any) -> Table:
    class_names = {column: tuple(feature.names) for column, feature in split.features.items() if hasattr(feature, "names")}
    return Table(name, split.to_dict(), class_names)


@contextlib.contextmanager
def _no_progress_bars(datasets: Any) -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def first_rows(rows: Iterable[int], *, limit: int = 5) -> str:
    """Row numbers for a message, counted from 1: ``3, 8, 9`` or ``1, 2, 3, 4, 5, ...``."""
    numbers = [str(row + 1) for row in rows]
    return ", ".join(numbers[:limit]) + (", ..." if len(numbers) > limit else "")
