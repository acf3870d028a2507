"""What a cache holds and what it let go, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CacheReport", "LayerReport"]


@dataclass(frozen=True)
class LayerReport:
    """One layer of a cache.

    Parameters
    ----------
    index : int
        Number of the layer in the model.
    budget : int or None
        Tokens per row and head; None for a layer that bounds itself.
    slots : int
        Tokens cached now, per row and head.
    bytes, bytes_full : int
        Bytes held now, and those of keys and values of all tokens that passed, in the model's dtype.
    evictions : int
        How often tokens were let go.
    mass_kept : float or None
        Share of its attention that the last query before an eviction had on the tokens that stayed, mean over the evictions where it was measured.
    """

    index: int
    budget: int | None
    slots: int
    bytes: int
    bytes_full: int
    evictions: int
    mass_kept: float | None


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds and what it let go.

    Parameters
    ----------
    layers : tuple of LayerReport
        In the order of the model.
    bytes, bytes_full : int
        Bytes of all tensors held now, notes about tokens included, and those of a full cache after as many tokens.
    max_bytes : int
        Bytes that are never exceeded between two calls, for this number of rows.
    tokens_seen : int
        Tokens that passed, padding included.
    evictions : int
        Sum over the layers.
    mass_kept : float or None
        Mean over the layers.
    """

    layers: tuple[LayerReport, ...]
    bytes: int
    bytes_full: int
    max_bytes: int
    tokens_seen: int
    evictions: int
    mass_kept: float | None
