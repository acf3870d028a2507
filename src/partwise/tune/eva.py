"""EVA (Paischer et al., arXiv:2410.07170) as peft ships it: starting values and ranks from the activations, then plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.tune.lora import ADAPTER, even_config, lora_ranks, plain_config
from partwise.tune.recipe import Plan, Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class EVA(Recipe):
    """Before training, ``A`` starts at the main directions of each layer's inputs, and layers whose inputs need more directions get more rank.

    Needs some forward passes over training batches. Ranks are fixed afterwards. A layer may end with rank 0 and then carries no adapter.

    Parameters
    ----------
    rho : float
        A module gets at most ``rho`` times its even share of the budget. 1 keeps all ranks equal.
    tau : float
        Directions count as found once their cosine between two passes reaches this value.

    References
    ----------
    Paischer et al. One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation. arXiv:2410.07170.
    """

    rho: float = 2.0
    tau: float = 0.99

    def wrap(self, model: nn.Module, plan: Plan) -> PeftModel:
        """Install LoRA layers and let peft set their ranks and ``A`` from the calibration batches."""
        from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights

        config, batches = even_config(self, model, plan), list(plan.calibration())
        eva = EvaConfig(rho=affordable_rho(self.rho, top=config.r, batches=batches), tau=self.tau, use_label_mask=False)
        wrapped = get_peft_model(model, config)
        config.init_lora_weights, config.eva_config = "eva", eva  # said only now, so that peft does not warn about memory it cannot save here
        initialize_lora_eva_weights(wrapped, batches, prepare_layer_inputs_fn=real_tokens, show_progress_bar=False)
        return wrapped

    def finish(self, model: PeftModel) -> PeftModel:
        """Say in the adapter's settings what it now is: plain LoRA with these ranks."""
        config: Any = model.peft_config[ADAPTER]
        ranks = lora_ranks(model)
        layer: Any = model.get_base_model().get_submodule(next(iter(ranks)))
        plain = plain_config(ranks, scale=layer.scaling[ADAPTER], task_type=config.task_type, lora_dropout=self.lora_dropout)
        for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "init_lora_weights", "eva_config"):
            setattr(config, field, getattr(plain, field))
        return model

    def ranks(self, model: PeftModel) -> dict[str, int]:
        """Rank of each module that has an adapter."""
        return lora_ranks(model)


def affordable_rho(rho: float, *, top: int, batches: list[dict[str, Tensor]]) -> float:
    """``rho`` for the largest rank ``top``, lowered where a batch has fewer rows than directions are asked for (a pooled layer sees one row per text).

    peft waits for ever on a layer that never sees enough rows.

    Raises
    ------
    InputError
        When even the plain rank is above the number of rows of a batch.
    """
    rows = min(batch["input_ids"].shape[0] for batch in batches)
    if rows < top:
        raise InputError(
            "batch-too-small",
            f"EVA looks for {top} directions in batches of {rows} rows, expected at least {top} rows. Raise --batch-size to {top} or more.",
        )
    return max(1.0, min(rho, rows / top))


def real_tokens(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Inputs of one layer as rows: (batch, seq, features) -> (tokens that are no padding, features); pooled inputs stay (batch, features)."""
    values: Tensor = layer_input if not isinstance(layer_input, tuple | list) else layer_input[0]
    if values.ndim == 2:
        return values.contiguous()
    return values[model_input.T.unbind()]
