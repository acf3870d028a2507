"""What every method of this room is: settings that turn a model and calibration data into a plan."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.prune.plan import PrunePlan

__all__ = ["Data", "PruneMethod", "Report", "silent"]

Data: TypeAlias = "Tensor | Iterable[Any]"
"""Calibration data: a tensor with one row per input, or batches (tensors, (inputs, labels) pairs, mappings); a ``DataLoader`` is fine."""

Report = Callable[[str, int, int, str], None]


def silent(phase: str, done: int, total: int, note: str) -> None:
    """A report that tells nobody."""


@dataclass(frozen=True, kw_only=True)
class PruneMethod(abc.ABC):
    """Settings of a method; ``plan`` decides what goes, ``partwise.prune.apply`` takes it out."""

    @abc.abstractmethod
    def plan(self, model: nn.Module, data: Data | None = None, *, report: Report = silent) -> PrunePlan:
        """Decide what stays.

        Parameters
        ----------
        model : torch.nn.Module
            The model to prune. It is run in evaluation mode, and left as it was.
        data : Tensor or iterable, optional
            Calibration data. Methods that look at weights only need none.
        report : callable
            Told (phase, done, total, note) as the work goes on.
        """
