"""The directions in which the outputs of a linear layer lie, and the layer with outputs in the first few of them only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Moments", "output_basis", "projected_layer", "thin_layer"]


@dataclass
class Moments:
    """Mean and second moments of rows that arrive in pieces, in float64.

    Everything is added up relative to the mean of the first piece, so that a large mean costs no digits.

    Parameters
    ----------
    count : int
        Rows so far.
    """

    count: int = 0
    _shift: Tensor | None = None  # (dim,)
    _first: Tensor | None = None  # (dim,)
    _second: Tensor | None = None  # (dim, dim)

    def add(self, rows: Tensor) -> None:
        """Add rows of shape (rows, dim)."""
        if not len(rows):
            return
        rows = rows.double()
        if self._shift is None:
            self._shift = rows.mean(0)
        rows = rows - self._shift
        first, second = rows.sum(0), rows.T @ rows  # (dim,), (dim, dim)
        self._first = first if self._first is None else self._first + first
        self._second = second if self._second is None else self._second + second
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """Of shape (dim,)."""
        assert self._shift is not None
        assert self._first is not None
        return self._shift + self._first / self.count

    def second(self, *, centred: bool) -> Tensor:
        """Covariance, or mean of the products, of shape (dim, dim)."""
        assert self._first is not None
        assert self._second is not None
        drift = self._first / self.count
        covariance = self._second / self.count - drift.outer(drift)
        return covariance if centred else covariance + self.mean.outer(self.mean)


def output_basis(moments: Tensor, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Orthonormal directions of outputs ``y = W x``, those with the most energy first.

    Parameters
    ----------
    moments : Tensor of shape (outputs, outputs) and dtype float64
        Second moments of the outputs; with ``weight`` those of the inputs, (inputs, inputs), from which the same follows. The smaller is the cheaper.
    weight : Tensor of shape (outputs, inputs) and dtype float64, optional
        The layer, where ``moments`` are those of its inputs.

    Returns
    -------
    energies : Tensor of shape (directions,)
        Second moment of the outputs along each direction, falling.
    basis : Tensor of shape (outputs, directions)
        One direction in each column: as many as outputs, or as inputs where there are fewer of these and ``weight`` is given.
    """
    import torch

    values, vectors = torch.linalg.eigh(moments)  # lowest first
    if weight is None:
        return values.clamp(min=0).flip(0), vectors.flip(1)
    root = vectors * values.clamp(min=0).sqrt()  # (inputs, inputs)
    basis, sizes, _ = torch.linalg.svd(weight @ root, full_matrices=False)
    return sizes.square(), basis


def thin_layer(weight: Tensor, bias: Tensor | None, basis: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two thin layers in the place of one.

    Parameters
    ----------
    weight : Tensor of shape (outputs, inputs)
        Of the layer.
    bias : Tensor of shape (outputs,), or None
        Of the layer.
    basis : Tensor of shape (outputs, rank) and dtype float64
        Orthonormal columns.
    mean : Tensor of shape (outputs,) and dtype float64, or None
        What the outputs outside of ``basis`` are set to. None for a layer without bias: they are 0.

    Returns
    -------
    inner : Tensor of shape (rank, inputs)
    outer : Tensor of shape (outputs, rank)
    bias : Tensor of shape (outputs,), or None
        Of the second layer. All in the dtype of ``weight``.
    """
    inner = basis.T @ weight.double()  # (rank, inputs)
    return inner.to(weight.dtype), basis.to(weight.dtype), _bias_outside(bias, basis, mean)


def projected_layer(weight: Tensor, bias: Tensor | None, basis: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one layer of the old size that computes what `thin_layer` does; the arguments are the same."""
    projected = basis @ (basis.T @ weight.double())  # (outputs, inputs)
    return projected.to(weight.dtype), _bias_outside(bias, basis, mean)


def _bias_outside(bias: Tensor | None, basis: Tensor, mean: Tensor | None) -> Tensor | None:
    """The part of the bias in the basis, and the part of the mean outside of it."""
    if bias is None or mean is None:
        return bias
    return (mean + basis @ (basis.T @ (bias.double() - mean))).to(bias.dtype)
