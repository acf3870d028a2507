"""Plain LoRA (Hu et al., arXiv:2106.09685), and what every method here shares: finding linear layers and building a plain adapter.

peft does the work; this file chooses ranks so that a total budget is met exactly, and keeps one scale for all modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.tune.recipe import Plan, Recipe, as_target_modules, spread_budget

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn

ADAPTER = "default"
DEFAULT_SCALE = 2.0
HEADS = {"SEQ_CLS": ("classifier", "score")}  # endings of the modules that peft trains and saves whole for a task


@dataclass(frozen=True, kw_only=True)
class LoRA(Recipe):
    """Low-rank adaptation as peft ships it: the same rank in every module, from the first step to the last.

    A budget that the modules cannot share evenly gives the first modules one component more.

    References
    ----------
    Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. arXiv:2106.09685.
    """

    def wrap(self, model: nn.Module, plan: Plan) -> PeftModel:
        """Install LoRA layers whose ranks add up to the budget."""
        from peft import get_peft_model

        return get_peft_model(model, even_config(self, model, plan))

    def ranks(self, model: PeftModel) -> dict[str, int]:
        """Rank of each module."""
        return lora_ranks(model)


def modules_to_save(model: nn.Module) -> list[str] | None:
    """Modules that the checkpoint lacked and peft does not count as heads, such as a new pooler: they are trained and saved whole."""
    heads = tuple(name for names in HEADS.values() for name in names)
    return [name for name in getattr(model, "partwise_new_modules", ()) if not _lies_in(name, heads)] or None


def _lies_in(name: str, whole: tuple[str, ...]) -> bool:
    """Whether a module, or one that contains it, ends in one of the names: so peft finds what to save whole."""
    parts = name.split(".")
    return any(".".join(parts[:depth]).endswith(whole) for depth in range(1, len(parts) + 1))


def scale_for(lora_alpha: float | None, ranks: Mapping[str, int]) -> float:
    """The one factor on every update: ``lora_alpha / r`` for the largest rank ``r``, or 2 where no ``lora_alpha`` is given."""
    return DEFAULT_SCALE if lora_alpha is None else lora_alpha / max(ranks.values())


def target_linears(model: nn.Module, target_modules: str, *, task_type: str) -> dict[str, tuple[int, int]]:
    """Full name -> (out features, in features) of the linear layers that a text like ``all-linear`` or ``query,value`` names.

    Raises
    ------
    InputError
        When the model has no linear layer, or a name matches none (the message lists the names that exist).
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
    from torch import nn

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    everything = LoraConfig(target_modules="all-linear", task_type=task_type)
    adaptable = _maybe_include_all_linear_layers(everything, model).target_modules if linears else None
    whole = (*HEADS.get(task_type, ()), *(modules_to_save(model) or ()))
    adaptable = {name for name in adaptable or () if not _lies_in(name, whole)}
    if not adaptable:
        raise InputError(
            "no-linear-layers",
            f"the model {type(model).__name__} has no linear layer to adapt, expected at least one torch.nn.Linear below its head. Choose another --model.",
        )
    names = as_target_modules(target_modules)
    if isinstance(names, str):
        return {name: (linear.out_features, linear.in_features) for name, linear in linears.items() if name in adaptable}
    for wanted in names or [target_modules]:
        if not any(check_target_module_exists(LoraConfig(target_modules=[wanted]), name) for name in linears):
            known = sorted({name.rpartition(".")[2] for name in adaptable})
            raise InputError(
                "unknown-target-modules", f"--target-modules names {wanted!r}, which is no linear layer of the model. It has: {', '.join(known)}."
            )
    config = LoraConfig(target_modules=names)
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items() if check_target_module_exists(config, name)}


def even_ranks(model: nn.Module, target_modules: str, plan: Plan) -> dict[str, int]:
    """Rank of each targeted module, as even as the budget allows.

    Raises
    ------
    InputError
        When the budget is below one component per module, or asks for a rank that a module cannot have.
    """
    shapes = target_linears(model, target_modules, task_type=plan.task_type)
    ranks = dict(zip(shapes, spread_budget(len(shapes), plan), strict=True))
    for name, rank in ranks.items():
        if rank > min(shapes[name]):
            raise InputError(
                "budget-too-large",
                f"the budget of {sum(ranks.values())} components asks for rank {rank} in {name}, whose weight is {shapes[name][0]} x {shapes[name][1]}; "
                f"expected at most {min(shapes[name])}. Lower --budget or --target-r.",
            )
    return ranks


def even_config(recipe: Recipe, model: nn.Module, plan: Plan) -> LoraConfig:
    """Plain LoRA with the settings of a recipe and ranks as even as the budget allows."""
    ranks = even_ranks(model, recipe.target_modules, plan)
    return plain_config(
        ranks,
        scale=scale_for(recipe.lora_alpha, ranks),
        task_type=plan.task_type,
        lora_dropout=recipe.lora_dropout,
        modules_to_save=modules_to_save(model),
    )


def plain_config(ranks: Mapping[str, int], *, scale: float, task_type: str, lora_dropout: float = 0.0, **extra: Any) -> LoraConfig:
    """A stock ``LoraConfig`` with these ranks (all at least 1) and one ``scale`` for every module.

    Uneven ranks go to ``rank_pattern`` by full module name; ``alpha_pattern`` keeps ``alpha / rank`` the same everywhere.
    """
    from peft import LoraConfig

    top = max(ranks.values())
    uneven = {name: rank for name, rank in ranks.items() if rank != top}
    return LoraConfig(
        r=top,
        lora_alpha=tidy(scale * top),
        target_modules=sorted(ranks),
        rank_pattern=dict(uneven),
        alpha_pattern={name: tidy(scale * rank) for name, rank in uneven.items()},
        task_type=task_type,
        lora_dropout=lora_dropout,
        **extra,
    )


def tidy(number: float) -> Any:
    """An int where the number is whole, so that saved files read ``8`` and not ``8.0``."""
    return int(number) if float(number).is_integer() else float(number)


def lora_ranks(model: PeftModel) -> dict[str, int]:
    """Rank of every LoRA layer by its full name in the base model; modules without an adapter are left out."""
    from peft.tuners.lora import LoraLayer

    layers = model.get_base_model().named_modules()
    return {name: layer.r[ADAPTER] for name, layer in layers if isinstance(layer, LoraLayer) and ADAPTER in layer.r}


def build_plain_lora(model: PeftModel, factors: Mapping[str, tuple[Tensor, Tensor]], *, scale: float) -> PeftModel:
    """Replace the adapter of ``model``, whatever its kind, by plain LoRA layers; trained heads stay as they are.

    Parameters
    ----------
    factors : mapping of str to (Tensor, Tensor)
        Full module name -> ``A`` (rank, in) and ``B`` (out, rank), rank at least 1. Modules that are missing get no adapter.
    scale : float
        The update of a module is ``scale * B @ A``.
    """
    import torch
    from peft import get_peft_model
    from peft.utils import ModulesToSaveWrapper

    old = model.peft_config[ADAPTER]
    heads = {
        name: {key: value.detach().clone() for key, value in module.modules_to_save[ADAPTER].state_dict().items()}
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    others = [name for name in old.modules_to_save or () if name not in HEADS.get(old.task_type, ())]
    config = plain_config(ranks, scale=scale, task_type=old.task_type, lora_dropout=old.lora_dropout, modules_to_save=others or None)
    plain = get_peft_model(model.unload(), config)
    base = plain.get_base_model()
    with torch.no_grad():
        for name, (a, b) in factors.items():
            layer: Any = base.get_submodule(name)
            layer.lora_A[ADAPTER].weight.copy_(a)
            layer.lora_B[ADAPTER].weight.copy_(b)
    for name, state in heads.items():
        head: Any = base.get_submodule(name)
        head.modules_to_save[ADAPTER].load_state_dict(state)
    return plain.eval()
