"""The pruning job: what it leaves, what it measures, what it refuses, and that files are whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import partwise
from partwise.checks import InputError
from partwise.opened_models import open_model
from partwise.prune import METHODS, apply, load_plan
from partwise.prune._measuring import costs_of, decode_speeds, perplexity
from partwise.prune._report import verdict_of
from partwise.prune._result import notes_about
from partwise.prune._sweep import command_names
from partwise.prune._texts import TextSettings, read_texts
from partwise.runs import RunFolder
from prune_runs import decode_nothing, draw_nothing, run_small, write_llama, write_mamba2
from serve_models import write_words
from tiny import WORDS, save_tiny, tiny_decoder, tiny_gpt2, tiny_llama_tokenizer, tiny_mamba2, tiny_neox
from tolerances import assert_close


@pytest.fixture(autouse=True)
def no_clocks_and_no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partwise.report.write_report", draw_nothing)
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


def test_half_of_the_states_leave_a_model_that_stock_transformers_opens(mamba2: Path, words: Path, tmp_path: Path):
    summary = run_small("ghost", tmp_path / "run", model=mamba2, calibration=words)
    assert summary["is_plain"]
    assert summary["open"] == f'AutoModelForCausalLM.from_pretrained("{tmp_path}/run/result/model")  # transformers'
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "run/result/model")
    assert small.config.state_size == 4
    whole = open_model(str(mamba2)).model
    expected = apply(whole, load_plan(tmp_path / "run/result/model/plan"))
    ids = torch.arange(3, 3 + len(WORDS))[None]
    with torch.no_grad():
        assert torch.equal(small(ids).logits, expected(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "run/result/model")("the film")["input_ids"]


def test_layers_of_different_size_are_opened_by_partwise(llama: Path, words: Path, tmp_path: Path):
    summary = run_small("wanda", tmp_path / "run", model=llama, calibration=words, protect=("*.layers.0.*",))
    assert not summary["is_plain"]
    assert summary["open"] == f'partwise.load("{tmp_path}/run/result/model")'
    small: Any = partwise.load(tmp_path / "run/result/model")
    assert [layer.mlp.down_proj.in_features for layer in small.model.layers] == [24, 12]
    assert "library_name" not in (tmp_path / "run/result/model/README.md").read_text()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("edge-popup", "ghost")])
def test_every_method_runs_on_a_llama_and_its_result_opens(name: str, llama: Path, words: Path, tmp_path: Path):
    assert name in command_names()
    summary = run_small(name, tmp_path / "run", model=llama, calibration=words, keep=0.5)
    small = partwise.load(tmp_path / "run/result/model")
    assert sum(parameter.numel() for parameter in small.parameters()) == summary["after"]["num_parameters"] < summary["before"]["num_parameters"]
    assert perplexity(small, read_texts(open_model(str(llama)), TextSettings(calibration=str(words), rows=3, evaluation_rows=4, tokens=16)).evaluation.ids) == (
        pytest.approx(summary["after"]["perplexity"], rel=1e-5)
    )


FAMILIES = {"gpt2": tiny_gpt2, "neox": tiny_neox, "qwen3": lambda: tiny_decoder("Qwen3"), "mistral": lambda: tiny_decoder("Mistral")}


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_other_families_are_pruned_too(make: Any, words: Path, tmp_path: Path):
    folder = save_tiny(tmp_path / "model", make(), tiny_llama_tokenizer())
    summary = run_small("magnitude", tmp_path / "run", model=folder, calibration=words)
    assert summary["is_plain"]
    assert {row["units"] for row in summary["layers"]} == {"neurons"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/result/model")


def test_a_run_holds_what_was_asked_for_a_row_for_each_axis_and_what_came_out(mamba2: Path, words: Path, tmp_path: Path):
    summary = run_small("ghost", tmp_path / "run", model=mamba2, calibration=words, keep=0.25, seed=3, command=["partwise", "prune"])
    header = RunFolder(tmp_path / "run").header
    assert (header["room"], header["status"], header["seed"]) == ("prune", "finished", 3)
    assert header["method"].startswith("GHOST(keep=0.25, ")
    assert header["place"] == {"model": str(mamba2), "calibration": str(words), "evaluation": None, "device": None}
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    rows = RunFolder(tmp_path / "run").metrics()
    assert [(row["kind"], row["step"], row.get("kept")) for row in rows] == [*(("axis", step, 2) for step in (1, 2, 3)), ("plan", 4, None)]
    assert summary["calibration"]["num_tokens"] == 3 * 16
    assert summary["calibration"]["seconds"] == sum(row["seconds"] for row in rows)
    assert [row["kept"] for row in summary["layers"]] == [2, 2, 2]
    assert len(summary["ledger"]) == 24


def test_numbers_of_the_summary_are_those_of_the_two_models(mamba2: Path, words: Path, tmp_path: Path):
    summary = run_small("ghost", tmp_path / "run", model=mamba2, calibration=words)
    whole, small = open_model(str(mamba2)), open_model(str(tmp_path / "run/result/model"))
    ids = read_texts(whole, TextSettings(calibration=str(words), rows=3, evaluation_rows=4, tokens=16)).evaluation.ids
    for key, opened in (("before", whole), ("after", small)):
        row = summary[key]
        with torch.no_grad():
            loss = opened.model(input_ids=ids, labels=ids).loss.item()
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert row["num_parameters"] == opened.model.num_parameters()
        assert row["weight_bytes"] == 4 * opened.model.num_parameters()
    # 3 layers of 4 heads with 8 entries and 8 states each, in float32
    assert (summary["before"]["recurrent_bytes"], summary["after"]["recurrent_bytes"]) == (3 * 4 * 8 * 8 * 4, 3 * 4 * 8 * 4 * 4)
    assert summary["after"]["sequence_bytes"] == summary["after"]["recurrent_bytes"] + summary["after"]["convolution_bytes"]


def test_the_share_of_the_scores_is_that_of_the_energy_for_ghost(mamba2: Path, words: Path, tmp_path: Path):
    summary = run_small("ghost", tmp_path / "run", model=mamba2, calibration=words)
    plan: Any = load_plan(tmp_path / "run/result/model/plan")
    for row in summary["layers"]:
        squares = plan.scores[row["where"]].square()
        assert_close(torch.tensor(row["share"]).double(), squares[list(plan.units[row["where"]])].sum() / squares.sum(), claim="kept energy", rtol=1e-6)
        curve = row["curve"]
        assert curve[0] == 0
        assert curve[-1] == pytest.approx(1)
        assert curve == sorted(curve)
        assert curve[20] == pytest.approx(row["share"])  # half of the units, the best ones


def test_a_model_in_half_precision_is_computed_in_float32_and_saved_as_it_was(words: Path, tmp_path: Path):
    folder = save_tiny(tmp_path / "model", tiny_mamba2().bfloat16(), tiny_llama_tokenizer())
    summary = run_small("ghost", tmp_path / "run", model=folder, calibration=words)
    assert (summary["dtype"], summary["saved_dtype"]) == ("float32", "bfloat16")
    assert summary["before"]["weight_bytes"] == 2 * summary["before"]["num_parameters"]
    assert {tensor.dtype for tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "run/result/model").parameters()} == {torch.bfloat16}
    assert run_small("ghost", tmp_path / "other", model=folder, calibration=words, dtype="float32")["saved_dtype"] == "float32"


def test_the_card_says_how_to_open_it_what_it_cost_and_what_stayed(mamba2: Path, words: Path, tmp_path: Path):
    run_small("ghost", tmp_path / "run", model=mamba2, calibration=words)
    card = (tmp_path / "run/result/model/README.md").read_text()
    for text in (
        "tags: [partwise, pruned, ghost]",
        "# mamba2, pruned",
        "12 of 24 states",
        "AutoModelForCausalLM.from_pretrained(FOLDER)",
        "| perplexity | ",
        "| - recurrent states | 3.1 kB | 1.5 kB | -50.0 % |",
        "| 2 mixer.state | states | 4 | 8 | ",
        "Perplexity on 4 rows of 16 tokens of words.",
        "It looked at 48 tokens of words",
    ):
        assert text in card
    assert card.isascii()


@pytest.mark.parametrize("name", ["lord", "wanda"])
def test_a_budget_of_everything_leaves_the_model_as_it_was(name: str, llama: Path, words: Path, tmp_path: Path):
    summary = run_small(name, tmp_path / "run", model=llama, calibration=words, keep=1.0)
    assert summary["is_plain"]
    assert {**summary["before"], "tokens_per_second": 0} == {**summary["after"], "tokens_per_second": 0}
    assert ("all layers as they were" in verdict_of(summary)) == (name == "lord")
    small, whole = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "run/result/model", llama))
    assert all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in small.state_dict().items())


def test_a_method_that_reads_no_text_says_so(mamba2: Path, words: Path, tmp_path: Path):
    summary = run_small("magnitude", tmp_path / "run", model=mamba2, calibration=words)
    assert summary["calibration"]["num_tokens"] == 0
    assert "It looked at weights only" in (tmp_path / "run/result/model/README.md").read_text()


def test_calibration_and_evaluation_are_rows_of_different_files_and_evaluation_does_not_depend_on_the_seed(mamba2: Path, words: Path):
    opened = open_model(str(mamba2))
    first, second = (read_texts(opened, TextSettings(calibration=str(words), rows=3, evaluation_rows=4, tokens=16, seed=seed)) for seed in (0, 1))
    assert not set(first.calibration.files) & set(first.evaluation.files)
    assert torch.equal(first.evaluation.ids, second.evaluation.ids)
    assert not torch.equal(first.calibration.ids, second.calibration.ids)


def test_few_files_give_different_rows_of_the_same_ones(mamba2: Path, tmp_path: Path):
    words = write_words(tmp_path / "words", num_files=1, num_words=400)
    texts = read_texts(open_model(str(mamba2)), TextSettings(calibration=str(words), rows=3, evaluation_rows=4, tokens=16))
    assert (texts.calibration.ids.shape, texts.evaluation.ids.shape) == ((3, 16), (4, 16))
    assert not {tuple(row) for row in texts.calibration.ids.tolist()} & {tuple(row) for row in texts.evaluation.ids.tolist()}


def test_an_evaluation_text_of_its_own_is_read_and_may_not_hold_rows_of_the_other(mamba2: Path, words: Path, tmp_path: Path):
    opened, other = open_model(str(mamba2)), write_words(tmp_path / "other", num_files=4, num_words=90)
    small = {"rows": 3, "evaluation_rows": 4, "tokens": 16}
    texts = read_texts(opened, TextSettings(calibration=str(words), evaluation=str(other), **small))
    assert (texts.calibration.name, texts.evaluation.name) == ("words", "other")
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in words.iterdir():
        (copied / path.name).write_text(path.read_text())
    with pytest.raises(InputError, match=r"4 of 4 rows to measure on are rows to calibrate on, too\. Pass another --evaluation"):
        read_texts(opened, TextSettings(calibration=str(words), evaluation=str(copied), **(small | {"rows": 12})))


def test_files_to_measure_on_are_left_out_where_they_lie_among_those_to_calibrate_on(mamba2: Path, words: Path):
    one = words / "words_3.txt"
    texts = read_texts(open_model(str(mamba2)), TextSettings(calibration=str(words), evaluation=str(one), rows=11, evaluation_rows=1, tokens=16))
    assert texts.evaluation.files == ("words_3.txt",)
    assert len(set(texts.calibration.files)) == 11
    assert "words_3.txt" not in texts.calibration.files


def test_of_the_library_only_files_are_read_that_the_model_was_not_trained_on(mamba2: Path):
    import dataclasses
    import types

    trained = types.SimpleNamespace(
        data={"name": "standard library", "held_out_by": "file", "held_out": {"test": ["queue.py", "shlex.py"], "calibration": ["sched.py", "platform.py"]}}
    )
    opened = dataclasses.replace(open_model(str(mamba2)), run=trained)  # type: ignore[arg-type]
    texts = read_texts(opened, TextSettings(rows=2, evaluation_rows=2, tokens=16))
    assert set(texts.evaluation.files) == {"queue.py", "shlex.py"}
    assert set(texts.calibration.files) == {"sched.py", "platform.py"}


def test_rows_are_as_long_as_the_model_can_read_unless_told(words: Path, llama: Path, mamba2: Path):
    assert read_texts(open_model(str(llama)), TextSettings(calibration=str(words), rows=1, evaluation_rows=1)).evaluation.ids.shape == (1, 32)
    assert read_texts(open_model(str(mamba2)), TextSettings(rows=1, evaluation_rows=1)).evaluation.ids.shape == (1, 256)
    with pytest.raises(InputError, match=r"--tokens 33 is more than the 32 that .*llama can read"):
        read_texts(open_model(str(llama)), TextSettings(calibration=str(words), tokens=33))


def test_perplexity_in_pieces_is_that_of_all_rows_at_once(monkeypatch: pytest.MonkeyPatch):
    model, ids = tiny_decoder("Llama", initializer_range=0.3), torch.randint(24, (7, 12), generator=torch.Generator().manual_seed(0))
    expected = perplexity(model, ids)
    monkeypatch.setattr("partwise.prune._measuring.LOGITS", 12 * 24 * 2)
    told: list[tuple[int, int]] = []
    assert perplexity(model, ids, progress=lambda done, total: told.append((done, total))) == pytest.approx(expected, rel=1e-6)
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_a_loss_beyond_all_bounds_is_an_infinite_perplexity():
    model = tiny_decoder("Llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e9)
    assert perplexity(model, torch.randint(24, (2, 8), generator=torch.Generator().manual_seed(0))) == math.inf
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert math.isnan(perplexity(model, torch.zeros(1, 4, dtype=torch.int64)))


def test_costs_count_tied_weights_once_and_buffers_too():
    tied, plain = tiny_decoder("Llama", tie_word_embeddings=True), tiny_decoder("Llama")
    assert costs_of(plain).num_parameters - costs_of(tied).num_parameters == 24 * 32
    assert costs_of(plain).weight_bytes == 4 * costs_of(plain).num_parameters
    assert costs_of(plain, dtype=torch.bfloat16).weight_bytes == 2 * costs_of(plain).num_parameters
    assert costs_of(plain).attention_bytes == 2 * 2 * 4 * 4 * 4 * 1024  # layers, keys and values, heads, entries, bytes, tokens


@pytest.mark.parametrize("make", [lambda: tiny_decoder("Llama"), tiny_gpt2, tiny_mamba2], ids=["llama", "gpt2", "mamba2"])
def test_speed_is_measured_with_the_cache_of_each_family(make: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("partwise.prune._measuring.SECONDS", 0.1)
    model = make()
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    speeds = decode_speeds([model, make()])
    assert len(speeds) == 2
    assert all(speed > 0 for speed in speeds)
    assert set(lengths) == {16, 1}


def test_notes_say_that_states_are_memory_and_warn_where_neurons_go_or_perplexity_explodes(mamba2: Path, llama: Path, words: Path, tmp_path: Path):
    [note] = run_small("ghost", tmp_path / "a", model=mamba2, calibration=words)["notes"]
    assert note.startswith("States are a small part of the weights.")
    notes = run_small("wanda", tmp_path / "b", model=llama, calibration=words, keep=0.25)["notes"]
    assert notes[0].startswith("75% of the feed-forward neurons would go for good in 2 layers.")
    assert all(f"> {note}" in (tmp_path / "b/result/model/README.md").read_text() for note in notes)
    for before, after, said in ((2.0, 4.1, "much worse"), (2.0, None, "much worse"), (2.0, 3.9, ""), (None, None, "of the whole model is no finite number")):
        found = notes_about(tiny_mamba2(), [], {"perplexity": before}, {"perplexity": after})
        assert said in " ".join(found)
        assert bool(found) == bool(said)
