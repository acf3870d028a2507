"""Configurations of transformers models whose layers differ in size.

transformers writes the sizes of such layers into ``config.json`` as ``per_layer_config``, but its models do not read them yet. ``per_layer_blocks`` is
the bridge: inside it, each block is built from the configuration of its own layer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_plain_linear", "keep_head_dim", "nearest_allowed", "per_layer_blocks", "refused_by", "settle_config", "share_config"]


def settle_config(config: Any, sizes: Sequence[Mapping[str, int]]) -> None:
    """Write the sizes of all layers into ``config``, in place.

    Where all layers agree, the result is an ordinary configuration that stock code reads. Otherwise the layers that differ from what ``config`` says
    get an entry in ``per_layer_config``.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the whole model.
    sizes : sequence of mapping of str to int
        For each layer, attribute -> value; the same attributes for all layers.
    """
    # What an uneven parent says of other attributes stays.
    others = {
        int(layer): {name: value for name, value in overrides.items() if name not in sizes[0]}
        for layer, overrides in (config.to_dict().get("per_layer_config") or {}).items()
    }
    config.per_layer_config = None
    even = {name: value for name, value in sizes[0].items() if all(layer[name] == value for layer in sizes)}
    for name, value in even.items():
        setattr(config, name, value)
    uneven = {
        layer: others.get(layer, {}) | {name: value for name, value in of_layer.items() if name not in even} for layer, of_layer in enumerate(sizes)
    }
    if any(uneven.values()):
        # Validators of some configurations read the global value, which is the parent's and valid.
        config.allow_global_per_layer_attribute_access = True
        config.per_layer_config = uneven


def keep_head_dim(config: Any, head_dim: int, *, num_heads: Iterable[int]) -> None:
    """State the size of a head where the configuration would derive another one from a number of heads that fell."""
    if getattr(config, "head_dim", None) is not None or any(config.hidden_size != head_dim * number for number in num_heads):
        config.head_dim = head_dim


def refused_by(config: Any) -> str | None:
    """Why the configuration's own class would not load it, or None."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        config.validate()
    except StrictDataclassError as error:
        return str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
    return None


def share_config(model: nn.Module, layers: Sequence[nn.Module], config: Any) -> None:
    """Give every module the configuration that it would have been built from."""
    for layer, block in enumerate(layers):
        own = config.per_layer_config[layer] if config.is_heterogeneous else config
        for module in block.modules():
            if hasattr(module, "config"):
                module.config = own


@contextlib.contextmanager
def per_layer_blocks(block_class: type[nn.Module]) -> Iterator[None]:
    """Build each block of a model with uneven layers from the configuration of its own layer.

    Works for constructing a model and for ``from_pretrained``; models whose layers agree are built as always.

    Parameters
    ----------
    block_class : type
        Class of the model's blocks; its constructor takes ``config`` and ``layer_idx``.
    """
    original: Callable[..., None] = block_class.__init__

    def from_own_layer(self: nn.Module, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        original(self, config.per_layer_config[layer_idx] if config.is_heterogeneous else config, layer_idx, *args, **kwargs)

    block_class.__init__ = from_own_layer  # type: ignore[method-assign]
    try:
        yield
    finally:
        block_class.__init__ = original  # type: ignore[method-assign]


def nearest_allowed(config: Any, attributes: Callable[[int], Mapping[str, int]], *, wanted: int, largest: int) -> tuple[int, ...]:
    """The numbers from 1 to ``largest`` nearest to ``wanted`` with which the configuration's own class would load it."""
    allowed = []
    for number in range(1, largest + 1):
        trial = copy.deepcopy(config)
        for name, value in attributes(number).items():
            setattr(trial, name, value)
        if refused_by(trial) is None:
            allowed.append(number)
    distance = min((abs(number - wanted) for number in allowed), default=0)
    return tuple(number for number in allowed if abs(number - wanted) == distance)


def check_plain_linear(module: Any, name: str, *, kind: type) -> None:
    """Refuse quantised and wrapped layers, whose rows and columns are not where they seem."""
    if type(module) is not kind:
        is_thin = type(module).__name__ == "LowRankLinear"
        advice = "Cut units first, and make layers thin then." if is_thin else "Dequantise the model, or merge its adapters, first."
        raise InputError(
            "unsupported-layer",
            f"{name} is a {type(module).__module__}.{type(module).__name__}, expected a plain {kind.__name__}. {advice}",
        )
