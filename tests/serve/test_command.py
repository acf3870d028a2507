"""``partwise serve``: what it reads, says and leaves behind."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from partwise.atomic_files import write_json
from partwise.cli import main
from partwise.models import Part, coupled_axes, extract
from partwise.models.low_rank_layers import make_thin
from partwise.models.uneven_files import save_uneven
from partwise.report import write_report
from partwise.runs import RunFolder
from partwise.serve import METHODS
from partwise.serve._command import COMMANDS, pages
from partwise.serve._flags import CompareSettings, read_compare_flags, read_generate_flags, rule_class, rule_names
from partwise.serve._recorder import read_text
from partwise.serve._report import describe
from report_page import Page
from serve_models import small_decoder, write_model, write_words
from stopped_runs import ENVIRONMENT, command
from tiny import save_tiny, tiny_llama_tokenizer

HEAVY = ("torch", "transformers", "matplotlib", "sklearn", "numpy")
SMALL = ["--tokens", "40", "--rows", "2", "--budgets", "12,20", "--methods", "scissorhands,h2o,sliding-window", "--recent", "2"]
SECTIONS = ["Quality against memory", "Methods", "Along the text", "Speed", "Settings"]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "words")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path, words: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert run("serve", "compare", "--model", model, "--text", words, *SMALL, "--out", out, "--json") == 0
    return out


def test_help_lists_the_commands_and_every_method_with_what_it_does(capsys: pytest.CaptureFixture[str]):
    assert run("serve", "--help") == 0
    said = capsys.readouterr().out
    assert run("serve") == 0
    assert capsys.readouterr().out == said
    for name in rule_names():
        assert f"\n  {name} " in said
    for name in COMMANDS:
        assert f"partwise serve {name}" in said
    assert "METHOD (left out: scissorhands)" in said
    assert all(len(line) <= 140 for line in said.splitlines())
    assert pages() == [[], ["generate"], ["compare"], ["http"]]


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]):
    program = (
        f"import sys\nfrom partwise.cli import main\ntry:\n    main({['serve', *arguments]!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("method", rule_names())
def test_settings_of_a_method_are_flags(method: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        run("serve", "generate", "--method", method, "--help")
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for item in dataclasses.fields(rule_class(method)):
        assert said.count(f"--{item.name.replace('_', '-')} ") == 1
    for flag in ("--budget", "--bits", "--pinned", "--pin-prompt", "--prompt-file", "--temperature", "--max-new-tokens", "--config", "--json"):
        assert flag in said
    assert "The last tokens never leave" in said


def test_a_setting_may_be_a_number_of_tokens_or_a_share_of_the_budget():
    flags = read_generate_flags(["--prompt", "x", "--drop", "8", "--recent", "0.25"], about="")
    assert (flags.rule.drop, flags.rule.recent) == (8, 0.25)
    assert isinstance(flags.rule.drop, int)
    assert read_generate_flags(["--prompt", "x", "--method", "random-tokens", "--seed", "7"], about="").rule.seed == 7


def test_a_config_file_has_the_names_of_the_flags_and_flags_win(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("method: streaming-llm\nnum-sinks: 2\nprompt: red\nbudget: [64, 32]\nmax-new-tokens: 5\n")
    flags = read_generate_flags(["--config", str(tmp_path / "a.yaml"), "--max-new-tokens", "6"], about="")
    assert (type(flags.rule).__name__, flags.rule.num_sinks, flags.prompt.prompt, flags.cache.budget) == ("StreamingLLM", 2, "red", ("64", "32"))
    assert flags.sampling.max_new_tokens == 6
    (tmp_path / "b.yaml").write_text("budgets: [64, 32]\nmethods: h2o\nbits: 4\n")
    settings = read_compare_flags(["--config", str(tmp_path / "b.yaml")], about="").settings
    assert (settings.budget_numbers(), list(settings.rules()), settings.bits) == ([32, 64], ["h2o"], 4)


def test_a_comparison_takes_all_methods_unless_told_and_changes_what_it_is_told():
    assert list(CompareSettings().rules()) == rule_names()
    assert "domain-router" in METHODS
    assert "domain-router" not in rule_names()
    assert all(rule == rule_class(name)() for name, rule in CompareSettings().rules().items())
    rules = CompareSettings(methods=("h2o", "tova,h2o"), drop=3, num_sinks=1).rules()
    assert list(rules) == ["h2o", "tova"]
    assert all((rule.drop, rule.num_sinks) == (3, 1) for rule in rules.values())
    assert rules["h2o"].recent == rule_class("h2o")().recent


def test_a_text_goes_on_and_the_last_line_tells_what_it_took(model: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ("serve", "generate", "--model", model, "--prompt", "the good film", "--budget", 12, "--recent", 2, "--max-new-tokens", 40)
    assert run(*arguments) == 0
    text, numbers = capsys.readouterr()
    assert run(*arguments, "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert text == written["text"] + "\n"
    assert (written["method"], written["budget"], written["bits"]) == ("scissorhands", [12], None)
    assert "Scissorhands(" in written["call"]
    assert numbers.startswith(f"{written['num_new_tokens']} tokens after 4 in ")
    assert f"never above {written['max_bytes'] / 1000:.1f} kB" in numbers
    assert f"{written['evictions']} evictions, " in numbers
    assert numbers.endswith(" % of the attention kept at one\n")


def test_a_text_that_needs_no_eviction_says_so(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "prompt.txt").write_text("red green")
    assert run("serve", "generate", "--model", model, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 2) == 0
    assert capsys.readouterr().err.endswith("; nothing had to leave\n")


@pytest.mark.parametrize("ranks", [{}, {"model.layers.1.self_attn.k_proj": 3, "model.layers.0.mlp.up_proj": 2}], ids=["layers differ", "low rank"])
def test_a_folder_that_stock_transformers_cannot_open_goes_on_too(ranks: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    half = Part({axis.name: tuple(range(axis.size // 2 if ".0." in axis.name else axis.size)) for axis in coupled_axes(small_decoder())})
    small = extract(small_decoder(), half)
    make_thin(small, ranks)
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_uneven(small, tmp_path / "small", tokenizer=tiny_llama_tokenizer())
    asked = ("--prompt", "the good film", "--budget", 12, "--recent", 2, "--max-new-tokens", 40, "--json")
    assert run("serve", "generate", "--model", tmp_path / "small", *asked) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["evictions"] > 0
    sizes = [layer.self_attn.k_proj.out_features + layer.self_attn.v_proj.out_features for layer in small.model.layers]
    assert sizes[0] < sizes[1]
    assert written["bytes_full"] == sum(sizes) * 4 * (written["num_prompt_tokens"] + written["num_new_tokens"] - 1)


def test_a_comparison_ends_with_a_table_a_verdict_and_a_run(
    model: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert run("serve", "compare", "--model", model, "--text", words, *SMALL) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["method", "perplexity", "change", "KL", "bytes", "fewer", "tokens/s"] in lines
    assert all(len(line) <= 80 for line in said.splitlines()[:12])
    assert "\u2026" not in said  # nothing is cut off
    for budget in (12, 20):
        assert ["budget", str(budget)] in lines
    for method in ("scissorhands", "h2o", "sliding-window"):
        assert sum(line[:1] == [method] for line in lines) == 2
    assert "2 rows of 40 tokens from words, 54 predictions scored" in said
    assert "With 12 tokens of 40 in the cache, " in said
    assert "report   runs/compare-001/report.html\nrun      runs/compare-001\n" in said
    assert (tmp_path / "runs/compare-001/report.html").exists()


def test_a_run_holds_what_was_asked_for_and_every_measurement(finished: Path, model: Path, words: Path):
    header, summary = RunFolder(finished).header, json.loads((finished / "summary.json").read_text())
    assert (header["room"], header["method"], header["status"], header["seed"]) == ("serve", "compare", "finished", 0)
    assert header["settings"]["budgets"] == [12, 20]
    assert header["settings"]["methods"][0].startswith("Scissorhands(recent=2")
    assert header["place"] == {"model": str(model), "text": str(words)}
    assert len(header["data"]["sha256"]) == 64
    rows = RunFolder(finished).metrics()
    assert [(row["method"], row["budget"]) for row in rows] == [
        ("full", None),
        *((method, budget) for budget in (12, 20) for method in ("scissorhands", "h2o", "sliding-window")),
    ]
    assert [{"kind": "measurement"} | row for row in (summary["full"], *summary["measurements"])] == rows
    for row in summary["measurements"]:
        assert row["peak_bytes"] <= row["max_bytes"]
        assert row["ratio"] == summary["full"]["bytes"] / row["peak_bytes"]
        assert row["perplexity_change"] == row["perplexity"] / summary["full"]["perplexity"] - 1


def test_the_report_shows_every_section_and_is_drawn_again_from_the_run(finished: Path, capsys: pytest.CaptureFixture[str]):
    first = (finished / "report.html").read_text()
    assert run("report", finished) == 0
    assert capsys.readouterr().out.strip() == str(finished / "report.html")
    assert (finished / "report.html").read_text() == first
    page, summary = Page(finished / "report.html"), json.loads((finished / "summary.json").read_text())
    assert page.inside("h2") == SECTIONS
    cells = page.inside("td")
    for row in summary["measurements"]:
        assert f"{row['peak_bytes']:,}" in cells
        assert f"{row['kl']:.3g}" in cells
        assert row["setting"] in cells
    labels = [drawing["aria-label"] or "" for drawing in page.named("svg")]
    assert len(labels) == 3
    for start in ("perplexity and divergence of 3 methods against bytes", "divergence of 3 methods along the text", "tokens per second of 3"):
        assert any(label.startswith(start) for label in labels)
    assert "mathdefault" not in page.source
    assert not {"script", "link", "img"} & {tag for tag, _ in page.tags}


def test_a_comparison_that_was_killed_has_a_report_that_says_so(tmp_path: Path):
    run_folder = RunFolder.create(tmp_path / "half", {"room": "serve", "settings": {}})
    assert "The run is not finished." in write_report(run_folder.path, describe).read_text()


def test_the_verdict_names_the_smallest_cache_near_the_full_one_or_asks_for_larger_ones(finished: Path, tmp_path: Path):
    summary = json.loads((finished / "summary.json").read_text())
    changed = [row | {"perplexity_change": 0.005 if row["budget"] == 20 else 0.5} for row in summary["measurements"]]
    for rows, words in ((changed, "The smallest cache within 1 % of the full one's perplexity is that of"), ([changed[0]], "try larger ones")):
        copy = RunFolder.create(tmp_path / words[:3], {"room": "serve", "settings": {}})
        write_json(copy.summary, summary | {"measurements": rows})
        assert words in write_report(copy.path, describe).read_text().replace("&#39;", "'")


def test_of_the_library_only_files_are_read_that_the_model_was_not_trained_on(model: Path):
    from partwise.opened_models import open_model

    opened = open_model(str(model), device="cpu")
    settings = CompareSettings(tokens=40, rows=2)
    trained = types.SimpleNamespace(data={"name": "standard library", "held_out_by": "file", "held_out": {"test": ["queue.py", "shlex.py"]}})
    assert set(read_text(dataclasses.replace(opened, run=trained), settings).files) == {"queue.py", "shlex.py"}  # type: ignore[arg-type]
    assert not {"queue.py", "shlex.py"} & set(read_text(opened, settings).files)


MODEL = "MODEL"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "error[unknown-choice]: command='fly' is not known. Choose one of: generate, compare, http."),
        (
            ["--prompt", "x"],
            "error[bad-flag]: got --prompt without a command, expected one of: generate, compare, http. Try: partwise serve generate --help",
        ),
        (["generate"], "error[no-prompt]: got no prompt, expected a text to go on with. Pass --prompt TEXT, or --prompt-file FILE"),
        (["generate", "--prompt", "x", "--prompt-file", "y"], "error[prompt-and-file]: got --prompt and --prompt-file y, expected one of them."),
        (["generate", "--prompt-file", "no/file"], "error[file-unreadable]: cannot read no/file: No such file or directory."),
        (["generate", "--prompt", "x"], "error[no-model]: got no --model, and "),
        (["generate", "--prompt", "x", "--model", "no/folder/here"], "error[model-not-found]: there is no folder 'no/folder/here'"),
        (["generate", "--prompt", "x", "--method", "fast"], "error[unknown-choice]: method='fast' is not known. Choose one of: scissorhands, "),
        (["generate", "--prompt", "x", "--method", "domain-router"], "error[unknown-choice]: method='domain-router' is not known."),
        (["generate", "--prompt", "x", "--bits", "2"], "error[bad-flag]: invalid choice '2' for argument '--bits'. Expected one of"),
        (["generate", "--prompt", "x", "--window", "0"], "error[bad-flag]: Error parsing rule: window=0 must be an integer of at least 1."),
        (
            ["generate", "--prompt", "x", "--budget", "many"],
            "error[bad-flag]: --budget is many, expected whole numbers above 0. Write them as --budget 64,",
        ),
        (["generate", "--prompt", "x", "--pinned", "-1"], "error[bad-flag]: Error parsing cache: pinned=-1 must be an integer of at least 0."),
        (["generate", "--prompt", "x", "--top-p", "2"], "error[bad-flag]: Error parsing sampling: top_p=2.0 must be above 0 and at most 1."),
        (["generate", "--prompt", "x", "--model", MODEL, "--budget", "4"], "error[cache-budget]: got a budget of 4 tokens, expected at least "),
        (["generate", "--prompt", "x", "--model", MODEL, "--device", "cuda:77"], "error[unknown-device]: --device cuda:77 does not exist here."),
        (["generate", "--prompt", "x", "--model", MODEL, "--chat"], "error[no-chat-template]: the tokenizer of the model has no chat template"),
        (["compare", "--budgets", "0"], "error[bad-flag]: --budgets is 0, expected whole numbers above 0. Write them as --budgets 64,128,256."),
        (["compare", "--budgets", "64,,x"], "error[bad-flag]: --budgets is 64,,x, expected whole numbers"),
        (["compare", "--methods", "h2o,fast"], "error[unknown-choice]: method='fast' is not known. Choose one of: all, scissorhands, "),
        (["compare", "--tokens", "64"], "error[setting-out-of-range]: got rows of 64 tokens for a smallest budget of 64, expected at least 66: "),
        (["compare", "--methods", ""], "error[bad-flag]: --methods is empty, expected all, or some of: scissorhands, "),
        (
            ["compare", "--model", MODEL, "--tokens", "100", "--budgets", "20"],
            "error[cache-budget]: for the method snapkv: got a budget of 20 tokens, ",
        ),
        (["compare", "--rows", "0"], "error[bad-flag]: Error parsing settings: rows=0 must be an integer of at least 1."),
        (["compare", "--model", MODEL], "error[max-length]: --tokens 512 is more than the 128 that "),
        (["compare", "--model", MODEL, "--tokens", "100", "--text", "gone"], "error[data-not-found]: there is no file or folder 'gone'"),
        (
            ["compare", "--model", MODEL, "--tokens", "100", "--budgets", "8"],
            "error[cache-budget]: for the method scissorhands: got a budget of 8 tokens, expected at least ",
        ),
        (["compare", "--out", "."], "error[run-exists]: . is not empty, expected a new or an empty folder. Choose another --out."),
        (["compare", "--resume"], "error[bad-flag]: Unrecognized options: --resume"),
        (["http", "--method", "fast"], "error[unknown-choice]: method='fast' is not known."),
        (["http", "--budget", "0"], "error[bad-flag]: Error parsing server: budget=0 must be an integer of at least 1."),
        (["http", "--prot", "1"], "error[bad-flag]: Unrecognized options: --prot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_with_a_code_and_leaves_nothing(
    arguments: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    assert main(["serve", *(str(model) if word == MODEL else word for word in arguments)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(message), said.err
    assert said.out == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("moment", ["partwise.serve.compare.measure", "partwise.report.publish"])
def test_ctrl_c_in_a_comparison_leaves_nothing(
    there: bool, moment: str, model: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, interrupt)
    out = tmp_path / "run"
    if there:
        out.mkdir()
    assert run("serve", "compare", "--model", model, "--text", words, *SMALL, "--out", out) == 130
    assert capsys.readouterr().err == "\nstopped.\n"
    assert list(tmp_path.rglob("*")) == ([out] if there else [])


def test_the_server_gets_its_flags_its_rule_and_a_way_to_say_where_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    given: list[Any] = []

    def serve(flags: Any, *, rule: Any, report: Any, write: Any) -> dict[str, Any]:
        given.extend([flags, rule, write])
        if write is not None:
            write("small at http://127.0.0.1:1\n")
        tokens, memory = {"generated": 30, "prompt": 50, "reused": 20, "per_second": 12.5}, {"conversations": 2, "forgotten": 1}
        return {"tokens": tokens, "memory": memory}

    monkeypatch.setattr("partwise.serve.http_server.serve_http", serve)
    assert run("serve", "http", "--model", "m", "--port", "0", "--method", "random-tokens", "--seed", "3", "--drop", "2") == 0
    assert (given[0].model, given[0].port, repr(given[1])) == ("m", 0, "RandomTokens(recent=10, num_sinks=0, drop=2, seed=3)")
    said = capsys.readouterr()
    assert said.out == "small at http://127.0.0.1:1\n"
    assert said.err == "stopped; 30 tokens written, 12.5 tokens/s, 50 of prompts, 20 of these found in a cache; 2 conversations kept, 1 forgotten\n"
    assert run("serve", "http", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["generated"] == 30
    assert given[-1] is None


@pytest.mark.slow
def test_ctrl_c_while_text_is_written_ends_its_line_and_exits_with_130(tmp_path: Path):
    endless = small_decoder()
    endless.generation_config.eos_token_id = None
    folder = save_tiny(tmp_path / "endless", endless, tiny_llama_tokenizer())
    words = command("serve", "generate", "--model", folder, "--prompt", "red", "--budget", 12, "--recent", 2, "--max-new-tokens", 10**6)
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        text, said = process.communicate()
    assert process.returncode == 130, said
    assert text.endswith("\n")
    assert said.endswith("\nstopped.\n")
    assert "Traceback" not in said
