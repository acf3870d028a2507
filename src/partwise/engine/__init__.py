"""Where parts run. An engine takes a method and its parts and returns the results that arrived; it knows no method by name.

- ``inline`` - this process, in order: the reference that every other engine is compared with.
- ``ray`` - workers of a Ray cluster, on this machine or on many; they come and go, and the result stays the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from partwise.checks import InputError, check_at_least, check_choice

__all__ = ["ENGINES", "AsyncEngine", "Engine", "Worker", "open_engine"]

ENGINES = ("inline", "ray")

Part = TypeVar("Part")
PartIn = TypeVar("PartIn", contravariant=True)
Result = TypeVar("Result")
ResultOut = TypeVar("ResultOut", covariant=True)


class Worker(Protocol[PartIn, ResultOut]):
    """What an engine needs of a method: one function of one part.

    Parts and results that carry an ``index``, the number of the part, can be sent to the worker that had that part before and be recognised when they
    arrive twice. A method may also offer

    * ``work_all(parts)``: the results of all parts at once, in order, usually from one matrix product;
    * ``check(part, result)``: raises an InputError or RunError when a result does not fit its part. Engines refuse such a result, and any with a NaN or
      an infinite number in it, and send the part again.
    """

    def work(self, part: PartIn) -> ResultOut:
        """Result of one part. Sees nothing but its part, so it runs anywhere."""
        ...


class Engine(Protocol):
    """Run ``method.work`` on parts and return what has arrived, in any order."""

    def __call__(self, method: Worker[Part, Result], parts: Sequence[Part]) -> list[Result]:
        """Results of ``parts``; an engine that loses or delays some returns the rest."""
        ...


class AsyncEngine(Engine, Protocol):
    """An engine that also takes parts one at a time and hands results over as they come."""

    def is_free(self, index: int) -> bool:
        """Whether the worker of part ``index`` could start now."""
        ...

    def submit(self, method: Worker[Any, Any], part: Any) -> None:
        """Send one part, which carries its ``index``; at most one part of each index may be under way."""
        ...

    def collect(self) -> Any:
        """The next result that arrives; waits for it."""
        ...

    def abandon(self) -> None:
        """Forget what is under way: its results are dropped when they come."""
        ...


def open_engine(
    engine: str | Engine = "inline",
    *,
    num_workers: int | None = None,
    num_parts: int | None = None,
    address: str | None = None,
    timeout: float | None = None,
    seed: int = 0,
) -> AbstractContextManager[Any]:
    """The engine of that name, to be used in a ``with`` block.

    Parameters
    ----------
    engine : {"inline", "ray"} or Engine, default="inline"
        A name, or an engine that is open already; that one is used as it is and stays open.
    num_workers : int, optional
        Workers, by default one for each core and at most ``num_parts``. Goes with a name only.
    num_parts : int, optional
        Parts that the method can have at most; ``num_workers`` above that is refused.
    address : str, optional
        Address of a Ray cluster, as in ``ray.init``; without it one is started on this machine.
    timeout : float, optional
        Seconds after which the parts of a Ray worker that does not answer are sent to a fresh one too; see `RayActors` for what happens without it.
    seed : int, default=0
        What the inline engine draws the order of asynchronous arrivals from.

    Raises
    ------
    InputError
        ``unknown-choice``, ``below-minimum``, ``more-workers-than-parts``, ``address-without-ray``, ``timeout-without-ray``, ``timeout-range`` or
        ``engine-is-open``.
    MissingExtra
        When Ray is asked for and not installed.

    Examples
    --------
    >>> with open_engine("inline", num_workers=2, num_parts=3) as engine:
    ...     engine.num_workers
    2
    """
    if not isinstance(engine, str) and callable(engine):
        named = {"num_workers": num_workers, "address": address, "timeout": timeout}
        given = ", ".join(f"{name}={value!r}" for name, value in named.items() if value is not None)
        if given:
            raise InputError("engine-is-open", f"got {given} with an engine that is open already, expected it with a name only. Set it where you open it.")
        return contextlib.nullcontext(engine)  # it may have more workers than this method has parts: those do not even start
    check_choice(engine, ENGINES, name="engine")
    if num_workers is not None:
        check_at_least(num_workers, 1, name="num_workers")
    if num_workers is not None and num_parts is not None and num_workers > num_parts:
        raise InputError(
            "more-workers-than-parts", f"got num_workers={num_workers} for {num_parts} parts, expected at most one each. Pass num_workers={num_parts} or fewer."
        )
    if engine == "inline":
        if address is not None:
            raise InputError("address-without-ray", f"got address={address!r} for the inline engine, expected none. Pass engine='ray', or leave it out.")
        if timeout is not None:
            raise InputError("timeout-without-ray", f"got timeout={timeout:g} for the inline engine, expected none. Pass engine='ray', or leave it out.")
        from partwise.engine.inline import InlineWorkers

        return contextlib.nullcontext(InlineWorkers(num_workers, seed=seed))
    from partwise.engine.ray_actors import RayActors

    return RayActors(num_workers, max_workers=num_parts, address=address, timeout=timeout)
