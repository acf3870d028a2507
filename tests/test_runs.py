from __future__ import annotations

import json
import logging
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from partwise.checks import InputError, RunError
from partwise.runs import RunFolder, begin_run

HEADER: dict[str, Any] = {
    "partwise": "0.1.0",
    "room": "tune",
    "method": "AdaPaD(lora_alpha=8)",
    "settings": {"target_r": 2, "lr": 5e-4, "data": Path("train.csv"), "modules": ("query", "value")},
    "seed": 3,
    "data": {"name": "docstrings", "fingerprint": "ab12"},
    "versions": {"python": "3.11.2", "torch": "2.13.0"},
    "command": ["partwise", "tune"],
}


def changed(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(HEADER, default=str)) | changes


def test_a_new_run_says_what_was_asked_for_and_that_it_runs(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs" / "a", HEADER)
    assert run.header == changed(status="running")
    assert (run.checkpoints, run.result) == (run.path / "checkpoints", run.path / "result")
    assert (run.summary, run.report) == (run.path / "summary.json", run.path / "report.html")
    assert RunFolder.exists(run.path)
    assert not RunFolder.exists(tmp_path)


def test_a_run_is_never_started_over_another_one(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, HEADER).set_status("interrupted")
    with pytest.raises(
        InputError, match=r"already holds a run \(interrupted\); expected a new folder\. Pass --resume .*, or choose another --out"
    ) as caught:
        RunFolder.create(tmp_path, HEADER)
    assert caught.value.code == "run-exists"


def test_a_run_is_never_started_among_other_files(tmp_path: Path) -> None:
    for name in "dcba":
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=r"is not empty: it holds a, b, c, \.\.\.; expected a new or an empty folder") as caught:
        RunFolder.create(tmp_path, HEADER)
    assert caught.value.code == "run-exists"


def test_a_run_killed_before_it_wrote_its_header_can_be_started_again(tmp_path: Path) -> None:
    (tmp_path / ".tmp-run.json-12-ab").write_text("{")
    assert RunFolder.create(tmp_path, HEADER).status == "running"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]


def test_a_place_that_is_a_file_cannot_hold_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file cannot be written: got File exists") as caught:
        RunFolder.create(tmp_path / "file", HEADER)
    assert caught.value.code == "cannot-write"


def test_resuming_names_every_difference_with_got_and_expected(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, HEADER)
    asked = changed(
        settings=HEADER["settings"] | {"target_r": 4, "lr": 1e-3, "new": True}, seed=4, data={"name": "docstrings", "fingerprint": "cd34"}
    )
    with pytest.raises(InputError) as caught:
        RunFolder.resume(tmp_path, asked)
    assert caught.value.code == "resume-differs"
    assert str(caught.value) == textwrap.dedent(f"""\
        {tmp_path} was made with other settings:
          settings.lr: got 0.001, expected 0.0005
          settings.new: got true, expected null
          settings.target_r: got 4, expected 2
          seed: got 4, expected 3
          data.fingerprint: got "cd34", expected "ab12"
        Pass the settings it was made with, or choose another --out.""")


def test_resuming_on_ray_or_without_it_is_no_other_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RunFolder.create(tmp_path, changed())
    with caplog.at_level("WARNING"):
        RunFolder.resume(tmp_path, changed(versions={**HEADER["versions"], "ray": "2.60.0"}))
    assert caplog.messages == []


def test_resuming_with_another_command_line_or_library_is_allowed_and_versions_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RunFolder.create(tmp_path, HEADER)
    with caplog.at_level(logging.WARNING):
        RunFolder.resume(tmp_path, changed(command=["x"], versions={"python": "3.11.2", "torch": "2.14.0"}))
    assert caplog.messages == ['resuming with another version, so the bits may differ: versions.torch: got "2.14.0", expected "2.13.0"']


def test_resuming_where_nothing_was_started_says_so(tmp_path: Path) -> None:
    for attempt in (lambda: RunFolder.resume(tmp_path, HEADER), lambda: RunFolder.open(tmp_path / "nowhere")):
        with pytest.raises(InputError, match=r"holds no run: got no run\.json in it\. Check the path, or start the run without --resume") as caught:
            attempt()
        assert caught.value.code == "run-not-found"


def test_resuming_a_finished_run_leaves_it_finished(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, HEADER).set_status("finished")
    assert RunFolder.resume(tmp_path, HEADER).status == "finished"


def test_an_unknown_status_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"status='done' is not known\. Choose one of: running, interrupted, finished"):
        RunFolder.create(tmp_path, HEADER).set_status("done")  # type: ignore[arg-type]


def test_a_damaged_header_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json is damaged: got .*, expected JSON"):
        RunFolder.resume(tmp_path, HEADER)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(RunError, match=r"run\.json is damaged: got list, expected a JSON object"):
        RunFolder.resume(tmp_path, HEADER)


def test_metrics_come_back_in_order_and_without_numbers_that_json_lacks(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, HEADER)
    assert run.metrics() == []
    rows: list[dict[str, Any]] = [{"kind": "train", "step": 1, "loss": 0.1 + 0.2}, {"kind": "eval", "step": 1, "metric": float("nan")}]
    for row in rows:
        run.append_metrics(row)
    assert run.metrics() == [rows[0], {"kind": "eval", "step": 1, "metric": None}]
    assert RunFolder.open(tmp_path).metrics() == run.metrics()


def test_rewinding_drops_exactly_the_rows_of_later_steps(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, HEADER)
    for step in (0, 1, 2, 2, 3):
        run.append_metrics({"kind": "train", "step": step})
    run.rewind(2)
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 2]
    run.append_metrics({"kind": "train", "step": 3})
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 2, 3]


def test_a_last_line_cut_short_is_not_read_and_not_glued_to_the_next(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, HEADER)
    run.append_metrics({"step": 1})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 12')
    assert run.metrics() == [{"step": 1}]
    resumed = RunFolder.resume(tmp_path, HEADER)
    resumed.append_metrics({"step": 2})
    assert resumed.metrics() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", ["{broken", "[1]", "\\xff"])
def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path: Path, line: str) -> None:
    run = RunFolder.create(tmp_path, HEADER)
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(RunError, match=rf"metrics\.jsonl is damaged: got b'.*{re.escape(line[:2])}.*' on line 2, expected a JSON object") as caught:
        run.metrics()
    assert caught.value.code == "file-damaged"


def test_a_full_disk_leaves_the_metrics_at_the_row_before(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, HEADER)
    run.append_metrics({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: got File too large .* expected room for") as caught:
            run.append_metrics({"step": 2, "text": "x" * 500})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == "disk-full"
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


HOLD_A_RUN = """
import sys, time
from pathlib import Path
from partwise.runs import RunFolder

run = RunFolder.create(Path(sys.argv[1]), {"settings": {}})
step = 0
while True:
    step += 1
    if step == 5:
        print("ready", flush=True)
    run.append_metrics({"kind": "train", "step": step, "text": "x" * 300})
"""


def test_two_processes_cannot_write_to_one_run_and_a_killed_one_gives_it_back(tmp_path: Path) -> None:
    header: dict[str, Any] = {"settings": {}}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLD_A_RUN), str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        try:
            with pytest.raises(InputError, match=r"is being written by another process; expected to be the only one\. Wait for it") as caught:
                RunFolder.resume(tmp_path, header)
            assert caught.value.code == "run-in-use"
        finally:
            other.kill()
    steps = [row["step"] for row in RunFolder.resume(tmp_path, header).metrics()]
    assert steps == list(range(1, len(steps) + 1)), "no row is lost or torn"
    assert len(steps) >= 4


@pytest.mark.parametrize(("was_there", "started", "stays"), [(False, False, False), (False, True, True), (True, False, True)])
def test_a_run_that_failed_before_it_started_leaves_no_folder_behind(was_there: bool, started: bool, stays: bool, tmp_path: Path):
    path = tmp_path / "run"
    if was_there:
        path.mkdir()
    with pytest.raises(ValueError, match="too bad"), begin_run(path, {"room": "tune"}, has_started=lambda run: started) as create:
        create()
        raise ValueError("too bad")
    assert path.exists() == stays


def test_a_run_that_another_process_began_meanwhile_is_left_alone(tmp_path: Path):
    path = tmp_path / "run"
    with pytest.raises(InputError, match="already holds a run"), begin_run(path, {"room": "tune"}, has_started=lambda run: False) as create:
        theirs = RunFolder.create(path, {"room": "train"})
        del theirs
        create()
    assert RunFolder(path).header["room"] == "train"
