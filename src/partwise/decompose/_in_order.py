"""Work on many pieces with several threads, results in the order of the pieces.

NumPy and SciPy let go of the interpreter inside products, so that threads keep all cores busy while BLAS itself has one. As the pieces do not depend
on the number of threads and results come in order, sums over them have the same bits on any machine.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

__all__ = ["map_in_order", "num_threads"]

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def num_threads() -> int:
    """Cores this process may use, or ``OMP_NUM_THREADS`` where that is smaller: workers of an engine that share a machine are given it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(wanted))) if wanted.isdigit() else cores


def map_in_order(function: Callable[[Piece], Result], pieces: Iterable[Piece], *, bytes_each: int = 0, limit_bytes: int = 1 << 29) -> Iterator[Result]:
    """Results of ``function`` in the order of ``pieces``, computed by several threads.

    Parameters
    ----------
    function : callable
        What to do with a piece; runs in a thread.
    pieces : iterable
        Drawn in this thread, only as far ahead as needed to keep all threads busy.
    bytes_each, limit_bytes : int
        What one piece and its result take, and what all that are under way may take.
    """
    threads = num_threads()
    if threads == 1 or (isinstance(pieces, list) and len(pieces) == 1):
        yield from map(function, pieces)
        return
    window = max(2, min(threads + 2, limit_bytes // max(1, bytes_each)))
    pool, waiting = _pool(os.getpid(), threads), deque[Future[Result]]()
    try:
        for piece in pieces:
            waiting.append(pool.submit(function, piece))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # The number of the process is part of the key because threads do not survive a fork.
    return ThreadPoolExecutor(threads, thread_name_prefix="partwise-pieces")
