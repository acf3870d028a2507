"""What a task is made of: rows of text with targets, split into a part to train on and a part to measure on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Task = Literal["classification", "regression", "causal-lm"]


@dataclass(frozen=True)
class Examples:
    """Rows of text with what is to be predicted.

    Parameters
    ----------
    texts : tuple of str
        First text of every row; for causal-lm the prompt, which may be empty.
    pairs : tuple of str or None
        Second text of every row; for causal-lm the completion.
    targets : tuple of int, tuple of float or None
        Class of every row (an index into ``TaskData.label_names``), its score, or None for causal-lm.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    targets: tuple[int, ...] | tuple[float, ...] | None

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, indices: Sequence[int]) -> Examples:
        """The rows at ``indices``, in that order."""
        pairs = None if self.pairs is None else tuple(self.pairs[index] for index in indices)
        targets = None if self.targets is None else tuple(self.targets[index] for index in indices)
        return Examples(tuple(self.texts[index] for index in indices), pairs, targets)


@dataclass(frozen=True)
class TaskData:
    """A task with its data: what to predict, rows to train on, rows to measure on.

    Parameters
    ----------
    task : {"classification", "regression", "causal-lm"}
        What is predicted.
    name : str
        File, folder or data set id that the rows come from.
    train, valid : Examples
        Rows to train on and rows held out.
    label_names : tuple of str
        Name of every class, in the order of the targets; empty when the task is not classification.
    fingerprint : str
        SHA-256 of the task, the label names and all rows in order. Equal fingerprints mean equal data and an equal split.
    """

    task: Task
    name: str
    train: Examples
    valid: Examples
    label_names: tuple[str, ...]
    fingerprint: str


def task_data(task: Task, name: str, train: Examples, valid: Examples, *, label_names: tuple[str, ...] = ()) -> TaskData:
    """A ``TaskData`` with its fingerprint computed."""
    digest = hashlib.sha256(json.dumps([task, label_names, len(train), len(valid)]).encode())
    for examples in (train, valid):
        for index, text in enumerate(examples.texts):
            pair = None if examples.pairs is None else examples.pairs[index]
            target = None if examples.targets is None else examples.targets[index]
            digest.update(json.dumps([text, pair, target]).encode() + b"\n")
    return TaskData(task, name, train, valid, label_names, digest.hexdigest())


def split_rows(num_rows: int, *, num_valid: int, seed: int, strata: Sequence[int] | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose rows to hold out.

    Parameters
    ----------
    num_rows : int
        Rows in all.
    num_valid : int
        Rows to hold out. Fewer are held out only where classes are so small that each could not keep a row to train on.
    seed : int
        Same seed, same split.
    strata : sequence of int, optional
        Class of every row. Each class then gives its share of the held-out rows, within one row, and keeps at least one to train on.

    Returns
    -------
    tuple of (tuple of int, tuple of int)
        Rows to train on and rows held out, both ascending; together they are ``range(num_rows)``.
    """
    generator = random.Random(seed)
    groups: dict[int, list[int]] = {}
    for row in range(num_rows):
        groups.setdefault(0 if strata is None else strata[row], []).append(row)
    shares = {key: num_valid * len(group) / num_rows for key, group in groups.items()}
    counts = {key: min(int(shares[key]), len(group) - 1) for key, group in groups.items()}
    for key in sorted(groups, key=lambda key: (counts[key] - shares[key], key)):  # largest remainder first
        if sum(counts.values()) < num_valid and counts[key] < len(groups[key]) - 1:
            counts[key] += 1
    held_out: set[int] = set()
    for key in sorted(groups):
        held_out.update(generator.sample(groups[key], counts[key]))
    train = tuple(row for row in range(num_rows) if row not in held_out)
    return train, tuple(sorted(held_out))
