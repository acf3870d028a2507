"""What a request may ask: an allow-list, in which every field has its type and its range."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partwise.serve._http_refusal import Refusal
from partwise.serve._http_requests import Limits, parse_object, read_request

LIMITS = Limits(name="tiny", has_chat=True, max_new_tokens=50)
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
COMPLETION, CHAT, RESPONSES = PATHS
HELLO = [{"role": "user", "content": "hello"}]


def refusal_of(path: str, body: dict[str, Any]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_request(path, body, LIMITS)
    return caught.value


def test_a_request_is_rebuilt_from_what_was_checked():
    body = {
        "model": "tiny",
        "prompt": "one",
        "max_tokens": 7,
        "temperature": 1,
        "top_p": 0.5,
        "seed": 3,
        "stop": "x",
        "stream": True,
        "user": "me",
        "n": 1,
    }
    accepted = read_request(COMPLETION, body, LIMITS)
    assert accepted.body == {"model": "tiny", "prompt": "one", "max_tokens": 7, "stream": True, "temperature": 1.0, "top_p": 0.5}
    assert (accepted.stop, accepted.seed, accepted.stream) == (("x",), 3, True)


@pytest.mark.parametrize(("asked", "granted"), [(None, 50), (1, 1), (50, 50), (51, 50), (10**30, 50)])
def test_an_answer_is_as_long_as_asked_and_never_longer_than_granted(asked: int | None, granted: int):
    assert read_request(COMPLETION, {"prompt": "one", "max_tokens": asked}, LIMITS).body["max_tokens"] == granted
    assert read_request(CHAT, {"messages": HELLO, "max_completion_tokens": asked}, LIMITS).body["max_tokens"] == granted
    assert read_request(RESPONSES, {"input": "one", "max_output_tokens": asked}, LIMITS).body["max_output_tokens"] == granted


def test_the_smaller_of_two_lengths_counts():
    assert read_request(CHAT, {"messages": HELLO, "max_completion_tokens": 9, "max_tokens": 4}, LIMITS).body["max_tokens"] == 4


BAD_VALUES = [
    ("max_tokens", value) for value in (0, -1, 1.5, "5", True, [], {}, -(10**30))
] + [
    ("temperature", value) for value in (-1, 2.5, "hot", True, 1e-30, 10**400, [1])
] + [
    ("top_p", value) for value in (0, -0.1, 1.1, "1", False)
] + [
    ("seed", value) for value in (1.5, "1", 2**63, -(2**63) - 1, True)
] + [
    ("stop", value) for value in ("", [""], ["a"] * 5, "x" * 65, 7, [["a"]], {"a": 1}, [None])
] + [
    ("stream", value) for value in (1, "true", [])
] + [
    ("stream_options", value) for value in (True, {"other": True}, {"include_usage": 1})
] + [
    ("prompt", value) for value in (7, ["a", "b"], [1, 2], {"a": 1}, [[1]], [])
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_value_of_another_type_or_range_is_named(name: str, value: Any):
    refusal = refusal_of(COMPLETION, {"prompt": "one", name: value})
    assert (refusal.status, refusal.code) == (400, "bad_value")
    assert name in str(refusal)
    assert "expected" in str(refusal)


@pytest.mark.parametrize(
    "name", ["generation_config", "chat_template_kwargs", "chat_template", "cache", "cache_implementation", "", "x" * 10_000]
)
def test_a_field_outside_the_list_is_refused_with_the_list(name: str):
    refusal = refusal_of(CHAT, {"messages": HELLO, name: "{}"})
    assert (refusal.status, refusal.code) == (400, "unknown_field")
    assert "Known: max_completion_tokens" in str(refusal)
    assert len(str(refusal)) < 600


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("best_of", 3),
        ("echo", True),
        ("logprobs", 5),
        ("frequency_penalty", 1.5),
        ("logit_bias", {"5": 1}),
        ("tools", [{}]),
        ("suffix", "x"),
    ],
)
def test_what_would_be_ignored_is_refused(name: str, value: Any):
    assert refusal_of(CHAT, {"messages": HELLO, name: value}).code == "unsupported_value"


@pytest.mark.parametrize(
    ("name", "value"), [("n", 1), ("echo", False), ("frequency_penalty", 0.0), ("logit_bias", {}), ("tools", []), ("stop", None)]
)
def test_a_field_with_the_value_that_changes_nothing_is_let_pass(name: str, value: Any):
    assert set(read_request(CHAT, {"messages": HELLO, name: value}, LIMITS).body) == {"model", "messages", "max_tokens", "stream"}


@pytest.mark.parametrize(
    "messages",
    [
        [], "hello", [7], [{}], [{"role": "user"}], [{"role": "tool", "content": "x"}], [{"role": "user", "content": None}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}], [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": "x", "tool_calls": []}], [{"role": "user", "content": "x"}] * 1025, [{"role": "user", "content": [7]}],
    ],
)  # fmt: skip
def test_messages_of_another_form_are_refused(messages: Any):
    refusal = refusal_of(CHAT, {"messages": messages})
    assert (refusal.status, refusal.code) == (400, "bad_value")
    assert "messages" in str(refusal)


def test_parts_of_text_become_one_text_and_developers_are_the_system():
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    accepted = read_request(CHAT, {"messages": [{"role": "developer", "content": "be kind"}, {"role": "user", "content": content}]}, LIMITS)
    assert accepted.body["messages"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "one\ntwo"}]


def test_another_model_is_not_found_and_a_missing_prompt_is_named():
    assert (refusal_of(COMPLETION, {"model": "gpt-5", "prompt": "x"}).status, refusal_of(COMPLETION, {"model": 5, "prompt": "x"}).status) == (
        404,
        404,
    )
    assert [refusal_of(path, {"model": "tiny"}).code for path in PATHS] == ["missing_field"] * 3


def test_chat_without_a_template_says_what_to_do():
    with pytest.raises(Refusal, match=r"no chat template.*Use /v1/completions, or start the server with --chat-template FILE\."):
        read_request(CHAT, {"messages": HELLO}, Limits(name="tiny", has_chat=False, max_new_tokens=5))


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[1]", b"5", b'"x"', b"null", b"{'a': 1}", b'{"a": NaN}', b'{"a": Infinity}', b'\xff\xfe{"a": 1}', b'{"a": "\\ud800"}', b'{"\\udfff": 1}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' * 40 + b"1" + b"}" * 40, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1} x', b"\x00", b'{"a": "\x01"}',
    ],
    ids=lambda raw: repr(raw[:20]),
)  # fmt: skip
def test_a_body_that_is_no_plain_object_is_refused(raw: bytes):
    with pytest.raises(Refusal) as caught:
        parse_object(raw)
    assert (caught.value.status, caught.value.code) == (400, "malformed_json")
    assert "sys." not in str(caught.value.content())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        "model",
        "prompt",
        "messages",
        "input",
        "instructions",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream",
        "n",
        "tools",
        "logit_bias",
        "zzz",
    ]
)


@given(st.sampled_from(PATHS), st.dictionaries(NAMES, JSON, max_size=6))
def test_any_object_is_accepted_or_refused_and_nothing_else_happens(path: str, body: dict[str, Any]):
    try:
        accepted = read_request(path, parse_object(json.dumps(body).encode("utf-8", "surrogatepass")), LIMITS)
    except Refusal as refusal:
        assert refusal.status in {400, 404}
        assert json.dumps(refusal.content())
    else:
        assert accepted.body["model"] == "tiny"
        assert 1 <= accepted.body.get("max_tokens", accepted.body.get("max_output_tokens")) <= 50
