"""With or without a barrier between rounds: the settings ``mode`` and ``max_staleness`` of estimators that work in rounds."""

from __future__ import annotations

from partwise.checks import InputError, check_at_least, check_choice
from partwise.engine import Engine

__all__ = ["MODES", "check_mode"]

MODES = ("sync", "async")


def check_mode(mode: str, max_staleness: int | None, engine: str | Engine) -> None:
    """Refuse a mode that is not known, or settings that do not go with it."""
    check_choice(mode, MODES, name="mode")
    if max_staleness is not None:
        check_at_least(max_staleness, 1, name="max_staleness")
        if mode == "sync":
            raise InputError(
                "staleness-needs-async",
                f"got max_staleness={max_staleness} with mode='sync', expected mode='async': in synchronous rounds nothing is stale. "
                "Pass mode='async', or max_staleness=None.",
            )
    if mode == "async" and not isinstance(engine, str) and not hasattr(engine, "submit"):
        raise InputError(
            "engine-needs-sync",
            f"got mode='async' with engine={engine!r}, expected an engine that takes parts one at a time. Pass engine='inline' or 'ray', or mode='sync'.",
        )
