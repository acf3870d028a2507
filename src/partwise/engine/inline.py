"""The reference engine: this process, parts in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from partwise.engine import Worker

Part = TypeVar("Part")
Result = TypeVar("Result")


@runtime_checkable
class _Batched(Protocol):
    def work_all(self, parts: Sequence[Any]) -> list[Any]: ...


def inline(method: Worker[Part, Result], parts: Sequence[Part]) -> list[Result]:
    """Run all parts here and return their results in the order of the parts.

    Parameters
    ----------
    method : Worker
        Anything with ``work(part)``. If it also has ``work_all(parts)``, that is called once instead, so that one machine never pays for
        pretending to be many. Both give the same numbers up to rounding.
    parts : sequence
        What ``method.split`` returned.
    """
    if isinstance(method, _Batched):
        return method.work_all(parts)
    return [method.work(part) for part in parts]
