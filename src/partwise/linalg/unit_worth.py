"""What a unit adds to the layer that reads it, from the layer's weight and moments of its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fluctuation", "wanda"]


def wanda(weight: Tensor, square: Tensor) -> Tensor:
    """Size of the weights that read an entry, averaged over outputs, times the root mean square of the entry.

    Parameters
    ----------
    weight : Tensor of shape (entries, outputs)
        With its inputs first.
    square : Tensor of shape (entries,)
        Mean square of each input.

    References
    ----------
    Wanda. arXiv:2306.11695. Its norm of an input is the root mean square times a number that is the same for all.
    """
    return weight.abs().mean(1) * square.sqrt()


def fluctuation(weight: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """Variance of the entry times the squared norm of the weights that read it.

    Parameters
    ----------
    weight : Tensor of shape (entries, outputs)
        With its inputs first.
    mean, square : Tensor of shape (entries,)
        Mean and mean square of each input.

    References
    ----------
    FLAP, metric WIFV. arXiv:2312.11983.
    """
    return (square - mean.square()).clamp(min=0) * weight.square().sum(1)
