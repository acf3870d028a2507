"""The state between two rounds as a checkpoint, and back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from partwise.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from partwise.checks import InputError
from partwise.train._rounds import SubnetState
from partwise.train.round_report import RoundReport

__all__ = ["Keeper", "load_state"]

LEAST_PAUSE = 10.0  # seconds between two checkpoints, where their number of rounds is not given
RARITY = 20  # and so many times what one takes


class Keeper:
    """Saves the state of a training run, and finds what was saved before.

    Parameters
    ----------
    folder : Path or None
        Of the checkpoints; without one nothing is saved.
    every : int or None
        Rounds from one to the next; None: by the clock.
    settings : mapping
        What decides the result, as JSON; a checkpoint with other settings is refused.
    """

    def __init__(self, folder: Path | None, *, every: int | None, settings: Mapping[str, Any]) -> None:
        self._folder, self._every, self._settings = folder, every, settings
        self._saved = time.perf_counter()
        self._round = -1
        self._cost = 0.0

    def latest(self) -> tuple[SubnetState, list[RoundReport]] | None:
        """State and history of the newest checkpoint, or None.

        Raises
        ------
        InputError
            ``resume-differs`` naming every setting that is another one.
        """
        path = None if self._folder is None else latest_checkpoint(self._folder)
        if path is None:
            return None
        state, history, settings = load_state(path)
        changed = [name for name in self._settings if settings.get(name) != self._settings[name]]
        if changed:
            lines = "; ".join(f"{name}: got {self._settings[name]}, expected {settings.get(name)}" for name in changed if name != "shapes")
            raise InputError(
                "resume-differs",
                f"{path} was made by another run: {lines or 'the model has other tensors'}. Pass what it was made with, or another folder for checkpoints.",
            )
        self._round = state.round_number
        return state, history

    def is_due(self, round_number: int) -> bool:
        """Whether to save after this round."""
        if self._every is not None:
            return round_number % self._every == 0
        return time.perf_counter() - self._saved > max(LEAST_PAUSE, RARITY * self._cost)

    def save(self, state: SubnetState, history: Sequence[RoundReport]) -> None:
        """Write a checkpoint, unless this round has one."""
        if self._folder is None or state.round_number == self._round or not state.round_number:
            return
        began = time.perf_counter()
        tensors = {f"model/{name}": tensor for name, tensor in state.tensors.items()}
        tensors |= {f"optimizer/{slot}/{name}": tensor for slot, of_slot in state.optimizer.items() for name, tensor in of_slot.items()}
        tensors |= {f"outer/{name}": tensor for name, tensor in state.outer.items()}
        tensors |= {f"holders/{name}": tensor for name, tensor in state.holders.items()}
        kept = {
            "settings": self._settings,
            "updates": state.updates,
            "round_number": state.round_number,
            "history": [report.to_json() for report in history],
        }
        save_checkpoint(self._folder, step=state.round_number, tensors=tensors, state=kept)
        self._round, self._saved = state.round_number, time.perf_counter()
        self._cost = self._saved - began


def load_state(path: Path) -> tuple[SubnetState, list[RoundReport], dict[str, Any]]:
    """State, history and settings of a checkpoint.

    Raises
    ------
    RunError
        ``checkpoint-damaged``, see `partwise.checkpoint.load_checkpoint`.
    """
    tensors, kept = load_checkpoint(path)
    groups: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "outer": {}, "holders": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "optimizer":
            slot, _, name = name.partition("/")
            groups[kind].setdefault(slot, {})[name] = tensor
        else:
            groups[kind][name] = tensor
    history = [RoundReport.from_json(row) for row in kept["history"]]
    state = SubnetState(
        tensors=groups["model"],
        optimizer=groups["optimizer"],
        outer=groups["outer"],
        updates=tuple(kept["updates"]),
        round_number=kept["round_number"],
        holders=groups["holders"],
        report=history[-1] if history else None,
    )
    return state, history, kept["settings"]
