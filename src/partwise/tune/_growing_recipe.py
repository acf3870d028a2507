"""What recipes have in common whose components are driven by a controller: saved state, ranks and the finish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partwise.tune.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from partwise.tune._controller import Controller


@dataclass(frozen=True, kw_only=True)
class GrowingRecipe(Recipe):
    """A recipe whose model carries AdaPaD's growing layers."""

    @staticmethod
    def controller(model: PeftModel) -> Controller:
        """Who knows ranks, ages and the step of the adapter."""
        from partwise.tune.adapad import controller_of

        return controller_of(model)

    def extra_state(self, model: PeftModel) -> dict[str, Tensor]:
        """Ranks, scores, ages, the step, and held-out losses where components were judged; per module."""
        controller = self.controller(model)
        return {slot.name: controller.slot_state(slot) for slot in controller.slots}

    def load_extra_state(self, model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``extra_state`` returned."""
        controller = self.controller(model)
        for slot in controller.slots:
            controller.load_slot_state(slot, tensors[slot.name])

    def finish(self, model: PeftModel) -> PeftModel:
        """A compact plain LoRA adapter in singular order."""
        from partwise.tune.finished import finalize

        finalize(model)
        return model

    def ranks(self, model: PeftModel) -> dict[str, int]:
        """Active rank of each module, growing or finalised; a component in training counts."""
        from partwise.tune.finished import active_ranks

        return active_ranks(model)
