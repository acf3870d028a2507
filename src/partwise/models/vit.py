"""Where the parts of a ViT sit: heads, and neurons of the feed-forward layer.

Patch and position embeddings, norms, the classifier and biases of output projections lie on no axis. The configuration of a ViT with fewer heads carries
``head_dim``, which ViTConfig does not list but keeps, and which the model reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.models.axes import CoupledAxis, Member
from partwise.models.uneven import check_plain_linear, keep_head_dim, settle_config

if TYPE_CHECKING:
    from torch import nn

    from partwise.models.axes import Axis, Part

__all__ = ["KINDS", "MODEL_TYPES", "SIZES", "find_axes", "settle"]

MODEL_TYPES = ("vit",)
NAME = "vit"
KINDS = ("heads", "neurons")
SIZES: tuple[str, ...] = ()  # one number for all layers


def find_axes(model: nn.Module) -> tuple[Axis, ...]:
    """Two axes per layer: ``...attention``, one unit per head, and ``...mlp``, one unit per neuron."""
    prefix, layers = _layers(model)
    axes: list[Axis] = []
    for index, layer in enumerate(layers):
        axes += [_heads(layer.attention, f"{prefix}layers.{index}.attention"), _neurons(layer.mlp, f"{prefix}layers.{index}.mlp")]
    return tuple(axes)


def settle(small: nn.Module, axes: tuple[Axis, ...], part: Part) -> None:
    """Make configuration and attributes of a sliced model what they would be, had it been built at its size.

    Raises
    ------
    InputError
        When layers keep different numbers of units: the blocks of a ViT do not know which layer they are.
    """
    _, layers = _layers(small)
    config: Any = small.config
    sizes = []
    for layer in layers:
        layer.attention.num_attention_heads = layer.attention.q_proj.out_features // layer.attention.head_dim
        sizes.append({"num_attention_heads": layer.attention.num_attention_heads, "intermediate_size": layer.mlp.fc1.out_features})
    for attribute in sizes[0]:
        counts = [layer[attribute] for layer in sizes]
        if len(set(counts)) > 1:
            raise InputError(
                "uneven-layers",
                f"got a part whose layers keep {attribute}={counts}, expected the same in every layer of a {type(small).__name__}: "
                "its configuration knows one. Keep equal numbers.",
            )
    keep_head_dim(config, int(layers[0].attention.head_dim), num_heads=[layer["num_attention_heads"] for layer in sizes])
    settle_config(config, sizes)


def _layers(model: Any) -> tuple[str, Any]:
    base = model.base_model
    return ("" if base is model else f"{model.base_model_prefix}."), base.layers


def _heads(attention: Any, name: str) -> CoupledAxis:
    from torch import nn

    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        check_plain_linear(getattr(attention, projection), f"{name}.{projection}", kind=nn.Linear)
    width = int(attention.head_dim)
    members = [
        Member(f"{name}.{projection}.{tensor}", 0, width)
        for projection in ("q_proj", "k_proj", "v_proj")
        for tensor, _ in getattr(attention, projection).named_parameters()
    ]
    reader = f"{name}.o_proj.weight"
    return CoupledAxis(name, "heads", attention.q_proj.out_features // width, (*members, Member(reader, 1, width)), (reader,))


def _neurons(mlp: Any, name: str) -> CoupledAxis:
    from torch import nn

    for projection in ("fc1", "fc2"):
        check_plain_linear(getattr(mlp, projection), f"{name}.{projection}", kind=nn.Linear)
    members = (Member(f"{name}.fc1.weight", 0), Member(f"{name}.fc1.bias", 0), Member(f"{name}.fc2.weight", 1))
    return CoupledAxis(name, "neurons", mlp.fc1.out_features, members, (f"{name}.fc2.weight",))
