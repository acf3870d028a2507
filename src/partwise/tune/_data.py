"""What a task is made of: rows of text with targets, split into a part to train on and a part to measure on. Reading is deterministic."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partwise.checks import InputError, check_choice

if TYPE_CHECKING:
    from partwise.tune._columns import Layout
    from partwise.tune._tables import Table

Task = Literal["classification", "regression", "causal-lm"]
TASKS = ("classification", "regression", "causal-lm")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which rows to learn from, and what their columns mean.

    Parameters
    ----------
    data : str, optional
        A csv, tsv, jsonl, json or parquet file, a folder with train.* and perhaps validation.*, or a Hugging Face data set id (id or id:configuration).
        Without it, the docstrings of Python's standard library: which package does a docstring come from?
    task : {"classification", "regression", "causal-lm"}, optional
        What to predict. Without it, the columns decide: labels that are strings or few integers are classes, numbers with a fraction are scores; a prompt
        with a completion, or a text alone, is causal-lm.
    text : str, optional
        Column with the text. Found by its name if not given, as all columns are.
    text_pair : str, optional
        Column with a second text that is read together with the first.
    label : str, optional
        Column with the class or the score.
    prompt : str, optional
        Column with the prompt (causal-lm). It is put before the completion as it stands, nothing in between, and is not itself learnt.
    completion : str, optional
        Column with the text to be generated after the prompt (causal-lm).
    valid_fraction : float, default=0.2
        Share of the rows to hold out where the data have no validation or test rows. The same rows every time; each class gives its share.
    max_length : int, default=128
        Longest input in tokens; the rest of a text is cut off. A long prompt loses its beginning, a long completion its end.

    Raises
    ------
    InputError
        ``unknown-choice``, ``valid-fraction`` or ``max-length`` for a value that cannot be used.
    """

    data: str | None = None
    task: Task | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    valid_fraction: float = 0.2
    max_length: int = 128

    def __post_init__(self) -> None:
        if self.task is not None:
            check_choice(self.task, TASKS, name="task")
        if not 0 < self.valid_fraction < 1:
            raise InputError("valid-fraction", f"valid_fraction={self.valid_fraction} must be between 0 and 1. Pass 0.2 to hold out every fifth row.")
        if self.max_length < 4:
            raise InputError("max-length", f"max_length={self.max_length} tokens cannot hold a text, expected at least 4. Pass for example 128.")


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


def read_task_data(settings: DataSettings, *, seed: int = 0) -> TaskData:
    """Read the rows that the settings name, find out what is to be predicted, and hold out rows where the source does not.

    Parameters
    ----------
    settings : DataSettings
        Source and columns.
    seed : int, default=0
        Decides which rows are held out. Leave it as it is where runs with different seeds are to be measured on the same rows.

    Returns
    -------
    TaskData
        Rows in the order of the source.

    Raises
    ------
    InputError
        When the source cannot be read (see ``read_tables``), its columns cannot be used (see ``find_columns``, ``text_column``, ``label_column``,
        ``class_targets``), or it has too few rows to hold any out (``too-few-rows``).
    """
    if settings.data is None:
        from partwise.tune.demo import demo_examples

        _check_fits_demo(settings)
        return demo_examples(seed)
    from partwise.tune._columns import check_column, find_columns
    from partwise.tune._tables import read_tables

    train, valid = read_tables(settings.data)
    layout = find_columns(train, settings)
    tables = [train] if valid is None else [train, valid]
    for table in tables:
        for column in layout.names():
            check_column(table, column, flag="in use for the training rows")
    task, label_names, parts = _examples(tables, layout, settings)
    name = Path(settings.data).name if Path(settings.data).exists() else settings.data
    if valid is None:
        parts = _held_out(parts[0], train, settings.valid_fraction, seed=seed, stratify=task == "classification")
    return task_data(task, name, parts[0], parts[1], label_names=label_names)


def _check_fits_demo(settings: DataSettings) -> None:
    named = [field for field in ("text", "text_pair", "label", "prompt", "completion") if getattr(settings, field) is not None]
    if named or settings.task not in (None, "classification"):
        what = f"--task {settings.task}" if not named else ", ".join("--" + field.replace("_", "-") for field in named)
        raise InputError(
            "data-missing",
            f"{what} was given without --data, and the built-in docstrings are a classification task with fixed columns. Pass --data too.",
        )


def _examples(tables: Sequence[Table], layout: Layout, settings: DataSettings) -> tuple[Task, tuple[str, ...], list[Examples]]:
    """Task, names of its classes, and the rows of every table."""
    from partwise.tune._columns import class_targets, find_task, label_column, score_targets, text_column

    if layout.label is None:
        return "causal-lm", (), [_completions(table, layout) for table in tables]
    name = layout.label
    label_names: tuple[str, ...] = ()
    labels = [label_column(table, name) for table in tables]
    task = settings.task or find_task([label for column in labels for label in column], tables[0], name)
    targets: list[Any]
    if task == "classification":
        label_names, targets = class_targets(labels, tables[0], name)
    else:
        targets = [score_targets(column, table, name) for column, table in zip(labels, tables, strict=True)]
    assert layout.text is not None  # a layout with a label has a text
    texts = [text_column(table, layout.text) for table in tables]
    pairs = [None if layout.pair is None else text_column(table, layout.pair) for table in tables]
    return task, label_names, [Examples(*part) for part in zip(texts, pairs, targets, strict=True)]


def _completions(table: Table, layout: Layout) -> Examples:
    from partwise.tune._columns import text_column

    assert layout.pair is not None  # a layout without a label has a completion
    completions = text_column(table, layout.pair)
    prompts = ("",) * len(completions) if layout.text is None else text_column(table, layout.text, may_be_empty=True)
    if layout.context is not None:
        contexts = text_column(table, layout.context, may_be_empty=True)
        prompts = tuple(f"{prompt}\n{context}" if context else prompt for prompt, context in zip(prompts, contexts, strict=True))
    return Examples(prompts, completions, None)


def _held_out(examples: Examples, table: Table, fraction: float, *, seed: int, stratify: bool) -> list[Examples]:
    strata = [int(target) for target in examples.targets] if stratify and examples.targets is not None else None
    num_rows = len(examples)
    train, valid = split_rows(num_rows, num_valid=max(1, round(fraction * num_rows)), seed=seed, strata=strata)
    if not valid:
        classes = "" if strata is None else f" in {len(set(strata))} classes"
        raise InputError(
            "too-few-rows",
            f"{table.name} has {num_rows} row{'s' if num_rows > 1 else ''}{classes}, too few to hold any out: one row of each class must stay to train on. "
            "Add rows, or pass a folder with train.* and validation.*.",
        )
    return [examples.rows(train), examples.rows(valid)]
