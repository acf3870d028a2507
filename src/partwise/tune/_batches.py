"""Rows as token numbers, and batches of them: a batch is a pure function of the step and the seed, so that a resumed run sees the same rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from partwise.tune._data import Examples, Task

IGNORED = -100
"""Label of a token that is not to be predicted."""


@dataclass(frozen=True)
class Encoded:
    """Rows as token numbers, not yet padded.

    Parameters
    ----------
    task : {"classification", "regression", "causal-lm"}
        What is predicted.
    input_ids : tuple of tuple of int
        Tokens of every row.
    token_type_ids : tuple of tuple of int or None
        Which text a token belongs to, where the tokenizer tells.
    targets : tuple
        Class or score of every row; for causal-lm a label for every token, -100 where none is to be predicted.
    """

    task: Task
    input_ids: tuple[tuple[int, ...], ...]
    token_type_ids: tuple[tuple[int, ...], ...] | None
    targets: tuple[int, ...] | tuple[float, ...] | tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.input_ids)


def encode(examples: Examples, tokenizer: Any, *, task: Task, max_length: int) -> Encoded:
    """Turn rows into token numbers.

    For classification and regression the tokenizer adds its own special tokens and cuts the longer text first. For causal-lm the prompt is cut at its
    beginning and the completion, followed by the end token, at its end, so that a completion that fits is always whole.

    Parameters
    ----------
    examples : Examples
        The rows.
    tokenizer : transformers.PreTrainedTokenizerBase
        The tokenizer of the model.
    task : {"classification", "regression", "causal-lm"}
        What is predicted.
    max_length : int
        Longest row in tokens.

    Raises
    ------
    InputError
        ``max-length`` when it is above what the tokenizer's model can read.
    """
    if max_length > tokenizer.model_max_length:
        raise InputError(
            "max-length",
            f"max_length={max_length} is more than the {tokenizer.model_max_length} tokens that the model can read. "
            f"Pass --max-length {tokenizer.model_max_length}.",
        )
    if task == "causal-lm":
        return _encode_completions(examples, tokenizer, max_length=max_length)
    pairs = None if examples.pairs is None else list(examples.pairs)
    found = tokenizer(list(examples.texts), pairs, truncation=True, max_length=max_length)
    types = tuple(map(tuple, found["token_type_ids"])) if "token_type_ids" in found else None
    assert examples.targets is not None  # only causal-lm has none
    return Encoded(task, tuple(map(tuple, found["input_ids"])), types, examples.targets)


def _encode_completions(examples: Examples, tokenizer: Any, *, max_length: int) -> Encoded:
    assert examples.pairs is not None  # causal-lm rows are prompts with completions
    start = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = tokenizer(list(examples.texts), add_special_tokens=False, verbose=False)["input_ids"]
    completions = tokenizer(list(examples.pairs), add_special_tokens=False, verbose=False)["input_ids"]
    rows, labels = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        kept = (completion + end)[: max_length - len(start)]
        before = start + prompt[max(0, len(prompt) + len(start) + len(kept) - max_length) :]
        rows.append(tuple(before + kept))
        labels.append((IGNORED,) * len(before) + tuple(kept))
    return Encoded("causal-lm", tuple(rows), None, tuple(labels))


def check_batch_fits(num_rows: int, batch_size: int) -> None:
    """Refuse a batch that is larger than the data."""
    if not 1 <= batch_size <= num_rows:
        raise InputError(
            "too-few-rows",
            f"batch_size={batch_size} does not fit {num_rows} rows to train on: it must be between 1 and {num_rows}. "
            f"Pass --batch-size {num_rows} or less, or more data.",
        )


def batch_at(encoded: Encoded, *, step: int, batch_size: int, seed: int, pad_token_id: int) -> dict[str, Tensor]:
    """The training batch of a step: a pure function of its arguments.

    Every epoch has its own order, drawn from (seed, epoch). Rows that do not fill a batch at the end of an epoch wait for the next one.

    Parameters
    ----------
    encoded : Encoded
        The rows to train on.
    step : int
        Optimiser step, from 0.
    batch_size : int
        Rows in the batch.
    seed : int
        Seed of the order.
    pad_token_id : int
        Token that fills short rows on the right, up to the longest row of the batch.

    Returns
    -------
    dict of str to torch.Tensor
        ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids``, each (batch, seq), int64; ``labels`` (batch,) int64 classes or float32 scores,
        or (batch, seq) int64 for causal-lm.

    Raises
    ------
    InputError
        ``too-few-rows`` when there are fewer rows than a batch.
    """
    check_batch_fits(len(encoded), batch_size)
    epoch, index = divmod(step, len(encoded) // batch_size)
    order = _epoch_order(len(encoded), seed, epoch)
    return _collate(encoded, order[index * batch_size : (index + 1) * batch_size].tolist(), pad_token_id)


@functools.lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    import numpy as np

    order = np.random.default_rng((seed, epoch)).permutation(num_rows)  # (num_rows,)
    order.flags.writeable = False  # shared by all callers
    return order


def eval_batches(encoded: Encoded, *, batch_size: int, pad_token_id: int) -> Iterator[dict[str, Tensor]]:
    """All rows once, short ones first so that little is padded, in batches as ``batch_at`` makes them. The last may be smaller."""
    order = sorted(range(len(encoded)), key=lambda row: len(encoded.input_ids[row]))
    for start in range(0, len(order), batch_size):
        yield _collate(encoded, order[start : start + batch_size], pad_token_id)


def _collate(encoded: Encoded, rows: Sequence[int], pad_token_id: int) -> dict[str, Tensor]:
    import torch

    def padded(sequences: Sequence[Sequence[int]], filler: int) -> Tensor:
        longest = max(map(len, sequences))
        return torch.tensor([[*sequence, *[filler] * (longest - len(sequence))] for sequence in sequences])  # (batch, seq)

    inputs = [encoded.input_ids[row] for row in rows]
    batch = {"input_ids": padded(inputs, pad_token_id), "attention_mask": padded([(1,) * len(tokens) for tokens in inputs], 0)}
    if encoded.token_type_ids is not None:
        batch["token_type_ids"] = padded([encoded.token_type_ids[row] for row in rows], 0)
    targets: list[Any] = [encoded.targets[row] for row in rows]
    if encoded.task == "causal-lm":
        batch["labels"] = padded(targets, IGNORED)
    else:
        batch["labels"] = torch.tensor(targets, dtype=torch.long if encoded.task == "classification" else torch.float32)  # (batch,)
    return batch
