"""Who comes in: each refusal at the door, in front of an application that does whatever the test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra http")

from asgi_client import Reply, call, post
from partwise.serve._http_door import Door, DoorSettings
from partwise.serve._http_queue import Turnstile
from partwise.serve._http_requests import Limits

PATH = "/v1/completions"
BODY = {"prompt": "one"}
JSON = ("content-type", "application/json")


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with the body it got."""
    body = (await receive())["body"] if scope["method"] == "POST" else b"{}"
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(name, value) for name, value in scope["headers"] if name.startswith(b"x-")]}
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})


def door_with(application: Any = echo, *, max_queue: int = 4, **settings: Any) -> Door:
    given = {
        "token": None,
        "hosts": frozenset({"localhost", "127.0.0.1"}),
        "max_body_bytes": 1000,
        "body_timeout": 0.05,
        "stall_timeout": 0.05,
    } | settings
    return Door(
        application,
        settings=DoorSettings(**given),
        limits=Limits(name="tiny", has_chat=True, max_new_tokens=5),
        turnstile=Turnstile(max_queue),
        leases={},
        metrics=lambda: {"queue": {}},
    )


def ask(door: Door, method: str = "POST", path: str = PATH, **how: Any) -> Reply:
    return asyncio.run(call(door, method, path, **how))


def assert_empty(door: Door) -> None:
    assert (door.turnstile.num_inside, door.turnstile.is_busy, door.leases, door.num_reading) == (0, False, {}, 0)


@pytest.mark.parametrize(
    "path",
    [
        "/load_model",
        "/reset",
        "/v1/systemone",
        "/v1/audio/transcriptions",
        "/docs",
        "/openapi.json",
        "/",
        "/v1/completions/",
        "//v1/completions",
        "/V1/completions",
        "*",
    ],
)
def test_paths_that_transformers_offers_and_we_do_not_are_not_found(path: str):
    for method in ("GET", "POST", "OPTIONS"):
        reply = ask(door_with(), method, path)
        assert (reply.status, reply.code) == (404, "not_found")
        assert "/v1/chat/completions" in reply.json["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", PATH), ("POST", "/health"), ("DELETE", "/v1/models"), ("HEAD", PATH), ("OPTIONS", PATH), ("X" * 500, PATH)]
)
def test_another_method_is_refused_with_the_right_one(method: str, path: str):
    reply = ask(door_with(), method, path)
    assert (reply.status, reply.headers["allow"]) == (405, "POST" if path == PATH else "GET, HEAD")


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_whoever_only_looks_whether_the_server_is_there_is_answered(path: str):
    assert ask(door_with(), "HEAD", path).status == 200


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong-token", "Bearer secret-toke", "Bearer secret-token2", "Basic secret-token", "secret-token", "\xff"],
)
def test_a_wrong_token_is_refused_before_anything_is_said(authorization: str | None):
    headers = [("host", "evil.example"), JSON, *([] if authorization is None else [("authorization", authorization)])]
    for method, path in (("POST", PATH), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/nowhere")):
        reply = ask(door_with(token=b"secret-token"), method, path, headers=headers, body=b'{"prompt": "one"}')
        assert (reply.status, reply.code, reply.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
        assert b"secret" not in reply.body


def test_the_right_token_lets_in_from_any_host_and_twice_is_not_once():
    headers = [("host", "me.example"), JSON, ("authorization", "bearer secret-token")]
    assert ask(door_with(token=b"secret-token"), headers=headers, body=b'{"prompt": "one"}').status == 200
    assert ask(door_with(token=b"secret-token"), headers=[*headers, headers[-1]], body=b"{}").status == 401


def test_health_needs_no_token():
    assert ask(door_with(token=b"secret-token"), "GET", "/health", headers=[]).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8000", 200),
        ("LOCALHOST:1", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("", 403),
        ("[::1]:80", 403),
    ],
)
def test_without_a_token_only_names_of_this_machine_are_answered(host: str, status: int):
    assert ask(door_with(), headers=[("host", host), JSON], body=b'{"prompt": "one"}').status == status


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp", None])
def test_a_page_of_the_web_cannot_post_a_form(kind: str | None):
    headers = [("host", "localhost"), *([] if kind is None else [("content-type", kind)])]
    assert (reply := ask(door_with(), headers=headers, body=b'{"prompt": "one"}')).status == 415
    assert reply.code == "not_json"


def test_a_body_above_the_limit_is_refused_and_read_to_its_end():
    door = door_with()
    assert ask(door, body=b'{"prompt": "' + b"x" * 986 + b'"}').status == 200
    reply = ask(door, body=b'{"prompt": "' + b"x" * 987 + b'"}')
    assert (reply.status, reply.code) == (413, "body_too_large")
    assert "1,000 bytes" in reply.json["error"]["message"]
    assert_empty(door)


def test_a_body_that_announces_too_much_is_not_read_first():
    headers = [("host", "localhost"), JSON, ("content-length", "1001")]
    assert ask(door_with(), headers=headers, body=b"{}").status == 413
    assert ask(door_with(), headers=[*headers[:2], ("content-length", "9" * 5000)], body=b"{}").status == 413


def test_a_body_that_does_not_arrive_is_not_waited_for():
    door = door_with()
    reply = ask(door, body=b'{"prompt"', unfinished=True, leave_after=0.3)
    assert (reply.status, reply.code) == (408, "body_too_slow")
    assert_empty(door)


def test_who_leaves_while_sending_is_forgotten():
    door = door_with(body_timeout=5.0)
    assert ask(door, body=b'{"prompt"', unfinished=True, leave_after=0.01).status == 0
    assert door.statuses == {499: 1}
    assert_empty(door)


def test_malformed_json_is_refused_in_the_form_of_openai():
    reply = ask(door_with(), body=b'{"prompt": ')
    assert reply.status == 400
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert (reply.code, reply.json["error"]["type"]) == ("malformed_json", "invalid_request_error")


def test_the_application_sees_no_header_of_the_client_and_a_name_of_ours():
    reply = ask(
        door_with(), headers=[("host", "localhost"), JSON, ("x-request-id", "mine"), ("x-evil", "1")], body=b'{"prompt": "one", "user": "me"}'
    )
    assert reply.json == {"model": "tiny", "prompt": "one", "max_tokens": 5, "stream": False}
    assert reply.headers["x-request-id"].startswith("cmpl-")
    assert "x-evil" not in reply.headers
    assert reply.headers["cache-control"] == "no-store"


def test_the_model_and_the_numbers_can_be_asked_for():
    door = door_with()
    assert ask(door, "GET", "/v1/models/tiny").json["id"] == "tiny"
    assert ask(door, "GET", "/v1/models/other").status == 404
    assert ask(door, "GET", "/metrics").json == {"queue": {}, "answers": {"200": 1, "404": 1}}


def with_door(door: Door, scenario: Callable[[Door], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(_ran(door, scenario), 5))


async def _ran(door: Door, scenario: Callable[[Door], Awaitable[None]]) -> None:
    await scenario(door)
    assert_empty(door)


def slow(started: list[Any], release: asyncio.Event) -> Any:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        started.append(scope)
        await release.wait()
        await echo(scope, receive, send)

    return application


def test_more_requests_than_places_get_429_and_one_at_a_time_runs():
    started: list[Any] = []
    release = asyncio.Event()

    async def scenario(door: Door) -> None:
        tasks = [asyncio.create_task(post(door, PATH, BODY)) for _ in range(5)]
        await asyncio.sleep(0.02)
        assert len(started) == 1
        assert sum(task.done() for task in tasks) == 2
        release.set()
        replies = await asyncio.gather(*tasks)
        assert sorted(reply.status for reply in replies) == [200, 200, 200, 429, 429]
        refused = replies[-1]
        assert (refused.code, int(refused.headers["retry-after"]) >= 1) == ("queue_full", True)

    with_door(door_with(slow(started, release), max_queue=2), scenario)


def test_who_leaves_while_waiting_or_being_answered_makes_room_at_once():
    started: list[Any] = []

    async def scenario(door: Door) -> None:
        tasks = [asyncio.create_task(post(door, PATH, BODY, leave_after=0.01 * (5 - index))) for index in range(4)]
        replies = await asyncio.gather(*tasks)
        assert [reply.status for reply in replies] == [0] * 4
        assert len(started) == 1
        assert door.statuses == {499: 4}

    with_door(door_with(slow(started, asyncio.Event())), scenario)


def test_who_does_not_read_the_answer_is_not_waited_for():
    async def scenario(door: Door) -> None:
        assert (await post(door, PATH, BODY, stalled=True)).chunks == []
        assert (await post(door, PATH, BODY)).complete

    with_door(door_with(), scenario)


def test_a_failure_inside_is_told_without_its_text(caplog: pytest.LogCaptureFixture):
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("the secret of the house")

    async def scenario(door: Door) -> None:
        reply = await post(door, PATH, BODY)
        assert (reply.status, reply.code, reply.json["error"]["type"]) == (500, "internal_error", "server_error")
        assert b"secret" not in reply.body

    with_door(door_with(broken), scenario)
    assert "the secret of the house" in caplog.text


def test_a_websocket_is_closed():
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(door_with()({"type": "websocket"}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]
