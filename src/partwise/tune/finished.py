"""From a growing adapter to a plain one: its ranks, its parts, and cutting it."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel
from torch import nn

from partwise.ledger import Ledger, Part
from partwise.tune import truncation
from partwise.tune._prefix_linear import PrefixDown, PrefixUp


def active_ranks(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """Active rank of each module, while it grows and after."""
    adapter = adapter_name or truncation.active_adapter(model)
    downs = {name: layer.lora_A[adapter] for name, layer in truncation.lora_layers(model, adapter).items()}
    return {name: down.slot.rank if isinstance(down, PrefixDown) else int(cast("nn.Linear", down).weight.shape[0]) for name, down in downs.items()}


def rank_table(model: nn.Module, adapter_name: str | None = None) -> Ledger:
    """Module, rank, score and parameters of every component, as a ledger.

    Parameters
    ----------
    model : nn.Module
        With an AdaPaD adapter, growing or finalised, or with any plain LoRA adapter (its scores are energies then).
    adapter_name : str, optional
        Left out: the active adapter.
    """
    adapter = adapter_name or truncation.active_adapter(model)
    layers = truncation.lora_layers(model, adapter)
    parts: list[Part] = []
    energy: dict[str, list[float]] = {}
    for name, layer in layers.items():
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        if isinstance(down, PrefixDown):
            scores = down.controller.scores()[down.slot.index].tolist()[: down.slot.rank]
            first = down.controller.settings.init_r
        else:
            energy = energy or truncation.component_energy(model, adapter)
            scores, first = energy[name], len(energy[name])
        size = int(down.weight.shape[1] + up.weight.shape[0])
        width = down.weight.element_size()
        parts += [
            Part(where=name, index=k, parameters=size, bytes=size * width, score=score, status="kept" if k < first else "grown")
            for k, score in enumerate(scores)
        ]
    return Ledger(tuple(parts))


def finalize(model: nn.Module, adapter_name: str | None = None, *, singular_order: bool | None = None) -> nn.Module:
    """End growth and make the adapter an ordinary, compact peft LoRA, in place.

    Parameters
    ----------
    model : nn.Module
        Model with an AdaPaD adapter. A plain LoRA adapter is accepted and only rotated.
    adapter_name : str, optional
        Left out: the active adapter.
    singular_order : bool, optional
        Rotate each module to its singular components, so that trailing ones are the least useful; the function stays. Left out: only
        where training gave the components no order (``schedule="joint"``, and plain LoRA that AdaPaD did not train).

    Returns
    -------
    nn.Module
        The same model.
    """
    adapter = adapter_name or truncation.active_adapter(model)
    layers = truncation.lora_layers(model, adapter)
    kept = {}
    in_order = getattr(cast("Any", model).peft_config[adapter], "partwise_in_order", False)
    for name, layer in layers.items():
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        if isinstance(down, PrefixDown) and isinstance(up, PrefixUp):
            in_order = down.controller.orders_components
            down.controller.release()
            down.unbind()
            up.unbind()
        kept[name] = int(down.weight.shape[0])
    truncation.compact(model, kept, adapter)
    if singular_order or (singular_order is None and not in_order):
        truncation.singular_order(model, adapter)
    cast("Any", model).peft_config[adapter].partwise_in_order = True  # in memory only: truncate() need not rotate
    return model


def truncate(
    model: PeftModel, *, rank: int | None = None, budget: int | None = None, adapter_name: str | None = None, singular_order: bool | None = None
) -> PeftModel:
    """A smaller adapter on the same frozen base: trailing components dropped.

    Parameters
    ----------
    model : PeftModel
        With an AdaPaD or plain LoRA adapter; it is left as it is.
    rank : int, optional
        Keep at most this many components in every module.
    budget : int, optional
        Keep this many over all modules, at least one in each, where they carry most energy.
    adapter_name : str, optional
        Left out: the active adapter.
    singular_order : bool, optional
        As in :func:`finalize`. An adapter that was loaded from a folder carries no sign of its order and is rotated.

    Returns
    -------
    PeftModel
        A plain LoRA model that shares the base weights with ``model``.
    """
    small = truncation.copy_sharing_base(model, adapter_name)
    finalize(small, adapter_name, singular_order=singular_order)
    truncation.compact(small, truncation.plan_cut(small, rank=rank, budget=budget, adapter_name=adapter_name), adapter_name)
    return small
