"""Bytes and places: never more than there are, and all given back."""

from __future__ import annotations

import asyncio
import random
import types
from typing import Any

import pytest
import torch

from partwise.serve._http_cache import CacheMaker
from partwise.serve._http_memory import CacheMemory, Conversation
from partwise.serve._http_queue import Lease, Turnstile
from partwise.serve._http_refusal import Refusal
from partwise.serve._layer import BudgetedLayer
from partwise.serve.scissorhands import Scissorhands


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def conversation(tokens: list[int], num_bytes: int = 10, used: float = 0.0) -> Conversation:
    return Conversation(tokens=torch.tensor(tokens), cache=None, num_bytes=num_bytes, used=used)


def memory_of(limit: int, *conversations: Conversation) -> CacheMemory:
    memory = CacheMemory(limit, idle=100.0, clock=Clock())
    for one in conversations:
        memory.store(one)
    return memory


def test_the_longest_conversation_that_a_prompt_continues_is_taken_once():
    memory = memory_of(100, conversation([1]), conversation([1, 2]), conversation([1, 3]), conversation([1, 2, 3, 4]))
    found = memory.take(torch.tensor([1, 2, 3, 4]))
    assert found is not None
    assert found.tokens.tolist() == [1, 2]  # the one with all four has nothing left to feed
    assert memory.take(torch.tensor([1, 2, 9])).tokens.tolist() == [1]
    assert memory.take(torch.tensor([5, 1])) is None


def test_conversations_make_way_for_a_request_the_one_used_longest_ago_first():
    memory = memory_of(40, conversation([1]), conversation([2]), conversation([3]))
    memory.reserve(15)
    assert [one.tokens.tolist() for one in memory.conversations] == [[2], [3]]
    assert (memory.used, memory.num_forgotten) == (35, 1)
    memory.release(15)
    assert memory.used == 20


def test_a_conversation_that_does_not_fit_is_not_kept():
    memory = memory_of(40)
    memory.reserve(35)
    memory.store(conversation([1], num_bytes=6))
    assert memory.conversations == []


def test_the_newest_of_two_conversations_with_the_same_tokens_is_kept():
    memory = memory_of(100, conversation([1, 2], num_bytes=3), conversation([1, 2], num_bytes=5))
    assert [one.num_bytes for one in memory.conversations] == [5]


def test_an_idle_conversation_leaves():
    memory = memory_of(100, conversation([1], used=0.0), conversation([2], used=60.0))
    memory.clock.now = 100.0  # type: ignore[attr-defined]
    assert memory.take(torch.tensor([1, 2])) is None
    assert [one.tokens.tolist() for one in memory.conversations] == [[2]]


def test_giving_back_more_than_was_taken_is_a_mistake_of_ours():
    with pytest.raises(AssertionError):
        memory_of(10).release(1)


def test_no_order_of_events_passes_the_limit_or_loses_a_byte():
    draw = random.Random(0)
    for _ in range(200):
        memory, taken = memory_of(100), 0
        for step in range(60):
            if taken:
                memory.release(taken)
                if draw.random() < 0.7:
                    memory.store(conversation([step], num_bytes=draw.randint(1, taken)))
                taken = 0
            else:
                memory.take(torch.tensor([draw.randrange(60), 1]))
                taken = draw.randint(1, 100)
                memory.reserve(taken)
            assert memory.reserved == taken
            assert memory.used == taken + sum(one.num_bytes for one in memory.conversations) <= 100


def lease(name: str = "one") -> Lease:
    return Lease(name, types.SimpleNamespace())  # type: ignore[arg-type]


def test_a_full_queue_refuses_with_a_time_to_come_back():
    turnstile = Turnstile(1)
    with turnstile.place(), turnstile.place():
        with pytest.raises(Refusal, match=r"2 requests are waiting or being answered.*Try again in 2 s") as caught, turnstile.place():
            pass
        assert (caught.value.status, caught.value.code, caught.value.headers) == (429, "queue_full", {"Retry-After": "2"})
    assert turnstile.num_inside == 0


def test_turns_come_in_the_order_of_arrival_and_whoever_leaves_is_passed_by():
    async def scenario() -> list[str]:
        turnstile, order = Turnstile(9), []

        async def one(name: str) -> None:
            mine = lease(name)
            await turnstile.wait_for_turn(mine)
            order.append(name)
            await asyncio.sleep(0)
            turnstile.end_turn(mine)
            turnstile.end_turn(mine)  # once more, which must not end the turn of another

        tasks = [asyncio.create_task(one(name)) for name in "abcd"]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not turnstile.is_busy
        return order

    assert asyncio.run(scenario()) == ["a", "c", "d"]


def widest_use(cache: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the cache whenever a layer has just added tokens and not let any go yet."""
    seen: list[int] = []
    attend = BudgetedLayer.attend

    def watched(layer: BudgetedLayer, *args: Any, **kwargs: Any) -> Any:
        seen.append(cache.nbytes)
        return attend(layer, *args, **kwargs)

    monkeypatch.setattr(BudgetedLayer, "attend", watched)
    return seen


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_bytes_known_beforehand_are_never_exceeded_even_inside_a_call(bits: int | None, monkeypatch: pytest.MonkeyPatch):
    from tiny_server import tiny_llama

    model = tiny_llama(head_dim=32)
    maker = CacheMaker(model=model, rule=Scissorhands(), budget=40, bits=bits)
    cache = maker.new()
    seen = widest_use(cache, monkeypatch)
    ids = torch.randint(256, (1, 120), generator=torch.Generator().manual_seed(0))
    model.generate(ids, cache=cache, max_new_tokens=60, do_sample=False)
    bound = maker.bound(cache, num_prompt=120, num_new=60)
    assert 0 < max([*seen, cache.nbytes]) <= bound
    assert bound < 6 * max(seen)  # and the bound is not an empty promise
