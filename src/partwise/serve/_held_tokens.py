"""What one layer of a cache with a budget holds, and how transformers handles it."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from partwise.checks import InputError, RunError
from partwise.serve._no_gradient import NoWayBack
from partwise.serve._slots import Slots

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.serve._packed_store import PackedStore
    from partwise.serve._plain_store import PlainStore

    Store = PlainStore | PackedStore

__all__ = ["MARK", "PREFIX", "HeldTokens", "Shared"]

PREFIX = "partwise_"  # of the names of our attention functions
MARK = "_partwise_layer"  # on the keys that `update` returns: it leads the attention function back to the layer


@dataclass
class Shared:
    """What the layers of one cache know together.

    Parameters
    ----------
    config : Any
        Configuration of the model's decoder.
    modules : WeakSet
        Modules of the model: attention of another one is refused.
    masked_at : int or None
        Tokens that had passed when the model last made a mask: another one is a user's own.
    waiting : bool
        A layer has added tokens, and the model's attention has not come back to it.
    """

    config: Any
    modules: weakref.WeakSet[Any]
    masked_at: int | None = None
    waiting: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """A copied cache serves the same model."""
        copied: Shared = memo.setdefault(id(self), Shared(self.config, self.modules, self.masked_at, self.waiting))
        return copied


class HeldTokens(CacheLayerMixin):
    """Keys and values of one layer, and what is noted about them; `BudgetedLayer` says what happens in a call of the model.

    Parameters
    ----------
    budget : int
        Tokens per row and head that memory is held for, and one more.
    make_store : callable
        Makes an empty store of keys and values.
    shared : Shared
        What the layers of one cache know together.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, budget: int, *, make_store: Callable[[], Store], shared: Shared) -> None:
        self.budget, self.shared = budget, shared
        self._make_store = make_store
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.store: Store | None = None
        self.is_initialized = False
        self.seen = self.evictions = self.largest = 0
        self.mass: Tensor | None = None
        self.num_masses = 0
        self.positions, self.record = Slots(self.budget + 1), Slots(self.budget + 1)
        self._real: Tensor | None = None
        self._longest = 0
        self._tokens: Tensor | None = None
        self._observed: Tensor | None = None
        self._queries: list[Tensor] = []
        self._scale: dict[str, Any] = {}
        self._broken = self.shared.waiting = False

    @abc.abstractmethod
    def _flush(self, end: int | None = None) -> None:
        """Score the queries that wait."""

    @property
    def keys(self) -> Tensor | None:
        """Keys of the cached tokens, (batch, kv_heads, slots, dim)."""
        return None if self.store is None else self.store.read()[0]

    @property
    def values(self) -> Tensor | None:
        """Values of the cached tokens, (batch, kv_heads, slots, dim)."""
        return None if self.store is None else self.store.read()[1]

    @property
    def num_slots(self) -> int:
        """Slots in use."""
        return 0 if self.store is None else self.store.num_slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the store, when the first tokens come."""
        self.store = self._make_store()
        self.dtype, self.device = key_states.dtype, key_states.device
        self._tokens = torch.zeros(key_states.shape[0], dtype=torch.int64, device=self.device)
        self._observed = torch.zeros_like(self._tokens)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens and return all keys and values; the attention function must find its way back here."""
        if self._broken or self.shared.waiting:
            raise self._lost()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        assert self._tokens is not None
        if key_states.shape[0] != len(self._tokens):
            raise InputError(
                "cache-batch-size",
                f"got a batch of {key_states.shape[0]} rows for a cache that holds {len(self._tokens)}, expected as many. "
                "Call cache.reset(), or make a cache for each batch size.",
            )
        self._broken = self.shared.waiting = True
        self.store.append(key_states, value_states)
        keys, values = self.store.read()
        if key_states.requires_grad:
            keys, values = NoWayBack.apply(keys, values, key_states)  # type: ignore[no-untyped-call]
        setattr(keys, MARK, self)
        return keys, values

    def _lost(self) -> RunError:
        name = self.shared.config._attn_implementation
        if not self.shared.waiting:
            return RunError(
                "cache-interrupted", "got a cache whose last call failed half-way, expected a whole one. Call cache.reset() and start anew."
            )
        if str(name).startswith(PREFIX):
            why = (
                f"did not come back to the cache, although the attention of its model is {name!r}. Use it with that model only, and do not compile it"
            )
        else:
            why = (
                f"did not come back to the cache: the implementation is {name!r}, expected one that begins with {PREFIX!r}. Make the cache after the model's "
                "attention is set, do not set it afterwards, or use the cache within `with attached(model, cache):`"
            )
        return RunError("attention-not-attached", f"the attention of the last call {why}. Call cache.reset() before the next try.")

    def get_seq_length(self) -> int:
        """Tokens that passed, padding included; not the slots."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width of a mask, and number of columns that are gone: the last columns always stand for the new tokens."""
        return self.num_slots + query_length, self.seen - self.num_slots

    def get_max_length(self) -> int:
        """-1: any length may pass."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first call."""
        return -1 if self._tokens is None else len(self._tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to go back, except by nothing."""
        if tokens_to_remove != 0:
            raise InputError(
                "cache-no-crop",
                f"got crop({tokens_to_remove}), expected no step back: tokens that left a cache with a budget cannot return. "
                "Do not use assisted decoding or prompt lookup (assistant_model, prompt_lookup_num_tokens) with this cache.",
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        with torch.no_grad():
            self._flush()  # the longest row may be gone, and the next eviction further off
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        if self.is_initialized:
            self._select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if self.store is None or self._tokens is None or self._observed is None:
            return
        rows = rows.to(self.device)
        self.store.select_rows(rows)
        self.positions.select_rows(rows)
        self.record.select_rows(rows)
        self._tokens, self._observed = self._tokens[rows], self._observed[rows]
        self._real = None if self._real is None else self._real[rows]
        self._queries = [query[rows] for query in self._queries]

    def offload(self) -> None:
        """Move to the memory of the host."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move back."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        if self.store is None:
            return
        self.store.to(device)
        self.positions.to(device)
        self.record.to(device)
        self._queries = [query.to(device) for query in self._queries]
        self._tokens, self._observed, self._real = (
            None if tensor is None else tensor.to(device) for tensor in (self._tokens, self._observed, self._real)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: keys, values, and what is noted about them."""
        if self.store is None:
            return 0
        owned = [tensor for tensor in (*self._queries, self._tokens, self._observed, self._real) if tensor is not None]
        return self.store.nbytes + self.positions.nbytes + self.record.nbytes + sum(tensor.untyped_storage().nbytes() for tensor in owned)
