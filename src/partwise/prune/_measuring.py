"""What a language model is worth and what it costs: perplexity, weights, memory of a sequence, speed of writing."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partwise.models.cache_sizes import cache_sizes
from partwise.prune._budget import CONTEXT

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Costs", "costs_of", "decode_speeds", "perplexity"]

LOGITS = 2**26  # numbers that are held at once while a text is scored
PROMPT, FEWEST, MOST = 16, 8, 64  # tokens that are read before the clock starts, and that are written
REPEATS = 5
SECONDS = 4.0  # that all timed runs together should take at most

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a model holds.

    Parameters
    ----------
    num_parameters : int
        Tied ones once.
    weight_bytes : int
        Of its tensors in a file.
    recurrent_bytes, convolution_bytes, attention_bytes : int
        That a sequence of `CONTEXT` tokens holds while the model writes: recurrent states, last inputs of convolutions, keys and values.
    """

    num_parameters: int
    weight_bytes: int
    recurrent_bytes: int
    convolution_bytes: int
    attention_bytes: int

    @property
    def sequence_bytes(self) -> int:
        """All that a sequence holds."""
        return self.recurrent_bytes + self.convolution_bytes + self.attention_bytes


def costs_of(model: Any, *, dtype: torch.dtype | None = None) -> Costs:
    """Count parameters and bytes.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Run on one token.
    dtype : torch.dtype, optional
        In which floating-point tensors are saved. Left out: as they are.
    """
    sizes = cache_sizes(model)
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values()
    return Costs(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=sum(tensor.numel() * (dtype.itemsize if dtype and tensor.is_floating_point() else tensor.itemsize) for tensor in tensors),
        recurrent_bytes=sum(size.recurrent for size in sizes),
        convolution_bytes=sum(size.convolution for size in sizes),
        attention_bytes=sum(CONTEXT * size.per_token for size in sizes),
    )


def perplexity(model: Any, ids: Tensor, *, progress: Progress = lambda done, total: None) -> float:
    """``exp`` of the mean loss of all next tokens; infinite or NaN where the model says so.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode.
    ids : Tensor of shape (rows, tokens), int64
        Text.
    progress : callable
        Told rows that are done, and all.
    """
    import torch
    from torch.nn.functional import cross_entropy

    num_rows, num_tokens = ids.shape
    size = min(8, max(1, LOGITS // (num_tokens * model.get_input_embeddings().num_embeddings)))
    total = 0.0
    with torch.no_grad():
        for start in range(0, num_rows, size):
            batch = ids[start : start + size].to(model.device)  # (rows, tokens)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)  # (rows * tokens, vocabulary)
            total += float(cross_entropy(logits.float(), batch[:, 1:].flatten(), reduction="none").double().sum())
            progress(min(start + size, num_rows), num_rows)
    mean = total / (num_rows * (num_tokens - 1))
    return math.exp(mean) if mean < 700 else mean * math.inf


def decode_speeds(models: Sequence[Any]) -> list[float]:
    """Tokens per second that each model writes, one text at a time: medians of runs by turns, so that a machine that slows down slows all of them.

    Parameters
    ----------
    models : sequence of transformers.PreTrainedModel
        In evaluation mode.
    """
    limit = min(int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or PROMPT + MOST) for model in models)
    prompt = max(1, min(PROMPT, limit // 2))
    most = max(1, min(MOST, limit - prompt))
    trial = min(FEWEST, most)
    for model in models:
        _decode(model, prompt, trial)  # the first run of a process is slow
    step = sum(_decode(model, prompt, trial) for model in models) / trial
    number = max(trial, min(most, int(SECONDS / (REPEATS * step))))
    turns = [[_decode(model, prompt, number) for model in models] for _ in range(REPEATS)]
    return [number / statistics.median(seconds) for seconds in zip(*turns, strict=True)]


def _decode(model: Any, prompt: int, number: int) -> float:
    """Seconds to write so many tokens once the prompt has been read."""
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(prompt, device=model.device)[None] % vocabulary  # (1, prompt)
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
        _wait_for(model)
        start = time.perf_counter()
        for _ in range(number):
            ids = output.logits[:, -1:].argmax(dim=-1)  # (1, 1)
            output = model(input_ids=ids, use_cache=True, cache=output.cache)
        _wait_for(model)
        return time.perf_counter() - start


def _wait_for(model: Any) -> None:
    """Until a graphics processor has done what it was told."""
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
