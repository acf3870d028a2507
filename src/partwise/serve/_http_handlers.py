"""The application of transformers with one local model: its handlers, with what they leave open closed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server

from partwise.serve._http_generation import FAILED, OneManager, cut_at
from partwise.serve._http_refusal import Refusal

if TYPE_CHECKING:
    from partwise.serve._http_generation import BoundedGenerateManager

__all__ = ["build_application", "quiet_handlers"]

# What a model's own generation config may say and a request must not depend on: other caches, several answers, drafts, other results than tokens.
_FORCED = {
    "use_cache": True, "cache_implementation": None, "cache_config": None, "num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None, "max_length": None, "min_length": 0, "return_dict_in_generate": False, "output_scores": False, "output_logits": False,
    "output_attentions": False, "output_hidden_states": False, "stop_strings": None, "max_time": None, "compile_config": None, "disable_compile": True,
}  # fmt: skip


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
        self.name, self.model, self.tokenizer = name, model, tokenizer

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The model, whatever was asked for."""
        return self.model, self.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
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
        return self.model_manager.name, self.model_manager.model, self.model_manager.tokenizer

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)  # type: ignore[misc]
        for name, value in _FORCED.items():
            setattr(config, name, value)
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
