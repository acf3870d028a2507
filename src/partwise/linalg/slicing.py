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
    # Holders differ along sliced dimensions only, so that is where they are counted; the count broadcasts along the others.
    sliced = {dim for entries, _ in pieces for dim in entries}
    count = torch.zeros([size if dim in sliced else 1 for dim, size in enumerate(mean.shape)], dtype=torch.int32, device=mean.device)
    floating = mean.is_floating_point() or mean.is_complex()
    # Differences to the first holder are summed, not values: where holders agree they are exactly zero, whatever the number of holders.
    excess = torch.zeros_like(mean, dtype=torch.promote_types(mean.dtype, torch.float32)) if floating else None
    for entries, piece in pieces:
        here = {dim: kept.to(mean.device) for dim, kept in entries.items()}
        first, piece, held = _read(mean, here), piece.detach().to(mean), _read(count, here) > 0
        if excess is None:
            _write(mean, here, torch.where(held, torch.maximum(first, piece), piece))
        else:
            _write(mean, here, torch.where(held, first, piece))
            _write(excess, here, _read(excess, here) + torch.where(held, piece.to(excess.dtype) - first.to(excess.dtype), 0))
        _write(count, here, _read(count, here) + 1)
    if excess is None:
        return mean
    return torch.where(count > 1, (mean.to(excess.dtype) + excess / count.clamp(min=1)).to(mean.dtype), mean)


def _read(tensor: Tensor, entries: Entries) -> Tensor:
    for dim, kept in entries.items():
        tensor = tensor.index_select(dim, kept)
    return tensor


def _write(tensor: Tensor, entries: Entries, values: Tensor) -> None:
    """Set ``entries`` of ``tensor`` in place."""
    if not entries:
        tensor.copy_(values)
    elif len(entries) == 1:
        [(dim, kept)] = entries.items()
        tensor.index_copy_(dim, kept, values)
    else:
        tensor[_open_mesh(tensor, entries)] = values


def _open_mesh(tensor: Tensor, entries: Entries) -> tuple[Any, ...]:
    """Index of ``entries``, as ``numpy.ix_`` makes it, with slices for whole dimensions."""
    dims = sorted(entries)
    index: list[Any] = [slice(None)] * tensor.ndim
    for position, dim in enumerate(dims):
        shape = [1] * len(dims)
        shape[position] = -1
        index[dim] = entries[dim].view(shape)
    return tuple(index)
