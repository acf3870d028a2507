"""A key-value cache that keeps to a budget: for ``model.generate(cache=...)``, with any rule of this room."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from transformers import Cache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from partwise.checks import InputError, RunError, check_at_least
from partwise.ledger import Ledger, Part
from partwise.serve._attention import attach, probe, set_attention
from partwise.serve._decoder import check_layer_types, decoder_config, layer_shapes
from partwise.serve._held_tokens import Shared
from partwise.serve._layer import BudgetedLayer
from partwise.serve._packed_store import PackedStore
from partwise.serve._plain_store import PlainStore
from partwise.serve.cache_report import CacheReport, LayerReport
from partwise.serve.rule import EvictionRule, Limits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BudgetedCache"]

log = logging.getLogger(__name__)


class BudgetedCache(Cache):
    """A cache that holds at most ``budget`` tokens per layer, row and key head, however long the text gets.

    Pass it as ``cache`` to ``model.generate`` or to the model. One cache may serve several calls one after the other, as turns of a
    conversation; `reset` empties it. Keys stay as they were rotated, so distances between tokens stay true.

    Parameters
    ----------
    model : PreTrainedModel
        The model that will use the cache. Its attention is set to a wrapped one of the same kind, which changes nothing else; see `attached`.
    rule : EvictionRule
        Which tokens leave.
    budget : int or sequence of int
        Tokens that stay, for all layers or for each layer with full attention.
    pinned : int or sequence of int
        Tokens that never leave: so many first ones, or these, counted from the start of each row without padding.
    bits : 4, 8 or None
        Store all but the last tokens in so many bits; None: as they come.
    residual : int
        Tokens that are not packed yet, with ``bits``; they never leave either.
    score_chunk : int, optional
        Single queries that wait to be scored together; each of them takes about as much memory as a cached token. By default a thirty-second of the
        budget, at most 16.

    Raises
    ------
    InputError
        When the model cannot have such a cache, or the budget is too small for what must stay.
    """

    def __init__(
        self,
        model: Any,
        rule: EvictionRule,
        *,
        budget: int | Sequence[int],
        pinned: int | Sequence[int] = (),
        bits: Literal[4, 8] | None = None,
        residual: int = 16,
        score_chunk: int | None = None,
    ) -> None:
        config = decoder_config(model)
        types, settings = get_layer_types_and_kwargs(config)
        check_layer_types(type(model).__name__, types)
        self.rule, self.bits, self.residual, self.score_chunk = rule, bits, residual, score_chunk
        self._dtype = model.dtype
        self.pinned = _pinned(pinned)
        self.budget = _budgets(budget, types.count("full_attention"))
        self.shapes = layer_shapes(config)
        self._check_settings()
        self._shared = Shared(config, weakref.WeakSet(model.modules()))
        budgets = iter(self.budget)
        super().__init__(
            layers=[
                self._layer(next(budgets)) if kind == "full_attention" else DYNAMIC_LAYER_TYPE_MAPPING[kind](**setting)
                for kind, setting in zip(types, settings, strict=True)
            ]
        )
        name = config._attn_implementation
        attach(model)
        try:
            probe(model, self, self.shapes)
        except BaseException:
            set_attention(model, name)
            raise
        self.reset()

    def _layer(self, budget: int) -> BudgetedLayer:
        return BudgetedLayer(
            self.rule,
            self._limits(budget),
            pinned=self.pinned,
            make_store=self._store_maker(budget),
            score_chunk=self._chunk(budget),
            shared=self._shared,
        )

    def _chunk(self, budget: int) -> int:
        return max(1, min(16, budget // 32)) if self.score_chunk is None else self.score_chunk

    def _limits(self, budget: int) -> Limits:
        """Tokens that are not packed yet may not leave either."""
        limits = self.rule.limits(budget)
        return limits if self.bits is None else replace(limits, recent=max(limits.recent, self.residual))

    def _store_maker(self, budget: int) -> Callable[[], Any]:
        if self.bits is None:
            return lambda: PlainStore(budget + 1)
        bits, residual = self.bits, self.residual
        return lambda: PackedStore(budget + 1, bits=bits, residual=residual)

    def _check_settings(self) -> None:
        if not isinstance(self.rule, EvictionRule):
            raise InputError(
                "bad-cache-setting", f"got rule={self.rule!r}, expected a rule with its settings, such as Scissorhands(). Pass an instance."
            )
        if self.bits is not None and (not _is_count(self.bits) or self.bits not in {4, 8}):
            raise InputError(
                "bad-cache-setting", f"got bits={self.bits!r}, expected 4, 8 or None. Leave it out to store keys and values as they come."
            )
        if (self.score_chunk is not None and (not _is_count(self.score_chunk) or self.score_chunk < 1)) or not _is_count(self.residual):
            raise InputError(
                "bad-cache-setting",
                f"got score_chunk={self.score_chunk!r} and residual={self.residual!r}, expected at least 1 and at least 0. Leave them out.",
            )
        odd = next((shape.dim for shape in self.shapes if shape.dim % 32), None)
        if self.bits is not None and odd is not None:
            raise InputError(
                "cache-head-dim", f"got heads of {odd} dimensions with bits={self.bits}, expected a multiple of 32 to pack in groups. Leave bits out."
            )
        for budget in self.budget:
            limits = self._limits(budget)
            kept = len({*self.pinned, *range(self.rule.num_sinks)})
            least = limits.recent + kept + limits.drop + 1
            if budget < least or limits.drop >= budget:
                raise InputError(
                    "cache-budget",
                    f"got a budget of {budget} tokens, expected at least {least}: {limits.recent} recent, {kept} pinned, and {limits.drop} that may "
                    "leave at once. Raise budget, or lower recent, num_sinks, pinned or drop.",
                )

    def __repr__(self) -> str:
        """How the cache was made, without the model."""
        return f"{type(self).__name__}(model, {self.rule!r}, {self._sizes()})"

    def _sizes(self) -> str:
        budget = self.budget[0] if len(set(self.budget)) == 1 else list(self.budget)
        return f"budget={budget}, pinned={list(self.pinned)}, bits={self.bits}"

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers asks: add tokens to a layer, and return all that it holds."""
        layer = self.layers[layer_idx]
        if layer_idx == 0:
            self._check_whole(key_states.shape[0])
            self._warn_of_length(key_states.shape[2])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if hasattr(layer, "sliding_window") and key_states.shape[2] > 1:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # they are views of all tokens that came
        return keys, values

    def _check_whole(self, batch_size: int) -> None:
        """Every layer must have come as far as the others, with as many rows."""
        seen = [layer.get_seq_length() for layer in self.layers if isinstance(layer, BudgetedLayer) or hasattr(layer, "sliding_window")]
        if len(set(seen)) > 1:
            raise RunError(
                "cache-interrupted",
                f"got a cache whose layers saw {min(seen)} to {max(seen)} tokens, expected as many. Call cache.reset() and start anew.",
            )
        rows = self.budgeted[0].batch_size
        if rows not in {-1, batch_size}:
            raise InputError(
                "cache-batch-size",
                f"got a batch of {batch_size} rows for a cache that holds {rows}, expected as many. Call cache.reset(), or make a cache for each batch size.",
            )

    def _warn_of_length(self, new: int) -> None:
        """Say once when the text grows longer than what the model was made for."""
        longest = getattr(self._shared.config, "max_position_embeddings", None)
        if longest and self.seen <= longest < self.seen + new:
            log.warning(
                "The text passes %d tokens, the longest this model was made for. A budget bounds memory; it does not make a model read further.",
                longest,
            )

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As transformers asks; noted, to tell its masks from a user's."""
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        if isinstance(self.layers[layer_idx], BudgetedLayer):
            self._shared.masked_at = self.seen
        return sizes

    @property
    def budgeted(self) -> list[BudgetedLayer]:
        """Layers with a budget, in order."""
        return [layer for layer in self.layers if isinstance(layer, BudgetedLayer)]

    @property
    def seen(self) -> int:
        """Tokens that passed, padding included."""
        return self.budgeted[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held now."""
        return sum(_bytes_of(layer) for layer in self.layers)

    def kept_positions(self, layer: int) -> Tensor:
        """Numbers of the tokens that a layer holds, in their rows without padding.

        Returns
        -------
        Tensor of shape (batch, kv_heads, slots), int64
            Ascending; -1 where a slot is empty.
        """
        chosen = self.layers[layer] if _is_count(layer) and layer < len(self.layers) else None
        if not isinstance(chosen, BudgetedLayer) or chosen.store is None:
            raise InputError(
                "cache-no-positions",
                f"got layer {layer}, which holds no tokens under a budget, expected one of "
                f"{[index for index, other in enumerate(self.layers) if isinstance(other, BudgetedLayer)]} after a call. Run the model first.",
            )
        return chosen.numbers()

    def max_bytes(self, batch_size: int = 1, *, num_beams: int = 1) -> int:
        """Bytes that are never exceeded between two calls of the model, layers with a window of their own included.

        Parameters
        ----------
        batch_size, num_beams : int
            Rows of a batch, and beams of each.
        """
        check_at_least(batch_size, 1, name="batch_size")
        check_at_least(num_beams, 1, name="num_beams")
        rows, itemsize, total = batch_size * num_beams, self._dtype.itemsize, 0
        for layer, shape in zip(self.layers, self.shapes, strict=True):
            if not isinstance(layer, BudgetedLayer):
                total += rows * int(getattr(layer, "sliding_window", 0)) * shape.numbers_per_token * itemsize
                continue
            budget, query = layer.budget, 0 if self.rule.horizon == 0 else rows * shape.query_heads * shape.dim * itemsize
            sizes = {"limit": budget + 1, "batch_size": rows, "num_heads": shape.kv_heads, "dim": shape.dim, "value_dim": shape.dim, "itemsize": itemsize}
            total += PlainStore.bound(**sizes) if self.bits is None else PackedStore.bound(**sizes, bits=self.bits, residual=self.residual)
            total += self.note_bytes(rows, budget + 1, shape.kv_heads) + query * self._chunk(budget)
            total += rows * 2 * torch.int64.itemsize  # tokens of a row, and observed ones
        return total

    def note_bytes(self, rows: int, slots: int, kv_heads: int) -> int:
        """Positions and records of all heads, and which slots hold tokens."""
        per_slot = torch.int32.itemsize + self.rule.channels * self.rule.record_dtype.itemsize
        return rows * slots * (kv_heads * per_slot + torch.bool.itemsize)

    def report(self) -> CacheReport:
        """What the cache holds now, against a full one, and what it let go."""
        layers = tuple(self._layer_report(index, layer) for index, layer in enumerate(self.layers))
        masses = [layer.mass_kept for layer in layers if layer.mass_kept is not None]
        rows = max(1, self.budgeted[0].batch_size)
        return CacheReport(
            layers=layers,
            bytes=sum(layer.bytes for layer in layers),
            bytes_full=sum(layer.bytes_full for layer in layers),
            max_bytes=self.max_bytes(rows),
            tokens_seen=self.seen,
            evictions=sum(layer.evictions for layer in layers),
            mass_kept=sum(masses) / len(masses) if masses else None,
        )

    def _layer_report(self, index: int, layer: Any) -> LayerReport:
        if not isinstance(layer, BudgetedLayer):
            held = _bytes_of(layer)
            return LayerReport(index, None, 0 if getattr(layer, "keys", None) is None else layer.keys.shape[-2], held, held, 0, None)
        full = max(0, layer.batch_size) * layer.seen * self.shapes[index].numbers_per_token * self._dtype.itemsize
        mass = None if layer.mass is None else float(layer.mass) / layer.num_masses
        return LayerReport(index, layer.budget, layer.num_slots, layer.nbytes, full, layer.evictions, mass)

    def ledger(self, *, row: int = 0) -> Ledger:
        """One part for every token and layer: kept where a head still holds it, dropped where none does. The score is the share of heads that hold it."""
        rows = self.budgeted[0].batch_size
        if rows >= 0 and not (_is_count(row) and row < rows):
            raise InputError(
                "cache-no-positions", f"got row={row!r} of a cache with {rows} rows, expected a number from 0 to {rows - 1}. Pass one of them."
            )
        parts = []
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, BudgetedLayer) or layer.store is None:
                continue
            positions = self.kept_positions(index)[row]  # (kv_heads, slots)
            heads = torch.bincount(positions[positions >= 0], minlength=layer.tokens_of_row(row)).tolist()
            per_head = layer.store.nbytes // max(1, layer.batch_size * len(positions) * layer.num_slots)
            parts += [
                Part(
                    where=f"layer {index}",
                    index=token,
                    parameters=0,
                    bytes=count * per_head,
                    score=count / len(positions),
                    status="kept" if count else "dropped",
                )
                for token, count in enumerate(heads)
            ]
        return Ledger(tuple(parts))


def _pinned(pinned: int | Sequence[int]) -> tuple[int, ...]:
    found = range(pinned) if _is_count(pinned) else pinned
    if isinstance(found, str) or not isinstance(found, Iterable) or not all(_is_count(token) for token in found):
        raise InputError(
            "bad-cache-setting", f"got pinned={pinned!r}, expected how many first tokens stay, or their numbers from 0 on. Pass 0 for none."
        )
    return tuple(sorted(set(found)))


def _budgets(budget: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    budgets = (budget,) * num_layers if isinstance(budget, int) else budget
    if isinstance(budgets, str) or not isinstance(budgets, Sequence) or not all(_is_count(number) for number in budgets):
        raise InputError("cache-budget", f"got a budget of {budget!r}, expected a number of tokens, or a list of one for each layer. Try budget=256.")
    if len(budgets) != num_layers:
        raise InputError(
            "cache-budget", f"got {len(budgets)} budgets, expected {num_layers}, one for each layer with full attention. Pass as many, or one number."
        )
    return tuple(budgets)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _bytes_of(layer: Any) -> int:
    if isinstance(layer, BudgetedLayer):
        return layer.nbytes
    tensors = [tensor for name in ("keys", "values") if isinstance(tensor := getattr(layer, name, None), torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
