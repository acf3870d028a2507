"""Errors that tell a user what was got, what was expected and what to do, and the checks that several rooms share.

Every error carries a short ``code``; ``docs/errors.md`` has a line for each.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from numbers import Integral
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class PartwiseError(Exception):
    """Base of the errors that a user can act on.

    Parameters
    ----------
    code : str
        Stable kebab-case name, listed in ``docs/errors.md``.
    message : str
        What was got, what was expected, what to do.
    """

    exit_code = 1

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[PartwiseError], tuple[str, str]]:
        return type(self), (self.code, str(self))  # so that an error comes home from another process


class InputError(PartwiseError, ValueError):
    """Something the caller passed cannot be used. The command exits with 2."""

    exit_code = 2


class RunError(PartwiseError, RuntimeError):
    """A run cannot go on (full disk, damaged checkpoint, diverged training). The command exits with 3."""

    exit_code = 3


class MissingExtra(PartwiseError, ImportError):
    """An optional dependency is not installed. The command exits with 4."""

    exit_code = 4


def load_extra(module: str, *, extra: str) -> ModuleType:
    """Import ``module``, or say which extra brings it.

    Parameters
    ----------
    module : str
        Dotted name of the module to import.
    extra : str
        Name of the extra of this package that installs it.

    Raises
    ------
    MissingExtra
        When the top-level package of ``module`` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra("missing-extra", f"{module} is not installed, and this needs it. Run: pip install 'partwise[{extra}]'") from error


def check_rank(rank: int, shape: Sequence[int], *, name: str = "rank") -> None:
    """Refuse a rank that a matrix of ``shape`` (..., rows, columns) cannot have."""
    limit = min(shape[-2:])
    if not 1 <= rank <= limit:
        raise InputError(
            "rank-out-of-range",
            f"{name}={rank} does not fit a matrix of shape {tuple(shape)}: it must be between 1 and {limit}. "
            f"Pass {name}={limit} for an exact factorisation.",
        )


def check_finite(values: Tensor, *, name: str) -> None:
    """Refuse NaN and infinite entries, counting them."""
    num_bad = int((~values.isfinite()).sum())
    if num_bad:
        raise InputError(
            "not-finite", f"{name} has {num_bad} NaN or infinite entries out of {values.numel()}. Check the input data, or lower the step size."
        )


def check_choice(value: object, known: Sequence[str], *, name: str) -> None:
    """Refuse a value outside ``known`` and list the known ones."""
    if value not in known:
        raise InputError("unknown-choice", f"{name}={value!r} is not known. Choose one of: {', '.join(known)}.")


def check_at_least(value: object, minimum: int, *, name: str) -> None:
    """Refuse anything but an integer of at least ``minimum``; numpy integers count, booleans do not."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < minimum:
        raise InputError("below-minimum", f"{name}={value!r} must be an integer of at least {minimum}. Pass {name}={minimum} or more.")


def check_radius(radius: float, *, name: str = "radius") -> None:
    """Refuse a distance that is negative or NaN; 0 and infinity are fine."""
    if not radius >= 0:
        raise InputError("radius-range", f"got {name}={radius}, expected 0 or more. Pass 0 for no room to move at all, or infinity for no limit.")
