"""Write text with a cache that never exceeds its budget: what ``partwise serve generate`` does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partwise.checks import InputError, check_at_least

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.serve.rule import EvictionRule

__all__ = ["Generation", "Sampling", "generate_text", "read_prompt"]

Report = Callable[[str, int, int, str], None]
LARGEST_SEED = 2**63 - 1  # that torch takes
SECONDS_BETWEEN_REPORTS = 0.1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to end.

    Parameters
    ----------
    max_new_tokens : int
        Tokens to write, at most; a token that ends a text ends it earlier.
    temperature : float
        0 takes the likeliest token each time; 1 draws as the model says; lower is more careful.
    top_p : float
        Draw only among the likeliest tokens that have this probability together. 1 is all.
    top_k : int
        Draw only among so many of the likeliest tokens. 0 is all.
    seed : int
        Of what is drawn.
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self.max_new_tokens, 1, name="max_new_tokens")
        check_at_least(self.top_k, 0, name="top_k")
        if not 0 <= self.temperature < float("inf"):
            raise InputError("setting-out-of-range", f"temperature={self.temperature} must be 0 or more. Pass 0 for the likeliest tokens, or 0.8.")
        if not 0 < self.top_p <= 1:
            raise InputError("setting-out-of-range", f"top_p={self.top_p} must be above 0 and at most 1. Pass 1 to draw among all tokens.")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError("setting-out-of-range", f"seed={self.seed} must be from 0 to {LARGEST_SEED}. Choose one of these.")

    def options(self) -> dict[str, Any]:
        """Arguments of ``generate``; what a model's own generation settings say of the same is overruled."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, "num_beams": 1} | drawn


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A text that was written, and what it took.

    Parameters
    ----------
    text : str
        Without the prompt.
    num_prompt_tokens, num_new_tokens : int
        Tokens read and written.
    prompt_seconds, seconds : float
        Until the first new token was there, and for those after it.
    bytes, bytes_full, max_bytes : int
        Of the cache at the end; of a full cache after as many tokens; the bound that was promised.
    evictions : int
        How often tokens left, over all layers.
    mass_kept : float or None
        Mean share of the attention that fell on tokens which were kept; None where the method does not measure it.
    """

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    prompt_seconds: float
    seconds: float
    bytes: int
    bytes_full: int
    max_bytes: int
    evictions: int
    mass_kept: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first one; None where there was only one."""
        return (self.num_new_tokens - 1) / self.seconds if self.num_new_tokens > 1 and self.seconds > 0 else None


class TextPieces:
    """Turns tokens into pieces of text as they come. All pieces together are what decoding all tokens at once gives.

    The last word that is known is decoded again in front of a new token, because tokenizers decide on spaces by what stands before; letters of several
    tokens wait until they are whole.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start, self._end = 0, 0  # tokens from start to end are written, and stand in front of what is not

    def add(self, token: int) -> str:
        """What is certain after one more token."""
        self._ids.append(token)
        known, text = self._decode(self._ids[self._start : self._end]), self._decode(self._ids[self._start :])
        if len(text) <= len(known) or text.endswith("\ufffd"):  # the rest of a letter is still to come
            return ""
        self._start, self._end = self._end, len(self._ids)
        return text[len(known) :]

    def rest(self) -> str:
        """What never became whole."""
        known, text = self._decode(self._ids[self._start : self._end]), self._decode(self._ids[self._start :])
        self._start = self._end = len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Listener:
    """What ``generate`` tells its tokens to (a streamer): writes text, keeps time, and says how far it is."""

    def __init__(self, tokenizer: Any, cache: Any, *, most: int, write: Callable[[str], None], report: Report) -> None:
        self._pieces, self._cache, self._most, self._write, self._report = TextPieces(tokenizer), cache, most, write, report
        self.num_tokens, self.text = -1, ""  # the first call brings the prompt
        self._started = time.perf_counter()
        self._first = self._last = self._told = self._started

    def put(self, ids: Tensor) -> None:
        """The prompt, and then each token."""
        self._last = time.perf_counter()
        self.num_tokens += 1
        if self.num_tokens == 0:
            return
        if self.num_tokens == 1:
            self._first = self._last
        self._say(self._pieces.add(int(ids.reshape(-1)[-1])))
        if self._last - self._told >= SECONDS_BETWEEN_REPORTS:  # asking the cache takes longer than a small model takes for a token
            self._told = self._last
            self._report("writing", self.num_tokens, self._most, self._note())

    def end(self) -> None:
        """After the last token."""
        self._say(self._pieces.rest())

    @property
    def seconds(self) -> tuple[float, float]:
        """Until the first token, and from it to the last."""
        return self._first - self._started, self._last - self._first

    def _say(self, text: str) -> None:
        self.text += text
        if text:
            self._write(text)

    def _note(self) -> str:
        from partwise.report import format_bytes

        state = self._cache.report()
        speed = f"{(self.num_tokens - 1) / self.seconds[1]:.1f} tokens/s, " if self.num_tokens > 1 else ""
        return f"{speed}cache {format_bytes(state.bytes)}, a full one {format_bytes(state.bytes_full)}"


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    rule: EvictionRule,
    *,
    budget: int | Sequence[int],
    bits: Literal[4, 8] | None = None,
    pinned: int | Sequence[int] = (),
    pin_prompt: bool = False,
    chat: bool = False,
    prefill_chunk_size: int | None = None,
    sampling: Sampling | None = None,
    write: Callable[[str], None] = lambda text: None,
    report: Report = lambda phase, done, total, note: None,
) -> Generation:
    """Go on with a text, with a cache that holds at most ``budget`` tokens per layer and head.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model. It is left as it was.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.
    prompt : str
        The text to go on with.
    rule : EvictionRule
        Which tokens leave when the budget is spent.
    budget : int or sequence of int
        Tokens that are kept, per head; one number for all layers, or one for each.
    bits : {4, 8}, optional
        Store keys and values in so many bits.
    pinned : int or sequence of int
        The first tokens that never leave, or positions of tokens that never leave.
    pin_prompt : bool, default=False
        No token of the prompt leaves.
    chat : bool, default=False
        Put the prompt into the chat template of the model, as what a user says.
    prefill_chunk_size : int, optional
        Read the prompt in pieces of so many tokens, for prompts that do not fit even once. Later pieces then see what the cache has kept of earlier ones.
    sampling : Sampling, optional
        How tokens are chosen. Left out: the likeliest ones, 200 at most.
    write : callable
        Told each piece of text as soon as it is certain.
    report : callable
        Told (phase, done, total, note) as the work goes on.

    Returns
    -------
    Generation
        The text and what it took.

    Raises
    ------
    InputError
        ``empty-prompt``, ``no-chat-template``, and what the cache and the rule refuse, before the first token.
    """
    import torch

    from partwise.serve._attached import attached
    from partwise.serve.cache import BudgetedCache

    sampling = sampling or Sampling()
    ids = prompt_ids(tokenizer, prompt, chat=chat).to(model.device)  # (1, tokens)
    pinned = ids.shape[1] if pin_prompt else pinned
    chunks = {} if prefill_chunk_size is None else {"prefill_chunk_size": prefill_chunk_size}
    with attached(model):
        cache = BudgetedCache(model, rule, budget=budget, pinned=pinned, bits=bits)
        report("reading the prompt", 0, 1, f"{ids.shape[1]:,} tokens")
        listener = Listener(tokenizer, cache, most=sampling.max_new_tokens, write=write, report=report)
        drawing = torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else [])
        with torch.no_grad(), drawing:
            torch.manual_seed(sampling.seed)
            try:
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    cache=cache,
                    streamer=listener,
                    pad_token_id=pad_token_of(model, tokenizer),
                    **sampling.options(),
                    **chunks,
                )
            except KeyboardInterrupt:
                listener.end()  # the letter or word that was waiting
                raise
        state = cache.report()
    return Generation(
        text=listener.text,
        num_prompt_tokens=ids.shape[1],
        num_new_tokens=listener.num_tokens,
        prompt_seconds=listener.seconds[0],
        seconds=listener.seconds[1],
        bytes=state.bytes,
        bytes_full=state.bytes_full,
        max_bytes=state.max_bytes,
        evictions=state.evictions,
        mass_kept=state.mass_kept,
    )


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt itself, or what the file holds; ``-`` is standard input.

    Raises
    ------
    InputError
        ``file-unreadable`` or ``wrong-encoding``.
    """
    if file is None:
        return prompt or ""
    try:
        return (sys.stdin.buffer.read() if str(file) == "-" else file.expanduser().read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise InputError("file-unreadable", f"cannot read {file}: {error.strerror or error}. Check --prompt-file and its permissions.") from error
    except UnicodeDecodeError as error:
        raise InputError("wrong-encoding", f"{file} is not UTF-8 text, at byte {error.start}. Convert it (iconv -f latin1 -t utf-8).") from error


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool) -> Tensor:
    """Tokens of a prompt, (1, tokens)."""
    import torch

    if chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "no-chat-template",
            "the tokenizer of the model has no chat template, expected one for --chat. Leave --chat out, or take a model made for chats.",
        )
    if chat:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not len(ids):
        raise InputError("empty-prompt", "the prompt has no tokens, expected some text to go on with. Pass --prompt TEXT.")
    return torch.tensor([ids])


def pad_token_of(model: Any, tokenizer: Any) -> int:
    """A token to fill rows with; there is nothing to fill in a batch of one, but ``generate`` asks."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, model.generation_config.eos_token_id)
    return next((int(token) for token in candidates if isinstance(token, int)), 0)
