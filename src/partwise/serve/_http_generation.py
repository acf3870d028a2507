"""The generating thread: `GenerateManager` of transformers, with a bounded cache, a reservation, a stop that works in mid-text, and one seed per request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, GenerationState, ReasoningText, _GenerationCancelled, _StreamError

from partwise.serve._http_memory import CacheMemory, Conversation
from partwise.serve._http_refusal import Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.serve._http_cache import CacheMaker
    from partwise.serve._http_queue import Lease, Turnstile

__all__ = ["AnswerStreamer", "BoundedGenerateManager", "OneManager", "StopText", "cut_at"]

logger = logging.getLogger(__name__)

FAILED = Refusal(
    500, "generation_failed", "got an error while generating, expected none. The server's log has it; try again, or tell who runs the server."
)


STOP_S = 5.0


class StopText:
    """Passes text on up to the first of some texts that end it, and holds back what may be the beginning of one.

    >>> stop = StopText(("END",))
    >>> [stop.feed("one E"), stop.feed("lse, EN"), stop.feed("D two"), stop.rest()]
    ['one ', 'Else, ', '', '']
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.found = False
        self._held = ""

    def feed(self, text: str) -> str:
        """What may be shown of the text so far and was not yet."""
        if self.found:
            return ""
        text = self._held + text
        shown = cut_at(text, self.stops)
        self.found = len(shown) < len(text)
        begun = 0 if self.found else max((self._begun(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - begun :]
        return shown[: len(text) - begun]

    def rest(self) -> str:
        """What was held back and turned out to be no stop."""
        return "" if self.found else self._held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """Letters at the end of ``text`` that ``stop`` begins with."""
        return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)


def cut_at(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first of ``stops``."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


class AnswerStreamer(DirectStreamer):
    """The streamer of transformers, which ends the answer before a text that stops it.

    Parameters
    ----------
    tokenizer, loop, queue, response_parser
        See `DirectStreamer`; without a queue nothing is handed on.
    stop : StopText
        Where to end.
    """

    def __init__(self, tokenizer: Any, loop: asyncio.AbstractEventLoop, queue: Any, *, response_parser: Any = None, stop: StopText) -> None:
        self.stop = stop
        super().__init__(tokenizer, loop, queue, response_parser=response_parser)

    def _enqueue(self, item: Any) -> None:
        if item is None and self.stop.rest():
            self._hand_on(self.stop.rest())
        if isinstance(item, str) and not isinstance(item, ReasoningText):
            item = self.stop.feed(item)
        if item != "":
            self._hand_on(item)

    def _hand_on(self, item: Any) -> None:
        if self._queue is not None:
            super()._enqueue(item)


class Halt(StoppingCriteria):
    """Ends the generation after the token at which nobody wants it any more."""

    def __init__(self, lease: Lease, stop: StopText) -> None:
        self.lease, self.stop = lease, stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether each row of ``input_ids`` (batch, tokens) is done: (batch,), bool."""
        return torch.full((len(input_ids),), self.lease.cancelled.is_set() or self.stop.found, dtype=torch.bool, device=input_ids.device)


class GeneratingThread:
    """One thread for all generation, as compiled graphs need it; unlike `InferenceThread` of transformers it ends, and no cancelled future can kill it."""

    def __init__(self) -> None:
        self._works: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="partwise-generate", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        """Do this after what was submitted before; it may not raise."""
        self._works.put(work)

    def stop(self) -> None:
        """End when everything is done, and wait for that."""
        self._works.put(None)
        self._thread.join(STOP_S)

    def _run(self) -> None:
        while (work := self._works.get()) is not None:
            work()
            del work  # it holds a cache, which may not live until the next request


class BoundedGenerateManager(GenerateManager):
    """Generates for one request at a time, each with a cache whose bytes were reserved before.

    Parameters
    ----------
    caches : CacheMaker
        Makes caches and knows beforehand what they may hold.
    memory : CacheMemory
        Where bytes are reserved and conversations kept.
    turnstile : Turnstile
        Is told when the turn of a request is over, which may be before its answer is read.
    max_prompt_tokens : int
        Longer prompts are refused.
    context : int
        Positions that the model knows; an answer ends there.
    """

    def __init__(self, *, caches: CacheMaker, memory: CacheMemory, turnstile: Turnstile, max_prompt_tokens: int, context: int) -> None:
        self.caches, self.memory, self.turnstile = caches, memory, turnstile
        self.sample = caches.new()  # of which bounds are asked; refuses a model that cannot have such a cache
        self._thread = GeneratingThread()
        self.max_prompt_tokens, self.context = min(max_prompt_tokens, context - 1), context
        self.leases: dict[str, Lease] = {}
        self.num_tokens, self.num_prompt_tokens, self.num_reused, self.seconds = 0, 0, 0, 0.0

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        """Begin, and return the queue that text goes to; see `GenerateManager`."""
        lease, pieces = self.leases[request_id], asyncio.Queue[Any]()
        loop, stop = asyncio.get_running_loop(), StopText(lease.accepted.stop)
        streamer = AnswerStreamer(processor._tokenizer, loop, pieces, response_parser=response_parser, stop=stop)

        def tell(result: Any) -> None:
            if isinstance(result, Refusal):
                pieces.put_nowait(_StreamError(result.code))
            elif result is None:
                pieces.put_nowait(None)

        self._begin(lease, inputs, gen_config, streamer, tell)
        return pieces, streamer

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str) -> tuple[str, int, Tensor]:
        """Text, number of prompt tokens and generated tokens (tokens,); see `GenerateManager`."""
        lease, loop = self.leases[request_id], asyncio.get_running_loop()
        # Not async_submit of transformers: where its future is cancelled, the generating thread meets an InvalidStateError.
        answer: asyncio.Future[Any] = loop.create_future()
        streamer = AnswerStreamer(processor._tokenizer, loop, None, stop=StopText(lease.accepted.stop))

        def tell(result: Any) -> None:
            if not answer.done():  # cancelled: nobody waits for it
                answer.set_result(result)

        self._begin(lease, inputs, gen_config, streamer, tell)
        result = await answer
        if isinstance(result, Refusal):
            raise result
        num_prompt = inputs["input_ids"].shape[-1]
        generated = result[0, num_prompt:]
        return cut_at(processor.decode(generated, skip_special_tokens=True), lease.accepted.stop), num_prompt, generated

    def stop(self) -> None:
        """End the generating thread."""
        self._thread.stop()

    def _begin(self, lease: Lease, inputs: Any, config: Any, streamer: AnswerStreamer, tell: Callable[[Any], None]) -> None:
        """Reserve, generate on the other thread, and on this one give everything back, keep the conversation, and tell the result."""
        ids, loop = inputs["input_ids"], asyncio.get_running_loop()
        num_prompt = ids.shape[-1]
        self._check_length(num_prompt)
        config.max_new_tokens = min(config.max_new_tokens, self.context - num_prompt)
        found = self.memory.take(ids[0].cpu())
        num_bytes = self.caches.bound(self.sample, num_prompt=num_prompt, num_new=config.max_new_tokens)
        self.memory.reserve(num_bytes)
        lease.is_generating = True
        self.num_prompt_tokens += num_prompt
        self.num_reused += len(found.tokens) if found else 0

        def finish(result: Any, cache: Any, seconds: float) -> None:
            self.memory.release(num_bytes)
            try:
                if isinstance(result, torch.Tensor):
                    self.num_tokens += result.shape[-1] - num_prompt
                    self.seconds += seconds
                    if not lease.cancelled.is_set():
                        self._keep(result, cache)
            finally:
                self.turnstile.end_turn(lease)
                tell(result)

        def work() -> None:
            started, cache = time.perf_counter(), None
            result: Any = None
            try:
                cache = found.cache if found else self.caches.new()
                result = self._generate(lease, inputs, config, streamer, cache)
            except _GenerationCancelled:
                pass
            except Exception:
                logger.exception("request %s failed while generating", lease.name)
                result = FAILED
            loop.call_soon_threadsafe(finish, result, cache, time.perf_counter() - started)

        self.submit(work)

    def _check_length(self, num_prompt: int) -> None:
        if num_prompt == 0:
            raise Refusal(400, "empty_prompt", "got a prompt without tokens, expected at least one. Write something to go on from.")
        if num_prompt > self.max_prompt_tokens:
            text = f"the prompt has {num_prompt:,} tokens, expected at most {self.max_prompt_tokens:,}"
            if self.max_prompt_tokens == self.context - 1:
                raise Refusal(400, "context_length_exceeded", f"{text}: the model knows {self.context:,} positions. Shorten it.")
            raise Refusal(400, "context_length_exceeded", f"{text}. Shorten it, or start the server with a larger --max-prompt-tokens.")

    def _generate(self, lease: Lease, inputs: Any, config: Any, streamer: AnswerStreamer, cache: Any) -> Tensor:
        """Prompt and answer, (1, tokens)."""
        model, seed = self.caches.model, lease.accepted.seed
        # The seed of one request does not decide what others draw, and what a request's config leaves open the model's own does not fill in.
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=seed is not None), without_own_settings(model):
            if seed is not None:
                torch.manual_seed(seed)
            sequences: Tensor = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                cache=cache,
                generation_config=config,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([Halt(lease, streamer.stop)]),
            )
        return sequences

    def _keep(self, sequences: Tensor, cache: Any) -> None:
        """Store the cache for the next turn, and come back when it will have been idle for too long."""
        tokens = sequences[0, : cache.get_seq_length()].cpu()  # the last token was not fed to the model yet
        conversation = Conversation(tokens=tokens, cache=cache, num_bytes=cache.nbytes + tokens.nbytes, used=self.memory.clock())
        self.memory.store(conversation)
        asyncio.get_running_loop().call_later(self.memory.idle, self.memory.forget_idle)


class OneManager(GenerationState):
    """The state of transformers' handlers where there is one model and one manager."""

    def __init__(self, manager: BoundedGenerateManager) -> None:
        super().__init__()
        self.manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> BoundedGenerateManager:
        """The one manager."""
        return self.manager


@contextlib.contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """Inside the block the model has no generation config of its own: `generate` takes from there whatever the given one leaves at None."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
