"""One layer of a cache with a budget: it adds tokens, lets the model attend to them, notes what was looked at, and lets tokens go.

Attention comes first and eviction after it, so the token that exceeds the budget still sees everything. Heads keep different tokens but equally many in
each row of a batch, so that one mask of real slots serves all heads and every kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from partwise.checks import InputError
from partwise.serve._held_tokens import HeldTokens
from partwise.serve._masks import mask_of_slots, real_tokens
from partwise.serve._plain_store import PlainStore
from partwise.serve._scores import attention, chunks, visible_tokens
from partwise.serve.rule import Cached, EvictionRule, Limits, Observation

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.serve._held_tokens import Shared, Store

__all__ = ["BudgetedLayer"]

FEW, SELDOM = 8, 32  # rules that drop fewer tokens at a time have the kept attention measured at one of so many evictions


class BudgetedLayer(HeldTokens):
    """Keys and values of one layer, never more than ``budget`` tokens a head between two calls.

    Parameters
    ----------
    rule : EvictionRule
        Which tokens leave.
    limits : Limits
        The budget, and what the rule makes of it.
    pinned : tuple of int
        Numbers of tokens, counted from the start of a row, that never leave.
    make_store : callable
        Makes an empty store of keys and values.
    score_chunk : int
        Single queries that wait to be scored together.
    shared : Shared
        What the layers of one cache know together.
    """

    def __init__(
        self, rule: EvictionRule, limits: Limits, *, pinned: tuple[int, ...], make_store: Callable[[], Store], score_chunk: int, shared: Shared
    ) -> None:
        self.rule, self.limits, self.pinned, self.score_chunk = rule, limits, pinned, score_chunk
        super().__init__(limits.budget, make_store=make_store, shared=shared)

    def attend(self, base: Callable[..., Any], kernel: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        """What the model's attention returns for the tokens that `update` added; then notes and evicts."""
        self.shared.waiting = False
        self._check_caller(module, mask)
        self._add_tokens(real_tokens(mask, query.shape[2]), query.shape[2])
        output = base(module, query, key, value, self._mask(mask, query, kernel), **kwargs)
        scaling = kwargs.get("scaling")
        self._scale = {"scaling": query.shape[-1] ** -0.5 if scaling is None else scaling, "softcap": kwargs.get("softcap")}
        with torch.no_grad():
            if not isinstance(self.store, PlainStore):
                self._write_notes(key[:, :, -query.shape[2] :])  # as long as the store has them unpacked
            self._watch(query.detach())
            if self.num_slots > self.budget:
                self._evict(query.detach()[:, :, -1:])
            assert self.store is not None
            self.store.settle()
        self.largest = max(self.largest, self.num_slots)
        self._broken = False
        return output

    def _check_caller(self, module: Any, mask: Any) -> None:
        if module not in self.shared.modules:
            raise InputError(
                "cache-other-model",
                f"got {type(module).__name__} of another model, expected the one that the cache was made for. "
                "Make another cache, and call reset() on this one.",
            )
        if mask is not None and mask.ndim == 4 and self.evictions and self.shared.masked_at != self.seen:
            raise InputError(
                "cache-custom-mask",
                f"got a mask of {mask.shape[-1]} columns for {self.num_slots} cached tokens, expected none of your own once tokens have left: "
                "its columns mean nothing any more. Pass a mask of shape (batch, tokens), or none.",
            )

    def _add_tokens(self, real: Tensor | None, new: int) -> None:
        """Count the new tokens."""
        self.seen += new
        if self._real is None and real is None:
            self._longest = self.num_slots
            return
        batch, old = self.batch_size, self.num_slots - new
        before = torch.ones(batch, old, dtype=torch.bool, device=self.device) if self._real is None else self._real
        real = torch.ones(batch, new, dtype=torch.bool, device=self.device) if real is None else real.expand(batch, new)
        self._real = torch.cat([before, real], dim=1)  # (batch, slots)
        self._longest = int(self._real.sum(dim=1).max())

    def _write_notes(self, keys: Tensor | None = None) -> None:
        """Number the tokens that have no number yet, and start their records."""
        assert self.store is not None
        assert self._tokens is not None
        new = self.num_slots - self.positions.num_slots
        if new == 0:
            return
        keys = self.store.read_keys()[:, :, -new:] if keys is None else keys
        if self._real is None:
            positions = self._tokens[:, None] + torch.arange(new, device=self.device)  # (batch, new)
            self._tokens = self._tokens + new
        else:
            real = self._real[:, -new:]
            positions = (self._tokens[:, None] + real.cumsum(dim=1) - 1).masked_fill(~real, -1)
            self._tokens = self._tokens + real.sum(dim=1)
        spread = positions.to(torch.int32)[:, None].expand(*keys.shape[:2], new)
        self.positions.append(spread)
        if self.rule.channels:
            self.record.append(self.rule.initial(keys, spread))

    def _mask(self, mask: Any, query: Tensor, kernel: str) -> Any:
        """The model's own mask as long as nothing has left, then one made of the slots that hold tokens."""
        new, slots = query.shape[2], self.num_slots
        if slots == self.seen:
            fits = new in {1, slots} if mask is None else mask.shape[-1] == slots
            if fits:
                return mask
        if kernel.startswith("flash"):
            return self._real  # its causal alignment is to the end, as needed
        if new == 1 and self._real is None:
            return None
        return mask_of_slots(self._real, query, slots=slots, additive=kernel == "eager")

    # Noting -------------------------------------------------------------------------------------------------------------------------------------------

    def _watch(self, query: Tensor) -> None:
        """Note what these queries look at, if they are near enough to an eviction. Single ones wait until there are some to be scored together."""
        new = query.shape[2]
        start = self._first_watched(new)
        if start == new:
            return
        if new == 1:
            self._queries.append(query if query.untyped_storage().nbytes() == query.nbytes else query.clone())
            if len(self._queries) >= self.score_chunk:
                self._flush()
            return
        self._flush(self.num_slots - new)
        self._score(query, start if self.rule.most_queries is None else max(start, new - self.rule.most_queries))

    def _first_watched(self, new: int) -> int:
        """From which of the new tokens on the rule has to see queries; ``new`` for none."""
        horizon = self.rule.horizon
        if horizon is None:
            return 0
        if self._real is None or new == 1:
            return new - min(new, max(0, horizon - max(self.budget + 1 - self._longest, 0)))
        due = self._filled(self.num_slots).clamp(min=self.budget + 1)[:, None] - self._real.cumsum(dim=1)[:, -new:]
        near = ((due < horizon) & self._real[:, -new:]).any(dim=0)  # (new,)
        return int(near.to(torch.int8).argmax()) if bool(near.any()) else new

    def _flush(self, end: int | None = None) -> None:
        if self._queries:
            query, self._queries = torch.cat(self._queries, dim=2), []
            self._score(query, 0, end)

    def _keys(self) -> Tensor:
        """Keys of all slots in the precision of scores."""
        assert self.store is not None
        return self.store.read_keys().to(torch.float32)

    def _score(self, query: Tensor, start: int, end: int | None = None) -> None:
        """Show the rule what queries look at, from number ``start`` on; the last of all belongs to slot ``end - 1``, the last one they could know of."""
        self._write_notes()
        keys, new, end = self._keys(), query.shape[2], self.num_slots if end is None else end
        for first, last in chunks(start, new, row=query.shape[0] * query.shape[1] * end):
            self._show(query[:, :, first:last], keys[:, :, : end - new + last], end)

    def _show(self, query: Tensor, keys: Tensor, reach: int) -> None:
        assert self._tokens is not None
        assert self._observed is not None
        new, end = query.shape[2], keys.shape[2]
        real = None if self._real is None else self._real[:, :end]
        num_visible = visible_tokens(real, batch=query.shape[0], new=new, slots=end, device=query.device)
        filled, known = self._filled(self.num_slots), self._filled(reach)
        counted = torch.ones(num_visible.shape, device=query.device) if real is None else real[:, end - new :].to(torch.float32)
        if self.rule.horizon is not None:
            due = known.clamp(min=self.budget + 1)[:, None] - num_visible
            counted = counted * (due < self.rule.horizon)
        step = (self._tokens - filled)[:, None] + num_visible
        seen = Observation(attention(query, keys, real, **self._scale), num_visible.to(torch.float32), counted, step, self._observed)
        record = self.record.values[:, :, :end]
        noted = self.rule.observe(record, seen, self.limits)
        if noted is not record:
            record.copy_(noted)
        self._observed = step[:, -1].clone()

    def _filled(self, slots: int) -> Tensor:
        """How many of the first slots hold tokens, (batch,)."""
        assert self._tokens is not None
        return torch.full_like(self._tokens, slots) if self._real is None else self._real[:, :slots].sum(dim=1)

    # Evicting -----------------------------------------------------------------------------------------------------------------------------------------

    def _evict(self, query: Tensor) -> None:
        """Let the most dispensable tokens of full rows go, and padding everywhere."""
        assert self.store is not None
        self._flush()
        self._write_notes()
        positions, weights = self.positions.values, None  # (batch, kv_heads, slots)
        badness = torch.zeros(positions.shape, device=positions.device)
        if self._longest > self.budget:
            badness = self.rule.badness(Cached(self.record.values if self.rule.channels else positions[..., None], positions), self.limits)
            if self.limits.drop >= FEW or self.evictions % SELDOM == 0:
                weights = attention(query, self._keys(), self._real, **self._scale)[..., 0, :]  # (batch, kv_heads, group, slots)
            self.evictions += 1
        badness = self._guard(badness)
        if self._real is None and self.limits.drop == 1 and self.num_slots == self.budget + 1 and isinstance(self.store, PlainStore):
            self._drop_one(badness, weights)
        else:
            self._drop(badness, weights)
        self._longest = self.num_slots

    def _guard(self, badness: Tensor) -> Tensor:
        """Tokens that must stay are the best, empty slots the worst."""
        assert self._tokens is not None
        positions, first = self.positions.values, self.rule.num_sinks
        stays = positions >= (self._tokens - self.limits.recent)[:, None, None]
        if self.pinned == tuple(range(len(self.pinned))):
            first = max(first, len(self.pinned))
        else:
            stays |= torch.isin(positions, torch.tensor(self.pinned, dtype=positions.dtype, device=positions.device))
        if first:
            stays |= positions < first
        badness = badness.masked_fill(stays, -torch.inf)
        return badness if self._real is None else badness.masked_fill(positions < 0, torch.inf)

    def _drop(self, badness: Tensor, weights: Tensor | None) -> None:
        """Full rows shrink by as many tokens as the rule says, the others give up empty slots."""
        assert self.store is not None
        kept, vacant = self._choose(badness)
        self.store.keep(kept)
        self.positions.keep(kept)
        if self.rule.channels:
            self.record.keep(kept)
        if weights is not None:
            present = weights.gather(3, kept[:, :, None].expand(*weights.shape[:3], kept.shape[2]))
            self._add_mass((present if vacant is None else present.masked_fill(vacant[:, None, None], 0.0)).sum(dim=3))
        if vacant is not None:
            self.positions.values.masked_fill_(vacant[:, None], -1)
        self._real = None if vacant is None else ~vacant

    def _choose(self, badness: Tensor) -> tuple[Tensor, Tensor | None]:
        """Slots to keep, (batch, kv_heads, kept), and which of them are empty from now on, (batch, kept): the first ones of short rows."""
        positions, filled = self.positions.values, self._filled(self.num_slots)
        leave = (filled - self.budget).clamp(min=self.limits.drop)
        stay = torch.where(filled > self.budget, filled - leave, filled)  # (batch,)
        if self.rule.channels and self.rule.forgets(self.limits):
            self.record.values.masked_fill_((filled > self.budget)[:, None, None, None], 0)
        width = int(stay.max())
        oldest = positions.argsort(dim=-1, stable=True)
        order = oldest.gather(-1, badness.gather(-1, oldest).sort(dim=-1, descending=True, stable=True).indices)  # worst first
        chosen = order[..., self.num_slots - width :]
        vacant = torch.arange(width, device=stay.device) < (width - stay)[:, None]  # (batch, kept)
        if not bool(vacant.any()):
            return chosen.sort(dim=-1).values, None
        in_order = chosen.masked_fill(vacant[:, None], -1).sort(dim=-1, stable=True).indices
        return chosen.gather(-1, in_order), vacant

    def _drop_one(self, badness: Tensor, weights: Tensor | None) -> None:
        """One token leaves every head, and the newest takes its slot: slots are no longer in the order of the text."""
        assert isinstance(self.store, PlainStore)
        positions = self.positions.values
        worst = badness == badness.amax(dim=-1, keepdim=True)
        slot = positions.masked_fill(~worst, torch.iinfo(positions.dtype).max).argmin(dim=-1, keepdim=True)  # (batch, kv_heads, 1)
        if weights is not None:
            self._add_mass(1.0 - weights.gather(3, slot[:, :, None].expand(*weights.shape[:3], 1))[..., 0])
        self.store.swap_out(slot)
        self.positions.swap_out(slot)
        if self.rule.channels:
            self.record.swap_out(slot)
            if self.rule.forgets(self.limits):
                self.record.values.zero_()

    def _add_mass(self, mass: Tensor) -> None:
        mean = mass.mean()
        self.mass = mean if self.mass is None else self.mass + mean
        self.num_masses += 1

    # What it costs ------------------------------------------------------------------------------------------------------------------------------------

    def tokens_of_row(self, row: int) -> int:
        """Tokens of a row that passed, without padding."""
        self._write_notes()
        return 0 if self._tokens is None else int(self._tokens[row])

    def numbers(self) -> Tensor:
        """Numbers of the cached tokens, (batch, kv_heads, slots), int64, ascending; -1 where a slot is empty."""
        self._write_notes()
        return self.positions.values.sort(dim=-1).values.to(torch.int64)
