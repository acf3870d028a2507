"""prune: smaller dense models, cut out of trained ones and saved so that they load.

- ``ghost`` - states of Mamba2, by what each one contributes to the output; forward passes only - arXiv:2602.11408
- ``magnitude`` - units with large weights stay; a baseline that needs no data - arXiv:1608.08710
- ``random`` - units drawn by chance; what every other method has to beat
- ``taylor`` - units whose removal changes the loss most to first order; needs gradients - arXiv:1906.10771
- ``wanda`` - weights times the size of their inputs, summed over a unit - arXiv:2306.11695

``plan = METHOD.plan(model, data)`` decides what stays, ``apply(model, plan)`` cuts, ``save(model, folder)`` writes what ``partwise.load`` opens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partwise.prune.ghost import GHOST
    from partwise.prune.magnitude import Magnitude
    from partwise.prune.plan import PrunePlan, UnitPlan, apply, load_plan
    from partwise.prune.random_units import Random
    from partwise.prune.taylor import Taylor
    from partwise.prune.wanda import WandaStructured

__all__ = ["GHOST", "METHODS", "Magnitude", "PrunePlan", "Random", "Taylor", "UnitPlan", "WandaStructured", "apply", "load_plan"]

METHODS = {
    "ghost": "partwise.prune.ghost:GHOST",
    "magnitude": "partwise.prune.magnitude:Magnitude",
    "random": "partwise.prune.random_units:Random",
    "taylor": "partwise.prune.taylor:Taylor",
    "wanda": "partwise.prune.wanda:WandaStructured",
}
_OTHERS = {
    "PrunePlan": "partwise.prune.plan",
    "UnitPlan": "partwise.prune.plan",
    "apply": "partwise.prune.plan",
    "load_plan": "partwise.prune.plan",
}


def __getattr__(name: str) -> Any:
    homes = _OTHERS | {target.partition(":")[2]: target.partition(":")[0] for target in METHODS.values()}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
