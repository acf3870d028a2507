"""How good and how fast a model is: losses on held-out batches, and the speed of decoding or of forward passes."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError, RunError, check_at_least

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["accuracy", "decode_speed", "decode_speeds", "mean_loss", "throughput", "throughputs"]

IGNORED = -100
"""Label that is not scored."""


def mean_loss(model: nn.Module, batches: Iterable[Any], *, loss: Callable[[nn.Module, Any], Tensor]) -> float:
    """Mean loss per sample over all batches, per token for language models; ``exp`` of it is then the perplexity.

    Parameters
    ----------
    model : torch.nn.Module
        Evaluated in evaluation mode; every module's mode is put back.
    batches : iterable
        Mappings with ``labels``, or pairs of inputs and labels.
    loss : callable
        Mean loss of model and batch.

    Raises
    ------
    InputError
        When there is nothing to score.
    RunError
        When a loss is NaN or infinite.
    """
    import torch

    total, count = 0.0, 0
    with _evaluating(model), torch.no_grad():
        for batch in batches:
            weight = _num_scored(batch)
            if weight:
                total += float(loss(model, batch)) * weight
                count += weight
    _check_some(count)
    if not math.isfinite(total):
        raise RunError(
            "diverged", "the model returned NaN or infinite losses on held-out data, expected finite ones. Lower the learning rate and run again."
        )
    return total / count


def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    """Share of samples whose highest logit is that of their label; of next tokens for language models.

    Parameters
    ----------
    model : torch.nn.Module
        Evaluated in evaluation mode; every module's mode is put back.
    batches : iterable
        Mappings with ``labels``, or pairs of inputs and labels.
    """
    import torch

    right, count = 0, 0
    with _evaluating(model), torch.no_grad():
        for batch in batches:
            labels = _labels(batch).to(_device(model))
            found = _logits(model, batch).argmax(dim=-1)  # of the shape of the labels
            if labels.ndim > 1:  # the logits at a token tell the next one
                found, labels = found[:, :-1], labels[:, 1:]
            right += int((found == labels).sum())
            count += int((labels != IGNORED).sum())
    _check_some(count)
    return right / count


def decode_speed(model: nn.Module, *, batch_size: int = 1, prompt_length: int = 32, num_tokens: int = 64, repeats: int = 3) -> float:
    """Tokens per second that a language model decodes greedily with its key-value cache: the median of ``repeats`` runs after a warm-up.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model of transformers.
    batch_size : int, default=1
        Texts decoded at once; their tokens are added up.
    prompt_length : int, default=32
        Tokens read before the clock starts.
    num_tokens : int, default=64
        Tokens written for each text.
    repeats : int, default=3
        Runs that are timed.
    """
    [speed] = decode_speeds([model], batch_size=batch_size, prompt_length=prompt_length, num_tokens=num_tokens, repeats=repeats)
    return speed


def decode_speeds(
    models: Sequence[nn.Module], *, batch_size: int = 1, prompt_length: int = 32, num_tokens: int = 64, repeats: int = 3
) -> list[float]:
    """`decode_speed` of several models in one process, run by turns, so that a machine that slows down slows all of them.

    Parameters
    ----------
    models : sequence of torch.nn.Module
        Causal language models of transformers.
    batch_size, prompt_length, num_tokens, repeats : int
        See `decode_speed`.
    """
    for name, value in {"batch_size": batch_size, "prompt_length": prompt_length, "num_tokens": num_tokens}.items():
        check_at_least(value, 1, name=name)
    seconds = _by_turns([partial(_decode, model, batch_size, prompt_length, num_tokens) for model in models], repeats=repeats)
    return [batch_size * num_tokens / statistics.median(of_model) for of_model in seconds]


def throughput(model: nn.Module, batch: Any, *, repeats: int = 3) -> float:
    """Samples per second in forward passes over one batch: the median of ``repeats`` passes after a warm-up.

    Parameters
    ----------
    model : torch.nn.Module
        Run in evaluation mode; every module's mode is put back.
    batch : mapping or pair
        As for `mean_loss`.
    repeats : int, default=3
        Passes that are timed.
    """
    [speed] = throughputs([model], batch, repeats=repeats)
    return speed


def throughputs(models: Sequence[nn.Module], batch: Any, *, repeats: int = 3) -> list[float]:
    """`throughput` of several models in one process, run by turns.

    Parameters
    ----------
    models : sequence of torch.nn.Module
        Models that take the batch.
    batch : mapping or pair
        As for `mean_loss`.
    repeats : int, default=3
        Passes that are timed.
    """
    seconds = _by_turns([partial(_forward, model, batch) for model in models], repeats=repeats)
    return [len(_labels(batch)) / statistics.median(of_model) for of_model in seconds]


def _by_turns(runs: Sequence[Callable[[], float]], *, repeats: int) -> list[list[float]]:
    """Seconds of each run, ``repeats`` times, after one that is not counted."""
    check_at_least(repeats, 1, name="repeats")
    for run in runs:
        run()
    turns = [[run() for run in runs] for _ in range(repeats)]
    return [list(of_run) for of_run in zip(*turns, strict=True)]


def _decode(model: Any, batch_size: int, prompt_length: int, num_tokens: int) -> float:
    """Seconds to write ``num_tokens`` tokens after the prompt has been read."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch_size, prompt_length), generator=generator).to(_device(model))
    with _evaluating(model), torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
        _wait_for(model)
        start = time.perf_counter()
        for _ in range(num_tokens):
            ids = output.logits[:, -1:].argmax(dim=-1)  # (batch, 1)
            output = model(input_ids=ids, use_cache=True, cache=output.cache)
        _wait_for(model)
        return time.perf_counter() - start


def _forward(model: nn.Module, batch: Any) -> float:
    import torch

    with _evaluating(model), torch.no_grad():
        _wait_for(model)
        start = time.perf_counter()
        _logits(model, batch)
        _wait_for(model)
        return time.perf_counter() - start


def _logits(model: nn.Module, batch: Any) -> Tensor:
    from torch import Tensor

    device = _device(model)
    if isinstance(batch, Mapping):
        result = model(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
    else:
        result = model(batch[0].to(device))
    return result if isinstance(result, Tensor) else result.logits


def _labels(batch: Any) -> Tensor:
    labels: Tensor = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    return labels


def _num_scored(batch: Any) -> int:
    """Samples, or next tokens, that the mean loss of a batch is a mean over."""
    labels = _labels(batch)
    return int((labels[:, 1:] != IGNORED).sum()) if labels.ndim > 1 else len(labels)


def _check_some(count: int) -> None:
    if not count:
        raise InputError("no-batches", "got no labels to score, expected at least one batch with one. Pass held-out data.")


def _device(model: nn.Module) -> Any:
    return next(model.parameters()).device


def _wait_for(model: nn.Module) -> None:
    """Until a graphics processor has done what it was told."""
    import torch

    if _device(model).type == "cuda":
        torch.cuda.synchronize(_device(model))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
