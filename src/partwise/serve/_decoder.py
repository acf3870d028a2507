"""What the configuration of a model says about its cache, and which models are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from partwise.checks import InputError

__all__ = ["LayerShape", "check_layer_types", "decoder_config", "layer_shapes", "unsupported"]

OWN_WINDOW = {"sliding_attention", "chunked_attention", "linear_attention", "conv"}  # layers whose memory is bounded already


def decoder_config(model: Any) -> Any:
    """Configuration of the part of a model that writes."""
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise unsupported(type(model).__name__, "it is no model of transformers", advice="Pass the model itself.")
    if model.config.is_encoder_decoder:
        raise unsupported(type(model).__name__, "it has an encoder and a decoder")
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "kv_sharing_modes", None) is not None or bool(getattr(config, "num_kv_shared_layers", False)):
        raise unsupported(type(model).__name__, "some of its layers share keys and values")
    return config


def check_layer_types(name: str, types: Sequence[str]) -> None:
    """Refuse kinds of layers that a budget does not fit."""
    strange = sorted(set(types) - OWN_WINDOW - {"full_attention"})
    if strange:
        raise unsupported(name, f"it has layers of type {', '.join(strange)}")
    if "full_attention" not in types:
        raise unsupported(
            name, f"all its layers are of type {', '.join(sorted(set(types)))}", advice="Their memory is bounded already: use no cache of ours."
        )


@dataclass(frozen=True)
class LayerShape:
    """Heads of one layer.

    Parameters
    ----------
    query_heads, kv_heads : int
        How many, and how many of keys.
    dim : int
        Dimensions of a query, a key or a value.
    """

    query_heads: int
    kv_heads: int
    dim: int

    @property
    def numbers_per_token(self) -> int:
        """In keys and values."""
        return self.kv_heads * 2 * self.dim


def layer_shapes(config: Any) -> tuple[LayerShape, ...]:
    """One for each layer; layers may differ in size."""
    return tuple(LayerShape(int(own.num_attention_heads), _kv_heads(own), _head_dim(own)) for own in config.per_layer_config)


def _head_dim(config: Any) -> int:
    found = getattr(config, "head_dim", None)
    return int(found) if found else int(config.hidden_size) // int(config.num_attention_heads)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def unsupported(name: str, why: str, *, advice: str = "") -> InputError:
    """The refusal of a model, and why."""
    tested = "Llama, Qwen2, Qwen3, Mistral, Gemma2, Gemma3, Phi3, OPT and GPT-NeoX"
    return InputError(
        "cache-unsupported-model",
        f"got {name}, which cannot have a cache with a budget: {why}. Expected a decoder such as {tested}. {advice or 'Use a full cache for it.'}",
    )
