"""Where the parts of GPT-2 sit: neurons of the feed-forward layer.

Heads lie on no axis: GPT2Config derives the size of a head from the hidden size and the number of heads, so it cannot describe a model that lost a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from partwise.models.axes import CoupledAxis, Member
from partwise.models.uneven import check_plain_linear, settle_config, share_config

if TYPE_CHECKING:
    from torch import nn

    from partwise.models.axes import Axis, Part

__all__ = ["KINDS", "MODEL_TYPES", "SIZES", "block_class", "find_axes", "settle"]

MODEL_TYPES = ("gpt2",)
NAME = "gpt2"
KINDS = ("neurons",)
SIZES = ("n_inner",)


def block_class(model_type: str) -> type[nn.Module]:
    """Class of the blocks, for ``partwise.models.uneven.per_layer_blocks``."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    return GPT2Block  # type: ignore[no-any-return]


def find_axes(model: nn.Module) -> tuple[Axis, ...]:
    """One axis ``...mlp`` per layer, one unit per neuron."""
    prefix, layers = _layers(model)
    return tuple(_neurons(layer.mlp, f"{prefix}h.{index}.mlp") for index, layer in enumerate(layers))


def settle(small: nn.Module, axes: tuple[Axis, ...], part: Part) -> None:
    """Make configuration and attributes of a sliced model what they would be, had it been built at its size."""
    _, layers = _layers(small)
    config: Any = small.config
    sizes = []
    for layer in layers:
        rows, columns = layer.mlp.c_fc.weight.shape
        layer.mlp.c_fc.nx, layer.mlp.c_fc.nf = rows, columns
        layer.mlp.c_proj.nx = columns
        sizes.append({"n_inner": columns})
    # A configuration without n_inner means four times the hidden size: leave it so where that is still true.
    if config.n_inner is not None or any(layer["n_inner"] != 4 * config.hidden_size for layer in sizes):
        settle_config(config, sizes)
    share_config(small, layers, config)


def _layers(model: Any) -> tuple[str, Any]:
    base = model.base_model
    return ("" if base is model else f"{model.base_model_prefix}."), base.h


def _neurons(mlp: Any, name: str) -> CoupledAxis:
    from transformers.pytorch_utils import Conv1D

    for projection in ("c_fc", "c_proj"):
        check_plain_linear(getattr(mlp, projection), f"{name}.{projection}", kind=Conv1D)
    # Conv1D stores (inputs, outputs), the transpose of Linear.
    members = (Member(f"{name}.c_fc.weight", 1), Member(f"{name}.c_fc.bias", 0), Member(f"{name}.c_proj.weight", 0))
    return CoupledAxis(name, "neurons", int(mlp.c_fc.weight.shape[1]), members, (f"{name}.c_proj.weight",))
