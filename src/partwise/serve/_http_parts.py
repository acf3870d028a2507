"""The parts of the server put together: door, queue, memory, generating thread, and the application of transformers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from partwise.checks import InputError, RunError
from partwise.serve._attached import attached
from partwise.serve._http_cache import CacheMaker
from partwise.serve._http_door import Door, DoorSettings
from partwise.serve._http_generation import BoundedGenerateManager
from partwise.serve._http_handlers import build_application, quiet_handlers
from partwise.serve._http_memory import CacheMemory
from partwise.serve._http_queue import Turnstile
from partwise.serve._http_requests import Limits

if TYPE_CHECKING:
    from partwise.serve.http_server import HttpFlags
    from partwise.serve.rule import EvictionRule

__all__ = ["Parts", "RunningServer", "assemble", "listen", "run", "run_in_thread"]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
TOKEN_VARIABLE = "PARTWISE_SERVE_TOKEN"
MAX_CONNECTIONS = 512
START_S, STOP_S = 30.0, 10.0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A server that does not listen yet.

    Parameters
    ----------
    door : Door
        The ASGI application.
    manager : BoundedGenerateManager
        The generating thread.
    memory : CacheMemory
        Bytes of caches.
    turnstile : Turnstile
        The queue.
    limits : Limits
        What is granted to a request.
    """

    door: Door
    manager: BoundedGenerateManager
    memory: CacheMemory
    turnstile: Turnstile
    limits: Limits

    def metrics(self) -> dict[str, Any]:
        """What /metrics says, as one JSON object."""
        return metrics(self.limits.name, self.memory, self.turnstile, self.manager)


@dataclass(frozen=True)
class RunningServer:
    """A server that listens in a thread of this process.

    Parameters
    ----------
    url : str
        Base URL for OpenAI's clients.
    parts : Parts
        What it is made of.
    """

    url: str
    parts: Parts


def assemble(flags: HttpFlags, model: Any, tokenizer: Any, rule: EvictionRule, *, name: str) -> Parts:
    """Build the server around a model; everything that can be refused is refused here, before it listens."""
    token = token_of(flags)
    if getattr(tokenizer, "_tokenizer", None) is None:
        text = f"got a tokenizer of class {type(tokenizer).__name__}, expected a fast one. Save it with its tokenizer.json."
        raise InputError("slow-tokenizer", text)
    if flags.chat_template is not None:
        tokenizer.chat_template = read_template(flags.chat_template)
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31
    caches = CacheMaker(model=model, rule=rule, budget=flags.budget, pinned=flags.pinned, bits=flags.bits)
    memory = CacheMemory(int(flags.memory_limit_mib * 2**20), idle=flags.conversation_idle_s, clock=time.monotonic)
    turnstile = Turnstile(flags.max_queue)
    manager = BoundedGenerateManager(caches=caches, memory=memory, turnstile=turnstile, max_prompt_tokens=flags.max_prompt_tokens, context=context)
    need = caches.bound(manager.sample, num_prompt=manager.max_prompt_tokens, num_new=flags.max_new_tokens)
    if need > memory.limit:
        manager.stop()
        raise InputError(
            "memory-limit-too-small",
            f"got a memory limit of {flags.memory_limit_mib:g} MiB, expected at least {need / 2**20:.1f} MiB, which one request may need. "
            "Raise --memory-limit-mib, or lower --budget or --max-prompt-tokens.",
        )
    limits = Limits(name=name, has_chat=getattr(tokenizer, "chat_template", None) is not None, max_new_tokens=flags.max_new_tokens)
    door = Door(
        build_application(name, model, tokenizer, manager),
        settings=DoorSettings(token=token, hosts=LOOPBACK | {"[::1]", flags.host.lower()}, max_body_bytes=flags.max_body_kib * 1024),
        limits=limits,
        turnstile=turnstile,
        leases=manager.leases,
        metrics=lambda: metrics(name, memory, turnstile, manager),
    )
    return Parts(door=door, manager=manager, memory=memory, turnstile=turnstile, limits=limits)


def metrics(name: str, memory: CacheMemory, turnstile: Turnstile, manager: BoundedGenerateManager) -> dict[str, Any]:
    """Numbers of a server, as one JSON object."""
    memory.forget_idle()
    return {
        "model": name,
        "queue": {"inside": turnstile.num_inside, "places": turnstile.max_queue + 1, "busy": turnstile.is_busy},
        "memory": {
            "limit": memory.limit,
            "reserved": memory.reserved,
            "stored": memory.stored,
            "conversations": len(memory.conversations),
            "forgotten": memory.num_forgotten,
        },
        "tokens": {
            "generated": manager.num_tokens,
            "prompt": manager.num_prompt_tokens,
            "reused": manager.num_reused,
            "per_second": round(manager.num_tokens / manager.seconds, 2) if manager.seconds else None,
        },
    }


def token_of(flags: HttpFlags) -> bytes | None:
    """The token, from the flags or from the environment; needed where others than this machine can connect."""
    token = flags.token if flags.token is not None else os.environ.get(TOKEN_VARIABLE)
    if token is None and flags.host not in LOOPBACK:
        text = (
            f"got the host {flags.host} without a token, expected one where others can connect. Pass --token, set {TOKEN_VARIABLE}, or use 127.0.0.1."
        )
        raise InputError("token-missing", text)
    if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token):
        raise InputError(
            "token-unusable", f"got a token of {len(token)} letters, expected at least 8 printable ASCII letters without spaces. Choose another."
        )
    return None if token is None else token.encode()


def read_template(path: Path) -> str:
    """A chat template, as text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "template-unreadable", f"--chat-template {path} cannot be read: got {error}, expected a Jinja file in UTF-8. Check the path."
        ) from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, or an error that says what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        text = f"cannot listen on {host} port {port}: got {error}, expected a free port of this machine. Pass another --port, or 0 for any."
        raise RunError("cannot-listen", text) from error


def address_of(listener: socket.socket) -> str:
    """Base URL for OpenAI's clients."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class _Server(uvicorn.Server):
    """Ends what is being answered when it ends, instead of waiting for it."""

    def __init__(self, config: Any, parts: Parts) -> None:
        super().__init__(config)
        self.parts = parts

    async def shutdown(self, sockets: Any = None) -> None:
        """Refuse who waits, break off what is being answered, let the generating thread give everything back, and close."""
        self.parts.door.closing.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                while self.parts.turnstile.num_inside or self.parts.turnstile.is_busy:
                    await asyncio.sleep(0.005)
        await super().shutdown(sockets)


def _uvicorn(parts: Parts) -> uvicorn.Server:
    config = uvicorn.Config(
        parts.door, log_config=None, log_level="critical", access_log=False, server_header=False, proxy_headers=False, lifespan="on", ws="none", http="h11",
        loop="asyncio", limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=10, timeout_graceful_shutdown=3,
    )  # fmt: skip
    return _Server(config, parts)


def run(parts: Parts, listener: socket.socket) -> None:
    """Serve until Ctrl-C."""
    with listener, attached(parts.manager.caches.model), quiet_handlers():
        try:
            with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again after it has closed everything
                _uvicorn(parts).run(sockets=[listener])
        finally:
            parts.manager.stop()


@contextlib.contextmanager
def run_in_thread(parts: Parts, listener: socket.socket) -> Iterator[RunningServer]:
    """Serve inside the block, from another thread."""
    server = _uvicorn(parts)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), name="partwise-http", daemon=True)
    with listener, attached(parts.manager.caches.model), quiet_handlers():
        thread.start()
        try:
            deadline = time.monotonic() + START_S
            while not server.started:
                if not thread.is_alive() or time.monotonic() > deadline:
                    raise RunError("server-not-started", "the server did not start, expected it to listen by now. The log says why.")
                time.sleep(0.005)
            yield RunningServer(address_of(listener), parts)
        finally:
            server.should_exit = True
            thread.join(2 * STOP_S)
            parts.manager.stop()
