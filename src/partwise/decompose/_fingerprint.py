"""Fingerprints of data: equal when the data are, so that a run can tell whether its data changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["fingerprint_of_array", "fingerprint_of_path"]

BLOCK = 1 << 22
WHOLE = 1 << 30  # files up to this size are read in full
NUM_BLOCKS = 64  # of a larger file


def fingerprint_of_array(array: NDArray[Any]) -> dict[str, Any]:
    """Size, shape, dtype and a digest of an array in memory, without a copy of it."""
    digest = hashlib.sha256()
    rows = max(1, BLOCK // max(1, array[:1].nbytes)) if array.ndim else 1
    for start in range(0, len(array), rows):
        digest.update(np.ascontiguousarray(array[start : start + rows]).data)
    return {"size": int(array.nbytes), "shape": list(array.shape), "dtype": str(array.dtype), "sha256": digest.hexdigest()}


def fingerprint_of_path(path: str | Path, *, shape: tuple[int, int], dtype: np.dtype[Any]) -> dict[str, Any]:
    """Size, shape, dtype and a digest of a file, or of a folder of files.

    Of a file above 1 GiB the head, the tail and 64 blocks evenly between them are read, and the time of its last change is recorded.
    """
    root = Path(path)
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    digest, size, changed = hashlib.sha256(), 0, 0
    for file in files:
        status = file.stat()
        digest.update(f"{file.relative_to(root)} {status.st_size}\n".encode())
        for block in _blocks(file, status.st_size):
            digest.update(block)
        size += status.st_size
        if status.st_size > WHOLE:
            changed = max(changed, status.st_mtime_ns)
    found = {"size": size, "shape": list(shape), "dtype": str(dtype), "sha256": digest.hexdigest()}
    return found | ({"changed_ns": changed} if changed else {})


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    starts = range(0, size, BLOCK) if size <= WHOLE else np.linspace(0, size - BLOCK, NUM_BLOCKS + 2, dtype=np.int64)
    with path.open("rb") as file:
        for start in starts:
            file.seek(int(start))
            yield file.read(BLOCK)
