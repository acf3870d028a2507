"""What a task is made of: rows of text with targets, split into a part to train on and a part to measure on, and batches of them.

Reading is deterministic, and a batch is a pure function of the step and the seed, so that a resumed run sees the same rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partwise.checks import InputError, check_choice

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from partwise.tune._columns import Layout
    from partwise.tune._tables import Table

Task = Literal["classification", "regression", "causal-lm"]
TASKS = ("classification", "regression", "causal-lm")
IGNORED = -100
"""Label of a token that is not to be predicted."""


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


@dataclass(frozen=True)
class Encoded:
    """Rows as token numbers, not yet padded.

    Parameters
    ----------
    task : {"classification", "regression", "causal-lm"}
        What is predicted.
    input_ids : tuple of tuple of int
        Tokens of every row.
    token_type_ids : tuple of tuple of int or None
        Which text a token belongs to, where the tokenizer tells.
    targets : tuple
        Class or score of every row; for causal-lm a label for every token, -100 where none is to be predicted.
    """

    task: Task
    input_ids: tuple[tuple[int, ...], ...]
    token_type_ids: tuple[tuple[int, ...], ...] | None
    targets: tuple[int, ...] | tuple[float, ...] | tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.input_ids)


def encode(examples: Examples, tokenizer: Any, *, task: Task, max_length: int) -> Encoded:
    """Turn rows into token numbers.

    For classification and regression the tokenizer adds its own special tokens and cuts the longer text first. For causal-lm the prompt is cut at its
    beginning and the completion, followed by the end token, at its end, so that a completion that fits is always whole.

    Parameters
    ----------
    examples : Examples
        The rows.
    tokenizer : transformers.PreTrainedTokenizerBase
        The tokenizer of the model.
    task : {"classification", "regression", "causal-lm"}
        What is predicted.
    max_length : int
        Longest row in tokens.

    Raises
    ------
    InputError
        ``max-length`` when it is above what the tokenizer's model can read.
    """
    if max_length > tokenizer.model_max_length:
        raise InputError(
            "max-length",
            f"max_length={max_length} is more than the {tokenizer.model_max_length} tokens that the model can read. "
            f"Pass --max-length {tokenizer.model_max_length}.",
        )
    if task == "causal-lm":
        return _encode_completions(examples, tokenizer, max_length=max_length)
    pairs = None if examples.pairs is None else list(examples.pairs)
    found = tokenizer(list(examples.texts), pairs, truncation=True, max_length=max_length)
    types = tuple(map(tuple, found["token_type_ids"])) if "token_type_ids" in found else None
    assert examples.targets is not None  # only causal-lm has none
    return Encoded(task, tuple(map(tuple, found["input_ids"])), types, examples.targets)


def _encode_completions(examples: Examples, tokenizer: Any, *, max_length: int) -> Encoded:
    assert examples.pairs is not None  # causal-lm rows are prompts with completions
    start = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = tokenizer(list(examples.texts), add_special_tokens=False, verbose=False)["input_ids"]
    completions = tokenizer(list(examples.pairs), add_special_tokens=False, verbose=False)["input_ids"]
    rows, labels = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        kept = (completion + end)[: max_length - len(start)]
        before = start + prompt[max(0, len(prompt) + len(start) + len(kept) - max_length) :]
        rows.append(tuple(before + kept))
        labels.append((IGNORED,) * len(before) + tuple(kept))
    return Encoded("causal-lm", tuple(rows), None, tuple(labels))


def check_batch_fits(num_rows: int, batch_size: int) -> None:
    """Refuse a batch that is larger than the data."""
    if not 1 <= batch_size <= num_rows:
        raise InputError(
            "too-few-rows",
            f"batch_size={batch_size} does not fit {num_rows} rows to train on: it must be between 1 and {num_rows}. "
            f"Pass --batch-size {num_rows} or less, or more data.",
        )


def batch_at(encoded: Encoded, *, step: int, batch_size: int, seed: int, pad_token_id: int) -> dict[str, Tensor]:
    """The training batch of a step: a pure function of its arguments.

    Every epoch has its own order, drawn from (seed, epoch). Rows that do not fill a batch at the end of an epoch wait for the next one.

    Parameters
    ----------
    encoded : Encoded
        The rows to train on.
    step : int
        Optimiser step, from 0.
    batch_size : int
        Rows in the batch.
    seed : int
        Seed of the order.
    pad_token_id : int
        Token that fills short rows on the right, up to the longest row of the batch.

    Returns
    -------
    dict of str to torch.Tensor
        ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids``, each (batch, seq), int64; ``labels`` (batch,) int64 classes or float32 scores,
        or (batch, seq) int64 for causal-lm.

    Raises
    ------
    InputError
        ``too-few-rows`` when there are fewer rows than a batch.
    """
    check_batch_fits(len(encoded), batch_size)
    epoch, index = divmod(step, len(encoded) // batch_size)
    order = _epoch_order(len(encoded), seed, epoch)
    return _collate(encoded, order[index * batch_size : (index + 1) * batch_size].tolist(), pad_token_id)


@functools.lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    import numpy as np

    order = np.random.default_rng((seed, epoch)).permutation(num_rows)  # (num_rows,)
    order.flags.writeable = False  # shared by all callers
    return order


def eval_batches(encoded: Encoded, *, batch_size: int, pad_token_id: int) -> Iterator[dict[str, Tensor]]:
    """All rows once, short ones first so that little is padded, in batches as ``batch_at`` makes them. The last may be smaller."""
    order = sorted(range(len(encoded)), key=lambda row: len(encoded.input_ids[row]))
    for start in range(0, len(order), batch_size):
        yield _collate(encoded, order[start : start + batch_size], pad_token_id)


def _collate(encoded: Encoded, rows: Sequence[int], pad_token_id: int) -> dict[str, Tensor]:
    import torch

    def padded(sequences: Sequence[Sequence[int]], filler: int) -> Tensor:
        longest = max(map(len, sequences))
        return torch.tensor([[*sequence, *[filler] * (longest - len(sequence))] for sequence in sequences])  # (batch, seq)

    inputs = [encoded.input_ids[row] for row in rows]
    batch = {"input_ids": padded(inputs, pad_token_id), "attention_mask": padded([(1,) * len(tokens) for tokens in inputs], 0)}
    if encoded.token_type_ids is not None:
        batch["token_type_ids"] = padded([encoded.token_type_ids[row] for row in rows], 0)
    targets: list[Any] = [encoded.targets[row] for row in rows]
    if encoded.task == "causal-lm":
        batch["labels"] = padded(targets, IGNORED)
    else:
        batch["labels"] = torch.tensor(targets, dtype=torch.long if encoded.task == "classification" else torch.float32)  # (batch,)
    return batch
