"""The server under load: 16 clients at once at the memory limit, and requests that are malformed, wrong or abandoned in every way we know.

Stress: the server runs in a process of its own and 16 clients of the `openai` package talk to it, turn after turn, in streams and not; some leave in the
middle. Its memory limit holds two conversations, so they push each other out, and its queue is shorter than the number of clients. Counted: answers,
429s, everything else (failures), and the resident memory of the server. Fuzz: requests go to the same application in this process, 64 at a time; every
kind has the statuses that it may get, and everything else counts as a wrong answer. Some bytes that are no HTTP go to a listening server.

Run: ``python benchmarks/serve_http.py [--minutes 10] [--requests 100000] [--only stress|fuzz] [--model DIR] [--dry]`` (about twenty minutes).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asgi_client import Reply, call
from rows import ROOT, Row, append

NAME = "serve_http"
MODEL = Path(os.environ.get("PARTWISE_MODELS", ROOT.parent / "shared" / "models")) / "llama-stdlib-5m"
CLIENTS, QUEUE, BUDGET, MAX_PROMPT, MAX_NEW = 16, 11, 128, 600, 32
MEMORY_MIB, LIMIT_RATIO, MAX_BODY_KIB = 10.0, 1.02, 32
TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
SETTINGS = f"HttpFlags(budget={BUDGET}, memory_limit_mib={MEMORY_MIB}, max_queue={QUEUE})"
COMPLETION, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
WORDS = [
    "def",
    "class",
    "return",
    "import",
    "self",
    "value",
    "for",
    "in",
    "range",
    "if",
    "not",
    "None",
    "print",
    "open",
    "path",
    "name",
    "data",
    "list",
]


def make_flags(model: str, **changes: Any) -> Any:
    """Settings of the measured server: little memory and a short queue."""
    from partwise.serve.http_server import HttpFlags

    given = {
        "model": model, "name": "measured", "port": 0, "budget": BUDGET, "memory_limit_mib": MEMORY_MIB, "max_queue": QUEUE, "max_prompt_tokens": MAX_PROMPT,
        "max_new_tokens": MAX_NEW, "max_body_kib": MAX_BODY_KIB, "conversation_idle_s": 60.0,
    }  # fmt: skip
    return HttpFlags(**given | changes)


def serve(model: str) -> None:
    """What the server's process does: serve, say where, end with its input."""
    from partwise.serve.http_server import start_in_thread

    with start_in_thread(make_flags(model)) as running:
        print(running.url, flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def server_process(model: str) -> Iterator[tuple[str, int]]:
    """URL and process number of a server of its own."""
    process = subprocess.Popen([sys.executable, __file__, "--serve", "--model", model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.stdin.close()
        process.wait(30)


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass
class Tally:
    """What the clients met."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    highest: int = 0
    last: dict[str, Any] = field(default_factory=dict)


async def one_client(client: Any, number: int, until: float, tally: Tally) -> None:
    """Talk, turn after turn, until the time is over."""
    import openai

    draw, text = random.Random(number), ""
    while time.monotonic() < until:
        if not text or len(text) > 500 or draw.random() < 0.2:
            text = f"# {number} {draw.random()}\n" + " ".join(draw.choices(WORDS, k=draw.randint(5, 70)))
        try:
            text += await one_turn(client, draw, text, tally) + " " + draw.choice(WORDS)
        except openai.RateLimitError as refused:
            tally.counts["429"] += 1
            assert int(refused.response.headers["retry-after"]) >= 1
            await asyncio.sleep(draw.random())
        except Exception as error:
            tally.failures.append(f"{type(error).__name__}: {error}")


async def one_turn(client: Any, draw: random.Random, text: str, tally: Tally) -> str:
    """One answer: whole, in pieces, or left in the middle."""
    asked = {"model": "measured", "prompt": text, "max_tokens": draw.randint(1, MAX_NEW), "temperature": draw.choice([0, 1])}
    kind = draw.choice(["whole", "stream", "stream", "left"])
    if kind == "whole":
        said = (await client.completions.create(**asked)).choices[0].text
    else:
        said, leave_after = "", draw.randint(0, 6) if kind == "left" else None
        stream = await client.completions.create(**asked, stream=True)
        async with stream:
            async for index, piece in enumerated(stream):
                said += piece.choices[0].text
                if index == leave_after:
                    break
    tally.counts[kind] += 1
    return said


async def enumerated(stream: Any) -> Any:
    index = 0
    async for piece in stream:
        yield index, piece
        index += 1


async def watch(url: str, pid: int, until: float, tally: Tally) -> None:
    """Note the resident memory and the server's own numbers every second."""
    import urllib.request

    started = time.monotonic()
    while time.monotonic() < until:
        tally.memory.append((time.monotonic() - started, resident_mib(pid)))
        numbers = await asyncio.to_thread(lambda: json.load(urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=30)))
        tally.highest = max(tally.highest, numbers["memory"]["reserved"] + numbers["memory"]["stored"])
        tally.last = numbers
        await asyncio.sleep(1)


async def stressed(url: str, pid: int, minutes: float) -> Tally:
    import openai

    tally, until = Tally(), time.monotonic() + 60 * minutes
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        await asyncio.gather(watch(url, pid, until, tally), *(one_client(client, number, until, tally) for number in range(CLIENTS)))
    await asyncio.sleep(1)
    await watch(url, pid, time.monotonic() + 0.1, tally)
    return tally


def stress(model: str, minutes: float, *, dry: bool) -> None:
    started = time.perf_counter()
    with server_process(model) as (url, pid):
        tally = asyncio.run(stressed(url, pid, minutes))
    wall, memory, queue = time.perf_counter() - started, tally.last["memory"], tally.last["queue"]
    clean = memory["reserved"] == 0 and queue["inside"] == 0 and tally.highest <= memory["limit"]
    answered = sum(tally.counts[kind] for kind in ("whole", "stream", "left"))
    tokens, limit = tally.last["tokens"], memory["limit"] / 2**20
    note = (
        f"{answered:,} answers ({tally.counts['stream']:,} streams, {tally.counts['left']:,} left in the middle), {tally.counts['429']:,} refused with 429 "
        f"and Retry-After. Caches held at most {tally.highest / 2**20:.2f} of {limit:.2f} MiB; {memory['forgotten']:,} conversations made way; "
        f"{tokens['reused']:,} of {tokens['prompt']:,} prompt tokens were in a cache. "
        f"Afterwards {memory['reserved']} bytes reserved, {queue['inside']} requests inside."
    )
    for failure in tally.failures[:5]:
        print(failure)
    record(
        dry, claim=f"{CLIENTS} clients at once for {minutes:g} minutes at the memory limit", method=SETTINGS, values=(len(tally.failures) + (not clean),),
        unit="failures", expected="no failure but 429, nothing left behind", held=not tally.failures and clean, seconds=wall, note=note,
    )  # fmt: skip
    warm = [mib for second, mib in tally.memory if second >= 0.2 * 60 * minutes]
    half = len(warm) // 2
    before, after = max(warm[:half]), max(warm[half:])
    record(
        dry, claim=f"Resident memory of the server while {CLIENTS} clients ask for {minutes:g} minutes", method=SETTINGS, values=(after / before,),
        unit="highest of the last 40 % of the time / of the 40 % before", expected=f"at most {LIMIT_RATIO}", held=after / before <= LIMIT_RATIO, seconds=wall,
        note=f"{tally.memory[0][1]:.0f} MiB at the start, {before:.1f} and {after:.1f} MiB at most, after a first fifth for warming up.",
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One request of the fuzz and what it may get; status 0: nothing, the client has left."""

    kind: str
    allowed: frozenset[int]
    method: str = "POST"
    path: str = COMPLETION
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("host", "localhost"), ("content-type", "application/json"))
    how: dict[str, Any] = field(default_factory=dict)


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def any_json(draw: random.Random, depth: int = 3) -> Any:
    """A random value."""
    atoms = [None, True, False, 0, -1, 7, 10**40, 1.5, -0.0, 1e308, "", "x", "\u00e9\u4e2d\U0001f600", "a" * 500, "\x00", "NaN"]
    if depth == 0 or draw.random() < 0.5:
        return draw.choice(atoms)
    if draw.random() < 0.5:
        return [any_json(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    keys = ["role", "content", "type", "text", "name", "x", "tool_calls", "image_url"]
    return {draw.choice(keys): any_json(draw, depth - 1) for _ in range(draw.randint(0, 3))}


def valid_body(draw: random.Random, path: str) -> dict[str, Any]:
    """A small request that can be answered."""
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))
    content = {COMPLETION: {"prompt": text}, CHAT: {"messages": [{"role": "user", "content": text}]}, RESPONSES: {"input": text}}[path]
    count = {"max_output_tokens" if path == RESPONSES else "max_tokens": draw.randint(1, 4)}
    return {"model": "measured", **content, **count, "stream": draw.random() < 0.5}


def broken_bytes(draw: random.Random) -> bytes:
    """A body that is almost JSON, or not at all."""
    body = bytearray(as_json(valid_body(draw, COMPLETION)))
    kind = draw.randrange(5)
    if kind == 0:
        return bytes(draw.randbytes(draw.randint(0, 200)))
    if kind == 1:
        return bytes(body[: draw.randrange(len(body))])
    if kind == 2:
        return draw.choice([b"[", b'{"a":', b'{"prompt":[']) * draw.randint(1, 2500)
    if kind == 3:
        return b'{"prompt": "\\ud83d"}' if draw.random() < 0.5 else b'{"prompt": ' + draw.choice([b"NaN", b"Infinity", b"9" * 5000]) + b"}"
    for _ in range(draw.randint(1, 5)):
        body[draw.randrange(len(body))] = draw.randrange(256)
    return bytes(body)


REFUSED = frozenset({400, 404})
FIELDS = [
    "model", "prompt", "messages", "input", "instructions", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream", "n",
    "stream_options", "user", "generation_config", "tools", "logit_bias", "chat_template_kwargs", "best_of", "echo", "suffix", "response_format",
]  # fmt: skip


def make_case(draw: random.Random) -> Case:
    """A request of a random kind."""
    path = draw.choice([COMPLETION, CHAT, RESPONSES])
    json_headers = Case.headers
    kind = draw.random()
    if kind < 0.25:
        return Case("bytes that are no JSON", frozenset({200, 400, 404, 429}), path=path, body=broken_bytes(draw))  # some are JSON by chance
    if kind < 0.65:
        body = valid_body(draw, path)
        for _ in range(draw.randint(1, 3)):
            body[draw.choice(FIELDS)] = any_json(draw)
        return Case("fields of any value", frozenset({200, 400, 404, 429}), path=path, body=as_json(body))
    if kind < 0.70:
        return Case("a long body", frozenset({413}), path=path, body=b'{"prompt": "' + b"x" * (MAX_BODY_KIB * 1024 + draw.randrange(9999)) + b'"}')
    if kind < 0.75:
        body = {"prompt": " ".join(draw.choices(WORDS, k=4000))}
        return Case("a long prompt", frozenset({400, 429}), body=as_json(body))
    if kind < 0.82:
        strange = draw.choice(
            ["/load_model", "/reset", "/v1/systemone", "/docs", "/openapi.json", "/v1/../reset", "/%2e%2e", "/" + "x" * draw.randint(0, 900)]
        )
        return Case("another path", frozenset({404}), method=draw.choice(["GET", "POST", "PUT"]), path=strange, body=b"{}")
    if kind < 0.87:
        return Case("another method", frozenset({405}), method=draw.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "BREW"]), path=path)
    if kind < 0.92:
        host = draw.choice(["evil.example", "localhost.evil.example", "10.0.0.1:80", "", "[::2]"])
        return Case("another host", frozenset({403}), path=path, headers=(("host", host), json_headers[1]), body=b"{}")
    if kind < 0.96:
        name = draw.choice(["text/plain", "", "multipart/form-data; boundary=x", "application/xml"])
        return Case("another type", frozenset({415}), path=path, headers=(json_headers[0], ("content-type", name)), body=b"{}")
    if kind < 0.97:
        return Case(
            "leaves while sending", frozenset({0}), path=path, body=b'{"prompt"', how={"unfinished": True, "leave_after": draw.random() * 0.01}
        )
    if kind < 0.98:
        return Case(
            "leaves while waiting",
            frozenset({0, 200, 429}),
            path=path,
            body=as_json(valid_body(draw, path)),
            how={"leave_after": draw.random() * 0.1},
        )
    if kind < 0.99:
        body = as_json(valid_body(draw, path) | {"stream": True})
        return Case("leaves in mid-stream", frozenset({200, 429}), path=path, body=body, how={"leave_after_chunks": draw.randint(1, 3)})
    return Case("a good request", frozenset({200, 429}), path=path, body=as_json(valid_body(draw, path)))


def is_well_formed(case: Case, reply: Reply) -> bool:
    """Whether a refusal has OpenAI's form and an answer its end."""
    if reply.status == 0 or case.how:
        return True
    if reply.status >= 400:
        return set(reply.json) == {"error"} and set(reply.json["error"]) == {"message", "type", "param", "code"} and len(reply.body) < 2000
    if "text/event-stream" in reply.headers.get("content-type", ""):
        return reply.complete and bool(reply.events)
    return reply.complete and "error" not in reply.json


async def fuzzed(parts: Any, *, number: int, at_once: int) -> tuple[Counter[str], list[str]]:
    """Send so many requests, some at once; how many of each kind, and what was wrong."""
    draw, counts, wrong = random.Random(0), Counter[str](), list[str]()

    async def one(case: Case) -> None:
        counts[case.kind] += 1
        try:
            async with asyncio.timeout(120):
                reply = await call(parts.door, case.method, case.path, body=case.body, headers=case.headers, **case.how)
            if reply.status not in case.allowed or not is_well_formed(case, reply):
                wrong.append(f"{case.kind}: {reply.status} {reply.body[:150]!r} for {case.body[:200]!r}")
            counts[f"status {reply.status}"] += 1
        except Exception as error:
            wrong.append(f"{case.kind}: {type(error).__name__}: {error} for {case.body[:200]!r}")

    for first in range(0, number, at_once):
        await asyncio.gather(*(one(make_case(draw)) for _ in range(min(at_once, number - first))))
        if first // at_once % 100 == 0:
            print(f"\r{first:,} requests, {len(wrong)} wrong", end="", file=sys.stderr, flush=True)
    while parts.turnstile.is_busy:
        await asyncio.sleep(0.01)
    return counts, wrong


def garbage(url: str, number: int) -> int:
    """Send bytes that are no HTTP to a listening server, and count the connections after which it does not answer /health."""
    import urllib.request

    draw, failures = random.Random(1), 0
    host, _, port = url.removeprefix("http://").removesuffix("/v1").rpartition(":")
    for index in range(number):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as connection:
            begin = draw.choice(
                [b"", b"GET /health HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"\x16\x03\x01", b"X" * 70_000]
            )
            connection.sendall(begin + draw.randbytes(draw.randint(0, 300)))
        if index % 50 == 49:
            failures += urllib.request.urlopen(f"{url.removesuffix('/v1')}/health", timeout=30).status != 200
    return failures


def fuzz(model: str, number: int, *, dry: bool, folder: Path) -> None:
    from partwise.serve._http_handlers import quiet_handlers
    from partwise.serve.http_server import prepare, start_in_thread

    started, template = time.perf_counter(), folder / "template.jinja"
    template.write_text(TEMPLATE)
    flags = make_flags(model, chat_template=template)
    parts, listener, _ = prepare(flags)
    listener.close()
    with quiet_handlers():
        counts, wrong = asyncio.run(fuzzed(parts, number=number, at_once=64))
    parts.manager.stop()
    left = (parts.turnstile.num_inside, parts.memory.reserved, len(parts.manager.leases), parts.door.num_reading)
    with start_in_thread(flags) as running:
        dead = garbage(running.url, 1000)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if not kind.startswith("status"))
    statuses = ", ".join(f"{count:,} {kind.removeprefix('status ')}" for kind, count in sorted(counts.items()) if kind.startswith("status"))
    for text in wrong[:10]:
        print(text)
    note = (
        f"64 at a time: {kinds}. Answers: {statuses} (0: the client had left). 1,000 connections with bytes that are no HTTP on top. "
        f"Afterwards {left[0]} requests inside and {left[1]} bytes reserved."
    )
    record(
        dry, claim=f"{number:,} requests that are malformed, wrong or abandoned", method=SETTINGS, values=(len(wrong) + dead + any(left),),
        unit="wrong answers", expected="none, and nothing left behind", held=not wrong and not dead and not any(left),
        seconds=time.perf_counter() - started, note=note,
    )  # fmt: skip


def record(dry: bool, *, values: tuple[float, ...], **row: Any) -> None:
    made = Row(values=values, seeds=(0,), **row)
    print(f"\n{made.claim}: {values} held={made.held} {made.seconds:.0f} s\n  {made.note}", flush=True)
    if not dry:
        append(NAME, made)


def main() -> None:
    import tempfile

    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--only", choices=("stress", "fuzz"))
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--dry", action="store_true", help="print rows and keep none")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.only != "stress":
            fuzz(given.model, given.requests, dry=given.dry, folder=Path(folder))
    if given.only != "fuzz":
        stress(given.model, given.minutes, dry=given.dry)


if __name__ == "__main__":
    main()
