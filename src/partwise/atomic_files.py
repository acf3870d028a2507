"""Files that are whole or absent: atomic writes, strict JSON, and no pickles.

A process may be killed at any moment, the disk may fill up, the power may fail. Whatever is read back was written completely: everything goes to a
temporary name in the same folder, is flushed to the disk, and is renamed in one step. Only safetensors and JSON are read or written, never a pickle.

One process at a time writes to a folder (``partwise.runs.RunFolder`` holds a lock). A killed writer leaves at most a temporary name behind, which
`clear_leftovers` removes at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from partwise.checks import InputError, RunError

__all__ = [
    "clear_leftovers",
    "discard_folder",
    "read_bytes",
    "read_json",
    "refuse_pickles",
    "to_json_bytes",
    "to_json_line",
    "write_atomic",
    "write_folder",
    "write_json",
    "write_refused",
]

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp-"  # being written, or being deleted: never read
REPLACED = ".old-"  # stepped aside while its successor is renamed into place
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no space, over the user's quota, over the process's file-size limit
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EIO}


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a mixture, even after a power failure.

    Parameters
    ----------
    path : Path
        Target; its folder is made if it is missing.
    data : bytes
        The whole new content.

    Raises
    ------
    RunError
        ``disk-full`` or ``cannot-write``. The old file is then still there and nothing half-written remains.
    """
    temporary = _temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise write_refused(path, error, num_bytes=len(data)) from error
    except BaseException:  # Ctrl-C
        _remove(temporary)
        raise


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder inside a ``with`` block; afterwards it appears as ``path``, whole and in one step.

    A folder already at ``path`` is replaced. If the block fails, or the process is killed, ``path`` stays as it was.

    Raises
    ------
    RunError
        ``disk-full`` when the block or the flush ran out of space, ``cannot-write`` when the place is read-only or not a folder. Other errors of the
        block pass through unchanged.
    """
    temporary = _temporary_beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync_tree(temporary)
        _rename_into_place(temporary, path)
    except BaseException as error:
        num_bytes = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
        _remove(temporary)
        if _is_full_disk(error) or (isinstance(error, OSError) and error.errno in REFUSED):
            raise write_refused(path, error, num_bytes=num_bytes) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as strictly valid, indented JSON, atomically: see `to_json_bytes` and `write_atomic`."""
    write_atomic(path, to_json_bytes(value))


def to_json_bytes(value: Any) -> bytes:
    """Indented UTF-8 JSON that every parser accepts.

    Numbers that JSON lacks (NaN, infinities) become ``null``, paths become strings, tuples become lists.
    """
    return (json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=_path_as_text) + "\n").encode()


def to_json_line(value: Any) -> bytes:
    """Like `to_json_bytes`, on one line and without a line break."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=_path_as_text).encode()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    RunError
        ``file-unreadable`` when it cannot be opened, ``file-damaged`` when it is not JSON. Both name the file.
    """
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:  # broken JSON and broken UTF-8
        raise RunError(
            "file-damaged", f"{path} is damaged: got {error}, expected JSON. Restore the file from a copy, or make the run again."
        ) from error


def read_bytes(path: Path) -> bytes:
    """Content of a file; RunError ``file-unreadable`` naming it when it cannot be opened."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(
            "file-unreadable", f"{path} cannot be read: got {error.strerror}, expected a readable file. Check the path and its permissions."
        ) from error


def clear_leftovers(folder: Path) -> None:
    """Finish or undo what a killed writer was doing in ``folder``. Call it only when no other process writes there.

    Temporary files and folders are deleted. A folder that had stepped aside for a successor which never arrived is put back.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(REPLACED):
            original = folder / path.name.removeprefix(REPLACED)
            if original.exists():
                discard_folder(path)
            else:
                path.rename(original)
        elif path.name.startswith(TEMPORARY):
            logger.info("removing %s, left behind by a process that was killed", path)
            _remove(path)


def discard_folder(path: Path) -> None:
    """Delete a folder so that a kill in the middle cannot leave half of it under its own name."""
    temporary = _temporary_beside(path)
    path.rename(temporary)
    _remove(temporary)


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder in which a pickle could be hiding, before anything in it is read: pickles run code when they are loaded.

    Raises
    ------
    InputError
        ``pickle-refused`` naming the files, ``folder-missing`` when there is no such folder.
    """
    if not folder.is_dir():
        raise InputError("folder-missing", f"{folder} is not a folder: expected one that holds an adapter or a model. Check the path.")
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if names:
        raise InputError(
            "pickle-refused",
            f"{folder} holds {', '.join(names)}: these can be pickles, which run code when they are loaded; expected only safetensors and JSON. "
            "Save the weights again with safetensors (save_pretrained does), or move these files elsewhere if nothing needs them.",
        )


def write_refused(path: Path, error: BaseException, *, num_bytes: int = 0) -> RunError:
    """The error to raise when ``path`` could not be written: ``disk-full`` or ``cannot-write``.

    Parameters
    ----------
    path : Path
        What was being written.
    error : BaseException
        What the operating system, or a library, said.
    num_bytes : int
        How much was to be written, at least.
    """
    reason = getattr(error, "strerror", None) or str(error)
    if not _is_full_disk(error):
        return RunError(
            "cannot-write", f"{path} cannot be written: got {reason}, expected a writable place. Check the permissions, or choose another --out."
        )
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} bytes free"
    except OSError:
        free = "an unknown amount free"
    return RunError(
        "disk-full",
        f"{path} cannot be written: got {reason} with {free}, expected room for at least {num_bytes:,} bytes. What was saved before is intact. "
        "Free some space or raise the limit, then run the same command again with --resume.",
    )


def _temporary_beside(path: Path) -> Path:
    return path.parent / f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}"


def _rename_into_place(temporary: Path, path: Path) -> None:
    """Rename a folder to ``path``. A folder already there steps aside first, where `clear_leftovers` finds it again if we are killed in between."""
    aside = path.parent / f"{REPLACED}{path.name}"
    if path.exists():
        if aside.exists():
            discard_folder(aside)
        path.rename(aside)
    temporary.rename(path)
    _sync_folder(path.parent)
    if aside.exists():
        discard_folder(aside)


def _remove(path: Path) -> None:
    """Delete a temporary file or folder. What cannot be deleted now is cleared at the next start."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder``, and ``folder`` itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync_folder(path)


def _is_full_disk(error: BaseException) -> bool:
    """Whether an error says that there is no room. Libraries written in Rust (safetensors, tokenizers) say so in their text only."""
    return getattr(error, "errno", None) in DISK_FULL or any(f"os error {code})" in str(error) for code in DISK_FULL)


def _path_as_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
