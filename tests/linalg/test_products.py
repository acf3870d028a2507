"""Claims of products whose bits do not depend on the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st

from matrices import gaussian
from partwise.linalg.products import TILE, one_blas_thread, tiled_product
from tolerances import assert_close

dtypes = pytest.mark.parametrize("dtype", [np.float64, np.float32])


@dtypes
@given(count=st.integers(0, 3 * TILE), size=st.integers(1, 70), columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_tiled_product_is_the_product(dtype: Any, count: int, size: int, columns: int, seed: int) -> None:
    vectors, matrix = gaussian(count, size, seed=seed, dtype=dtype), gaussian(size, columns, seed=seed + 1, dtype=dtype)
    # Sums of 70 terms of either sign: what cancels is measured against the terms.
    assert_close(tiled_product(vectors, matrix), vectors @ matrix, claim="vectors @ matrix", atol=1e-12 if dtype == np.float64 else 1e-4)


@dtypes
@given(count=st.integers(1, 3 * TILE), size=st.integers(1, 70), columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_another_order(dtype: Any, count: int, size: int, columns: int, seed: int) -> None:
    vectors, matrix = gaussian(count, size, seed=seed, dtype=dtype), gaussian(size, columns, seed=seed + 1, dtype=dtype)
    order = np.random.default_rng(seed).permutation(count)
    with one_blas_thread():
        batch = tiled_product(vectors, matrix)
        alone = np.concatenate([tiled_product(vector[None], matrix) for vector in vectors])
        mixed = tiled_product(vectors[order], matrix)
    np.testing.assert_array_equal(batch, alone)
    np.testing.assert_array_equal(batch[order], mixed)


@dtypes
def test_the_bits_are_the_same_at_sizes_where_blas_would_use_threads(dtype: Any) -> None:
    vectors, matrix = gaussian(20, 700, dtype=dtype), gaussian(700, 900, seed=1, dtype=dtype)
    with one_blas_thread():
        batch = tiled_product(vectors, matrix)
        alone = np.concatenate([tiled_product(vector[None], matrix) for vector in vectors])
    np.testing.assert_array_equal(batch, alone)


def test_a_value_that_is_not_finite_stays_in_its_row() -> None:
    vectors, matrix = gaussian(5, 9), gaussian(9, 4, seed=1)
    clean = tiled_product(vectors, matrix)
    vectors[2, 3] = np.nan
    dirty = tiled_product(vectors, matrix)
    assert np.isnan(dirty[2]).all()
    np.testing.assert_array_equal(np.delete(dirty, 2, axis=0), np.delete(clean, 2, axis=0))


def test_blas_has_one_thread_inside_the_block_and_its_own_number_after_it() -> None:
    def numbers() -> list[int]:
        return [library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]

    before = numbers()
    with one_blas_thread():
        inside = numbers()
    with pytest.raises(RuntimeError, match="stop"), one_blas_thread():
        raise RuntimeError("stop")
    assert set(inside) == {1}
    assert numbers() == before


def test_one_thread_holds_for_libraries_that_load_after_the_first_block():
    program = """
from partwise.linalg.products import one_blas_thread
with one_blas_thread():
    pass
import scipy.linalg, threadpoolctl
with one_blas_thread():
    print(sorted({library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"}))
"""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "2")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1]"
