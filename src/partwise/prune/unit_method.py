"""Methods that take out units of axes: score -> select -> slice, one axis after the other, each on what the pruned layers before it pass on."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from partwise.checks import InputError, check_at_least, check_choice
from partwise.models.axes import BlockAxis, Part
from partwise.prune._budget import check_sizes, count_units
from partwise.prune._calibration import batches_of, count_inputs
from partwise.prune._choosing import best_units, protected_units
from partwise.prune.method import PruneMethod, silent
from partwise.prune.plan import UnitPlan, spread_factors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.models.axes import CoupledAxis
    from partwise.models.walks import Batch, Hook, Walk
    from partwise.prune.method import Data, Report

__all__ = ["Choice", "Steps", "UnitMethod", "Visit", "visits_of"]

KINDS = ("states", "neurons", "filters", "heads")
LIMITS = ("max_parameters", "max_bytes", "max_state_bytes")


@dataclass(frozen=True)
class Visit:
    """One axis, while the calibration data are there.

    Parameters
    ----------
    model : torch.nn.Module
        The whole model.
    axis : CoupledAxis
        Whose units are to be scored.
    tensors : mapping of str to Tensor
        All tensors of the whole model by name.
    walk : Walk or None
        Where the data are; None for methods that need none there.
    prepared : mapping of str to Tensor
        What `UnitMethod.prepare` returned.
    """

    model: nn.Module
    axis: CoupledAxis
    tensors: Mapping[str, Tensor]
    walk: Walk | None
    prepared: Mapping[str, Tensor] = field(default_factory=dict)

    def show(self, *, inputs: Mapping[str, Hook] | None = None, outputs: Mapping[str, Hook] | None = None) -> None:
        """Run the place once and show what modules get and give; see `partwise.models.walks.Walk.observe`."""
        assert self.walk is not None, "a method that looks at activations says so in WALKS"
        self.walk.observe(self.axis, inputs=inputs, outputs=outputs)

    def show_reader_inputs(self, hook: Callable[[str, Tensor], None]) -> None:
        """Show what the layers that read the units get: name of the reader's weight, and its input without padded tokens, (tokens, entries) or images.

        Raises
        ------
        InputError
            ``no-readers`` where something other than a layer reads the units.
        """
        if not self.axis.readers:
            raise InputError(
                "no-readers",
                f"no layer reads the {self.axis.kind} of {self.axis.name}, expected neurons, filters or heads. Prune states with ghost, magnitude, random or "
                "taylor.",
            )
        self.show(inputs={reader.rpartition(".")[0]: _without_padding(reader, hook) for reader in self.axis.readers})

    def reader_weight(self, reader: str) -> Tensor:
        """A reader's weight in float64 with its inputs first: (entries, outputs), or (entries, outputs, height, width) for a convolution."""
        [member] = [member for member in self.axis.members if member.tensor == reader]
        return self.tensors[reader].detach().double().movedim(member.dim, 0)


def _without_padding(reader: str, hook: Callable[[str, Tensor], None]) -> Hook:
    def show(values: Tensor, batch: Batch) -> None:
        if batch.real is not None and values.ndim == 3 and values.shape[:2] == batch.real.shape:
            values = values[batch.real]  # (tokens, entries)
        hook(reader, values)

    return show


@dataclass(frozen=True)
class Choice:
    """What a method decides for one axis.

    Parameters
    ----------
    units : tuple of int
        What stays, lowest first.
    scores : Tensor of shape (units of the axis,), float64
        What each unit is worth.
    factors : Tensor of shape (kept,), optional
        What readers multiply a kept unit by.
    """

    units: tuple[int, ...]
    scores: Tensor
    factors: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class UnitMethod(PruneMethod):
    """Take whole units out of a model, so that what stays is a smaller dense model.

    A subclass writes `score`. All the rest is here: budgets, what must stay, and the walk from layer to layer. The budget is one of ``keep``,
    ``max_parameters``, ``max_bytes`` and ``max_state_bytes``; without any, half of the units stay.

    Parameters
    ----------
    keep : float or None
        Fraction of the units that stays, above 0 and at most 1, rounded to whole units, halves up.
    max_parameters : int or None
        Parameters that the small model has at most.
    max_bytes : int or None
        Bytes that its weights have at most.
    max_state_bytes : int or None
        Bytes that a sequence holds at most while the model writes: recurrent states, or keys and values of 1,024 tokens.
    scope : {"layer", "model"}
        layer: the same fraction of every axis. model: the best units of the whole model, by their score beside the mean score of their axis; needs one more
        pass over the calibration data, and the layers of the result differ in size.
    round_to : int
        The number of units that stay is a multiple of this, in every group of an axis; 8 suits many kernels.
    protect : tuple of str
        What stays whatever it scores: patterns of axis names ("*.layers.0.*"), which stay whole, or axis names with units ("...layers.3.mlp:0,4-7").
    kinds : tuple of str
        Kinds of units: states, neurons, filters, heads. Left out: those that the method is for, as far as the model has them.
    recalibrate : bool
        Score each layer on what the pruned layers before it pass on. Otherwise on what the whole model passes on.
    """

    DEFAULT_KINDS: ClassVar[tuple[str, ...]] = ("states", "neurons", "filters")
    NEEDS_DATA: ClassVar[bool] = True  # calibration data
    WALKS: ClassVar[bool] = True  # looks at activations of one layer after the other

    keep: float | None = None
    max_parameters: int | None = None
    max_bytes: int | None = None
    max_state_bytes: int | None = None
    scope: Literal["layer", "model"] = "layer"
    round_to: int = 1
    protect: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    recalibrate: bool = True

    def __post_init__(self) -> None:
        given = [name for name in ("keep", *LIMITS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError("two-budgets", f"got {' and '.join(given)}, expected one budget. Leave the others out.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError("keep-range", f"got keep={self.keep}, expected a fraction above 0 and at most 1. Pass 0.5 to keep half.")
        for name in LIMITS:
            if getattr(self, name) is not None:
                check_at_least(getattr(self, name), 1, name=name)
        check_choice(self.scope, ("layer", "model"), name="scope")
        check_at_least(self.round_to, 1, name="round_to")
        for name in ("protect", "kinds"):
            if isinstance(getattr(self, name), str):  # its letters would be taken for names
                raise InputError("text-for-names", f"got {name}={getattr(self, name)!r}, expected a tuple of names. Pass ({getattr(self, name)!r},).")
        for kind in self.kinds:
            check_choice(kind, KINDS, name="kind")

    @property
    def fraction(self) -> float:
        """Of the units that stay, where the budget is a fraction."""
        return 0.5 if self.keep is None else self.keep

    @property
    def budget(self) -> tuple[str, int] | None:
        """Name and value of a budget that is no fraction."""
        return next(((name, getattr(self, name)) for name in LIMITS if getattr(self, name) is not None), None)

    def prepare(self, model: nn.Module, axes: Sequence[CoupledAxis], batches: Sequence[Batch], report: Report) -> Mapping[str, Tensor]:
        """Whatever a method wants to know of the whole model before it looks at single axes; visits carry it."""
        return {}

    @abc.abstractmethod
    def score(self, visit: Visit) -> Tensor:
        """What each unit of an axis is worth, (units,), float64; more is better."""

    def choose(self, visit: Visit, *, keep: int, protect: Tensor | None) -> Choice:
        """The units that stay. By their scores, unless a method chooses them together."""
        scores = self.score(visit)
        return Choice(best_units(scores, visit.axis, keep=keep, protect=protect), scores)

    def shares(self, scores: Tensor) -> Tensor:
        """Scores in units of their mean, so that those of different axes can be compared, wide ones with narrow ones."""
        mean = scores.mean()
        return scores / mean if mean > 0 else scores

    def find_axes(self, model: nn.Module) -> tuple[CoupledAxis, ...]:
        """What the method may cut in a model.

        Raises
        ------
        InputError
            ``unknown-model`` or ``kinds-absent`` when it has nothing of that kind.
        """
        from partwise.models import coupled_axes

        wanted = self.kinds or self.DEFAULT_KINDS
        every = coupled_axes(model)
        axes = tuple(axis for axis in every if not isinstance(axis, BlockAxis) and axis.kind in wanted)
        if not axes:
            present = ", ".join(sorted({axis.kind for axis in every}))
            raise InputError(
                "kinds-absent",
                f"{type(self).__name__} prunes {' or '.join(wanted)}, and {type(model).__name__} has {present} only. Choose a method that is for those, or "
                "pass them as kinds where the method takes several.",
            )
        return axes

    def plan(self, model: nn.Module, data: Data | None = None, *, report: Report = silent, steps: Steps | None = None) -> UnitPlan:
        """Decide which units stay; see `PruneMethod.plan`.

        Parameters
        ----------
        model : torch.nn.Module
            The model to prune.
        data : Tensor or iterable, optional
            Calibration data; `Magnitude` and `Random` need none.
        report : callable
            Told (phase, done, total, note) as the work goes on.
        steps : Steps, optional
            Choices that were made before, by axis, which are taken as they are, and what is told of each new one.

        Raises
        ------
        InputError
            ``no-calibration``, ``not-finite`` naming the module, and what budgets and axes refuse.
        """
        axes, protected = self._places(model)
        counts = count_units(self, model, axes, protected, None) if self.scope == "layer" else None
        check_sizes(model, axes, counts)  # before anything takes long
        batches = batches_of(model, data) if self.NEEDS_DATA else []
        prepared = self.prepare(model, axes, batches, report)
        walked = batches if self.WALKS and self.NEEDS_DATA else []
        if counts is None:
            # Closed at once when something fails inside, so that gradients and modes come back.
            with contextlib.closing(visits_of(model, axes, walked, prepared, None, report)) as visits:
                shares = {visit.axis.name: self.shares(self.score(visit)) for visit in visits}
            counts = count_units(self, model, axes, protected, shares)
            check_sizes(model, axes, counts)
        choices: dict[str, Choice] = dict(steps.done) if steps is not None else {}
        with contextlib.closing(visits_of(model, axes, walked, prepared, choices if self.recalibrate else None, report)) as visits:
            for visit in visits:
                name = visit.axis.name
                if name not in choices:
                    choices[name] = self.choose(visit, keep=counts[name], protect=protected.get(name))
                    if steps is not None:
                        steps.note(name, choices[name])
        return UnitPlan(
            method=repr(self),
            num_tokens=sum(map(count_inputs, batches)),
            units={axis.name: choices[axis.name].units for axis in axes},
            scores={axis.name: choices[axis.name].scores for axis in axes},
            factors={axis.name: factors for axis in axes if (factors := choices[axis.name].factors) is not None},
        )

    def _places(self, model: nn.Module) -> tuple[list[CoupledAxis], dict[str, Tensor]]:
        """The axes that are not protected as a whole, and which units of them are."""
        every = self.find_axes(model)
        whole, protected = protected_units(every, self.protect)
        axes = [axis for axis in every if axis.name not in whole]
        if not axes:
            raise InputError("too-many-protected", f"protect names all {len(every)} axes, so that nothing can be cut. Protect fewer.")
        return axes, protected


@dataclass(frozen=True)
class Steps:
    """Where a plan stands, so that one that was interrupted goes on to the same bits.

    Parameters
    ----------
    done : mapping of str to Choice
        Axis name -> what was chosen before.
    note : callable
        Told the name of an axis and its choice as soon as it is made.
    """

    done: Mapping[str, Choice] = field(default_factory=dict)
    note: Callable[[str, Choice], None] = lambda name, choice: None


def visits_of(
    model: nn.Module,
    axes: Sequence[CoupledAxis],
    batches: Sequence[Batch],
    prepared: Mapping[str, Tensor],
    choices: Mapping[str, Choice] | None,
    report: Report,
) -> Generator[Visit, None, None]:
    """One axis after the other. What was chosen for one, where there are choices, is switched off on the way to the next."""
    from partwise.models import tensors_of
    from partwise.models.walks import start_walk

    tensors = tensors_of(model)
    phase = "scoring" if choices is None else "pruning"
    if not batches:
        yield from (Visit(model, axis, tensors, None, prepared) for axis in axes)
        return
    with start_walk(model, axes, batches) as walk:
        for number, axis in enumerate(walk.axes):
            report(phase, number, len(axes), axis.name)
            walk.go_to(axis)
            yield Visit(model, axis, tensors, walk, prepared)
            if choices is not None:
                walk.replace(_switched_off(axis, choices[axis.name], tensors | walk.replaced))
    report(phase, len(axes), len(axes), "")


def _switched_off(axis: CoupledAxis, choice: Choice, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with which a layer passes on what its pruned form would."""
    from partwise.models import masked_tensors, scaled_tensors

    changed = {} if choice.factors is None else scaled_tensors(tensors, {axis.name: spread_factors(choice.factors, choice.units, axis.size)}, axes=[axis])
    return changed | masked_tensors({**tensors, **changed}, [axis], Part({axis.name: choice.units}))
