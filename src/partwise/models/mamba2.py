"""Where the parts of Mamba2 sit: the states of each layer.

A state is one row of the input map ``B`` and of the output map ``C`` in one group. Both come out of ``in_proj`` and pass the depthwise convolution, where their
entries lie behind each other, between those of the input and of the time step, which lie on no axis:

* rows of ``in_proj``: gate, input, ``B``, ``C``, time step
* channels of ``conv1d``: input, ``B``, ``C``

A missing state is one whose ``B`` and ``C`` are zero behind the convolution. Zero rows of ``in_proj`` alone would not do: the convolution has a bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.models.axes import CoupledAxis, Member
from partwise.models.uneven import check_plain_linear, settle_config, share_config

if TYPE_CHECKING:
    from torch import nn

    from partwise.models.axes import Axis, Part

__all__ = ["KINDS", "MODEL_TYPES", "SIZES", "block_class", "find_axes", "settle"]

MODEL_TYPES = ("mamba2",)
NAME = "mamba2"
KINDS = ("states",)
SIZES = ("state_size",)


def block_class(model_type: str) -> type[nn.Module]:
    """Class of the blocks, for ``partwise.models.uneven.per_layer_blocks``."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Block

    return Mamba2Block  # type: ignore[no-any-return]


def find_axes(model: nn.Module) -> tuple[Axis, ...]:
    """One axis ``...mixer.state`` per layer; unit ``group * state_size + state`` is one state of one group."""
    prefix, layers = _layers(model)
    return tuple(_states(layer.mixer, f"{prefix}layers.{index}.mixer") for index, layer in enumerate(layers))


def settle(small: nn.Module, axes: tuple[Axis, ...], part: Part) -> None:
    """Make configuration and attributes of a sliced model what they would be, had it been built at its size.

    Raises
    ------
    InputError
        When the groups of a layer keep different numbers of states.
    """
    _, layers = _layers(small)
    for axis in axes:
        if axis.name in part.units:
            _check_groups(axis, part.units[axis.name], num_groups=small.config.n_groups)  # type: ignore[union-attr,arg-type]
    config: Any = small.config
    for layer in layers:
        mixer = layer.mixer
        channels = int(mixer.conv1d.weight.shape[0])
        mixer.conv_dim = mixer.conv1d.in_channels = mixer.conv1d.out_channels = mixer.conv1d.groups = channels
        mixer.ssm_state_size = (channels - mixer.intermediate_size) // (2 * mixer.n_groups)
    settle_config(config, [{"state_size": layer.mixer.ssm_state_size} for layer in layers])
    share_config(small, layers, config)


def _layers(model: Any) -> tuple[str, Any]:
    base = model.base_model
    return ("" if base is model else f"{model.base_model_prefix}."), base.layers


def _states(mixer: Any, name: str) -> CoupledAxis:
    from torch import nn

    check_plain_linear(mixer.in_proj, f"{name}.in_proj", kind=nn.Linear)
    check_plain_linear(mixer.conv1d, f"{name}.conv1d", kind=nn.Conv1d)
    size, inputs = mixer.n_groups * mixer.ssm_state_size, mixer.intermediate_size
    rows, channels = (2 * inputs, 2 * inputs + size), (inputs, inputs + size)
    convolution = tuple(f"{name}.conv1d.{tensor}" for tensor, _ in mixer.conv1d.named_parameters())
    members = [Member(f"{name}.in_proj.{tensor}", 0, starts=rows, length=int(values.shape[0])) for tensor, values in mixer.in_proj.named_parameters()]
    members += [Member(tensor, 0, starts=channels, length=inputs + 2 * size) for tensor in convolution]
    return CoupledAxis(f"{name}.state", "states", size, tuple(members), readers=(), closers=convolution, groups=mixer.n_groups)


def _check_groups(axis: Axis, units: tuple[int, ...], *, num_groups: int) -> None:
    size = axis.size // num_groups
    counts = [sum(unit // size == group for unit in units) for group in range(num_groups)]
    if len(set(counts)) > 1:
        raise InputError(
            "uneven-groups",
            f"got a part whose groups keep {', '.join(map(str, counts))} of {size} states each in {axis.name}, expected one number: B and C are stored as "
            f"(groups, states). Keep {max(counts)} in every group, filling the smaller ones with their next best states.",
        )
