"""Claims of readers: the rows that are in the file, in chunks; nothing unpickled; and what is said about files that cannot be read."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import io, sparse

from matrices import gaussian
from partwise.checks import InputError, MissingExtra
from partwise.decompose import _fingerprint, _matrix_files
from partwise.decompose._covariance import covariance_of
from partwise.decompose._matrix_files import SUFFIXES, open_matrix, open_rows
from partwise.decompose._readers import ArrayRows, NpyRows, ParquetRows, RowSource, ZarrRows, rows_of

pyarrow = pytest.importorskip("pyarrow", reason="reads parquet")
parquet = pytest.importorskip("pyarrow.parquet", reason="reads parquet")
zarr = pytest.importorskip("zarr", reason="reads zarr")


def write_parquet(path: Path, X: NDArray[Any], *, group: int = 7) -> Path:
    parquet.write_table(pyarrow.table({f"f{place}": column for place, column in enumerate(X.T)}), path, row_group_size=group)
    return path


def write_zarr(path: Path, X: NDArray[Any], *, name: str | None = None) -> Path:
    zarr.create_array(str(path), name=name, data=X, chunks=(max(4, len(X) // 5), 3))
    return path


def sources(X: NDArray[Any], folder: Path) -> dict[str, RowSource]:
    np.save(folder / "rows.npy", X)
    np.save(folder / "columns.npy", np.asfortranarray(X))
    return {
        "array": ArrayRows(X),
        "npy": NpyRows.open(folder / "rows.npy"),
        "npy by columns": NpyRows.open(folder / "columns.npy"),
        "parquet": ParquetRows.open(write_parquet(folder / "x.parquet", X)),
        "zarr": ZarrRows.open(write_zarr(folder / "x.zarr", X)),
        "zarr in a group": ZarrRows.open(write_zarr(folder / "group.zarr", X, name="x")),
    }


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16])
def test_every_source_gives_the_rows_it_holds(dtype: Any, tmp_path: Path) -> None:
    X = (100 * gaussian(23, 5)).astype(dtype)
    for name, source in sources(X, tmp_path).items():
        assert isinstance(source, RowSource)
        assert source.shape == (23, 5)
        for size in (1, 4, 7, 10, 23, 50):
            chunks = list(source.chunks(size))
            assert [len(chunk) for chunk in chunks] == [size] * (23 // size) + [23 % size] * (23 % size > 0), name
            np.testing.assert_array_equal(np.concatenate(chunks), X, err_msg=name)
        chosen = np.array([22, 3, 3, 0])
        np.testing.assert_array_equal(source.take(chosen), X[chosen], err_msg=name)
        assert all(chunk.dtype == source.dtype for chunk in source.chunks(10)), name


def test_every_source_travels_as_what_is_needed_to_read_it(tmp_path: Path) -> None:
    X = gaussian(5000, 5)
    for name, source in sources(X, tmp_path).items():
        list(source.chunks(1000))
        message = pickle.dumps(source)
        assert name == "array" or len(message) < 1000
        np.testing.assert_array_equal(pickle.loads(message).take(np.array([7])), X[[7]])  # noqa: S301 - a message written two lines above


def test_every_source_gives_the_same_covariance(tmp_path: Path) -> None:
    X = gaussian(23, 5)
    found = {name: covariance_of(source).product(np.eye(5)).tobytes() for name, source in sources(X, tmp_path).items()}
    assert set(found.values()) == {covariance_of(X).product(np.eye(5)).tobytes()}


@given(first=st.integers(0, 20), last=st.integers(21, 40), step=st.integers(1, 3), columns=st.integers(1, 6))
def test_a_slice_of_a_map_is_read_from_the_right_place(tmp_path_factory: pytest.TempPathFactory, first: int, last: int, step: int, columns: int) -> None:
    X = gaussian(40, 6)
    path = tmp_path_factory.mktemp("map") / "x.npy"
    np.save(path, X)
    piece = np.load(path, mmap_mode="r")[first:last:step, :columns]
    source = rows_of(piece)
    np.testing.assert_array_equal(np.concatenate(list(source.chunks(3))), X[first:last:step, :columns])
    assert isinstance(source, NpyRows) == (piece.flags.c_contiguous or piece.flags.f_contiguous)


def test_a_map_is_read_as_it_stands_now(tmp_path: Path) -> None:
    X = gaussian(9, 4)
    np.save(tmp_path / "x.npy", X)
    shared = np.load(tmp_path / "x.npy", mmap_mode="r+")
    shared[3] = 7.0
    np.testing.assert_array_equal(np.concatenate(list(rows_of(shared).chunks(4))), shared)
    private = np.load(tmp_path / "x.npy", mmap_mode="c")
    private[4] = 8.0  # never written to the file
    assert isinstance(rows_of(private), ArrayRows)
    np.testing.assert_array_equal(np.concatenate(list(rows_of(private).chunks(4))), private)
    raw = np.memmap(tmp_path / "raw.bin", dtype=np.float32, mode="w+", shape=(9, 4), offset=12)
    raw[:] = X
    source = rows_of(raw)
    assert isinstance(source, NpyRows)
    np.testing.assert_array_equal(source.take(np.arange(9)), X.astype(np.float32))


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", gaussian(100, 50))
    source = NpyRows.open(tmp_path / "x.npy")
    chunks = source.chunks(10)
    next(chunks)
    os.truncate(tmp_path / "x.npy", 10_000)
    with pytest.raises(InputError, match=r"became shorter than its 100 rows while it was read. Restore it") as caught:
        list(chunks)
    assert caught.value.code == "data-changed"
    with pytest.raises(InputError, match="became shorter"):
        source.take(np.array([99]))


@pytest.mark.parametrize("in_memory", [1 << 28, 0], ids=["loaded", "read in chunks"])
def test_a_matrix_is_opened_by_its_ending(in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_matrix_files, "IN_MEMORY", in_memory)
    X = np.where(gaussian(23, 5) > 0, gaussian(23, 5, seed=1), 0.0)
    np.save(tmp_path / "x.npy", X)
    np.savez_compressed(tmp_path / "x.npz", only=X)
    sparse.save_npz(tmp_path / "sparse.npz", sparse.csc_array(X))
    np.savetxt(tmp_path / "x.csv", X, delimiter=",", fmt="%.17g")
    io.mmwrite(tmp_path / "x.mtx", sparse.coo_array(X), precision=17)
    io.mmwrite(tmp_path / "dense.mtx", X, precision=17)
    write_parquet(tmp_path / "x.parquet", X)
    write_zarr(tmp_path / "x.zarr", X)
    for path in sorted(tmp_path.iterdir()):
        data, names, fingerprint = open_matrix(path)
        assert sparse.issparse(data) == (path.name in ("sparse.npz", "x.mtx"))
        assert isinstance(data, RowSource) == (in_memory == 0 and path.suffix in (".npy", ".parquet", ".zarr"))
        rows = data.toarray() if sparse.issparse(data) else data.take(np.arange(23)) if isinstance(data, RowSource) else data
        np.testing.assert_array_equal(rows, X, err_msg=path.name)
        assert names == (("f0", "f1", "f2", "f3", "f4") if path.suffix == ".parquet" else None)
        assert fingerprint["shape"] == [23, 5]
        assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert {path.suffix for path in tmp_path.iterdir()} == set(SUFFIXES)


def test_rows_are_opened_by_ending_too(tmp_path: Path) -> None:
    X = gaussian(6, 3)
    np.save(tmp_path / "x.npy", X)
    write_parquet(tmp_path / "x.parquet", X)
    write_zarr(tmp_path / "x.zarr", X, name="only")
    for name in ("x.npy", "x.parquet", "x.zarr"):
        np.testing.assert_array_equal(np.concatenate(list(open_rows(tmp_path / name).chunks(4))), X)
    np.testing.assert_array_equal(open_rows(tmp_path / "x.zarr", key="only").take(np.array([2])), X[[2]])
    with pytest.raises(InputError, match=r"x.csv has .csv, expected one of .npy, .parquet, .zarr. Load other formats and pass the array"):
        open_rows(tmp_path / "x.csv")
    with pytest.raises(InputError, match="there is no file"):
        open_rows(tmp_path / "y.npy")


def test_arrays_of_a_file_with_several_are_named(tmp_path: Path) -> None:
    X = gaussian(6, 3)
    np.savez(tmp_path / "x.npz", first=np.zeros(3), second=X)
    write_zarr(tmp_path / "x.zarr", np.zeros((2, 2)), name="first")
    write_zarr(tmp_path / "x.zarr", X, name="second")
    for path in (tmp_path / "x.npz", tmp_path / "x.zarr"):
        data, _, fingerprint = open_matrix(path, key="second")
        np.testing.assert_array_equal(data, X)
        assert fingerprint["key"] == "second"
        with pytest.raises(InputError, match=r"x.(npz|zarr) holds these arrays: first, second. Name one of them as key") as caught:
            open_matrix(path)
        assert caught.value.code == "array-not-named"


CSV = {
    "header": ("a,b\n1,2\n3,4\n", ("a", "b")),
    "no header": ("1,2\n3,4\n", None),
    "semicolons": ("a;b\n1;2\n3;4\n", ("a", "b")),
    "tabs": ("a\tb\r\n1\t2\r\n3\t4\r\n", ("a", "b")),
    "quotes": ('"a, first",b\n"1",2\n3,"4"\n', ("a, first", "b")),
    "byte order mark": ("\ufeffa,b\n1,2\n3,4\n", ("a", "b")),
    "byte order mark without header": ("\ufeff1,2\n3,4\n", None),
    "spaces and empty lines": ("a,b\n\n 1, 2\n\n3 ,4\n\n", ("a", "b")),
    "exponents": ("1e0,2.0\n+3,4.\n", None),
}


@pytest.mark.parametrize("name", CSV)
def test_text_is_read_with_or_without_a_header(name: str, tmp_path: Path) -> None:
    text, header = CSV[name]
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    data, names, _ = open_matrix(tmp_path / "x.csv")
    np.testing.assert_array_equal(data, [[1.0, 2.0], [3.0, 4.0]])
    assert names == header


BAD_TEXT = {
    "text columns": (b"a,b,c\n1,x,2\n3,4,y\n", "not-numbers", "has columns that are not numbers: 'b', 'c'. Drop them"),
    "text without header": (b"1,2\n3,x\n", "not-numbers", "columns that are not numbers: '2'"),
    "many text columns": (b"1,1,1,1,1,1,1\nu,v,w,x,y,z,1\n", "not-numbers", "'1', '2', '3', '4', '5' and 1 more"),
    "empty cells": (b"a,b\n1,\n,4\n", "not-finite", "has 2 empty cells, the first in line 2, column 'b'"),
    "empty cells without header": (b"1,2\n,4\n", "not-finite", "x.csv has 1 empty cell, in line 2, column 1. Fill in"),
    "short line": (b"a,b\n1,2\n3\n", "broken-file", "has 1 fields in line 3, expected 2"),
    "short header": (b"a\n1,2\n3,4\n", "broken-file", "has 1 names in its header but 2 columns"),
    "only a header": (b"a,b\n\n", "no-rows", "has a header but no rows"),
    "another encoding": ("a,b\n1,2\n\u00e9,3\n".encode("latin-1"), "wrong-encoding", "has byte 0xe9 in line 3, expected text in UTF-8"),
    "nothing": (b"", "broken-file", "x.csv is empty. Export it again"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_text_that_is_no_table_of_numbers_is_refused(name: str, tmp_path: Path) -> None:
    content, code, text = BAD_TEXT[name]
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(InputError, match=text) as caught:
        open_matrix(tmp_path / "x.csv")
    assert caught.value.code == code


def test_nan_in_text_and_empty_cells_of_parquet_are_found_when_the_data_are_used(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,nan\n3,inf\n")
    parquet.write_table(pyarrow.table({"a": [1, None, 3], "b": [1.0, 2.0, None]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="2 NaN or infinite entries out of 4, the first in row 0, column 1"):
        covariance_of(open_matrix(tmp_path / "x.csv")[0])
    with pytest.raises(InputError, match="2 NaN or infinite entries out of 6, the first in row 1, column 0"):
        covariance_of(open_matrix(tmp_path / "x.parquet")[0])


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".zarr"])
def test_every_file_that_is_empty_cut_short_or_something_else_is_refused(suffix: str, tmp_path: Path) -> None:
    X = gaussian(200, 5)
    path = tmp_path / f"x{suffix}"
    writers: dict[str, Any] = {
        ".npy": lambda: np.save(path, X),
        ".npz": lambda: np.savez(path, X),
        ".csv": lambda: path.write_bytes(b"1,2\n" * 100),
        ".mtx": lambda: io.mmwrite(path, sparse.coo_array(X)),
        ".parquet": lambda: write_parquet(path, X),
    }
    writers[suffix]()
    whole = path.read_bytes()
    open_matrix(path)
    contents = {"empty": b"", "a picture": b"\x89PNG\r\n\x1a\n\x00\x00\xff", "cut in the head": whole[:3], "cut in the middle": whole[: len(whole) // 2 + 2]}
    if suffix == ".csv":
        contents["cut in the head"] = b"1,"
        contents["cut in the middle"] = b"1,2\n1"
    for name, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"x{suffix}") as caught:
            open_matrix(path)
        assert caught.value.code in {"broken-file", "no-rows", "not-finite", "wrong-encoding"}, name


def test_a_damaged_part_of_a_parquet_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", gaussian(3000, 3), group=1000)
    content = bytearray(path.read_bytes())
    content[200:20_000] = b"\x00" * 19_800
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x.parquet is no sound parquet file"):
        open_matrix(path)


def test_columns_of_parquet_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"x": [1.0], "name": ["a"], "when": pyarrow.array([0], pyarrow.timestamp("s"))}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x.parquet has columns that are not numbers: 'name', 'when'"):
        open_matrix(tmp_path / "x.parquet")


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = np.array([[Trap(sprung)] * 2] * 2, dtype=object)
    np.save(tmp_path / "x.npy", trap)
    np.savez(tmp_path / "x.npz", trap)
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(Trap(sprung)))
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Trap(sprung)))
    for name, code in (("x.npy", "object-array"), ("x.npz", "object-array"), ("plain.npy", "broken-file"), ("plain.npz", "broken-file")):
        with pytest.raises(InputError, match=name) as caught:
            open_matrix(tmp_path / name)
        assert caught.value.code == code
    with pytest.raises(InputError, match="holds Python objects"):
        ArrayRows(np.full((2, 2), None))
    assert not sprung.exists()


def test_a_zarr_store_that_unpickles_is_refused(tmp_path: Path) -> None:
    numcodecs = pytest.importorskip("numcodecs", reason="codecs of zarr 2 stores")
    path = tmp_path / "x.zarr"
    store = zarr.create_array(str(path), shape=(4, 2), chunks=(4, 2), dtype="f8", zarr_format=2, compressors=None, filters=[numcodecs.Delta("f8")])
    store[:] = 1.0
    description = json.loads((path / ".zarray").read_text())
    sprung = tmp_path / "sprung"
    (path / "0.0").write_bytes(pickle.dumps(Trap(sprung)))
    for change in ({"filters": [{"id": "pickle"}]}, {"compressor": {"id": "pickle"}}, {"filters": [{"id": "delta", "dtype": "<f8"}, {"id": "pickle"}]}):
        (path / ".zarray").write_text(json.dumps(description | change))
        with pytest.raises(InputError, match=r"x.zarr is no sound zarr store"):
            open_matrix(path)  # refused by zarr itself; this holds it to that
    assert not sprung.exists()


def test_paths_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "x.txt").write_text("1")
    np.save(tmp_path / "vector.npy", np.ones(3))
    np.save(tmp_path / "none.npy", np.ones((0, 3)))
    np.save(tmp_path / "complex.npy", np.ones((2, 3)) * 1j)
    np.savez(tmp_path / "cube.npz", np.ones((2, 3, 4)))
    for name, code, text in (
        ("missing.npy", "data-not-found", "there is no file .*missing.npy"),
        ("folder.npy", "unknown-format", "folder.npy is a folder, expected a file"),
        ("folder.zarr", "broken-file", "folder.zarr is no sound zarr store"),
        ("x.txt", "unknown-format", "x.txt has .txt, expected one of .npy, .npz, .csv, .parquet, .mtx, .zarr"),
        ("x", "unknown-format", "x has no ending"),
        ("vector.npy", "data-shape", r"vector.npy holds an array of shape \(3,\)"),
        ("none.npy", "no-rows", r"none.npy holds a matrix of shape \(0, 3\)"),
        ("complex.npy", "complex-input", "Complex data not supported: .*complex.npy holds complex128"),
        ("cube.npz", "data-shape", r"cube.npz holds an array of shape \(2, 3, 4\)"),
    ):
        with pytest.raises(InputError, match=text) as caught:
            open_matrix(tmp_path / name)
        assert caught.value.code == code, name


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", gaussian(3, 2))

    def refuse(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(NpyRows, "open", refuse)  # the tests may run as root, who may read anything
    with pytest.raises(InputError, match=r"cannot read .*x.npy: Permission denied. Check the file and its permissions"):
        open_matrix(tmp_path / "x.npy")


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "x.parquet", gaussian(3, 2))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"pip install 'partwise\[data\]'"):
        open_matrix(tmp_path / "x.parquet")


def test_fingerprints_differ_when_the_data_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    X = gaussian(500, 4)
    changed = X.copy()
    changed[333, 2] += 1e-9
    for number, data in enumerate((X, changed, X.astype(np.float32), X.reshape(250, 8))):
        np.save(tmp_path / f"{number}.npy", data)
        write_zarr(tmp_path / f"{number}.zarr", data)
    for suffix in (".npy", ".zarr"):
        found = [open_matrix(tmp_path / f"{number}{suffix}")[2] for number in range(4)]
        assert found[0] == open_matrix(tmp_path / f"0{suffix}")[2]
        assert len({json.dumps(fingerprint) for fingerprint in found}) == 4
    assert ArrayRows(X).fingerprint() == ArrayRows(np.asfortranarray(X)).fingerprint() != ArrayRows(changed).fingerprint()
    small = open_matrix(tmp_path / "0.npy")[2]
    monkeypatch.setattr(_fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(_fingerprint, "BLOCK", 8)
    large = open_matrix(tmp_path / "0.npy")[2]
    assert "changed_ns" in large
    assert "changed_ns" not in small
    content = bytearray((tmp_path / "0.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "0.npy").write_bytes(content)
    assert open_matrix(tmp_path / "0.npy")[2]["sha256"] != large["sha256"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory of a process")
def test_scattered_rows_of_a_file_do_not_bring_the_file_into_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((100_000, 200), dtype=np.float32))  # 80 MB
    program = f"""
import numpy as np
from pathlib import Path
from partwise.decompose._readers import NpyRows
source, rng = NpyRows.open({str(tmp_path / "x.npy")!r}), np.random.default_rng(0)
source.take(np.arange(10))
peak = lambda: int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])
before = peak()
for _ in range(20):
    source.take(rng.integers(100_000, size=1000))
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)  # KiB
    assert grown < 20_000
