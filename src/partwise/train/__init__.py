"""train: whole models by subnetworks that are trained apart for a while, put back together, and cut anew.

- ``twist`` - transformers by head groups and MLP blocks; at the end tickets of any size, without pruning - arXiv:2511.03983
- ``ist`` - disjoint neurons of every hidden layer: less memory and traffic per worker - arXiv:1910.02120
- ``resist`` - residual blocks of one long section of a ResNet - arXiv:2107.00961
- ``loft`` - filters of residual blocks; at the end the largest make a lottery ticket - arXiv:2210.16169
- ``local-sgd`` - the whole model on every worker, averaged now and then; a baseline - arXiv:1805.09767
- ``diloco`` - local AdamW and an outer Nesterov step on the mean change; a baseline - arXiv:2311.08105

``SubnetTrainer(model, method).fit(loader, num_rounds=...)`` trains any of them, here or on Ray workers; ``load_ticket(folder)`` opens what a run leaves;
``bytes_per_round(method, model)`` says beforehand what a round sends.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partwise.train.diloco import DiLoCo
    from partwise.train.ist import IST
    from partwise.train.local_sgd import LocalSGD
    from partwise.train.loft import LoFT, TicketMonitor
    from partwise.train.optimizer import OptimizerSettings
    from partwise.train.resist import ResIST
    from partwise.train.ticket import Ticket, load_ticket
    from partwise.train.traffic import bytes_per_round
    from partwise.train.trainer import SubnetTrainer
    from partwise.train.twist import TwIST

__all__ = [
    "IST",
    "METHODS",
    "DiLoCo",
    "LoFT",
    "LocalSGD",
    "OptimizerSettings",
    "ResIST",
    "SubnetTrainer",
    "Ticket",
    "TicketMonitor",
    "TwIST",
    "bytes_per_round",
    "load_ticket",
]

METHODS = {
    "twist": "partwise.train.twist:TwIST",
    "ist": "partwise.train.ist:IST",
    "resist": "partwise.train.resist:ResIST",
    "loft": "partwise.train.loft:LoFT",
    "local-sgd": "partwise.train.local_sgd:LocalSGD",
    "diloco": "partwise.train.diloco:DiLoCo",
}
_OTHERS = {
    "OptimizerSettings": "partwise.train.optimizer",
    "SubnetTrainer": "partwise.train.trainer",
    "Ticket": "partwise.train.ticket",
    "TicketMonitor": "partwise.train.loft",
    "bytes_per_round": "partwise.train.traffic",
    "load_ticket": "partwise.train.ticket",
}


def __getattr__(name: str) -> Any:
    homes = _OTHERS | {target.partition(":")[2]: target.partition(":")[0] for target in METHODS.values()}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
