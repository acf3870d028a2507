"""TwIST: train a transformer so that many of its subnetworks work on their own.

Attention is a sum over head groups, a feed-forward layer is a sum over blocks of neurons. A part holds some summands of every layer, trains them for a
while, and is put back: every parameter becomes the mean over the parts that held it. At the end a subnetwork of any size is cut out as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from partwise.checks import InputError, check_at_least, check_choice
from partwise.models.axes import Part
from partwise.models.names import locate
from partwise.models.sampling import FixedFractionSampler
from partwise.train.method import SubnetMethod

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from partwise.models.axes import Axis
    from partwise.train._rounds import SubnetRounds, SubnetState

__all__ = ["TwIST"]

logger = logging.getLogger(__name__)

Correction = Literal["inverse_keep", "inverse_sqrt_keep", "none"]
METRIC: Literal["fluctuation"] = "fluctuation"  # what sorted units are worth
NUM_BATCHES = 16  # that it is measured on
_EXPONENTS = {"inverse_keep": 1.0, "inverse_sqrt_keep": 0.5, "none": 0.0}


@dataclass(frozen=True, kw_only=True)
class TwIST(SubnetMethod):
    """Subnetworks of a transformer, made of head groups and blocks of feed-forward neurons of every layer.

    Left as it is, some parts hold the whole model and the others a size that they draw anew in every round, so that the whole model and tickets of all those
    sizes are good. With ``keep``, every part holds as much as it says and no worker needs the whole model; tickets of other sizes are then worse.

    Parameters
    ----------
    num_parts : int, default=1
        Subnetworks of a round, at least one for each worker. On one machine one is best: for the same number of tokens it makes the most steps, each of which
        builds on the one before.
    num_local_steps : int or tuple of int, default=10
        As few as the link allows; we measured 5 and 10.
    keep : float or tuple of float, optional
        Fraction of the head groups and of the blocks of every layer that a part holds, rounded to whole ones. A tuple has one for each part: workers of
        different size. Left out: ``num_whole`` and ``sizes`` say it.
    sizes : tuple of float, default=(0.25, 0.5, 0.75)
        Fractions of which a part draws one in each round, where ``keep`` does not say.
    num_whole : int, optional
        Parts that hold everything in every round, where ``keep`` does not say. Left out: half of them. A part that is alone draws from 1 and ``sizes``
        instead; with 0, from ``sizes``.
    choice : {"random", "nested"}, optional
        random: units are drawn anew for every part and every ticket, as in the paper. nested: a part holds the first units of every axis, so that each size
        lies within the larger ones, and a ticket is what was trained at its size. Left out: random with ``keep``,
        otherwise nested.
    whole_share : float, optional
        Share of the rounds, from the first, in which every part holds the whole model: one that starts from random weights wants most of them. Left out: 0,
        for a model that is trained already; the command line takes 0.7 where it starts from random weights.
    sort_units : bool, default=True
        When the rounds of whole models are over, put nested units into the order of what they are worth, measured on some batches of the training data. The
        model computes the same before and after. Asynchronous runs do it before their first round or not at all.
    num_blocks : int, default=16
        Blocks into which the neurons of a feed-forward layer are cut; it has to divide their number.
    correction : {"inverse_keep", "inverse_sqrt_keep", "none"}, optional
        What the sum over the kept units is multiplied by in a part: one over the kept fraction, so that its mean over all choices is the whole sum; the
        root of that, which keeps the second moment where summands are independent and centred; or nothing. Left out: inverse_keep for random units, none
        for nested ones, which are always the same.
    balanced : bool, default=True
        Deal one shuffle of random units round and round, so that no unit has more than one holder above any other. Otherwise each part draws for itself.
    pinned : tuple of str or int, default=()
        Layers that every part and every ticket holds whole: ``"first"``, ``"last"`` or numbers. Tickets then have layers of different sizes, which stock
        ``from_pretrained`` cannot read; ``load_ticket`` can.

    References
    ----------
    TwIST: Rigging the Lottery in Transformers with Independent Subnetwork Training. arXiv:2511.03983. From the paper: subnetworks of attention heads and
    feed-forward blocks are trained in parallel, averaged, and drawn anew; a correction of the activations; random subnetworks of the final model are used
    as they are. Its formulas and settings were not at hand: how units are dealt, the form of the correction and every default are ours. Parts that hold
    everything among smaller ones: Universally Slimmable Networks, arXiv:1903.05134. Nested units: MatFormer, arXiv:2310.07707.
    """

    num_parts: int = 1
    num_local_steps: int | tuple[int, ...] = 10
    keep: float | tuple[float, ...] | None = None
    sizes: tuple[float, ...] = (0.25, 0.5, 0.75)
    num_whole: int | None = None
    choice: Literal["random", "nested"] | None = None
    whole_share: float | None = None
    sort_units: bool = True
    num_blocks: int = 16
    correction: Correction | None = None
    balanced: bool = True
    pinned: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keep", "sizes", "pinned"):
            value = getattr(self, name)
            if isinstance(value, list):  # JSON has lists only
                object.__setattr__(self, name, tuple(value))
            elif name != "keep" and not isinstance(value, tuple):  # one alone
                object.__setattr__(self, name, (value,))
        for keep in (*self.sizes, *(self.keep if isinstance(self.keep, tuple) else () if self.keep is None else (self.keep,))):
            FixedFractionSampler(keep=keep)  # refuses fractions out of range
        if isinstance(self.keep, tuple) and len(self.keep) != self.num_parts:
            raise InputError(
                "keep-per-part",
                f"got {len(self.keep)} keep fractions for {self.num_parts} parts, expected one each. Pass {self.num_parts}, or one for all.",
            )
        if self.num_whole is not None:
            check_at_least(self.num_whole, 0, name="num_whole")
        if self.keep is None and (self._num_whole >= self.num_parts > 1 or not self.sizes):
            got = f"num_whole={self.num_whole} for {self.num_parts} parts" if self.sizes else "sizes=()"
            raise InputError("no-sizes", f"got {got}, expected parts that draw from at least one size. Lower num_whole, name sizes, or pass keep.")
        if self.choice is not None:
            check_choice(self.choice, ("random", "nested"), name="choice")
        largest = max(self.keep) if isinstance(self.keep, tuple) else self.keep or (1.0 if self._num_whole else max(self.sizes))
        if self._is_nested and largest < 1:
            raise InputError(
                "nested-without-whole",
                f"got choice='nested' where no part keeps more than {largest}, expected one that keeps everything: the last units would never be trained. "
                "Pass choice='random', or keep=1 for one part.",
            )
        if self.whole_share is not None and not 0 <= self.whole_share < 1:
            raise InputError(
                "whole-share", f"got whole_share={self.whole_share}, expected at least 0 and below 1. Pass 0.7 for a new model, 0 for a trained one."
            )
        check_at_least(self.num_blocks, 1, name="num_blocks")
        if self.correction is not None:
            check_choice(self.correction, tuple(_EXPONENTS), name="correction")

    def find_axes(self, model: nn.Module) -> tuple[Axis, ...]:
        """Head groups and feed-forward neurons of every layer that is not pinned; of a GPT-2 or GPT-NeoX only the neurons.

        Raises
        ------
        InputError
            When the model is no transformer whose layers are known, blocks do not divide its neurons, ``keep`` leaves a layer empty, or ``pinned``
            leaves nothing to split.
        """
        import numpy as np

        from partwise.models import coupled_axes

        axes = tuple(axis for axis in coupled_axes(model) if axis.kind in ("heads", "neurons"))
        if not hasattr(model, "config") or not axes:
            raise InputError(
                "not-a-transformer",
                f"got a {type(model).__name__}, expected a transformer with head groups and feed-forward neurons. Use IST for perceptrons, LoFT or ResIST "
                "for convolutional networks.",
            )
        if not any(axis.kind == "heads" for axis in axes):
            logger.warning(
                "The heads of a %s stay whole in every part: its configuration cannot describe a model that lost some.", type(model).__name__
            )
        self._check_blocks(axes)
        split = self._without_pinned(axes)
        # Dealt once in vain, so that a fraction that leaves a layer empty is refused here and not in the first round.
        fractions = self.keep if isinstance(self.keep, tuple) else self.sizes if self.keep is None else (self.keep,)
        self._dealt(split, [np.random.default_rng(0) for _ in fractions], fractions, balanced=False)
        return split

    def is_whole_round(self, round_number: int, num_rounds: int) -> bool:
        """Whether this round belongs to the first share, in which nothing is split."""
        return round_number <= self._num_whole_rounds(num_rounds)

    def between_rounds(self, state: SubnetState, rounds: SubnetRounds) -> SubnetState:
        """Nested units in the order of their worth, once the rounds of whole models are over."""
        due = state.round_number == self._num_whole_rounds(rounds.num_rounds) and not (rounds.is_async and state.round_number)
        if not (due and self._is_nested and self.sort_units):
            return state
        from partwise.train._scores import order_of, sorted_tensors, unit_scores

        batches = rounds.batches.sample(NUM_BATCHES)
        if not batches:  # an empty loader, which the first round refuses
            return state
        from partwise.train._local import with_threads

        with with_threads(rounds.num_threads):
            scores = unit_scores(rounds.whole_model(state), rounds.axes, batches, metrics=(METRIC,))[METRIC]
        orders = order_of(scores)
        return replace(
            state,
            tensors=sorted_tensors(state.tensors, rounds.axes, orders),
            optimizer={slot: sorted_tensors(of_slot, rounds.axes, orders) for slot, of_slot in state.optimizer.items()},
            holders={name: held[orders[name]] if name in orders else held for name, held in state.holders.items()},
        )

    def deal(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator]) -> list[Part]:
        """One part per generator."""
        return self._dealt(axes, generators, self._fractions(generators), balanced=self.balanced)

    def factors(self, axes: Sequence[Axis], part: Part) -> dict[str, float]:
        """One over the kept fraction, or its root, for every axis that a part does not hold whole."""
        exponent = _EXPONENTS[self.correction or ("none" if self._is_nested else "inverse_keep")]
        shares = {axis.name: axis.size / len(part.units[axis.name]) for axis in axes if axis.name in part.units}
        return {name: share**exponent for name, share in shares.items() if share != 1 and exponent}

    def ticket_part(self, model: nn.Module, axes: Sequence[Axis], keep: float, generator: np.random.Generator) -> Part:
        """Head groups and blocks as parts get them, as many in every layer; of head groups the nearest number that the model's configuration class loads."""
        import numpy as np

        # The sampler refuses a fraction that leaves nothing before the nearest loadable number could hide it.
        self._dealt(axes, [np.random.default_rng(0)], (keep,), balanced=False)
        units: dict[str, tuple[int, ...]] = {}
        for axis in axes:
            kept = _loadable_groups(model, axis, keep) / axis.size if axis.kind == "heads" else keep
            [part] = self._dealt([axis], [generator], (kept,), balanced=False)
            units.update(part.units)
        return Part(units)

    @property
    def _is_nested(self) -> bool:
        return self.choice == "nested" if self.choice is not None else self.keep is None

    @property
    def _num_whole(self) -> int:
        return max(1, self.num_parts // 2) if self.num_whole is None else self.num_whole

    def _fractions(self, generators: Sequence[np.random.Generator]) -> tuple[float, ...]:
        """What each part keeps in a round."""
        if self.keep is not None:
            return self.keep if isinstance(self.keep, tuple) else (self.keep,) * len(generators)
        if len(generators) == 1:
            return (float(generators[0].choice((*((1.0,) if self._num_whole else ()), *self.sizes))),)
        return tuple(1.0 if part < self._num_whole else float(generator.choice(self.sizes)) for part, generator in enumerate(generators))

    def _dealt(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator], keep: tuple[float, ...], *, balanced: bool) -> list[Part]:
        """One part for each generator and fraction."""
        units: list[dict[str, tuple[int, ...]]] = [{} for _ in generators]
        for axis in axes:  # one by one, for layers of an uneven model differ in size
            width = {} if axis.kind == "heads" else {axis.kind: axis.size // self.num_blocks}
            parts = FixedFractionSampler(keep=keep, block_size=width, balanced=balanced)([axis], generators)
            for mine, part in zip(units, parts, strict=True):
                held = part.units[axis.name]
                mine[axis.name] = tuple(range(len(held))) if self._is_nested else held
        return [Part(mine, index=index) for index, mine in enumerate(units)]

    def _num_whole_rounds(self, num_rounds: int) -> int:
        return min(round((self.whole_share or 0.0) * num_rounds), num_rounds - 1)  # never all of them

    def _check_blocks(self, axes: Sequence[Axis]) -> None:
        from partwise.linalg.partition import nearest_divisors

        for axis in axes:
            if axis.kind == "neurons" and axis.size % self.num_blocks:
                nearest = " or ".join(str(number) for number in nearest_divisors(axis.size, self.num_blocks))
                raise InputError(
                    "blocks-do-not-divide",
                    f"got num_blocks={self.num_blocks} for the {axis.size} neurons of {axis.name}, expected a number that divides {axis.size}. "
                    f"The nearest is {nearest}.",
                )

    def _without_pinned(self, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        layers = sorted({layer for axis in axes if (layer := locate(axis.name)[0]) is not None})
        places = {"first": layers[0], "last": layers[-1], **{str(layer): layer for layer in layers}}
        for name in self.pinned:
            if str(name) not in places:
                raise InputError(
                    "unknown-layer",
                    f"got {name!r} in pinned, expected 'first', 'last' or layers from {layers[0]} to {layers[-1]}. Name layers of this model.",
                )
        whole = {places[str(name)] for name in self.pinned}
        split = tuple(axis for axis in axes if locate(axis.name)[0] not in whole)
        if not split:
            raise InputError(
                "all-layers-pinned",
                f"got all {len(layers)} layers in pinned, expected at least one to split. Pin fewer, or use LocalSGD to split nothing.",
            )
        return split


def _loadable_groups(model: Any, axis: Axis, keep: float) -> int:
    """The number of head groups nearest to a fraction with which the configuration's own class loads; the smaller of two."""
    from partwise.models.uneven import nearest_allowed

    wanted = keep * axis.size
    queries = model.config.num_attention_heads // axis.size
    nearest = nearest_allowed(model.config, lambda number: {"num_attention_heads": number * queries}, wanted=int(wanted + 0.5), largest=axis.size)
    return min(nearest, key=lambda number: (abs(number - wanted), number))
