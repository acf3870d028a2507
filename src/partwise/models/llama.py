"""Where the parts of a Llama-type decoder sit: groups of heads around one key-value head, and neurons of the gated feed-forward layer.

Embeddings, norms over the hidden size, the output layer and biases of output projections lie on no axis. Qwen3's norms inside a head are shared by all heads
of a layer and lie on none either. Tied embeddings stay tied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.models.axes import CoupledAxis, Member
from partwise.models.uneven import check_plain_linear, keep_head_dim, nearest_allowed, refused_by, settle_config, share_config

if TYPE_CHECKING:
    from torch import nn

    from partwise.models.axes import Axis, Part

__all__ = ["KINDS", "MODEL_TYPES", "SIZES", "block_class", "check_loadable", "find_axes", "settle"]

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
NAME = ", ".join(MODEL_TYPES)
KINDS = ("heads", "neurons")
SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def block_class(model_type: str) -> type[nn.Module]:
    """Class of the blocks of a family, for ``partwise.models.uneven.per_layer_blocks``."""
    import importlib

    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    [block] = [value for name, value in vars(module).items() if name.endswith("DecoderLayer") and value.__module__ == module.__name__]
    return block  # type: ignore[no-any-return]


def find_axes(model: nn.Module) -> tuple[Axis, ...]:
    """Two axes per layer: ``...self_attn``, one unit per key-value head with all query heads that read it, and ``...mlp``, one unit per neuron."""
    prefix, layers = _layers(model)
    axes: list[Axis] = []
    for index, layer in enumerate(layers):
        axes += [_heads(layer.self_attn, f"{prefix}layers.{index}.self_attn"), _neurons(layer.mlp, f"{prefix}layers.{index}.mlp")]
    return tuple(axes)


def settle(small: nn.Module, axes: tuple[Axis, ...], part: Part) -> None:
    """Make configuration and attributes of a sliced model what they would be, had it been built at its size."""
    _, layers = _layers(small)
    config: Any = small.config
    head_dim = int(layers[0].self_attn.head_dim)
    sizes = []
    for layer in layers:
        attention, layer.mlp.intermediate_size = layer.self_attn, layer.mlp.down_proj.in_features
        heads, groups = attention.q_proj.out_features // head_dim, attention.k_proj.out_features // head_dim
        sizes.append({"num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": layer.mlp.intermediate_size})
    keep_head_dim(config, head_dim, num_heads=[layer["num_attention_heads"] for layer in sizes])
    settle_config(config, sizes)
    share_config(small, layers, config)


def check_loadable(small: nn.Module, axes: tuple[Axis, ...]) -> None:
    """Refuse a number of heads with which the configuration's own class would not load (Llama's wants one that divides the hidden size)."""
    config: Any = small.config
    if (reason := refused_by(config)) is None:
        return
    attention = _layers(small)[1][0].self_attn
    groups, queries = attention.k_proj.out_features // int(attention.head_dim), int(attention.num_key_value_groups)
    largest = max((axis.size for axis in axes if axis.kind == "heads"), default=groups)
    nearest = nearest_allowed(config, lambda number: {"num_attention_heads": number * queries}, wanted=groups, largest=largest)
    raise InputError(
        "config-refuses-heads",
        f"got a part with {groups} of {largest} head groups per layer, {groups * queries} heads, which {type(config).__name__} refuses: {reason} "
        f"The nearest that it takes is {' or '.join(map(str, nearest))}. Keep that many groups, or pass loadable=False if this model is never saved.",
    )


def _layers(model: Any) -> tuple[str, Any]:
    base = model.base_model
    return ("" if base is model else f"{model.base_model_prefix}."), base.layers


def _heads(attention: Any, name: str) -> CoupledAxis:
    from torch import nn

    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        check_plain_linear(getattr(attention, projection), f"{name}.{projection}", kind=nn.Linear)
    head_dim, queries = int(attention.head_dim), int(attention.num_key_value_groups)
    widths = {"q_proj": head_dim * queries, "k_proj": head_dim, "v_proj": head_dim}
    members = [
        Member(f"{name}.{projection}.{tensor}", 0, width)
        for projection, width in widths.items()
        for tensor, _ in getattr(attention, projection).named_parameters()
    ]
    reader = f"{name}.o_proj.weight"
    return CoupledAxis(name, "heads", attention.k_proj.out_features // head_dim, (*members, Member(reader, 1, head_dim * queries)), (reader,))


def _neurons(mlp: Any, name: str) -> CoupledAxis:
    from torch import nn

    for projection in ("gate_proj", "up_proj", "down_proj"):
        check_plain_linear(getattr(mlp, projection), f"{name}.{projection}", kind=nn.Linear)
    members = [
        Member(f"{name}.{projection}.{tensor}", 0)
        for projection in ("gate_proj", "up_proj")
        for tensor, _ in getattr(mlp, projection).named_parameters()
    ]
    reader = f"{name}.down_proj.weight"
    return CoupledAxis(name, "neurons", mlp.down_proj.in_features, (*members, Member(reader, 1)), (reader,))
