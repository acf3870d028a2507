"""Rows of a matrix, a chunk at a time: from an array, a .npy file, parquet or zarr.

A source that reads a file is sent to another process as its path. Files are read, not mapped: a file that becomes shorter is then an error instead of
a killed process, and what was read does not stay in the memory of this process. Nothing here unpickles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from partwise.checks import InputError, load_extra
from partwise.decompose._file_errors import chosen_array, key_without_arrays, plain, text_columns
from partwise.decompose._fingerprint import fingerprint_of_array, fingerprint_of_path

__all__ = ["ArrayRows", "NpyRows", "ParquetRows", "RowSource", "ZarrRows", "check_dtype", "rows_of"]


@runtime_checkable
class RowSource(Protocol):
    """Rows that can be read again and again, a chunk at a time.

    Attributes
    ----------
    shape : tuple of int
        (rows, features).
    dtype : numpy.dtype
        Of the entries: real numbers.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def chunks(self, size: int) -> Iterator[NDArray[Any]]:
        """All rows in order, ``size`` at a time (the last chunk may be shorter). The caller must not write to them."""
        ...

    def take(self, indices: NDArray[Any]) -> NDArray[Any]:
        """The rows with these numbers, in this order: (len(indices), features)."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Size, shape, dtype and a digest: equal when the data are."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayRows:
    """Rows of an array in memory, which is not copied.

    Parameters
    ----------
    array : ndarray of shape (rows, features)
        Real numbers.
    """

    array: NDArray[Any] = field(repr=False)

    def __post_init__(self) -> None:
        check_dtype(self.array.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, features)."""
        rows, features = self.array.shape
        return rows, features

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the entries."""
        return self.array.dtype

    def chunks(self, size: int) -> Iterator[NDArray[Any]]:
        """Views of the array."""
        return (self.array[start : start + size] for start in range(0, len(self.array), size))

    def take(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Copies of rows."""
        rows: NDArray[Any] = self.array[indices]
        return rows

    def fingerprint(self) -> dict[str, Any]:
        """Size, shape, dtype and a digest of the entries."""
        return fingerprint_of_array(self.array)


@dataclass(frozen=True)
class NpyRows:
    """Rows of an uncompressed array in a file, such as a ``.npy`` file or the file behind a ``numpy.memmap``.

    Parameters
    ----------
    path : str
        The file.
    shape : tuple of int
        (rows, features).
    dtype : numpy.dtype
        Of the entries.
    offset : int
        Where in the file the array begins, in bytes.
    by_columns : bool
        Whether columns, not rows, are contiguous.
    """

    path: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    offset: int
    by_columns: bool = False

    def __post_init__(self) -> None:
        check_dtype(self.dtype, path=self.path)

    @classmethod
    def open(cls, path: str | Path) -> NpyRows:
        """The array in a ``.npy`` file."""
        try:
            with Path(path).open("rb") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, by_columns, dtype = read(file)
                offset, size = file.tell(), file.seek(0, 2)
        except ValueError as error:
            raise InputError("broken-file", f"{path} is no .npy file: {plain(error)}. Export it again with numpy.save.") from error
        if len(shape) != 2:
            raise InputError("data-shape", f"{path} holds an array of shape {shape}, expected a matrix of samples and features. Reshape it and save again.")
        check_dtype(dtype, path=str(path))
        missing = offset + shape[0] * shape[1] * dtype.itemsize - size
        if missing > 0:
            raise InputError("broken-file", f"{path} is cut short: {missing} bytes are missing for an array of shape {shape}. Copy or export it again.")
        return cls(str(Path(path).resolve()), (shape[0], shape[1]), dtype, offset, by_columns)

    def chunks(self, size: int) -> Iterator[NDArray[Any]]:
        """Chunks read from the file; at most one is kept here."""
        num_rows, num_features = self.shape
        if self.by_columns:
            for start in range(0, num_rows, size):
                yield np.ascontiguousarray(self._map()[start : start + size])
            return
        with Path(self.path).open("rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, num_rows, size):
                chunk = np.empty((min(size, num_rows - start), num_features), dtype=self.dtype)
                self._fill(file, chunk)
                yield chunk

    def take(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Rows read from the file; through a map, each would bring its neighbourhood into memory."""
        if self.by_columns:
            return np.array(self._map()[indices])
        rows = np.empty((len(indices), self.shape[1]), dtype=self.dtype)
        with Path(self.path).open("rb", buffering=0) as file:
            for row, index in zip(rows, indices, strict=True):
                file.seek(self.offset + int(index) * row.nbytes)
                self._fill(file, row)
        return rows

    def fingerprint(self) -> dict[str, Any]:
        """Size, shape, dtype and a digest of the file."""
        return fingerprint_of_path(self.path, shape=self.shape, dtype=self.dtype)

    def _fill(self, file: FileIO, block: NDArray[Any]) -> None:
        """Read a contiguous block from where the file stands."""
        view, filled = block.reshape(-1).view(np.uint8).data, 0
        while filled < len(view):
            count = file.readinto(view[filled:])
            if not count:
                raise self._shorter()
            filled += count

    def _map(self) -> NDArray[Any]:
        try:
            return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, "F" if self.by_columns else "C")
        except ValueError as error:
            raise self._shorter() from error

    def _shorter(self) -> InputError:
        return InputError("data-changed", f"{self.path} became shorter than its {self.shape[0]} rows while it was read. Restore it and fit again.")


@dataclass(frozen=True)
class ParquetRows:
    """Rows of a parquet file whose columns are all numbers.

    Parameters
    ----------
    path : str
        The file.
    columns : tuple of str
        The features, in order.
    shape : tuple of int
        (rows, features).
    dtype : numpy.dtype
        What all columns are converted to: float32 when all of them fit, else float64. Empty cells become NaN.
    """

    path: str
    columns: tuple[str, ...] = field(repr=False)
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    @classmethod
    def open(cls, path: str | Path) -> ParquetRows:
        """All columns of a parquet file."""
        arrow = load_extra("pyarrow", extra="data")
        with _parquet_file(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
        is_number = {name: _is_number(arrow, kind) for name, kind in zip(schema.names, schema.types, strict=True)}
        if not all(is_number.values()):
            raise text_columns(path, [name for name, fine in is_number.items() if not fine])
        halves = {arrow.float16(), arrow.float32(), arrow.int8(), arrow.uint8(), arrow.int16(), arrow.uint16(), arrow.bool_()}
        dtype = np.dtype(np.float32 if set(schema.types) <= halves else np.float64)
        return cls(str(Path(path).resolve()), tuple(schema.names), (num_rows, len(schema.names)), dtype)

    def chunks(self, size: int) -> Iterator[NDArray[Any]]:
        """Chunks of the same size whatever the row groups of the file are."""
        with _parquet_file(self.path) as file:
            yield from _regroup((self._numbers(batch) for batch in file.iter_batches(batch_size=size)), size)

    def take(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Rows, read by way of the row groups they are in."""
        rows = np.empty((len(indices), self.shape[1]), dtype=self.dtype)
        wanted = np.asarray(indices) % self.shape[0] if self.shape[0] else np.asarray(indices)
        with _parquet_file(self.path) as file:
            start = 0
            for group in range(file.metadata.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                here = np.flatnonzero((wanted >= start) & (wanted < stop))
                if len(here):
                    rows[here] = self._numbers(file.read_row_group(group).take(wanted[here] - start))
                start = stop
        return rows

    def fingerprint(self) -> dict[str, Any]:
        """Size, shape, dtype and a digest of the file."""
        return fingerprint_of_path(self.path, shape=self.shape, dtype=self.dtype)

    def _numbers(self, batch: Any) -> NDArray[Any]:
        rows = np.empty((batch.num_rows, self.shape[1]), dtype=self.dtype)
        for place, column in enumerate(batch.columns):
            rows[:, place] = column.to_numpy() if hasattr(column, "chunks") else column.to_numpy(zero_copy_only=False)
        return rows


@contextlib.contextmanager
def _parquet_file(path: str | Path) -> Iterator[Any]:
    """An open parquet file; what Arrow raises while it is read says which file is damaged."""
    arrow, parquet = load_extra("pyarrow", extra="data"), load_extra("pyarrow.parquet", extra="data")
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:  # files without checksums are read as they are
            yield file
    except (arrow.ArrowException, OSError) as error:
        raise InputError("broken-file", f"{path} is no sound parquet file: {plain(error)}. Export it again.") from error


def _is_number(arrow: Any, kind: Any) -> bool:
    return bool(arrow.types.is_integer(kind) or arrow.types.is_floating(kind) or arrow.types.is_boolean(kind))


def _regroup(batches: Iterable[NDArray[Any]], size: int) -> Iterator[NDArray[Any]]:
    """The same rows in chunks of exactly ``size``, except the last."""
    waiting: list[NDArray[Any]] = []
    count = 0
    for batch in batches:
        rest = batch
        while count + len(rest) >= size:
            waiting.append(rest[: size - count])
            rest = rest[size - count :]
            yield np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
            waiting, count = [], 0
        if len(rest):
            waiting.append(rest)
            count += len(rest)
    if waiting:
        yield np.concatenate(waiting)


@dataclass(frozen=True)
class ZarrRows:
    """Rows of a zarr array on disk.

    Parameters
    ----------
    path : str
        The store.
    key : str or None
        The array inside a group; None for an array at the top.
    """

    path: str
    key: str | None = None

    @classmethod
    def open(cls, path: str | Path, *, key: str | None = None) -> ZarrRows:
        """An array of a zarr store; ``key`` may be left out when there is one."""
        zarr = load_extra("zarr", extra="data")
        try:
            found = zarr.open(str(path), mode="r")
        except Exception as error:  # zarr has no common class for what a damaged store raises
            raise InputError("broken-file", f"{path} is no sound zarr store: {plain(error)}. Export it again.") from error
        names = [] if isinstance(found, zarr.Array) else sorted(name for name, _ in found.arrays())
        if not isinstance(found, zarr.Array):
            key = chosen_array(path, names, key)
        elif key is not None:
            raise key_without_arrays(path, key)
        rows = cls(str(Path(path).resolve()), key)
        if len(rows._array.shape) != 2:
            raise InputError("data-shape", f"{path} holds an array of shape {rows._array.shape}, expected samples and features. Reshape it and save again.")
        check_dtype(rows.dtype, path=str(path))
        return rows

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, features)."""
        rows, features = self._array.shape
        return rows, features

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the entries."""
        dtype: np.dtype[Any] = np.dtype(self._array.dtype)
        return dtype

    def chunks(self, size: int) -> Iterator[NDArray[Any]]:
        """Chunks read from the store."""
        return (np.asarray(self._array[start : start + size]) for start in range(0, self.shape[0], size))

    def take(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Rows read from the store."""
        return np.asarray(self._array.oindex[np.asarray(indices), :])

    def fingerprint(self) -> dict[str, Any]:
        """Size, shape, dtype and a digest of the files of the store."""
        return fingerprint_of_path(self.path, shape=self.shape, dtype=self.dtype)

    @cached_property
    def _array(self) -> Any:
        found = load_extra("zarr", extra="data").open(self.path, mode="r")
        return found if self.key is None else found[self.key]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "key": self.key}


def rows_of(array: NDArray[Any]) -> ArrayRows | NpyRows:
    """Rows of an array. One that maps a file becomes a source that reads the file, and then travels as its path."""
    if not isinstance(array, np.memmap) or array.ndim != 2 or array.filename is None or array.mode == "c":
        return ArrayRows(np.asarray(array))
    by_columns = not array.flags.c_contiguous
    if by_columns and not array.flags.f_contiguous:
        return ArrayRows(np.asarray(array))
    # ``offset`` is that of the array first mapped, even for a slice of it; the distance between the two in memory is their distance in the file.
    whole: Any = array
    while isinstance(whole.base, np.memmap):
        whole = whole.base
    offset = int(array.offset) + array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    if array.mode != "r":
        array.flush()  # what was written is read back from the file
    rows, features = array.shape
    return NpyRows(str(Path(array.filename).resolve()), (rows, features), array.dtype, offset, by_columns)


def check_dtype(dtype: np.dtype[Any], *, path: str | None = None) -> None:
    """Refuse entries that are no real numbers; objects are never unpickled."""
    where = path or "X"
    if dtype.hasobject:
        raise InputError("object-array", f"{where} holds Python objects, expected numbers; reading them could run code. Convert to float64 before saving.")
    if dtype.kind == "c":
        raise InputError("complex-input", f"Complex data not supported: {where} holds {dtype}, expected real numbers. Pass the real and imaginary parts.")
    if dtype.kind not in "fiub":
        raise InputError("not-numbers", f"{where} has entries of type {dtype}, expected real numbers. Convert to float64.")
