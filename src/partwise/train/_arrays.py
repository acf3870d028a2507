"""Samples with classes to train on: read from .npz or .csv, split, standardised. Reading is deterministic."""

from __future__ import annotations

import csv
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from partwise.checks import InputError, load_extra

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PARTS", "Samples", "as_images", "as_rows", "read_samples"]

PARTS = ("train", "valid", "test", "calibration")
CHANNELS = (1, 3, 4)  # numbers of channels by which the layout of images is told
SUFFIXES = (".npz", ".csv")
MOST_HELD_OUT = {"valid": 2000, "calibration": 1000}  # samples; more would take longer to measure on than they tell


@dataclass(frozen=True)
class Samples:
    """Samples with their classes, in four parts.

    Parameters
    ----------
    name : str
        File that they come from.
    inputs : mapping of str to ndarray
        Part -> float32 numbers, standardised by those to train on: (sample, feature), or (sample, channel, height, width).
    classes : mapping of str to ndarray
        Part -> int64 class of every sample.
    class_names : tuple of str
        What the classes were called.
    indices : mapping of str to ndarray
        Part -> position of every sample in the array it was taken from.
    sha256 : str
        Digest of all numbers and classes as they were read.
    """

    name: str
    inputs: Mapping[str, NDArray[np.float32]]
    classes: Mapping[str, NDArray[np.int64]]
    class_names: tuple[str, ...]
    indices: Mapping[str, NDArray[np.int64]]
    sha256: str

    def dataset(self, part: str) -> TensorDataset:
        """Pairs of a sample and its class."""
        return TensorDataset(torch.from_numpy(self.inputs[part]), torch.from_numpy(self.classes[part]))


def read_samples(data: str | None, *, valid_fraction: float = 0.15, seed: int = 0) -> Samples:
    """Read samples, hold some out of every class, and standardise all by the mean and the deviation of those to train on.

    Images are standardised channel by channel, rows feature by feature.

    Parameters
    ----------
    data : str or None
        A ``.npz`` file with ``x_train``, ``y_train``, ``x_test`` and ``y_test``, or ``x`` and ``y``: rows (n, d), or images (n, h, w), (n, h, w, c) or
        (n, c, h, w) of 1, 3 or 4 channels. Or a ``.csv`` file whose last column has the classes. None is the handwritten digits of scikit-learn.
    valid_fraction : float, default=0.15
        Share of the samples in ``valid``, and in ``test`` where the file does not say which those are; ``calibration`` gets half as much. No more than
        2000 in ``valid`` and 1000 in ``calibration``.
    seed : int, default=0
        Of the choice of samples.

    Raises
    ------
    InputError
        ``data-not-found``, ``file-unreadable``, ``unknown-format``, ``broken-file``, ``object-array``, ``array-not-named``, ``data-shape``, ``not-numbers``,
        ``not-finite``, ``label-count``, ``label-type``, ``missing-label``, ``unseen-label``, ``one-class`` or ``too-few-rows``.
    MissingExtra
        When ``data`` is None and scikit-learn is not installed.
    """
    if data is None:
        name, arrays = "scikit-learn digits", _digits()
    else:
        path = Path(data).expanduser()
        name, arrays = path.name, _read(path)
    groups = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")} if "x_train" in arrays else {"train": ("x", "y")}
    inputs = {part: _numbers(arrays[x], name=f"{x} of {name}") for part, (x, _) in groups.items()}
    for part, (x, y) in groups.items():
        _check_labels(arrays[y], len(inputs[part]), x=x, y=f"{y} of {name}")
        if inputs[part].shape[1:] != inputs["train"].shape[1:]:
            raise InputError(
                "data-shape", f"{x} of {name} has samples of shape {inputs[part].shape[1:]}, expected {inputs['train'].shape[1:]} as in x_train."
            )
    class_names, classes = _classes({part: arrays[y] for part, (_, y) in groups.items()}, name)
    digest = _digest(inputs, classes)
    indices = _split(classes["train"], valid_fraction=valid_fraction, with_test="test" not in inputs, seed=seed, name=name)
    origin = dict.fromkeys(indices, "train")
    if "test" in inputs:
        indices["test"], origin["test"] = np.arange(len(inputs["test"])), "test"
    parts = {part: inputs[origin[part]][indices[part]] for part in PARTS}
    return Samples(
        name,
        _standardised(parts),
        {part: classes[origin[part]][indices[part]] for part in PARTS},
        class_names,
        {part: indices[part] for part in PARTS},
        digest,
    )


def as_images(samples: Samples) -> Samples:
    """Samples for convolutional networks.

    Raises
    ------
    InputError
        ``data-shape`` when they are rows.
    """
    if samples.inputs["train"].ndim != 4:
        width = samples.inputs["train"].shape[1]
        raise InputError(
            "data-shape",
            f"{samples.name} has rows of {width} features, expected images (n, h, w), (n, h, w, c) or (n, c, h, w) for a convolutional network. Pass images, "
            "or train on rows with --model mlp.",
        )
    return samples


def as_rows(samples: Samples) -> Samples:
    """Samples for perceptrons: images as rows of their pixels."""
    inputs = {part: np.ascontiguousarray(array.reshape(len(array), -1)) for part, array in samples.inputs.items()}
    return Samples(samples.name, inputs, samples.classes, samples.class_names, samples.indices, samples.sha256)


def _digits() -> dict[str, NDArray[Any]]:
    found = load_extra("sklearn.datasets", extra="sklearn").load_digits()
    return {"x": found.images, "y": found.target}  # (sample, height, width) of 0 to 16


def _read(path: Path) -> dict[str, NDArray[Any]]:
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            "unknown-format", f"{path} has {path.suffix or 'no ending'}, expected one of {', '.join(SUFFIXES)}. Save the samples as one of these."
        )
    if not path.is_file():
        raise InputError("data-not-found", f"there is no file {str(path)!r} in {Path.cwd()}. Check --data.")
    try:
        return _read_npz(path) if path.suffix.lower() == ".npz" else _read_csv(path)
    except OSError as error:
        raise InputError("file-unreadable", f"cannot read {path}: {error.strerror or error}. Check the file and its permissions.") from error


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is cut short, or no .npz file at all")
        with np.load(path, allow_pickle=False) as arrays:
            names = sorted(arrays)
            for wanted in (("x_train", "y_train", "x_test", "y_test"), ("x", "y")):
                if set(wanted) <= set(names):
                    return {name: arrays[name] for name in wanted}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        if "allow_pickle" in str(error):
            raise InputError(
                "object-array",
                f"{path} holds an array of Python objects, which would have to be unpickled. Convert it to numbers or strings before saving.",
            ) from error
        raise InputError("broken-file", f"{path} is no sound .npz file: {str(error).strip().rstrip('.')}. Export it again.") from error
    raise InputError(
        "array-not-named",
        f"{path} holds these arrays: {', '.join(names) or 'none'}; expected x_train, y_train, x_test and y_test, or x and y. Save it with these names.",
    )


def _read_csv(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if row]
    except UnicodeDecodeError as error:
        raise InputError("wrong-encoding", f"{path} is not UTF-8 text. Convert it, for example with iconv -f latin1 -t utf-8.") from error
    except csv.Error as error:
        raise InputError("broken-file", f"{path} is no sound .csv file: {error}. Export it again.") from error
    if lines and not all(_is_number(field) for field in lines[0][1][:-1]):
        del lines[0]  # names of the columns
    if not lines or len(lines[0][1]) < 2:
        raise InputError("data-shape", f"{path} has no rows of at least one feature and a class, expected features and, last, a class. Check --data.")
    width = len(lines[0][1])
    for number, row in lines:
        if len(row) != width:
            raise InputError("broken-file", f"{path} has {len(row)} fields in line {number}, expected {width}. Repair or export it again.")
        bad = next((column for column, field in enumerate(row[:-1], start=1) if not _is_number(field)), None)
        if bad is not None:
            raise InputError(
                "not-numbers", f"{path} has {row[bad - 1]!r} in line {number}, column {bad}, expected a number. Drop the row, or encode it."
            )
    labels = [row[-1].strip() for _, row in lines]
    if not all(labels):
        missing = [number for (number, _), label in zip(lines, labels, strict=True) if not label]
        raise InputError("missing-label", f"{path} has {len(missing)} rows without a class, the first in line {missing[0]}. Remove or fill them.")
    return {"x": np.array([[float(field) for field in row[:-1]] for _, row in lines]), "y": _integers(labels)}


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _integers(labels: Sequence[str]) -> NDArray[Any]:
    """Labels as integers where all of them are, so that 10 comes after 9."""
    return np.array([int(label) for label in labels] if all(label.lstrip("+-").isdecimal() for label in labels) else labels)


def _numbers(array: NDArray[Any], *, name: str) -> NDArray[np.float32]:
    """Inputs as float32, images with their channels in front."""
    if array.dtype.kind not in "buif":
        raise InputError("not-numbers", f"{name} has entries of type {array.dtype}, expected integers or floats. Encode them as numbers.")
    if array.ndim not in (2, 3, 4) or not array.size:
        raise InputError(
            "data-shape",
            f"{name} has shape {array.shape}, expected rows (n, d) or images (n, h, w), (n, h, w, c) or (n, c, h, w). Reshape it and save again.",
        )
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        numbers = array.astype(np.float32) / np.float32(255 if array.dtype == np.uint8 else 1)
    finite = np.isfinite(numbers)
    if not finite.all():
        sample, *place = np.argwhere(~finite)[0].tolist()
        raise InputError(
            "not-finite",
            f"{name} has {int((~finite).sum())} NaN or infinite entries out of {array.size}, the first in sample {sample} at {tuple(place)}. "
            "Remove or fill them.",
        )
    if array.ndim == 3:
        return numbers[:, None]
    if array.ndim == 4 and array.shape[1] not in CHANNELS:
        if array.shape[3] not in CHANNELS:
            raise InputError("data-shape", f"{name} has shape {array.shape}, expected images of 1, 3 or 4 channels in the second or the last place.")
        return np.ascontiguousarray(numbers.transpose(0, 3, 1, 2))
    return numbers


def _check_labels(labels: NDArray[Any], num_samples: int, *, x: str, y: str) -> None:
    if labels.shape != (num_samples,):
        raise InputError(
            "label-count", f"{y} has shape {labels.shape}, expected ({num_samples},): one class for each sample of {x}. Check both arrays."
        )
    if labels.dtype.kind not in "buiU":
        raise InputError("label-type", f"{y} has entries of type {labels.dtype}, expected integers or strings. Save one plain class per sample.")


def _classes(labels: Mapping[str, NDArray[Any]], name: str) -> tuple[tuple[str, ...], dict[str, NDArray[np.int64]]]:
    """Names of the classes to train on, and every label as an index into them."""
    known = np.unique(labels["train"])
    if len(known) < 2:
        raise InputError(
            "one-class", f"all {len(labels['train'])} samples of {name} to train on have the class {known[0]!s}, expected two or more classes."
        )
    for part, values in labels.items():
        unseen = np.setdiff1d(values, known)
        if len(unseen):
            raise InputError(
                "unseen-label",
                f"y_{part} of {name} has the class {unseen[0]!s}, expected only classes that y_train has. Add samples of it there, or remove it here.",
            )
    return tuple(map(str, known.tolist())), {part: np.searchsorted(known, values).astype(np.int64) for part, values in labels.items()}


def _digest(inputs: Mapping[str, NDArray[np.float32]], classes: Mapping[str, NDArray[np.int64]]) -> str:
    digest = hashlib.sha256()
    for part in inputs:
        digest.update(f"{part} {inputs[part].shape}\n".encode())
        digest.update(np.ascontiguousarray(inputs[part]).tobytes() + classes[part].tobytes())
    return digest.hexdigest()


def _split(classes: NDArray[np.int64], *, valid_fraction: float, with_test: bool, seed: int, name: str) -> dict[str, NDArray[np.int64]]:
    """Hold samples out, of every class its share within one sample."""
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(len(classes))
    left = drawn[np.argsort(classes[drawn], kind="stable")]  # class after class, each in an order of its own
    shares = {"valid": valid_fraction, "test": valid_fraction if with_test else 0.0, "calibration": valid_fraction / 2}
    shares |= {part: min(shares[part], most / len(classes)) for part, most in MOST_HELD_OUT.items()}
    parts = {}
    for part, share in shares.items():
        if share:
            ends = np.floor(np.arange(len(left) + 1) * (share * len(classes) / len(left)) + 0.5)
            taken = np.diff(ends) > 0
            parts[part], left = np.sort(left[taken]), left[~taken]
    if not all(map(len, parts.values())) or not set(classes) <= set(classes[left]):
        raise InputError(
            "too-few-rows",
            f"{name} has {len(classes)} samples in {len(set(classes.tolist()))} classes, too few to hold {', '.join(parts)} out and keep one of each class to "
            "train on. Add samples, or pass another --valid-fraction.",
        )
    return {"train": np.sort(left), **parts}


def _standardised(parts: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    train = parts["train"]
    axes = (0, 2, 3) if train.ndim == 4 else (0,)
    mean = train.mean(axis=axes, keepdims=True, dtype=np.float64).astype(np.float32)
    deviation = (train - mean).std(axis=axes, keepdims=True, dtype=np.float64).astype(np.float32)
    deviation[deviation == 0] = 1.0  # what never varies says nothing; it becomes zero
    return {part: (array - mean) / deviation for part, array in parts.items()}
