"""One step of one eigenvector: what the vectors in front take away, how far to move, and what to do when nothing is left.

Everything here works on one component at a time, so that a component gets the same bits alone and among others. Rows are vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ahead", "Mover", "is_drowned", "normalised", "project_out"]

Vector = NDArray[Any]
ADAM_MEANS, ADAM_SQUARES, ADAM_EPSILON = 0.9, 0.999, 1e-8  # the defaults of the optimiser and of EigenGame's reference code
DROWNED = 0.1  # share of a vector's variance that may lie along the vectors in front once those have settled


def normalised(vector: Vector) -> Vector:
    """``vector`` (d,) at length 1; a vector of zeros stays one."""
    length = np.linalg.norm(vector)
    return vector / length if length > 0 else vector


@dataclass(frozen=True, eq=False)
class Ahead:
    """The vectors in front of one component, and how their influence is taken out of a product.

    Attributes
    ----------
    vectors, values : ndarray of shape (j, d) and (j,)
        Unit rows and their Rayleigh quotients.
    images : ndarray of shape (j, d) or None
        ``S v_j``, which only ``alpha`` needs.
    update : {"deflation", "mu", "alpha"}
        Card of the three: ``S w`` minus ``sum_j v_j c_j`` with ``c_j = value_j <v_j, w>`` or ``<v_j, S w>``, or minus
        ``sum_j S v_j <v_j, S w> / value_j``. They agree when the vectors in front are exact.
    """

    vectors: NDArray[Any]
    values: NDArray[Any]
    images: NDArray[Any] | None = None
    update: str = "deflation"

    def taken_from(self, image: Vector, vector: Vector) -> Vector:
        """``image = S vector`` (d,) without what belongs to the vectors in front."""
        if not len(self.vectors):
            return image
        taken: Vector
        if self.update == "deflation":
            taken = (self.values * (self.vectors @ vector)) @ self.vectors
        elif self.update == "mu":
            taken = (self.vectors @ image) @ self.vectors
        else:
            assert self.images is not None
            shares = self.vectors @ image  # (j,)
            # A direction without variance takes nothing away.
            taken = np.divide(shares, self.values, out=np.zeros_like(shares), where=self.values > 0) @ self.images
        return image - taken


@dataclass(eq=False)
class Mover:
    """Moves one vector along its gradient. It lives as long as one call of a worker.

    Attributes
    ----------
    solver : {"power", "hebb", "adam"}
        The gradient itself, a step along it, or a step that Adam scales.
    step : float
        Length of a step in units of the gradient; ``power`` does not use it.
    scale : float
        Running largest eigenvalue.
    moments : ndarray of shape (2, d) or None
        Adam's running means of the gradient and of its squares.
    num_moves : int
        Moves made before, which Adam's correction counts.
    """

    solver: str
    step: float
    scale: float
    moments: NDArray[Any] | None = None
    num_moves: int = 0
    shift: float = 0.0

    def move(self, vector: Vector, gradient: Vector) -> Vector:
        """The next unit vector (d,)."""
        self.num_moves += 1
        if self.solver == "power":
            return self._power(vector, gradient)
        if self.solver == "hebb":
            return normalised(vector + self.step * gradient)
        return self._adam(vector, gradient)

    def _power(self, vector: Vector, gradient: Vector) -> Vector:
        # Rough vectors in front make the deflated matrix indefinite, and power steps chase the largest magnitude, whatever its sign. Once a
        # quotient turns negative, the rest of this call works on the matrix shifted by the largest eigenvalue.
        if not self.shift and vector @ gradient < 0:
            self.shift = self.scale
        moved = normalised(gradient + self.shift * vector if self.shift else gradient)
        return moved if moved.any() else vector  # nothing at all is left over: any direction is as good

    def _adam(self, vector: Vector, gradient: Vector) -> Vector:
        assert self.moments is not None
        tangent = (gradient - (gradient @ vector) * vector) / self.scale
        mean = ADAM_MEANS * self.moments[0] + (1 - ADAM_MEANS) * tangent
        square = ADAM_SQUARES * self.moments[1] + (1 - ADAM_SQUARES) * tangent**2
        self.moments = np.stack([mean, square])  # (2, d)
        corrected = mean / (1 - ADAM_MEANS**self.num_moves)
        spread = np.sqrt(square / (1 - ADAM_SQUARES**self.num_moves))
        return normalised(vector + self.step * corrected / (spread + ADAM_EPSILON))


def is_drowned(vector: Vector, value: float, ahead: Ahead) -> bool:
    """Whether a vector is made of what the vectors in front leave behind by their own error, instead of a direction of its own.

    What a settled vector leaves behind has a size of its residual; where the eigenvalue looked for is smaller than that, deflation points back to
    the vectors in front.
    """
    if not len(ahead.vectors):
        return False
    shares = ahead.vectors @ vector  # (j,)
    return bool(ahead.values @ shares**2 > DROWNED * value)


def project_out(vector: Vector, basis: NDArray[Any]) -> Vector:
    """``vector`` (d,) at length 1 without its part in the span of the orthonormal rows of ``basis`` (j, d)."""
    for _ in range(2):  # the second time removes what rounding left of the first
        vector = normalised(vector - (basis @ vector) @ basis)
    return vector
