from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler

from partwise.checks import InputError
from partwise.models.networks import MLP, PreResNet
from partwise.train.task import TaskSettings, TrainTask, open_task
from tiny import save_tiny, tiny_llama, tiny_llama_tokenizer

METHODS = {
    "twist": "causal-lm",
    "local-sgd": "causal-lm",
    "diloco": "causal-lm",
    "ist": "classification",
    "resist": "classification",
    "loft": "classification",
}
WORDS = ("def", "return", "self", "value", "for", "in", "range", "if", "else", "\n    ", "import", "class", "None")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty text files."""
    (tmp_path / "texts").mkdir()
    for number in range(30):
        words = np.random.default_rng(number).choice(WORDS, 300)
        (tmp_path / "texts" / f"file_{number:02}.py").write_text(f"# {number}\n" + " ".join(words.tolist()))
    return tmp_path / "texts"


@pytest.fixture
def small_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of thirty files, so that the default takes no seconds."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(folder))
    return folder


def small(**changes: Any) -> TaskSettings:
    return TaskSettings(**({"context": 16, "batch_size": 4, "vocab_size": 300} | changes))


def rows(folder: Path, *shape: int, num: int = 80) -> str:
    path = folder / "rows.npz"
    np.savez(path, x=np.random.default_rng(0).normal(size=(num, *shape)), y=np.arange(num) % 4)
    return str(path)


def assert_same(one: TrainTask, other: TrainTask) -> None:
    assert one.fingerprint == other.fingerprint
    for part in ("valid", "test", "calibration"):
        assert_same_batches(getattr(one, part), getattr(other, part))
    assert_same_batches(list(one.loader), list(other.loader))
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name])


def assert_same_batches(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other) > 0
    for first, second in zip(one, other, strict=True):
        tensors = zip(first.values(), second.values(), strict=True) if isinstance(first, dict) else zip(first, second, strict=True)
        assert all(torch.equal(a, b) for a, b in tensors)


# What is trained on what


@pytest.mark.parametrize("method", METHODS)
def test_the_method_decides_what_is_trained_where_nothing_else_does(method: str, small_library: Path):
    task = open_task(method, small(), seed=0)
    assert task.kind == METHODS[method]
    if task.kind == "causal-lm":
        assert (task.name, task.unit, type(task.model).__name__) == ("standard library", "tokens", "LlamaForCausalLM")
        assert task.model.get_input_embeddings().num_embeddings == len(task.tokenizer) == 300
    else:
        assert task.name == "scikit-learn digits"
        assert isinstance(task.model, MLP if method == "ist" else PreResNet)
        assert (task.unit, tuple(task.test[0][0].shape[1:])) == (("rows", (64,)) if method == "ist" else ("images", (1, 8, 8)))
        assert task.tokenizer is None


def test_a_named_network_decides_before_the_method(small_library: Path):
    assert isinstance(open_task("twist", small(model="mlp"), seed=0).model, MLP)
    assert isinstance(open_task("local-sgd", small(model="resnet"), seed=0).model, PreResNet)
    assert open_task("ist", small(model="llama-medium"), seed=0).model.config.hidden_size == 288


def test_given_data_or_text_decide_before_the_method(folder: Path, tmp_path: Path):
    assert open_task("ist", small(text=str(folder)), seed=0).kind == "causal-lm"
    assert isinstance(open_task("twist", small(data=rows(tmp_path, 5)), seed=0).model, MLP)
    assert isinstance(open_task("local-sgd", small(data=rows(tmp_path, 8, 8, 3)), seed=0).model, PreResNet)
    assert isinstance(open_task("ist", small(data=rows(tmp_path, 8, 8, 3)), seed=0).model, MLP)


def test_images_for_a_perceptron_are_rows(tmp_path: Path):
    task = open_task("ist", small(data=rows(tmp_path, 8, 8, 3)), seed=0)
    assert task.unit == "rows"
    assert task.valid[0][0].shape == (4, 192)
    assert task.model(task.valid[0][0]).shape == (4, 4)


def test_a_model_from_a_folder_is_trained_on_with_its_own_tokenizer(folder: Path, tmp_path: Path):
    source = tiny_llama()
    save_tiny(tmp_path / "model", source, tiny_llama_tokenizer(bos=False))
    (folder / "words.txt").write_text("the film is good . " * 300)
    task = open_task("twist", small(model=str(tmp_path / "model"), text=str(folder)), seed=3)
    assert torch.equal(task.model.state_dict()["model.norm.weight"], source.state_dict()["model.norm.weight"])
    assert len(task.tokenizer) == 24
    assert max(int(batch["input_ids"].max()) for batch in task.loader) < 24


# Batches


def test_text_comes_as_full_batches_of_blocks_whose_loss_the_model_knows(folder: Path):
    task = open_task("twist", small(text=str(folder)), seed=0)
    assert isinstance(task.loader.sampler, RandomSampler)
    assert all(batch["input_ids"].shape == batch["labels"].shape == (4, 16) for batch in task.loader)
    assert task.model(**task.valid[0]).loss.item() == pytest.approx(np.log(300), rel=0.1)
    num_blocks = task.fingerprint["sizes"]["train"] // 16
    assert len(task.loader) == num_blocks // 4
    assert len(task.loader.dataset) == num_blocks


def test_sizes_count_what_the_batches_hold(folder: Path):
    task = open_task("twist", small(text=str(folder)), seed=0)
    for part in ("valid", "test", "calibration"):
        assert sum(batch["input_ids"].numel() for batch in getattr(task, part)) == task.fingerprint["sizes"][part]
    digits = open_task("loft", TaskSettings(), seed=0)
    assert {part: sum(len(y) for _, y in getattr(digits, part)) for part in ("valid", "test")} == {"valid": 270, "test": 270}
    assert digits.fingerprint["sizes"] == {"train": 1122, "valid": 270, "test": 270, "calibration": 135}


def test_test_tokens_bound_what_is_measured_on_and_validation_gets_half(folder: Path):
    task = open_task("twist", small(text=str(folder), test_tokens=64, valid_fraction=0.2), seed=0)
    assert {part: task.fingerprint["sizes"][part] for part in ("valid", "test", "calibration")} == {"valid": 32, "test": 64, "calibration": 16}


def test_the_training_data_can_be_sent_to_a_worker(folder: Path):
    for settings in (small(text=str(folder)), TaskSettings(model="mlp")):
        dataset = open_task("twist", settings, seed=0).loader.dataset
        again = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - as workers get it
        item, twin = dataset[3], again[3]
        assert (
            all(torch.equal(a, b) for a, b in zip(item.values(), twin.values(), strict=True))
            if isinstance(item, dict)
            else torch.equal(item[0], twin[0])
        )


# The same again


@pytest.mark.parametrize("method", ["twist", "ist", "resist"])
def test_the_same_seed_gives_the_same_bits(method: str, small_library: Path):
    assert_same(open_task(method, small(), seed=4), open_task(method, small(), seed=4))


def test_another_seed_changes_weights_and_order_but_not_what_is_held_out(small_library: Path):
    one, other = (open_task("twist", small(), seed=seed) for seed in (0, 1))
    assert one.fingerprint == other.fingerprint
    assert_same_batches(one.test, other.test)
    assert not torch.equal(next(iter(one.loader))["input_ids"], next(iter(other.loader))["input_ids"])
    assert not torch.equal(one.model.state_dict()["model.embed_tokens.weight"], other.model.state_dict()["model.embed_tokens.weight"])
    elsewhere = open_task("twist", small(split_seed=1), seed=0)
    assert elsewhere.fingerprint["held_out"] != one.fingerprint["held_out"]


def test_the_fingerprint_is_json_and_names_the_held_out_files(small_library: Path):
    fingerprint = open_task("twist", small(), seed=0).fingerprint
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    held_out = [name for part in ("valid", "test", "calibration") for name in fingerprint["held_out"][part]]
    assert len(held_out) == len(set(held_out)) >= 3
    assert all((small_library / name).is_file() for name in held_out)
    changed = small_library / held_out[0]
    changed.write_text(changed.read_text() + "x")
    assert open_task("twist", small(), seed=0).fingerprint["sha256"] != fingerprint["sha256"]


# The settings themselves


def test_every_setting_is_described_where_the_flags_read_it():
    described = inspect.getdoc(TaskSettings) or ""
    assert all(f"\n{field.name} : " in described for field in fields(TaskSettings))


def test_the_settings_load_no_heavy_library():
    program = "import sys, partwise.train.task; print(sorted({'torch', 'numpy', 'transformers', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("code", "changes", "match"),
    [
        ("text-and-data", {"text": "a", "data": "b"}, "got --text a and --data b, expected one of them"),
        ("below-minimum", {"context": 1}, "context=1 must be an integer of at least 2"),
        ("below-minimum", {"batch_size": 0}, "batch_size=0"),
        ("below-minimum", {"vocab_size": 100}, "vocab_size=100 must be an integer of at least 257"),
        ("below-minimum", {"test_tokens": 0}, "test_tokens=0"),
        ("below-minimum", {"split_seed": -1}, "split_seed=-1"),
        ("valid-fraction", {"valid_fraction": 0.0}, "valid_fraction=0.0 must be above 0 and at most 0.2"),
        ("valid-fraction", {"valid_fraction": 0.3}, "valid_fraction=0.3"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(code: str, changes: dict[str, Any], match: str):
    with pytest.raises(InputError, match=match) as caught:
        TaskSettings(**changes)
    assert caught.value.code == code


# Bad input


def refused(code: str, method: str, settings: TaskSettings, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        open_task(method, settings, seed=0)
    assert caught.value.code == code


def test_a_network_that_is_not_made_for_the_data_is_refused(folder: Path, tmp_path: Path):
    refused(
        "network-mismatch", "twist", small(text=str(folder), model="mlp"), "got --text with --model mlp, .* expected one of llama-small, llama-medium"
    )
    for model in ("llama-small", "owner/name"):
        refused(
            "network-mismatch", "ist", small(data=rows(tmp_path, 5), model=model), f"got --data with --model {model}, .* expected one of mlp, resnet"
        )


def test_rows_for_a_convolutional_network_are_refused(tmp_path: Path):
    refused("data-shape", "loft", small(data=rows(tmp_path, 64)), "has rows of 64 features, expected images")


def test_a_model_that_is_not_there_is_refused_before_any_text_is_read():
    refused("model-not-found", "twist", small(model="./nowhere"), r"there is no folder './nowhere'")
    refused("model-not-found", "ist", small(model="lama-small"), "or one of llama-small, llama-medium, mlp, resnet")


def test_a_context_longer_than_the_model_can_read_is_refused(folder: Path, tmp_path: Path):
    save_tiny(tmp_path / "model", tiny_llama(), tiny_llama_tokenizer())
    settings = small(model=str(tmp_path / "model"), text=str(folder), context=33)
    refused("max-length", "twist", settings, r"context=33 is more than the 32 tokens that .* can read\. Pass --context 32 or less")


def test_less_than_one_batch_is_refused(folder: Path, tmp_path: Path):
    refused("too-little-text", "twist", small(text=str(folder), batch_size=5000), r"texts gives \d+ blocks of 16 tokens .* at least a batch of 5000")
    refused(
        "too-few-rows", "ist", small(data=rows(tmp_path, 5), batch_size=60), r"rows\.npz has \d+ samples to train on, expected at least a batch of 60"
    )


def test_text_and_data_that_are_not_there_are_refused(tmp_path: Path):
    refused("data-not-found", "twist", small(text=str(tmp_path / "none")), "there is no file or folder .* Check --text")
    refused("data-not-found", "ist", small(data=str(tmp_path / "none.npz")), "there is no file .* Check --data")


def test_a_batch_of_one_row_is_refused_where_norms_want_two():
    with pytest.raises(InputError, match=r"got a batch size of 1 for MLP, whose norms want two rows or more\. Pass --batch-size 2") as caught:
        open_task("ist", TaskSettings(batch_size=1), seed=0)
    assert caught.value.code == "below-minimum"
