"""The part ledger: one row per part with where it sits, what it costs, what it is worth and what happened to it.

Every result carries one. It is built here; ``partwise.report`` renders it for the terminal, the model card and the report.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from partwise.checks import InputError

__all__ = ["Ledger", "ModuleTotal", "Part", "Status"]

Status = Literal["kept", "grown", "dropped", "lost", "late"]
STATUSES: tuple[Status, ...] = get_args(Status)
PRESENT: frozenset[Status] = frozenset({"kept", "grown", "late"})


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a result: a rank-one component, a head, an expert.

    Parameters
    ----------
    where : str
        The module it belongs to, as in ``model.named_modules()``.
    index : int
        Its number inside the module, from 0.
    parameters, bytes : int
        What it costs when it is saved.
    score : float or None
        What it is worth, in the unit of the method that made it; None where nothing was measured.
    status : str
        ``kept`` (there from the start), ``grown`` (added on the way), ``late`` (its result came late and was used), ``dropped`` (not worth its cost),
        ``lost`` (its worker never answered). The first three are in the result.
    """

    where: str
    index: int
    parameters: int
    bytes: int
    score: float | None
    status: Status

    @property
    def is_present(self) -> bool:
        """Whether the part is in the result."""
        return self.status in PRESENT


@dataclass(frozen=True)
class ModuleTotal:
    """The parts of one module, or of a whole ledger, taken together.

    Parameters
    ----------
    where : str
        The module; empty for a whole ledger.
    rank : int
        Number of parts that are in the result.
    score : float or None
        Sum of their scores; None when none of them has one.
    parameters, bytes : int
        Their cost.
    statuses : dict of str to int
        Number of parts of each status, those that are not in the result included.
    """

    where: str
    rank: int
    score: float | None
    parameters: int
    bytes: int
    statuses: dict[Status, int]


@dataclass(frozen=True)
class Ledger:
    """All parts of a result.

    Parameters
    ----------
    parts : tuple of Part
        In the order of the model's modules.

    Examples
    --------
    >>> ledger = Ledger((Part(where="a.q", index=0, parameters=8, bytes=32, score=0.5, status="kept"),
    ...                  Part(where="a.q", index=1, parameters=8, bytes=32, score=0.1, status="dropped")))
    >>> (ledger.total.rank, ledger.total.parameters, ledger.total.statuses)
    (1, 8, {'kept': 1, 'dropped': 1})
    """

    parts: tuple[Part, ...]

    @property
    def total(self) -> ModuleTotal:
        """The whole ledger taken together."""
        return _total("", self.parts)

    def by_module(self) -> tuple[ModuleTotal, ...]:
        """One total per module, in the order in which modules first occur."""
        groups: dict[str, list[Part]] = {}
        for part in self.parts:
            groups.setdefault(part.where, []).append(part)
        return tuple(_total(where, parts) for where, parts in groups.items())

    def to_json(self) -> list[dict[str, Any]]:
        """One JSON object per part."""
        return [dataclasses.asdict(part) for part in self.parts]

    @classmethod
    def from_json(cls, rows: Sequence[dict[str, Any]]) -> Ledger:
        """The ledger that `to_json` came from. Fields that a later version added are ignored.

        Raises
        ------
        InputError
            ``ledger-malformed`` naming the row that lacks a field or has a wrong value.
        """
        return cls(tuple(_part(number, row) for number, row in enumerate(rows)))


FIELDS = tuple(field.name for field in dataclasses.fields(Part))


def _part(number: int, row: dict[str, Any]) -> Part:
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise InputError(
            "ledger-malformed", f"row {number} of the ledger is {row}: it lacks {', '.join(missing)}. Make the ledger with Ledger.to_json."
        )
    part = Part(**{name: row[name] for name in FIELDS})
    kinds: dict[str, Any] = {"where": str, "index": int, "parameters": int, "bytes": int, "score": (int, float, type(None)), "status": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(row[name], kind)]
    if wrong or part.status not in STATUSES:
        raise InputError(
            "ledger-malformed",
            f"row {number} of the ledger is {row}: expected a text in where, whole numbers in index, parameters and bytes, a number or null in score, "
            f"and one of {', '.join(STATUSES)} in status. Make the ledger with Ledger.to_json.",
        )
    return part


def _total(where: str, parts: Iterable[Part]) -> ModuleTotal:
    parts = tuple(parts)
    present = [part for part in parts if part.is_present]
    scores = [part.score for part in present if part.score is not None]
    counts = Counter(part.status for part in parts)
    return ModuleTotal(
        where=where,
        rank=len(present),
        score=sum(scores) if scores else None,
        parameters=sum(part.parameters for part in present),
        bytes=sum(part.bytes for part in present),
        statuses={status: counts[status] for status in STATUSES if counts[status]},
    )
