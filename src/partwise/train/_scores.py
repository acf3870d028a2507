"""What a unit is worth: how much of what its readers pass on is its own, measured on a few batches.

References
----------
Wanda. arXiv:2306.11695. FLAP, whose metric is "fluctuation". arXiv:2312.11983. MatFormer, for models whose units are sorted. arXiv:2310.07707.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from partwise.checks import InputError, check_choice
from partwise.linalg.unit_worth import fluctuation, wanda
from partwise.models.axes import CoupledAxis

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.models.axes import Axis

__all__ = ["METRICS", "Metric", "sort_units", "unit_scores"]

Metric = Literal["wanda", "fluctuation"]
METRICS: tuple[Metric, ...] = ("wanda", "fluctuation")


def unit_scores(
    model: nn.Module, axes: Sequence[Axis], batches: Iterable[Any], *, metrics: Sequence[Metric] = METRICS
) -> dict[Metric, dict[str, Tensor]]:
    """Scores of all units, higher for those that matter more.

    Parameters
    ----------
    model : torch.nn.Module
        The whole model, run in evaluation mode and left as it was.
    axes : sequence of Axis
        Axes of blocks get no scores.
    batches : iterable
        Mappings or pairs, as for training; labels are not looked at.
    metrics : sequence of {"wanda", "fluctuation"}, optional
        wanda: size of the weights that read an entry, averaged over outputs, times the root mean square of the entry. fluctuation: the variance of the entry
        times the squared norm of the weights that read it. Both are summed over the entries of a unit.

    Returns
    -------
    dict
        Metric -> axis name -> scores (units,).
    """
    import torch

    for metric in metrics:
        check_choice(metric, METRICS, name="metric")
    split = [axis for axis in axes if isinstance(axis, CoupledAxis)]
    moments = _input_moments(model, split, batches)
    tensors = model.state_dict(keep_vars=True)
    scores: dict[Metric, dict[str, Tensor]] = {metric: {} for metric in metrics}
    for axis in split:
        of_axis: dict[Metric, Tensor] = {metric: torch.zeros(axis.size, dtype=torch.float64) for metric in metrics}
        for member in (member for member in axis.members if member.tensor in axis.readers):
            mean, square = moments[member.tensor]
            weight = tensors[member.tensor].detach().double().cpu().movedim(member.dim, 0).flatten(1)  # (entries, outputs)
            for metric in metrics:
                entries = wanda(weight, square) if metric == "wanda" else fluctuation(weight, mean, square)
                of_axis[metric] += entries.view(axis.size, -1).sum(1)
        for metric in metrics:
            scores[metric][axis.name] = of_axis[metric]
    return scores


def sort_units(model: nn.Module, axes: Sequence[Axis], scores: Mapping[str, Tensor]) -> nn.Module:
    """A copy that computes the same with its units in another order: the highest scores first, ties as they were.

    Parameters
    ----------
    model : torch.nn.Module
        The whole model, not changed.
    axes : sequence of Axis
        Those without scores stay as they are.
    scores : mapping of str to Tensor
        Axis name -> scores (units,), as `unit_scores` gives them for one metric.
    """
    from partwise.models import tensors_of, with_tensors

    return with_tensors(model, sorted_tensors({name: tensor.detach() for name, tensor in tensors_of(model).items()}, axes, order_of(scores)))


def order_of(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Axis name -> its units, the highest score first, ties as they were."""
    return {name: of_axis.sort(descending=True, stable=True).indices for name, of_axis in scores.items()}


def sorted_tensors(tensors: Mapping[str, Tensor], axes: Sequence[Axis], orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that lie like the parameters, with the units of every axis that has an order in that order."""
    import torch

    found = {name: tensor.clone() for name, tensor in tensors.items()}
    for axis in axes:
        if not isinstance(axis, CoupledAxis) or axis.name not in orders:
            continue
        for member in (member for member in axis.members if member.tensor in found):
            wide = (orders[axis.name][:, None] * member.width + torch.arange(member.width)).flatten()  # (units * width,)
            found[member.tensor] = found[member.tensor].index_select(member.dim, wide.to(found[member.tensor].device))
    return found


def _input_moments(model: nn.Module, axes: Sequence[CoupledAxis], batches: Iterable[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Reader -> mean and mean square of each entry of its input."""
    sums: dict[str, tuple[int, Any, Any]] = {reader: (0, 0.0, 0.0) for axis in axes for reader in axis.readers}

    def count(reader: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = _entries_last(inputs[0].detach(), layer).flatten(0, -2).double()  # (places, entries)
            number, first, second = sums[reader]
            sums[reader] = number + len(rows), first + rows.sum(0), second + rows.square().sum(0)

        return hook

    handles = [model.get_submodule(reader.rpartition(".")[0]).register_forward_pre_hook(count(reader)) for reader in sums]
    try:
        _run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    if not all(number for number, _, _ in sums.values()):
        raise InputError("no-batches", "got no batches to score units on, expected at least one. Pass some of the training data.")
    return {reader: ((first / number).cpu(), (second / number).cpu()) for reader, (number, first, second) in sums.items()}


def _entries_last(inputs: Tensor, layer: nn.Module) -> Tensor:
    from torch import nn

    return inputs.movedim(1, -1) if isinstance(layer, nn.Conv2d) else inputs


def _run(model: nn.Module, batches: Iterable[Any]) -> None:
    import torch

    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                if isinstance(batch, Mapping):
                    model(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
                else:
                    model(batch[0].to(device))
    finally:
        for module, training in modes:
            module.training = training
