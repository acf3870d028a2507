"""Learning by parts: cut a model or matrix into parts, work on them independently, put them back, keep only the useful ones.

Rooms
-----
tune : adapters by rank-one parts; finds the rank while training.
train : whole models by subnetworks; tickets of any size.
serve : generation in a fixed memory; caches that keep to a budget.
decompose : scikit-learn estimators built from rank-one parts.

Importing this package loads nothing heavy; each room loads its libraries when one of its names is first used.
"""

from __future__ import annotations

__version__ = "0.1.0"
ROOMS = ("tune", "train", "serve", "decompose")

__all__ = ["ROOMS", "__version__"]
