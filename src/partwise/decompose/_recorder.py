"""What happens between two rounds of a run: a row, now and then a checkpoint, the progress bar, and stopping when asked to."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from partwise.checkpoint import load_checkpoint, save_checkpoint
from partwise.checks import RunError
from partwise.decompose._eigen_rounds import Eigenpairs
from partwise.decompose.job import num_parts

if TYPE_CHECKING:
    from partwise.decompose.job import Job
    from partwise.engine.arrivals import TrafficRow
    from partwise.runs import RunFolder

COUNTS = ("placed_bytes", "num_lost", "num_reissued", "num_late", "num_duplicate", "num_refused")
LEAST_PAUSE = 1.0  # seconds between two checkpoints, where their number is not given
RARITY = 20  # and so many times what one takes
NOTHING_SENT = dict.fromkeys(COUNTS, 0)


@dataclass
class Recorder:
    """Told the state after every round: writes the row and the checkpoints, moves the progress bar, stops when asked to.

    Parameters
    ----------
    job, run
        What runs, and where it is written.
    stop : Event
        Set by Ctrl-C.
    traffic : Traffic or None
        What the engine counts.
    """

    job: Job
    run: RunFolder
    stop: threading.Event
    traffic: Any
    state: Eigenpairs | None = None
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=lambda: dict(NOTHING_SENT))  # of earlier processes
    was_resumed: bool = False
    _seen: int = 0
    _unanswered: list[int] = field(default_factory=list)
    _last: float = field(default_factory=time.perf_counter)
    _saved: float = field(default_factory=time.perf_counter)
    _cost: float = 0.0

    def restore(self, checkpoint: Path | None) -> Eigenpairs | None:
        """The state to go on from, or None; rows of later rounds are dropped."""
        if checkpoint is None:
            self.run.rewind(-1)
            return None
        tensors, kept = load_checkpoint(checkpoint)
        state = Eigenpairs.from_arrays({name: tensor.numpy() for name, tensor in tensors.items()})
        if len(state.vectors) != self.job.estimator.n_components:
            raise RunError(
                "checkpoint-mismatch",
                f"{checkpoint} does not fit the run: it has {len(state.vectors)} components, expected {self.job.estimator.n_components}. "
                f"Delete {self.run.checkpoints} to start the rounds again.",
            )
        self.run.rewind(state.num_rounds)
        self.was_resumed = True
        self.state, self.seconds, self.counts = state, float(kept["seconds"]), NOTHING_SENT | kept["counts"]
        self._last = time.perf_counter()
        return state

    def __call__(self, round_number: int, state: Eigenpairs) -> None:
        """After every round."""
        now = time.perf_counter()
        duration, self._last = now - self._last, now
        self.state, self.seconds = state, self.seconds + duration
        row: dict[str, Any] = {"kind": "round", "step": state.num_rounds, "seconds": duration}
        row |= {"values": state.values.tolist(), "residuals": state.residuals.tolist(), "present": state.num_present}
        if sent := [[one.worker, one.bytes_down, one.bytes_up] for one in self._new_traffic()]:
            row["traffic"] = sent
        self.run.append_metrics(row)
        worst = worst_residual(state)
        tol, batch_size = self.job.estimator.tol, getattr(self.job.estimator, "batch_size", None)
        goal = " on batches" if batch_size is not None else f", goal {tol:.0e}" if tol else ""
        self.job.report("rounds", state.num_rounds, self._num_rounds(), "" if worst is None else f"residual {worst:.1e}{goal}")
        if self.stop.is_set() or self._is_due(state.num_rounds):
            self.save()
        if self.stop.is_set():
            raise KeyboardInterrupt

    def save(self) -> None:
        """Write a checkpoint of the last state."""
        assert self.state is not None
        began = time.perf_counter()
        self.run.sync()
        tensors = {name: torch.from_numpy(array) for name, array in self.state.to_arrays().items()}
        save_checkpoint(self.run.checkpoints, step=self.state.num_rounds, tensors=tensors, state={"seconds": self.seconds, "counts": self.all_counts()})
        self._saved = self._last = time.perf_counter()
        self._cost = self._saved - began

    def _is_due(self, round_number: int) -> bool:
        """Whether to save after this round: as often as asked, or else so that saving takes a small share of the time."""
        every = self.job.checkpoint_every
        if every is not None:
            return round_number % every == 0
        return time.perf_counter() - self._saved > max(LEAST_PAUSE, RARITY * self._cost)

    def all_counts(self) -> dict[str, int]:
        """What the engines of all processes counted for this run."""
        return {name: self.counts[name] + getattr(self.traffic, name, 0) for name in COUNTS}

    @property
    def _is_async(self) -> bool:
        return getattr(self.job.estimator, "mode", "sync") == "async"

    def _num_rounds(self) -> int:
        """Where the progress bar ends: at so many rounds, or publications where nobody waits for a round to end."""
        num_rounds = int(getattr(self.job.estimator, "num_rounds", 0)) * (num_parts(self.job.estimator) if self._is_async else 1)
        return max(num_rounds, self.state.num_rounds if self.state else 0)

    def _new_traffic(self) -> list[TrafficRow]:
        """Messages of this round. Those that are under way in an asynchronous run are counted once their answer is there."""
        if self.traffic is None:
            return []
        rows = self.traffic.rows
        waiting = [*self._unanswered, *range(self._seen, len(rows))]
        self._seen = len(rows)
        self._unanswered = [index for index in waiting if self._is_async and not rows[index].bytes_up]
        return [rows[index] for index in waiting if index not in self._unanswered]


def worst_residual(state: Eigenpairs) -> float | None:
    """The largest residual of the components that have one, relative to the largest eigenvalue."""
    known = state.residuals[np.isfinite(state.residuals)]
    largest = float(state.values.max(initial=0.0))
    return float(known.max()) / largest if len(known) and largest > 0 else None
