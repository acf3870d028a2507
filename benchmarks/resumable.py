"""Values that a long program has measured already, so that one that was interrupted goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows import ROOT


class KeptValues:
    """Values by name, each on disk as soon as it is measured.

    Parameters
    ----------
    name : str
        Of the program; its values are in ``runs/<name>/values.jsonl``.
    resume : bool
        Use the values that are there. Otherwise they go: code may have changed since.
    folder : Path, optional
        Where the values are, if somewhere else.
    """

    def __init__(self, name: str, *, resume: bool, folder: Path | None = None) -> None:
        self.path = (folder or ROOT / "runs" / name) / "values.jsonl"
        self.seconds = 0.0  # that all values asked for so far took to measure, now or before
        if not resume:
            self.path.unlink(missing_ok=True)
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
        if whole != text:
            self.path.write_text(whole)
        self._entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in map(json.loads, whole.splitlines())}

    def has(self, name: str) -> bool:
        """Whether this value was measured."""
        return name in self._entries

    def of(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value of this name, measured only where there is none; anything that JSON holds."""
        if name not in self._entries:
            started = time.perf_counter()
            entry = {"name": name, "value": measure()}
            entry["seconds"] = time.perf_counter() - started
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self._entries[name] = entry
            print(f"  {name}: {_shown(entry['value'])} ({entry['seconds']:.1f} s)", flush=True)
        self.seconds += self._entries[name]["seconds"]
        return self._entries[name]["value"]


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)[:200]
