"""The model that a command works with: given, or found in a run of training; and what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from partwise.atomic_files import read_json, write_json
from partwise.checks import InputError
from partwise.models import Part, coupled_axes, extract
from partwise.models.low_rank_layers import make_thin, ranks_of
from partwise.models.uneven_files import save_uneven
from partwise.opened_models import choose_device, newest_train_run, open_model
from partwise.runs import RunFolder
from serve_models import write_model
from tiny import save_tiny, tiny_bert, tiny_bert_tokenizer, tiny_llama, tiny_llama_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


def make_run(path: Path, model: Path, *, age: int = 0, room: str = "train", finished: bool = True, place: str = "result/model") -> Path:
    """A run of training, as it looks to those who look for its model."""
    run = RunFolder.create(path, {"room": room, "data": {"name": "standard library"}})
    shutil.copytree(model, path / place)
    if finished:
        write_json(run.summary, {})
        os.utime(run.summary, (1_000_000 - age, 1_000_000 - age))
        run.set_status("finished")
    return path


def test_a_model_is_opened_in_float32_on_a_cpu_and_as_asked_for(folder: Path):
    opened = open_model(str(folder), device="cpu")
    assert (opened.model.dtype, opened.model.training, opened.name, opened.run) == (torch.float32, False, str(folder), None)
    assert opened.tokenizer("red").input_ids == tiny_llama_tokenizer()("red").input_ids
    assert open_model(str(folder), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_without_a_name_it_is_the_model_of_the_newest_finished_training(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "old", folder, age=9)
    expected = make_run(tmp_path / "runs" / "new", folder, age=5)
    make_run(tmp_path / "runs" / "other-room", folder, room="tune")
    make_run(tmp_path / "runs" / "unfinished", folder, finished=False)
    (make_run(tmp_path / "runs" / "damaged", folder) / "run.json").write_text("{")
    config = make_run(tmp_path / "runs" / "perceptron", folder) / "result/model/config.json"
    write_json(config, {"network": "mlp"})
    opened = open_model(None, device="cpu")
    assert opened.name == "runs/new/result/model"
    assert opened.run is not None
    assert (opened.run.path.resolve(), opened.run.data) == (expected, {"name": "standard library"})


def test_where_the_whole_model_is_gone_it_is_the_largest_ticket(tmp_path: Path, folder: Path):
    run = make_run(tmp_path / "run", folder, place="result/tickets/keep-50")
    shutil.copytree(folder, run / "result/tickets/keep-75")
    shutil.copytree(folder, run / "result/tickets/keep-9")
    found = newest_train_run(tmp_path)
    assert found is not None
    assert found.model == run / "result/tickets/keep-75"
    shutil.rmtree(found.model)
    write_uneven(found.model)
    assert newest_train_run(tmp_path) == found, "layers may differ in size"
    (found.model / "tokenizer_config.json").unlink()
    assert newest_train_run(tmp_path).model == run / "result/tickets/keep-50"  # type: ignore[union-attr]


@pytest.mark.parametrize("place", ["result/model", "result/tickets/keep-50"])
def test_a_model_that_lies_in_a_run_knows_what_it_was_trained_on(tmp_path: Path, folder: Path, place: str):
    run = make_run(tmp_path / "run", folder, place=place)
    opened = open_model(str(run / place), device="cpu")
    assert opened.run is not None
    assert (opened.run.path, opened.run.data["name"]) == (run, "standard library")


def test_no_model_at_all_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"got no --model, and .*/runs holds no finished run .* Pass --model FOLDER, or run `partwise train`"
    ) as caught:
        open_model(None)
    assert caught.value.code == "no-model"


def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(InputError, match=r"--device cuda:99 does not exist here\. Choose one of: cpu") as caught:
        choose_device("cuda:99")
    assert caught.value.code == "unknown-device"


def write_uneven(folder: Path, model: Any = None) -> Any:
    """A model with half the heads and neurons in its first layer; what it was cut to is returned."""
    model = tiny_llama() if model is None else model
    units = {axis.name: tuple(range(axis.size // 2 if ".0." in axis.name else axis.size)) for axis in coupled_axes(model)}
    small = extract(model, Part(units)).eval()
    save_uneven(small, folder, tokenizer=tiny_llama_tokenizer())
    return small


def test_a_model_whose_layers_differ_in_size_is_opened_with_its_tokenizer(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    small = write_uneven(tmp_path / "small", tiny_llama().to(torch.bfloat16))
    assert read_json(tmp_path / "small" / "config.json")["per_layer_config"], "the layers differ, or nothing would be tested"
    capfd.readouterr()
    opened = open_model(str(tmp_path / "small"), device="cpu", dtype="bfloat16")
    assert capfd.readouterr() == ("", "")
    assert (type(opened.model), opened.model.dtype, opened.model.training, opened.run) == (type(small), torch.bfloat16, False, None)
    ids = opened.tokenizer("red green", return_tensors="pt").input_ids
    assert ids.tolist() == [tiny_llama_tokenizer()("red green").input_ids]
    assert torch.equal(opened.model(ids).logits, small(ids).logits)
    assert open_model(str(tmp_path / "small"), device="cpu").model.dtype == torch.float32


def test_a_model_with_layers_of_low_rank_is_opened_with_its_tokenizer(tmp_path: Path):
    thin = write_uneven(tmp_path / "uneven")
    make_thin(thin, {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.mlp.down_proj": 5})
    for parameter in thin.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_uneven(thin, tmp_path / "small", tokenizer=tiny_llama_tokenizer())
    opened = open_model(str(tmp_path / "small"), device="cpu")
    ids = opened.tokenizer("red green", return_tensors="pt").input_ids
    assert torch.equal(opened.model(ids).logits, thin(ids).logits)
    assert ranks_of(opened.model) == {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.mlp.down_proj": 5}
    assert open_model(str(tmp_path / "small"), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("a tensor is missing", "weights-do-not-match"),
        ("damaged", "damaged-weights"),
        ("without tokenizer", "model-incomplete"),
        ("without vocabulary", "model-incomplete"),
        ("another tokenizer", "weights-do-not-match"),
    ],
)
def test_such_a_model_meets_the_same_checks(tmp_path: Path, how: str, code: str):
    write_uneven(tmp_path / "small")
    broken(tmp_path / "small", how)
    with pytest.raises(InputError) as caught:
        open_model(str(tmp_path / "small"), device="cpu")
    assert caught.value.code == code


def test_layers_of_any_size_without_a_head_for_words_are_refused(tmp_path: Path):
    write_uneven(tmp_path / "small", tiny_llama().model)
    with pytest.raises(InputError, match=r"holds a LlamaModel, which writes no text\. Pass --model with a decoder such as Llama\.") as caught:
        open_model(str(tmp_path / "small"), device="cpu")
    assert caught.value.code == "task-not-supported"


def broken(folder: Path, how: str) -> None:
    if how == "without config":
        (folder / "config.json").unlink()
    if how in {"pickled", "without weights"}:
        (folder / "model.safetensors").unlink()
    if how == "pickled":
        (folder / "pytorch_model.bin").write_bytes(b"")
    if how == "damaged":
        (folder / "model.safetensors").write_bytes(b"nothing of the kind")
    if how == "a tensor is missing":
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if how == "without tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    if how == "without vocabulary":
        tiny_llama_tokenizer([]).save_pretrained(folder)
    if how == "another tokenizer":
        tiny_llama_tokenizer([f"word{number}" for number in range(99)]).save_pretrained(folder)


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("without config", "model-incomplete", r"has no config\.json, expected a model as save_pretrained writes it"),
        ("without weights", "model-incomplete", r"has no \*\.safetensors file, expected the weights there"),
        ("pickled", "pickle-refused", r"has pickled weights only \(pytorch_model\.bin\); loading a pickle can run any code"),
        ("damaged", "damaged-weights", r"a safetensors file of .* cannot be read"),
        ("a tensor is missing", "weights-do-not-match", r"lack 1 tensors that its config\.json asks for, such as model\.norm\.weight"),
        ("without tokenizer", "model-incomplete", r"cannot be loaded: .* Check that it holds a model and its tokenizer; custom code is not run"),
        ("without vocabulary", "model-incomplete", r"has no vocabulary for its tokenizer, expected tokenizer\.json beside config\.json"),
        ("another tokenizer", "weights-do-not-match", r"the tokenizer of .* has 102 tokens, but the model has embeddings for 24"),
    ],
)
def test_a_folder_that_holds_no_sound_model_is_refused(tmp_path: Path, folder: Path, how: str, code: str, message: str):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    broken(copy, how)
    with pytest.raises(InputError, match=message) as caught:
        open_model(str(copy), device="cpu")
    assert caught.value.code == code


def test_an_encoder_is_refused(tmp_path: Path):
    save_tiny(tmp_path / "bert", tiny_bert(), tiny_bert_tokenizer())
    with pytest.raises(InputError, match=r"is of type bert, which writes no text\. Pass --model with a decoder such as Llama\.") as caught:
        open_model(str(tmp_path / "bert"), device="cpu")
    assert caught.value.code == "task-not-supported"


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        (
            "no/such/folder",
            "model-not-found",
            r"there is no folder 'no/such/folder' in .* it takes a folder, or a Hugging Face id such as owner/name",
        ),
        ("./gone", "model-not-found", r"there is no folder '\./gone'"),
        (
            "nobody/nothing",
            "model-unavailable",
            r"cannot load 'nobody/nothing': there is no folder of that name, and the Hugging Face hub did not give it",
        ),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(source: str, code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        open_model(source, device="cpu")
    assert caught.value.code == code


def test_what_is_refused_leaves_no_trace_of_loading(tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[Any]):
    open_model(str(folder), device="cpu")
    assert capfd.readouterr() == ("", "")
