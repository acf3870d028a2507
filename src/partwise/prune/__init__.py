"""prune: smaller dense models, cut out of trained ones and saved so that they load.

- ``ghost`` - states of Mamba2, by what each one contributes to the output; forward passes only - arXiv:2602.11408
- ``i-spasp`` - units that are large and missing from a layer's output, found in turns; inputs without labels - arXiv:2112.04905
- ``greedy`` - every layer built anew by adding the unit that brings its output closest to what it was - arXiv:2108.00259, arXiv:2003.01794
- ``lord`` - two thin layers for one, in the directions in which its outputs lie - arXiv:2309.14021
- ``edge-popup`` - single weights of an untrained network; a mask, so no speed and no memory - arXiv:1911.13299, arXiv:2210.16589
- ``magnitude`` - units with large weights stay; a baseline that needs no data - arXiv:1608.08710
- ``random`` - units drawn by chance; what every other method has to beat - arXiv:1801.10447
- ``taylor`` - units whose removal changes the loss most to first order; needs gradients - arXiv:1906.10771
- ``wanda`` - weights times the size of their inputs, summed over a unit - arXiv:2306.11695

``safe_score(model, data)`` tells which parts remember, which are computed anew for every token, and whether size is a safe score for them.

``plan = METHOD.plan(model, data)`` decides what stays, ``apply(model, plan)`` cuts, ``save(model, folder)`` writes what ``partwise.load`` opens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partwise.prune.edge_popup import EdgePopup
    from partwise.prune.ghost import GHOST
    from partwise.prune.greedy import GreedyForwardSelection
    from partwise.prune.i_spasp import ISpaSP
    from partwise.prune.lord import LoRD
    from partwise.prune.low_rank import LowRankPlan
    from partwise.prune.magnitude import Magnitude
    from partwise.prune.plan import PrunePlan, UnitPlan, apply, load_plan
    from partwise.prune.projected_sgd import ProjectedSGD
    from partwise.prune.random_units import Random
    from partwise.prune.safe_scores import SafeScore, advise, safe_score
    from partwise.prune.saving import save
    from partwise.prune.taylor import Taylor
    from partwise.prune.wanda import WandaStructured
    from partwise.prune.weight_mask import WeightMaskPlan

__all__ = [
    "GHOST", "METHODS", "EdgePopup", "GreedyForwardSelection", "ISpaSP", "LoRD", "LowRankPlan", "Magnitude", "ProjectedSGD", "PrunePlan", "Random",
    "SafeScore", "Taylor", "UnitPlan", "WandaStructured", "WeightMaskPlan", "advise", "apply", "load_plan", "safe_score", "save",
]  # fmt: skip

METHODS = {
    "ghost": "partwise.prune.ghost:GHOST",
    "i-spasp": "partwise.prune.i_spasp:ISpaSP",
    "greedy": "partwise.prune.greedy:GreedyForwardSelection",
    "lord": "partwise.prune.lord:LoRD",
    "edge-popup": "partwise.prune.edge_popup:EdgePopup",
    "magnitude": "partwise.prune.magnitude:Magnitude",
    "random": "partwise.prune.random_units:Random",
    "taylor": "partwise.prune.taylor:Taylor",
    "wanda": "partwise.prune.wanda:WandaStructured",
}
_OTHERS = {
    "LowRankPlan": "partwise.prune.low_rank",
    "ProjectedSGD": "partwise.prune.projected_sgd",
    "PrunePlan": "partwise.prune.plan",
    "SafeScore": "partwise.prune.safe_scores",
    "UnitPlan": "partwise.prune.plan",
    "WeightMaskPlan": "partwise.prune.weight_mask",
    "advise": "partwise.prune.safe_scores",
    "apply": "partwise.prune.plan",
    "load_plan": "partwise.prune.plan",
    "safe_score": "partwise.prune.safe_scores",
    "save": "partwise.prune.saving",
}


def __getattr__(name: str) -> Any:
    homes = _OTHERS | {target.partition(":")[2]: target.partition(":")[0] for target in METHODS.values()}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
