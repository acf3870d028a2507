"""What the columns of a table mean: which hold text, which holds the label, and what kind of label it is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.tune._tables import Table, first_rows

if TYPE_CHECKING:
    from partwise.tune._data import DataSettings, Task

LABEL_NAMES = ("label", "labels", "target", "class", "category", "sentiment", "score", "similarity", "rating", "stars")
PAIR_NAMES = {
    "sentence1": "sentence2",
    "premise": "hypothesis",
    "question1": "question2",
    "text1": "text2",
    "text_a": "text_b",
    "question": "answer",
    "query": "passage",
}
TEXT_NAMES = ("text", "sentence", *PAIR_NAMES, "content", "review", "comment", "tweet", "document")
COMPLETION_NAMES = {
    "prompt": ("completion", "response", "answer"),
    "instruction": ("output", "response", "completion"),
    "question": ("answer",),
    "input": ("output", "target"),
}
MAX_INTEGER_CLASSES = 100
"""More distinct integers than this may be classes or a score; the user has to say."""

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_DIGITS = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?inf(inity)?", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_MISSING = {"", "nan", "na", "n/a", "null", "none"}


@dataclass(frozen=True)
class Layout:
    """Names of the columns that a task uses.

    Parameters
    ----------
    text : str or None
        First text, or the prompt; None where a causal-lm task has completions only.
    pair : str or None
        Second text, or the completion.
    context : str or None
        Column whose text is put below the prompt (the ``input`` of instruction data).
    label : str or None
        Label; None for causal-lm.
    """

    text: str | None
    pair: str | None
    label: str | None
    context: str | None = None

    def names(self) -> tuple[str, ...]:
        """The names that are in use."""
        return tuple(name for name in (self.text, self.pair, self.context, self.label) if name is not None)


def find_columns(table: Table, settings: DataSettings) -> Layout:
    """Find the columns of a task: those given, else those with a common name.

    A label column makes it classification or regression. Without one, a prompt with a completion, or a text alone, makes it causal-lm.

    Raises
    ------
    InputError
        ``unknown-column`` when a given column is not there, ``column-not-found`` when none with a common name is; both list those that exist.
    """
    for field in ("text", "text_pair", "label", "prompt", "completion"):
        check_column(table, getattr(settings, field), flag="--" + field.replace("_", "-"))
    if settings.task == "causal-lm" or settings.prompt is not None or settings.completion is not None:
        return _find_completion(table, settings)
    label = settings.label or next((name for name in LABEL_NAMES if name in table.columns), None)
    if label is not None:
        return _find_labelled(table, settings, label)
    if settings.task is not None:
        raise _not_found(table, f"a label ({', '.join(LABEL_NAMES)})", "--label")
    return _find_completion(table, settings)


def check_column(table: Table, name: str | None, *, flag: str) -> None:
    """Refuse a column that the table lacks, and list those that it has."""
    if name is not None and name not in table.columns:
        raise InputError("unknown-column", f"{table.name} has no column {name!r} ({flag}). Its columns are: {_listed(table)}. Pass one of them.")


def _find_labelled(table: Table, settings: DataSettings, label: str) -> Layout:
    text = settings.text or next((name for name in TEXT_NAMES if name in table.columns and name != label), None)
    if text is None:
        raise _not_found(table, f"a text ({', '.join(TEXT_NAMES)})", "--text")
    pair = settings.text_pair
    if pair is None and settings.text is None and PAIR_NAMES.get(text) in table.columns:
        pair = PAIR_NAMES[text]
    return Layout(text, pair if pair != label else None, label)


def _find_completion(table: Table, settings: DataSettings) -> Layout:
    if settings.text is not None and settings.prompt is None and settings.completion is None:
        return Layout(None, settings.text, None)
    if settings.completion is not None:
        return Layout(settings.prompt, settings.completion, None)
    prompts = [settings.prompt] if settings.prompt is not None else [name for name in COMPLETION_NAMES if name in table.columns]
    for prompt in prompts:
        completions = COMPLETION_NAMES.get(prompt, ("completion", "response", "answer", "output"))
        completion = next((name for name in completions if name in table.columns and name != prompt), None)
        if completion is not None:
            context = "input" if prompt == "instruction" and settings.prompt is None and "input" in table.columns else None
            return Layout(prompt, completion, None, context)
    if settings.prompt is not None:
        raise _not_found(table, "a completion to the prompt", "--completion")
    text = next((name for name in TEXT_NAMES if name in table.columns), None)
    if text is None:
        raise _not_found(table, "a label, a prompt with a completion, or a text", "--text and --label, or with --prompt and --completion")
    return Layout(None, text, None)


def _not_found(table: Table, what: str, flags: str) -> InputError:
    return InputError(
        "column-not-found", f"{table.name} has no column that is known to hold {what}. Its columns are: {_listed(table)}. Name it with {flags}."
    )


def _listed(table: Table) -> str:
    return ", ".join(map(repr, table.columns))


def text_column(table: Table, name: str, *, may_be_empty: bool = False) -> tuple[str, ...]:
    """The texts of a column.

    Raises
    ------
    InputError
        ``not-text`` when a value is no string or no valid Unicode, ``empty-text`` when one is empty or missing. Both name the first such rows.
    """
    values = ["" if value is None else value for value in table.columns[name]]
    wrong = [row for row, value in enumerate(values) if not isinstance(value, str)]
    if wrong:
        kind = type(values[wrong[0]]).__name__
        raise InputError(
            "not-text",
            f"column {name!r} of {table.name} holds {kind} in {len(wrong)} of {len(values)} rows ({first_rows(wrong)}), expected text. Name another.",
        )
    broken = next((row for row, value in enumerate(values) if not value.isascii() and _SURROGATE.search(value)), None)
    if broken is not None:
        raise InputError(
            "not-text", f"column {name!r} of {table.name} holds half of a surrogate pair in row {broken + 1}, expected text. Export it as UTF-8."
        )
    empty = [row for row, value in enumerate(values) if not value.strip()]
    if empty and not may_be_empty:
        raise InputError(
            "empty-text",
            f"column {name!r} of {table.name} is empty in {len(empty)} of {len(values)} rows ({first_rows(empty)}), expected text in every row. "
            "Remove these rows, or fill them.",
        )
    return tuple(values)


def label_column(table: Table, name: str) -> list[int | float | str]:
    """The labels of a column as integers, numbers or strings. Strings that all look like numbers become numbers.

    Raises
    ------
    InputError
        ``label-type`` when a label is neither a number nor a string, or both occur; ``missing-label`` when one is empty, null, NaN or infinite.
    """
    values = list(table.columns[name])
    if values and all(isinstance(value, str) for value in values):
        values = _from_strings(values)
    missing = [row for row, value in enumerate(values) if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value))]
    if missing:
        raise InputError(
            "missing-label",
            f"label column {name!r} of {table.name} has no value (empty, null, NaN or infinite) in {len(missing)} of {len(values)} rows "
            f"({first_rows(missing)}), expected one in every row. Remove these rows, or fill them.",
        )
    odd = [row for row, value in enumerate(values) if not isinstance(value, int | float | str)]
    if odd:
        kind = type(values[odd[0]]).__name__
        raise InputError(
            "label-type",
            f"label column {name!r} of {table.name} holds {kind} in {len(odd)} of {len(values)} rows ({first_rows(odd)}), expected integers or strings "
            "(numbers for regression). Store one plain label per row.",
        )
    strings = [row for row, value in enumerate(values) if isinstance(value, str)]
    if strings and len(strings) < len(values):
        raise InputError(
            "label-type",
            f"label column {name!r} of {table.name} mixes numbers with strings, such as {values[strings[0]]!r} in row {strings[0] + 1}. Use one kind.",
        )
    return values


def _from_strings(values: Sequence[str]) -> list[Any]:
    """Integers or floats where every value that is not missing is one; codes with leading zeros stay strings."""
    stripped = [value.strip() for value in values]
    known = [value for value in stripped if value.lower() not in _MISSING]
    if known and all(_INTEGER.fullmatch(value) for value in known):
        return [None if value.lower() in _MISSING else int(value) for value in stripped]
    if known and all(_NUMBER.fullmatch(value) for value in known) and not all(_DIGITS.fullmatch(value) for value in known):
        return [None if value.lower() in _MISSING else float(value) for value in stripped]
    return stripped


def find_task(labels: Sequence[int | float | str], table: Table, name: str) -> Task:
    """Strings and few integers are classes, numbers with a fraction are scores.

    Raises
    ------
    InputError
        ``unclear-task`` when there are more distinct integers than ``MAX_INTEGER_CLASSES``.
    """
    if any(isinstance(label, float) for label in labels):
        return "regression"
    num_distinct = len(set(labels))
    if isinstance(labels[0], str) or num_distinct <= MAX_INTEGER_CLASSES or name in table.class_names:
        return "classification"
    raise InputError(
        "unclear-task",
        f"label column {name!r} of {table.name} has {num_distinct} distinct integers: these may be classes or a score. "
        "Pass --task classification or --task regression.",
    )


def class_targets(columns: Sequence[Sequence[int | float | str]], table: Table, name: str) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """Classes as indices into their names.

    Parameters
    ----------
    columns : sequence of sequence
        Labels of the training rows, then of the held-out rows where there are any.
    table : Table
        The training rows, for messages and for names that the source keeps for integer labels.
    name : str
        Label column.

    Returns
    -------
    tuple of (tuple of str, list of tuple of int)
        Names of the classes in ascending order of their labels, and the index of every row, column by column.

    Raises
    ------
    InputError
        ``label-type`` for a number with a fraction, or for numbers in one split and strings in the other; ``one-class`` when the training rows have fewer
        than two classes; ``missing-label`` for a number outside the names.
    """
    plain = [[_class_label(label, row, table, name) for row, label in enumerate(labels)] for labels in columns]
    if len({isinstance(labels[0], str) for labels in plain}) > 1:
        kinds = " and ".join(repr(labels[0]) for labels in plain)
        raise InputError("label-type", f"label column {name!r} has numbers in one split and strings in the other ({kinds}). Use one kind in both.")
    if len(set(plain[0])) < 2:
        raise InputError(
            "one-class",
            f"label column {name!r} of {table.name} has one class only ({plain[0][0]!r}), expected at least 2. Add rows of another class.",
        )
    if name in table.class_names and not isinstance(plain[0][0], str):
        return table.class_names[name], [_named_classes(labels, table, name) for labels in plain]
    distinct = sorted({label for labels in plain for label in labels})  # all strings or all integers
    index = {label: position for position, label in enumerate(distinct)}
    return tuple(map(str, distinct)), [tuple(index[label] for label in labels) for labels in plain]


def _class_label(label: int | float | str, row: int, table: Table, name: str) -> int | str:
    if isinstance(label, float) and not label.is_integer():
        raise InputError(
            "label-type",
            f"label column {name!r} of {table.name} holds {label!r} in row {row + 1}: labels of classes must be integers or strings. "
            "Pass --task regression to predict numbers.",
        )
    return label if isinstance(label, str | bool) else int(label)


def _named_classes(labels: Sequence[int | str], table: Table, name: str) -> tuple[int, ...]:
    numbers = [int(label) for label in labels]
    num_classes = len(table.class_names[name])
    outside = [row for row, number in enumerate(numbers) if not 0 <= number < num_classes]
    if outside:
        raise InputError(
            "missing-label",
            f"label column {name!r} of {table.name} has numbers outside its {num_classes} classes in rows {first_rows(outside)}, as data sets have where "
            "labels are kept back. Remove these rows.",
        )
    return tuple(numbers)


def score_targets(labels: Sequence[int | float | str], table: Table, name: str) -> tuple[float, ...]:
    """Scores as floats.

    Raises
    ------
    InputError
        ``label-type`` when the labels are strings.
    """
    if isinstance(labels[0], str):
        raise InputError(
            "label-type",
            f"label column {name!r} of {table.name} holds strings such as {labels[0]!r}, expected numbers. Pass --task classification instead.",
        )
    return tuple(float(label) for label in labels)
