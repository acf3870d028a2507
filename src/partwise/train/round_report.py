"""What a round was: who trained what, what it cost, what it changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partwise.ledger import Ledger, Part

__all__ = ["PartReport", "RoundReport", "ledger_of"]


@dataclass(frozen=True)
class PartReport:
    """One part in one round.

    Parameters
    ----------
    index : int
        Number of the part.
    parameters, bytes : int
        What the part holds: entries of its tensors, and what is sent one way, the optimiser's moments included where they are carried.
    num_steps : int
        Local steps; 0 when it was lost.
    loss_after_split, loss_after_local : float or None
        Loss of the subnetwork on its first batch, before its first step and after its last; None where it was not measured.
    was_lost : bool
        Whether its result never came.
    """

    index: int
    parameters: int
    bytes: int
    num_steps: int
    loss_after_split: float | None
    loss_after_local: float | None
    was_lost: bool = False


@dataclass(frozen=True)
class RoundReport:
    """One round; in asynchronous runs, one arrival.

    Parameters
    ----------
    round_number : int
        From 1.
    num_parts, num_arrived : int
        Parts sent, and results merged.
    num_steps, num_samples : int
        Local steps and rows of all parts together.
    seconds : float
        Since the round before.
    bytes_down, bytes_up : int
        Tensors sent to the parts and back. What an engine adds to that is in its own count.
    coverage : float
        Share of the units of all split axes that some part held; 1 where nothing is split.
    loss_after_split, loss_after_local, loss_after_merge : float or None
        Mean loss on the parts' first batches: of the subnetworks before and after their steps, and of the whole model then.
    parts : tuple of PartReport
        Every part.
    """

    round_number: int
    num_parts: int
    num_arrived: int
    num_steps: int
    num_samples: int
    seconds: float
    bytes_down: int
    bytes_up: int
    coverage: float
    loss_after_split: float | None
    loss_after_local: float | None
    loss_after_merge: float | None
    parts: tuple[PartReport, ...]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self) | {"parts": [dataclasses.asdict(part) for part in self.parts]}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> RoundReport:
        """The report that `to_json` came from; what else is in the row is ignored."""
        named = {field.name: row[field.name] for field in dataclasses.fields(cls)}
        return cls(**named | {"parts": tuple(PartReport(**part) for part in row["parts"])})


def ledger_of(history: Sequence[RoundReport]) -> Ledger:
    """A row for every part of every round: what it held, and how far its steps lowered its loss."""
    return Ledger(
        tuple(
            Part(
                where=f"round {report.round_number}",
                index=part.index,
                parameters=part.parameters,
                bytes=part.bytes,
                score=None if part.loss_after_split is None or part.loss_after_local is None else part.loss_after_split - part.loss_after_local,
                status="lost" if part.was_lost else "kept",
            )
            for report in history
            for part in report.parts
        )
    )
