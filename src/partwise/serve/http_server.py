"""A server on this machine that OpenAI's clients talk to, with a bounded cache per conversation and a limit for all of them together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partwise.checks import InputError, check_at_least, load_extra

if TYPE_CHECKING:
    import socket

    from partwise.commands import Report
    from partwise.serve._http_parts import Parts, RunningServer
    from partwise.serve.rule import EvictionRule

__all__ = ["HttpFlags", "serve_http", "start_in_thread"]


@dataclass(frozen=True, kw_only=True)
class HttpFlags:
    """What to serve, to whom, and how much of it.

    Parameters
    ----------
    model : str or None
        Folder of a model, or its id. Left out: the newest finished run of `partwise train` under runs.
    name : str or None
        What requests call the model. Left out: the last part of `model`.
    method : str
        Which tokens leave the cache, a name of `partwise list serve`.
    budget : int
        Tokens that the cache of a conversation holds per layer and head.
    bits : 4, 8 or None
        Store keys and values in so many bits. Left out: as they come.
    pinned : int
        First tokens of every conversation that never leave its cache.
    host : str
        Address to listen on. Others than 127.0.0.1 need a token.
    port : int
        Port to listen on; 0 takes a free one.
    token : str or None
        What clients pass as api_key. Left out: the environment variable PARTWISE_SERVE_TOKEN, or none.
    memory_limit_mib : float
        Memory of all caches together, in MiB. Weights and what the model computes with come on top.
    max_queue : int
        Requests that wait while one is answered; more get 429.
    max_prompt_tokens : int
        Longer prompts are refused.
    max_new_tokens : int
        Most tokens of an answer.
    max_body_kib : int
        Longest body of a request, in KiB.
    conversation_idle_s : float
        Seconds after which the cache of a conversation that nobody continues is freed.
    chat_template : Path or None
        Jinja file that turns messages into a prompt. Left out: the model's own, and without one chat is refused.
    device : str or None
        Where the model runs. Left out: the GPU if there is one.
    dtype : {"float32", "bfloat16", "float16"} or None
        Left out: float32 on a CPU, else the model's own.
    """

    model: str | None = None
    name: str | None = None
    method: str = "scissorhands"
    budget: int = 1024
    bits: Literal[4, 8] | None = None
    pinned: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    memory_limit_mib: float = 1024.0
    max_queue: int = 16
    max_prompt_tokens: int = 8192
    max_new_tokens: int = 1024
    max_body_kib: int = 512
    conversation_idle_s: float = 600.0
    chat_template: Path | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "max_prompt_tokens", "max_new_tokens", "max_body_kib"):
            check_at_least(getattr(self, name), 1, name=name)
        for name in ("pinned", "port", "max_queue"):
            check_at_least(getattr(self, name), 0, name=name)
        for name in ("memory_limit_mib", "conversation_idle_s"):
            if not getattr(self, name) > 0 or getattr(self, name) == float("inf"):
                raise InputError(
                    "bad-server-setting", f"got {name}={getattr(self, name)}, expected a number above 0. Pass {name}={getattr(HttpFlags, name):g}."
                )


def serve_http(
    flags: HttpFlags, *, rule: EvictionRule | None = None, report: Report | None = None, write: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Serve until Ctrl-C.

    Parameters
    ----------
    flags : HttpFlags
        What to serve.
    rule : EvictionRule, optional
        Which tokens leave, with settings of its own. Left out: ``flags.method`` with its defaults.
    report : callable, optional
        Told (phase, done, total, note) once the server listens.
    write : callable, optional
        Gets the lines that say where.

    Returns
    -------
    dict
        What /metrics said at the end, and the ``url``.
    """
    parts, listener, at = prepare(flags, rule=rule)
    from partwise.serve._http_parts import address_of, run

    url = address_of(listener)
    if write is not None:
        write(f"{at} at {url}\nCtrl-C ends it.\n")
    if report is not None:
        report(f"serving at {url}", 0, 0, "")
    run(parts, listener)
    return parts.metrics() | {"url": url}


@contextlib.contextmanager
def start_in_thread(flags: HttpFlags, *, model: Any = None, tokenizer: Any = None, rule: EvictionRule | None = None) -> Iterator[RunningServer]:
    """Serve inside the block, from another thread of this process.

    Parameters
    ----------
    flags : HttpFlags
        What to serve.
    model, tokenizer : optional
        Of transformers; instead of what ``flags.model`` names.
    rule : EvictionRule, optional
        Which tokens leave; see `serve_http`.

    Yields
    ------
    RunningServer
        With the ``url`` that clients need.
    """
    parts, listener, _ = prepare(flags, model=model, tokenizer=tokenizer, rule=rule)
    from partwise.serve._http_parts import run_in_thread

    with run_in_thread(parts, listener) as running:
        yield running


def prepare(flags: HttpFlags, *, model: Any = None, tokenizer: Any = None, rule: EvictionRule | None = None) -> tuple[Parts, socket.socket, str]:
    """The server that the flags describe, the socket it is to listen on, and a line that says what it is."""
    for module in ("fastapi", "uvicorn", "openai", "jinja2"):  # transformers' handlers are built on openai's types
        load_extra(module, extra="http")
    load_extra("transformers", extra="hf")
    from partwise.flags import load_target
    from partwise.opened_models import open_model
    from partwise.serve import RULES
    from partwise.serve._http_parts import assemble, listen

    if rule is None:
        from partwise.checks import check_choice

        check_choice(flags.method, list(RULES), name="method")
        rule = load_target(RULES[flags.method])()
    source = flags.model or "model"
    if model is None:
        opened = open_model(flags.model, device=flags.device, dtype=flags.dtype)
        model, tokenizer, source = opened.model, opened.tokenizer, opened.name
    name = flags.name or Path(source).name
    listener = listen(flags.host, flags.port)
    try:
        parts = assemble(flags, model, tokenizer, rule, name=name)
    except BaseException:
        listener.close()
        raise
    return parts, listener, f"{name} with {rule!r}, {flags.budget} tokens per layer and head"
