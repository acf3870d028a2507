from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partwise.checks import InputError
from partwise.train import _arrays
from partwise.train._arrays import PARTS, as_images, as_rows, read_samples


def samples(num: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 2.0, (num, *shape))


def labels(num: int, *, classes: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(num) % classes)


def save(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "data.npz", **arrays)
    return str(folder / "data.npz")


# What is held out


@given(counts=st.lists(st.integers(20, 60), min_size=2, max_size=5), fraction=st.sampled_from([0.05, 0.15, 0.2]), seed=st.integers(0, 3))
def test_a_split_is_disjoint_complete_and_takes_its_share_of_every_class(counts: list[int], fraction: float, seed: int):
    classes = np.random.default_rng(9).permutation(np.repeat(np.arange(len(counts)), counts))
    parts = _arrays._split(classes, valid_fraction=fraction, with_test=True, seed=seed, name="x")
    assert sorted(index for part in parts.values() for index in part.tolist()) == list(range(len(classes)))
    for part, share in {"valid": fraction, "test": fraction, "calibration": fraction / 2}.items():
        taken = np.bincount(classes[parts[part]], minlength=len(counts))
        assert (np.abs(taken - share * np.array(counts)) < 2).all()


def test_no_more_samples_are_held_out_for_validation_than_are_worth_measuring_on():
    parts = _arrays._split(labels(30_000), valid_fraction=0.2, with_test=True, seed=0, name="x")
    assert {part: len(indices) for part, indices in parts.items()} == {"train": 21_000, "valid": 2000, "test": 6000, "calibration": 1000}


def test_the_seed_decides_which_samples_are_held_out():
    first, again, other = (read_samples(None, seed=seed) for seed in (0, 0, 1))
    for part in PARTS:
        np.testing.assert_array_equal(first.inputs[part], again.inputs[part])
        np.testing.assert_array_equal(first.indices[part], again.indices[part])
    assert first.sha256 == other.sha256
    assert first.indices["test"].tolist() != other.indices["test"].tolist()


def test_a_test_set_of_the_file_is_tested_on_whole_and_never_trained_on(tmp_path: Path):
    x, y = samples(60, 4), labels(60)
    found = read_samples(save(tmp_path, x_train=x, y_train=y, x_test=samples(20, 4, seed=1), y_test=labels(20)))
    assert len(found.inputs["test"]) == 20
    assert sorted(np.concatenate([found.indices[part] for part in ("train", "valid", "calibration")]).tolist()) == list(range(60))
    raw = samples(20, 4, seed=1).astype(np.float32)
    mean, deviation = x.astype(np.float32)[found.indices["train"]].mean(0), x.astype(np.float32)[found.indices["train"]].std(0)
    np.testing.assert_allclose(found.inputs["test"], (raw - mean) / deviation, atol=1e-5)


def test_the_digest_changes_with_any_number_and_any_class(tmp_path: Path):
    x, y = samples(60, 4), labels(60)
    before = read_samples(save(tmp_path, x=x, y=y)).sha256
    x[7, 2] += 1e-3
    changed = read_samples(save(tmp_path, x=x, y=y)).sha256
    y[0] = (y[0] + 1) % 3
    assert len({before, changed, read_samples(save(tmp_path, x=x, y=y)).sha256}) == 3


# Numbers


def test_images_are_standardised_by_channel_and_rows_by_feature_of_the_training_part(tmp_path: Path):
    images = read_samples(save(tmp_path, x=samples(80, 3, 5, 5) * [[[[1]], [[9]], [[0.1]]]], y=labels(80))).inputs
    np.testing.assert_allclose(images["train"].mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(images["train"].std((0, 2, 3)), 1, atol=1e-5)
    assert np.abs(images["test"].mean((0, 2, 3))).max() > 1e-4  # not by its own
    x = samples(80, 4)
    x[:, 2] = 5.0
    rows = read_samples(save(tmp_path, x=x, y=labels(80))).inputs["train"]
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(rows.std(0), [1, 1, 0, 1], atol=1e-5)
    assert rows.dtype == np.float32


def test_images_come_with_their_channels_in_front_however_they_lie(tmp_path: Path):
    x = samples(60, 6, 5, 3)
    last = read_samples(save(tmp_path, x=x, y=labels(60))).inputs["train"]
    first = read_samples(save(tmp_path, x=x.transpose(0, 3, 1, 2), y=labels(60))).inputs["train"]
    np.testing.assert_array_equal(last, first)
    assert last.shape[1:] == (3, 6, 5)
    assert read_samples(save(tmp_path, x=samples(60, 6, 5), y=labels(60))).inputs["train"].shape[1:] == (1, 6, 5)


def test_bytes_become_fractions_before_they_are_compared(tmp_path: Path):
    array = _arrays._numbers(np.array([[0, 51, 255]], dtype=np.uint8), name="x")
    np.testing.assert_allclose(array, [[0, 0.2, 1]])


def test_images_become_rows_for_perceptrons_and_rows_are_no_images(tmp_path: Path):
    digits = read_samples(None)
    assert digits.inputs["train"].shape[1:] == (1, 8, 8)
    rows = as_rows(digits)
    np.testing.assert_array_equal(rows.inputs["valid"], digits.inputs["valid"].reshape(-1, 64))
    assert as_images(digits) is digits
    with pytest.raises(InputError, match="has rows of 64 features, expected images") as caught:
        as_images(rows)
    assert caught.value.code == "data-shape"


def test_a_dataset_has_pairs_of_sample_and_class():
    digits = read_samples(None)
    image, target = digits.dataset("train")[3]
    assert image.shape == (1, 8, 8)
    assert int(target) == digits.classes["train"][3]
    assert digits.class_names == tuple("0123456789")


def test_class_names_are_sorted_as_numbers_or_strings(tmp_path: Path):
    y = labels(60, classes=12)
    assert read_samples(save(tmp_path, x=samples(60, 4), y=y), valid_fraction=0.05).class_names == tuple(map(str, range(12)))
    names = np.array(["cat", "ant", "bee"])[labels(60)]
    found = read_samples(save(tmp_path, x=samples(60, 4), y=names))
    assert found.class_names == ("ant", "bee", "cat")
    assert [found.class_names[index] for index in found.classes["valid"]] == names[found.indices["valid"]].tolist()


@pytest.mark.parametrize("header", ["", "length,width,kind\n"])
def test_a_csv_file_has_its_classes_in_the_last_column(tmp_path: Path, header: str):
    rows = [(value / 7, -value, value % 3 + 9) for value in range(60)]
    (tmp_path / "rows.csv").write_text(header + "".join(f"{a},{b},{label}\n" for a, b, label in rows))
    found = read_samples(str(tmp_path / "rows.csv"))
    assert found.class_names == ("9", "10", "11")
    for part in PARTS:
        assert [found.class_names[index] for index in found.classes[part]] == [str(rows[index][2]) for index in found.indices[part]]


# Bad input

X, Y = samples(60, 4), labels(60)
WITH_NAN = X.copy()
WITH_NAN[[7, 9], [3, 0]] = np.nan, np.inf


@pytest.mark.parametrize(
    ("code", "arrays", "match"),
    [
        ("not-finite", {"x": WITH_NAN, "y": Y}, r"x of data\.npz has 2 NaN or infinite entries out of 240, the first in sample 7 at \(3,\)"),
        ("not-finite", {"x": X * 1e300, "y": Y}, "has 240 NaN or infinite entries"),
        ("label-count", {"x": X, "y": Y[:-1]}, r"y of data\.npz has shape \(59,\), expected \(60,\): one class for each sample of x"),
        ("label-count", {"x": X, "y": np.eye(3)[Y]}, r"has shape \(60, 3\)"),
        ("label-type", {"x": X, "y": Y + 0.5}, "entries of type float64, expected integers or strings"),
        ("one-class", {"x": X, "y": Y * 0 + 4}, "all 60 samples .* have the class 4"),
        ("object-array", {"x": X, "y": np.array([1, "a", None] * 20, dtype=object)}, "array of Python objects"),
        ("not-numbers", {"x": X.astype(str), "y": Y}, "entries of type <U"),
        ("not-numbers", {"x": X.astype(complex), "y": Y}, "entries of type complex128"),
        ("data-shape", {"x": X[:, 0], "y": Y}, r"has shape \(60,\), expected rows"),
        ("data-shape", {"x": X[:0], "y": Y[:0]}, r"has shape \(0, 4\)"),
        ("data-shape", {"x": samples(60, 5, 7, 6), "y": Y}, r"has shape \(60, 5, 7, 6\), expected images of 1, 3 or 4 channels"),
        ("data-shape", {"x_train": X, "y_train": Y, "x_test": X[:, 1:], "y_test": Y}, r"x_test .* has samples of shape \(3,\), expected \(4,\)"),
        (
            "unseen-label",
            {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y + 1},
            r"y_test .* has the class 3, expected only classes that y_train has",
        ),
        ("array-not-named", {"images": X, "y": Y}, "holds these arrays: images, y; expected x_train"),
        ("too-few-rows", {"x": X[:6], "y": Y[:6]}, "has 6 samples in 3 classes, too few to hold valid, test, calibration out"),
        ("too-few-rows", {"x": X, "y": np.arange(60)}, "has 60 samples in 60 classes"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path: Path, code: str, arrays: dict[str, Any], match: str):
    with pytest.raises(InputError, match=match) as caught:
        read_samples(save(tmp_path, **arrays))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("code", "name", "content", "match"),
    [
        ("broken-file", "data.npz", b"PK", "is no sound .npz file: it is cut short"),
        ("unknown-format", "data.npy", b"", r"has \.npy, expected one of \.npz, \.csv"),
        ("not-numbers", "data.csv", b"1,2,a\n3,x,b\n", "has 'x' in line 2, column 2, expected a number"),
        ("broken-file", "data.csv", b"1,2,a\n3,b\n", "has 2 fields in line 2, expected 3"),
        ("missing-label", "data.csv", b"1,2,a\n3,4,\n", "has 1 rows without a class, the first in line 2"),
        ("data-shape", "data.csv", b"a,b,kind\n", "has no rows of at least one feature and a class"),
        ("data-shape", "data.csv", b"", "has no rows"),
        ("not-finite", "data.csv", b"1,2,a\n3,nan,b\n", r"has 1 NaN .* sample 1 at \(1,\)"),
        ("wrong-encoding", "data.csv", b"1,2,caf\xe9\n", "is not UTF-8 text"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, code: str, name: str, content: bytes, match: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match) as caught:
        read_samples(str(tmp_path / name))
    assert caught.value.code == code


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"there is no file .*none\.npz") as caught:
        read_samples(str(tmp_path / "none.npz"))
    assert caught.value.code == "data-not-found"
