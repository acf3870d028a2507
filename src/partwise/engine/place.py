"""Where the parts of a run work, as its flags say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Place"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the parts run. In synchronous rounds none of this changes the result, so a run may go on elsewhere.

    Parameters
    ----------
    engine : str
        inline: in this process. ray: in workers, on this machine or on a cluster.
    num_workers : int or None
        Workers. Left out: one per core, at most one per part.
    address : str or None
        Address of a Ray cluster that runs already: auto, or ray://host:port. Left out: one is started on this machine.
    timeout : float or None
        Seconds after which the parts of a Ray worker that does not answer are sent to a fresh one too; when they are late three times the run ends.
        Left out: ten times what the slowest answer took and at least a minute, and the run does not end.
    """

    engine: Literal["inline", "ray"] = "inline"
    num_workers: int | None = None
    address: str | None = None
    timeout: float | None = None
