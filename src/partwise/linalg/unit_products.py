"""What pairs of units do together in a layer that reads them, from its weight and sums over its inputs; a block of rows at a time.

``weight`` has its inputs first, (entries, outputs), and the entries of a unit lie behind each other, as many for every unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pull_sizes", "unit_products"]

BLOCK = 2**22  # numbers of one block of rows


def unit_products(weight: Tensor, sums: Tensor, *, size: int) -> Tensor:
    """For each pair of units, the sum over their entries ``e`` and ``f`` of ``<weight[e], weight[f]> * sums[e, f]``.

    With the second moments of the inputs, sums over places of ``h_e h_f``, these are the inner products of what the units add to the layer's outputs.

    Parameters
    ----------
    weight : Tensor of shape (entries, outputs)
        Of the layer.
    sums : Tensor of shape (rows, entries)
        A row for each entry; or fewer, which are used over and over: entry ``e`` has row ``e % rows``.
    size : int
        Number of units.

    Returns
    -------
    Tensor of shape (size, size)

    Examples
    --------
    >>> import torch
    >>> inputs, weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [10.0]])
    >>> unit_products(weight, inputs.T @ inputs, size=2).tolist()
    [[10.0, 140.0], [140.0, 2000.0]]
    """
    import torch

    width = len(weight) // size
    blocks = []
    for rows in _blocks(len(weight), width):
        products = (weight[rows] @ weight.T) * sums[rows % len(sums)]  # (rows, entries)
        blocks.append(products.view(-1, width, size, width).sum((1, 3)))  # (units of the block, units)
    return torch.cat(blocks)


def pull_sizes(weight: Tensor, moments: Tensor, left: Tensor) -> Tensor:
    """For each unit, the sum over places and over its entries of the squared gradient of ``0.5 ||residual||^2``.

    The residual at a place is what the units that are ``left`` add to the outputs; its gradient with respect to entry ``e`` is ``<weight[e], residual>``.

    Parameters
    ----------
    weight : Tensor of shape (entries, outputs)
        Of the layer.
    moments : Tensor of shape (entries, entries)
        Sums over places of ``h_e h_f``.
    left : Tensor of shape (units,)
        1 for units that are not chosen, 0 for the others.

    Returns
    -------
    Tensor of shape (units,)

    Examples
    --------
    >>> import torch
    >>> inputs, weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [10.0]])
    >>> pull_sizes(weight, inputs.T @ inputs, torch.tensor([0.0, 1.0])).tolist()  # residuals 20 and 40
    [2000.0, 200000.0]
    """
    import torch

    width = len(weight) // len(left)
    rest = weight * left.repeat_interleave(width)[:, None]  # (entries, outputs)
    squares = []
    for rows in _blocks(len(weight), width):
        pulls = weight[rows] @ rest.T  # (rows, entries): what the gradient is made of
        squares.append(((pulls @ moments) * pulls).sum(1).view(-1, width).sum(1))  # (units of the block,)
    return torch.cat(squares)


def _blocks(entries: int, width: int) -> Iterator[Tensor]:
    """Indices of entries, whole units at a time."""
    import torch

    step = max(1, BLOCK // (entries * width)) * width
    for start in range(0, entries, step):
        yield torch.arange(start, min(start + step, entries))
