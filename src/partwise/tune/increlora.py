"""IncreLoRA (Zhang et al., arXiv:2308.12043) on AdaPaD's growing layers: ranks grow, everything trains jointly, no levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from partwise.tune._growing_recipe import GrowingRecipe
from partwise.tune.adapad_recipe import AdaPaD
from partwise.tune.adapad_settings import AdaPaDSettings
from partwise.tune.recipe import Plan

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class IncreLoRA(GrowingRecipe):
    """Ranks grow from one where importance is largest until the budget is spent; all components train jointly.

    The same growth as AdaPaD's, without its levels and without a rotation at the end, so that a comparison shows what those two do. Differences
    from the paper: importance is taken on the factors instead of on the full update, the scale does not change with the rank, a new component
    starts at zero instead of learning in advance, and there is no norm term in the loss.

    Parameters
    ----------
    r : int
        Largest rank of a module.
    init_r : int
        Rank of every module at the start.
    growth_interval : int or None
        Optimiser steps between two growth events. Left out: chosen as AdaPaD does.
    growth_warmup : int or None
        No growth up to and including this step. Left out: one interval.
    growth_modules : int or None
        Modules that grow at an event. Left out: chosen as AdaPaD does.

    References
    ----------
    Zhang et al. IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning. arXiv:2308.12043.
    """

    r: int = 4
    init_r: int = 1
    growth_interval: int | None = None
    growth_warmup: int | None = None
    growth_modules: int | None = None

    def as_adapad(self) -> AdaPaD:
        """AdaPaD with everything switched off but growth."""
        settings = AdaPaDSettings(
            r=self.r,
            init_r=self.init_r,
            growth_interval=self.growth_interval,
            growth_warmup=self.growth_warmup,
            growth_modules=self.growth_modules,
            schedule="joint",
            successor_weight=0.0,
            top_share=0.0,
            joint_start=0.0,
            finish="joint",
            advance_learning=False,
        )
        return AdaPaD(settings=settings, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout, target_modules=self.target_modules)

    def wrap(self, model: nn.Module, plan: Plan) -> PeftModel:
        """Install growing layers that all train on every sample."""
        return self.as_adapad().wrap(model, plan)

    def finish(self, model: PeftModel) -> PeftModel:
        """A compact plain LoRA adapter, its components in the order they grew."""
        from partwise.tune.finished import finalize

        finalize(model, singular_order=False)
        return model
