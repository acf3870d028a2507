"""What a sequence holds in memory while a model writes on: recurrent states, or keys and values, measured on the model's own cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partwise.models.axes import Axis

__all__ = ["CacheSize", "cache_sizes", "total_cache_bytes", "unit_cache_bytes"]


@dataclass(frozen=True)
class CacheSize:
    """Bytes that one layer holds for one sequence.

    Parameters
    ----------
    recurrent : int
        Recurrent state, whatever the length of the text.
    convolution : int
        Last inputs of a convolution, whatever the length of the text.
    per_token : int
        Keys and values of one token.
    channels : int, default=1
        Channels of the convolution.
    window : int, optional
        Tokens of which keys and values are held at most. Left out: all.
    """

    recurrent: int = 0
    convolution: int = 0
    per_token: int = 0
    channels: int = 1
    window: int | None = None

    def at(self, num_tokens: int) -> int:
        """Bytes after so many tokens."""
        return self.recurrent + self.convolution + self.attention_at(num_tokens)

    def attention_at(self, num_tokens: int) -> int:
        """Bytes of keys and values after so many tokens."""
        return self.per_token * (num_tokens if self.window is None else min(num_tokens, self.window))


def cache_sizes(model: Any) -> tuple[CacheSize, ...]:
    """One entry per layer, read from the cache after one token; nothing for models that write no text.

    Parameters
    ----------
    model : torch.nn.Module
        Run on one token in evaluation mode, and left as it was.
    """
    import torch

    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "prepare_inputs_for_generation"):
        return ()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True)
    finally:
        for module, training in modes:
            module.training = training
    return tuple(_size_of(layer) for layer in outputs["cache"].layers)


def total_cache_bytes(sizes: tuple[CacheSize, ...], *, num_tokens: int) -> int:
    """Bytes of a whole sequence after so many tokens."""
    return sum(size.at(num_tokens) for size in sizes)


def unit_cache_bytes(axis: Axis, size: CacheSize, *, num_tokens: int) -> int:
    """Bytes that one unit of an axis holds of a sequence: its state with its convolution channels, or keys and values of its head.

    Parameters
    ----------
    axis : CoupledAxis or BlockAxis
        States and heads hold something, other kinds nothing.
    size : CacheSize
        Of the layer that the axis lies in.
    num_tokens : int
        Length of the sequence.
    """
    if axis.kind == "states":
        return size.recurrent // axis.size + 2 * (size.convolution // size.channels)
    return size.attention_at(num_tokens) // axis.size if axis.kind == "heads" else 0


def _size_of(layer: Any) -> CacheSize:
    from torch import Tensor

    def held(of: Any) -> list[Tensor]:
        values = of.values() if isinstance(of, dict) else [of]
        return [value for value in values if isinstance(value, Tensor)]

    recurrent, convolution = held(getattr(layer, "recurrent_states", None)), held(getattr(layer, "conv_states", None))
    attention = held(getattr(layer, "keys", None)) + held(getattr(layer, "values", None))
    window = getattr(layer, "sliding_window", None)
    return CacheSize(
        recurrent=sum(tensor.nbytes for tensor in recurrent),
        convolution=sum(tensor.nbytes for tensor in convolution),
        per_token=sum(tensor.nbytes for tensor in attention),
        channels=convolution[0].shape[1] if convolution else 1,
        window=None if window is None else window - 1,  # the token that is being read is no part of the cache
    )
