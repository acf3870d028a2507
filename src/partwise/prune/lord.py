"""LoRD: two thin layers in the place of one, in the directions in which its outputs lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partwise.checks import InputError, check_at_least
from partwise.prune._calibration import batches_of, count_inputs
from partwise.prune._linear_layers import Found, LayerSize, find_layers, look_at_outputs
from partwise.prune._shared_ranks import share_ranks
from partwise.prune.low_rank import LowRankPlan, projected_tensors
from partwise.prune.method import PruneMethod, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from partwise.models.walks import Batch
    from partwise.prune.method import Data, Report

__all__ = ["LoRD"]

BUDGETS = ("keep", "energy", "rank", "max_parameters", "max_bytes")


@dataclass(frozen=True, kw_only=True)
class LoRD(PruneMethod):
    """Two thin layers for one, in the directions in which its outputs lie; forward passes only.

    A layer ``y = W x + b`` whose outputs lie close to ``rank`` directions ``Q`` becomes ``Q (Q' W x)`` plus a bias, dense and trainable. ``Q`` are the top
    eigenvectors of the covariance of real outputs, so the choice knows the inputs that the layer gets, which the singular vectors of ``W`` do not. Outside
    of ``Q`` the output is set to its mean. A layer without bias gets none: its directions are those of the second moment around zero, and outside of them
    the output is 0.

    Layers are done in order, each on what those before it pass on as they are now. The budget is one of ``keep``, ``energy``, ``rank``, ``max_parameters``
    and ``max_bytes``; without any, half of the parameters of the layers stay. Ranks are dealt to layers so that the share of energy lost, added up over
    layers, is low; that takes one more pass over the calibration data, as does no other budget. A layer for which two thin ones would have as many parameters
    stays whole.

    Parameters
    ----------
    keep : float or None
        Fraction of the parameters of the linear layers that stays, above 0 and at most 1; biases are not counted.
    energy : float or None
        Share of the energy of the outputs that every layer keeps, above 0 and at most 1; energy is variance, around zero where there is no bias.
    rank : int or None
        Rank of every layer.
    max_parameters : int or None
        Parameters that the small model has at most.
    max_bytes : int or None
        Bytes that its weights have at most.
    layers : tuple of str
        Which layers: names, or patterns of names ("*.mlp.*"). Left out: every linear layer inside the blocks of a model of transformers; of another network,
        every linear layer but those that give its outputs.
    round_to : int
        Ranks are multiples of this, except with ``rank``; 8 suits many kernels. Where ranks are dealt, also of 1/256 of the highest that saves anything.
    force : bool
        With ``energy`` or ``rank``: make layers thin also where that costs more parameters than it saves.
    recalibrate : bool
        Look at each layer behind the thin layers before it. Otherwise behind the whole ones.

    References
    ----------
    LoRD. arXiv:2309.14021. We could read its abstract only; the algorithm is ours, and so is the way in which ranks are dealt.
    """

    keep: float | None = None
    energy: float | None = None
    rank: int | None = None
    max_parameters: int | None = None
    max_bytes: int | None = None
    layers: tuple[str, ...] = ()
    round_to: int = 1
    force: bool = False
    recalibrate: bool = True

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError("two-budgets", f"got {' and '.join(given)}, expected one budget. Leave the others out.")
        for name in ("keep", "energy"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError("keep-range", f"got {name}={value}, expected a fraction above 0 and at most 1. Pass 0.5 to keep half.")
        for name in ("rank", "max_parameters", "max_bytes"):
            if getattr(self, name) is not None:
                check_at_least(getattr(self, name), 1, name=name)
        check_at_least(self.round_to, 1, name="round_to")
        if self.force and self._shares_ranks:
            raise InputError("force-saves-nothing", "got force with a budget of parameters, which it could only waste, expected energy or rank. Leave it out.")

    @property
    def _shares_ranks(self) -> bool:
        """Whether one budget is for all layers together."""
        return self.energy is None and self.rank is None

    def plan(self, model: nn.Module, data: Data | None = None, *, report: Report = silent) -> LowRankPlan:
        """Decide which layers become thin, and in which directions; see `PruneMethod.plan`.

        Raises
        ------
        InputError
            ``no-linear-layers``, ``unknown-layer``, ``unsupported-layer``, ``already-low-rank`` or ``torn-ties`` for layers; ``no-calibration``;
            ``too-few-samples`` where fewer outputs were seen than directions are to be chosen; ``rank-saves-nothing``, ``budget-too-small``; ``not-finite``
            naming the module.
        """
        sizes = find_layers(model, self.layers)
        batches = batches_of(model, data)
        choose = self._rank_of
        if self._shares_ranks:
            seen: dict[str, Found] = {}
            _go_through(model, sizes, batches, lambda found, size: None, report, phase="measuring", seen=seen)
            dealt = share_ranks(self, model, {name: found.shares for name, found in seen.items()}, sizes)
            sizes = {name: size for name, size in sizes.items() if dealt[name] is not None}

            def choose(found: Found, size: LayerSize) -> int | None:
                return dealt[found.name]

        chosen = _go_through(model, sizes, batches, choose, report, phase="pruning", replace=self.recalibrate) if sizes else {}
        if self.rank is not None and not chosen:
            self._refuse_rank(sizes)
        return LowRankPlan(
            method=repr(self),
            num_tokens=sum(map(count_inputs, batches)),
            bases={name: found.basis for name, found in chosen.items()},
            inputs={name: sizes[name].inputs for name in chosen},
            means={name: found.mean for name, found in chosen.items() if found.mean is not None},
            shares={name: found.shares for name, found in chosen.items()},
        )

    def _rank_of(self, found: Found, size: LayerSize) -> int | None:
        """Of one layer, where every layer is judged by itself; None where it stays whole."""
        if self.rank is not None:
            rank = min(self.rank, size.highest) if self.force else self.rank
        else:
            assert self.energy is not None
            lacking = found.shares.cumsum(0) < self.energy - 1e-12
            rank = min(-(-(int(lacking.sum()) + 1) // self.round_to) * self.round_to, size.highest)
        return rank if self.force or rank <= size.break_even else None

    def _refuse_rank(self, sizes: Mapping[str, LayerSize]) -> None:
        name, size = max(sizes.items(), key=lambda item: item[1].break_even)
        raise InputError(
            "rank-saves-nothing",
            f"got rank={self.rank}, but two thin layers save parameters up to rank {size.break_even} only in {name} ({size.inputs} inputs, {size.outputs} "
            f"outputs), and no higher in the other {len(sizes) - 1} layers. Pass a lower rank, or force=True to do it all the same.",
        )


def _go_through(
    model: nn.Module,
    sizes: Mapping[str, LayerSize],
    batches: Sequence[Batch],
    choose: Callable[[Found, LayerSize], int | None],
    report: Report,
    *,
    phase: str,
    replace: bool = False,
    seen: dict[str, Found] | None = None,
) -> dict[str, Found]:
    """Look at one layer after the other; the chosen directions of those that become thin.

    Parameters
    ----------
    choose : callable
        Rank of a layer, or None where it stays whole.
    phase : str
        For the report.
    replace : bool
        Let later layers see what a thin layer passes on.
    seen : dict, optional
        Filled with the shares of every layer, without directions.
    """
    import dataclasses

    import torch

    from partwise.models.walks import start_walk

    chosen: dict[str, Found] = {}
    with start_walk(model, [size.axis for size in sizes.values()], batches) as walk:
        for number, found in enumerate(look_at_outputs(walk)):
            report(phase, number, len(sizes), found.name)
            if seen is not None:
                seen[found.name] = dataclasses.replace(found, basis=torch.empty(0))
            rank = choose(found, sizes[found.name])
            if rank is None:
                continue
            if found.count < rank:
                raise InputError(
                    "too-few-samples",
                    f"got {found.count} outputs of {found.name} to choose {rank} directions from, expected at least as many. Pass more calibration data, or a "
                    "smaller budget.",
                )
            chosen[found.name] = dataclasses.replace(found, basis=found.basis[:, :rank].clone())
            if replace:
                layer = model.get_submodule(found.name)
                walk.replace(projected_tensors(layer, found.name, chosen[found.name].basis, found.mean))  # type: ignore[arg-type]
    report(phase, len(sizes), len(sizes), "")
    return chosen
