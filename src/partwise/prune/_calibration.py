"""Calibration data as users have them, as batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.models.walks import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["batches_of", "count_inputs"]

ROWS = 8  # of one batch, where a whole tensor is given


def batches_of(model: nn.Module, data: Tensor | Iterable[Any] | None) -> list[Batch]:
    """Batches on the device of a model.

    Parameters
    ----------
    model : torch.nn.Module
        Decides what a tensor is: token ids or images for a model of transformers, rows or images for any other.
    data : Tensor or iterable, or None
        One row per input, as a tensor or a mapping of tensors such as a tokenizer gives, which are dealt in batches of 8; or batches: tensors, pairs
        (inputs, labels), or mappings. A ``DataLoader`` gives batches. It is read once.

    Raises
    ------
    InputError
        ``no-calibration`` when there is nothing in it, ``calibration-data`` for what is none of these.
    """
    from torch import Tensor

    device = next(model.parameters()).device
    pieces: Iterable[Any] = [] if data is None else data
    if isinstance(data, Tensor):
        if data.ndim < 2:
            raise InputError(
                "calibration-data", f"got a tensor of shape {tuple(data.shape)}, expected one row per input, (rows, ...). For a single row pass tensor[None]."
            )
        pieces = data.split(ROWS)  # type: ignore[no-untyped-call]
    elif isinstance(data, Mapping):
        tensors = {name: value for name, value in data.items() if isinstance(value, Tensor)}
        count = max(map(len, tensors.values()), default=0)
        pieces = [{name: value[start : start + ROWS] for name, value in tensors.items()} for start in range(0, count, ROWS)]
    batches = [batch for piece in pieces if count_inputs(batch := _batch_of(model, piece, device))]
    if not batches:
        raise InputError(
            "no-calibration",
            "got no calibration data, expected at least one batch of inputs. Pass a tensor (rows, ...), a list of batches, or a DataLoader with data in it.",
        )
    return batches


def count_inputs(batch: Batch) -> int:
    """Tokens that are no padding, or rows where the inputs are no tokens."""
    if batch.real is not None:
        return int(batch.real.sum())
    inputs = batch.inputs.get("input_ids") if isinstance(batch.inputs, Mapping) else batch.inputs
    if inputs is None:
        return len(next(iter(batch.inputs.values()), ()))
    return inputs.numel() if isinstance(batch.inputs, Mapping) else len(inputs)


def _batch_of(model: nn.Module, piece: Any, device: Any) -> Batch:
    from torch import Tensor

    is_pretrained = hasattr(type(model), "config_class")
    labels = None
    if isinstance(piece, tuple | list) and 1 <= len(piece) <= 2 and all(isinstance(value, Tensor) for value in piece):
        piece, labels = piece[0], piece[1].to(device) if len(piece) == 2 else None  # a TensorDataset without labels gives lists of one
    if isinstance(piece, Mapping):
        tensors = {name: value.to(device) for name, value in piece.items() if isinstance(value, Tensor)}
        labels = tensors.pop("labels", labels)
        mask = tensors.get("attention_mask")
        return Batch(tensors, labels, None if mask is None or mask.ndim != 2 or bool(mask.all()) else mask.bool())
    if not isinstance(piece, Tensor):
        raise InputError(
            "calibration-data",
            f"got a batch that is a {type(piece).__name__}, expected a tensor, a pair (inputs, labels), or a mapping such as a tokenizer gives. "
            "Collate the data first, for example with a DataLoader.",
        )
    piece = piece.to(device)
    if not is_pretrained:
        return Batch(piece, labels)
    return Batch({"pixel_values" if piece.is_floating_point() else "input_ids": piece}, labels)
