"""The attention functions that lead from a model to the cache it was given, and which models have them.

A cache is told keys and values but no queries, so it cannot know what was looked at. The function that computes attention has all three. Ours are
registered under names of their own, beside those that exist; a call that did not come through a cache with a budget passes through unchanged.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from partwise.checks import InputError, RunError
from partwise.serve._decoder import unsupported
from partwise.serve._evaluating import evaluating
from partwise.serve._held_tokens import MARK, PREFIX

if TYPE_CHECKING:
    from transformers import Cache

    from partwise.serve._decoder import LayerShape

__all__ = ["KERNELS", "attach", "detach", "own_kernel", "probe", "set_attention"]

KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
_probed: weakref.WeakKeyDictionary[type, set[str]] = weakref.WeakKeyDictionary()


def _wrapped(kernel: str) -> Callable[..., Any]:
    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        base, layer = _base(kernel, module), getattr(key, MARK, None)
        if layer is None:  # any other cache, layers with a window of their own, cross attention
            return base(_named(module, kernel), query, key, value, attention_mask, **kwargs)
        return layer.attend(base, kernel, module, query, key, value, attention_mask, **kwargs)

    return attention


def _base(kernel: str, module: Any) -> Callable[..., Any]:
    """The function that the model would have called."""
    home = sys.modules[type(module).__module__]
    if kernel != "eager":
        functions = getattr(home, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
        found: Callable[..., Any] = functions[kernel]
        return found if not kernel.startswith("flash") else lambda module, *args, **kwargs: found(_named(module, kernel), *args, **kwargs)
    function: Callable[..., Any] | None = getattr(home, "eager_attention_forward", None)
    if function is None:
        raise unsupported(
            type(module).__name__, "its module has no function eager_attention_forward", advice="Load it with attn_implementation='sdpa'."
        )
    return function


class _Named:
    """A module whose configuration tells the name of the kernel that is used: flash attention picks its own by that."""

    def __init__(self, module: Any, kernel: str) -> None:
        self._module, self.config = module, _KernelConfig(module.config, kernel)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _KernelConfig:
    def __init__(self, config: Any, kernel: str) -> None:
        self._config, self._attn_implementation = config, kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _named(module: Any, kernel: str) -> Any:
    return _Named(module, kernel) if kernel.startswith("flash") else module


for _kernel in KERNELS:
    AttentionInterface.register(PREFIX + _kernel, _wrapped(_kernel))
    AttentionMaskInterface.register(PREFIX + _kernel, ALL_MASK_ATTENTION_FUNCTIONS[_kernel])


def own_kernel(model: Any) -> str:
    """The attention a model has, without our prefix."""
    name: str = model.config.get_text_config(decoder=True)._attn_implementation or "eager"
    return name.removeprefix(PREFIX)


def attach(model: Any) -> None:
    """Set the model's attention to the wrapped one of the same kernel; refuse what has none."""
    kernel = own_kernel(model)
    if kernel not in KERNELS:
        raise InputError(
            "attention-implementation",
            f"got a model whose attention is {kernel!r}, expected one of {', '.join(KERNELS)}. Call model.set_attn_implementation('sdpa').",
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise unsupported(type(model).__name__, "its attention does not go through transformers' AttentionInterface")
    if model.config.get_text_config(decoder=True)._attn_implementation != PREFIX + kernel:
        set_attention(model, PREFIX + kernel)


def detach(model: Any) -> None:
    """Give the model's attention its own name back."""
    if str(model.config.get_text_config(decoder=True)._attn_implementation).startswith(PREFIX):
        set_attention(model, own_kernel(model))


def set_attention(model: Any, name: str) -> None:
    """As ``set_attn_implementation``, which forgets layers that have a configuration of their own because they differ in size."""
    model.set_attn_implementation(name)
    config = model.config.get_text_config(decoder=True)
    if config.is_heterogeneous:
        for module in model.modules():
            own: Any = getattr(module, "config", None)
            if type(own) is type(config) and own is not config:
                own._attn_implementation = name


def probe(model: Any, cache: Cache, shapes: Sequence[LayerShape]) -> None:
    """Run one token through a model and a cache, once for each class and kernel: a model that passes the cache by is refused before the first real token."""
    kernel = own_kernel(model)
    if kernel in _probed.get(type(model), ()):
        return
    budgeted = {index: layer for index, layer in enumerate(cache.layers) if hasattr(layer, "attend")}
    embedding = model.get_input_embeddings()
    token = torch.zeros(1, 1, dtype=torch.int64, device=embedding.weight.device)
    with evaluating(model):
        try:
            model(input_ids=token, cache=cache, use_cache=True)
        except InputError:
            raise
        except RunError as error:
            raise unsupported(type(model).__name__, "its attention passes the cache by, or gets other keys than the cache returned") from error
        except Exception as error:
            raise unsupported(type(model).__name__, f"one token through it failed with {type(error).__name__}: {str(error).rstrip('.')}") from error
    missed = [index for index, layer in budgeted.items() if layer.largest != 1]
    if missed:
        raise unsupported(type(model).__name__, f"layers {missed} did not use the cache")
    for index, layer in budgeted.items():
        found, expected = [tuple(tensor.shape) for tensor in layer.store.read()], (1, shapes[index].kv_heads, 1, shapes[index].dim)
        if found != [expected] * 2:
            raise unsupported(type(model).__name__, f"a token has keys and values of shape {found}, not {expected} as configured")
    _probed.setdefault(type(model), set()).add(kernel)
