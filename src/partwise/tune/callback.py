"""An optional helper for ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from partwise.tune._prefix_linear import PrefixDown
from partwise.tune.adapad import controller_of
from partwise.tune.finished import finalize


class AdaPaDCallback(TrainerCallback):
    """Optional helper for ``transformers.Trainer``: logs ranks, knows the number of steps, finalises at the end.

    Parameters
    ----------
    finalize_at_end : bool
        Make the adapter a compact plain LoRA when training ends (after the best checkpoint was loaded, where that was asked for).
    """

    def __init__(self, *, finalize_at_end: bool = True) -> None:
        self.finalize_at_end = finalize_at_end

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Tell the configuration how many steps there will be, unless the user said so."""
        settings = controller_of(model).settings
        if settings.total_steps is None:
            settings.total_steps = state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, *, model: nn.Module, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add the number of active components to what is logged."""
        if logs is not None and any(isinstance(module, PrefixDown) for module in model.modules()):
            logs["adapad_components"] = controller_of(model).num_components

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Finalise the adapter."""
        if self.finalize_at_end:
            finalize(model)
