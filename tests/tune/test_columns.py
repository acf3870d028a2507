from __future__ import annotations

import pytest

from partwise.checks import InputError
from task_files import ROWS, labelled, read, refused, write_csv, write_json_lines


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


# Bad input


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
