"""A cache for code that calls a model and passes none."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from partwise.checks import InputError
from partwise.serve._attention import attach, detach
from partwise.serve.cache import BudgetedCache

__all__ = ["attached"]

_active: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # blocks of `attached` that a model is in


@contextlib.contextmanager
def attached(model: Any, cache: BudgetedCache | None = None) -> Iterator[Any]:
    """Inside the block the model uses the cache although nobody passes it; afterwards nothing of it is left on the model.

    For code that calls ``model.generate(...)`` or ``model(...)`` and makes its own cache or none. Without ``cache``: only put the model's attention back
    at the end, for those who make a cache inside and want no trace of it.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    cache : BudgetedCache, optional
        What it is to use, instead of any cache but one with a budget that is passed; made for this model.

    Yields
    ------
    PreTrainedModel
        The model.
    """
    if not (cache is None or isinstance(cache, BudgetedCache)):
        raise InputError(
            "bad-cache-setting",
            f"got {type(cache).__name__}, expected a cache of this room, such as ScissorhandsCache(model, budget=256). Pass any other one as cache=.",
        )
    outer, had_own = _active.get(model, 0), "generate" in vars(model)
    generate = model.generate

    def chosen(kwargs: dict[str, Any]) -> Any:
        passed = kwargs.get("cache")
        return passed if isinstance(passed, BudgetedCache) else cache

    def forward_with_cache(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"cache": chosen(kwargs), "use_cache": True}

    def generate_with_cache(*args: Any, **kwargs: Any) -> Any:
        return generate(*args, **kwargs | {"cache": chosen(kwargs)})

    handle = None
    _active[model] = outer + 1
    try:
        if cache is not None:
            attach(model)  # another block may have taken it off
            handle = model.register_forward_pre_hook(forward_with_cache, with_kwargs=True, prepend=True)  # before those of outer blocks
            model.generate = generate_with_cache
        yield model
    finally:
        if handle is not None:
            handle.remove()
            if had_own:
                model.generate = generate
            else:
                del model.generate
        _active[model] = outer
        if not outer:
            detach(model)
