"""Modules that a checkpoint lacks (a head, a pooler) are trained and saved whole, so that stock peft gives back the model that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from partwise.tune._models import load_model
from partwise.tune.adalora import AdaLoRA
from partwise.tune.adapad_recipe import AdaPaD
from partwise.tune.lora import LoRA
from partwise.tune.one_rank_at_a_time import OneRank
from partwise.tune.recipe import Plan, Recipe
from tiny import save_tiny, tiny_bert_tokenizer
from tolerances import assert_close

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
BODIES: dict[str, Any] = {
    "distilbert": lambda: DistilBertModel(DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=40)),
    "deberta-v2": lambda: DebertaV2Model(DebertaV2Config(**SMALL, pooler_hidden_size=16)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SMALL, pad_token_id=0)),
}
INPUTS = {"input_ids": torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14], [5, 6, 7, 8], [9, 9, 9, 9]])}


def plan() -> Plan:
    def calibration() -> Any:
        return iter([{**INPUTS, "labels": torch.tensor([0, 1, 2, 0])}] * 2)

    return Plan(num_steps=6, target_r=2.0, budget=None, seed=0, task_type="SEQ_CLS", calibration=calibration)


def trained(recipe: Recipe, model: Any) -> PeftModel:
    adapted = recipe.wrap(model, plan()).train()
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for step in range(6):
        adapted(**INPUTS, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimiser.step()
        recipe.after_step(adapted, step, plan(), held_out_loss=lambda: 1.0)
        optimiser.zero_grad()
    return recipe.finish(adapted).eval()


@pytest.mark.parametrize("recipe", [AdaPaD(), LoRA(), AdaLoRA(), OneRank()], ids=lambda recipe: type(recipe).__name__)
@pytest.mark.parametrize("family", sorted(BODIES))
def test_stock_peft_gives_back_the_model_though_the_checkpoint_has_no_head(tmp_path: Path, family: str, recipe: Recipe) -> None:
    torch.manual_seed(0)
    save_tiny(tmp_path / "body", BODIES[family](), tiny_bert_tokenizer())
    base, _ = load_model(str(tmp_path / "body"), task="classification", num_labels=3, seed=0)
    model = trained(recipe, base)
    with torch.no_grad():
        measured = model(**INPUTS).logits
        model.save_pretrained(tmp_path / "adapter")
        torch.manual_seed(99)  # another random head than the one that was trained
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=3)
        reloaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()(**INPUTS).logits
    assert_close(reloaded, measured, claim="head and pooler come from the adapter folder")
