"""Local SGD: every worker trains the whole model alone for a while, then all are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partwise.checks import InputError
from partwise.models import Part
from partwise.train.method import SubnetMethod

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from partwise.models import Axis

__all__ = ["LocalSGD"]


@dataclass(frozen=True, kw_only=True)
class LocalSGD(SubnetMethod):
    """The whole model on every worker; after some local steps each parameter becomes the mean over the workers.

    The baseline of every method that splits the model: nothing is saved in memory, and each round sends 2 S P b bytes for S workers and P parameters of b
    bytes (three times that where AdamW's moments are carried). Its models were never trained to do without units, so it offers no tickets.

    References
    ----------
    Stich. Local SGD Converges Fast and Communicates Little. arXiv:1805.09767.

    Examples
    --------
    >>> LocalSGD(num_parts=2).deal((), [None, None])
    [Part(units={}, index=0), Part(units={}, index=1)]
    """

    def find_axes(self, model: nn.Module) -> tuple[Axis, ...]:
        """Nothing is split, whatever the model."""
        return ()

    def deal(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator]) -> list[Part]:
        """The whole model, once per generator."""
        return [Part({}, index=index) for index in range(len(generators))]

    def ticket_part(self, model: nn.Module, axes: Sequence[Axis], keep: float, generator: np.random.Generator) -> Part:
        """Refused: there is nothing that the model has learned to do without.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError(
            "no-tickets",
            f"got keep={keep} for a model trained by {type(self).__name__}, which splits nothing, expected a method that trains subnetworks. "
            "Train with TwIST, IST, ResIST or LoFT to cut tickets, or prune this model.",
        )
