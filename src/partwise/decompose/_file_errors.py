"""What is said of a data file that cannot be used as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from partwise.checks import InputError

__all__ = ["chosen_array", "key_without_arrays", "plain", "text_columns"]


def text_columns(path: str | Path, names: Sequence[str]) -> InputError:
    """The error for columns of a file that hold something else than numbers."""
    shown = ", ".join(repr(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return InputError("not-numbers", f"{path} has columns that are not numbers: {shown}. Drop them, or encode them as numbers.")


def chosen_array(path: str | Path, names: Sequence[str], key: str | None) -> str:
    """The array of a file to use: the one named, or the only one."""
    if key is None and len(names) == 1:
        return names[0]
    known = ", ".join(names) or "none"
    if key is None:
        raise InputError("array-not-named", f"{path} holds these arrays: {known}. Name one of them as key.")
    if key not in names:
        raise InputError("array-not-named", f"{path} holds no array {key!r}, expected one of: {known}. Name one of them as key.")
    return key


def key_without_arrays(path: str | Path, key: str) -> InputError:
    """The error for a key of a file that holds one matrix without a name."""
    return InputError("key-without-arrays", f"got key={key!r} for {path}, which holds one matrix without a name, expected no key. Leave it out.")


def plain(error: BaseException) -> str:
    """What another library says, without the full stop that our sentence has."""
    return str(error).strip().rstrip(".")
