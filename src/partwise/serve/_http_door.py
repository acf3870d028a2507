"""The door of the server, in front of the application of transformers: who comes in, with what, in which order, and what happens when somebody leaves."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from partwise.serve._http_queue import Lease, Turnstile
from partwise.serve._http_refusal import Refusal
from partwise.serve._http_requests import Accepted, Limits, parse_object, read_request

__all__ = ["Door", "DoorSettings"]

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

POSTS = {"/v1/chat/completions": "chatcmpl", "/v1/completions": "cmpl", "/v1/responses": "resp"}  # and how their answers are called
GETS = ("/health", "/metrics", "/v1/models")
MAX_READING = 64  # bodies that are read at the same time
CLOSING = Refusal(503, "shutting_down", "the server is about to end and answers nobody any more. Try again later.")
DRAINED_BYTES, DRAIN_S = 64 * 2**20, 5.0  # of a refused body, so that its sender reads the refusal and no broken pipe


@dataclass(frozen=True, kw_only=True)
class DoorSettings:
    """What the door asks of a request.

    Parameters
    ----------
    token : bytes or None
        What follows ``Bearer`` in the header Authorization.
    hosts : frozenset of str
        Names that the header Host may have where there is no token: a page of the web that points its own name at this machine has another one.
    max_body_bytes : int
        Longest body.
    body_timeout : float
        Seconds in which a body has to arrive.
    stall_timeout : float
        Seconds in which a client has to take a piece of its answer.
    """

    token: bytes | None
    hosts: frozenset[str]
    max_body_bytes: int
    body_timeout: float = 30.0
    stall_timeout: float = 60.0


class Door:
    """An ASGI application around another one.

    Parameters
    ----------
    application : ASGI application
        What answers the requests that pass.
    settings : DoorSettings
        What is asked of a request.
    limits : Limits
        What is granted to one.
    turnstile : Turnstile
        The queue.
    leases : dict
        Requests that have the turn, by name; the generating thread looks them up.
    metrics : callable
        The numbers of /metrics.
    """

    def __init__(
        self,
        application: Any,
        *,
        settings: DoorSettings,
        limits: Limits,
        turnstile: Turnstile,
        leases: dict[str, Lease],
        metrics: Callable[[], dict[str, Any]],
    ) -> None:
        self.application, self.settings, self.limits, self.turnstile, self.leases, self.metrics = (
            application,
            settings,
            limits,
            turnstile,
            leases,
            metrics,
        )
        self.num_reading = 0
        self.closing = asyncio.Event()
        self.statuses: Counter[int] = Counter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] == "lifespan":
            await self.application(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, _Body(receive), _Answer(send, self.statuses, self.settings.stall_timeout))
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Message, body: _Body, answer: _Answer) -> None:
        try:
            await self._admit(scope, body, answer)
        except Refusal as refusal:
            if refusal.status != 408:
                await body.drain()
            await answer.refuse(refusal)
        except (_Gone, TimeoutError):  # a TimeoutError of a client that does not read: nobody is there to be told
            self.statuses[499] += 1
        except Exception:
            logger.exception("a request failed")
            if not answer.has_begun:
                await answer.refuse(Refusal(500, "internal_error", "got an error inside the server, expected none. Its log has it; try again."))

    async def _admit(self, scope: Message, body: _Body, answer: _Answer) -> None:
        """Path, method, sender; then what the path does."""
        path, method = scope["path"], scope["method"]
        headers = _headers(scope)
        if path != "/health":
            self._check_sender(headers)
        is_model = path == f"/v1/models/{self.limits.name}"
        if path not in POSTS and path not in GETS and not is_model:
            raise Refusal(404, "not_found", f"got the path {path[:100]!r}, expected one of {', '.join([*POSTS, *GETS])}. Check the base URL.")
        allowed = "POST" if path in POSTS else "GET, HEAD"
        if method not in allowed.split(", "):
            expected = allowed.replace(", ", " or ")
            raise Refusal(405, "method_not_allowed", f"got {method[:20]} {path}, expected {expected}. Change the method.", headers={"Allow": allowed})
        if path in POSTS:
            accepted = await self._read(path, headers, body)
            await self._queue(scope, accepted, body, answer)
        elif path == "/metrics":
            await answer.json(200, self.metrics() | {"answers": {str(status): count for status, count in sorted(self.statuses.items())}})
        elif is_model:
            await answer.json(200, {"id": self.limits.name, "object": "model", "created": 0, "owned_by": "partwise"})
        else:
            await self.application(_inner({**scope, "method": "GET"}, f"get-{uuid.uuid4().hex}"), body.receive, answer.send)

    def _check_sender(self, headers: dict[bytes, list[bytes]]) -> None:
        if self.settings.token is not None:
            given = headers.get(b"authorization", [])
            kind, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
            if not hmac.compare_digest(token.strip(), self.settings.token) or kind.lower() != b"bearer":
                got = "another token" if given else "no token"
                text = f"got {got}, expected the server's in the header Authorization: Bearer TOKEN. Pass it as api_key."
                raise Refusal(401, "invalid_api_key", text, headers={"WWW-Authenticate": "Bearer"})
            return
        for host in headers.get(b"host", []):
            name = host.decode("latin-1").strip()
            if _without_port(name).lower() not in self.settings.hosts:
                known = ", ".join(sorted(self.settings.hosts))
                raise Refusal(403, "unknown_host", f"got the host {name[:100]!r}, expected one of {known}. Use that name, or --token.")

    async def _read(self, path: str, headers: dict[bytes, list[bytes]], body: _Body) -> Accepted:
        """Read and check the body."""
        kind = b"".join(headers.get(b"content-type", [])).partition(b";")[0].strip().lower()
        if kind != b"application/json":  # which no page of the web can send here without being asked whether it may
            raise Refusal(
                415, "not_json", f"got the content type {kind[:60].decode('latin-1')!r}, expected application/json. Set the header Content-Type."
            )
        announced = headers.get(b"content-length", [b""])[0]
        if announced.isdigit() and int(announced[:20]) > self.settings.max_body_bytes:
            raise too_large(self.settings.max_body_bytes)
        if self.num_reading >= MAX_READING:
            raise Refusal(429, "too_many_uploads", f"{MAX_READING} bodies are being read already. Try again in 1 s.", headers={"Retry-After": "1"})
        self.num_reading += 1
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                raw = await body.read(self.settings.max_body_bytes)
        except TimeoutError:
            text = f"the body did not arrive within {self.settings.body_timeout:g} s. Send it faster."
            raise Refusal(408, "body_too_slow", text, headers={"Connection": "close"}) from None
        finally:
            self.num_reading -= 1
        return read_request(path, parse_object(raw), self.limits)

    async def _queue(self, scope: Message, accepted: Accepted, body: _Body, answer: _Answer) -> None:
        """Take a place, wait for the turn, answer; whoever leaves before is not waited for."""
        with self.turnstile.place():
            lease = Lease(f"{POSTS[scope['path']]}-{uuid.uuid4().hex}", accepted)
            work = asyncio.create_task(self._in_turn(lease, scope, answer))
            gone, closing = asyncio.create_task(body.wait_until_gone()), asyncio.create_task(self.closing.wait())
            try:
                await asyncio.wait({work, gone, closing}, return_when=asyncio.FIRST_COMPLETED)
                if not (work.done() or answer.is_complete):
                    raise CLOSING if self.closing.is_set() else _Gone
                await work
            except BaseException:
                lease.cancelled.set()
                raise
            finally:
                for task in (work, gone, closing):
                    task.cancel()
                await asyncio.gather(work, gone, closing, return_exceptions=True)

    async def _in_turn(self, lease: Lease, scope: Message, answer: _Answer) -> None:
        await self.turnstile.wait_for_turn(lease)
        self.leases[lease.name] = lease
        try:
            await self.application(_inner(scope, lease.name, lease.accepted.body), _one_body(lease.accepted.body), answer.send)
        finally:
            del self.leases[lease.name]
            if not lease.is_generating:  # else the turn is over when the generating thread is done with it
                self.turnstile.end_turn(lease)


def too_large(limit: int) -> Refusal:
    """A body above the limit."""
    return Refusal(413, "body_too_large", f"got more than {limit:,} bytes, expected at most as many. Shorten the prompt, or raise --max-body-kib.")


class _Gone(Exception):
    """The client left."""


class _Body:
    """The body of a request, and the news that its sender has left."""

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self._is_read = False
        self._count = 0

    async def read(self, limit: int) -> bytes:
        """All of it, if it has at most ``limit`` bytes."""
        chunks = []
        while not self._is_read:
            chunk = await self._next()
            if self._count > limit:
                raise too_large(limit)
            chunks.append(chunk)
        return b"".join(chunks)

    async def drain(self) -> None:
        """Read on and forget, within reason."""
        with contextlib.suppress(TimeoutError, _Gone):
            async with asyncio.timeout(DRAIN_S):
                while not self._is_read and self._count < DRAINED_BYTES:
                    await self._next()

    async def wait_until_gone(self) -> None:
        """Return when the client has left."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def _next(self) -> bytes:
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        chunk: bytes = message.get("body", b"")
        self._count += len(chunk)
        self._is_read = not message.get("more_body", False)
        return chunk


class _Answer:
    """What goes back: counted, never cached, and not waited for where nobody reads."""

    def __init__(self, send: Send, statuses: Counter[int], stall_timeout: float) -> None:
        self._send, self._statuses, self._stall_timeout = send, statuses, stall_timeout
        self.has_begun = self.is_complete = False

    async def send(self, message: Message) -> None:
        """One message of ASGI."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            self._statuses[message["status"]] += 1
            extra = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        async with asyncio.timeout(self._stall_timeout):
            self.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """A refusal, unless an answer has begun."""
        if not self.has_begun:
            with contextlib.suppress(TimeoutError):
                await self.json(refusal.status, refusal.content(), refusal.headers)

    async def json(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """A whole answer."""
        body = json.dumps(content).encode()
        fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        await self.send({"type": "http.response.start", "status": status, "headers": [(k.lower().encode(), v.encode()) for k, v in fields.items()]})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def _headers(scope: Message) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.lower(), []).append(value)
    return found


def _without_port(host: str) -> str:
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def _inner(scope: Message, name: str, body: dict[str, Any] | None = None) -> Message:
    """The request as the application sees it: nothing of the client's headers, and a name of ours."""
    headers = [(b"host", b"localhost"), (b"x-request-id", name.encode())]
    if body is not None:
        headers.append((b"content-type", b"application/json"))
    return {**scope, "headers": headers, "query_string": b""}


def _one_body(body: dict[str, Any]) -> Receive:
    """What the application receives: the checked body, and then nothing; who leaves is noticed by the door."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError("waits for ever")

    return receive
