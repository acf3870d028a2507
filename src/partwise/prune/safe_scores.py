"""What the parts of a model do, and therefore how they may be pruned: some remember, others are computed anew for every token."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from partwise.models.axes import BlockAxis
from partwise.prune._calibration import batches_of
from partwise.prune.method import silent
from partwise.prune.unit_method import visits_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.models.axes import CoupledAxis
    from partwise.prune.method import Data
    from partwise.prune.unit_method import Visit

__all__ = ["SafeScore", "advise", "safe_score"]

# Of the feed-forward neurons of a language model, the share that has to stay before `advise` warns. Our choice: the source says "high sparsity" only.
SAFE_KEEP = 0.5
# The same for groups of heads. Half of them gone ruined a small Llama, whatever chose them; see docs/claims.md.
SAFE_HEADS = 0.75
RULES = {
    "states": ("ghost", "Remove for good, by what a state adds to the outputs. It is part of what the model knows of the text so far, large or small."),
    "heads": ("wanda", "Remove for good, with kinds=('heads',), by what a head adds to the outputs. Its keys and values are held for every token."),
    "neurons": (
        "greedy",
        "Better skipped token by token, by size, than removed for good: different tokens need different neurons. If some must go, few, by what they add.",
    ),
    "units": ("greedy", "Remove for good, by what a unit adds to the outputs, and train on. There are no tokens for which it could be skipped."),
}


@dataclass(frozen=True, kw_only=True)
class SafeScore:
    """What one row of parts does, and what follows for pruning it.

    Parameters
    ----------
    where : str
        Axis, as plans name it.
    kind : str
        "states", "heads", "neurons" or "filters".
    role : {"remembers", "recomputes"}
        remembers: carries something from token to token while the model writes. recomputes: is computed anew for every token or input.
    rule : str
        How to prune it, in words.
    method : str
        The name of the method to begin with, as in ``METHODS``.
    correlation : float or None
        Spearman's rank correlation between the size of the units, ``E|a_j|``, and their impact on what the layer behind passes on,
        ``E|a_j| * ||W[:, j]||``. 1: size alone ranks the units as their impact does. At 0 or below size is no safe score here. None without data, for states,
        which no layer reads, and where all units have one size or one impact.
    """

    where: str
    kind: str
    role: Literal["remembers", "recomputes"]
    rule: str
    method: str
    correlation: float | None = None


def safe_score(model: nn.Module, data: Data | None = None) -> tuple[SafeScore, ...]:
    """Tell for every layer which of its parts remember and which are recomputed, and whether size is a safe score for them.

    Parts that carry memory (states of Mamba2, keys and values of attention) can be removed for good, if they are scored by their effect on the output. Parts
    that are computed anew for every token (feed-forward neurons) matter for some tokens and not for others, so that removing them for good costs more.

    Parameters
    ----------
    model : torch.nn.Module
        Of a family that can be cut. It is run in evaluation mode, and left as it was.
    data : Tensor or iterable, optional
        Calibration data, as for a method. With them each row of neurons, filters or heads gets its correlation.

    Returns
    -------
    tuple of SafeScore
        One for each axis that can be pruned, in the order of the layers.

    Raises
    ------
    InputError
        ``unknown-model``, and with data ``no-calibration``, ``calibration-data`` and ``not-finite``.

    References
    ----------
    GHOST and its companion notes on when magnitude is safe. arXiv:2602.11408, and magnitude_safety.html in https://github.com/akyrillidis/aiowls.
    """
    from partwise.models import coupled_axes

    axes = [axis for axis in coupled_axes(model) if not isinstance(axis, BlockAxis)]
    correlations: dict[str, float | None] = {}
    read = [axis for axis in axes if axis.readers]
    if data is not None and read:
        with contextlib.closing(visits_of(model, read, batches_of(model, data), {}, None, silent)) as visits:
            correlations = {visit.axis.name: rank_correlation(*_sizes_and_impacts(visit)) for visit in visits}
    writes = getattr(getattr(model, "config", None), "use_cache", None) is not None  # a model that writes text has a cache
    return tuple(_record(axis, writes, correlations.get(axis.name)) for axis in axes)


def advise(parts: Sequence[SafeScore], *, keep: float, kinds: Sequence[str] = ("neurons",)) -> tuple[str, ...]:
    """What speaks against removing units for good, in words; nothing where nothing does.

    Parameters
    ----------
    parts : sequence of SafeScore
        From `safe_score`.
    keep : float
        Fraction of the units that is to stay.
    kinds : sequence of str, default=("neurons",)
        Kinds of units that are to be cut.

    Returns
    -------
    tuple of str
        One warning where less than half of the feed-forward neurons of a language model are to stay, one where less than three quarters of the heads are,
        and one where size misleads.
    """
    cut = [part for part in parts if part.kind in kinds]
    per_token = [part for part in cut if part.rule == RULES["neurons"][1]]
    found = []
    if per_token and keep < SAFE_KEEP:
        found.append(
            f"{1 - keep:.0%} of the feed-forward neurons would go for good in {len(per_token)} layers. They are computed anew for every token, and tokens need "
            f"different ones: expect a much worse model unless it is trained on. Keep at least {SAFE_KEEP:.0%}, or cut states or heads."
        )
    heads = [part for part in cut if part.kind == "heads"]
    if heads and keep < SAFE_HEADS:
        found.append(
            f"{1 - keep:.0%} of the groups of heads would go in {len(heads)} layers. Expect a much worse model unless it is trained on. Keep at least "
            f"{SAFE_HEADS:.0%}, or make the layers thin with lord, which leaves the heads."
        )
    misleading = [part for part in cut if part.correlation is not None and part.correlation <= 0]
    if misleading:
        found.append(
            f"In {len(misleading)} of {len(cut)} layers, {misleading[0].where} for one, large activations do not go with a large impact on the output. Do not "
            "choose by size there; use a method that looks at what reads the units."
        )
    return tuple(found)


def rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """Spearman's: Pearson's of the ranks, equal values share the mean of their ranks. None where one of the two is constant."""
    ranks = [_ranks(values) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    norms = [float(rank.norm()) for rank in centred]
    return None if min(norms) == 0 else float(centred[0] @ centred[1]) / (norms[0] * norms[1])


def _ranks(values: Tensor) -> Tensor:
    """(values,), float64, from 0."""
    import torch

    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    middles: Tensor = counts.cumsum(0).double() - (counts + 1) / 2  # (different values,)
    return middles[places]


def _sizes_and_impacts(visit: Visit) -> tuple[Tensor, Tensor]:
    """For each unit the mean size of its activations, and of what they add behind the layers that read them, both (units,), float64."""
    import torch

    totals: dict[str, Tensor] = {}
    places: dict[str, int] = {}

    def add(reader: str, values: Tensor) -> None:
        rows = values.movedim(1, -1) if values.ndim == 4 else values  # images: (rows, height, width, channels)
        rows = rows.flatten(0, -2).abs().double()  # (places, entries)
        totals[reader] = totals.get(reader, 0) + rows.sum(0)
        places[reader] = places.get(reader, 0) + len(rows)

    visit.show_reader_inputs(add)
    sizes, impacts = torch.zeros(2, visit.axis.size, dtype=torch.float64)
    for reader, total in totals.items():
        means = total / places[reader]  # (entries,)
        norms = visit.reader_weight(reader).flatten(1).norm(dim=1)  # (entries,)
        sizes += means.view(visit.axis.size, -1).sum(1).cpu()
        impacts += (means * norms).view(visit.axis.size, -1).sum(1).cpu()
    return sizes, impacts


def _record(axis: CoupledAxis, writes: bool, correlation: float | None) -> SafeScore:
    remembers = axis.kind == "states" or (axis.kind == "heads" and writes)
    method, rule = RULES[axis.kind if remembers or (axis.kind == "neurons" and writes) else "units"]
    return SafeScore(
        where=axis.name, kind=axis.kind, role="remembers" if remembers else "recomputes", rule=rule, method=method, correlation=correlation
    )
