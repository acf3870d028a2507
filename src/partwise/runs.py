"""The folder of one run: what was asked for, what was measured on the way, where it stands, and what came out.

::

    runs/NAME/
      run.json        what was asked for, and the status
      metrics.jsonl   one JSON object a line, in the order of steps
      checkpoints/    see ``partwise.checkpoint``
      result/         the artefact in its host's format
      summary.json    the numbers at the end
      report.html     all of it, drawn

A run that was killed is resumed by the same command with ``--resume``; settings that differ are refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import logging
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from partwise.atomic_files import clear_leftovers, read_json, to_json_line, write_atomic, write_json, write_refused
from partwise.checks import InputError, RunError, check_choice

__all__ = ["RunFolder", "Status", "Stopped", "begin_run", "check_place", "flat_settings", "fresh_run", "installed_version", "stop_flag"]

logger = logging.getLogger(__name__)

Status = Literal["running", "interrupted", "finished"]
COMPARED = ("room", "method", "settings", "seed", "data")  # these decide the result; command and versions do not have to agree
MOVERS = {"ray"}  # libraries that move parts and compute nothing: their versions have no influence on bits


class RunFolder:
    """A run's folder. Make one with `create`, go on with `resume`, read any with `open`.

    `create` and `resume` hold a lock until the object or the process is gone, however it ends, so that two processes cannot write to one run.

    Parameters
    ----------
    path : Path
        The folder.

    Attributes
    ----------
    path, checkpoints, result, summary, report : Path
        The folder and what lies in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.result = path / "result"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self._header = path / "run.json"
        self._metrics = path / "metrics.jsonl"

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether a run was started in ``path``. A run that was killed before it wrote ``run.json`` never started."""
        return (path / "run.json").is_file()

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> RunFolder:
        """Start a run in a new or empty folder.

        Parameters
        ----------
        path : Path
            The folder; made if it is missing, with its parents.
        header : mapping
            Goes to ``run.json``: ``room``, ``method``, ``settings``, ``seed``, ``data``, ``versions``, ``command``. The status is added.

        Raises
        ------
        InputError
            ``run-exists`` when the folder holds something, ``run-in-use`` when another process writes there.
        RunError
            ``cannot-write`` or ``disk-full``.
        """
        run = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_refused(path, error) from error
        run._lock()
        clear_leftovers(path)
        if cls.exists(path):
            raise InputError(
                "run-exists",
                f"{path} already holds a run ({run.status}); expected a new folder. Pass --resume to go on with it, or choose another --out.",
            )
        present = sorted(entry.name for entry in path.iterdir() if entry.name != ".lock")
        if present:
            shown = ", ".join(present[:3]) + (", ..." if len(present) > 3 else "")
            raise InputError("run-exists", f"{path} is not empty: it holds {shown}; expected a new or an empty folder. Choose another --out.")
        write_json(run._header, {**header, "status": "running"})
        return run

    @classmethod
    def resume(cls, path: Path, header: Mapping[str, Any]) -> RunFolder:
        """Go on with a run that was started with the same header, and repair what a kill left behind.

        Commands may differ, and so may versions (a warning is logged: the same bits need the same versions). The status stays as it is, so that a
        finished run can be told from one that needs work.

        Raises
        ------
        InputError
            ``run-not-found`` when no run was started there, ``resume-differs`` naming every setting that differs, ``run-in-use``.
        RunError
            ``file-damaged`` when ``run.json`` or ``metrics.jsonl`` is damaged.
        """
        run = cls.open(path)
        run._lock()
        stored = run.header
        asked = json.loads(to_json_line(dict(header)))
        differences = [line for key in COMPARED for line in _differences(key, asked.get(key), stored.get(key))]
        if differences:
            raise InputError(
                "resume-differs",
                f"{path} was made with other settings:\n  "
                + "\n  ".join(differences)
                + "\nPass the settings it was made with, or choose another --out.",
            )
        got, expected = ({name: value for name, value in header.get("versions", {}).items() if name not in MOVERS} for header in (asked, stored))
        for line in _differences("versions", got, expected):
            logger.warning("resuming with another version, so the bits may differ: %s", line)
        clear_leftovers(path)
        run._drop_torn_line()
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run, to read from.

        Raises
        ------
        InputError
            ``run-not-found`` when no run was started there.
        """
        if not cls.exists(path):
            raise InputError("run-not-found", f"{path} holds no run: got no run.json in it. Check the path, or start the run without --resume.")
        return cls(path)

    @property
    def header(self) -> dict[str, Any]:
        """What ``run.json`` holds."""
        header = read_json(self._header)
        if not isinstance(header, dict):
            raise RunError("file-damaged", f"{self._header} is damaged: got {type(header).__name__}, expected a JSON object. Make the run again.")
        return header

    @property
    def status(self) -> Status:
        """``running`` (or killed), ``interrupted`` (stopped with a checkpoint) or ``finished``."""
        status: Status = self.header.get("status", "running")
        return status

    def set_status(self, status: Status) -> None:
        """Record how the run stands."""
        check_choice(status, get_args(Status), name="status")
        self.sync()
        write_json(self._header, {**self.header, "status": status})

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one row, such as ``{"kind": "train", "step": 3, "loss": 0.7}``. NaN and infinities become ``null``.

        Raises
        ------
        RunError
            ``disk-full`` or ``cannot-write``; the file then ends with the row before.
        """
        line = to_json_line(dict(row)) + b"\n"
        try:
            with self._metrics.open("ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    while line:
                        line = line[file.write(line) :]
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise write_refused(self._metrics, error, num_bytes=len(line)) from error

    def sync(self) -> None:
        """Flush ``metrics.jsonl`` to the disk. Call it before saving a checkpoint, so that a power failure loses no row from before it."""
        if self._metrics.exists():
            try:
                with self._metrics.open("rb") as file:
                    os.fsync(file.fileno())
            except OSError as error:  # some file systems say only now that there was no room
                raise write_refused(self._metrics, error) from error

    def metrics(self) -> list[dict[str, Any]]:
        """All rows, in the order they were written. A last line that a kill cut short is left out.

        Raises
        ------
        RunError
            ``file-damaged`` naming file and line, when a line before the last is not a JSON object.
        """
        if not self._metrics.exists():
            return []
        return list(self._rows(self._metrics.read_bytes()))

    def rewind(self, step: int) -> None:
        """Drop the rows of later steps: a run that resumes from a checkpoint at ``step`` measures them again."""
        rows = [row for row in self.metrics() if row.get("step", 0) <= step]
        write_atomic(self._metrics, b"".join(to_json_line(row) + b"\n" for row in rows))

    def _rows(self, data: bytes) -> Iterator[dict[str, Any]]:
        *lines, _torn = data.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise RunError(
                    "file-damaged",
                    f"{self._metrics} is damaged: got {line[:60]!r} on line {number}, expected a JSON object. Delete the line, or make the run again.",
                )
            yield row

    def _drop_torn_line(self) -> None:
        """Cut off what follows the last line break, or the next row would be glued to it."""
        data = self._metrics.read_bytes() if self._metrics.exists() else b""
        if data and not data.endswith(b"\n"):
            write_atomic(self._metrics, data[: data.rfind(b"\n") + 1])

    def _lock(self) -> None:
        """Take the lock of this folder for this process. The kernel gives it back when the process ends, even by ``kill -9``."""
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise write_refused(self.path, error) from error
        self._unlock = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in {errno.EACCES, errno.EAGAIN}:
                logger.debug("%s cannot be locked: %s", self.path, error)  # a file system without locks
                return
            raise InputError(
                "run-in-use",
                f"{self.path} is being written by another process; expected to be the only one. Wait for it, stop it, or choose another --out.",
            ) from error


def _differences(name: str, got: Any, expected: Any) -> list[str]:
    """One line for each leaf in which two JSON values differ."""
    if isinstance(got, dict) and isinstance(expected, dict):
        keys = sorted(got.keys() | expected.keys())
        return [line for key in keys for line in _differences(f"{name}.{key}", got.get(key), expected.get(key))]
    return [] if got == expected else [f"{name}: got {json.dumps(got)}, expected {json.dumps(expected)}"]


class Stopped(KeyboardInterrupt):
    """A run was interrupted; what it had done is saved.

    Parameters
    ----------
    run : Path
        Folder of the run, to resume from.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(str(run))
        self.run = run


@contextlib.contextmanager
def begin_run(path: Path, header: Mapping[str, Any], *, has_started: Callable[[RunFolder], bool]) -> Iterator[Callable[[], RunFolder]]:
    """Hand out what creates the run; when the block fails before the run has started, its folder is taken away again.

    A folder that was there before stays, and so does a run that another process began there meanwhile.

    Parameters
    ----------
    path, header
        As for `RunFolder.create`.
    has_started : callable
        Whether the run has come so far that it is worth keeping.
    """
    was_there = path.exists()
    made: list[RunFolder] = []

    def create() -> RunFolder:
        made.append(RunFolder.create(path, header))
        return made[0]

    try:
        yield create
    except Exception:
        if made and not was_there and not has_started(made[0]):
            shutil.rmtree(path, ignore_errors=True)
        raise


def check_place(out: Path, *, resume: bool) -> None:
    """Refuse, before anything slow happens, a folder that a new run would overwrite, or a resumption of nothing."""
    if resume:
        RunFolder.open(out)
    elif RunFolder.exists(out):
        raise InputError("run-exists", f"{out} already holds a run, expected a new folder. Pass --resume to go on with it, or choose another --out.")
    elif out.exists() and (not out.is_dir() or any(entry.name != ".lock" for entry in out.iterdir())):
        raise InputError("run-exists", f"{out} is not empty, expected a new or an empty folder. Choose another --out.")


def fresh_run(name: str, *, parent: Path = Path("runs")) -> Path:
    """First unused folder ``runs/<name>-001``, ``-002``, ..."""
    number = 1
    while (parent / f"{name}-{number:03d}").exists():
        number += 1
    return parent / f"{name}-{number:03d}"


def installed_version(library: str) -> str:
    """Version of an installed library, or ``missing``."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def flat_settings(value: Any) -> dict[str, Any]:
    """Fields of a dataclass, those of dataclasses in its fields among them, by name."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        found |= flat_settings(inner) if dataclasses.is_dataclass(inner) else {item.name: inner}
    return found


@contextlib.contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets instead of interrupting; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python allows no signal handlers, the event is simply never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: Any) -> None:
        logger.warning("stopping after this step or round; press Ctrl-C again to stop without saving")
        stop.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
