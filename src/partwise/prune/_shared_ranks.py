"""One budget for all layers together: which rank each of them gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from partwise.checks import InputError
from partwise.selection import select_prefixes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.prune._linear_layers import LayerSize
    from partwise.prune.lord import LoRD

__all__ = ["share_ranks"]

STEPS = 256  # ranks of one layer that are told apart


def share_ranks(method: LoRD, model: nn.Module, shares: Mapping[str, Tensor], sizes: Mapping[str, LayerSize]) -> dict[str, int | None]:
    """Name -> rank of each layer, or None where it stays whole, so that the layers fit a budget and lose little energy.

    The sum over layers of the share of energy that each keeps is to be high. A layer is a row of parts: so many directions at a time, as long as two thin
    layers save anything, and last, at the same price, all the rest, with which the layer is whole.

    Parameters
    ----------
    method : LoRD
        Its budget and ``round_to``.
    model : torch.nn.Module
        The whole model.
    shares : mapping of str to Tensor
        Name of a layer -> share of the energy along each direction, (directions,), falling.
    sizes : mapping of str to LayerSize
        Of the same layers.

    Raises
    ------
    InputError
        ``budget-too-small`` naming what the smallest model of this kind costs.
    """
    names = list(sizes)
    in_bytes = method.max_bytes is not None
    factors = {name: size.entry_bytes if in_bytes else 1 for name, size in sizes.items()}
    whole = {name: size.outputs * size.inputs * factors[name] for name, size in sizes.items()}
    budget, others = _budget(method, model, sum(whole.values()))
    if budget >= sum(whole.values()):
        return dict.fromkeys(names)
    steps = {name: _step(size, method.round_to) for name, size in sizes.items()}
    values, costs = [], []
    for name, size in sizes.items():
        ends = range(0, size.break_even + 1, steps[name])
        kept = [float(shares[name][:end].sum()) for end in ends]
        values.append([later - earlier for earlier, later in zip(kept, [*kept[1:], float(shares[name].sum())], strict=True)])
        costs.append((size.outputs + size.inputs) * steps[name] * factors[name] if len(ends) > 1 else whole[name])
    if budget < sum(costs):
        raise _too_small(method, sum(costs) + others, sum(whole.values()) + others, len(names))
    counts = _counts_within(budget, values, costs, list(whole.values()))
    return {name: None if count == len(group) else count * steps[name] for name, count, group in zip(names, counts, values, strict=True)}


def _counts_within(budget: int, values: Sequence[Sequence[float]], costs: Sequence[int], whole: Sequence[int]) -> list[int]:
    """Parts of each layer. All parts of one cost a little more than the whole layer does; what that leaves of the budget is spent as well."""
    most = sum(len(group) * cost for group, cost in zip(values, costs, strict=True))
    counts: list[int] = []
    allowed = budget
    while True:
        tried = select_prefixes(values, costs, budget=min(allowed, most))
        spent = sum(full if count == len(group) else count * cost for count, group, cost, full in zip(tried, values, costs, whole, strict=True))
        if spent > budget or tried == counts:
            return counts
        counts, allowed = tried, allowed + budget - spent


def _step(size: LayerSize, round_to: int) -> int:
    """Directions that are added at a time: a multiple of ``round_to``, and enough that no layer has too many steps."""
    fewest = -(-size.break_even // STEPS)
    return max(1, -(-fewest // round_to)) * round_to


def _budget(method: LoRD, model: nn.Module, whole: int) -> tuple[int, int]:
    """What the layers together may cost, and what the rest of the model costs if that is part of the budget."""
    from torch import nn

    from partwise.models import tensors_of

    tensors = tensors_of(model).values()
    if method.max_bytes is not None:
        others = sum(tensor.numel() * tensor.element_size() for tensor in tensors) - whole
        return method.max_bytes - others, others
    if method.max_parameters is not None:
        others = sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter)) - whole
        return method.max_parameters - others, others
    return int((0.5 if method.keep is None else method.keep) * whole), 0


def _too_small(method: LoRD, least: int, whole: int, num_layers: int) -> InputError:
    if method.max_parameters is None and method.max_bytes is None:
        return InputError(
            "budget-too-small",
            f"got keep={method.keep}, but the lowest ranks of the {num_layers} layers cost {least:,} of their {whole:,} parameters. Pass a keep of at least "
            f"{-(-1000 * least // whole) / 1000}, or choose fewer layers.",
        )
    kind, limit = ("max_parameters", method.max_parameters) if method.max_bytes is None else ("max_bytes", method.max_bytes)
    return InputError(
        "budget-too-small",
        f"got {kind}={limit:,}, but the smallest model that can be made here costs {least:,}, the whole one {whole:,}. Pass a number between them, or more "
        "layers.",
    )
