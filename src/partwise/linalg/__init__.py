"""Pure maths: functions of arrays that return arrays, with no files, no logging and no global seed.

- ``rank_one`` - rank-one regression: its closed form, and solver steps on a deflated target.
- ``deflation`` - remove rank-one parts from a matrix; how far a part is from the exact one.
- ``bounds`` - what theory says about errors, rates and warm-up rounds of deflation.
- ``certificate`` - residuals, guaranteed intervals of eigenvalues, and a probe for missed ones.
- ``compute_schedule`` - deal a number of steps to components.
- ``subspace`` - angles, gaps, low-rank projections.
- ``partition`` - deal units into parts: disjoint, overlapping, at random.
- ``slicing`` - cut entries out of a tensor, and put pieces back as the mean over their holders.
- ``rankings`` - how far one ranking is from another.
- ``output_basis`` - the directions in which the outputs of a linear layer lie.
- ``unit_worth`` - what a unit adds to the layer that reads it.
- ``unit_products`` - what pairs of units do together in the layer that reads them.
- ``greedy_selection`` - units added one by one, each time the one that brings their sum closest to a target.
- ``sparse_recovery`` - the units that explain what a layer gives, by the iteration of i-SpaSP.
- ``masked_neurons`` - training one hidden layer by subnetworks: what sampling costs, and how fast theory says it converges.
- ``subset_sums`` - how near sums of some of a few numbers come to a target, by trying all of them.
- ``products`` - matrix products whose bits do not depend on the batch.

Importing this package loads none of them; ``rank_one_step`` and ``deflate`` load torch when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partwise.linalg.deflation import deflate
    from partwise.linalg.rank_one import rank_one_step

__all__ = ["deflate", "rank_one_step"]

_HOMES = {"deflate": "partwise.linalg.deflation", "rank_one_step": "partwise.linalg.rank_one"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
