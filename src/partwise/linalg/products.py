"""Matrix products whose bits do not depend on who else is in them.

A batch of vectors and the same vectors one at a time meet different BLAS kernels, and a different number of threads splits sums elsewhere; both
change the last bits. Here every product is made of tiles of eight vectors, padded with zeros, so that each tile meets the same kernel wherever it
runs. Inside ``one_blas_thread`` the result of a vector is then the same alone, in a batch, in this process and in a worker on another machine of
the same kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partwise.checks import load_extra

__all__ = ["TILE", "one_blas_thread", "tiled_product"]

TILE = 8  # vectors in a tile: what the kernels of common BLAS libraries handle without a remainder


def tiled_product(vectors: NDArray[Any], matrix: NDArray[Any]) -> NDArray[Any]:
    """``vectors @ matrix``, each row with the bits it would have alone.

    Parameters
    ----------
    vectors : ndarray of shape (k, d)
        One vector per row; k may be 0.
    matrix : ndarray of shape (d, m)
        Of the same dtype.

    Returns
    -------
    ndarray of shape (k, m)

    Examples
    --------
    >>> vectors, matrix = np.random.default_rng(0).normal(size=(2, 11, 11))
    >>> alone = [tiled_product(vector[None], matrix)[0] for vector in vectors]
    >>> bool(np.array_equal(alone, tiled_product(vectors, matrix)))
    True
    """
    num_vectors, size = vectors.shape
    num_tiles = -(-num_vectors // TILE)
    tiles = np.zeros((num_tiles, TILE, size), dtype=vectors.dtype)
    tiles.reshape(-1, size)[:num_vectors] = vectors
    product: NDArray[Any] = np.matmul(tiles, matrix).reshape(-1, matrix.shape[1])[:num_vectors]
    return product


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside the block BLAS uses one thread, so that sums are split alike on every machine. Parallelism comes from parts and chunks instead."""
    with _controller().limit(limits=1, user_api="blas"):
        yield


@cache
def _controller() -> Any:
    load_extra("scipy.linalg", extra="sklearn")  # brings a BLAS of its own, and only libraries that are loaded by now are held
    return load_extra("threadpoolctl", extra="sklearn").ThreadpoolController()
