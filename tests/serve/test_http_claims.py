"""The server's claims at a small size: the programs of the benchmark on a model of a few kilobytes."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra http")
pytest.importorskip("openai", reason="the clients of the stress are OpenAI's")

from partwise.serve._http_parts import assemble
from partwise.serve.http_server import start_in_thread
from partwise.serve.scissorhands import Scissorhands
from serve_http import fuzzed, garbage, make_case, make_flags, stressed
from tiny_server import calm, letter_tokenizer, tiny_llama


def test_requests_of_every_kind_get_what_they_may_and_leave_nothing():
    tokenizer, flags = letter_tokenizer(), make_flags("none", memory_limit_mib=2.0)
    parts = assemble(flags, tiny_llama(positions=1024), tokenizer, Scissorhands(), name="measured")

    async def whole() -> tuple[int, list[str]]:
        counts, wrong = await fuzzed(parts, number=600, at_once=64)
        await calm(parts)
        return len([kind for kind in counts if not kind.startswith("status")]), wrong

    num_kinds, wrong = asyncio.run(whole())
    parts.manager.stop()
    assert wrong == []
    assert num_kinds == len({make_case(random.Random(seed)).kind for seed in range(3000)})
    assert (parts.turnstile.num_inside, parts.memory.reserved, parts.manager.leases, parts.door.num_reading) == (0, 0, {}, 0)


def test_bytes_that_are_no_http_do_not_stop_the_server():
    with start_in_thread(
        make_flags("none", memory_limit_mib=2.0), model=tiny_llama(positions=1024), tokenizer=letter_tokenizer(), rule=Scissorhands()
    ) as running:
        assert garbage(running.url, 100) == 0


def test_sixteen_clients_at_the_memory_limit_meet_answers_and_429_only():
    flags = make_flags("none", memory_limit_mib=0.6)
    model = tiny_llama(positions=4096)
    with start_in_thread(flags, model=model, tokenizer=letter_tokenizer(), rule=Scissorhands()) as running:
        tally = asyncio.run(stressed(running.url, os.getpid(), 1 / 60))
    assert tally.failures == []
    assert tally.counts["429"] > 0
    assert tally.counts["stream"] + tally.counts["whole"] + tally.counts["left"] > 5
    assert tally.highest <= running.parts.memory.limit
    assert (tally.last["memory"]["reserved"], tally.last["queue"]["inside"]) == (0, 0)
