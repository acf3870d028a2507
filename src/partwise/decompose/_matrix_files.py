"""A matrix of numbers from a file, for the command: .npy, .npz, .csv, .parquet, .mtx or .zarr. Rows are samples."""

from __future__ import annotations

import csv
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import io, sparse

from partwise.checks import InputError
from partwise.decompose._file_errors import chosen_array, key_without_arrays, plain, text_columns
from partwise.decompose._fingerprint import fingerprint_of_path
from partwise.decompose._readers import NpyRows, ParquetRows, RowSource, ZarrRows, check_dtype

__all__ = ["SUFFIXES", "open_matrix", "open_rows"]

logger = logging.getLogger(__name__)

IN_MEMORY = 1 << 28  # bytes of a dense matrix up to which it is loaded; a larger one is read in chunks, each time it is needed
SEPARATORS = ",;\t"
WITH_ARRAYS = {".npz", ".zarr"}  # formats that can hold several
INDEX_NAMES = {"", "Unnamed: 0", "__index_level_0__"}  # under which pandas writes its index

Names = tuple[str, ...] | None


def open_matrix(path: str | Path, *, key: str | None = None) -> tuple[Any, Names, dict[str, Any]]:
    """Open a matrix by the ending of its name.

    Parameters
    ----------
    path : str or Path
        A file; for zarr a folder. Text (.csv) is separated by commas, semicolons or tabs. Its first line is a header when a field of it is no number.
    key : str, optional
        The array to use where a file holds several (.npz, .zarr).

    Returns
    -------
    tuple of (ndarray or csr_array or RowSource, tuple of str or None, dict)
        The data: in memory up to 256 MiB, a reader above, sparse where the file is. The names of its columns, where it has them. And a fingerprint:
        size, shape, dtype, digest.

    Raises
    ------
    InputError
        ``data-not-found``, ``file-unreadable``, ``unknown-format``, ``broken-file`` (empty, cut short, damaged), ``no-rows``, ``not-numbers`` (which
        columns), ``not-finite`` (empty cells), ``wrong-encoding``, ``object-array``, ``complex-input`` or ``array-not-named``,
        or ``key-without-arrays``.
    MissingExtra
        When parquet or zarr needs the extra ``data``.
    """
    place = Path(path).expanduser()
    opener = _OPENERS.get(place.suffix.lower())
    if opener is None:
        ending = place.suffix or "no ending"
        raise InputError("unknown-format", f"{place} has {ending}, expected one of {', '.join(SUFFIXES)}. Save the data in one of these formats.")
    _check_there(place)
    if key is not None and place.suffix.lower() not in WITH_ARRAYS:
        raise key_without_arrays(place, key)
    try:
        data, names = opener(place, key)
    except OSError as error:
        raise InputError("file-unreadable", f"cannot read {place}: {error.strerror or error}. Check the file and its permissions.") from error
    check_dtype(data.dtype, path=str(place))
    if len(data.shape) != 2:
        raise InputError("data-shape", f"{place} holds an array of shape {data.shape}, expected samples and features. Reshape it and save again.")
    if not data.shape[0] or not data.shape[1]:
        raise InputError("no-rows", f"{place} holds a matrix of shape {data.shape}, expected at least 2 rows and 1 column. Check that it is the right file.")
    index = next((name for name in names or () if name.strip() in INDEX_NAMES), None)
    if index is not None:
        logger.warning(
            "%s has a column named %r, as pandas names its index; it is used as a feature. If it is one, write the file again with index=False.", place, index
        )
    fingerprint = fingerprint_of_path(place, shape=data.shape, dtype=data.dtype)
    return data, names, fingerprint if key is None else fingerprint | {"key": key}


def open_rows(path: str | Path, *, key: str | None = None) -> RowSource:
    """Rows of a file that are read a chunk at a time, for data larger than memory; every ``fit`` of this room takes them.

    Parameters
    ----------
    path : str or Path
        A ``.npy`` or ``.parquet`` file, or a ``.zarr`` folder.
    key : str, optional
        The array inside a zarr group; may be left out when there is one.

    Returns
    -------
    RowSource
        Has ``shape`` and ``dtype``, and sends itself to worker processes as its path.

    Raises
    ------
    InputError
        When the file is missing, damaged, of another format, or holds something else than a matrix of real numbers.
    MissingExtra
        When parquet or zarr needs the extra ``data``.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from partwise.decompose import ParallelDeflationPCA, open_rows
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/x.npy", np.random.default_rng(0).normal(size=(500, 20)))
    ...     pca = ParallelDeflationPCA(n_components=2, solver="lanczos", random_state=0).fit(open_rows(f"{folder}/x.npy"))
    >>> pca.components_.shape
    (2, 20)
    """
    place = Path(path).expanduser()
    openers: dict[str, Callable[[], RowSource]] = {
        ".npy": lambda: NpyRows.open(place),
        ".parquet": lambda: ParquetRows.open(place),
        ".zarr": lambda: ZarrRows.open(place, key=key),
    }
    opener = openers.get(place.suffix.lower())
    if opener is None:
        ending = place.suffix or "no ending"
        raise InputError("unknown-format", f"{place} has {ending}, expected one of {', '.join(openers)}. Load other formats and pass the array.")
    _check_there(place)
    if key is not None and place.suffix.lower() not in WITH_ARRAYS:
        raise key_without_arrays(place, key)
    try:
        return opener()
    except OSError as error:
        raise InputError("file-unreadable", f"cannot read {place}: {error.strerror or error}. Check the file and its permissions.") from error


def _check_there(path: Path) -> None:
    try:
        exists, is_folder = path.exists(), path.is_dir()
        empty = exists and not is_folder and path.stat().st_size == 0
    except OSError as error:
        raise InputError("file-unreadable", f"cannot look at {path}: {error.strerror}. Check the permissions of its folders.") from error
    if not exists:
        raise InputError("data-not-found", f"there is no file {str(path)!r} in {Path.cwd()}. Check the path.")
    if is_folder and path.suffix.lower() != ".zarr":
        raise InputError("unknown-format", f"{path} is a folder, expected a file. Only .zarr is a folder.")
    if empty:
        raise InputError("broken-file", f"{path} is empty. Export it again.")


def _from_source(source: RowSource) -> Any:
    if source.shape[0] * source.shape[1] * source.dtype.itemsize > IN_MEMORY:
        return source
    chunks = list(source.chunks(max(1, source.shape[0])))
    return chunks[0] if chunks else np.empty(source.shape, dtype=source.dtype)


def _open_npy(path: Path, key: str | None) -> tuple[Any, Names]:
    return _from_source(NpyRows.open(path)), None


def _open_parquet(path: Path, key: str | None) -> tuple[Any, Names]:
    source = ParquetRows.open(path)
    return _from_source(source), source.columns


def _open_zarr(path: Path, key: str | None) -> tuple[Any, Names]:
    return _from_source(ZarrRows.open(path, key=key)), None


def _open_npz(path: Path, key: str | None) -> tuple[Any, Names]:
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is cut short, or no .npz file at all")
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
            if {"format", "shape", "data"} <= set(names):
                if key is not None:
                    raise key_without_arrays(path, key)
                return sparse.csr_array(sparse.load_npz(path)), None
            return arrays[chosen_array(path, names, key)], None
    except InputError:
        raise
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        if "allow_pickle" in str(error):
            check_dtype(np.dtype(object), path=str(path))
        raise InputError("broken-file", f"{path} is no sound .npz file: {plain(error)}. Export it again.") from error


def _open_mtx(path: Path, key: str | None) -> tuple[Any, Names]:
    try:
        data = io.mmread(path)
    except (ValueError, OverflowError, EOFError) as error:
        raise InputError("broken-file", f"{path} is no sound Matrix Market file: {plain(error)}. Export it again with scipy.io.mmwrite.") from error
    return (sparse.csr_array(data) if sparse.issparse(data) else data), None


def _open_csv(path: Path, key: str | None) -> tuple[Any, Names]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            line = file.readline()
            separator = max(SEPARATORS, key=line.count)
            first = next(csv.reader([line], delimiter=separator), [])
            names = None if all(_is_number(field) for field in first) else tuple(first)
            if names is None:
                file.seek(0)
            start = file.tell()
            if not any(row.strip() for row in iter(file.readline, "")):
                raise InputError("no-rows", f"{path} has a header but no rows, expected at least 2. Check that it is the right file.")
            file.seek(start)
            try:
                rows: NDArray[Any] = np.loadtxt(file, delimiter=separator, comments=None, quotechar='"', ndmin=2, dtype=np.float64)
            except ValueError as error:
                raise _what_is_wrong(path, separator, names, error) from error
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path) from error
    if names is not None and len(names) != rows.shape[1]:
        raise InputError("broken-file", f"{path} has {len(names)} names in its header but {rows.shape[1]} columns. Repair it or export it again.")
    return rows, names


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _what_is_wrong(path: Path, separator: str, names: Names, error: ValueError) -> InputError:
    """Which columns of a text file are no numbers, or which cells are empty, or which line has another length."""
    text: dict[int, None] = {}
    num_empty, first_empty = 0, ""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator)
        width = 0
        for number, row in enumerate(reader):
            if not row or (number == 0 and names is not None):
                width = width or len(row)
                continue
            width = width or len(row)
            if len(row) != width:
                return InputError("broken-file", f"{path} has {len(row)} fields in line {reader.line_num}, expected {width}. Repair or export it again.")
            for column, field in enumerate(row):
                if not field.strip():
                    num_empty += 1
                    first_empty = first_empty or f"line {reader.line_num}, column {names[column] if names else column + 1!r}"
                elif not _is_number(field):
                    text[column] = None
    if text:
        return text_columns(path, [names[column] if names else str(column + 1) for column in text])
    if num_empty:
        cells = "1 empty cell," if num_empty == 1 else f"{num_empty} empty cells, the first"
        return InputError("not-finite", f"{path} has {cells} in {first_empty}. Fill in what is missing, or drop these rows.")
    return InputError("broken-file", f"{path} cannot be read as numbers: {plain(error)}. Repair it or export it again.")


def _wrong_encoding(path: Path) -> InputError:
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        bad = f"byte 0x{content[error.start]:02x} in line {line}"
    else:
        bad = "text that changed while it was read"
    return InputError("wrong-encoding", f"{path} has {bad}, expected text in UTF-8. Convert it, for example: iconv -f latin1 -t utf-8 {path.name}")


_OPENERS: dict[str, Callable[[Path, str | None], tuple[Any, Names]]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".csv": _open_csv,
    ".parquet": _open_parquet,
    ".mtx": _open_mtx,
    ".zarr": _open_zarr,
}
SUFFIXES = tuple(_OPENERS)
