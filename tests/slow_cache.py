"""One layer of a cache with a budget as a student would write it: lists and loops, one row, one token and one head at a time."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from partwise.serve._held_tokens import Shared
from partwise.serve._layer import BudgetedLayer
from partwise.serve._plain_store import PlainStore
from partwise.serve.rule import EvictionRule


def eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any) -> tuple[Tensor, None]:
    """Attention with boolean or no mask."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    causal = mask is None and query.shape[2] > 1
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal).transpose(1, 2), None


@dataclass
class Look:
    """What one query of one group of heads looked at."""

    step: int
    due: int
    """Tokens from here to the eviction that comes next"""
    weights: dict[int, list[float]]
    """For each token it saw: what each head of the group gave it"""


class FastLayer:
    """The real layer, without a model around it."""

    def __init__(self, rule: EvictionRule, *, budget: int, pinned: tuple[int, ...] = (), score_chunk: int = 16) -> None:
        self.module = nn.Identity()
        self.layer = BudgetedLayer(
            rule,
            rule.limits(budget),
            pinned=pinned,
            make_store=lambda: PlainStore(budget + 1),
            score_chunk=score_chunk,
            shared=Shared(SimpleNamespace(_attn_implementation="partwise_sdpa"), weakref.WeakSet([self.module])),
        )

    def add(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of new tokens, (batch, heads, new, dim) and twice (batch, kv_heads, new, dim) to (batch, heads, new, dim)."""
        keys, values = self.layer.update(key, value)
        output, _ = self.layer.attend(eager, "sdpa", self.module, query, keys, values, None)
        return output.transpose(1, 2)

    def kept(self) -> list[list[int]]:
        """Numbers of the tokens that each head of the first row holds."""
        return self.layer.numbers()[0].tolist()


class SlowLayer:
    """Its twin for one row; ``badness`` is asked about every token of every head at an eviction."""

    def __init__(self, rule: EvictionRule, *, budget: int, pinned: tuple[int, ...] = ()) -> None:
        self.rule, self.budget, self.limits = rule, budget, rule.limits(budget)
        self.stays = {*pinned, *range(rule.num_sinks)}
        self.keys: list[dict[int, Tensor]] = []
        self.values: list[dict[int, Tensor]] = []
        self.looks: list[list[Look]] = []
        self.seen = self.evictions = 0

    def add(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `FastLayer.add`."""
        kv_heads, new, dim = key.shape[1:]
        group, output = query.shape[1] // kv_heads, torch.zeros_like(query)
        self.keys, self.values = self.keys or [{} for _ in range(kv_heads)], self.values or [{} for _ in range(kv_heads)]
        self.looks = self.looks or [[] for _ in range(kv_heads)]
        for head in range(kv_heads):
            for place in range(new):
                number = self.seen + place
                self.keys[head][number], self.values[head][number] = key[0, head, place].double(), value[0, head, place].double()
                weights: dict[int, list[float]] = {token: [] for token in self.keys[head]}
                for asking in range(head * group, (head + 1) * group):
                    scores = {token: float(query[0, asking, place].double() @ seen) / math.sqrt(dim) for token, seen in self.keys[head].items()}
                    total = sum(math.exp(score) for score in scores.values())
                    for token, score in scores.items():
                        weights[token].append(math.exp(score) / total)
                    output[0, asking, place] = sum(weights[token][-1] * self.values[head][token] for token in scores)
                due = max(self.budget + 1, len(weights) + new - 1 - place) - len(weights)
                self.looks[head].append(Look(number + 1, due, weights))
        self.seen += new
        if len(self.keys[0]) > self.budget:
            self.evict()
        return output

    def evict(self) -> None:
        """Let the worst go, the older of equals first."""
        num_leave = max(self.limits.drop, len(self.keys[0]) - self.budget)
        worst = [self.worst(head, num_leave) for head in range(len(self.keys))]
        for head, leaving in enumerate(worst):
            for token in leaving:
                del self.keys[head][token], self.values[head][token]
        self.evictions += 1
        self.looks = [self.remembered(looks) for looks in self.looks]

    def worst(self, head: int, count: int) -> list[int]:
        """Tokens that leave a head."""
        free = [token for token in self.keys[head] if token not in self.stays and token < self.seen - self.limits.recent]
        bad = {token: self.badness(head, token) for token in free}
        return sorted(free, key=lambda token: (-bad[token], token))[:count]

    def remembered(self, looks: list[Look]) -> list[Look]:
        """What is known after an eviction."""
        return looks

    def badness(self, head: int, token: int) -> float:
        raise NotImplementedError

    def kept(self) -> list[list[int]]:
        """As `FastLayer.kept`."""
        return [sorted(tokens) for tokens in self.keys]


class SlowScissorhands(SlowLayer):
    def remembered(self, looks: list[Look]) -> list[Look]:
        return [] if self.limits.drop >= self.rule.window else looks

    def badness(self, head: int, token: int) -> float:
        half, looks = (self.rule.window + 1) // 2, self.looks[head]
        if self.limits.drop < self.rule.window:
            newest = (looks[-1].step - 1) // half
            looks = [look for look in looks if (look.step - 1) // half >= newest - 1]
        near = [look for look in looks if look.due < self.rule.window]
        return sum(weight < (1 - 1e-5) / len(look.weights) for look in near for weight in look.weights.get(token, []))


class SlowWindow(SlowLayer):
    def badness(self, head: int, token: int) -> float:
        return -token


class SlowH2O(SlowLayer):
    def badness(self, head: int, token: int) -> float:
        return -sum(sum(look.weights.get(token, [])) for look in self.looks[head])


class SlowTOVA(SlowLayer):
    def badness(self, head: int, token: int) -> float:
        return -sum(sum(looks[-1].weights[token]) for looks in self.looks)


class SlowSnapKV(SlowLayer):
    def remembered(self, looks: list[Look]) -> list[Look]:
        return []

    def badness(self, head: int, token: int) -> float:
        tokens = sorted(self.keys[head])
        place, side = tokens.index(token), self.rule.pool // 2
        near = tokens[max(0, place - side) : place + side + 1]
        got = [sum(sum(look.weights.get(other, [])) for look in self.looks[head] if look.due < self.rule.window) for other in near]
        return -sum(got) / len(got)


class SlowKeyNorm(SlowLayer):
    def badness(self, head: int, token: int) -> float:
        return float(self.keys[head][token].norm())
