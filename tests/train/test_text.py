from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partwise.checks import InputError
from partwise.train import _text
from partwise.train._text import PARTS, Corpus, Document, TokenBlocks, blocks_of, read_corpus, train_tokenizer

WORDS = ("def", "return", "self", "value", "for", "in", "range", "print", "if", "else", "\n    ", "import", "class", "None")


def prose(seed: int, num_words: int = 400) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, num_words).tolist()) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files of different lengths, two of them deeper."""
    for number in range(40):
        path = tmp_path / "texts" / ("inner" if number > 37 else "") / f"file_{number:02}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# number {number}\n" + prose(number, 100 + 20 * (number % 7)))
    return tmp_path / "texts"


def tokens_of(blocks: TokenBlocks) -> list[int]:
    return [token for index in range(len(blocks)) for token in blocks[index]["input_ids"].tolist()]


# What is held out


def test_held_out_files_are_whole_and_never_among_the_training_files(folder: Path):
    corpus = read_corpus(str(folder), valid_fraction=0.1)
    assert corpus.held_out_by == "file"
    names = [name for part in PARTS for name in corpus.names(part)]
    assert sorted(names) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    assert all(document.text == (folder / document.name).read_text() for part in PARTS for document in corpus.parts[part])
    total = sum(len(document.text) for part in PARTS for document in corpus.parts[part])
    for part, share in {"valid": 0.1, "test": 0.1, "calibration": 0.05}.items():
        assert abs(sum(len(document.text) for document in corpus.parts[part]) / total - share) < 0.02


def test_no_text_of_a_held_out_file_is_in_the_tokens_to_train_on(folder: Path):
    corpus = read_corpus(str(folder), valid_fraction=0.1)
    tokenizer = train_tokenizer(corpus.parts["train"], vocab_size=300, context=16)
    learnt = tokenizer.decode(tokens_of(blocks_of(corpus, tokenizer, context=16)["train"]))
    for part in PARTS[1:]:
        for document in corpus.parts[part]:
            assert document.text.splitlines()[0] + "\n" not in learnt
            assert document.text[40:120] not in learnt


def test_the_seed_decides_which_files_are_held_out_and_a_new_file_moves_few(folder: Path):
    first, again, other = (read_corpus(str(folder), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.sha256() == again.sha256() != other.sha256()
    assert first.names("test") != other.names("test")
    (folder / "zz_new.py").write_text(prose(99))
    moved = {name for part in PARTS for name in set(first.names(part)) - set(read_corpus(str(folder), seed=0).names(part))}
    assert len(moved) <= 6


def test_the_digest_changes_with_any_text_and_any_name(folder: Path):
    before = read_corpus(str(folder)).sha256()
    path = folder / "file_03.py"
    path.write_text(path.read_text() + "x")
    changed = read_corpus(str(folder)).sha256()
    path.rename(folder / "file_03b.py")
    assert len({before, changed, read_corpus(str(folder)).sha256()}) == 3


@given(sizes=st.lists(st.integers(1, 2000), min_size=10, max_size=30), fraction=st.sampled_from([0.01, 0.05, 0.2]), seed=st.integers(0, 3))
def test_every_part_gets_a_file_however_uneven_their_sizes_are(sizes: list[int], fraction: float, seed: int):
    documents = [Document(f"{number}", "x" * size) for number, size in enumerate(sizes)]
    fractions = {"valid": fraction, "test": fraction, "calibration": fraction / 2}
    corpus = _text._by_file("folder", documents, fractions, seed)
    assert all(corpus.parts[part] for part in PARTS)
    assert sorted(name for part in PARTS for name in corpus.names(part)) == sorted(document.name for document in documents)


@given(lines=st.lists(st.integers(0, 60), min_size=1, max_size=40), fraction=st.sampled_from([0.05, 0.1, 0.2]))
def test_a_single_text_is_held_out_in_stretches_that_put_together_are_the_text(lines: list[int], fraction: float):
    text = "\n".join("x" * length for length in lines)
    cut = _text._cut_off(Document("book.txt", text), {"valid": fraction, "test": fraction, "calibration": fraction / 2})
    assert "".join(cut[part].text for part in ("train", "calibration", "test", "valid")) == text


def test_stretches_of_a_single_file_begin_with_a_line_and_have_their_share(tmp_path: Path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {number} of a book\n" for number in range(1000)))
    corpus = read_corpus(str(path), valid_fraction=0.1)
    assert corpus.held_out_by == "stretch"
    assert all(document.text.startswith("line ") for part in PARTS for document in corpus.parts[part])
    lengths = [sum(len(document.text) for document in corpus.parts[part]) for part in PARTS]
    np.testing.assert_allclose(np.array(lengths) / sum(lengths), [0.75, 0.1, 0.1, 0.05], atol=0.01)
    assert corpus.names("train")[0].startswith("book.txt, characters 0 to ")


@pytest.mark.parametrize("names", [("train.txt", "valid.txt", "test.txt"), ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")])
def test_a_folder_that_is_split_already_is_used_as_it_is(tmp_path: Path, names: tuple[str, ...]):
    for number, name in enumerate(names):
        (tmp_path / name).write_text(prose(number))
    (tmp_path / "README.md").write_text("not to be read")
    corpus = read_corpus(str(tmp_path))
    assert corpus.held_out_by == "given"
    assert [document.text for document in corpus.parts["valid"]] == [prose(1)]
    assert [document.text for document in corpus.parts["test"]] == [prose(2)]
    assert corpus.parts["train"][0].text + corpus.parts["calibration"][0].text == prose(0)


def test_a_given_split_without_validation_takes_it_from_the_end_of_the_training_text(tmp_path: Path):
    (tmp_path / "train.txt").write_text(prose(0))
    (tmp_path / "test.txt").write_text(prose(1))
    corpus = read_corpus(str(tmp_path))
    assert corpus.parts["test"][0].text == prose(1)
    assert "".join(corpus.parts[part][0].text for part in ("train", "calibration", "valid")) == prose(0)


def test_files_named_train_and_test_among_sources_are_no_split(folder: Path):
    (folder / "train.py").write_text(prose(101))
    (folder / "test.py").write_text(prose(102))
    assert read_corpus(str(folder)).held_out_by == "file"


# Which files are read


def test_hidden_binary_and_empty_files_are_left_out_and_unknown_endings_are_read_when_they_are_text(folder: Path):
    for name, content in {
        ".hidden.txt": b"secret",
        ".git/config.txt": b"secret",
        "__pycache__/x.py": b"secret",
        "picture.png": b"\x89PNG\0\0",
        "late.bin": b"x" * 9000 + b"\0\xff",
        "latin.dat": "caf\xe9".encode("latin1"),
        "empty.py": b"",
        "notes.log": b"a note",
        "marked.md": b"\xef\xbb\xbfmarked",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    found = {document.name: document.text for part in PARTS for document in read_corpus(str(folder)).parts[part]}
    assert len(found) == 42
    assert found["notes.log"] == "a note"
    assert found["marked.md"] == "marked"


def test_a_text_that_two_files_have_is_read_once(folder: Path):
    (folder / "copy.py").write_text((folder / "file_07.py").read_text())
    names = [name for part in PARTS for name in read_corpus(str(folder)).names(part)]
    assert len(names) == 40
    assert ("copy.py" in names) != ("file_07.py" in names)


def test_the_standard_library_is_read_without_its_tests():
    corpus = read_corpus(None)
    names = {name for part in PARTS for name in corpus.names(part)}
    assert {"argparse.py", "asyncio/base_events.py", "json/decoder.py"} <= names
    assert not any({"test", "tests", "idlelib", "site-packages"} & set(Path(name).parts) for name in names)
    assert min(len(corpus.parts[part]) for part in PARTS[1:]) >= 5
    assert sum(len(document.text) for document in corpus.parts["train"]) > 4_000_000


# Tokens


def test_the_tokenizer_round_trips_any_text_and_survives_saving(folder: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(read_corpus(str(folder)).parts["train"], vocab_size=300, context=16)
    assert len(tokenizer) == 300
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("def f(x):\n    return  x\t # \xe9\u4e2d\U0001f600\n\n", " leading", "trailing ", "don't , . do", prose(5)):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 0)


@pytest.mark.slow
def test_the_tokenizer_is_the_same_in_another_process(folder: Path):
    program = (
        "import sys; from partwise.train._text import *; c = read_corpus(sys.argv[1]);"
        "t = train_tokenizer(c.parts['train'], vocab_size=400, context=16); sys.stdout.write(t.backend_tokenizer.to_str())"
    )

    def other(**environment: str) -> str:
        environment = os.environ | environment
        return subprocess.run([sys.executable, "-c", program, str(folder)], env=environment, capture_output=True, text=True, check=True).stdout

    here = train_tokenizer(read_corpus(str(folder)).parts["train"], vocab_size=400, context=16).backend_tokenizer.to_str()
    assert other(PYTHONHASHSEED="1", TOKENIZERS_PARALLELISM="true") == here


def test_a_long_text_gives_the_tokenizer_pieces_of_all_of_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_text, "TOKENIZER_CHARACTERS", 100)
    monkeypatch.setattr(_text, "PIECE", 10)
    documents = [Document("a", "a" * 400), Document("b", "b" * 600)]
    pieces = list(_text._evenly(documents))
    assert sum(map(len, pieces)) == 100
    assert {piece[0] for piece in pieces} == {"a", "b"}
    assert list(_text._evenly(documents[:1] * 0)) == []


def test_blocks_cover_the_text_once_with_an_end_after_each_document(folder: Path):
    corpus = read_corpus(str(folder))
    tokenizer = train_tokenizer(corpus.parts["train"], vocab_size=300, context=16)
    for part, blocks in blocks_of(corpus, tokenizer, context=16).items():
        text = "".join(document.text + tokenizer.eos_token for document in corpus.parts[part])
        covered = tokenizer.decode(tokens_of(blocks))
        assert text.startswith(covered)
        rest = [token for document in corpus.parts[part] for token in [*tokenizer(document.text)["input_ids"], 0]][len(blocks) * 16 :]
        assert len(rest) < 16
        assert covered + tokenizer.decode(rest) == text
        assert tokens_of(blocks).count(0) in {len(corpus.parts[part]), len(corpus.parts[part]) - 1}


def test_an_end_token_that_a_text_spells_out_is_text(tmp_path: Path):
    documents = (Document("a", "x <|endoftext|> y\n" * 50),)
    tokenizer = train_tokenizer(documents, vocab_size=300, context=8)
    blocks = blocks_of(Corpus("a", dict.fromkeys(PARTS, documents), "file"), tokenizer, context=8)
    assert tokens_of(blocks["train"]).count(0) <= 1


def test_an_item_has_its_tokens_as_labels_and_some_blocks_are_spread_over_all():
    blocks = TokenBlocks(np.arange(103, dtype=np.int32), 10)
    assert len(blocks) == 10
    assert blocks[3]["input_ids"].tolist() == blocks[3]["labels"].tolist() == list(range(30, 40))
    assert [int(blocks.evenly(4)[index]["input_ids"][0]) for index in range(4)] == [0, 20, 50, 70]
    assert blocks.evenly(10) is blocks


# Bad input


def refused(code: str, path: object, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_corpus(str(path))
    assert caught.value.code == code


def test_text_that_is_not_there_is_refused(tmp_path: Path):
    refused("data-not-found", tmp_path / "nowhere", "there is no file or folder .*nowhere")


def test_a_folder_without_text_and_an_empty_file_are_refused(tmp_path: Path):
    (tmp_path / "empty.txt").write_text(" \n")
    refused("no-text", tmp_path, "holds no text files, expected UTF-8 text")
    refused("no-text", tmp_path / "empty.txt", r"empty\.txt is empty")


def test_a_text_file_that_is_not_utf_8_is_named(folder: Path, tmp_path: Path):
    (folder / "inner" / "old.txt").write_bytes("caf\xe9".encode("latin1"))
    refused("wrong-encoding", folder, r"inner/old\.txt is not UTF-8 text: byte 3 is 0xe9")
    (tmp_path / "model.bin").write_bytes(b"\0\xff\0")
    refused("wrong-encoding", tmp_path / "model.bin", r"model\.bin is not UTF-8 text: byte 1 is 0xff")


def test_too_little_text_says_what_it_gives(tmp_path: Path):
    (tmp_path / "short.txt").write_text(prose(0, 100))
    corpus = read_corpus(str(tmp_path / "short.txt"))
    tokenizer = train_tokenizer(corpus.parts["train"], vocab_size=300, context=64)
    with pytest.raises(InputError, match=r"short\.txt gives these blocks of 64 tokens: \d+ for train, 0 for valid") as caught:
        blocks_of(corpus, tokenizer, context=64)
    assert caught.value.code == "too-little-text"


def test_a_vocabulary_below_all_bytes_and_the_end_is_refused():
    with pytest.raises(InputError, match="vocab_size=256 must be an integer of at least 257"):
        train_tokenizer([Document("a", "a")], vocab_size=256, context=8)


def test_a_tokenizer_without_an_end_token_is_refused(folder: Path):
    corpus = read_corpus(str(folder))
    tokenizer = train_tokenizer(corpus.parts["train"], vocab_size=300, context=16)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no end token") as caught:
        blocks_of(corpus, tokenizer, context=16)
    assert caught.value.code == "no-end-token"


def test_a_python_without_its_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"found 0 source files of the standard library .* expected at least 10") as caught:
        read_corpus(None)
    assert caught.value.code == "no-library-source"
