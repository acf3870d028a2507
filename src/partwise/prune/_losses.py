"""The loss that methods with gradients follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from partwise.checks import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.models.walks import Batch

__all__ = ["arguments_of", "loss_of"]

IGNORED = -100  # label of tokens that are not predicted, as in transformers


def arguments_of(model: nn.Module, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor | bool]]:
    """What a model is called with, by place and by name."""
    if not isinstance(batch.inputs, Mapping):
        return (batch.inputs,), {}
    return (), dict(batch.inputs) | ({"use_cache": False} if "input_ids" in batch.inputs else {})


def loss_of(outputs: object, batch: Batch) -> Tensor:
    """Cross-entropy of the labels, or of the next token.

    Raises
    ------
    InputError
        ``no-labels`` for batches without labels that are no text.
    """
    from torch import Tensor
    from torch.nn.functional import cross_entropy

    logits = outputs if isinstance(outputs, Tensor) else outputs.logits  # type: ignore[attr-defined]
    labels = batch.labels
    if isinstance(batch.inputs, Mapping) and "input_ids" in batch.inputs and logits.ndim == 3:
        labels = batch.inputs["input_ids"] if labels is None else labels
        labels = labels if batch.real is None else labels.masked_fill(~batch.real, IGNORED)
        return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
    if labels is None:
        raise InputError(
            "no-labels", "got batches without labels, expected them: the loss is cross-entropy. Pass pairs (inputs, labels), or a method without gradients."
        )
    return cross_entropy(logits.float(), labels)
