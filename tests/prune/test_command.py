"""``partwise prune``: what it reads, says and leaves behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from partwise.atomic_files import write_json
from partwise.cli import main
from partwise.models.networks import build
from partwise.prune import METHODS
from partwise.prune._command import pages
from partwise.prune._flags import default_method, method_class, prune_flags, read_prune_flags, read_sweep_flags
from partwise.prune._sweep import command_names
from partwise.runs import RunFolder
from prune_runs import decode_nothing, flags_of_small, write_llama, write_mamba2
from serve_models import write_words
from tiny import save_tiny, tiny_bert, tiny_bert_tokenizer, tiny_llama_tokenizer, tiny_mamba2

HEAVY = ("torch", "transformers", "matplotlib", "sklearn")
SMALL = flags_of_small()


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def no_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partwise.prune._measuring.decode_speeds", decode_nothing)


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mamba2(tmp_path_factory.mktemp("models") / "mamba2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "words", num_files=12, num_words=60)


def test_help_lists_every_method_with_what_it_does_and_what_to_type(capsys: pytest.CaptureFixture[str]):
    assert run("prune", "--help") == 0
    said = capsys.readouterr().out
    for name in command_names():
        assert f"\n  {name} " in said
    assert "METHOD (left out: ghost for Mamba2, greedy for others)" in said
    for text in ("--keep 0.5", "--calibration notes/", "--max-state-bytes", "--protect", "--resume", "prune sweep", "partwise train", "standard library"):
        assert text in said
    assert "edge-popup" not in said
    assert all(len(line) <= 140 for line in said.splitlines())
    assert pages() == [[], *([name] for name in command_names()), ["sweep"]]
    assert set(command_names()) == set(METHODS) - {"edge-popup"}


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"], ["ghost", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]):
    program = (
        f"import sys\nfrom partwise.cli import main\ntry:\n    main({['prune', *arguments]!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("name", command_names())
def test_help_of_a_method_explains_each_setting_once(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        run("prune", name, "--help")
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for item in dataclasses.fields(method_class(name)):
        flag = item.name.replace("_", "-")
        assert said.count(f" --{flag} ") + said.count(f" --no-{flag} ") == 1, flag
    for flag in ("--model", "--calibration", "--evaluation", "--rows", "--tokens", "--seed", "--device", "--out", "--resume", "--config", "--json"):
        assert f" {flag} " in said
    assert "Without a budget, half stays." in said


def test_help_of_the_sweep_explains_its_flags(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        run("prune", "sweep", "--help")
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for flag in ("--methods", "--keeps", "--num-seeds", "--kinds", "--scope", "--no-recalibrate", "--model", "--calibration", "--out", "--resume", "--json"):
        assert f" {flag} " in said


def test_the_method_that_is_left_out_depends_on_the_model(
    mamba2: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert default_method(str(mamba2)) == "ghost"
    assert default_method(str(llama)) == "greedy"
    assert default_method(None) == "greedy"
    assert default_method("owner/no-such-model") == "greedy"
    name, flags = read_prune_flags(["--model", str(mamba2), "--keep", "0.25"])
    assert (name, flags.method.keep, type(flags.method).__name__) == ("ghost", 0.25, "GHOST")


def test_settings_of_a_method_and_the_seed_become_the_method():
    name, flags = read_prune_flags(["random", "--seed", "7", "--round-to", "2", "--kinds", "heads", "neurons", "--protect", "*.0.*", "*.1.*:0-2"])
    assert (name, flags.method) == ("random", method_class("random")(seed=7, round_to=2, kinds=("heads", "neurons"), protect=("*.0.*", "*.1.*:0-2")))
    assert flags.text.seed == 7
    assert not read_prune_flags(["wanda", "--no-recalibrate"])[1].method.recalibrate
    names = [item.name for part in dataclasses.fields(prune_flags(method_class("lord"))) for item in dataclasses.fields(part.type)]
    assert len(names) == len(set(names))


def test_a_config_file_has_the_names_of_the_flags_and_flags_win(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("method: taylor\nkeep: 0.7\nscope: model\nkinds: [heads]\nrows: 5\n")
    name, flags = read_prune_flags(["--config", str(tmp_path / "a.yaml"), "--rows", "6"])
    assert (name, flags.method) == ("taylor", method_class("taylor")(keep=0.7, scope="model", kinds=("heads",)))
    assert flags.text.rows == 6
    (tmp_path / "b.yaml").write_text("methods: [ghost, random]\nkeeps: [0.5, 0.25]\nnum-seeds: 2\n")
    sweep = read_sweep_flags(["--config", str(tmp_path / "b.yaml")], about="").sweep
    assert (sweep.names("ghost"), sweep.fractions(), sweep.num_seeds) == (["ghost", "random"], [0.5, 0.25], 2)


def test_a_run_ends_with_the_ledger_before_and_after_and_how_to_open_the_model(
    mamba2: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert run("prune", "--model", mamba2, "--calibration", words, "--keep", 0.5, *SMALL) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["layer", "units", "kept", "of", "parameters", "share", "of", "the", "scores"] in lines
    assert [line[:5] for line in lines if line[1:2] == ["mixer.state"]] == [[str(layer), "mixer.state", "states", "4", "8"] for layer in range(3)]
    assert next(line for line in lines if line[:1] == ["total"])[:4] == ["total", "states", "12", "24"]
    assert ["before", "after", "change"] in lines
    for name in ("perplexity", "parameters", "weights, float32", "a sequence holds, float32", "- recurrent states", "tokens per second"):
        assert f" {name} " in said
    assert "\u2026" not in said  # nothing is cut off
    assert "Perplexity on 4 rows of 16 tokens of words. It looked at 48 tokens of words and took " in said
    assert "GHOST(keep=0.5) on " in said
    assert "model    runs/ghost-001/result/model\n" in said
    line = next(line for line in said.splitlines() if line.startswith("open     ")).removeprefix("open     ")
    opened: Any = eval(line, {"AutoModelForCausalLM": AutoModelForCausalLM})  # noqa: S307 - what it tells the user to type
    assert opened.config.state_size == 4
    assert "report   runs/ghost-001/report.html\nrun      runs/ghost-001\n" in said
    assert (tmp_path / "runs/ghost-001/report.html").exists()


def test_json_is_the_summary_and_nothing_else(mamba2: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("prune", "magnitude", "--model", mamba2, "--calibration", words, *SMALL, "--out", tmp_path / "run", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "run/summary.json").read_text())
    assert set(said) >= {"before", "after", "layers", "notes", "open", "result", "calibration", "evaluation", "call", "seed"}


def test_without_a_model_the_newest_training_run_is_pruned_on_files_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llama: Path
):
    monkeypatch.chdir(tmp_path)
    held_out = {"test": ["queue.py", "shlex.py"], "calibration": ["sched.py", "platform.py"]}
    trained = RunFolder.create(
        tmp_path / "runs/twist-001", {"room": "train", "settings": {}, "data": {"name": "standard library", "held_out_by": "file", "held_out": held_out}}
    )
    shutil.copytree(llama, trained.result / "model")
    write_json(trained.summary, {})
    trained.set_status("finished")
    assert run("prune", "--rows", 2, "--evaluation-rows", 2, "--tokens", 16, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["method"]) == ("runs/twist-001/result/model", "greedy")
    assert said["calibration"]["data"] == said["evaluation"]["data"] == "standard library, held-out files"
    # On the way back there is a newer run of train, and the run to resume still has its own model.
    shutil.copytree(tmp_path / "runs/twist-001", tmp_path / "runs/twist-002")
    assert run("prune", "--out", "runs/greedy-001", "--resume", "--json") == 0


def test_a_pruned_model_can_be_pruned_again(mamba2: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("prune", "--model", mamba2, "--calibration", words, *SMALL, "--out", tmp_path / "a", "--json") == 0
    assert run("prune", "--model", tmp_path / "a/result/model", "--calibration", words, *SMALL, "--out", tmp_path / "b", "--json") == 0
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab")
    assert second["before"]["perplexity"] == pytest.approx(first["after"]["perplexity"])
    assert [row["of"] for row in second["layers"]] == [4, 4, 4]


MODEL, WORDS_, HERE = "MODEL", "WORDS", "HERE"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "error[unknown-choice]: method='fly' is not known. Choose one of: ghost, "),
        (["edge-popup"], "error[unknown-choice]: method='edge-popup' is not known."),
        (["ghost", "--keep", "1.5"], "error[bad-flag]: Error parsing method: got keep=1.5, expected a fraction above 0 and at most 1. Pass 0.5 to keep half."),
        (["ghost", "--keep", "0"], "error[bad-flag]: Error parsing method: got keep=0.0, expected a fraction above 0 and at most 1."),
        (["ghost", "--keep", "0.5", "--max-bytes", "9"], "error[bad-flag]: Error parsing method: got keep and max_bytes, expected one budget."),
        (["ghost", "--rows", "0"], "error[bad-flag]: Error parsing text: rows=0 must be an integer of at least 1."),
        (["ghost", "--cheap"], "error[bad-flag]: "),
        ([], "error[no-model]: got no --model, and "),
        (["--model", "no/folder/here"], "error[model-not-found]: there is no folder 'no/folder/here'"),
        (["--model", MODEL, "--calibration", "no/text"], "error[data-not-found]: there is no file or folder 'no/text' in "),
        (["--model", MODEL, "--calibration", f"{HERE}/empty.txt"], "holds no text, expected UTF-8 text such as *.txt, *.md or *.py. Check --calibration."),
        (["--model", MODEL, "--calibration", WORDS_, "--evaluation", f"{HERE}/empty.txt"], "Check --evaluation."),
        (["--model", MODEL, "--calibration", WORDS_, "--rows", "999"], "rows of 16 tokens, expected 1003. Pass more text with --calibration, or ask"),
        (["--model", MODEL, "--calibration", WORDS_, "--out", f"{HERE}/taken"], "is not empty, expected a new or an empty folder. Choose another --out."),
        (["--model", MODEL, "--calibration", WORDS_, "--out", f"{HERE}/none", "--resume"], "error[run-not-found]: "),
        (["--model", MODEL, "--resume"], "error[resume-without-out]: --resume was given without --out"),
        (["--model", MODEL, "--device", "tpu"], "error[unknown-device]: --device tpu does not exist here."),
        (["wanda", "--model", MODEL], "error[kinds-absent]: WandaStructured prunes neurons or filters, and Mamba2ForCausalLM has states"),
        (["ghost", "--model", f"{HERE}/llama"], "error[kinds-absent]: GHOST prunes states, and LlamaForCausalLM has heads, neurons only."),
        (
            ["--model", MODEL, "--calibration", WORDS_, "--protect", "*.layers.9.*"],
            "error[protect-unknown]: protect='*.layers.9.*' fits none of the 3 axes of this model: backbone.layers.0.mixer.state",
        ),
        (["--model", MODEL, "--calibration", WORDS_, "--max-state-bytes", "3"], "error[budget-too-small]: got max_state_bytes=3, but the smallest model"),
        (["--model", f"{HERE}/bert"], "error[task-not-supported]: "),
        (["--model", f"{HERE}/quantised"], "is quantised, expected weights in floating point. Dequantise it first"),
        (["--model", f"{HERE}/pickled"], "has pickled weights only (pytorch_model.bin); loading a pickle can run any code, so it is refused."),
        (["--model", f"{HERE}/mlp"], "error[network-on-command-line]: "),
        (["magnitude", "--model", f"{HERE}/falcon"], "error[unknown-model]: "),
        (["sweep", "--model", MODEL, "--keeps", "half"], "--keeps is half, expected fractions above 0 and at most 1. Write them as --keeps 0.9,"),
        (["sweep", "--model", MODEL, "--keeps", "0.5,0"], "error[keep-range]: --keeps is 0.5,0, expected"),
        (["sweep", "--model", MODEL, "--methods", "ghost,best"], "error[unknown-choice]: method='best' is not known. Choose one of: all, ghost, "),
        (["sweep", "--model", MODEL, "--methods", "wanda", "--calibration", WORDS_], "error[kinds-absent]: WandaStructured prunes neurons or filters"),
    ],
    ids=lambda value: "_".join(value[:3]) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    arguments: list[str], message: str, strange: Path, mamba2: Path, words: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(strange)
    places = {MODEL: str(mamba2), WORDS_: str(words)}
    asked = [places.get(word, word.replace(HERE, str(strange))) for word in arguments]
    if "--model" in asked and "--rows" not in asked:
        asked += SMALL
    elif "--rows" in asked and "999" in asked:
        asked += ["--evaluation-rows", "4", "--tokens", "16"]
    before = sorted(path for path in strange.rglob("*") if path.name != "runs")
    assert run("prune", *asked) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert sorted(path for path in strange.rglob("*") if path.name != "runs") == before  # the folder of all runs may stay, empty


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that cannot be pruned."""
    from transformers import FalconConfig, FalconForCausalLM

    from partwise.models.network_files import save_network

    folder = tmp_path_factory.mktemp("strange")
    (folder / "empty.txt").write_text("")
    (folder / "taken").mkdir()
    (folder / "taken" / "file").write_text("")
    save_tiny(folder / "bert", tiny_bert(), tiny_bert_tokenizer())  # type: ignore[arg-type]
    save_tiny(folder / "quantised", tiny_mamba2(), tiny_llama_tokenizer())
    settings = json.loads((folder / "quantised" / "config.json").read_text())
    write_json(folder / "quantised" / "config.json", settings | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    save_tiny(folder / "pickled", tiny_mamba2(), tiny_llama_tokenizer())
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    save_network(build({"network": "mlp", "num_inputs": 4, "hidden": [3], "num_classes": 2, "norm": False}), folder / "mlp")
    write_llama(folder / "llama")
    torch.manual_seed(0)
    falcon = FalconForCausalLM(FalconConfig(vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    save_tiny(folder / "falcon", falcon, tiny_llama_tokenizer())
    return folder
