"""The server as OpenAI's own client sees it, and what is left when everybody has gone."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra http")
openai = pytest.importorskip("openai", reason="the server is tested with OpenAI's client")

from asgi_client import call, post
from partwise.checks import InputError, RunError
from partwise.serve._http_generation import BoundedGenerateManager
from partwise.serve._http_parts import Parts, RunningServer, assemble
from partwise.serve._http_refusal import Refusal
from partwise.serve.caches import ScissorhandsCache
from partwise.serve.http_server import HttpFlags, start_in_thread
from partwise.serve.scissorhands import Scissorhands
from tiny_server import CHAT_TEMPLATE, NAME, calm, letter_tokenizer, tiny_llama

COMPLETION, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
PROMPT = "def main():\n    return "


def flags(**changes: Any) -> HttpFlags:
    return HttpFlags(**{"name": NAME, "port": 0, "budget": 64, "memory_limit_mib": 4.0, "max_prompt_tokens": 200, "max_new_tokens": 40} | changes)


def parts_of(model: Any = None, *, chat: bool = True, **changes: Any) -> Parts:
    rule = Scissorhands()
    return assemble(flags(**changes), model or tiny_llama(), letter_tokenizer(chat=chat), rule, name=NAME)


def in_process(scenario: Any, parts: Parts) -> Any:
    """Run a scenario with a server that does not listen; afterwards nothing but conversations may be left."""

    async def whole() -> Any:
        result = await asyncio.wait_for(scenario(parts.door), 60)
        await calm(parts)
        return result

    try:
        result = asyncio.run(whole())
    finally:
        parts.manager.stop()
    memory = parts.memory
    assert (memory.reserved, parts.manager.leases) == (0, {})
    assert memory.used == memory.stored == sum(one.cache.nbytes + one.tokens.nbytes for one in memory.conversations) <= memory.limit
    return result


def expected_text(model: Any, prompt: str, num_new: int) -> str:
    tokenizer = letter_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, max_new_tokens=num_new, do_sample=False)[0, ids.shape[1] :])


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with start_in_thread(flags(), model=tiny_llama(), tokenizer=letter_tokenizer(), rule=Scissorhands()) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=30) as opened:
        yield opened


def test_an_answer_within_the_budget_is_that_of_plain_generate(client: Any):
    reply = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20)
    assert reply.choices[0].text == expected_text(tiny_llama(), PROMPT, 20)
    assert (reply.choices[0].finish_reason, reply.usage.prompt_tokens, reply.usage.completion_tokens) == ("length", len(PROMPT), 20)


def test_a_stream_says_the_same_in_pieces(client: Any):
    whole = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20).choices[0].text
    pieces = list(client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole
    assert (pieces[-1].choices[0].finish_reason, pieces[-1].usage.completion_tokens) == ("length", 20)


def test_chat_and_responses_answer_what_the_template_makes_of_the_messages(client: Any):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    text = expected_text(tiny_llama(), "<system>be kind\n<user>hello\n<assistant>", 9)
    assert client.chat.completions.create(model=NAME, messages=messages, max_tokens=9).choices[0].message.content == text
    assert client.responses.create(model=NAME, input="hello", instructions="be kind", max_output_tokens=9).output_text == text
    pieces = client.chat.completions.create(model=NAME, messages=messages, max_tokens=9, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    events = list(client.responses.create(model=NAME, input="hello", instructions="be kind", max_output_tokens=9, stream=True))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert events[-1].response.output_text == text


def test_an_answer_ends_before_its_stop(client: Any):
    whole = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20).choices[0].text
    stop = whole[8:10]
    reply = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20, stop=["never this", stop])
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")
    assert reply.usage.completion_tokens < 20
    pieces = list(client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20, stop=stop, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_a_temperature_samples_and_a_seed_repeats_it(client: Any):
    def text(**how: Any) -> str:
        return client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20, **how).choices[0].text

    assert text(temperature=1, seed=1) == text(temperature=1, seed=1) != text(temperature=1, seed=2)
    assert text(temperature=0) == text() != text(temperature=1, seed=1)
    assert text(top_p=0.9, seed=1) != text()


def test_a_prompt_longer_than_the_model_reads_is_not_told_to_raise_the_limit():
    limits = types.SimpleNamespace(max_prompt_tokens=99, context=100)
    with pytest.raises(Refusal) as caught:
        BoundedGenerateManager._check_length(limits, 100)
    assert caught.value.content()["error"]["message"] == "the prompt has 100 tokens, expected at most 99: the model knows 100 positions. Shorten it."


def test_errors_arrive_as_the_clients_own_exceptions(client: Any):
    with pytest.raises(openai.BadRequestError, match=r"the prompt has 201 tokens, expected at most 200\..*--max-prompt-tokens") as caught:
        client.completions.create(model=NAME, prompt="x" * 201)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match=r"expected 'tiny'"):
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.BadRequestError, match="at least one"):
        client.completions.create(model=NAME, prompt="")
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model=NAME, prompt="x" * 3_000_000)
    assert large.value.status_code == 413
    assert [model.id for model in client.models.list()] == [NAME]


def test_a_client_that_closes_its_connection_in_mid_stream_stops_the_generation(server: RunningServer, client: Any):
    before = server.parts.manager.num_tokens
    stream = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=40, stream=True)
    next(iter(stream))
    stream.close()
    asyncio.run(calm(server.parts))
    assert server.parts.manager.num_tokens - before < 40
    assert server.parts.memory.reserved == 0


def test_a_connection_that_breaks_off_leaves_nothing(server: RunningServer):
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 40}).encode()
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for sent in (head[:30], head, head + body[:10], head + body, b"\x16\x03\x01 no http at all\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(sent)
    time.sleep(0.05)
    asyncio.run(calm(server.parts))
    assert (server.parts.memory.reserved, server.parts.door.num_reading) == (0, 0)


@pytest.mark.parametrize("path", [COMPLETION, CHAT, RESPONSES])
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_while_generating_is_told_in_the_form_of_openai(path: str, stream: bool, monkeypatch: pytest.MonkeyPatch):
    parts = parts_of()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError('a "quoted"\n reason')

    monkeypatch.setattr(parts.manager, "_generate", broken)
    content = {COMPLETION: {"prompt": "x"}, CHAT: {"messages": [{"role": "user", "content": "x"}]}, RESPONSES: {"input": "x"}}[path]
    reply = in_process(lambda door: post(door, path, content | {"stream": stream}), parts)
    assert reply.complete
    assert b"quoted" not in reply.body
    assert b"generation_failed" in reply.body
    if not stream:
        assert (reply.status, reply.code) == (500, "generation_failed")
    elif path != RESPONSES:
        assert [event["error"]["code"] for event in reply.events if "error" in event] == ["generation_failed"]


def test_the_next_turn_goes_on_with_the_cache_of_the_last_one():
    model, parts = tiny_llama(), parts_of()

    async def scenario(door: Any) -> list[Any]:
        first = await post(door, COMPLETION, {"prompt": "one two", "max_tokens": 6})
        text = "one two" + first.json["choices"][0]["text"] + " three"
        return [text, (await post(door, COMPLETION, {"prompt": text, "max_tokens": 6})).json["choices"][0]["text"]]

    longer, answer = in_process(scenario, parts)
    assert parts.manager.num_reused == len("one two") + 5  # the last token of an answer is not fed to the model
    assert answer == expected_text(model, longer, 6)
    assert len(parts.memory.conversations) == 1


@pytest.mark.parametrize("bits", [None, 4])
def test_two_turns_beyond_the_budget_are_those_of_generate_with_one_cache(bits: Any):
    model, prompt = tiny_llama(head_dim=32), "def main of many words here " * 4
    cache, text, expected = ScissorhandsCache(model, budget=64, bits=bits), prompt, []
    tokenizer = letter_tokenizer()
    for _ in range(2):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected.append(tokenizer.decode(model.generate(ids, cache=cache, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]))
        text += expected[-1] + " and on it goes"
    assert cache.report().evictions > 0
    parts = parts_of(tiny_llama(head_dim=32), bits=bits)

    async def scenario(door: Any) -> list[str]:
        said, text = [], prompt
        for _ in range(2):
            said.append((await post(door, COMPLETION, {"prompt": text, "max_tokens": 12})).json["choices"][0]["text"])
            text += said[-1] + " and on it goes"
        return said

    assert in_process(scenario, parts) == expected
    assert parts.manager.num_reused == len(prompt) + 11


def test_conversations_leave_when_memory_is_short_or_they_are_idle():
    parts = parts_of()
    need = parts.manager.caches.bound(parts.manager.sample, num_prompt=200, num_new=40)
    short = parts_of(memory_limit_mib=need / 2**20)
    in_process(lambda door: asyncio.gather(*(post(door, COMPLETION, {"prompt": letter * 60, "max_tokens": 3}) for letter in "abcdefgh")), short)
    assert short.memory.num_forgotten > 0
    assert len(short.memory.conversations) > 0
    idle = parts_of(conversation_idle_s=0.05)

    async def scenario(door: Any) -> None:
        await post(door, COMPLETION, {"prompt": "one", "max_tokens": 3})
        assert len(idle.memory.conversations) == 1
        await asyncio.sleep(0.2)
        assert idle.memory.conversations == []

    in_process(scenario, idle)


def test_any_mix_of_failures_cancellations_and_disconnects_gives_everything_back(monkeypatch: pytest.MonkeyPatch):
    parts, draw = parts_of(max_queue=5, memory_limit_mib=0.5), random.Random(0)
    generate = parts.manager._generate

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        if draw.random() < 0.2:
            raise RuntimeError("on purpose")
        return generate(*args, **kwargs)

    monkeypatch.setattr(parts.manager, "_generate", sometimes)

    async def one(door: Any) -> int:
        await asyncio.sleep(draw.random() * 0.5)
        how = draw.choice([{}, {"leave_after": draw.random() * 0.1}, {"leave_after_chunks": draw.randint(1, 4)}])
        body = {"prompt": draw.choice("abc") * draw.choice([1, 20, 150, 250]), "max_tokens": draw.randint(1, 30), "stream": draw.random() < 0.5}
        return (await post(door, COMPLETION, body, **how)).status

    async def scenario(door: Any) -> list[int]:
        return await asyncio.gather(*(one(door) for _ in range(120)))

    statuses = in_process(scenario, parts)
    assert set(statuses) == {0, 200, 400, 429, 500}


def test_the_flags_load_nothing_heavy():
    code = (
        "import sys, partwise.serve.http_server as http; http.HttpFlags(); print({'torch', 'transformers', 'fastapi', 'openai'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def test_nothing_of_the_model_is_changed_when_the_server_has_ended():
    model, threads = tiny_llama(), threading.active_count()
    before = model.config._attn_implementation
    with start_in_thread(flags(), model=model, tokenizer=letter_tokenizer(), rule=Scissorhands()) as running:
        openai.OpenAI(base_url=running.url, api_key="none").completions.create(model=NAME, prompt="x", max_tokens=2)
        assert model.config._attn_implementation != before
    assert (model.config._attn_implementation, threading.active_count()) == (before, threads)


def test_a_server_that_ends_breaks_off_its_answers_and_refuses_who_waits():
    model, threads = tiny_llama(), threading.active_count()
    outcomes: list[Any] = []

    def ask(client: Any, **how: Any) -> None:
        try:
            outcomes.append(client.completions.create(model=NAME, prompt=PROMPT, **how))
        except openai.APIError as error:
            outcomes.append(error)

    with start_in_thread(flags(max_new_tokens=200), model=model, tokenizer=letter_tokenizer(), rule=Scissorhands()) as running:
        client = openai.OpenAI(base_url=running.url, api_key="none", max_retries=0)
        stream = client.completions.create(model=NAME, prompt=PROMPT, stream=True)
        next(iter(stream))
        waiting = threading.Thread(target=ask, args=(client,))
        waiting.start()
        while running.parts.turnstile.num_inside < 2:
            time.sleep(0.001)
        started = time.monotonic()
    assert time.monotonic() - started < 2
    waiting.join()
    assert [getattr(outcome, "code", None) for outcome in outcomes] == ["shutting_down"]
    with pytest.raises(openai.APIConnectionError):
        list(stream)
    assert (running.parts.memory.reserved, threading.active_count()) == (0, threads)


def test_a_model_whose_own_settings_ask_for_more_answers_as_asked():
    model = tiny_llama()
    model.generation_config.update(
        num_beams=3,
        num_return_sequences=2,
        cache_implementation="static",
        max_length=9,
        return_dict_in_generate=True,
        do_sample=True,
        guidance_scale=2.0,
        prompt_lookup_num_tokens=3,
        max_time=1e-9,
    )
    reply = in_process(lambda door: post(door, COMPLETION, {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}), parts_of(model))
    assert reply.json["choices"][0]["text"] == expected_text(tiny_llama(), PROMPT, 12)


def test_an_answer_ends_where_the_positions_of_the_model_end():
    parts = parts_of(tiny_llama(positions=64), max_prompt_tokens=1000)
    replies = in_process(lambda door: asyncio.gather(*(post(door, COMPLETION, {"prompt": "x" * length}) for length in (50, 63, 64))), parts)
    assert [reply.status for reply in replies] == [200, 200, 400]
    assert [reply.json["usage"]["completion_tokens"] for reply in replies[:2]] == [14, 1]


def test_a_template_that_refuses_the_roles_is_a_mistake_of_the_request(tmp_path: Path):
    template = tmp_path / "template.jinja"
    template.write_text("{% if messages[0].role != 'user' %}{{ raise_exception('users first') }}{% endif %}" + CHAT_TEMPLATE)
    reply = in_process(lambda door: post(door, CHAT, {"messages": [{"role": "assistant", "content": "x"}]}), parts_of(chat_template=template))
    assert (reply.status, reply.code) == (400, "messages_refused")
    assert "users first" in reply.json["error"]["message"]


@pytest.mark.parametrize("anchor", ["<assistant>", "<|im_start|>assistant\n"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_a_model_that_transformers_reads_by_its_type_does_not_repeat_the_prompt(anchor: str, stream: bool):
    model, tokenizer = tiny_llama(), letter_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<assistant>", "{{ " + repr(anchor) + " }}")
    text = expected_text(model, f"<user>hello\n{anchor}", 9)
    model.config.model_type = "qwen2"
    parts = assemble(flags(), model, tokenizer, Scissorhands(), name=NAME)
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, "stream": stream}
    reply = in_process(lambda door: post(door, CHAT, body), parts)
    said = (
        "".join(event["choices"][0]["delta"].get("content", "") for event in reply.events[:-1])
        if stream
        else reply.json["choices"][0]["message"]["content"]
    )
    assert said == text


def test_what_cannot_be_served_is_refused_before_the_server_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for changes, pattern in (
        ({"memory_limit_mib": 0.01}, r"got a memory limit of 0\.01 MiB, expected at least 0\.\d MiB.*Raise --memory-limit-mib"),
        ({"host": "0.0.0.0"}, r"got the host 0\.0\.0\.0 without a token.*Pass --token"),
        ({"token": "short"}, r"got a token of 5 letters, expected at least 8 printable ASCII letters without spaces"),
        ({"token": "with space in it"}, "without spaces"),
        ({"chat_template": tmp_path / "none"}, r"--chat-template .*cannot be read"),
        ({"budget": 8}, "got a budget of 8 tokens"),
    ):
        with pytest.raises(InputError, match=pattern):
            parts_of(**changes)
    with pytest.raises(InputError, match=r"got a tokenizer of class object, expected a fast one\. Save it with its tokenizer\.json\."):
        assemble(flags(), tiny_llama(), object(), Scissorhands(), name=NAME)
    monkeypatch.setenv("PARTWISE_SERVE_TOKEN", "from-the-environment")
    parts = parts_of(host="0.0.0.0")
    assert in_process(lambda door: call(door, "GET", "/metrics"), parts).status == 401


@pytest.mark.parametrize(("name", "value"), [("budget", 0), ("max_queue", -1), ("memory_limit_mib", 0.0), ("conversation_idle_s", float("nan"))])
def test_settings_out_of_range_are_refused(name: str, value: float):
    with pytest.raises(InputError, match=f"{name}={value}"):
        flags(**{name: value})


def test_a_port_in_use_says_what_to_do(server: RunningServer):
    port = int(server.url.removesuffix("/v1").rpartition(":")[2])
    pattern = rf"cannot listen on 127\.0\.0\.1 port {port}.*Pass another --port, or 0 for any"
    again = start_in_thread(flags(port=port), model=tiny_llama(), tokenizer=letter_tokenizer(), rule=Scissorhands())
    with pytest.raises(RunError, match=pattern), again:
        pass


def test_the_seed_of_one_request_does_not_decide_what_others_draw():
    parts = parts_of()
    texts = []

    async def scenario(door: Any) -> None:
        for seed in (5, None, 5, None):
            reply = await post(door, COMPLETION, {"prompt": "x", "max_tokens": 30, "temperature": 1, "seed": seed})
            texts.append(reply.json["choices"][0]["text"])

    in_process(scenario, parts)
    assert texts[0] == texts[2]
    assert texts[1] != texts[3]
