from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partwise.checks import InputError
from partwise.tune._data import DataSettings, read_task_data, split_rows
from task_files import ROWS, read, refused, write_csv, write_json_lines


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
