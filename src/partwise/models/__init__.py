"""Where parts sit in a model family, and how to take them out and put them back.

- ``parts`` - ``coupled_axes``, ``extract``, ``merge``, ``mask``.
- ``axes`` - what an axis, a unit and a part are.
- ``sampling`` - deal the units of axes into parts.
- ``llama``, ``gpt2``, ``neox``, ``mamba2``, ``vit``, ``resnet``, ``mlp`` - one file per family; ``chains`` follows data through plain networks for the last
  two.
- ``walks`` - calibration data on their way through a model, one layer at a time.
- ``cache_sizes`` - what a sequence holds in memory while a model writes on.
- ``uneven`` - transformers models whose layers differ in size.
- ``low_rank_layers`` - two thin layers in the place of a linear one.
- ``uneven_files`` - write such models to folders and read them back.
- ``networks`` - the perceptrons, ResNets and small decoders of this package.
- ``network_files`` - write plain networks to folders and read them back.
- ``names`` - where a module sits, read from its name.
- ``loading`` - load models of transformers without a word on the terminal.

Importing this package loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partwise.models.axes import Axis, BlockAxis, CoupledAxis, Member, Part, count_holders
    from partwise.models.parts import (
        coupled_axes,
        extract,
        mask,
        masked_tensors,
        merge,
        merge_tensors,
        scale_readers,
        scaled_tensors,
        slice_tensors,
        tensors_of,
        with_tensors,
    )
    from partwise.models.sampling import BernoulliSampler, DisjointSampler, FixedFractionSampler, StratifiedSampler

_HOMES = {
    **dict.fromkeys(("Axis", "BlockAxis", "CoupledAxis", "Member", "Part", "count_holders"), "axes"),
    **dict.fromkeys(("coupled_axes", "extract", "mask", "masked_tensors", "merge", "merge_tensors"), "parts"),
    **dict.fromkeys(("scale_readers", "scaled_tensors", "slice_tensors", "tensors_of", "with_tensors"), "parts"),
    **dict.fromkeys(("BernoulliSampler", "DisjointSampler", "FixedFractionSampler", "StratifiedSampler"), "sampling"),
}

__all__ = [
    "Axis",
    "BernoulliSampler",
    "BlockAxis",
    "CoupledAxis",
    "DisjointSampler",
    "FixedFractionSampler",
    "Member",
    "Part",
    "StratifiedSampler",
    "count_holders",
    "coupled_axes",
    "extract",
    "mask",
    "masked_tensors",
    "merge",
    "merge_tensors",
    "scale_readers",
    "scaled_tensors",
    "slice_tensors",
    "tensors_of",
    "with_tensors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"partwise.models.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
