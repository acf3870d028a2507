"""Claims of covariances: the same numbers for every form of the data, the same bits for every batch and number of cores, and no copy of the data."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from matrices import gaussian
from partwise.checks import InputError
from partwise.decompose import _covariance, _moments, _sparse_covariance
from partwise.decompose._covariance import ChunkedCovariance, Covariance, GramCovariance, covariance_of
from partwise.decompose._readers import ArrayRows, NpyRows
from partwise.linalg.products import one_blas_thread
from tolerances import assert_close

TALL, WIDE, SINGLE, PAIR = (90, 17), (23, 61), (40, 1), (2, 5)
every_shape = pytest.mark.parametrize("shape", [TALL, WIDE, SINGLE, PAIR], ids=["tall", "wide", "one feature", "two samples"])


def holey(*shape: int, seed: int = 0) -> NDArray[Any]:
    """A dense matrix with two thirds zeros and a mean that is not zero."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < 1 / 3, 0.5 + rng.standard_normal(shape), 0.0)


def forms(X: NDArray[Any], folder: Path) -> dict[str, Any]:
    """The same data in every form that is read."""
    np.save(folder / "rows.npy", X)
    np.save(folder / "columns.npy", np.asfortranarray(X))
    return {
        "array": X,
        "by columns": np.asfortranarray(X),
        "view": np.repeat(X, 2, axis=0)[::2],
        "csr": sparse.csr_array(X),
        "csc": sparse.csc_matrix(X),
        "coo with duplicates": sparse.coo_array((np.r_[X.ravel() / 2, X.ravel() / 2], np.tile(np.indices(X.shape).reshape(2, -1), 2)), shape=X.shape),
        "operator": aslinearoperator(X),
        "sparse operator": aslinearoperator(sparse.csr_array(X)),
        "map": np.load(folder / "rows.npy", mmap_mode="r"),
        "reader": NpyRows.open(folder / "rows.npy"),
        "reader by columns": NpyRows.open(folder / "columns.npy"),
    }


def reference(X: NDArray[Any]) -> NDArray[Any]:
    return np.atleast_2d(np.cov(X.T))


@every_shape
def test_every_form_of_the_data_has_the_covariance_of_numpy(shape: tuple[int, int], tmp_path: Path) -> None:
    X, vectors = holey(*shape), gaussian(11, shape[1], seed=1)
    expected = reference(X)
    for name, data in forms(X, tmp_path).items():
        covariance = covariance_of(data)
        assert (covariance.num_samples, covariance.num_features, covariance.dtype) == (*shape, np.dtype(np.float64))
        assert_close(covariance.product(vectors), vectors @ expected, claim=f"product of {name}")
        assert_close(covariance.apply(vectors[3]), vectors[3] @ expected, claim=f"product of {name} with one vector")
        assert_close(covariance.mean, X.mean(axis=0), claim=f"mean of {name}")
        assert_close(np.asarray(covariance.total_variance), np.asarray(np.trace(expected)), claim=f"trace of {name}")
        chosen = np.array([1, 0, 1])
        assert_close(covariance.rows(chosen), (X - X.mean(axis=0))[chosen], claim=f"rows of {name}")
        assert covariance.rounding == 0.0


def test_a_mean_that_is_given_is_subtracted_instead(tmp_path: Path) -> None:
    for shape in (TALL, WIDE):
        X, mean, vectors = holey(*shape), gaussian(shape[1], seed=5), gaussian(3, shape[1], seed=1)
        centred = X - mean
        for name, data in forms(X, tmp_path).items():
            covariance = covariance_of(data, mean=mean)
            assert_close(covariance.product(vectors), vectors @ (centred.T @ centred) / (shape[0] - 1), claim=f"product of {name}")
            assert_close(np.asarray(covariance.total_variance), np.square(centred).sum() / (shape[0] - 1), claim=f"trace of {name}")
            assert_close(covariance.rows(np.array([1])), centred[[1]], claim=f"rows of {name}")


@given(rows=st.integers(2, 60), features=st.integers(1, 40), count=st.integers(1, 20), seed=st.integers(0, 99))
def test_chunks_and_pieces_do_not_change_the_covariance(rows: int, features: int, count: int, seed: int) -> None:
    X, vectors = holey(rows, features, seed=seed), gaussian(count, features, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_moments, "FEWEST_ROWS", 3)
        patch.setattr(_moments, "CHUNK_BYTES", 5 * 8 * features)
        patch.setattr(_moments, "FOLD", 4)
        patch.setattr(_covariance, "CHUNK_BYTES", 7 * 8 * features)
        patch.setattr(_covariance, "PIECE_BYTES", 2 * 8 * features)
        patch.setattr(_covariance, "PIECE_ROWS", 1)
        patch.setattr(_covariance, "BLOCK_BYTES", 9 * 8 * features)
        patch.setattr(_sparse_covariance, "CHUNK_ENTRIES", 10)
        patch.setattr(_sparse_covariance, "ENTRIES_PER_FEATURE", 0)
        for data in (X, sparse.csr_array(X)):
            covariance = covariance_of(data)
            assert_close(covariance.product(vectors), vectors @ reference(X), claim="small chunks")
            assert_close(np.asarray(covariance.total_variance), np.asarray(np.trace(reference(X))), claim="small chunks")


def all_bits(data: Any, vectors: NDArray[Any]) -> list[bytes]:
    covariance = covariance_of(data)
    with one_blas_thread():
        numbers = covariance.product(vectors), covariance.apply(vectors[0]), covariance.mean, np.asarray(covariance.total_variance)
    return [number.tobytes() for number in numbers]


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small data are cut as often as large ones."""
    monkeypatch.setattr(_moments, "CHUNK_BYTES", 1)
    monkeypatch.setattr(_moments, "FEWEST_ROWS", 16)
    monkeypatch.setattr(_covariance, "CHUNK_BYTES", 1)
    monkeypatch.setattr(_covariance, "BLOCK_BYTES", 1)
    monkeypatch.setattr(_sparse_covariance, "CHUNK_ENTRIES", 100)
    monkeypatch.setattr(_sparse_covariance, "ENTRIES_PER_FEATURE", 0)


@pytest.mark.usefixtures("many_chunks")
@pytest.mark.parametrize("shape", [(300, 40), (90, 500)], ids=["tall", "wide"])
def test_a_row_of_a_product_has_the_same_bits_alone_in_a_batch_and_in_another_order(shape: tuple[int, int], tmp_path: Path) -> None:
    X, vectors = holey(*shape), gaussian(19, shape[1], seed=1)
    order = np.random.default_rng(0).permutation(19)
    for name, data in forms(X, tmp_path).items():
        covariance = covariance_of(data)
        with one_blas_thread():
            batch = covariance.product(vectors)
            alone = np.concatenate([covariance.product(vector[None]) for vector in vectors])
            mixed = covariance.product(vectors[order])
        np.testing.assert_array_equal(batch, alone, err_msg=name)
        np.testing.assert_array_equal(batch[order], mixed, err_msg=name)


@pytest.mark.usefixtures("many_chunks")
@pytest.mark.parametrize("shape", [(300, 40), (90, 500)], ids=["tall", "wide"])
def test_the_bits_do_not_depend_on_the_number_of_cores(shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    X, vectors = holey(*shape), gaussian(9, shape[1], seed=1)
    found = {}
    for cores in ("1", "2", "5"):
        monkeypatch.setenv("OMP_NUM_THREADS", cores)
        monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
        found[cores] = [all_bits(data, vectors) for data in forms(X, tmp_path).values()]
    assert found["1"] == found["2"] == found["5"]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [TALL, WIDE, (700, 30)])
def test_neither_the_layout_nor_a_file_changes_the_bits(shape: tuple[int, int], dtype: Any, tmp_path: Path) -> None:
    X, vectors = holey(*shape).astype(dtype), gaussian(9, shape[1], seed=1)
    same = forms(X, tmp_path)
    for name in ("by columns", "view", "map", "reader", "reader by columns"):
        assert all_bits(same[name], vectors) == all_bits(X, vectors), name


def test_a_covariance_is_formed_where_that_saves_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(covariance_of(gaussian(30, 30)), GramCovariance)
    assert isinstance(covariance_of(gaussian(29, 30)), ChunkedCovariance)
    monkeypatch.setattr(_covariance, "GRAM_LIMIT", 29)
    assert isinstance(covariance_of(gaussian(300, 30)), ChunkedCovariance)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64, np.bool_, np.float32, np.longdouble])
def test_other_numbers_are_computed_with_in_float64(dtype: Any) -> None:
    numbers = np.random.default_rng(0).integers(0, 2 if dtype == np.bool_ else 100, size=TALL).astype(dtype)
    for X in (numbers, numbers[:9]):
        for data in (X, sparse.csr_array(X)) if dtype != np.longdouble else (X,):
            covariance = covariance_of(data)
            vectors = gaussian(3, TALL[1])
            assert_close(covariance.product(vectors), vectors @ reference(X.astype(np.float64)), claim=f"{dtype.__name__} as float64")


def test_integers_whose_squares_overflow_their_type_are_fine() -> None:
    X = np.random.default_rng(0).integers(-(2**31), 2**31, size=TALL, dtype=np.int32)
    covariance = covariance_of(X)
    assert covariance.total_variance == pytest.approx(np.trace(reference(X.astype(float))), rel=1e-12)
    assert covariance_of(sparse.csr_array(X)).total_variance == pytest.approx(covariance.total_variance, rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [(3000, 20), (15, 20)], ids=["formed", "not formed"])
def test_an_offset_a_million_times_the_spread_costs_no_digits(dtype: Any, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_moments, "CHUNK_BYTES", 1)
    stored = (1e6 + gaussian(*shape)).astype(dtype)  # in float32 a spread of 1 is stored in steps of 1/16; these are the data
    exact, vectors = (stored - np.float64(1e6)), gaussian(4, shape[1], seed=3)
    for work in (2**60, 0):
        monkeypatch.setattr(_moments, "LARGE", work)
        tolerance = 1e-5 if dtype == np.float32 and work == 0 else 1e-10
        covariance = covariance_of(stored)
        assert_close(covariance.product(vectors), vectors @ reference(exact), claim="offset", atol=tolerance)
        np.testing.assert_allclose(covariance.mean - 1e6, exact.mean(axis=0), rtol=0, atol=1e-6 if tolerance == 1e-5 else 1e-9)
        assert covariance.total_variance == pytest.approx(np.trace(reference(exact)), rel=tolerance)


def test_sparse_data_with_an_offset_lose_digits_in_proportion_to_it() -> None:
    exact, vectors = gaussian(300, 10), gaussian(4, 10, seed=3)
    for data in (sparse.csr_array(1e6 + exact), aslinearoperator(1e6 + exact)):
        covariance = covariance_of(data)
        # 1e6 / 1 * 2.2e-16 and a few roundings; subtracting the mean after the second half would leave 1e-4.
        assert_close(covariance.product(vectors), vectors @ reference(exact), claim="sparse offset", atol=1e-8)


def test_files_sorted_by_value_are_joined_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_moments, "CHUNK_BYTES", 1)
    monkeypatch.setattr(_moments, "FEWEST_ROWS", 16)
    X = 1e4 * np.arange(1000)[:, None] / 1000 + gaussian(1000, 6)
    assert_close(covariance_of(X).product(np.eye(6)), reference(X), claim="chunks whose means lie far apart")


@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_float32_products_stay_within_the_rounding_they_state(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_moments, "LARGE", 0)
    X = (3.0 + gaussian(6000, 80) @ (np.arange(1, 81.0) ** -decay * np.linalg.qr(gaussian(80, 80))[0].T).T).astype(np.float32)
    monkeypatch.setattr(_moments, "FEWEST_ROWS", 512)
    monkeypatch.setattr(_moments, "CHUNK_BYTES", 1)
    covariance = covariance_of(X)
    exact = reference(X.astype(np.float64))
    lost = np.linalg.norm(covariance.product(np.eye(80)) - exact, 2)
    assert 0 < lost <= covariance.rounding <= 1e-6 * np.linalg.norm(exact, 2)


def test_values_too_large_for_float32_products_are_multiplied_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_moments, "LARGE", 0)
    X = 1e30 * gaussian(50, 4, dtype=np.float32)
    assert_close(covariance_of(X).product(np.eye(4)) / 1e60, reference(X.astype(float)) / 1e60, claim="squares above the range of float32")


def test_constant_columns_have_no_variance() -> None:
    X = holey(*TALL)
    X[:, 3] = 0.1
    for data in (X, sparse.csr_array(X)):
        unit = covariance_of(data).product(np.eye(TALL[1])[[3]])
        assert np.abs(unit).max() < 1e-15


def with_entries(X: NDArray[Any], value: float) -> NDArray[Any]:
    X = X.copy()
    X[5, 2], X[5, 3], X[11, 0] = value, value, value
    return X


@pytest.mark.usefixtures("many_chunks")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [(90, 17), (20, 61)], ids=["tall", "wide"])
def test_nan_and_infinity_are_counted_and_the_first_is_named(value: float, dtype: Any, shape: tuple[int, int], tmp_path: Path) -> None:
    X = with_entries(gaussian(*shape, dtype=dtype), value)
    np.save(tmp_path / "x.npy", X)
    for data in (X, np.load(tmp_path / "x.npy", mmap_mode="r"), NpyRows.open(tmp_path / "x.npy"), sparse.csr_array(X)):
        with pytest.raises(InputError, match=f"3 NaN or infinite entries out of {X.size}, the first in row 5, column 2") as caught:
            covariance_of(data)
        assert caught.value.code == "not-finite"
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match=r"column sums for 3 features, the first is feature 0. Check the operator"):
        covariance_of(aslinearoperator(X))


def test_a_matrix_with_nan_is_read_once(tmp_path: Path) -> None:
    class Counted(ArrayRows):
        passes = 0

        def chunks(self, size: int) -> Any:
            Counted.passes += 1
            return super().chunks(size)

    with pytest.raises(InputError, match="3 NaN"):
        covariance_of(Counted(with_entries(gaussian(*TALL), np.nan)))
    assert Counted.passes == 1


BAD: dict[str, tuple[Any, str, str]] = {
    "complex": (gaussian(*TALL) * 1j, "complex-input", "Complex data not supported: X holds complex128, expected real numbers"),
    "complex sparse": (sparse.csr_array(gaussian(*TALL) * 1j), "complex-input", "Complex data not supported"),
    "complex operator": (aslinearoperator(gaussian(*TALL) * 1j), "complex-input", "Complex data not supported"),
    "objects": (np.full(TALL, None), "object-array", "X holds Python objects, expected numbers"),
    "text": (np.full(TALL, "a"), "not-numbers", "X has entries of type <U1, expected real numbers"),
    "one sample": (np.ones((1, 3)), "data-shape", r"got data of shape \(1, 3\), expected a matrix of at least 2 samples"),
    "no feature": (np.ones((3, 0)), "data-shape", r"got data of shape \(3, 0\)"),
    "three axes": (np.ones((3, 2, 2)), "data-shape", r"got data of shape \(3, 2, 2\)"),
    "a list": ([[1.0, 2.0]], "data-shape", r"got data of shape \(\)"),
    "too large": (1e200 * gaussian(*TALL), "too-large", "squares overflow, expected absolute values below 1e[+]148"),
    "too large and wide": (1e200 * gaussian(*WIDE), "too-large", "squares overflow"),
    "too large and sparse": (sparse.csr_array(1e200 * gaussian(*TALL)), "too-large", "squares overflow"),
}


@pytest.mark.parametrize("name", BAD)
def test_data_that_cannot_be_used_are_refused(name: str) -> None:
    data, code, text = BAD[name]
    with pytest.raises(InputError, match=text) as caught:
        covariance_of(data)
    assert caught.value.code == code


def test_other_types_of_data_and_means_of_another_size_are_refused() -> None:
    class Shaped:
        shape = (4, 3)

    with pytest.raises(InputError, match="got data of type Shaped, expected an array, a sparse matrix, a LinearOperator or a reader of rows"):
        covariance_of(Shaped())
    with pytest.raises(InputError, match=r"got a mean of shape \(2,\) for data of shape \(4, 3\)"):
        covariance_of(np.ones((4, 3)), mean=np.zeros(2))


def test_the_sparse_matrix_of_the_caller_is_left_alone() -> None:
    X = sparse.csr_array((np.ones(4), np.array([2, 0, 0, 1]), np.array([0, 3, 4])), shape=(2, 3))
    before = X.data.copy(), X.indices.copy(), X.indptr.copy()
    covariance_of(X)
    for old, new in zip(before, (X.data, X.indices, X.indptr), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_total_variance_of_a_large_operator_is_estimated_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sparse_covariance, "TRACE_LIMIT", 10)
    X = gaussian(200, 50)
    with pytest.warns(UserWarning, match="estimated with 64 random vectors, to about"):
        covariance = covariance_of(aslinearoperator(X))
    # A standard error is sqrt(2 / 64 / 50), about 2.5 %; three of them.
    assert covariance.total_variance == pytest.approx(np.trace(reference(X)), rel=0.075)


def test_an_operator_that_only_knows_vectors_is_enough() -> None:
    X, vectors = gaussian(*TALL), gaussian(11, TALL[1], seed=1)
    operator = LinearOperator(X.shape, matvec=lambda vector: X @ vector.ravel(), rmatvec=lambda vector: X.T @ vector.ravel(), dtype=X.dtype)
    assert_close(covariance_of(operator).product(vectors), vectors @ reference(X), claim="matvec and rmatvec")


def peak_of(function: Any) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


PEAK = """
import sys
import numpy as np
from partwise.decompose._covariance import covariance_of

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

mapped = np.load(sys.argv[1], mmap_mode="r")
covariance_of(mapped[:4]).product(np.ones((1, mapped.shape[1])))
before = peak()
covariance_of(mapped).product(np.ones((1, mapped.shape[1])))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("shape", [(160_000, 400), (1_000, 64_000)], ids=["tall", "wide"])
def test_a_map_that_was_read_does_not_stay_in_resident_memory(shape: tuple[int, int], tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:  # 244 MiB
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        piece = gaussian(shape[0] // 100, shape[1], dtype=np.float32)
        for _ in range(100):
            file.write(piece.data)
    said = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "x.npy")], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True
    ).stdout
    assert float(said) < 100  # two chunks of 16 MiB, as they are and in float64


@pytest.mark.usefixtures("many_chunks")
@pytest.mark.parametrize("shape", [(40_000, 50), (400, 5_000)], ids=["tall", "wide"])
def test_the_data_are_never_copied(shape: tuple[int, int], tmp_path: Path) -> None:
    X = gaussian(*shape, dtype=np.float32)
    np.save(tmp_path / "x.npy", X)
    for data in (X, np.asfortranarray(X), np.load(tmp_path / "x.npy", mmap_mode="r"), NpyRows.open(tmp_path / "x.npy")):
        peak = peak_of(lambda data=data: covariance_of(data).product(np.ones((3, shape[1]))))
        assert peak < X.nbytes / 2, f"{peak} bytes for {X.nbytes} bytes of data"


def test_sparse_data_are_never_densified() -> None:
    X = sparse.random_array((20_000, 5_000), density=1e-3, format="csr", rng=np.random.default_rng(0))
    peak = peak_of(lambda: covariance_of(X).product(np.ones((3, 5_000))))
    assert peak < 20e6  # dense: 800 MB; the entries: 1.2 MB


def test_a_map_travels_as_its_path(tmp_path: Path) -> None:
    for shape in ((50, 300), (9000, 20)):
        X = gaussian(*shape)
        np.save(tmp_path / "x.npy", X)
        covariance = covariance_of(np.load(tmp_path / "x.npy", mmap_mode="r"))
        message = pickle.dumps(covariance)
        assert len(message) < X.nbytes / 10 + 1000
        arrived: Covariance = pickle.loads(message)  # noqa: S301 - a message written two lines above
        vectors = gaussian(3, shape[1])
        np.testing.assert_array_equal(arrived.product(vectors), covariance.product(vectors))
        np.testing.assert_array_equal(arrived.rows(np.array([4])), covariance.rows(np.array([4])))


def test_a_sparse_covariance_travels_once(tmp_path: Path) -> None:
    X = sparse.random_array((2000, 300), density=0.1, format="csr", rng=np.random.default_rng(0))
    covariance = covariance_of(X)
    first = covariance.product(gaussian(2, 300))
    message = pickle.dumps(covariance)
    assert len(message) < 1.1 * (X.data.nbytes + X.indices.nbytes + X.indptr.nbytes) + 5000
    np.testing.assert_array_equal(pickle.loads(message).product(gaussian(2, 300)), first)  # noqa: S301 - a message written two lines above
