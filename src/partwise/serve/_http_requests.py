"""Bodies of requests: what may be asked, and nothing else.

Every field is named here, with what it may hold; anything else is refused. So nothing that a client writes reaches ``generate`` or a chat template
unseen: no configuration of its own, no other cache, no huge number, no value of another type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from partwise.serve._http_refusal import Refusal

__all__ = ["Accepted", "Limits", "parse_object", "read_request"]

MAX_MESSAGES, MAX_STOPS, MAX_STOP_LETTERS, MAX_DEPTH = 1024, 4, 64, 32
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that clients send with the value that changes nothing; any other value would be ignored, so it is refused.
_ONLY_DEFAULT: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "tools": ([],), "modalities": (["text"],), "store": (False,), "service_tier": ("auto", "default"), "suffix": ("",),
    "truncation": ("disabled",), "background": (False,), "text": ({"format": {"type": "text"}},), "parallel_tool_calls": (True, False),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server grants to one request.

    Parameters
    ----------
    name : str
        The model, as requests have to call it.
    has_chat : bool
        Whether the model has a chat template.
    max_new_tokens : int
        Most tokens of an answer; requests that ask for more get as many.
    """

    name: str
    has_chat: bool
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A request that was understood.

    Parameters
    ----------
    body : dict
        What the handler gets: only fields that were checked.
    stop : tuple of str
        Texts that end the answer.
    seed : int or None
        Seed of the sampling.
    stream : bool
        Whether the answer comes in pieces.
    """

    body: dict[str, Any]
    stop: tuple[str, ...]
    seed: int | None
    stream: bool


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``; malformed, too deep or without a meaning in Unicode, it is refused."""
    try:
        body = json.loads(raw, parse_constant=_no_constant)
        json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair is valid in JSON and has no UTF-8
    except (ValueError, RecursionError) as error:
        problem = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        problem = "a number has too many digits" if "set_int_max_str_digits" in problem else problem
        raise bad("malformed_json", f"got a body that is no JSON ({problem}), expected one object in UTF-8. Check how it is written.") from None
    if not isinstance(body, dict):
        raise bad("malformed_json", f"got {_kind(body)} as the body, expected one object. Put the fields between braces.")
    if _depth(body) > MAX_DEPTH:
        raise bad("malformed_json", f"got a body nested deeper than {MAX_DEPTH} levels, expected a flat object. Send fewer levels.")
    return body


def read_request(path: str, body: dict[str, Any], limits: Limits) -> Accepted:
    """Check the fields of a request and keep those that mean something; fields that are null count as left out."""
    given = {name: value for name, value in body.items() if value is not None}
    fields = _FIELDS[path]
    for name, value in given.items():
        if name not in fields and name not in _SHARED:
            check_default(name, value, known=[*fields, *_SHARED])
    if given.get("model", limits.name) != limits.name:
        text = f"the model {_shown(given['model'])} is not served here, expected {limits.name!r}. Pass model={limits.name!r}."
        raise Refusal(404, "model_not_found", text)
    readers: dict[str, Reader] = {**_SHARED, **fields}
    checked = {name: reader(name, given[name]) for name, reader in readers.items() if name in given}
    if path != "/v1/completions" and not limits.has_chat:
        text = f"the model {limits.name!r} has no chat template, so there is no form for messages. Use /v1/completions, or start the server with"
        raise bad("no_chat_template", f"{text} --chat-template FILE.")
    content = _CONTENT[path]
    if content not in checked:
        raise bad("missing_field", f"got no {content!r}, expected what the model shall answer. Add the field.")
    asked: list[int] = [checked[name] for name in ("max_completion_tokens", "max_output_tokens", "max_tokens") if name in checked]
    kept: dict[str, Any] = {name: checked[name] for name in ("instructions", "temperature", "top_p") if name in checked}
    stream = checked.get("stream", False)
    count = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    inner: dict[str, Any] = {"model": limits.name, content: checked[content], count: min([*asked, limits.max_new_tokens]), "stream": stream, **kept}
    return Accepted(body=inner, stop=checked.get("stop", ()), seed=checked.get("seed"), stream=stream)


def check_default(name: str, value: Any, *, known: list[str]) -> None:
    """Refuse a field that is not known, and one that is known but would do nothing."""
    if name not in _ONLY_DEFAULT:
        raise bad("unknown_field", f"the field {_shown(name)} is not offered. Known: {', '.join(sorted(known))}. Leave it out.")
    if not any(value == default and isinstance(value, bool) == isinstance(default, bool) for default in _ONLY_DEFAULT[name]):
        allowed = " or ".join(json.dumps(default) for default in _ONLY_DEFAULT[name])
        raise bad("unsupported_value", f"got {name}={_shown(value)}, which is not offered here, expected {allowed}. Leave it out.")


def bad(code: str, message: str) -> Refusal:
    """A refusal for which the request is to blame."""
    return Refusal(400, code, message)


def read_count(name: str, value: Any) -> int:
    """An integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise bad("bad_value", f"got {name}={_shown(value)}, expected an integer of at least 1. Leave it out for as many as the server grants.")
    return value


def read_temperature(name: str, value: Any) -> float:
    """0 for the likeliest token, or a number that a softmax in half precision survives."""
    if not _is_number(value) or not (value == 0 or LOWEST_TEMPERATURE <= value <= HIGHEST_TEMPERATURE):
        expected = f"0 (always the likeliest token) or a number from {LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}"
        raise bad("bad_value", f"got {name}={_shown(value)}, expected {expected}. Pass 0 or 1.")
    return float(value)


def read_top_p(name: str, value: Any) -> float:
    """A share of the probability, above 0 and at most 1."""
    if not _is_number(value) or not 0 < value <= 1:
        raise bad("bad_value", f"got {name}={_shown(value)}, expected a number above 0 and at most 1. Pass 1 for all tokens.")
    return float(value)


def read_seed(name: str, value: Any) -> int:
    """A signed integer of 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise bad("bad_value", f"got {name}={_shown(value)}, expected an integer of 64 bits. Pass a smaller one.")
    return value


def read_flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise bad("bad_value", f"got {name}={_shown(value)}, expected true or false. Pass one of them.")
    return value


def read_text(name: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise bad("bad_value", f"got {name}={_shown(value)}, expected a text. Put it between quotation marks.")
    return value


def read_stop(name: str, value: Any) -> tuple[str, ...]:
    """One text or a few, none of them empty or long."""
    stops = value if isinstance(value, list) else [value]
    if len(stops) > MAX_STOPS or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LETTERS for stop in stops):
        expected = f"a text or up to {MAX_STOPS} texts of 1 to {MAX_STOP_LETTERS} letters"
        raise bad("bad_value", f"got {name}={_shown(value)}, expected {expected}. Shorten it.")
    return tuple(stops)


def read_prompt(name: str, value: Any) -> str:
    """One text, alone or in a list."""
    if isinstance(value, list) and len(value) == 1:
        return read_text(name, value[0])
    if isinstance(value, list):
        raise bad("bad_value", f"got {len(value)} entries in {name}, expected one text. Send one request for each; token numbers are not taken.")
    return read_text(name, value)


def read_stream_options(name: str, value: Any) -> dict[str, bool]:
    """Only whether the usage is wanted, which every stream ends with anyway."""
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(value, dict) or not set(value) <= known or not all(isinstance(item, bool) for item in value.values()):
        raise bad("bad_value", f"got {name}={_shown(value)}, expected an object with include_usage true or false. Leave it out.")
    return value


def read_messages(name: str, value: Any) -> list[dict[str, str]]:
    """Messages with a role and a text."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise bad("bad_value", f"got {_kind(value)} as {name}, expected a list of 1 to {MAX_MESSAGES} messages. Send the conversation as a list.")
    return [_message(f"{name}[{index}]", message) for index, message in enumerate(value)]


def read_input(name: str, value: Any) -> str | list[dict[str, str]]:
    """What /v1/responses calls its prompt: a text, or messages."""
    return value if isinstance(value, str) else read_messages(name, value)


def _message(name: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or not set(message) <= {"role", "content", "name", "type"}:
        keys = sorted(map(_shown, message)) if isinstance(message, dict) else _kind(message)
        raise bad("bad_value", f"got {keys} as {name}, expected an object with a role and a content. Tool calls are not offered.")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad("bad_value", f"got {name}.role={_shown(role)}, expected one of {', '.join(_ROLES)}. Tools are not offered.")
    if message.get("type", "message") != "message" or not isinstance(message.get("name", ""), str):
        raise bad("bad_value", f"got a type or a name in {name} that is not offered, expected a message. Leave both out.")
    return {"role": _ROLES[role], "content": _text_of(f"{name}.content", message.get("content"))}


def _text_of(name: str, content: Any) -> str:
    parts = content if isinstance(content, list) and content else [{"type": "text", "text": content}]
    for part in parts:
        kinds = {"text", "input_text", "output_text"}
        is_text = isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text"), str)
        if not is_text or not set(part) <= {"type", "text", "annotations", "logprobs"}:
            raise bad(
                "bad_value", f"got {name}={_shown(content)}, expected a text, or a list of parts of type text. Images and sound are not offered."
            )
    return "\n".join(part["text"] for part in parts)


def _is_number(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _depth(value: Any) -> int:
    """Levels of lists and objects inside each other."""
    level, depth = [value], 0
    while level:
        level = [item for part in level for item in (part.values() if isinstance(part, dict) else part if isinstance(part, list) else ())]
        depth += 1
    return depth - 1


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}.get(type(value), "a number")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


Reader = Callable[[str, Any], Any]
_SHARED: dict[str, Reader] = {
    "model": read_text, "stream": read_flag, "stream_options": read_stream_options, "temperature": read_temperature, "top_p": read_top_p, "seed": read_seed,
    "user": read_text,
}  # fmt: skip
_FIELDS: dict[str, dict[str, Reader]] = {
    "/v1/completions": {"prompt": read_prompt, "max_tokens": read_count, "stop": read_stop},
    "/v1/chat/completions": {"messages": read_messages, "max_tokens": read_count, "max_completion_tokens": read_count, "stop": read_stop},
    "/v1/responses": {"input": read_input, "instructions": read_text, "max_output_tokens": read_count},
}
_CONTENT = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/responses": "input"}
