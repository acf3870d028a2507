"""Caches that are made with the settings of their rule: one class for each rule of the room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from partwise.checks import check_choice
from partwise.serve.cache import BudgetedCache
from partwise.serve.h2o import H2O
from partwise.serve.key_norm import KeyNorm
from partwise.serve.random_tokens import RandomTokens
from partwise.serve.scissorhands import Scissorhands
from partwise.serve.sliding_window import SlidingWindow
from partwise.serve.snapkv import SnapKV
from partwise.serve.streaming_llm import StreamingLLM
from partwise.serve.tova import TOVA

if TYPE_CHECKING:
    from partwise.serve.rule import EvictionRule

__all__ = [
    "H2OCache",
    "KeyNormCache",
    "RandomTokensCache",
    "RuleCache",
    "ScissorhandsCache",
    "SlidingWindowCache",
    "SnapKVCache",
    "StreamingLLMCache",
    "TovaCache",
]


class RuleCache(BudgetedCache):
    """A cache whose class says the rule: `ScissorhandsCache` and its rivals.

    Parameters
    ----------
    model : PreTrainedModel
        The model that will use the cache.
    budget, pinned, bits, residual, score_chunk
        As for `BudgetedCache`.
    **settings : Any
        Fields of the rule, such as ``recent`` and ``drop``.
    """

    rule_class: ClassVar[type[EvictionRule]]

    def __init__(
        self,
        model: Any,
        *,
        budget: int | Sequence[int],
        pinned: int | Sequence[int] = (),
        bits: Literal[4, 8] | None = None,
        residual: int = 16,
        score_chunk: int | None = None,
        **settings: Any,
    ) -> None:
        known = [field.name for field in fields(self.rule_class)]
        for name in settings:
            check_choice(name, known, name=f"setting of {self.rule_class.__name__}")
        super().__init__(model, self.rule_class(**settings), budget=budget, pinned=pinned, bits=bits, residual=residual, score_chunk=score_chunk)

    def __repr__(self) -> str:
        """How the cache was made, without the model."""
        settings = "".join(f", {field.name}={getattr(self.rule, field.name)!r}" for field in fields(self.rule))
        return f"{type(self).__name__}(model, {self._sizes()}{settings})"


class ScissorhandsCache(RuleCache):
    """A cache of fixed size that keeps the tokens which recent queries look at.

    See `RuleCache` for its arguments; ``settings`` are the fields of `Scissorhands`.

    Pass it to ``model.generate(**inputs, cache=ScissorhandsCache(model, budget=256))``.

    References
    ----------
    arXiv:2305.17118.
    """

    rule_class = Scissorhands


class StreamingLLMCache(RuleCache):
    """A cache that keeps the first four and the last tokens.

    See `RuleCache` for its arguments; ``settings`` are the fields of `StreamingLLM`.

    References
    ----------
    arXiv:2309.17453.
    """

    rule_class = StreamingLLM


class H2OCache(RuleCache):
    """A cache that keeps the tokens with the most attention so far.

    See `RuleCache` for its arguments; ``settings`` are the fields of `H2O`.

    References
    ----------
    arXiv:2306.14048.
    """

    rule_class = H2O


class TovaCache(RuleCache):
    """A cache that keeps the tokens which the last query looks at.

    See `RuleCache` for its arguments; ``settings`` are the fields of `TOVA`.

    References
    ----------
    arXiv:2401.06104.
    """

    rule_class = TOVA


class SnapKVCache(RuleCache):
    """A cache that keeps what the last queries look at, with its neighbours.

    See `RuleCache` for its arguments; ``settings`` are the fields of `SnapKV`.

    References
    ----------
    arXiv:2404.14469.
    """

    rule_class = SnapKV


class KeyNormCache(RuleCache):
    """A cache that keeps the tokens with the shortest keys.

    See `RuleCache` for its arguments; ``settings`` are the fields of `KeyNorm`.

    References
    ----------
    arXiv:2406.11430.
    """

    rule_class = KeyNorm


class SlidingWindowCache(RuleCache):
    """A cache that keeps the last tokens.

    See `RuleCache` for its arguments; ``settings`` are the fields of `SlidingWindow`.

    References
    ----------
    arXiv:2004.05150.
    """

    rule_class = SlidingWindow


class RandomTokensCache(RuleCache):
    """A cache that keeps a random sample.

    See `RuleCache` for its arguments; ``settings`` are the fields of `RandomTokens`.

    References
    ----------
    Vitter 1985. doi:10.1145/3147.3165
    """

    rule_class = RandomTokens
