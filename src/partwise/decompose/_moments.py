"""Mean and scatter of rows that are seen a chunk at a time, in one pass.

Each chunk is centred by its own mean before anything is squared, and chunks are joined by their means (Chan, Golub, LeVeque 1983), so that an offset
a million times the spread costs no digits. Chunks of a large float32 file are multiplied in float32, which is twice as fast, and summed in float64;
what that costs is measured on the first chunk and kept as ``rounding``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partwise.checks import InputError
from partwise.decompose._in_order import map_in_order
from partwise.decompose._readers import RowSource
from partwise.linalg.products import one_blas_thread

__all__ = ["RANGE", "Moments", "check_integers", "check_precision", "column_sums", "gather_moments", "not_finite"]

CHUNK_BYTES = 1 << 24  # of rows as they are stored
MOST_ROWS, FEWEST_ROWS = 8192, 1024  # of a chunk of a Gram pass: fewer would spend the time on adding matrices
LARGE = 2**36  # multiplications above which chunks of float32 are multiplied in float32: seconds instead of a second
HALF_WORK = {np.dtype(kind) for kind in (np.float32, np.int8, np.uint8, np.int16, np.uint16, np.bool_)}  # exact in float32
FOLD = 64  # rows that join chunks, before they are multiplied in one go
EXACT_INTEGERS = 2**53
RANGE = np.sqrt(np.finfo(np.float64).max) / 1e6  # larger entries have squares whose sum may overflow


@dataclass(frozen=True, eq=False)
class Moments:
    """What one pass over rows finds.

    Parameters
    ----------
    mean : ndarray of shape (features,)
        What the rows were centred by, float64.
    scatter : ndarray of shape (features, features) or None
        Sum over the rows of the outer products of centred rows, when it was asked for.
    trace : float
        Sum of the squares of all centred entries.
    rounding : float
        How far the scatter may be from that of exact arithmetic, as a spectral norm.
    """

    mean: NDArray[Any]
    scatter: NDArray[Any] | None
    trace: float
    rounding: float


@dataclass(frozen=True, eq=False)
class _ChunkMoments:
    num_rows: int
    mean: NDArray[Any] | None  # None: the chunk holds NaN or infinite entries
    scatter: NDArray[Any] | float
    offset: NDArray[Any] | None  # mean of what was multiplied, which rounding left a little off zero
    num_bad: int = 0
    first_bad: tuple[int, int] = (0, 0)


def gather_moments(source: RowSource, *, gram: bool, mean: NDArray[Any] | None = None) -> Moments:
    """Mean, scatter and trace of the rows of ``source``, in one pass with all cores.

    Parameters
    ----------
    source : RowSource
        The rows.
    gram : bool
        Whether the scatter matrix is wanted, or only its trace.
    mean : ndarray of shape (features,), optional
        Centre by this instead of the mean of the rows.

    Raises
    ------
    InputError
        When entries are NaN or infinite (how many, and where the first is), or so large that their squares overflow or float64 cannot hold them.
    """
    num_rows, num_features = source.shape
    work = np.dtype(np.float32 if gram and num_rows * num_features**2 >= LARGE and source.dtype in HALF_WORK else np.float64)
    least, most = (FEWEST_ROWS, MOST_ROWS) if gram else (1, num_rows)
    size = int(np.clip(CHUNK_BYTES // max(1, num_features * source.dtype.itemsize), least, most))
    size = min(size, num_rows)
    bytes_each = num_features * (size * (source.dtype.itemsize + work.itemsize) + (num_features * work.itemsize if gram else 0))
    joined = _Joined(num_features, gram=gram)
    with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
        for chunk in map_in_order(lambda rows: _of_chunk(rows, gram=gram, work=work), source.chunks(size), bytes_each=bytes_each):
            joined.add(chunk)
        rounding = _rounding_of(source, size, work) * -(-num_rows // size)
        return joined.finish(num_rows, mean=mean, rounding=rounding)


class _Joined:
    """The chunks seen so far, joined."""

    def __init__(self, num_features: int, *, gram: bool) -> None:
        self.count = self.num_bad = 0
        self.first_bad: tuple[int, int] | None = None
        self.mean = np.zeros(num_features)
        self.scatter: NDArray[Any] | None = np.zeros((num_features, num_features)) if gram else None
        self.trace = 0.0
        self.plus: list[NDArray[Any]] = []  # rows whose outer products are still to be added
        self.minus: list[NDArray[Any]] = []  # and to be taken away

    def add(self, chunk: _ChunkMoments) -> None:
        before = self.count
        self.count += chunk.num_rows
        if chunk.mean is None or chunk.offset is None:
            if self.first_bad is None:
                self.first_bad = before + chunk.first_bad[0], chunk.first_bad[1]
            self.num_bad += chunk.num_bad
        if self.num_bad or chunk.mean is None or chunk.offset is None:
            return  # what remains is to count the entries that are not finite
        step = chunk.mean - self.mean
        self.mean = self.mean + step * (chunk.num_rows / self.count)
        if self.scatter is None:
            self.trace += float(chunk.scatter)
        else:
            self.scatter += chunk.scatter
        self.correct(step * np.sqrt(before * chunk.num_rows / self.count), chunk.offset * np.sqrt(chunk.num_rows))

    def correct(self, plus: NDArray[Any], minus: NDArray[Any]) -> None:
        """Add the outer product of one vector and take away that of another, when enough of them wait to be multiplied in one go."""
        if self.scatter is None:
            self.trace += float(plus @ plus - minus @ minus)
            return
        self.plus.append(plus)
        self.minus.append(minus)
        if len(self.plus) == FOLD:
            self.fold(self.scatter)

    def fold(self, scatter: NDArray[Any]) -> None:
        if self.plus:
            plus, minus = np.array(self.plus), np.array(self.minus)  # (chunks, features)
            scatter += plus.T @ plus
            scatter -= minus.T @ minus
        self.plus, self.minus = [], []

    def finish(self, num_rows: int, *, mean: NDArray[Any] | None, rounding: float) -> Moments:
        if self.first_bad is not None:
            raise not_finite(self.num_bad, self.first_bad, num_entries=num_rows * len(self.mean))
        if mean is not None:
            self.correct((mean - self.mean) * np.sqrt(num_rows), np.zeros_like(self.mean))
        if self.scatter is not None:
            self.fold(self.scatter)
        trace = self.trace if self.scatter is None else float(np.trace(self.scatter))
        if not np.isfinite(trace):
            raise InputError(
                "too-large", f"got entries so large that their squares overflow, expected absolute values below {RANGE:.0e}. Divide the data by a constant."
            )
        return Moments(self.mean if mean is None else mean, self.scatter, trace, rounding)


@np.errstate(over="ignore", invalid="ignore")  # again, because what a thread sets does not reach the others
def _of_chunk(rows: NDArray[Any], *, gram: bool, work: np.dtype[Any]) -> _ChunkMoments:
    check_integers(rows)
    rows = np.ascontiguousarray(rows)  # so that the bits do not depend on the layout
    sums = column_sums(rows)
    if not np.isfinite(sums).all():
        bad = ~np.isfinite(rows)
        if bad.any():
            place = np.argwhere(bad)[0]
            return _ChunkMoments(len(rows), None, 0.0, None, int(bad.sum()), (int(place[0]), int(place[1])))
        sums = rows.sum(axis=0, dtype=np.float64)  # finite, but too large to be summed in float32
    centre = (sums / len(rows)).astype(work)
    centred = np.subtract(rows, centre) if rows.dtype == work else rows.astype(work)
    if rows.dtype != work:
        centred -= centre
    offset = column_sums(centred) / len(rows)
    scatter = centred.T @ centred if gram else float(np.vdot(centred, centred))
    total = float(np.trace(scatter)) if gram else scatter
    if len(rows) * float(offset @ offset) > total / 2:  # what varies is rounding of the centre, in columns that are huge and constant
        centred -= offset.astype(work)
        centre = centre + offset
        offset = column_sums(centred) / len(rows)
        scatter = centred.T @ centred if gram else float(np.vdot(centred, centred))
    if work == np.float32 and not np.isfinite(scatter).all():
        return _of_chunk(rows, gram=gram, work=np.dtype(np.float64))
    return _ChunkMoments(len(rows), centre + offset, scatter, offset)


def column_sums(rows: NDArray[Any]) -> NDArray[Any]:
    """Sums of the columns, (rows, features) -> (features,) in float64; fast for float32, of which 64 rows at a time are added as they are."""
    if rows.dtype != np.float32:
        sums: NDArray[Any] = rows.sum(axis=0, dtype=np.float64)
        return sums
    whole = len(rows) // 64 * 64
    blocks = rows[:whole].reshape(-1, 64, rows.shape[1]).sum(axis=1)
    return blocks.sum(axis=0, dtype=np.float64) + rows[whole:].sum(axis=0, dtype=np.float64)  # type: ignore[no-any-return]


def _rounding_of(source: RowSource, size: int, work: np.dtype[Any]) -> float:
    """Spectral norm of what a product of the first chunk in ``work`` loses, doubled because 30 power steps find it from below."""
    if work == np.float64:
        return 0.0
    rows = source.take(np.arange(size))
    fast, exact = (_of_chunk(rows, gram=True, work=np.dtype(kind)) for kind in (work, np.float64))
    if fast.offset is None or exact.offset is None:
        return 0.0
    lost = (fast.scatter - len(rows) * np.outer(fast.offset, fast.offset)) - (exact.scatter - len(rows) * np.outer(exact.offset, exact.offset))
    vector = np.random.default_rng(0).standard_normal(len(lost))
    norm = 0.0
    for _ in range(30):
        vector = lost @ (vector / (np.linalg.norm(vector) or 1.0))
        norm = float(np.linalg.norm(vector))
    return 2 * norm


def not_finite(num_bad: int, place: tuple[int, int], *, num_entries: int) -> InputError:
    """The error for NaN or infinite entries of the data."""
    return InputError(
        "not-finite",
        f"X has {num_bad} NaN or infinite entries out of {num_entries}, the first in row {place[0]}, column {place[1]} (counted from 0). "
        "Remove these rows, or fill them in.",
    )


def check_precision(dtype: Any) -> None:
    """Refuse half precision, whose range of five decimal powers most data leave."""
    if np.dtype(dtype) == np.float16:
        raise InputError("half-precision", "got float16 numbers, expected float32, float64 or integers. Convert them: X.astype('float32').")


def check_integers(values: NDArray[Any]) -> None:
    """Refuse integers that float64 cannot tell from their neighbours."""
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8 and values.size:
        largest = max(abs(int(values.min())), abs(int(values.max())))
        if largest > EXACT_INTEGERS:
            raise InputError(
                "integers-too-large",
                f"got integers up to {largest} in size, expected at most 2^53 = {EXACT_INTEGERS}, beyond which neighbours are the same in float64. "
                "Subtract an offset first.",
            )
