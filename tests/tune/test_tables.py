from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from task_files import ROWS, read, refused, write_csv, write_json_lines, write_parquet


def test_every_format_gives_the_same_rows(tmp_path):
    gzipped = tmp_path / "packed.csv.gz"
    gzipped.write_bytes(gzip.compress(write_csv(tmp_path / "rows.csv", ROWS).read_bytes()))
    by_column = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    (tmp_path / "columns.json").write_text(json.dumps(by_column))
    (tmp_path / "nested.json").write_text(json.dumps({"data": ROWS}))
    paths = [
        tmp_path / "rows.csv",
        gzipped,
        write_csv(tmp_path / "rows.tsv", ROWS, "\t"),
        write_json_lines(tmp_path / "rows.jsonl", ROWS),
        tmp_path / "list.json",
        tmp_path / "columns.json",
        tmp_path / "nested.json",
        write_parquet(tmp_path / "rows.parquet", ROWS),
    ]
    assert len({read(path).fingerprint for path in paths}) == 1


def test_csv_fields_may_hold_commas_quotes_newlines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufefftext,label\n"one, ""two""\nthree",a\nfour,b\nfive,a\nsix,b\n'.encode())
    data = read(path)
    assert 'one, "two"\nthree' in data.train.texts + data.valid.texts


def test_a_lone_quotation_mark_in_a_tsv_file_swallows_no_rows(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('text\tlabel\n"one\ta\ntwo\tb\n"three\ta\nfour\tb\n')
    data = read(path)
    assert {*data.train.texts, *data.valid.texts} == {'"one', "two", '"three', "four"}


def test_words_such_as_na_and_null_are_texts_like_any_other(tmp_path):
    rows = [{"text": text, "label": label} for text, label in zip(["NA", "null", "nan", "None"], ["NA", "b", "NA", "b"], strict=True)]
    data = read(write_csv(tmp_path / "rows.csv", rows))
    assert {*data.train.texts, *data.valid.texts} == {"NA", "null", "nan", "None"}
    assert data.label_names == ("NA", "b")


def test_a_line_separator_of_unicode_does_not_break_a_line_of_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"a\u2028b{n}", "label": n % 2}, ensure_ascii=False) + "\n\n" for n in range(4)), encoding="utf-8")
    assert len(read(path).train) == 3


def test_a_folder_with_its_own_validation_rows_is_not_split(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    write_json_lines(tmp_path / "validation.jsonl", ROWS[:3])
    data = read(tmp_path)
    assert data.train.texts == tuple(row["text"] for row in ROWS)
    assert data.valid.texts == tuple(row["text"] for row in ROWS[:3])
    assert data.name == tmp_path.name


def test_validation_is_preferred_to_test_and_test_to_a_split(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "test.csv", ROWS[:4])
    assert len(read(tmp_path).valid) == 4
    write_csv(tmp_path / "validation.csv", ROWS[:6])
    assert len(read(tmp_path).valid) == 6


def test_a_folder_with_training_rows_only_is_split(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    data = read(tmp_path)
    assert (len(data.train), len(data.valid)) == (16, 4)


def test_a_downloaded_data_set_is_read_without_a_network(tmp_path):
    pytest.importorskip("datasets", reason="reads a folder laid out like a repository of the hub")
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:10])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[10:])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", ROWS[:5])
    data = read(tmp_path)
    assert data.train.texts == tuple(row["text"] for row in ROWS)
    assert len(data.valid) == 5


def test_a_data_set_id_is_loaded_with_its_configuration_splits_and_class_names(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="stands in for the hub")
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good", "unused"])})
    split = datasets.Dataset.from_dict({"sentence": ["x", "y", "z"], "label": [1, 0, 1]}, features=features)
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict(train=split, validation=split.select([0, 1]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = read("somebody/reviews:small")
    assert asked == [("somebody/reviews", "small")]
    assert data.label_names == ("bad", "good", "unused")
    assert data.train.targets == (1, 0, 1)
    assert data.valid.texts == ("x", "y")
    assert data.name == "somebody/reviews:small"


def test_progress_bars_of_datasets_are_back_after_a_load_that_failed():
    datasets = pytest.importorskip("datasets", reason="its progress bars are looked at")
    datasets.enable_progress_bars()
    refused("data-set-unavailable", "somebody/reviews", "cannot load")
    assert datasets.is_progress_bar_enabled()


# Bad input


@pytest.mark.parametrize("name", ["rows.csv", "./rows", "no/such/folder/rows", "rows.parquet"])
def test_a_missing_file_is_named(name):
    refused("data-not-found", name, rf"there is no file or folder '{name}' in .* Check --data")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "rows.csv", ROWS)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    refused("file-unreadable", path, r"cannot read .*rows\.csv: Permission denied\. Check its permissions")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_folder_that_may_not_be_listed_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o000)
    refused("file-unreadable", tmp_path / "closed", "Check")


def test_an_overlong_path_is_refused_like_any_other():
    refused("file-unreadable", "/" + "x" * 5000, r"cannot look at .*: File name too long")


def test_text_in_another_encoding_is_refused_with_its_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\nyes,a\ncaf\u00e9,b\n".encode("latin1"))
    refused("wrong-encoding", path, r"byte 0xe9 in line 3, expected text in UTF-8\. Convert it, for example: iconv -f latin1")


def test_an_unknown_ending_lists_the_known_ones(tmp_path):
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    refused("unknown-format", tmp_path / "rows.xlsx", r"has \.xlsx, expected one of \.csv, \.tsv, \.jsonl, \.json, \.parquet")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("rows.csv", b"text,label\na,b\na,b,c\n", "line 3 has 3 fields, but the header has 2"),
        ("rows.csv", b"text,label\na\n", "line 2 has 1 fields, but the header has 2"),
        ("rows.csv", b'text,label\n"a,b\nc,d\n', "line 3: unexpected end of data"),
        ("rows.csv", b"text,text\na,b\n", r"two columns have the same name in its header \(text, text\)"),
        ("rows.tsv", b"text\tlabel\na\tb\tc\n", "line 2 has 3 fields, but the header has 2"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: Expecting value at character 10"),
        ("rows.jsonl", b'{"text": "a"}\n[1]\n', "line 2 is not an object but list"),
        ("rows.json", b'[\n{"text": "a"},\n', "line 3: Expecting value"),
        ("rows.json", b'{"text": ["a"], "label": []}', "it must be a list of objects, or an object of equally long lists"),
        ("rows.json", b'"text"', "it must be a list of objects"),
        ("rows.parquet", b"PAR1 and then nothing", "Parquet|parquet"),
        ("rows.csv.gz", b"not packed", r"it cannot be unpacked \(Not a gzipped file"),
        ("rows.csv.gz", gzip.compress(b"text,label\na,b\n", mtime=0)[:-9], "it cannot be unpacked"),
    ],
)
def test_a_broken_file_is_refused_with_the_place_of_the_fault(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    refused("broken-file", tmp_path / name, rf"{name} is not a sound .* file: .*{why}.* Repair it or export it again")


@pytest.mark.parametrize(
    ("name", "content"), [("rows.csv", b""), ("rows.csv", b"text,label\n"), ("rows.jsonl", b"\n"), ("rows.json", b'{"text": []}')]
)
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused("no-rows", tmp_path / name, rf"{name} has no rows, expected at least 2")


def test_two_files_for_one_split_are_refused(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    write_json_lines(tmp_path / "train.jsonl", ROWS)
    refused("several-files", tmp_path, r"several files for train: train\.csv, train\.jsonl\. Keep one")


def test_an_empty_folder_is_told_what_it_must_hold(tmp_path):
    pytest.importorskip("datasets", reason="reads folders that have no train.*")
    refused("data-set-unavailable", tmp_path, r"cannot load the folder .*A folder must hold train\.csv")


def test_a_data_set_id_without_a_network_says_to_download_it_first():
    pytest.importorskip("datasets", reason="asks the hub")
    refused(
        "data-set-unavailable",
        "somebody/reviews",
        r"cannot load the Hugging Face data set 'somebody/reviews': .*Without a network, download it elsewhere first "
        r"\(hf download --repo-type dataset somebody/reviews --local-dir FOLDER\) and pass --data FOLDER",
    )


def test_a_data_set_without_training_rows_lists_its_splits(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="stands in for the hub")
    split = datasets.Dataset.from_dict({"text": ["x"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(test=split))
    refused("no-rows", "somebody/reviews", "somebody/reviews has no rows to train on; its splits are: test")
