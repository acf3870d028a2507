"""The command line: what it says, how it fails, and that it stays light."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from partwise import ROOMS, __version__
from partwise.cli import main, progress_bar, status_line
from partwise.commands import Command
from partwise.doctor import examine, look_at_disk, look_for
from partwise.flags import flag_value, resume_command
from partwise.runs import RunFolder
from partwise.tune import METHODS
from partwise.tune._flags import read_tune_flags
from stopped_runs import run_and_interrupt
from tune_runs import tiny_flags, write_encoder, write_reviews

HEAVY = ("torch", "transformers", "peft", "matplotlib", "sklearn", "datasets", "numpy")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("data") / "reviews.csv")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    data = write_reviews(out.parent / "reviews.csv")
    assert run("tune", "lora", *tiny_flags(tiny_model_folder, data), "--out", out) == 0
    return out


def test_help_teaches_the_commands(capsys: pytest.CaptureFixture[str]):
    assert run("--help") == 0
    whole = capsys.readouterr().out
    assert run() == 0
    assert capsys.readouterr().out == whole
    for word in ("tune", "truncate", "decompose", "report", "list", "doctor"):
        assert word in whole


def test_help_of_tune_lists_every_method_with_what_it_does(capsys: pytest.CaptureFixture[str]):
    assert run("tune", "--help") == 0
    said = capsys.readouterr().out
    for name in METHODS:
        assert f"\n  {name} " in said
    assert "--resume" in said


@pytest.mark.parametrize("method", list(METHODS))
def test_help_of_a_method_explains_each_flag(method: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        run("tune", method, "--help")
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for flag in (
        "--model",
        "--data",
        "--task",
        "--text-pair",
        "--target-r",
        "--budget",
        "--max-steps",
        "--lr",
        "--json",
        "--compare",
        "--lora-alpha",
    ):
        assert flag in said
    assert "Peak learning rate of AdamW" in said
    assert "References" not in said


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["tune", "--help"], ["tune", "adapad", "--help"], ["tune", "truncate", "--help"], ["decompose", "--help"]],
)
def test_help_loads_nothing_heavy(arguments: list[str]):
    program = (
        f"import sys\nfrom partwise.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_version(capsys: pytest.CaptureFixture[str]):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"partwise {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fly"], 2, f"error[unknown-choice]: command='fly' is not known. Choose one of: {', '.join(ROOMS)}, report, list, doctor."),
        (["tune", "loar"], 2, "error[unknown-choice]: method='loar' is not known. Choose one of: adapad"),
        (["tune", "lora", "--lrr", "1"], 2, "error[bad-flag]: Unrecognized options: --lrr, 1 Perhaps you meant: --lr"),
        (["tune", "lora", "--valid-fraction", "2"], 2, "error[bad-flag]: Error parsing data: valid_fraction=2.0 must be between 0 and 1"),
        (["tune", "lora", "--lr", "fast"], 2, "error[bad-flag]: Error parsing --lr"),
        (["tune", "lora", "--budget", "9", "--target-r", "2"], 2, "error[budget-and-target-r]: --budget 9 and --target-r 2 were both given"),
        (["tune", "--resume"], 2, "error[resume-without-out]: --resume was given without --out"),
        (["tune", "--resume", "--out", "/no/run"], 2, "error[run-not-found]: /no/run holds no run"),
        (["tune", "lora", "--num-seeds", "2"], 2, "error[seeds-without-compare]: --num-seeds 2 needs --compare"),
        (["tune", "lora", "--compare", "lora"], 2, "error[nothing-to-compare]: got 1 different methods"),
        (["tune", "lora", "--compare", "dora"], 2, "error[unknown-choice]: method='dora' is not known"),
        (["tune", "lora", "--checkpoint-every", "0"], 2, "error[setting-out-of-range]: --checkpoint-every is 0"),
        (["tune", "lora", "--config", "/no/file.yaml"], 2, "error[config-unreadable]: --config /no/file.yaml cannot be read"),
        (["tune", "truncate", "--rank", "1"], 2, "error[bad-flag]: the folder of a run is missing"),
        (["tune", "truncate", "/no/run", "--rank", "1"], 2, "error[bad-flag]"),
        (["tune", "truncate", "/no/run", "--rank", "1", "--out", "x"], 2, "error[run-not-found]"),
        (["list", "kitchen"], 2, f"error[unknown-choice]: room='kitchen' is not known. Choose one of: {', '.join(ROOMS)}."),
        (["decompose", "flie"], 2, "error[unknown-choice]: method='flie' is not known. Choose one of: parallel-deflation-pca"),
        (["decompose", "no/data.npy"], 2, "error[data-not-found]: there is no file 'no/data.npy'"),
        (["decompose", "data.txt"], 2, "error[unknown-format]"),
        (["decompose", "parallel-rank-one-regression"], 2, "error[needs-target]: parallel-rank-one-regression predicts a target y"),
        (["decompose", "--solver", "fast"], 2, "error[bad-flag]: invalid choice 'fast' for argument '--solver'. Expected one of ('power', 'hebb'"),
        (["decompose", "--n-components", "65"], 2, "error[too-many-components]: n_components=65 does not fit data of 1797 samples and 64 features"),
        (["decompose", "--n-components", "4", "--num-workers", "5"], 2, "error[more-workers-than-parts]: got num_workers=5 for 4 parts"),
        (["decompose", "hotelling-deflation-pca", "--engine", "ray"], 2, "error[one-part-at-a-time]: got engine='ray' for hotelling-deflation-pca"),
        (["decompose", "--checkpoint-every", "0"], 2, "error[setting-out-of-range]: --checkpoint-every is 0"),
        (["decompose", "--resume"], 2, "error[resume-without-out]"),
        (["report"], 2, "error[bad-flag]: got 0 arguments, expected one: the folder of a run"),
        (["report", "/no/run"], 2, "error[run-not-found]"),
    ],
)
def test_a_mistake_is_one_line_with_a_code_on_standard_error(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    said = capsys.readouterr()
    assert said.err.startswith(message), said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_seen_enough_is_no_error():
    program = f"{sys.executable} -m partwise tune lora --help | head -c 1"
    done = subprocess.run(program, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def broken(arguments: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("partwise.cli.list_command", broken)
    with pytest.raises(ZeroDivisionError):
        run("list")


def test_a_run_ends_with_the_ledger_the_metric_the_size_and_the_files(
    tmp_path: Path, tiny_model_folder: Path, reviews: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert run("tune", "lora", *tiny_flags(tiny_model_folder, reviews)) == 0
    said = capsys.readouterr().out
    assert "accuracy on held-out rows:" in said
    assert "what a smaller adapter loses" in said
    assert "runs/lora-001/result" in said
    assert "runs/lora-001/report.html" in said
    assert "partwise tune truncate runs/lora-001 --rank 1" in said
    assert (tmp_path / "runs" / "lora-001" / "report.html").exists()


def test_json_is_one_object_on_standard_output(tmp_path: Path, tiny_model_folder: Path, reviews: Path, capsys: pytest.CaptureFixture[str]):
    assert run("tune", "lora", *tiny_flags(tiny_model_folder, reviews), "--out", tmp_path / "run", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    expected = {"metric_name", "metric_before", "metric_after", "saved_parameters", "saved_bytes", "ranks", "kept_rank_curve", "seconds"}
    assert expected | {"adapter", "report", "run"} <= summary.keys()
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_a_finished_run_is_shown_again_from_its_folder_alone(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert run("tune", "--out", finished, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["run"] == str(finished)


def test_resuming_with_another_flag_or_method_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert run("tune", "--out", finished, "--resume", "--lr", "0.5") == 2
    assert "lr: got 0.5, expected 0.01" in capsys.readouterr().err
    assert run("tune", "adalora", "--out", finished, "--resume") == 2
    assert "was made with the method lora, got adalora" in capsys.readouterr().err


def test_truncate_states_the_metric_and_the_sizes(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("tune", "truncate", finished, "--rank", "1", "--out", tmp_path / "small") == 0
    said = capsys.readouterr().out
    assert "accuracy on held-out rows:" in said
    assert " cut (" in said
    assert run("tune", "truncate", finished, "--rank", "1", "--out", tmp_path / "other", "--json") == 0
    assert json.loads(capsys.readouterr().out)["saved_parameters"] > 0


def test_report_names_the_file_it_wrote(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert run("report", finished) == 0
    assert capsys.readouterr().out.strip() == str(finished / "report.html")


def test_a_run_of_a_room_that_draws_nothing_has_a_report_of_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    RunFolder.create(tmp_path / "run", {"room": "../kitchen", "method": "Soup()", "settings": {"salt": 3}})
    assert run("report", tmp_path / "run") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    assert "salt" in (tmp_path / "run" / "report.html").read_text()


def test_list_shows_the_methods_of_a_room(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("list", "tune") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in METHODS)
    assert "ParallelRankOneRegression" not in said


def test_doctor_names_what_is_missing_and_how_to_get_it(capsys: pytest.CaptureFixture[str]):
    assert run("doctor") == 0
    said = capsys.readouterr().out
    assert "torch" in said
    assert "cpu" in said
    missing = look_for("nothing", package="no-such-package-at-all", advice="pip install 'partwise[demo]'")
    assert (missing.ok, missing.advice) == (False, "pip install 'partwise[demo]'")


def test_doctor_looks_at_disk_and_permission(tmp_path: Path):
    assert "GB free" in look_at_disk(tmp_path).found
    assert {finding.name for finding in examine(tmp_path)} >= {"partwise", "python", "torch", "demo model", "devices", "disk", "write permission"}


@pytest.fixture
def config_file(tmp_path: Path) -> Any:
    def write(text: str) -> list[str]:
        (tmp_path / "settings.yaml").write_text(text)
        return ["--config", str(tmp_path / "settings.yaml")]

    return write


def test_a_config_file_has_the_names_of_the_flags_and_flags_win(config_file: Any):
    arguments = config_file("max-steps: 7\nlr: 1e-4\nlora_alpha: 3\njson: true\ntext_pair: other\n")
    name, flags = read_tune_flags(["lora", *arguments, "--max-steps", "9"])
    assert name == "lora"
    assert (flags.training.max_steps, flags.training.lr, flags.method.lora_alpha, flags.run.json, flags.data.text_pair) == (
        9,
        1e-4,
        3.0,
        True,
        "other",
    )


def test_a_config_file_may_name_the_method(config_file: Any):
    assert read_tune_flags(config_file("method: adalora\nfinal-share: 0.25\n"))[1].method.final_share == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed: 9\n", "the config file has speed, which are no flags of this method. Known: "),
        ("lr: fast\n", "Error parsing --lr"),
        ("- lr\n", "holds list, expected lines like `max-steps: 200`"),
        ("lr: [\n", "cannot be read: got"),
    ],
)
def test_a_bad_config_file_says_what_is_wrong(text: str, message: str, config_file: Any, capsys: pytest.CaptureFixture[str]):
    assert main(["tune", "lora", *config_file(text)]) == 2
    assert message in capsys.readouterr().err


def test_flags_are_read_in_both_spellings():
    assert flag_value(["--out", "a", "--out=b"], "--out") == "b"
    assert flag_value(["--out"], "--out") is None


def test_the_resume_command_repeats_the_flags(tmp_path: Path):
    assert resume_command(["partwise", "tune", "lora", "--lr", "1"], Path("runs/a b")) == "partwise tune lora --lr 1 --out 'runs/a b' --resume"
    assert resume_command(["partwise", "tune", "--out", "x", "--resume"], Path("x")) == "partwise tune --out x --resume"


def test_no_progress_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]):
    with progress_bar(shown=True) as report:
        report("training", 1, 2, "loss 0.5")
    assert capsys.readouterr() == ("", "")


def test_a_room_plugs_in_by_its_own_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    kitchen = types.ModuleType("partwise.kitchen._command")
    kitchen.USAGE, kitchen.EXAMPLES = (("kitchen SOUP", "cook"),), ("partwise kitchen leek",)  # type: ignore[attr-defined]
    kitchen.pages = lambda: [[]]  # type: ignore[attr-defined]
    kitchen.read = lambda words: Command(work=lambda report: {"soup": words[0]}, show=lambda made: [made["soup"]], json="--json" in words)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "partwise.kitchen._command", kitchen)
    monkeypatch.setattr("partwise.cli.rooms_with", lambda module: ["kitchen"])
    assert run("--help") == 0
    assert "  kitchen SOUP           cook\n" in capsys.readouterr().out
    assert run("kitchen", "leek") == 0
    assert capsys.readouterr().out == "leek\n"
    assert run("kitchen", "leek", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"soup": "leek"}


@pytest.fixture
def poet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A room whose command says a verse bit by bit, and counts its letters at the end."""

    def recite(report: Any, write: Any = lambda text: None) -> dict[str, Any]:
        for number, word in enumerate(VERSE, start=1):
            report("reciting", number, len(VERSE), f"at {word!r}")
            write(word)
        return {"letters": len("".join(VERSE))}

    room = types.ModuleType("partwise.poet._command")
    room.USAGE, room.EXAMPLES, room.pages = (), (), lambda: [[]]  # type: ignore[attr-defined]
    room.read = lambda words: Command(  # type: ignore[attr-defined]
        work=recite, stream=recite, show=lambda made: [f"{made['letters']} letters"], json="--json" in words
    )
    monkeypatch.setitem(sys.modules, "partwise.poet._command", room)
    monkeypatch.setattr("partwise.cli.rooms_with", lambda module: ["poet"])


VERSE = ("a rose", " is a", " rose", "", " \x1b[2J", "\nis")


def test_text_that_comes_bit_by_bit_is_all_of_standard_output_and_ends_with_a_line_break(poet: None, capsys: pytest.CaptureFixture[str]):
    assert run("poet") == 0
    assert capsys.readouterr() == ("".join(VERSE) + "\n", f"{len(''.join(VERSE))} letters\n")


def test_with_json_no_text_is_streamed(poet: None, capsys: pytest.CaptureFixture[str]):
    assert run("poet", "--json") == 0
    said = capsys.readouterr()
    assert (json.loads(said.out), said.err) == ({"letters": len("".join(VERSE))}, "")


def test_a_terminal_shows_the_text_above_a_line_that_tells_how_far_it_is(poet: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr("os.get_terminal_size", lambda descriptor: (30, 10))
    monkeypatch.setattr("partwise.cli.SECONDS_BETWEEN_LINES", 0.0)
    assert run("poet") == 0
    text, status = capfd.readouterr()
    assert text == "a rose is a rose \ufffd[2J\nis\n"  # a model must not be able to clear the screen
    assert status.startswith("\n\x1b[1A\x1b7\x1b[1;9r\x1b8")  # lines 1 to 9 scroll
    lines = re.findall(r"\x1b7\x1b\[10;1H\x1b\[2m([^\x1b]*)\x1b\[0m\x1b\[K\x1b8", status)
    assert lines[0] == "reciting  1 of 6  at 'a rose'"
    assert len(lines) == len(VERSE)
    assert max(map(len, lines)) == 29
    assert status.endswith(f"\x1b7\x1b[r\x1b[10;1H\x1b[K\x1b8{len(''.join(VERSE))} letters\n")  # all lines scroll again


def test_the_line_of_a_terminal_follows_its_height_and_is_taken_away_after_a_failure(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    sizes = iter([(80, 24), (80, 24), (80, 12), (80, 1)])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("os.get_terminal_size", lambda descriptor: next(sizes))
    with pytest.raises(KeyboardInterrupt), status_line() as report:
        for phase in ("one", "two", "three", "four"):
            report(phase, 0, 1, "")
        raise KeyboardInterrupt
    said = capfd.readouterr().err
    assert re.findall(r"\x1b\[1;(\d+)r", said) == ["23", "11"]
    assert "four" not in said  # a window of one line has no room for it
    assert said.endswith("\x1b[r\x1b[12;1H\x1b[K\x1b8")


def test_no_status_line_without_a_terminal_or_on_one_that_cannot_move_its_cursor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    with status_line() as report:
        report("reciting", 1, 2, "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with status_line() as report:
        report("reciting", 1, 2, "")
    assert capsys.readouterr() == ("", "")


def test_the_command_line_knows_no_room():
    source = Path(sys.modules["partwise.cli"].__file__ or "").read_text()
    assert not [room for room in ROOMS if room in source]


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_resume_and_exits_with_130(tmp_path: Path, tiny_model_folder: Path, reviews: Path):
    out = tmp_path / "run"
    flags = tiny_flags(tiny_model_folder, reviews, max_steps=3000)
    code, said = run_and_interrupt("tune", "lora", *flags, out=out, threshold=5)
    assert code == 130, said
    assert f"--out {out} --resume" in said
    assert "Traceback" not in said
    assert RunFolder(out).status == "interrupted"
