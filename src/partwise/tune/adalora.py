"""AdaLoRA (Zhang et al., arXiv:2303.10512) as peft ships it, driven as its authors meant it, and folded into plain LoRA at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.tune.lora import ADAPTER, build_plain_lora, even_ranks, modules_to_save
from partwise.tune.recipe import Plan, Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

SURPLUS = 1.5
MEMORY = ("exp_avg_ipt", "exp_avg_unc")


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Recipe):
    """Starts with half as many components again, and takes the least important away on a cubic schedule until the budget is met.

    peft needs to be told after every step, with the gradients still there; without that call it trains at the starting rank and says
    nothing. The loss it trains on contains its orthogonality term. What is saved is plain LoRA: ``E`` is folded into ``A``, masked
    components are dropped, and modules that lost all of theirs carry no adapter.

    Parameters
    ----------
    warmup_share : float
        Share of the steps before anything is taken away.
    final_share : float
        Share of the steps, at the end, in which the ranks stay fixed.
    interval : int or None
        Steps between two decisions. Left out: a fiftieth of the steps.
    orthogonality : float
        Weight of the term that keeps the rows of ``A`` and the columns of ``B`` orthogonal.

    References
    ----------
    Zhang et al. Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. arXiv:2303.10512.
    """

    warmup_share: float = 0.1
    final_share: float = 0.5
    interval: int | None = None
    orthogonality: float = 0.5

    def wrap(self, model: nn.Module, plan: Plan) -> PeftModel:
        """Install peft's SVD layers at the starting rank and set the exact final budget."""
        from peft import AdaLoraConfig, get_peft_model

        num_steps = plan.num_steps
        if num_steps < 2:
            raise InputError(
                "too-few-steps", f"AdaLoRA needs a step to score components and one to drop them: got --max-steps {num_steps}, expected 2 or more."
            )
        num_final = min(int(self.final_share * num_steps), num_steps - 2)
        even = even_ranks(model, self.target_modules, plan)
        budget = sum(even.values())
        start = math.ceil(SURPLUS * budget / len(even))
        config = AdaLoraConfig(
            init_r=start,
            target_r=max(1, budget // len(even)),
            tinit=min(int(self.warmup_share * num_steps), num_steps - num_final - 1),
            tfinal=num_final,
            deltaT=self.interval or max(1, num_steps // 50),
            total_step=num_steps,
            orth_reg_weight=self.orthogonality,
            lora_alpha=2 * start if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=sorted(even),
            modules_to_save=modules_to_save(model),
            task_type=plan.task_type,
        )
        wrapped = get_peft_model(model, config)
        allocator(wrapped).target_bgt = budget  # peft only knows whole ranks per module
        return wrapped

    def after_step(self, model: PeftModel, step: int, plan: Plan, *, held_out_loss: Callable[[], float]) -> bool:
        """Let peft score every component with the gradients of this step, and mask those beyond the budget."""
        import torch

        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # a module that the forward pass did not use has importance 0
        tuner: Any = model.base_model
        tuner.update_and_allocate(step + 1)
        return True

    def extra_state(self, model: PeftModel) -> dict[str, Tensor]:
        """The running importance of every parameter, and which components are masked."""
        import torch

        memory = allocator(model)
        tensors = {f"{kind}.{name}": value for kind in MEMORY for name, value in getattr(memory, kind).items()}
        masks = {f"mask.{name}": torch.tensor(mask, dtype=torch.bool) for name, mask in rank_masks(model).items()}
        return tensors | masks

    def load_extra_state(self, model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
        """Put the running importance and the masks back."""
        import torch

        memory = allocator(model)
        memory.reset_ipt()
        masks = {}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "mask":
                masks[name] = value.tolist()
            else:
                getattr(memory, kind)[name] = value.clone()
                memory.ipt[name] = torch.zeros_like(value)  # peft starts its averages anew for names it does not find here
        config: Any = model.peft_config[ADAPTER]
        config.rank_pattern = masks or None

    def finish(self, model: PeftModel) -> PeftModel:
        """Fold ``scaling / ranknum * B diag(E) A`` into plain factors with the scale ``lora_alpha / init_r``."""
        config: Any = model.peft_config[ADAPTER]
        scale = config.lora_alpha / config.init_r
        masks = rank_masks(model)
        factors = {}
        for name, layer in svd_layers(model).items():
            kept = layer.lora_E[ADAPTER].detach().squeeze(1) != 0  # (rank,)
            if f"{name}.lora_E.{ADAPTER}" in masks:
                kept &= kept.new_tensor(masks[f"{name}.lora_E.{ADAPTER}"])
            if not kept.any():
                continue
            exact = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER].detach() + 1e-5) / scale  # 1 up to peft's 1e-5
            a = (layer.lora_A[ADAPTER] * layer.lora_E[ADAPTER]).detach()[kept] * exact  # (kept, in)
            factors[name] = (a, layer.lora_B[ADAPTER].detach()[:, kept])
        return build_plain_lora(model, factors, scale=scale)

    def ranks(self, model: PeftModel) -> dict[str, int]:
        """Components that are not masked, by module; plain layers after ``finish`` count as they are."""
        masks = rank_masks(model)
        layers = svd_layers(model)
        return {name: sum(masks.get(f"{name}.lora_E.{ADAPTER}", [True] * layer.r[ADAPTER])) for name, layer in layers.items()}


def allocator(model: PeftModel) -> Any:
    """Peft's ``RankAllocator`` of the adapter."""
    tuner: Any = model.base_model
    return tuner.rankallocator


def rank_masks(model: PeftModel) -> dict[str, list[bool]]:
    """Parameter name of ``E`` -> which of its entries are kept; empty before the first decision."""
    config: Any = model.peft_config[ADAPTER]
    return dict(config.rank_pattern or {})


def svd_layers(model: PeftModel) -> dict[str, Any]:
    """The AdaLoRA layers by full name in the base model."""
    from peft.tuners.adalora import SVDLinear

    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, SVDLinear)}
