"""Hidden states of prompts: one pass of a model without its head, each prompt on its own terms although they are read in batches."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from partwise.checks import InputError
from partwise.serve._evaluating import evaluating

__all__ = ["describe_prompts", "num_layers"]


def num_layers(probe: Any) -> int:
    """Hidden states that a probe has: one for each layer, and the embeddings."""
    config: Any = getattr(probe, "config", None)
    if not hasattr(config, "num_hidden_layers") or not callable(getattr(probe, "get_input_embeddings", None)):
        raise _no_hidden_states(probe)
    return int(config.num_hidden_layers) + 1


def describe_prompts(
    probe: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    describe: Callable[[Tensor], Tensor],
    *,
    layers: Sequence[int],
    max_length: int,
    batch_size: int,
) -> Tensor:
    """What ``describe`` makes of the states of each prompt's last ``max_length`` tokens, (layers, tokens, dim) in float32: (prompts, ...) on the CPU."""
    ids = [_ids(tokenizer, prompt)[-max_length:] for prompt in prompts]
    by_length = sorted(range(len(ids)), key=lambda number: len(ids[number]))  # little padding
    found: dict[int, Tensor] = {}
    with _reading(probe) as reader:
        for start in range(0, len(ids), batch_size):
            rows = by_length[start : start + batch_size]
            states = _states(reader, [ids[row] for row in rows], layers)
            for number, row in enumerate(rows):
                own = torch.stack([of_layer[number, : len(ids[row])] for of_layer in states])  # (layers, tokens, dim)
                found[row] = describe(own.float()).cpu()
    return torch.stack([found[number] for number in range(len(ids))])


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise InputError("prompt-empty", f"got the prompt {prompt!r}, which has no tokens, expected some text. Leave empty prompts out.")
    return ids


@contextlib.contextmanager
def _reading(probe: Any) -> Iterator[Any]:
    """The model below the head, in evaluation mode and without gradients; afterwards as it was."""
    reader = probe.base_model
    if getattr(probe.config, "is_encoder_decoder", False):
        reader = probe.get_encoder()
    with evaluating(reader):
        yield reader


def _states(reader: Any, ids: Sequence[Sequence[int]], layers: Sequence[int]) -> list[Tensor]:
    """Of the chosen layers, (batch, tokens, dim) each."""
    longest, device = max(map(len, ids)), next(reader.parameters()).device
    # At the right, where a causal model cannot see it; others get the mask.
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=device)  # (batch, tokens)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
    options = {"use_cache": False} if "use_cache" in inspect.signature(reader.forward).parameters else {}
    output = reader(input_ids=padded, attention_mask=mask, output_hidden_states=True, **options)
    states = getattr(output, "hidden_states", None)
    if states is None or len(states) <= max(layers):
        raise _no_hidden_states(reader)
    return [states[layer] for layer in layers]


def _no_hidden_states(probe: Any) -> InputError:
    return InputError(
        "probe-no-hidden-states",
        f"got {type(probe).__name__}, which gives no hidden states of its layers, expected a language model of transformers. Pass another probe.",
    )
