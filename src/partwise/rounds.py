"""SHAPE 1: split -> work -> merge, round after round.

A method is an immutable value with three functions; what changes is the state that travels through them. ``split`` cuts the state into parts,
one per worker; ``work`` runs anywhere and sees nothing but its part; ``merge`` puts back whatever has arrived. Because ``merge`` accepts any
subset of the results, synchronous and asynchronous engines share all of this code, and a lost worker costs one result and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from partwise.checks import check_at_least
from partwise.engine import Engine
from partwise.engine.inline import inline

if TYPE_CHECKING:
    import torch

__all__ = ["RoundMethod", "part_generator", "part_seed", "run_rounds"]

State = TypeVar("State")
Part = TypeVar("Part")
Result = TypeVar("Result")


class RoundMethod(Protocol[State, Part, Result]):
    """Three functions that make a method run in rounds on any engine.

    A method is a frozen dataclass: its fields are its settings, its repr rebuilds it. Parts and results carry ``index``, the number of their part.
    What else a method may offer is said at ``partwise.engine.Worker``.
    """

    def split(self, state: State) -> Sequence[Part]:
        """One part per worker. A part pickles and holds all that its worker needs."""
        ...

    def work(self, part: Part) -> Result:
        """Result of one part; a pure function, so a part may be sent again."""
        ...

    def merge(self, state: State, results: Sequence[Result]) -> State:
        """New state from the old one and the results that arrived: any subset, in any order, some twice. ``state`` itself is not changed."""
        ...


def run_rounds(
    method: RoundMethod[State, Part, Result],
    state: State,
    *,
    num_rounds: int,
    engine: Engine = inline,
    progress: Callable[[int, State], None] | None = None,
    stop: Callable[[State, State], bool] | None = None,
) -> State:
    """Split, work and merge up to ``num_rounds`` times and return the last state.

    Parameters
    ----------
    method : RoundMethod
        What the rounds do.
    state : Any
        Where to start; it is not changed.
    num_rounds : int
        Rounds to run, at least 1.
    engine : Engine, default=inline
        Where the parts run. Called once per round as ``engine(method, parts)``.
    progress : callable, optional
        Called after each round as ``progress(round_number, state)``; the first round has number 1.
    stop : callable, optional
        Called after each round as ``stop(state_before, state_after)``; True ends the run.

    Raises
    ------
    InputError
        When ``num_rounds`` is not an integer of at least 1.
    """
    check_at_least(num_rounds, 1, name="num_rounds")
    for round_number in range(1, num_rounds + 1):
        before, state = state, method.merge(state, engine(method, method.split(state)))
        if progress is not None:
            progress(round_number, state)
        if stop is not None and stop(before, state):
            break
    return state


def part_seed(seed: int, *, round_number: int, part: int) -> int:
    """Seed of the random generator of one part in one round, for ``numpy.random.default_rng`` or ``torch.Generator.manual_seed``.

    It depends on the three numbers only, so neither the order of the workers nor their place can change what a part draws.

    Parameters
    ----------
    seed : int
        Seed of the run, not negative.
    round_number : int
        0 for what is drawn before the first round, then 1, 2, ...
    part : int
        Index of the part.

    Examples
    --------
    >>> part_seed(0, round_number=1, part=2) == part_seed(0, round_number=2, part=1)
    False
    """
    import numpy as np  # late: importing this module stays light

    return int(np.random.SeedSequence((seed, round_number, part)).generate_state(1, np.uint64)[0])


def part_generator(seed: int, *, round_number: int, part: int) -> torch.Generator:
    """``torch.Generator`` with the seed of ``part_seed``."""
    import torch

    return torch.Generator().manual_seed(part_seed(seed, round_number=round_number, part=part))
