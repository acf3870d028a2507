"""Running the rounds to their end, in step or out of step, with one record for each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from partwise.decompose._eigen_rounds import Eigenpairs, ParallelDeflation
from partwise.rounds import Schedule, run_async, run_rounds

__all__ = ["Progress", "solve_rounds"]

Progress = Callable[[int, Eigenpairs], None]


def solve_rounds(
    method: ParallelDeflation,
    start: Eigenpairs,
    *,
    num_rounds: int,
    engine: Any,
    mode: str = "sync",
    max_staleness: int | None = None,
    schedule: Schedule | None = None,
    progress: Progress | None = None,
) -> tuple[Eigenpairs, list[dict[str, Any]], Schedule | None]:
    """Run the rounds until every component has settled, or ``num_rounds`` are done.

    Parameters
    ----------
    method : ParallelDeflation
        What runs.
    start : Eigenpairs
        Where to start: random, or a state of an earlier run, whose rounds count.
    num_rounds : int
        Rounds at most, those of ``start`` included; with ``mode="async"`` every part publishes that often on average.
    engine : Engine or AsyncEngine
        An open engine; with ``mode="async"`` one that takes parts one at a time.
    mode : {"sync", "async"}
        Whether all parts wait for each other after every publication.
    max_staleness : int, optional
        Asynchronous only: publications by which a part may be ahead of one in front of it.
    schedule : Schedule, optional
        The order of events of an earlier asynchronous run, which is then repeated here, bit for bit.
    progress : callable, optional
        Called after each round, or each publication, as ``progress(number, state)``.

    Returns
    -------
    state : Eigenpairs
        The last one.
    history : list of dict
        One record per round or publication: its number, seconds since the start, values, residuals, floats sent.
    schedule : Schedule or None
        What happened in which order, when asynchronous.
    """
    history: list[dict[str, Any]] = []
    started, latest = time.perf_counter(), start

    def record(_: int, state: Eigenpairs) -> None:
        nonlocal latest
        history.append(
            {
                "round": state.num_rounds,
                "seconds": time.perf_counter() - started,
                "floats_sent": method.floats_sent(latest, state),
                "values": state.values.tolist(),
                "residuals": [float(r) if np.isfinite(r) else None for r in state.residuals],
            }
        )
        latest = state
        if progress is not None:
            progress(state.num_rounds, state)

    def stop(_: Eigenpairs, state: Eigenpairs) -> bool:
        return method.settled(state)

    total = num_rounds * (method.num_parts(len(start.vectors)) if mode == "async" else 1)
    left = total - start.num_rounds
    if left < 1 or method.settled(start):
        return start, history, schedule
    if schedule is not None:
        state, happened = run_async(method, start, num_updates=left, schedule=schedule, progress=record, stop=stop)
    elif mode == "async":
        state, happened = run_async(method, start, engine=engine, num_updates=left, max_staleness=max_staleness, progress=record, stop=stop)
    else:
        return run_rounds(method, start, num_rounds=left, engine=engine, progress=record, stop=stop), history, None
    return state, history, happened
