from __future__ import annotations

import pytest

from partwise.models.names import locate, locate_all

PLACES = {
    "encoder.layer.3.attention.self.query": (3, "attention.self.query"),
    "base_model.model.bert.encoder.layer.11.output.dense": (11, "output.dense"),
    "distilbert.transformer.layer.0.attention.q_lin": (0, "attention.q_lin"),
    "model.layers.31.self_attn.q_proj": (31, "self_attn.q_proj"),
    "base_model.model.model.layers.2.mlp.down_proj": (2, "mlp.down_proj"),
    "transformer.h.7.attn.c_attn": (7, "attn.c_attn"),
    "gpt_neox.layers.4.attention.dense": (4, "attention.dense"),
    "backbone.layers.23.mixer.in_proj": (23, "mixer.in_proj"),
    "model.layers.5.mlp.experts.12.gate_proj": (5, "mlp.experts.12.gate_proj"),
    "model.decoder.layers.1.fc1": (1, "decoder.fc1"),
    "encoder.block.0.layer.1.DenseReluDense.wi": (0, "layer.1.DenseReluDense.wi"),
    "vision_model.encoder.layers.0.mlp.fc1": (0, "vision_model.mlp.fc1"),
    "layer3.0.conv1": (0, "layer3.conv1"),
    "classifier": (None, "classifier"),
    "base_model.model.classifier.dense": (None, "classifier.dense"),
    "lm_head": (None, "lm_head"),
    "net.2": (2, "net"),
    "0": (0, "layer"),
    "": (None, ""),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_module_name_tells_layer_and_kind(name: str) -> None:
    assert locate(name) == PLACES[name]


def test_the_towers_of_one_model_stay_apart() -> None:
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q", "layer1.0.conv1", "layer2.0.conv1"]
    assert len({locate(name) for name in names}) == 4


def test_modules_that_would_share_a_place_keep_their_full_names() -> None:
    assert locate_all(["question.layers.0.q", "passage.layers.0.q", "passage.layers.1.q"]) == {
        "question.layers.0.q": (0, "question.layers.0.q"),
        "passage.layers.0.q": (0, "passage.layers.0.q"),
        "passage.layers.1.q": (1, "q"),
    }
