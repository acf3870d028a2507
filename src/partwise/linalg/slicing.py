"""Cut entries out of a tensor along several dimensions, and put pieces back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["mean_over_holders", "take", "take_shape"]

Entries = Mapping[int, "Tensor"]
"""Kept entries of a tensor: dimension -> sorted indices. A dimension that is left out is kept whole."""


def take(tensor: Tensor, entries: Entries) -> Tensor:
    """A smaller tensor of its own: ``entries`` of every dimension named there, all of the others.

    Examples
    --------
    >>> import torch
    >>> take(torch.arange(6).view(2, 3), {1: torch.tensor([0, 2])}).tolist()
    [[0, 2], [3, 5]]
    """
    piece = tensor.detach()
    for dim, kept in entries.items():
        piece = piece.index_select(dim, kept.to(piece.device))
    return piece if entries else piece.clone()


def take_shape(shape: Sequence[int], entries: Entries) -> tuple[int, ...]:
    """Shape of ``take`` for a tensor of ``shape``."""
    return tuple(len(entries[dim]) if dim in entries else size for dim, size in enumerate(shape))


def mean_over_holders(old: Tensor, pieces: Sequence[tuple[Entries, Tensor]]) -> Tensor:
    """Put pieces back into ``old``: each coordinate becomes the mean of the pieces that hold it, and keeps its value where none does.

    A coordinate with one holder gets that holder's bits. Where all holders agree, it gets the bits they agree on. Pieces are added in the order given.
    Whole numbers (a count of batches, say) become the largest of the holders, for a mean of counts is no count.

    Parameters
    ----------
    old : Tensor
        Not changed.
    pieces : sequence of (entries, Tensor)
        What ``take(old, entries)`` became. Sliced dimensions of one piece are neighbours.

    Returns
    -------
    Tensor
        New, of the shape and dtype of ``old``.
    """
    import torch

    mean = old.detach().clone()
    seen = torch.zeros_like(mean, dtype=torch.bool)
    if not (mean.is_floating_point() or mean.is_complex()):
        for entries, piece in pieces:
            where = _where(old, entries)
            piece = piece.detach().to(mean)
            mean[where] = torch.where(seen[where], torch.maximum(mean[where], piece), piece)
            seen[where] = True
        return mean
    # Differences to the first holder are summed, not values: where holders agree they are exactly zero, whatever the number of holders.
    wide = torch.promote_types(mean.dtype, torch.float32)
    excess, count = torch.zeros_like(mean, dtype=wide), torch.zeros_like(mean, dtype=torch.int32)
    for entries, piece in pieces:
        where = _where(old, entries)
        first, piece = mean[where], piece.detach().to(mean)
        mean[where] = torch.where(count[where] > 0, first, piece)
        excess[where] += torch.where(count[where] > 0, piece.to(wide) - first.to(wide), 0)
        count[where] += 1
    return torch.where(count > 1, (mean.to(wide) + excess / count.clamp(min=1)).to(mean.dtype), mean)


def _where(tensor: Tensor, entries: Entries) -> tuple[Any, ...]:
    """Open-mesh index of ``entries``, as ``numpy.ix_`` makes it, with slices for whole dimensions."""
    dims = sorted(entries)
    index: list[Any] = [slice(None)] * tensor.ndim
    for position, dim in enumerate(dims):
        shape = [1] * len(dims)
        shape[position] = -1
        index[dim] = entries[dim].to(tensor.device).view(shape)
    return tuple(index)
