"""Who is answered when: a bounded queue, first come first served, in front of one thread that generates."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from partwise.serve._http_refusal import Refusal

if TYPE_CHECKING:
    from partwise.serve._http_requests import Accepted

__all__ = ["Lease", "Turnstile"]

FIRST_GUESS_S = 2.0  # seconds of an answer, before one was measured
SHARE_OF_NEWEST = 0.2


@dataclass(eq=False)
class Lease:
    """The place of one request: held from its arrival to the last byte of its answer.

    Parameters
    ----------
    name : str
        Name of the request; the handlers of transformers know it by this and nothing else.
    accepted : Accepted
        What is asked.
    """

    name: str
    accepted: Accepted
    cancelled: threading.Event = field(default_factory=threading.Event)
    is_generating: bool = False
    has_turn: bool = False


class Turnstile:
    """Lets in a limited number of requests, and one of them at a time to the model.

    All methods run on the thread of the event loop, so no two of them interleave.

    Parameters
    ----------
    max_queue : int
        Requests that may wait while one is answered.
    """

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.num_inside = 0
        self.seconds = FIRST_GUESS_S
        self._turn = asyncio.Lock()
        self._began = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether somebody has the turn."""
        return self._turn.locked()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place inside, waiting or being answered; refused with 429 where all are taken."""
        if self.num_inside > self.max_queue:
            seconds = self.retry_after()
            text = f"{self.num_inside} requests are waiting or being answered and no more are let in. Try again in {seconds} s, or raise --max-queue."
            raise Refusal(429, "queue_full", text, headers={"Retry-After": str(seconds)})
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1

    def retry_after(self) -> int:
        """Whole seconds after which a place is likely to be free."""
        return max(1, min(600, math.ceil(self.seconds)))

    async def wait_for_turn(self, lease: Lease) -> None:
        """Wait until everybody who came before is done."""
        await self._turn.acquire()
        lease.has_turn = True
        self._began = asyncio.get_running_loop().time()

    def end_turn(self, lease: Lease) -> None:
        """Let the next one go on; a second call for the same lease does nothing."""
        if not lease.has_turn:
            return
        lease.has_turn = False
        if lease.is_generating:
            self.seconds += SHARE_OF_NEWEST * (asyncio.get_running_loop().time() - self._began - self.seconds)
        self._turn.release()
