"""Files that are whole or absent: atomic writes, checkpoints, and what to do about damaged ones.

A process may be killed at any moment, the disk may fill up, the power may fail. Whatever is read back was written completely: everything goes to a
temporary name in the same folder, is flushed to the disk, and is renamed in one step. Only safetensors and JSON are read or written, never a pickle.

One process at a time writes to a folder (``partwise.runs.RunFolder`` holds a lock). A killed writer leaves at most a temporary name behind, which
`clear_leftovers` removes at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError, RunError, check_at_least

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "clear_leftovers",
    "latest_checkpoint",
    "load_checkpoint",
    "read_json",
    "refuse_pickles",
    "save_checkpoint",
    "to_json_bytes",
    "to_json_line",
    "write_atomic",
    "write_folder",
    "write_json",
    "write_refused",
]

logger = logging.getLogger(__name__)

TENSORS = "tensors.safetensors"
STATE = "state.json"
FORMAT = 1
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
        return json.loads(_read_bytes(path))
    except ValueError as error:  # broken JSON and broken UTF-8
        raise RunError(
            "file-damaged", f"{path} is damaged: got {error}, expected JSON. Restore the file from a copy, or make the run again."
        ) from error


def save_checkpoint(folder: Path, *, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2) -> Path:
    """Save tensors and state as ``folder/step-00000120``; the checkpoint appears whole or not at all.

    Tensors of any dtype safetensors knows, on any device, may be 0-d, empty, non-contiguous, or share storage (each is saved on its own).
    A checksum of everything lies beside the data, so that `load_checkpoint` refuses what a failing disk has changed.

    Parameters
    ----------
    folder : Path
        Folder of all checkpoints of a run.
    step : int
        Number of optimiser steps done.
    tensors : mapping of str to Tensor
        Written to ``tensors.safetensors``.
    state : mapping
        Whatever JSON can hold, written to ``state.json``. Floats come back with the same bits; NaN and infinities are allowed here.
    keep : int, default=2
        How many of the newest checkpoints stay.

    Returns
    -------
    Path
        The checkpoint's folder.

    Raises
    ------
    InputError
        ``tensor-not-storable`` for a name or dtype that safetensors cannot hold, ``below-minimum`` for ``keep`` below 1.
    RunError
        ``disk-full`` or ``cannot-write``; earlier checkpoints are then intact.
    """
    import safetensors.torch

    check_at_least(keep, 1, name="keep")
    data = safetensors.torch.save({name: _storable(name, tensor) for name, tensor in tensors.items()})
    plain_state = json.loads(json.dumps(state))
    checksums = {TENSORS: hashlib.sha256(data).hexdigest(), "state": _state_checksum(step, plain_state)}
    document = {"format": FORMAT, "step": step, "sha256": checksums, "state": plain_state}
    target = folder / f"step-{step:08d}"
    with write_folder(target) as inside:
        (inside / TENSORS).write_bytes(data)
        (inside / STATE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for outdated in _checkpoints(folder)[:-keep]:
        if outdated != target:
            _discard(outdated)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None. Removes what killed writers left behind."""
    if not folder.is_dir():
        return None
    clear_leftovers(folder)
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint back: tensors on the CPU with their dtypes and shapes, and the state.

    Raises
    ------
    RunError
        ``checkpoint-damaged`` when a file is missing, cut short, or differs from its checksum. The message names the file and, where there
        is one, the checkpoint before it.
    """
    import safetensors
    import safetensors.torch

    document = _read_state(path)
    try:
        data = _read_bytes(path / TENSORS)
    except RunError as error:
        raise _damaged(path, TENSORS, str(error)) from error
    if hashlib.sha256(data).hexdigest() != document["sha256"].get(TENSORS):
        raise _damaged(path, TENSORS, f"{len(data)} bytes that do not match the checksum in {STATE}")
    try:
        return safetensors.torch.load(data), document["state"]
    except safetensors.SafetensorError as error:
        raise _damaged(path, TENSORS, str(error)) from error


def clear_leftovers(folder: Path) -> None:
    """Finish or undo what a killed writer was doing in ``folder``. Call it only when no other process writes there.

    Temporary files and folders are deleted. A folder that had stepped aside for a successor which never arrived is put back.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(REPLACED):
            original = folder / path.name.removeprefix(REPLACED)
            if original.exists():
                _discard(path)
            else:
                path.rename(original)
        elif path.name.startswith(TEMPORARY):
            logger.info("removing %s, left behind by a process that was killed", path)
            _remove(path)


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


def _storable(name: str, tensor: Tensor) -> Tensor:
    """A contiguous CPU copy that shares no memory, as safetensors wants it."""
    import torch

    if name == "__metadata__" or tensor.dtype == torch.complex128 or tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(
            "tensor-not-storable",
            f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, on {tensor.device}) cannot be saved: safetensors holds dense tensors up to 64 bits "
            "an entry, under any name but '__metadata__'. Rename or convert it first.",
        )
    return tensor.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _state_checksum(step: int, state: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, step, state], sort_keys=True).encode()).hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path / STATE)
    except RunError as error:
        raise _damaged(path, STATE, str(error)) from error
    expected = {"format": int, "step": int, "sha256": dict, "state": dict}
    if not isinstance(document, dict) or any(not isinstance(document.get(key), kind) for key, kind in expected.items()):
        raise _damaged(path, STATE, f"JSON without the keys {', '.join(expected)}")
    if document["format"] != FORMAT:
        raise RunError(
            "checkpoint-format",
            f"{path / STATE} has format {document['format']}, expected {FORMAT}: another version of partwise wrote it. Resume with that version.",
        )
    if document["sha256"].get("state") != _state_checksum(document["step"], document["state"]):
        raise _damaged(path, STATE, "values that do not match their checksum")
    return document


def _damaged(path: Path, name: str, got: str) -> RunError:
    earlier = [other for other in _checkpoints(path.parent) if other.name < path.name]
    advice = f"Delete {path} to go on from {earlier[-1].name}." if earlier else "There is no earlier checkpoint: start the run again."
    return RunError("checkpoint-damaged", f"{path / name} is damaged: got {got}, expected the file as it was written. {advice}")


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, fewest steps first."""
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(
            "file-unreadable", f"{path} cannot be read: got {error.strerror}, expected a readable file. Check the path and its permissions."
        ) from error


def _temporary_beside(path: Path) -> Path:
    return path.parent / f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}"


def _rename_into_place(temporary: Path, path: Path) -> None:
    """Rename a folder to ``path``. A folder already there steps aside first, where `clear_leftovers` finds it again if we are killed in between."""
    aside = path.parent / f"{REPLACED}{path.name}"
    if path.exists():
        if aside.exists():
            _discard(aside)
        path.rename(aside)
    temporary.rename(path)
    _sync_folder(path.parent)
    if aside.exists():
        _discard(aside)


def _discard(path: Path) -> None:
    """Delete a folder so that a kill in the middle cannot leave half of it under its own name."""
    temporary = _temporary_beside(path)
    path.rename(temporary)
    _remove(temporary)


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
