"""Units that keep squares of tiny and of huge data within the range of float64.

A unit is a power of two, so that dividing by it changes no digit. Data of ordinary sizes keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partwise.checks import InputError
from partwise.decompose._covariance import Covariance, GramCovariance
from partwise.decompose._eigen_rounds import Eigenpairs
from partwise.linalg.certificate import Certificate

__all__ = ["ScaledCovariance", "check_variance", "in_unit", "rows_told_in", "scaled", "told_as", "told_in", "unit_of", "without_rows"]

CONSTANT = 8 * float(np.finfo(np.float64).eps)  # share of its mean by which a column that is constant may seem to vary
SMALLEST = 1e-260  # total variance, below which the squares of small components vanish
CHUNK_BYTES = 1 << 23  # of rows that are looked at together

ORDINARY = 100  # binary digits of a variance to either side of 1: squares of its rounding, and of those, are far from both ends


def unit_of(variance: float) -> float:
    """A power of four near ``variance``, or 1 where that is neither tiny nor huge."""
    exponent = math.frexp(variance)[1]
    return 1.0 if abs(exponent) <= ORDINARY else math.ldexp(1.0, exponent // 2 * 2)


@dataclass(frozen=True, eq=False)
class ScaledCovariance:
    """A covariance in another unit of variance: products are divided by it, rows by its root.

    Parameters
    ----------
    covariance : Covariance
        As the data have it.
    unit : float
        A power of four.
    """

    covariance: Covariance = field(repr=False)
    unit: float

    @property
    def num_samples(self) -> int:
        """Rows of the data."""
        return self.covariance.num_samples

    @property
    def num_features(self) -> int:
        """Columns of the data."""
        return self.covariance.num_features

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of vectors and products."""
        return self.covariance.dtype

    @property
    def mean(self) -> NDArray[Any]:
        """Mean of each feature, in units of the rows."""
        mean: NDArray[Any] = self.covariance.mean / math.sqrt(self.unit)
        return mean

    @property
    def total_variance(self) -> float:
        """Trace of the covariance."""
        return self.covariance.total_variance / self.unit

    @property
    def rounding(self) -> float:
        """As of ``Covariance``."""
        return self.covariance.rounding / self.unit

    def product(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Rows times the covariance: (k, features) -> (k, features)."""
        return self.covariance.product(vectors) / self.unit

    def apply(self, vector: NDArray[Any]) -> NDArray[Any]:
        """The covariance times one vector: (features,) -> (features,)."""
        return self.covariance.apply(vector) / self.unit

    def rows(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Centred dense rows of the data, (b, features)."""
        rows: NDArray[Any] = self.covariance.rows(indices) / math.sqrt(self.unit)
        return rows


def in_unit(covariance: Covariance, unit: float) -> Covariance:
    """The same covariance, told in another unit of variance."""
    return covariance if unit == 1.0 else ScaledCovariance(covariance, unit)


def without_rows(covariance: Covariance) -> Covariance:
    """What may be sent to workers that multiply only: a formed covariance without the rows it was formed of."""
    if isinstance(covariance, ScaledCovariance):
        return replace(covariance, covariance=without_rows(covariance.covariance))
    return replace(covariance, source=None) if isinstance(covariance, GramCovariance) else covariance


def scaled(state: Eigenpairs, factor: float) -> Eigenpairs:
    """A state whose values and residuals are told in another unit."""
    return state if factor == 1.0 else replace(state, values=state.values * factor, residuals=state.residuals * factor)


def told_in(progress: Callable[[int, Eigenpairs], None] | None, unit: float) -> Callable[[int, Eigenpairs], None] | None:
    """A progress function that is told values in the unit of the data."""
    if progress is None or unit == 1.0:
        return progress
    return lambda number, state: progress(number, scaled(state, unit))


def told_as(certificate: Certificate, unit: float) -> Certificate:
    """A certificate in the unit of the data."""
    if unit == 1.0:
        return certificate
    test = certificate.missed_value_test
    test = replace(test, probe_value=test.probe_value * unit, smallest_kept=test.smallest_kept * unit, bound=test.bound * unit)
    return Certificate(certificate.values * unit, certificate.residuals * unit, certificate.intervals * unit, test)


def rows_told_in(history: list[dict[str, Any]], unit: float) -> list[dict[str, Any]]:
    """The records of a run in the unit of the data."""
    if unit == 1.0:
        return history
    return [
        row | {name: [None if number is None else number * unit for number in row[name]] for name in ("values", "residuals")} for row in history
    ]


def check_variance(covariance: Covariance) -> None:
    """Refuse data in which no column varies by more than rounding of its own mean, and those that vary too little to be squared."""
    size = float(np.abs(covariance.mean).max())
    means = size * float(np.linalg.norm(covariance.mean / size)) if size else 0.0  # (features,) may be too large to be squared
    suspect = math.sqrt(max(covariance.total_variance, 0.0)) <= CONSTANT * means  # otherwise some column varies
    if not suspect and covariance.total_variance >= SMALLEST:
        return
    spread = _largest_deviations(covariance)
    if not (spread > CONSTANT * np.abs(covariance.mean)).any():
        raise InputError("no-variance", "got data in which every column is constant, expected at least one that varies. Check which file was read.")
    if covariance.total_variance < SMALLEST:
        raise InputError(
            "too-small",
            f"got entries that vary by {spread.max():.0e} at most, expected a total variance of at least {SMALLEST:.0e}: below it squares vanish. "
            "Multiply the data by a constant.",
        )


def _largest_deviations(covariance: Covariance) -> NDArray[np.float64]:
    """How far the entries of each column are from its mean at most, (features,)."""
    largest = np.zeros(covariance.num_features)
    size = max(1, CHUNK_BYTES // (8 * covariance.num_features))
    for start in range(0, covariance.num_samples, size):
        rows = covariance.rows(np.arange(start, min(start + size, covariance.num_samples)))
        largest = np.maximum(largest, np.abs(rows).max(axis=0))
    return largest
