"""Adapters by rank-one parts: what comes out is always a plain LoRA adapter.

Methods
-------
adapad - parallel rank-one adapters; every module's rank is found while training - arXiv:2605.10741
one-rank-at-a-time - sequential rank-one adapters; stops when another one no longer helps - arXiv:2505.22602
increlora - joint training with growing ranks - arXiv:2308.12043
lora - fixed rank, peft's own - arXiv:2106.09685
adalora - ranks pruned while training, peft's own - arXiv:2303.10512
eva - ranks from activations before training, peft's own - arXiv:2410.07170
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partwise.tune.adapad import AdaPaDConfig, attach, step_done
    from partwise.tune.callback import AdaPaDCallback
    from partwise.tune.exact import RepeatForLevels, level_passes
    from partwise.tune.finished import finalize, rank_table, truncate
    from partwise.tune.one_rank_at_a_time import OneRankAtATime
    from partwise.tune.servable import check_servable

__all__ = [
    "METHODS",
    "AdaPaDCallback",
    "AdaPaDConfig",
    "OneRankAtATime",
    "RepeatForLevels",
    "attach",
    "check_servable",
    "finalize",
    "level_passes",
    "rank_table",
    "step_done",
    "truncate",
]

METHODS = {
    "adapad": "partwise.tune.adapad_recipe:AdaPaD",
    "one-rank-at-a-time": "partwise.tune.one_rank_at_a_time:OneRank",
    "increlora": "partwise.tune.increlora:IncreLoRA",
    "lora": "partwise.tune.lora:LoRA",
    "adalora": "partwise.tune.adalora:AdaLoRA",
    "eva": "partwise.tune.eva:EVA",
}

_HOMES = {
    "AdaPaDCallback": "partwise.tune.callback",
    "OneRankAtATime": "partwise.tune.one_rank_at_a_time",
    "RepeatForLevels": "partwise.tune.exact",
    "check_servable": "partwise.tune.servable",
    "finalize": "partwise.tune.finished",
    "level_passes": "partwise.tune.exact",
    "rank_table": "partwise.tune.finished",
    "truncate": "partwise.tune.finished",
}


def __getattr__(name: str) -> Any:
    """Load peft and transformers only when a public name is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "partwise.tune.adapad")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
