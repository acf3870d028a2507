"""Files as the command opens them: keys, columns that look like an index, and what is said of damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import io, sparse

from matrices import gaussian
from partwise.checks import InputError
from partwise.decompose._matrix_files import SUFFIXES, open_matrix, open_rows

pyarrow = pytest.importorskip("pyarrow", reason="reads parquet")
parquet = pytest.importorskip("pyarrow.parquet", reason="reads parquet")
zarr = pytest.importorskip("zarr", reason="reads zarr")


@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
def test_a_key_that_is_not_there_is_said_to_be_missing(suffix: str, tmp_path: Path) -> None:
    X = gaussian(9, 3)
    path = tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez(path, first=X)
    else:
        zarr.create_array(str(path), name="first", data=X)
    with pytest.raises(InputError, match=r"x\.(npz|zarr) holds no array 'zzz', expected one of: first\. Name one of them as key") as caught:
        open_matrix(path, key="zzz")
    assert caught.value.code == "array-not-named"


def test_a_key_for_a_file_without_names_is_refused(tmp_path: Path) -> None:
    X = gaussian(9, 3)
    np.save(tmp_path / "x.npy", X)
    np.savetxt(tmp_path / "x.csv", X, delimiter=",")
    parquet.write_table(pyarrow.table({"a": X[:, 0], "b": X[:, 1]}), tmp_path / "x.parquet")
    io.mmwrite(tmp_path / "x.mtx", sparse.coo_array(X))
    zarr.create_array(str(tmp_path / "x.zarr"), data=X)
    sparse.save_npz(tmp_path / "x.npz", sparse.csr_array(X))
    for suffix in SUFFIXES:
        path = tmp_path / f"x{suffix}"
        for opener in (open_matrix, open_rows) if suffix in {".npy", ".parquet", ".zarr"} else (open_matrix,):
            with pytest.raises(InputError, match=rf"got key='zzz' for .*x\{suffix}, which holds one matrix without a name, expected no key") as caught:
                opener(path, key="zzz")
            assert caught.value.code == "key-without-arrays"


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_a_column_that_looks_like_an_index_is_hinted_at(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.csv").write_text(f"{name},a\n0,1\n1,5\n")
    _, names, _ = open_matrix(tmp_path / "x.csv")
    assert names == (name, "a")
    assert caplog.messages == [
        f"{tmp_path / 'x.csv'} has a column named {name!r}, as pandas names its index; it is used as a feature. "
        "If it is one, write the file again with index=False."
    ]


def test_a_page_of_parquet_whose_checksum_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"a": np.arange(1000.0), "b": np.arange(1000.0)})
    parquet.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[content.index(np.float64(500.0).tobytes()) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.parquet is no sound parquet file: .*CRC.*[^.]\. Export it again"):
        open_matrix(path)


def test_what_another_library_says_ends_with_one_full_stop(tmp_path: Path) -> None:
    content = "%%MatrixMarket matrix coordinate real general\n3 3 5\n1 1 1.0\n"
    (tmp_path / "x.mtx").write_text(content)
    (tmp_path / "x.npy").write_bytes(b"rubbish rubbish")
    for name in ("x.mtx", "x.npy"):
        with pytest.raises(InputError, match=r"[^.]\. Export it again"):
            open_matrix(tmp_path / name)
