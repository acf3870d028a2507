"""Where parts run. An engine takes a method and its parts and returns the results that arrived; it knows no method by name.

- ``inline`` - this process, in order: the reference that every other engine is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

__all__ = ["Engine", "Worker"]

Part = TypeVar("Part")
PartIn = TypeVar("PartIn", contravariant=True)
Result = TypeVar("Result")
ResultOut = TypeVar("ResultOut", covariant=True)


class Worker(Protocol[PartIn, ResultOut]):
    """What an engine needs of a method: one function of one part.

    A method may also offer ``work_all(parts)``, which returns the results of all parts at once, in order, usually from one matrix product.
    """

    def work(self, part: PartIn) -> ResultOut:
        """Result of one part. Sees nothing but its part, so it runs anywhere."""
        ...


class Engine(Protocol):
    """Run ``method.work`` on parts and return what has arrived, in any order."""

    def __call__(self, method: Worker[Part, Result], parts: Sequence[Part]) -> list[Result]:
        """Results of ``parts``; an engine that loses or delays some returns the rest."""
        ...
