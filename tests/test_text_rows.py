"""Rows of text to measure on: where they come from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from partwise.checks import InputError
from partwise.text_rows import CHARACTERS, read_rows
from serve_models import write_words
from tiny import WORDS, tiny_llama_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_llama_tokenizer()


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return write_words(tmp_path / "words", num_files=6)


def tokens_of(tokenizer: Any, path: Path) -> list[int]:
    return tokenizer(path.read_text(), add_special_tokens=False).input_ids


def is_inside(row: list[int], tokens: list[int]) -> bool:
    return any(tokens[start : start + len(row)] == row for start in range(len(tokens)))


def test_each_row_is_from_another_file_and_begins_as_the_tokenizer_begins_texts(words: Path, tokenizer: Any):
    rows = read_rows(str(words), tokenizer, num_rows=4, num_tokens=30)
    assert rows.name == "words"
    assert rows.ids.shape == (4, 30)
    assert rows.ids.dtype == torch.int64
    assert len(set(rows.files)) == 4
    assert (rows.ids[:, 0] == 0).all()
    for name, row in zip(rows.files, rows.ids.tolist(), strict=True):
        assert is_inside(row[1:], tokens_of(tokenizer, words / name))
    bare = read_rows(str(words), tiny_llama_tokenizer(bos=False), num_rows=1, num_tokens=30)
    assert is_inside(bare.ids[0].tolist(), tokens_of(tokenizer, words / bare.files[0]))


def test_the_same_seed_gives_the_same_rows_and_another_one_other_files(words: Path, tokenizer: Any):
    first, again, other = (read_rows(str(words), tokenizer, num_rows=3, num_tokens=30, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, again.ids)
    assert first.sha256() == again.sha256() != other.sha256()
    assert first.files != other.files


def test_few_files_give_several_rows_each_and_no_token_twice(tmp_path: Path, tokenizer: Any):
    words = write_words(tmp_path / "two", num_files=2, num_words=100)
    rows = read_rows(str(words), tokenizer, num_rows=6, num_tokens=31)
    assert set(rows.files) == {"words_0.txt", "words_1.txt"}
    assert len({tuple(row[1:]) for row in rows.ids.tolist()}) == 6
    used = sorted(token for row in rows.ids[:, 1:].tolist() for token in row)
    given = [*tokens_of(tokenizer, words / "words_0.txt"), *tokens_of(tokenizer, words / "words_1.txt"), 1, 1]
    assert all(used.count(token) <= given.count(token) for token in set(used))
    with pytest.raises(InputError, match=r"two gives 6 rows of 31 tokens, expected 7\. Pass more text with --text, or ask for fewer or") as caught:
        read_rows(str(words), tokenizer, num_rows=7, num_tokens=31)
    assert caught.value.code == "too-little-text"


def test_a_row_longer_than_every_file_runs_over_files(tmp_path: Path, tokenizer: Any):
    words = write_words(tmp_path / "short", num_files=6, num_words=20)
    row = read_rows(str(words), tokenizer, num_rows=1, num_tokens=50).ids[0].tolist()
    assert row.count(1) == 2  # the token between two texts


def test_files_that_are_left_out_give_no_row(words: Path, tokenizer: Any):
    first = read_rows(str(words), tokenizer, num_rows=2, num_tokens=12)
    others = read_rows(str(words), tokenizer, num_rows=2, num_tokens=12, left_out=first.files)
    assert not set(first.files) & set(others.files)
    with pytest.raises(InputError, match="expected UTF-8 text"):
        read_rows(str(words), tokenizer, num_rows=1, num_tokens=12, left_out=[path.name for path in words.iterdir()])


def test_of_a_large_file_only_the_middle_is_read(tmp_path: Path, tokenizer: Any):
    lines = ["red " * 50, *["green " * 50] * 40, "blue " * 50]
    (tmp_path / "large.txt").write_text("\n".join(lines))
    rows = read_rows(str(tmp_path / "large.txt"), tokenizer, num_rows=2, num_tokens=30)
    assert len("\n".join(lines)) > CHARACTERS * 2 * 30
    green = 3 + WORDS.index("green")
    assert (rows.ids[:, 1:] == green).all()


def test_the_source_of_the_library_is_read_where_no_text_is_given(tokenizer: Any):
    rows = read_rows(None, tokenizer, num_rows=2, num_tokens=50)
    assert rows.name == "standard library"
    assert all(name.endswith(".py") and "test" not in Path(name).parts for name in rows.files)
    held_out = read_rows(None, tokenizer, num_rows=2, num_tokens=50, held_out=["shlex.py", "queue.py", "gone.py"])
    assert held_out.name == "standard library, held-out files"
    assert set(held_out.files) == {"shlex.py", "queue.py"}
    other = read_rows(None, tokenizer, num_rows=2, num_tokens=50, held_out=["gone.py"])  # of another Python
    assert (other.name, other.files) == ("standard library", rows.files)


def test_hidden_and_other_files_of_a_folder_are_not_read(words: Path, tokenizer: Any):
    (words / ".hidden").mkdir()
    (words / ".hidden" / "a.txt").write_bytes(b"\xff")
    (words / "picture.png").write_bytes(b"\xff")
    (words / "empty.txt").write_text(" ")
    assert read_rows(str(words), tokenizer, num_rows=6, num_tokens=10).ids.shape == (6, 10)


def test_messages_name_the_flag_of_the_caller(tmp_path: Path, tokenizer: Any):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("red green")
    for name, match in [
        ("gone", r"Check --calibration\."),
        ("empty.txt", r"Check --calibration\."),
        ("short.txt", r"Pass more text with --calibration, or ask for fewer"),
    ]:
        with pytest.raises(InputError, match=match):
            read_rows(str(tmp_path / name), tokenizer, num_rows=1, num_tokens=30, flag="--calibration")


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, "data-not-found", r"there is no file or folder '.*text\.txt' in .*\. Check --text\."),
        (b"", "no-text", r"text\.txt holds no text, expected UTF-8 text such as \*\.txt"),
        (b"caf\xe9", "wrong-encoding", r"text\.txt is not UTF-8 text: byte 3 is 0xe9\. Convert it \(iconv"),
        (b"red green", "too-little-text", r"text\.txt gives 0 rows of 30 tokens, expected 1\."),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path: Path, tokenizer: Any, content: bytes | None, code: str, message: str):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_rows(str(path), tokenizer, num_rows=1, num_tokens=30)
    assert caught.value.code == code


def test_a_library_without_source_is_refused(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"found 0 source files of the standard library .* expected at least 1\. Pass your own text with --data") as caught:
        read_rows(None, tokenizer, num_rows=1, num_tokens=30, flag="--data")
    assert caught.value.code == "no-library-source"
