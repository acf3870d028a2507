"""How ``partwise tune adapad`` drives AdaPaD. Light to import: the command line makes flags from this class."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from partwise.tune._growing_recipe import GrowingRecipe
from partwise.tune.adapad_settings import AdaPaDSettings
from partwise.tune.recipe import Plan

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class AdaPaD(GrowingRecipe):
    """Rank-one parts that train in parallel; each module's rank grows from one until a shared budget is spent.

    Parameters
    ----------
    settings : AdaPaDSettings
        Growth and levels.

    References
    ----------
    AdaPaD: rank-one adapters by parallel deflation. arXiv:2605.10741.
    """

    settings: AdaPaDSettings = field(default_factory=AdaPaDSettings)

    @property
    def orders_components(self) -> bool:
        """True for every schedule but the joint one."""
        settings = replace(self.settings)
        settings.fill_in()
        return settings.schedule != "joint"

    def wrap(self, model: nn.Module, plan: Plan) -> PeftModel:
        """Install growing layers and check the budget against them."""
        from peft import get_peft_model

        from partwise.tune.adapad import AdaPaDConfig, controller_of
        from partwise.tune.lora import modules_to_save, target_linears

        settings = {item.name: getattr(self.settings, item.name) for item in fields(self.settings)}
        config = AdaPaDConfig(
            **settings,
            lora_alpha=2 * self.settings.r if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=sorted(target_linears(model, self.target_modules, task_type=plan.task_type)),
            modules_to_save=modules_to_save(model),
            task_type=plan.task_type,
            budget=plan.budget,
            target_r=None if plan.budget is not None else plan.target_r,
            total_steps=plan.num_steps,
            seed=plan.seed,
        )
        adapted = get_peft_model(model, config)
        controller_of(adapted).seal()
        return adapted
