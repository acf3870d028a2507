from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from partwise.atomic_files import clear_leftovers, read_json, refuse_pickles, write_atomic, write_folder, write_json
from partwise.checks import InputError, RunError


def no_space(*_args: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_the_old_file_and_says_how_much_room_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", no_space)
    expected = r"file cannot be written: got No space left on device with [\d,]+ bytes free, expected room for at least 3 bytes\. .* run .* --resume"
    with pytest.raises(RunError, match=expected) as caught:
        write_atomic(tmp_path / "file", b"new")
    assert caught.value.code == "disk-full"
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_inside_a_library_written_in_rust_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="result cannot be written") as caught, write_folder(tmp_path / "result"):
        raise Exception("I/O error: No space left on device (os error 28)")
    assert caught.value.code == "disk-full"


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"cannot be written: got (File exists|Not a directory), expected a writable place\. .* another --out"
    ) as caught:
        write_atomic(tmp_path / "file" / "run.json", b"")
    assert caught.value.code == "cannot-write"


def test_a_folder_whose_writing_fails_stays_as_it_was(tmp_path: Path) -> None:
    with write_folder(tmp_path / "result") as inside:
        (inside / "deep").mkdir()
        (inside / "deep" / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), write_folder(tmp_path / "result") as inside:
        (inside / "b.txt").write_text(str(1 // 0))
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result" / "deep" / "a.txt").read_text() == "old"


def test_json_is_strict_readable_by_every_parser_and_ends_with_a_line_break(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"nan": float("nan"), "tuple": (1, float("inf")), "path": Path("runs") / "a", "text": "\u00e9"})
    assert read_json(tmp_path / "a.json") == {"nan": None, "tuple": [1, None], "path": "runs/a", "text": "\u00e9"}
    assert (tmp_path / "a.json").read_text(encoding="utf-8").endswith("}\n")
    with pytest.raises(TypeError, match=r"object cannot be written as JSON"):
        write_json(tmp_path / "b.json", {"a": object()})


def test_json_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"a": 1')
    with pytest.raises(RunError, match=r"broken\.json is damaged: got .*, expected JSON") as caught:
        read_json(tmp_path / "broken.json")
    assert caught.value.code == "file-damaged"
    (tmp_path / "latin.json").write_bytes(b'"\xe9"')
    with pytest.raises(RunError, match=r"latin\.json is damaged"):
        read_json(tmp_path / "latin.json")
    with pytest.raises(RunError, match=r"nowhere\.json cannot be read: got No such file or directory, expected a readable file") as caught:
        read_json(tmp_path / "nowhere.json")
    assert caught.value.code == "file-unreadable"


def test_new_files_get_the_permissions_the_user_asked_for(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", b"")
    finally:
        os.umask(previous)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["adapter_model.bin", "old.PT", "rng_state.pth", "a.pkl", "b.ckpt", "c.pickle", "d.joblib"])
def test_a_folder_with_a_pickle_in_it_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refuse_pickles(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        InputError, match=rf"holds {name}: these can be pickles, .* expected only safetensors and JSON\. Save the weights again"
    ) as caught:
        refuse_pickles(tmp_path)
    assert caught.value.code == "pickle-refused"


def test_refusing_pickles_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere is not a folder: expected one that holds an adapter") as caught:
        refuse_pickles(tmp_path / "nowhere")
    assert caught.value.code == "folder-missing"


def test_clearing_a_folder_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    clear_leftovers(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
