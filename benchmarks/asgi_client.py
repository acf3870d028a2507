"""Requests to an ASGI application in this process: fast, and with clients that leave, stall or never finish whenever a test wants them to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Reply", "call", "post"]


@dataclass
class Reply:
    """What came back; ``status`` is 0 where nothing did."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    complete: bool = False

    @property
    def body(self) -> bytes:
        """All pieces."""
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        """The object in the body."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Code of a refusal in OpenAI's form."""
        return self.json["error"]["code"]

    @property
    def events(self) -> list[Any]:
        """Objects of a stream of events; the mark of the end as text."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def call(
    application: Any,
    method: str,
    path: str,
    *,
    body: bytes = b"",
    headers: Iterable[tuple[str, str]] = (("host", "localhost"), ("content-type", "application/json")),
    leave_after: float | None = None,
    leave_after_chunks: int | None = None,
    unfinished: bool = False,
    stalled: bool = False,
) -> Reply:
    """Send one request and return what came back.

    Parameters
    ----------
    application, method, path, body, headers
        What to ask, and whom.
    leave_after : float, optional
        Seconds after which the client disconnects.
    leave_after_chunks : int, optional
        Pieces of the answer after which it does.
    unfinished : bool
        The body announces more and more does not come.
    stalled : bool
        The client never takes the first piece.
    """
    reply, gone, asked = Reply(), asyncio.Event(), False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body, "more_body": unfinished}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if gone.is_set():
            return
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        if stalled:
            await asyncio.Event().wait()
        reply.chunks.append(message.get("body", b""))
        reply.complete = not message.get("more_body", False)
        if reply.complete or (leave_after_chunks is not None and len(reply.chunks) >= leave_after_chunks):
            gone.set()

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(),
        "query_string": b"", "root_path": "", "scheme": "http", "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 50000), "state": {},
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers],
    }  # fmt: skip
    if leave_after is not None:
        asyncio.get_running_loop().call_later(leave_after, gone.set)
    await application(scope, receive, send)
    return reply


async def post(application: Any, path: str, content: Any, **how: Any) -> Reply:
    """POST an object as JSON."""
    return await call(application, "POST", path, body=json.dumps(content).encode(), **how)
