"""How layers read the units of an axis, linear layers and convolutions alike: at each place a row of entries, multiplied by a matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.prune.unit_method import Visit

__all__ = ["Reading", "readings_of"]

BLOCK = 2**22  # numbers of the patches that are there at a time


@dataclass(frozen=True)
class Reading:
    """One layer that reads the units of an axis.

    A linear layer reads a row of entries at each place. A convolution reads a patch for each of its outputs: a window of every channel, one behind the other,
    so that the entries of a unit lie together here too.

    Parameters
    ----------
    weight : Tensor of shape (channels * window, outputs), float64
        With its inputs first, multiplied by what a batch normalisation behind the layer multiplies its outputs by.
    window : int
        Entries of a patch in one channel; 1 for a linear layer.
    convolution : torch.nn.Conv2d or None
        The layer itself, unless it is linear.
    """

    weight: Tensor
    window: int
    convolution: nn.Conv2d | None

    def rows(self, values: Tensor) -> Iterator[Tensor]:
        """What is read at each place, (places, channels * window), float64; of images some at a time."""
        if self.convolution is None:
            yield values.flatten(0, -2).double()
            return
        height, width = values.shape[2:]
        for images in values.split(max(1, BLOCK // (len(self.weight) * height * width))):  # type: ignore[no-untyped-call]
            yield self._patches(images).transpose(1, 2).flatten(0, 1)  # (images * places, channels * window)

    def moments(self, values: Tensor) -> Tensor:
        """Sum over places of the products of each pair of entries, (channels * window, channels * window), float64."""
        total = self.weight.new_zeros(len(self.weight), len(self.weight))
        for rows in self.rows(values):
            total.addmm_(rows.T, rows)
        return total

    def tally(self, values: Tensor) -> Tensor:
        """For each position of the window, the sum of the rows at all places where that position lies on the image; of a linear layer, the sum of all rows.

        It is what the gradient of a sum over all entries of a channel needs: a place whose window reaches into a border of zeros gives nothing back there.

        Parameters
        ----------
        values : Tensor of shape (..., entries) or (images, channels, height, width)
            Inputs of the layer.

        Returns
        -------
        Tensor of shape (window, channels * window), float64
        """
        if self.convolution is None:
            return values.flatten(0, -2).double().sum(0, keepdim=True)
        total = values.double().sum(0, keepdim=True)  # (1, channels, height, width)
        inside = self._patches(total.new_ones(1, 1, *total.shape[2:]))[0]  # (window, places)
        return inside @ self._patches(total)[0].T

    def sizes(self, values: Tensor) -> Tensor:
        """Sum of the absolute values of each channel or entry, (channels,), float64."""
        places = (0, 2, 3) if self.convolution is not None else tuple(range(values.ndim - 1))
        return values.double().abs().sum(places)

    def _patches(self, images: Tensor) -> Tensor:
        """(images, channels * window, places), float64."""
        from torch.nn.functional import pad, unfold

        layer: Any = self.convolution
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        images = pad(images.double(), layer._reversed_padding_repeated_twice, mode=mode)
        return unfold(images, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)


def readings_of(visit: Visit) -> dict[str, Reading]:
    """Every layer that reads the units of the axis, by the name of its weight."""
    from torch import nn

    found = {}
    for reader in visit.axis.readers:
        name = reader.rpartition(".")[0]
        layer, weight = visit.model.get_submodule(name), visit.reader_weight(reader)  # (entries, outputs), or (entries, outputs, height, width)
        if (scales := _scales_behind(visit.model, name)) is not None:
            weight = weight * scales.view(-1, *[1] * (weight.ndim - 2))
        window = weight[0, 0].numel()
        if weight.ndim == 4:
            weight = weight.flatten(2).transpose(1, 2).flatten(0, 1)  # (entries * window, outputs)
        found[reader] = Reading(weight, window, layer if isinstance(layer, nn.Conv2d) else None)
    return found


def _scales_behind(model: nn.Module, layer: str) -> Tensor | None:
    """What a batch normalisation that takes the outputs of a layer multiplies each of them by in evaluation mode, (outputs,); None where there is none."""
    from partwise.models.chains import trace

    if hasattr(type(model), "config_class"):
        return None  # in transformers no norm stands behind a layer that reads units
    graph = trace(model)
    [node] = [node for node in graph.nodes if node.op == "call_module" and node.target == layer]
    norm: Any = graph.module(next(iter(node.users))) if len(node.users) == 1 else None
    if type(norm).__name__ not in {"BatchNorm1d", "BatchNorm2d"} or norm.running_var is None:
        return None
    scales: Tensor = (norm.running_var.detach().double() + norm.eps).rsqrt()
    return scales * norm.weight.detach().double() if norm.affine else scales
