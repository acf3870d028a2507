"""The application of transformers with one local model: its handlers, with what they leave open closed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import get_response_template

from partwise.serve._http_generation import FAILED, OneManager, cut_at
from partwise.serve._http_refusal import Refusal

if TYPE_CHECKING:
    from partwise.serve._http_generation import BoundedGenerateManager

__all__ = ["build_application", "quiet_handlers"]

# What a model's own generation config may decide. The rest stays out: other caches, several answers, drafts, guidance that runs the model a second time.
_OWN = (
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
)  # fmt: skip


@dataclass(frozen=True)
class Face:
    """What the handlers look at of a model; the generating thread has the model itself.

    Parameters
    ----------
    device : torch.device
        Where it runs.
    generation_config : GenerationConfig
        Its own.
    config : Any
        With a ``model_type``, by which handlers choose how to read reasoning and tool calls out of an answer.
    """

    device: Any
    generation_config: Any
    config: Any


def face_of(model: Any, tokenizer: Any) -> Face:
    """The face of a model; without a type where the reading for that type does not fit the chat template, since it would repeat the prompt in the answer."""
    reading = get_response_template(tokenizer, model)
    anchors = [] if reading is None else reading.get("start_anchor", [])
    asked = [{"role": "user", "content": "x"}]
    try:
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError):  # no template, or one that wants other messages
        prompt = ""
    fits = any(anchor in prompt for anchor in ([anchors] if isinstance(anchors, str) else anchors))
    return Face(model.device, model.generation_config, SimpleNamespace(model_type=model.config.model_type if fits else ""))


class OneModel(ModelManager):
    """Serves a model that is loaded already, and loads no other.

    Parameters
    ----------
    name : str
        What requests call it.
    model, tokenizer
        Of transformers.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(device="cpu")
        self.name, self.face, self.tokenizer = name, face_of(model, tokenizer), tokenizer

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The model, whatever was asked for."""
        return self.face, self.tokenizer

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one entry of /v1/models."""
        return [{"id": self.name, "object": "model", "created": 0, "owned_by": "partwise"}]


class _Closed:
    """What our handlers have in common; goes before a handler of transformers."""

    model_manager: OneModel
    generation_state: OneManager

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except TemplateError as error:
            text = f"the model's chat template refuses the messages: {error}. Check the order of the roles."
            raise Refusal(400, "messages_refused", text) from None

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return self.model_manager.name, self.model_manager.face, self.model_manager.tokenizer

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        own = {name: value for name in _OWN if (value := getattr(model_generation_config, name, None)) is not None}
        config = super()._build_generation_config(body, GenerationConfig(**own), use_cb=use_cb)  # type: ignore[misc]
        if body.get("temperature") is not None or body.get("top_p") is not None:
            config.do_sample = body.get("temperature") != 0
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        if config.pad_token_id is None:
            config.pad_token_id = next(iter(end if isinstance(end := config.eos_token_id, list) else [end]), None)
        return config


class _Events:
    """Streams whose last event says so, and whose errors have OpenAI's form."""

    def _streaming(self, *args: Any, **named: Any) -> Any:
        response = super()._streaming(*args, **named)  # type: ignore[misc]
        response.body_iterator = self._finished(response.body_iterator)
        return response

    async def _finished(self, events: Any) -> AsyncIterator[str]:
        """The events with errors in OpenAI's form, and the mark of the end."""
        async with contextlib.aclosing(events):
            async for event in events:
                before, failed, _ = event.partition(f'data: {{"error": "{FAILED.code}"}}')
                yield before + FAILED.event() if failed else event
        yield "data: [DONE]\n\n"


class BoundedChat(_Events, _Closed, ChatCompletionHandler):
    """/v1/chat/completions."""

    def _build_completion(self, request_id: str, content: str, *args: Any, **named: Any) -> dict[str, Any]:
        stop = self.generation_state.manager.leases[request_id].accepted.stop
        completion: dict[str, Any] = super()._build_completion(request_id, cut_at(content or "", stop), *args, **named)
        return completion


class BoundedCompletion(_Events, _Closed, CompletionHandler):
    """/v1/completions."""


class BoundedResponse(_Closed, ResponseHandler):
    """/v1/responses."""


def build_application(name: str, model: Any, tokenizer: Any, manager: BoundedGenerateManager) -> Any:
    """The application of transformers around one model; paths that it offers and we do not are refused before it."""
    models, state = OneModel(name, model, tokenizer), OneManager(manager)
    application = build_server(
        models,
        BoundedChat(models, state),
        completion_handler=BoundedCompletion(models, state),
        response_handler=BoundedResponse(models, state),
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
        enable_cors=False,
    )

    async def refused(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):
            error = Refusal(error.status_code, "refused", str(error.detail))
        elif isinstance(error, RequestValidationError):
            error = Refusal(400, "refused", "got a body of another form than expected. Send one JSON object.")
        refusal = error if isinstance(error, Refusal) else FAILED
        return JSONResponse(refusal.content(), status_code=refusal.status, headers=refusal.headers)

    for kind in (Refusal, HTTPException, RequestValidationError, Exception):
        application.add_exception_handler(kind, refused)
    return application


@contextlib.contextmanager
def quiet_handlers() -> Iterator[None]:
    """Keep the handlers' line per request, and generate's notes, off the log while the server runs."""
    loggers = {
        name: logging.getLogger(name) for name in ("transformers.cli.serving", "transformers.generation", "transformers.tokenization_utils_base")
    }
    levels = {name: log.level for name, log in loggers.items()}
    for log in loggers.values():
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, log in loggers.items():
            log.setLevel(levels[name])
