"""decompose: scikit-learn estimators built from parts that are worked on apart. Rows are samples.

- ``parallel-deflation-pca`` - principal components learned all at once, one worker per component, with error intervals - arXiv:2502.17615
- ``hotelling-deflation-pca`` - principal components one after the other, with an account of how errors add up - arXiv:2310.04283
- ``eigengame`` - principal components as players who keep clear of those in front; the rival of parallel deflation - arXiv:2102.04152
- ``parallel-rank-one-regression`` - low-rank regression, one worker per rank-one map, all at once; errors heal from round to round - arXiv:2605.10741
- ``sequential-rank-one-regression`` - low-rank regression, one rank-one map after the other, each frozen when done - arXiv:2505.22602

``certify(X, components)`` says how far anybody's principal components can be from the true ones; ``open_rows(path)`` reads data larger than memory.

Needs the extra ``sklearn``; scikit-learn loads when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from partwise.checks import load_extra

if TYPE_CHECKING:
    from partwise.decompose._certify import certify
    from partwise.decompose._matrix_files import open_rows
    from partwise.decompose.eigengame import EigenGame
    from partwise.decompose.hotelling_deflation import HotellingDeflationPCA
    from partwise.decompose.parallel_deflation import ParallelDeflationPCA
    from partwise.decompose.rank_one_regression import ParallelRankOneRegression, SequentialRankOneRegression

__all__ = [
    "METHODS",
    "EigenGame",
    "HotellingDeflationPCA",
    "ParallelDeflationPCA",
    "ParallelRankOneRegression",
    "SequentialRankOneRegression",
    "certify",
    "open_rows",
]

METHODS = {
    "parallel-deflation-pca": "partwise.decompose.parallel_deflation:ParallelDeflationPCA",
    "hotelling-deflation-pca": "partwise.decompose.hotelling_deflation:HotellingDeflationPCA",
    "eigengame": "partwise.decompose.eigengame:EigenGame",
    "parallel-rank-one-regression": "partwise.decompose.rank_one_regression:ParallelRankOneRegression",
    "sequential-rank-one-regression": "partwise.decompose.rank_one_regression:SequentialRankOneRegression",
}
_FUNCTIONS = {"certify": "partwise.decompose._certify", "open_rows": "partwise.decompose._matrix_files"}


def __getattr__(name: str) -> Any:
    homes = _FUNCTIONS | {target.partition(":")[2]: target.partition(":")[0] for target in METHODS.values()}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load_extra("sklearn", extra="sklearn")
    return getattr(importlib.import_module(homes[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
