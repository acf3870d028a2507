from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partwise.checks import InputError
from partwise.tune._data import (
    IGNORED,
    DataSettings,
    Encoded,
    Examples,
    TaskData,
    batch_at,
    check_batch_fits,
    encode,
    eval_batches,
    read_task_data,
    split_rows,
)
from tiny import tiny_bert_tokenizer, tiny_llama_tokenizer

ROWS = [{"text": f"the film number {number} is {'good' if number % 2 else 'bad'}", "label": "pos" if number % 2 else "neg"} for number in range(20)]


def write_csv(path: Path, rows: list[dict[str, Any]], separator: str = ",") -> Path:
    lines = [separator.join(rows[0]), *(separator.join(str(value) for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="writes a parquet file")
    pytest.importorskip("pyarrow.parquet", reason="writes a parquet file").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path: Path | str, **settings: Any) -> TaskData:
    return read_task_data(DataSettings(data=str(path), **settings))


def refused(code: str, path: Path | str, match: str, **settings: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read(path, **settings)
    assert caught.value.code == code


def labelled(tmp_path: Path, labels: list[Any], **settings: Any) -> TaskData:
    rows = [{"text": f"row {number}", "label": label} for number, label in enumerate(labels)]
    return read(write_json_lines(tmp_path / "rows.jsonl", rows), **settings)


# Formats


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


# Columns and tasks


@pytest.mark.parametrize(
    ("row", "task", "text", "pair"),
    [
        ({"text": "a", "label": 1}, "classification", "a", None),
        ({"sentence": "a", "label": "x"}, "classification", "a", None),
        ({"sentence1": "a", "sentence2": "b", "label": 0.5}, "regression", "a", "b"),
        ({"premise": "a", "hypothesis": "b", "label": 1}, "classification", "a", "b"),
        ({"question1": "a", "question2": "b", "label": 1}, "classification", "a", "b"),
        ({"question": "a", "answer": "b", "label": 1}, "classification", "a", "b"),
        ({"question": "a", "answer": "b"}, "causal-lm", "a", "b"),
        ({"prompt": "a", "completion": "b"}, "causal-lm", "a", "b"),
        ({"instruction": "a", "output": "b"}, "causal-lm", "a", "b"),
        ({"instruction": "a", "input": "", "output": "b"}, "causal-lm", "a", "b"),
        ({"instruction": "a", "input": "c", "output": "b"}, "causal-lm", "a\nc", "b"),
        ({"text": "b"}, "causal-lm", "", "b"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_columns_with_common_names_are_found_and_tell_the_task(tmp_path, row, task, text, pair):
    other = {name: {"x": "y", 1: 0, 0.5: 0.7}.get(value, value) if name == "label" else value for name, value in row.items()}
    data = read(write_json_lines(tmp_path / "rows.jsonl", [row, other] * 5))
    assert data.task == task
    assert set(data.train.texts) == {text}
    assert data.train.pairs == (None if pair is None else (pair,) * 8)
    assert (data.train.targets is None) == (task == "causal-lm")


def test_columns_that_are_given_win_over_those_with_common_names(tmp_path):
    rows = [{"text": "wrong", "body": f"right {n}", "title": "second", "label": n % 2, "stars": n / 2} for n in range(10)]
    data = read(write_json_lines(tmp_path / "rows.jsonl", rows), text="body", text_pair="title", label="stars", task="regression")
    assert all(text.startswith("right") for text in data.train.texts)
    assert set(data.train.pairs or ()) == {"second"}
    assert set(data.train.targets or ()) <= {n / 2 for n in range(10)}


def test_a_given_prompt_and_completion_make_it_causal_lm_even_beside_a_label(tmp_path):
    rows = [{"q": "a", "r": "b", "label": n % 2} for n in range(5)]
    data = read(write_json_lines(tmp_path / "rows.jsonl", rows), prompt="q", completion="r")
    assert (data.task, data.train.texts[0], data.train.pairs and data.train.pairs[0]) == ("causal-lm", "a", "b")


def test_task_causal_lm_learns_the_text_of_labelled_rows(tmp_path):
    data = read(write_csv(tmp_path / "rows.csv", ROWS), task="causal-lm")
    assert set(data.train.texts) == {""}
    assert data.train.targets is None


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([3, 1, 3, 1, 2, 2], ("1", "2", "3")),
        (["10", "9", "10", "9"], ("9", "10")),
        (["b", "a", "b", "a"], ("a", "b")),
        ([True, False, True, False], ("False", "True")),
        (["007", "010", "007", "010"], ("007", "010")),
    ],
)
def test_classes_are_named_and_numbered_in_ascending_order(tmp_path, labels, names):
    data = labelled(tmp_path, labels)
    assert data.label_names == names
    found = {
        text: data.label_names[int(target)] for part in (data.train, data.valid) for text, target in zip(part.texts, part.targets or (), strict=True)
    }
    assert found == {f"row {number}": str(label) for number, label in enumerate(labels)}


def test_whole_floats_are_classes_when_the_task_says_so(tmp_path):
    assert labelled(tmp_path, [0.0, 1.0, 0.0, 1.0]).task == "regression"
    assert labelled(tmp_path, [0.0, 1.0, 0.0, 1.0], task="classification").label_names == ("0", "1")


def test_integers_are_scores_when_the_task_says_so(tmp_path):
    data = labelled(tmp_path, [1, 2, 3, 4], task="regression")
    assert data.label_names == ()
    assert all(isinstance(target, float) for target in data.train.targets or ())


# Splits


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=6), share=st.floats(0.05, 0.6), seed=st.integers(0, 5), stratified=st.booleans())
def test_a_split_is_disjoint_complete_and_leaves_each_class_a_row(counts, share, seed, stratified):
    strata = [target for target, count in enumerate(counts) for _ in range(count)]
    num_valid = round(share * len(strata))
    train, valid = split_rows(len(strata), num_valid=num_valid, seed=seed, strata=strata if stratified else None)
    assert sorted(train + valid) == list(range(len(strata)))
    assert train == tuple(sorted(train))
    assert len(valid) <= num_valid
    if stratified:
        assert {strata[row] for row in train} == set(strata)
        taken = Counter(strata[row] for row in valid)
        assert all(abs(taken[target] - num_valid * count / len(strata)) <= 1 for target, count in enumerate(counts) if count > 1)
    else:
        assert len(valid) == min(num_valid, len(strata) - 1)
    assert (train, valid) == split_rows(len(strata), num_valid=num_valid, seed=seed, strata=strata if stratified else None)


def test_the_seed_decides_which_rows_are_held_out(tmp_path):
    path = write_csv(tmp_path / "rows.csv", ROWS)
    splits = [read_task_data(DataSettings(data=str(path)), seed=seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0].valid != splits[2].valid
    assert splits[0].fingerprint != splits[2].fingerprint


def test_the_share_of_held_out_rows_is_as_asked(tmp_path):
    assert len(read(write_csv(tmp_path / "rows.csv", ROWS), valid_fraction=0.5).valid) == 10


def test_the_fingerprint_changes_with_any_text_label_or_class_name(tmp_path):
    def fingerprint(**changes: Any) -> str:
        return read(write_json_lines(tmp_path / "rows.jsonl", [ROWS[0] | changes, *ROWS[1:]])).fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(text="another"), fingerprint(label="pos"), fingerprint(label="third")}) == 4


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
        ("rows.csv.gz", gzip.compress(b"text,label\na,b\n")[:-9], "it cannot be unpacked"),
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


@pytest.mark.parametrize("flag", ["text", "text_pair", "label", "prompt", "completion"])
def test_a_wrong_column_lists_those_that_exist(tmp_path, flag):
    path = write_csv(tmp_path / "rows.csv", ROWS)
    option = flag.replace("_", "-")
    refused(
        "unknown-column",
        path,
        rf"rows\.csv has no column 'nope' \(--{option}\)\. Its columns are: 'text', 'label'\. Pass one of them",
        **{flag: "nope"},
    )


def test_validation_rows_without_a_column_of_the_training_rows_are_refused(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "validation.csv", [{"text": "a", "mark": "pos"}])
    refused("unknown-column", tmp_path, r"validation\.csv has no column 'label' .* Its columns are: 'text', 'mark'")


@pytest.mark.parametrize(
    ("row", "settings", "what", "flags"),
    [
        ({"body": "a", "label": "x"}, {}, r"a text \(text, sentence, .*\)", "--text"),
        ({"text": "a", "mark": "x"}, {"task": "classification"}, r"a label \(label, labels, .*\)", "--label"),
        ({"body": "a", "mark": "x"}, {}, "a label, a prompt with a completion, or a text", "--text and --label, or with --prompt and --completion"),
        ({"body": "a", "mark": "x"}, {"prompt": "body"}, "a completion to the prompt", "--completion"),
    ],
)
def test_a_column_that_is_not_found_lists_those_that_exist_and_the_flag(tmp_path, row, settings, what, flags):
    path = write_json_lines(tmp_path / "rows.jsonl", [row] * 3)
    names = ", ".join(map(repr, row))
    refused("column-not-found", path, rf"no column that is known to hold {what}\. Its columns are: {names}\. Name it with {flags}", **settings)


def test_one_class_only_is_refused_with_its_name(tmp_path):
    refused(
        "one-class",
        write_csv(tmp_path / "rows.csv", [{"text": f"row {number}", "label": "pos"} for number in range(5)]),
        r"label column 'label' of rows\.csv has one class only \('pos'\), expected at least 2",
    )


@pytest.mark.parametrize(
    ("labels", "settings", "why"),
    [
        ([0, 1, 0.5, 1], {"task": "classification"}, r"holds 0\.5 in row 3: labels of classes must be integers or strings\. Pass --task regression"),
        ([[0], [1], [0]], {}, r"holds list in 3 of 3 rows \(1, 2, 3\), expected integers or strings"),
        ([0, {"a": 1}, 0], {}, r"holds dict in 1 of 3 rows \(2\), expected integers or strings"),
        ([0, 1, "x"], {}, "mixes numbers with strings, such as 'x' in row 3"),
        (["a", "b", "c"], {"task": "regression"}, "holds strings such as 'a', expected numbers. Pass --task classification instead"),
    ],
)
def test_labels_that_are_neither_integers_nor_strings_are_refused(tmp_path, labels, settings, why):
    with pytest.raises(InputError, match=why) as caught:
        labelled(tmp_path, labels, **settings)
    assert caught.value.code == "label-type"


def test_numbers_in_one_split_and_strings_in_the_other_are_refused(tmp_path):
    write_json_lines(tmp_path / "train.jsonl", [{"text": "a", "label": number % 2} for number in range(4)])
    write_json_lines(tmp_path / "validation.jsonl", [{"text": "a", "label": "one"}])
    refused("label-type", tmp_path, r"numbers in one split and strings in the other \(0 and 'one'\)")


@pytest.mark.parametrize(
    ("labels", "settings"),
    [
        ([0.5, float("nan"), 1.5], {}),
        ([0.5, None, 1.5], {"task": "regression"}),
        ([0.5, float("inf"), 1.5], {}),
        (["a", "", "b"], {}),
        ([0, None, 1], {}),
    ],
)
def test_a_missing_label_is_refused_with_its_row(tmp_path, labels, settings):
    with pytest.raises(
        InputError,
        match=r"label column 'label' of rows\.jsonl has no value \(empty, null, NaN or infinite\) in 1 of 3 rows \(2\), expected one in every row",
    ) as caught:
        labelled(tmp_path, labels, **settings)
    assert caught.value.code == "missing-label"


@pytest.mark.parametrize("cell", ["nan", "NaN", "", "NA", "null", "inf"])
def test_a_nan_label_of_a_csv_file_is_refused_and_does_not_turn_scores_into_classes(tmp_path, cell):
    path = write_csv(tmp_path / "rows.csv", [{"text": f"row {number}", "score": score} for number, score in enumerate(["0.5", "1.5", cell, "2.5"])])
    refused("missing-label", path, r"label column 'score' .* in 1 of 4 rows \(3\)")


def test_kept_back_labels_of_a_data_set_are_refused(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="stands in for the hub")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    split = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "label": [0, 1, -1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=split))
    refused("missing-label", "somebody/reviews", r"numbers outside its 2 classes in rows 3")


def test_many_distinct_integers_are_not_guessed_at(tmp_path):
    with pytest.raises(
        InputError, match=r"has 101 distinct integers: these may be classes or a score\. Pass --task classification or --task regression"
    ) as caught:
        labelled(tmp_path, list(range(101)))
    assert caught.value.code == "unclear-task"
    assert labelled(tmp_path, list(range(101)), task="regression").task == "regression"


@pytest.mark.parametrize("empty", ["", "  \t", None])
def test_an_empty_text_is_refused_with_its_rows(tmp_path, empty):
    rows = [row | {"text": empty} if number in (2, 5, 6, 7, 8, 9) else row for number, row in enumerate(ROWS)]
    path = write_json_lines(tmp_path / "rows.jsonl", rows)
    refused("empty-text", path, r"column 'text' of rows\.jsonl is empty in 6 of 20 rows \(3, 6, 7, 8, 9, \.\.\.\), expected text in every row")


def test_an_empty_completion_is_refused_but_an_empty_prompt_is_not(tmp_path):
    path = write_json_lines(tmp_path / "rows.jsonl", [{"prompt": "", "completion": "x"}] * 5)
    assert read(path).train.texts == ("",) * 4
    write_json_lines(path, [{"prompt": "x", "completion": ""}] * 5)
    refused("empty-text", path, "column 'completion' .* is empty in 5 of 5 rows")


def test_a_text_column_of_numbers_is_refused(tmp_path):
    path = write_json_lines(tmp_path / "rows.jsonl", [{"text": 5, "label": number % 2} for number in range(4)])
    refused("not-text", path, r"column 'text' of rows\.jsonl holds int in 4 of 4 rows \(1, 2, 3, 4\), expected text")


def test_half_of_a_surrogate_pair_is_refused_before_a_tokenizer_chokes_on_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ok", "label": 0}\n{"text": "\\ud83d", "label": 1}\n')
    refused("not-text", path, r"column 'text' of rows\.jsonl holds half of a surrogate pair in row 2")


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:2]])
def test_too_few_rows_to_hold_any_out_are_refused(tmp_path, rows):
    code = "one-class" if len(rows) == 1 else "too-few-rows"
    match = "one class only" if len(rows) == 1 else r"rows\.csv has 2 rows in 2 classes, too few to hold any out"
    refused(code, write_csv(tmp_path / "rows.csv", rows), match)


def test_a_single_text_cannot_be_split(tmp_path):
    refused("too-few-rows", write_csv(tmp_path / "rows.csv", [{"text": "a"}]), r"rows\.csv has 1 row, too few to hold any out")


@pytest.mark.parametrize(("settings", "what"), [({"text": "body"}, "--text was"), ({"task": "causal-lm"}, "--task causal-lm was")])
def test_columns_or_another_task_without_data_are_refused(settings, what):
    with pytest.raises(InputError, match=rf"{what} given without --data, .* Pass --data too") as caught:
        read_task_data(DataSettings(**settings))
    assert caught.value.code == "data-missing"


@pytest.mark.parametrize(
    ("settings", "code", "match"),
    [
        ({"task": "poetry"}, "unknown-choice", "task='poetry' is not known. Choose one of: classification, regression, causal-lm"),
        ({"valid_fraction": 0.0}, "valid-fraction", r"valid_fraction=0\.0 must be between 0 and 1"),
        ({"valid_fraction": 1.0}, "valid-fraction", r"valid_fraction=1\.0 must be between 0 and 1"),
        ({"max_length": 3}, "max-length", "max_length=3 tokens cannot hold a text, expected at least 4"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, code, match):
    with pytest.raises(InputError, match=match) as caught:
        DataSettings(**settings)
    assert caught.value.code == code


# Encoding


def test_pairs_are_joined_with_special_tokens_and_keep_their_token_types():
    encoded = encode(Examples(("the film",), ("is good",), (1,)), tiny_bert_tokenizer(), task="classification", max_length=16)
    tokenizer = tiny_bert_tokenizer()
    assert tokenizer.convert_ids_to_tokens(list(encoded.input_ids[0])) == ["[CLS]", "the", "film", "[SEP]", "is", "good", "[SEP]"]
    assert encoded.token_type_ids == ((0, 0, 0, 0, 1, 1, 1),)
    assert encoded.targets == (1,)


def test_texts_are_cut_to_the_longest_length():
    encoded = encode(Examples(("the film is very good",), None, (1,)), tiny_bert_tokenizer(), task="classification", max_length=5)
    assert [len(row) for row in encoded.input_ids] == [5]


def causal(prompt: str, completion: str, *, max_length: int = 16, **options: Any) -> tuple[list[str], list[str | None]]:
    tokenizer = tiny_llama_tokenizer(**options)
    encoded = encode(Examples((prompt,), (completion,), None), tokenizer, task="causal-lm", max_length=max_length)
    labels = [None if label == IGNORED else tokenizer.convert_ids_to_tokens(label) for label in encoded.targets[0]]
    return tokenizer.convert_ids_to_tokens(list(encoded.input_ids[0])), labels


def test_a_prompt_is_read_but_not_learnt_and_the_end_is_learnt():
    tokens, labels = causal("the film is", "very good")
    assert tokens == ["<s>", "the", "film", "is", "very", "good", "</s>"]
    assert labels == [None, None, None, None, "very", "good", "</s>"]


def test_a_text_alone_is_learnt_whole():
    tokens, labels = causal("", "the film is good", bos=False)
    assert tokens == labels == ["the", "film", "is", "good", "</s>"]


def test_a_long_prompt_loses_its_beginning_and_the_completion_stays_whole():
    tokens, labels = causal("one two three four five", "very good", max_length=6)
    assert tokens == ["<s>", "four", "five", "very", "good", "</s>"]
    assert labels == [None, None, None, "very", "good", "</s>"]


def test_a_long_completion_loses_its_end_and_is_not_taught_to_stop_there():
    tokens, labels = causal("the film", "one two three four five six", max_length=5)
    assert tokens == ["<s>", "one", "two", "three", "four"]
    assert labels == [None, "one", "two", "three", "four"]


@given(prompt=st.integers(0, 9), completion=st.integers(1, 9), max_length=st.integers(4, 20))
def test_causal_rows_fit_and_learn_exactly_the_completion_that_is_left(prompt, completion, max_length):
    tokens, labels = causal(" ".join(["red"] * prompt), " ".join(["blue"] * completion), max_length=max_length)
    assert len(tokens) == len(labels) == min(max_length, 1 + prompt + completion + 1)
    learnt = [label for label in labels if label is not None]
    assert learnt == (["blue"] * completion + ["</s>"])[: max_length - 1]
    assert tokens[len(tokens) - len(learnt) :] == learnt


def test_a_length_that_the_model_cannot_read_names_the_limit():
    with pytest.raises(InputError, match=r"max_length=33 is more than the 32 tokens that the model can read\. Pass --max-length 32") as caught:
        encode(Examples(("a",), None, (0,)), tiny_bert_tokenizer(), task="classification", max_length=33)
    assert caught.value.code == "max-length"


# Batches


def numbered(num_rows: int) -> Encoded:
    """Row ``k`` holds the token ``k + 1``, ``k % 3 + 1`` times."""
    return Encoded("classification", tuple((row + 1,) * (row % 3 + 1) for row in range(num_rows)), None, tuple(range(num_rows)))


def rows_at(encoded: Encoded, step: int, *, batch_size: int, seed: int) -> list[int]:
    return batch_at(encoded, step=step, batch_size=batch_size, seed=seed, pad_token_id=0)["labels"].tolist()


@given(batch_size=st.integers(1, 5), num_batches=st.integers(1, 5), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_visits_every_row_once_when_batches_divide_it(batch_size, num_batches, seed, epoch):
    encoded = numbered(batch_size * num_batches)
    steps = range(epoch * num_batches, (epoch + 1) * num_batches)
    seen = [row for step in steps for row in rows_at(encoded, step, batch_size=batch_size, seed=seed)]
    assert sorted(seen) == list(range(len(encoded)))


@given(num_rows=st.integers(5, 12), batch_size=st.integers(1, 5), seed=st.integers(0, 9))
def test_batches_are_full_and_repeat_no_row_within_an_epoch(num_rows, batch_size, seed):
    encoded = numbered(num_rows)
    seen = [row for step in range(num_rows // batch_size) for row in rows_at(encoded, step, batch_size=batch_size, seed=seed)]
    assert len(seen) == len(set(seen)) == batch_size * (num_rows // batch_size)


@given(steps=st.lists(st.integers(0, 1000), min_size=1, max_size=8), seed=st.integers(0, 2**32))
def test_a_batch_depends_on_the_step_and_the_seed_only(steps, seed):
    encoded = numbered(10)
    first = [rows_at(encoded, step, batch_size=3, seed=seed) for step in steps]
    torch.rand(3)
    again = [rows_at(encoded, step, batch_size=3, seed=seed) for step in reversed(steps)]
    assert first == again[::-1]


def test_epochs_and_seeds_have_orders_of_their_own():
    encoded = numbered(50)
    orders = {tuple(rows_at(encoded, step, batch_size=50, seed=seed)) for step in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_drawing_a_batch_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    batch_at(numbered(8), step=3, batch_size=2, seed=0, pad_token_id=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_are_padded_on_the_right_to_the_longest_of_the_batch_and_no_further():
    encoded = Encoded("classification", ((5,), (6, 7, 8), (9, 9, 9, 9, 9)), ((0,), (0, 1, 1), (0,) * 5), (1, 0, 1))
    batch = next(eval_batches(encoded, batch_size=2, pad_token_id=3))
    assert batch["input_ids"].tolist() == [[5, 3, 3], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0], [0, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]


def test_labels_have_the_type_that_the_loss_needs():
    scores = Encoded("regression", ((5,), (6,)), None, (0.5, 1.5))
    assert batch_at(scores, step=0, batch_size=2, seed=0, pad_token_id=0)["labels"].dtype == torch.float32
    assert batch_at(numbered(2), step=0, batch_size=2, seed=0, pad_token_id=0)["labels"].dtype == torch.int64


def test_padding_of_causal_rows_is_not_learnt():
    encoded = Encoded("causal-lm", ((5, 6), (7, 8, 9)), None, ((IGNORED, 6), (7, 8, 9)))
    batch = next(eval_batches(encoded, batch_size=2, pad_token_id=0))
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED], [7, 8, 9]]
    assert "token_type_ids" not in batch


@given(num_rows=st.integers(1, 12), batch_size=st.integers(1, 5))
def test_measuring_sees_every_row_once_with_its_own_target(num_rows, batch_size):
    batches = list(eval_batches(numbered(num_rows), batch_size=batch_size, pad_token_id=0))
    assert sorted(row for batch in batches for row in batch["labels"].tolist()) == list(range(num_rows))
    for batch in batches:
        assert (batch["input_ids"][:, 0] == batch["labels"] + 1).all()


@pytest.mark.parametrize("batch_size", [0, 4])
def test_a_batch_larger_than_the_data_is_refused(batch_size):
    match = rf"batch_size={batch_size} does not fit 3 rows to train on: it must be between 1 and 3\. Pass --batch-size 3 or less, or more data"
    with pytest.raises(InputError, match=match) as caught:
        check_batch_fits(3, batch_size)
    assert caught.value.code == "too-few-rows"
    with pytest.raises(InputError, match=match):
        batch_at(numbered(3), step=0, batch_size=batch_size, seed=0, pad_token_id=0)


# The real thing


def test_glue_files_are_read_as_they_are(repository):
    glue = repository.parent / "shared" / "data" / "glue"
    if not glue.is_dir():
        pytest.skip(f"needs the GLUE files in {glue}")
    rte, stsb, cola = (read(glue / f"{name}.validation.tsv.gz") for name in ("rte", "stsb", "cola"))
    assert (rte.task, stsb.task, cola.task) == ("classification", "regression", "classification")
    assert (len(rte.train) + len(rte.valid), len(stsb.train) + len(stsb.valid), len(cola.train) + len(cola.valid)) == (277, 1500, 1043)
    assert rte.train.pairs is not None
    assert cola.train.pairs is None
    assert 0 <= min(stsb.train.targets or ()) < max(stsb.train.targets or ()) <= 5
