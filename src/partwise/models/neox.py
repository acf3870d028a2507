"""Where the parts of GPT-NeoX sit: neurons of the feed-forward layer.

Heads lie on no axis: GPTNeoXConfig derives the size of a head from the hidden size and the number of heads, so it cannot describe a model that lost a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from partwise.models.axes import CoupledAxis, Member
from partwise.models.uneven import check_plain_linear, settle_config, share_config

if TYPE_CHECKING:
    from torch import nn

    from partwise.models.axes import Axis, Part

__all__ = ["KINDS", "MODEL_TYPES", "RENAMED", "SIZES", "block_class", "find_axes", "settle"]

MODEL_TYPES = ("gpt_neox",)
NAME = "gpt_neox"
KINDS = ("neurons",)
SIZES = ("intermediate_size",)
RENAMED = {"embed_out.weight": "lm_head.weight"}  # name in a file -> name in the model


def block_class(model_type: str) -> type[nn.Module]:
    """Class of the blocks, for ``partwise.models.uneven.per_layer_blocks``."""
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer

    return GPTNeoXLayer  # type: ignore[no-any-return]


def find_axes(model: nn.Module) -> tuple[Axis, ...]:
    """One axis ``...mlp`` per layer, one unit per neuron."""
    prefix, layers = _layers(model)
    return tuple(_neurons(layer.mlp, f"{prefix}layers.{index}.mlp") for index, layer in enumerate(layers))


def settle(small: nn.Module, axes: tuple[Axis, ...], part: Part) -> None:
    """Make the configuration of a sliced model what it would be, had it been built at its size."""
    _, layers = _layers(small)
    config: Any = small.config
    settle_config(config, [{"intermediate_size": layer.mlp.dense_4h_to_h.in_features} for layer in layers])
    share_config(small, layers, config)


def _layers(model: Any) -> tuple[str, Any]:
    base = model.base_model
    return ("" if base is model else f"{model.base_model_prefix}."), base.layers


def _neurons(mlp: Any, name: str) -> CoupledAxis:
    from torch import nn

    for projection in ("dense_h_to_4h", "dense_4h_to_h"):
        check_plain_linear(getattr(mlp, projection), f"{name}.{projection}", kind=nn.Linear)
    reader = f"{name}.dense_4h_to_h.weight"
    members = (Member(f"{name}.dense_h_to_4h.weight", 0), Member(f"{name}.dense_h_to_4h.bias", 0), Member(reader, 1))
    return CoupledAxis(name, "neurons", mlp.dense_4h_to_h.in_features, members, (reader,))
