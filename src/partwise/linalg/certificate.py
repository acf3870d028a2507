"""How far computed eigenpairs can be from true ones, whoever computed them: residuals, guaranteed intervals, and a probe for what was missed.

Two statements that differ in kind come out of ``certify``:

* Each interval is guaranteed, up to rounding: the matrix has K eigenvalues, counted as often as they occur, one in each of the K intervals. That
  follows from the residuals alone (Kahan's theorem where intervals overlap) and holds for any vectors, good or bad, orthogonal or not.
* That these are the K *largest* eigenvalues no residual can show: a skipped one leaves no trace in those that were found. A probe looks for it,
  outside the span of the vectors, from random starts. What the probe finds is proof: a failed test means that the span can be bettered. What it
  does not find may still be there, and ``missable`` and ``bound`` say with what chance. The probe judges the span as a whole and says nothing of
  how good single vectors are; the width of their intervals does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partwise.checks import InputError, check_at_least
from partwise.linalg.products import TILE

__all__ = ["RISK", "Certificate", "MissedValueTest", "certify"]

RISK = 1e-3  # chance with which ``bound`` may be wrong, and below which the probe stops early
PROBE_STEPS = 10  # on a flat spectrum random starts come within a few per cent of the largest value outside by then
ROUNDING = 8  # products of a matrix with unit vectors were seen to be off by at most 5 units in the last place of its largest value

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MissedValueTest:
    """What a search outside the span of the vectors found.

    Parameters
    ----------
    passed : bool
        False when a value above ``smallest_kept`` was found outside the span, by more than the tolerance. That is proof that the vectors do not
        span the leading ones: exchanging one for what was found keeps more.
    probe_value : float
        Largest value found outside the span (a Rayleigh-Ritz value, so the true one is at least this); ``-inf`` when nothing is outside.
    smallest_kept : float
        Smallest Rayleigh-Ritz value of the span.
    bound : float
        No eigenvalue of the matrix beyond the K largest is above this, except with a chance of ``RISK``. Where the lower end of every interval
        is above it, interval k holds the k-th largest eigenvalue.
    missable : float
        Chance over the random starts that a value above ``smallest_kept`` is outside and was not seen. Near 1 the probe was too short to say, as
        it always is when the next value is nearly as large as the last one kept; ``passed`` then means no more than that nothing was found.
    num_products : int
        Vectors that the probe multiplied by the matrix.
    """

    passed: bool
    probe_value: float
    smallest_kept: float
    bound: float
    missable: float
    num_products: int


@dataclass(frozen=True, eq=False)
class Certificate:
    """Residuals, guaranteed intervals and the outcome of the probe, for K vectors.

    Parameters
    ----------
    values : ndarray of shape (K,)
        Rayleigh quotients ``v^T S v`` of the unit vectors.
    residuals : ndarray of shape (K,)
        ``||S v - value v||``.
    intervals : ndarray of shape (K, 2)
        Lower and upper ends. S has K eigenvalues, counted as often as they occur, one in each interval; each interval also holds its value.
    missed_value_test : MissedValueTest
        Whether larger eigenvalues were left out.
    """

    values: Array
    residuals: Array
    intervals: Array
    missed_value_test: MissedValueTest


@dataclass(frozen=True)
class _Span:
    """The span of the vectors, the matrix within it, and what the matrix sends out of it: ``S basis = basis inside + (orthonormal) leaving``.

    Everything is in units of a power of two near the largest entry of ``S basis``, so that squares of tiny or huge numbers neither vanish nor overflow.
    """

    basis: Array  # (d, K), orthonormal columns
    coordinates: Array  # (K, K), unit column k is vector k in the basis
    inside: Array  # (K, K), symmetric
    leaving: Array  # (K, K) or (d, K)
    lead: Array  # (d,), the direction in which the matrix sends the span out most, or zeros
    scale: float  # a lower bound of the norm of the matrix
    unit: float
    asymmetry: float  # of the matrix within the span before it was made symmetric: pure rounding, when the matrix is symmetric


def certify(
    product: Callable[[NDArray[Any]], NDArray[Any]],
    vectors: NDArray[Any],
    *,
    seed: int,
    num_probe_steps: int | None = None,
    tolerance: float = 1e-6,
    rounding: float = 0.0,
) -> Certificate:
    """Certify vectors as leading eigenvectors of a symmetric matrix S of which only products are known.

    Interval k is ``value_k +- residual_k`` where it overlaps no other. Vectors whose intervals overlap are taken together: with an orthonormal basis
    Q of their span, S has as many eigenvalues within ``||S Q - Q Q^T S Q||_2`` of the Rayleigh-Ritz values of the span, one for each (Kahan).
    Groups grow until no two overlap, so that no eigenvalue is counted twice. A few units in the last place are added for rounding.

    The probe runs Lanczos steps from random vectors on S restricted to the complement of the span. If u is an eigenvector there, of a value x above
    all Ritz values of a run, then ``|<start, u>| <= prod(beta) / prod(x - ritz)``: a value stays hidden only from starts nearly at right angles to its
    vector, and how probable those are is known. The runs are independent; their chances are combined by Fisher's rule, which stays valid when the
    probe stops as soon as the chance is below ``RISK``. One more run starts where the residuals point, which finds neglected mass soonest.

    Parameters
    ----------
    product : callable
        Rows times the matrix: (k, d) -> (k, d), in the dtype of ``vectors``.
    vectors : ndarray of shape (K, d)
        Not zero; their lengths do not matter and they need not be orthogonal. float32 or float64, which sets the size of rounding.
    seed : int
        Of the random starts.
    num_probe_steps : int, default=10
        Most steps of the probe. Each multiplies 8 vectors at once; more steps resolve smaller gaps.
    tolerance : float, default=1e-6
        A value outside counts as missed when it is larger than the smallest one kept by this share of the largest value.
    rounding : float, default=0.0
        How far, as a spectral norm, the matrix behind ``product`` may be from the one that is meant. Intervals are wider by it.

    Returns
    -------
    Certificate
        Costs K + 8 products for each probe step, and memory for 8 vectors per probe step.

    Raises
    ------
    InputError
        When a vector is zero or not finite, there are more vectors than dimensions, or products are not finite or have another shape.

    References
    ----------
    Parlett. The Symmetric Eigenvalue Problem, theorems 4.5.1 and 11.5.1. doi:10.1137/1.9781611971163.

    van Dorsselaer, Hochstenbach, van der Vorst. Computing Probabilistic Bounds for Extreme Eigenvalues of Symmetric Matrices with the Lanczos Method.
    doi:10.1137/S0895479899360471.

    Examples
    --------
    >>> matrix = np.diag([5.0, 4.0, 3.0, 1.0])
    >>> skipped = certify(lambda rows: rows @ matrix, np.eye(4)[[0, 2]], seed=0)
    >>> skipped.values, skipped.residuals.max() < 1e-12
    (array([5., 3.]), np.True_)
    >>> skipped.missed_value_test.passed, round(skipped.missed_value_test.probe_value, 6)
    (False, 4.0)
    """
    num_probe_steps = PROBE_STEPS if num_probe_steps is None else num_probe_steps
    check_at_least(num_probe_steps, 1, name="num_probe_steps")
    span = _span_of(product, vectors)
    unit, rounding = span.unit, rounding / span.unit
    probe = _Probe(product, span, np.random.default_rng(seed), vectors.dtype)
    smallest_kept = float(np.linalg.eigvalsh(span.inside)[0])
    for _ in range(min(num_probe_steps, probe.dimension)):
        probe.step()
        if probe.num_steps >= 3 and probe.chance_hidden(np.array([smallest_kept]))[0] <= RISK:
            break
    scale = max(span.scale, probe.largest)
    slack = rounding + span.asymmetry + ROUNDING * float(np.finfo(vectors.dtype).eps) * scale
    values = np.einsum("ik,ij,jk->k", span.coordinates, span.inside, span.coordinates)  # (K,)
    within = span.inside @ span.coordinates - span.coordinates * values  # (K, K)
    residuals = np.linalg.norm(np.vstack([within, span.leaving @ span.coordinates]), axis=0)  # (K,)
    test = MissedValueTest(
        passed=probe.largest <= smallest_kept + tolerance * scale + slack,
        probe_value=probe.largest * unit,
        smallest_kept=smallest_kept * unit,
        bound=(probe.bound() + slack) * unit,
        missable=float(probe.chance_hidden(np.array([smallest_kept]))[0]),
        num_products=probe.num_products,
    )
    return Certificate(values * unit, residuals * unit, _intervals(span, values, residuals, slack) * unit, test)


def _span_of(product: Callable[[NDArray[Any]], NDArray[Any]], vectors: NDArray[Any]) -> _Span:
    if vectors.ndim != 2 or not 1 <= vectors.shape[0] <= vectors.shape[1]:
        raise InputError(
            "vectors-shape", f"got vectors of shape {vectors.shape}, expected (K, d) with K from 1 to d. Pass one vector per row, without repeats."
        )
    rows = vectors.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)  # (K, 1)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise InputError("vector-unusable", f"got a vector {bad[0]} that is zero or not finite, expected a direction. Leave it out.")
    basis, coordinates = np.linalg.qr((rows / lengths).T)  # (d, K), (K, K)
    image = _checked_product(product, basis.T, vectors.dtype).T  # (d, K)
    unit = float(np.exp2(np.clip(np.frexp(np.abs(image).max())[1], -1021, 1023)))
    image = image / unit
    inside = basis.T @ image  # (K, K)
    leaving = image - basis @ inside  # (d, K)
    leaving -= basis @ (basis.T @ leaving)
    triangle = np.linalg.qr(leaving)[1]  # (K, K)
    strongest = np.linalg.svd(triangle)[2][0]  # (K,)
    return _Span(
        basis=basis,
        coordinates=coordinates,
        inside=(inside + inside.T) / 2,
        leaving=triangle,
        lead=leaving @ strongest,
        scale=float(np.linalg.norm(image, axis=0).max()),
        unit=unit,
        asymmetry=float(np.linalg.norm(inside - inside.T, ord=2)),
    )


def _checked_product(product: Callable[[NDArray[Any]], NDArray[Any]], rows: Array, dtype: np.dtype[Any]) -> Array:
    image = np.asarray(product(np.ascontiguousarray(rows, dtype=dtype)))
    if image.shape != rows.shape or not np.isfinite(image).all():
        what = f"an array of shape {image.shape}" if image.shape != rows.shape else "NaN or infinite entries"
        raise InputError("product-unusable", f"got {what} from product, expected finite ones of shape {rows.shape}. Check the matrix behind it.")
    return image.astype(np.float64)


def _intervals(span: _Span, values: Array, residuals: Array, slack: float) -> Array:
    """One interval per vector; vectors whose intervals overlap are treated as one group, until no two groups overlap."""
    groups = [[int(k)] for k in np.argsort(values)]
    centres, radii = values.copy(), residuals + slack
    while len(groups) > 1:
        groups.sort(key=lambda group: float((centres[group] - radii[group]).min()))
        merged = [groups[0]]
        for group in groups[1:]:
            if (centres[group] - radii[group]).min() <= (centres[merged[-1]] + radii[merged[-1]]).max():
                merged[-1] = merged[-1] + group
            else:
                merged.append(group)
        if len(merged) == len(groups):
            break
        for group in merged:
            if len(group) > 1:
                order = np.array(group)[np.argsort(values[group])]
                ritz, radius = _ritz_of_group(span, order)
                centres[order], radii[order] = ritz, radius + slack
        groups = merged
    return np.stack([np.minimum(centres - radii, values), np.maximum(centres + radii, values)], axis=1)  # (K, 2)


def _ritz_of_group(span: _Span, group: NDArray[np.intp]) -> tuple[Array, float]:
    """Ascending Rayleigh-Ritz values of the span of some of the vectors, and the norm of the residual of that span."""
    basis = np.linalg.qr(span.coordinates[:, group])[0]  # (K, m)
    image = span.inside @ basis  # (K, m)
    small = basis.T @ image  # (m, m)
    residual = np.vstack([image - basis @ small, span.leaving @ basis])  # (2K, m)
    return np.linalg.eigvalsh((small + small.T) / 2), float(np.linalg.norm(residual, ord=2))


class _Probe:
    """Lanczos runs from several starts at once, on the matrix restricted to the complement of a span."""

    def __init__(self, product: Callable[[NDArray[Any]], NDArray[Any]], span: _Span, rng: np.random.Generator, dtype: np.dtype[Any]) -> None:
        self.product, self.span, self.dtype = product, span, dtype
        num_features, num_vectors = span.basis.shape
        self.dimension = num_features - num_vectors
        self.floor = ROUNDING * float(np.finfo(dtype).eps) * span.scale  # a beta below it is rounding
        starts = self._outside(rng.normal(size=(TILE, num_features)))
        self.informed = int(float(np.linalg.norm(span.lead)) > self.floor)  # runs that did not start at random
        if self.informed:
            starts[0] = span.lead
        self.runs: Array = _unit(starts)[:, None]  # (b, j, d), grows with every step
        self.alphas: Array = np.empty((TILE, 0))  # (b, j)
        self.betas: Array = np.empty((TILE, 0))  # (b, j)
        self.ritz: Array = np.empty((TILE, 0))  # (b, j), ascending

    @property
    def num_steps(self) -> int:
        return int(self.alphas.shape[1])

    @property
    def num_products(self) -> int:
        return TILE * self.num_steps

    @property
    def largest(self) -> float:
        """Largest Ritz value of all runs."""
        return float(self.ritz.max()) if self.num_steps else -math.inf

    def _outside(self, rows: Array) -> Array:
        for _ in range(2):  # once leaves rounding of the size of what was removed
            rows = rows - (rows @ self.span.basis) @ self.span.basis.T
        return rows

    def step(self) -> None:
        current = self.runs[:, -1]  # (b, d)
        image = self._outside(_checked_product(self.product, current, self.dtype) / self.span.unit)
        alpha = np.einsum("bd,bd->b", image, current)
        for _ in range(2):  # all earlier vectors, twice: short runs can afford to stay orthogonal
            image = image - np.einsum("bj,bjd->bd", np.einsum("bjd,bd->bj", self.runs, image), self.runs)
        beta: Array = np.linalg.norm(image, axis=1)
        self.alphas = np.concatenate([self.alphas, alpha[:, None]], axis=1)
        self.betas = np.concatenate([self.betas, beta[:, None]], axis=1)
        self.runs = np.concatenate([self.runs, _unit(image)[:, None]], axis=1)
        tridiagonal = np.zeros((TILE, self.num_steps, self.num_steps))
        index = np.arange(self.num_steps)
        tridiagonal[:, index, index] = self.alphas
        tridiagonal[:, index[1:], index[:-1]] = self.betas[:, :-1]  # eigvalsh reads the lower triangle
        self.ritz = np.asarray(np.linalg.eigvalsh(tridiagonal), dtype=np.float64)

    def chance_hidden(self, levels: Array) -> Array:
        """Chance over the random starts that an eigenvalue above each of the levels is outside, given what the runs saw: (g,) -> (g,)."""
        if not self.dimension:
            return np.zeros(len(levels))
        if not self.num_steps:
            return np.ones(len(levels))
        ritz, betas = self.ritz[self.informed :], np.maximum(self.betas[self.informed :], self.floor)
        distances = levels[:, None, None] - ritz  # (g, b, j)
        with np.errstate(divide="ignore", invalid="ignore"):
            overlaps = np.log(betas).sum(axis=1) - np.log(distances).sum(axis=2)  # (g, b), log of the largest overlap of start and vector
        chances = np.where((distances > 0).all(axis=2), 0.5 * math.log(2 * self.dimension / math.pi) + overlaps, 0.0)
        return _fisher(np.minimum(chances, 0.0))

    def bound(self) -> float:
        """Smallest level above which a hidden eigenvalue has a chance of at most ``RISK``; found on a grid, rounded up."""
        if not self.num_steps:
            return -math.inf
        low, high = self.largest, self.largest + max(float(self.betas[:, -1].max()), self.floor)
        for _ in range(60):
            if self.chance_hidden(np.array([high]))[0] <= RISK:
                break
            low, high = high, high + 2 * (high - self.largest)
        for _ in range(2):
            levels = np.linspace(low, high, 65)
            first = int(np.argmax(self.chance_hidden(levels) <= RISK))
            low, high = float(levels[max(first - 1, 0)]), float(levels[first])
        return high


def _fisher(log_chances: Array) -> Array:
    """Fisher's combination of independent chances: (g, b) logarithms -> (g,) chances."""
    total = np.minimum(-log_chances.sum(axis=1), 700.0)  # beyond it exp gives zero
    term, series = np.ones(len(total)), np.zeros(len(total))
    for j in range(log_chances.shape[1]):
        series += term
        term = term * total / (j + 1)
    combined: Array = np.minimum(np.exp(-total) * series, 1.0)
    return combined


def _unit(rows: Array) -> Array:
    """Rows of length 1; rows of zeros stay zeros."""
    lengths: Array = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: Array = rows / np.where(lengths > 0, lengths, 1.0)
    return unit
