"""Language models that training goes on with: from folders and the hub, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from partwise.checks import InputError
from partwise.train.task import load_language_model
from tiny import save_tiny, tiny_bert, tiny_bert_tokenizer, tiny_llama, tiny_llama_tokenizer


def test_a_saved_model_is_loaded_in_float32_with_its_tokenizer(tmp_path: Path):
    model = tiny_llama()
    save_tiny(tmp_path, model.to(torch.bfloat16), tiny_llama_tokenizer())
    loaded, tokenizer = load_language_model(str(tmp_path))
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    assert torch.equal(loaded.state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"].float())
    assert tokenizer.eos_token == "</s>"


def refused(code: str, source: Path | str, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load_language_model(str(source))
    assert caught.value.code == code


def test_a_missing_folder_a_missing_tokenizer_and_missing_weights_are_named(tmp_path: Path):
    refused("model-not-found", tmp_path / "none", "there is no folder .* one of llama-small, llama-medium, mlp, resnet")
    refused("model-not-found", "lama-small", "there is no folder 'lama-small'")
    refused("model-incomplete", tmp_path, r"has no config\.json")
    tiny_llama().save_pretrained(tmp_path)
    refused("model-incomplete", tmp_path, "tokenizer")
    (tmp_path / "model.safetensors").unlink()
    refused("model-incomplete", tmp_path, r"has no \*\.safetensors file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused("pickle-refused", tmp_path, r"pickled weights only \(pytorch_model\.bin\)")


def test_a_model_of_the_hub_that_cannot_be_reached_is_refused():
    refused("model-unavailable", "nobody/nothing", "cannot load 'nobody/nothing'")


def test_weights_that_lack_tensors_or_are_damaged_are_refused(tmp_path: Path):
    save_tiny(tmp_path, tiny_llama(), tiny_llama_tokenizer())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused("weights-do-not-match", tmp_path, "lack 9 tensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    refused("damaged-weights", tmp_path, "cannot be read")


def test_an_encoder_and_a_tokenizer_with_too_many_tokens_are_refused(tmp_path: Path):
    save_tiny(tmp_path / "many", tiny_llama(), tiny_llama_tokenizer([f"word{number}" for number in range(100)]))
    refused("weights-do-not-match", tmp_path / "many", "has 103 tokens, but the model has embeddings for 24")
    save_tiny(tmp_path / "vit", tiny_bert(), tiny_bert_tokenizer())
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    refused("task-not-supported", tmp_path / "vit", "is of type vit, which writes no text")
