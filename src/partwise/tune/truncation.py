"""Cutting trailing components off a LoRA adapter, whoever trained it.

Works on any peft model with plain LoRA layers. Before a cut every module is rotated to its singular components, which changes nothing
at full rank; then the first ``k`` components are the best rank-``k`` approximation of that module's update (Eckart-Young).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from partwise.checks import InputError
from partwise.linalg.subspace import singular_factors
from partwise.selection import select_prefixes

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora.layer import LoraLayer


def lora_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, LoraLayer]:
    """The LoRA layers that carry an adapter, by module name as it stands in ``rank_pattern``.

    Raises
    ------
    InputError
        When the model has no layer with that adapter.
    """
    from peft.tuners.lora.layer import LoraLayer

    adapter = adapter_name or active_adapter(model)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            found[name.removeprefix("base_model.model.")] = module
    if not found:
        raise InputError("no-adapter", f"this model has no LoRA layers with adapter {adapter!r}. Wrap it with get_peft_model first.")
    return found


def active_adapter(model: nn.Module) -> str:
    """Name of the adapter that is switched on."""
    active = getattr(model, "active_adapter", "default")
    if callable(active):  # transformers' own integration has a method here
        active = active()
    return str(active[0] if isinstance(active, list | tuple) else active)


def factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor, float]:
    """``lora_A`` (rank, in), ``lora_B`` (out, rank) and the scale of one layer; the update is ``scale * B @ A``."""
    down, up = cast("nn.Linear", layer.lora_A[adapter]), cast("nn.Linear", layer.lora_B[adapter])
    return down.weight.detach(), up.weight.detach(), float(layer.scaling[adapter])


def ranks_of(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """Rank of each adapted module."""
    adapter = adapter_name or active_adapter(model)
    return {name: int(factors(layer, adapter)[0].shape[0]) for name, layer in lora_layers(model, adapter).items()}


def singular_order(model: nn.Module, adapter_name: str | None = None) -> None:
    """Rotate every module of a plain LoRA adapter to singular order, in place. The model's function stays (up to rounding).

    Component ``k`` becomes the ``k``-th singular component of the update, its size shared equally between ``a_k`` and ``b_k``.
    """
    adapter = adapter_name or active_adapter(model)
    for layer in lora_layers(model, adapter).values():
        down, up, _ = factors(layer, adapter)
        left, values, right = singular_factors(up.double(), down.double())
        half = values.sqrt()
        with torch.no_grad():
            down.copy_(right * half[:, None])
            up.copy_(left * half)


def component_energy(model: nn.Module, adapter_name: str | None = None) -> dict[str, list[float]]:
    """Squared Frobenius norm of each rank-one update, ``(scale * |a_k| * |b_k|)^2``, per module."""
    adapter = adapter_name or active_adapter(model)
    energy = {}
    for name, layer in lora_layers(model, adapter).items():
        down, up, scale = factors(layer, adapter)
        energy[name] = [float(value) for value in (scale * down.norm(dim=1) * up.norm(dim=0)).double() ** 2]
    return energy


def plan_cut(model: nn.Module, *, rank: int | None = None, budget: int | None = None, adapter_name: str | None = None) -> dict[str, int]:
    """How many leading components each module keeps.

    Parameters
    ----------
    rank : int, optional
        Keep at most this many in every module.
    budget : int, optional
        Keep this many over all modules together, at least one in each, where their energy is largest.

    Raises
    ------
    InputError
        When both or neither are given, or one does not fit the adapter.
    """
    ranks = ranks_of(model, adapter_name)
    if (rank is None) == (budget is None):
        raise InputError("rank-or-budget", f"got rank={rank} and budget={budget}, expected exactly one of them.")
    if rank is not None:
        highest = max(ranks.values())
        if not 1 <= rank <= highest:
            raise InputError("cut-out-of-range", f"rank={rank} cannot be cut from an adapter of rank {highest}: pass a rank from 1 to {highest}.")
        return {name: min(rank, own) for name, own in ranks.items()}
    assert budget is not None
    low, high = len(ranks), sum(ranks.values())
    if not low <= budget <= high:
        raise InputError(
            "cut-out-of-range",
            f"budget={budget} cannot be cut from {high} components in {low} modules: pass a number from {low} (one in each module) to {high}.",
        )
    energy = component_energy(model, adapter_name)
    kept = select_prefixes(list(energy.values()), [1] * len(energy), budget=budget)
    return dict(zip(energy, kept, strict=True))


@contextlib.contextmanager
def keep_components(model: nn.Module, kept: Mapping[str, int], adapter_name: str | None = None) -> Iterator[None]:
    """Inside the block only the first ``kept[module]`` components work; afterwards all are back, to the bit."""
    adapter = adapter_name or active_adapter(model)
    removed: list[tuple[Tensor, Tensor]] = []
    try:
        for name, layer in lora_layers(model, adapter).items():
            _, up, _ = factors(layer, adapter)
            removed.append((up, up.clone()))
            up[:, kept[name] :] = 0
        yield
    finally:
        for up, original in removed:
            up.copy_(original)


def compact(model: nn.Module, kept: Mapping[str, int], adapter_name: str | None = None) -> None:
    """Cut the weights of a plain LoRA adapter in place to ``kept[module]`` leading components and make its configuration say so."""
    from peft import LoraConfig

    adapter = adapter_name or active_adapter(model)
    layers = lora_layers(model, adapter)
    scales = {name: float(layer.scaling[adapter]) for name, layer in layers.items()}
    for name, layer in layers.items():
        down, up, scale = factors(layer, adapter)
        rank = kept[name]
        trains = cast("nn.Linear", layer.lora_A[adapter]).weight.requires_grad
        for inner, weight in ((layer.lora_A[adapter], down[:rank]), (layer.lora_B[adapter], up[:, :rank])):
            linear = cast("nn.Linear", inner)
            linear.weight = nn.Parameter(weight.clone(), requires_grad=trains)
            linear.out_features, linear.in_features = weight.shape
        layer.r[adapter] = rank
        layer.lora_alpha[adapter] = _whole_number(scale * rank)
        layer.use_rslora[adapter] = False
    configs = cast("dict[str, LoraConfig]", cast("Any", model).peft_config)
    settings = {item.name: getattr(configs[adapter], item.name) for item in fields(LoraConfig) if item.init and item.name != "peft_type"}
    configs[adapter] = LoraConfig(**{**settings, **pattern_fields({name: kept[name] for name in layers}, scales)})


def pattern_fields(ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    """``r``, ``lora_alpha`` and the two patterns of a LoraConfig, such that every module's scale is ``lora_alpha / r`` of its own entry."""
    r = max(ranks.values())
    keys = {name: f"^{name}" if any(other.endswith("." + name) for other in ranks) else name for name in ranks}  # peft matches ends of names
    main_scale = next(scales[name] for name in ranks if ranks[name] == r)
    uneven = [name for name in ranks if ranks[name] != r or scales[name] != main_scale]
    return {
        "r": r,
        "lora_alpha": _whole_number(main_scale * r),
        "rank_pattern": {keys[name]: ranks[name] for name in uneven},
        "alpha_pattern": {keys[name]: _whole_number(scales[name] * ranks[name]) for name in uneven},
        "use_rslora": False,
        "init_lora_weights": True,
    }


def _whole_number(value: float) -> float:
    return round(value) if abs(value - round(value)) < 1e-9 else value


def copy_sharing_base(model: PeftModel, adapter_name: str | None = None) -> PeftModel:
    """A copy of a peft model that owns its adapter and shares everything that is frozen with the original."""
    own = {id(parameter) for layer in lora_layers(model, adapter_name).values() for parameter in _adapter_parameters(layer)}
    shared = [parameter for parameter in model.parameters() if id(parameter) not in own and not parameter.requires_grad]
    memo: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    return copy.deepcopy(model, memo)


def _adapter_parameters(layer: LoraLayer) -> list[nn.Parameter]:
    return [*layer.lora_A.parameters(), *layer.lora_B.parameters()]
