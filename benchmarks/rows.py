"""Rows: what a benchmark program measured, appended to ``benchmarks/results/<name>.jsonl`` and never edited by hand.

A program times and scores a method and its baseline with the same budget, seeds and process, builds a :class:`Row` and calls :func:`append`.
``benchmarks/report.py`` turns the rows into ``docs/claims.md`` and into the marked blocks of the other pages.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


def current_commit() -> str:
    """Short hash of HEAD, followed by ``+changes`` when code under src or benchmarks differs from it; ``unknown`` outside git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changed else head


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def describe_machine() -> str:
    """Cores and memory this process may use, as in ``2 CPU cores, 24 GiB, x86_64``; limits of a container count."""
    cores = float(len(os.sched_getaffinity(0)))
    quota = _read_words("/sys/fs/cgroup/cpu.max")
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, int(quota[0]) / int(quota[1]))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read_words("/sys/fs/cgroup/memory.max")
    if limit and limit[0].isdigit():
        memory = min(memory, int(limit[0]))
    return f"{cores:g} CPU cores, {memory / 2**30:.0f} GiB, {platform.machine()}"


def _read_words(path: str) -> list[str]:
    try:
        return Path(path).read_text().split()
    except OSError:
        return []


@dataclass(frozen=True, kw_only=True)
class Row:
    """One claim, measured once: a method against one baseline, over all seeds.

    Parameters
    ----------
    claim : str
        A sentence that can be true or false: "8 rank-one parts match rank-8 LoRA on the toy task".
    method, baseline : str
        What ran, usually ``repr(method)``: pasted, it rebuilds the run. ``baseline`` may be empty when the claim has none.
    values, baseline_values : tuple of float
        One per seed (or per repetition), in the order of ``seeds``, never only the mean.
    unit : str
        What a value is: "accuracy", "seconds per step", "ratio of time", "degrees".
    seeds : tuple of int
        The seeds, or the numbers of the repetitions.
    paper : str or None
        The number the paper states for this claim, with its conditions, as text; shown as theirs. None when the claim is ours.
    expected : str
        What was asked for, decided before measuring: "ratio at most 1.03".
    held : bool or None
        Whether ``expected`` was reached. None: nothing was asked, the number is for information.
    seconds : float
        Wall-clock time of the whole measurement, baseline included.
    note : str
        One short remark for the reader of the table.
    commit, machine : str
        Filled in.
    """

    claim: str
    method: str
    values: tuple[float, ...]
    unit: str
    seeds: tuple[int, ...]
    seconds: float
    baseline: str = ""
    baseline_values: tuple[float, ...] = ()
    paper: str | None = None
    expected: str = ""
    held: bool | None = None
    note: str = ""
    commit: str = field(default_factory=current_commit)
    machine: str = field(default_factory=describe_machine)

    def __post_init__(self) -> None:
        for name in ("values", "baseline_values", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.values or len(self.values) != len(self.seeds):
            raise ValueError(f"got {len(self.values)} values for {len(self.seeds)} seeds, expected one per seed and at least one. Pass both in full.")
        if self.baseline_values and len(self.baseline_values) != len(self.seeds):
            raise ValueError(f"got {len(self.baseline_values)} baseline_values for {len(self.seeds)} seeds, expected one each. Run it as often.")
        if bool(self.baseline) != bool(self.baseline_values):
            raise ValueError("got a baseline without values or values without a baseline, expected both or neither. Name what was measured.")
        if not all(math.isfinite(value) for value in (*self.values, *self.baseline_values, self.seconds)):
            raise ValueError("got NaN or an infinite value, expected finite numbers. A run that diverged needs its own row with a note.")

    @property
    def key(self) -> tuple[str, str, str]:
        """What the row measures; a later row with the same key replaces it in the tables."""
        return self.claim, self.method, self.baseline


def append(name: str, row: Row, *, folder: Path = RESULTS) -> Path:
    """Add ``row`` to ``<folder>/<name>.jsonl`` in one write that two programs may make at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    line = json.dumps(dataclasses.asdict(row), allow_nan=False) + "\n"
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
    return path


def read(name: str, *, folder: Path = RESULTS) -> list[Row]:
    """All rows of one file, oldest first."""
    path = folder / f"{name}.jsonl"
    return [Row(**json.loads(line)) for line in path.read_text().splitlines() if line]


def latest(rows: list[Row]) -> list[Row]:
    """The newest row for each key, in the order in which the keys first appeared."""
    return list({row.key: row for row in rows}.values())
