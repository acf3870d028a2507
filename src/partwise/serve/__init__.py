"""serve: generation in a fixed memory.

- ``scissorhands`` - keep the tokens that recent queries look at - arXiv:2305.17118
- ``streaming-llm`` - keep the first four and the last tokens; a baseline - arXiv:2309.17453
- ``h2o`` - keep the tokens with the most attention so far; a baseline - arXiv:2306.14048
- ``tova`` - keep the tokens that the last query looks at; a baseline - arXiv:2401.06104
- ``snapkv`` - keep what the last queries look at, with its neighbours; a baseline - arXiv:2404.14469
- ``key-norm`` - keep the tokens with the shortest keys; a baseline - arXiv:2406.11430
- ``sliding-window`` - keep the last tokens; a baseline - arXiv:2004.05150
- ``random-tokens`` - keep a random sample; a baseline - Vitter 1985
- ``domain-router`` - choose among models by the hidden states of a prompt - arXiv:2504.16871

``model.generate(**inputs, cache=ScissorhandsCache(model, budget=256))`` is all there is to it; `attached` is for code that makes its own cache;
`calibrate_budgets`, and `persistence_ratio` with `allocate_budgets`, measure how much of a budget each layer needs.

A cache is made of layers. ``_layer`` is what happens in a call of the model, on top of ``_held_tokens``, which is what a layer holds and how transformers
handles it; ``_plain_store`` and ``_packed_store`` have the keys and values, in ``_slots`` or in few bits (``_packing``); ``_attention`` leads from the model
back to the layer, ``_masks`` and ``_scores`` compute what it needs, ``_decoder`` knows which models will do. Files that begin with ``_http`` are the server.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partwise.serve._attached import attached
    from partwise.serve.budgets import Calibration, calibrate_budgets
    from partwise.serve.cache import BudgetedCache
    from partwise.serve.cache_report import CacheReport
    from partwise.serve.caches import (
        H2OCache,
        KeyNormCache,
        RandomTokensCache,
        ScissorhandsCache,
        SlidingWindowCache,
        SnapKVCache,
        StreamingLLMCache,
        TovaCache,
    )
    from partwise.serve.domain_router import DomainRouter
    from partwise.serve.h2o import H2O
    from partwise.serve.key_norm import KeyNorm
    from partwise.serve.persistence import Persistence, allocate_budgets, persistence_ratio
    from partwise.serve.random_tokens import RandomTokens
    from partwise.serve.scissorhands import Scissorhands
    from partwise.serve.sliding_window import SlidingWindow
    from partwise.serve.snapkv import SnapKV
    from partwise.serve.streaming_llm import StreamingLLM
    from partwise.serve.tova import TOVA

__all__ = [
    "H2O",
    "METHODS",
    "TOVA",
    "BudgetedCache",
    "CacheReport",
    "Calibration",
    "DomainRouter",
    "H2OCache",
    "KeyNorm",
    "KeyNormCache",
    "Persistence",
    "RandomTokens",
    "RandomTokensCache",
    "Scissorhands",
    "ScissorhandsCache",
    "SlidingWindow",
    "SlidingWindowCache",
    "SnapKV",
    "SnapKVCache",
    "StreamingLLM",
    "StreamingLLMCache",
    "TovaCache",
    "allocate_budgets",
    "attached",
    "calibrate_budgets",
    "persistence_ratio",
]

RULES = {
    "scissorhands": "partwise.serve.scissorhands:Scissorhands",
    "streaming-llm": "partwise.serve.streaming_llm:StreamingLLM",
    "h2o": "partwise.serve.h2o:H2O",
    "tova": "partwise.serve.tova:TOVA",
    "snapkv": "partwise.serve.snapkv:SnapKV",
    "key-norm": "partwise.serve.key_norm:KeyNorm",
    "sliding-window": "partwise.serve.sliding_window:SlidingWindow",
    "random-tokens": "partwise.serve.random_tokens:RandomTokens",
}
METHODS = RULES | {"domain-router": "partwise.serve.domain_router:DomainRouter"}
_HOMES = {
    "BudgetedCache": "cache",
    "CacheReport": "cache_report",
    "Calibration": "budgets",
    "DomainRouter": "domain_router",
    "H2O": "h2o",
    "H2OCache": "caches",
    "KeyNorm": "key_norm",
    "KeyNormCache": "caches",
    "Persistence": "persistence",
    "RandomTokens": "random_tokens",
    "RandomTokensCache": "caches",
    "Scissorhands": "scissorhands",
    "ScissorhandsCache": "caches",
    "SlidingWindow": "sliding_window",
    "SlidingWindowCache": "caches",
    "SnapKV": "snapkv",
    "SnapKVCache": "caches",
    "StreamingLLM": "streaming_llm",
    "StreamingLLMCache": "caches",
    "TOVA": "tova",
    "TovaCache": "caches",
    "allocate_budgets": "persistence",
    "attached": "_attached",
    "calibrate_budgets": "budgets",
    "persistence_ratio": "persistence",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
