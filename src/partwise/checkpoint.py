"""Checkpoints that are whole or absent, what to do about damaged ones, and how many stay. They hold safetensors and JSON, never a pickle."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.atomic_files import clear_leftovers, discard_folder, read_bytes, read_json, write_folder
from partwise.checks import InputError, RunError, check_at_least

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]

TENSORS = "tensors.safetensors"
STATE = "state.json"
FORMAT = 1


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
            discard_folder(outdated)
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
        data = read_bytes(path / TENSORS)
    except RunError as error:
        raise _damaged(path, TENSORS, str(error)) from error
    if hashlib.sha256(data).hexdigest() != document["sha256"].get(TENSORS):
        raise _damaged(path, TENSORS, f"{len(data)} bytes that do not match the checksum in {STATE}")
    try:
        return safetensors.torch.load(data), document["state"]  # numbers and names only: the format has no pickle
    except safetensors.SafetensorError as error:
        raise _damaged(path, TENSORS, str(error)) from error


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
