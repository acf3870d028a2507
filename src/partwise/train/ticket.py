"""Tickets: subnetworks that are cut out of a trained model and used as they are.

``cut`` takes one, ``search`` takes the best of several, ``save_ticket`` writes it as an ordinary checkpoint, ``load_ticket`` opens it again.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise import atomic_files
from partwise.checks import InputError, RunError, check_at_least
from partwise.models.axes import BlockAxis, Part
from partwise.rounds import part_seed

if TYPE_CHECKING:
    from torch import nn

    from partwise.models.axes import Axis
    from partwise.train.method import SubnetMethod

__all__ = ["Ticket", "cut", "load_ticket", "save_ticket", "search"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ticket:
    """A subnetwork that stands on its own.

    Parameters
    ----------
    model : torch.nn.Module
        Of the class of the whole model, really smaller, with the correction folded into its weights.
    part : Part
        The units it holds.
    keep : float
        The fraction that was asked for.
    score : float or None
        What ``evaluate`` said of it; None when none were compared.
    scores : tuple of float
        Of all candidates that differ, in the order in which they were tried. The mean of those that were drawn is what a ticket costs that nobody searched
        for.
    num_parameters : int
        Of ``model``; a shared one counts once.
    kinds : tuple of str, default=()
        Where each score is from: ``"drawn"`` by the method, or ranked by ``"wanda"`` or ``"fluctuation"``.
    notes : tuple of str, default=()
        Where the ticket is not exactly what was asked for, and why.
    """

    model: nn.Module
    part: Part
    keep: float
    score: float | None
    scores: tuple[float, ...]
    num_parameters: int
    kinds: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def save(self, folder: Path, *, tokenizer: Any = None) -> None:
        """Write it so that it opens without this package; see `save_ticket`."""
        save_ticket(self, folder, tokenizer=tokenizer)


def cut(method: SubnetMethod, model: nn.Module, axes: Sequence[Axis], keep: float, *, seed: int = 0) -> Ticket:
    """A ticket as the method draws it, without any search.

    Parameters
    ----------
    method : SubnetMethod
        Says which units stay and what their sum is multiplied by.
    model : torch.nn.Module
        The whole trained model, not changed.
    axes : sequence of Axis
        ``method.find_axes(model)``.
    keep : float
        Fraction of every axis that stays, above 0 and at most 1.
    seed : int, default=0
        Of what the method draws at random.

    Raises
    ------
    InputError
        When the fraction leaves a layer empty, or the model's own configuration class cannot describe the ticket.
    """
    ticket = _ticket_of(method, model, axes, _draw(method, model, axes, keep, seed=seed, candidate=0), keep)
    for note in ticket.notes:
        logger.info("%s", note)
    return ticket


def search(
    method: SubnetMethod,
    model: nn.Module,
    axes: Sequence[Axis],
    keep: float,
    *,
    evaluate: Callable[[nn.Module], float],
    num_candidates: int = 16,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
) -> Ticket:
    """The ticket with the lowest score among several; the first of equals. The first candidate is what ``cut`` gives.

    Parameters
    ----------
    method, model, axes, keep, seed
        As for `cut`.
    evaluate : callable
        Model -> score, lower is better. Measure on data that neither training nor the final test sees: the best of several on the test data looks better
        than it is. What it does to the model, such as new statistics of batch normalisation, stays.
    num_candidates : int, default=16
        Tickets that the method draws. A ticket that was drawn before is not tried again.
    calibration : iterable, optional
        A few batches. With them, two more tickets of the same size are tried: those of the units that `unit_scores` ranks highest by ``"wanda"`` and by
        ``"fluctuation"``. Not in the paper, whose tickets need no data.

    Raises
    ------
    RunError
        When a score is NaN or infinite.
    """
    check_at_least(num_candidates, 1, name="num_candidates")
    best: Ticket | None = None
    scores: list[float] = []
    kinds: list[str] = []
    tried: list[Part] = []
    for kind, part in _candidates(method, model, axes, keep, num_candidates=num_candidates, calibration=calibration, seed=seed):
        if part in tried:
            continue
        tried.append(part)
        ticket = _ticket_of(method, model, axes, part, keep)
        score = float(evaluate(ticket.model))
        if not math.isfinite(score):
            raise RunError(
                "ticket-score",
                f"ticket {len(scores)} of keep={keep} got the score {score}, expected a finite number. Check the model for NaN, and what evaluate returns.",
            )
        scores.append(score)
        kinds.append(kind)
        if best is None or best.score is None or score < best.score:
            best = dataclasses.replace(ticket, score=score)
    assert best is not None
    return dataclasses.replace(best, scores=tuple(scores), kinds=tuple(kinds))


def save_ticket(ticket: Ticket, folder: Path, *, tokenizer: Any = None, card: str = "") -> None:
    """Write a ticket so that it opens without this package; the folder appears whole or not at all.

    A model of transformers becomes a folder that stock ``from_pretrained`` reads. A network that ``partwise train`` built becomes ``model.safetensors`` and a
    ``config.json`` from which ``partwise.load`` builds it again; of any other, it wants the whole model. Beside them, ``ticket.json`` says which units it
    holds.

    Parameters
    ----------
    ticket : Ticket
        What to write.
    folder : Path
        Target; a folder that is already there is replaced.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Saved beside the model.
    card : str, default=""
        Content of ``README.md``; nothing is written when it is empty.

    Raises
    ------
    RunError
        ``disk-full`` or ``cannot-write``.
    """
    folder = Path(folder)
    with atomic_files.write_folder(folder) as temporary:
        if _is_pretrained(ticket.model):
            ticket.model.save_pretrained(temporary)  # type: ignore[operator]
        else:
            from partwise.models.network_files import write_network

            write_network(ticket.model, temporary, part=ticket.part)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if card:
            atomic_files.write_atomic(temporary / "README.md", card.encode())
        atomic_files.write_json(temporary / "ticket.json", _facts(ticket))


def load_ticket(folder: Path, *, model: nn.Module | None = None) -> nn.Module:
    """Open what `save_ticket` wrote, in evaluation mode. For tickets of transformers with layers of one size, ``from_pretrained`` does the same.

    Parameters
    ----------
    folder : Path
        Where the ticket is.
    model : torch.nn.Module, optional
        For a network of your own: the whole model, trained or not, out of which the ticket is cut again. It is not changed.

    Raises
    ------
    InputError
        When there is no such folder, it holds pickles, or no model; ``needs-whole-model`` where ``model`` was left out for a network of your own.
    """
    folder = Path(folder)
    atomic_files.refuse_pickles(folder)
    if not (folder / "config.json").is_file():
        raise InputError("no-ticket", f"{folder} has no config.json, expected a folder that save_ticket wrote. Check the path.")
    config = atomic_files.read_json(folder / "config.json")
    if not isinstance(config, dict) or ("model_type" in config and len(config.get("architectures") or ()) != 1):
        raise InputError("no-ticket", f"{folder / 'config.json'} does not name the class of its model, expected what save_ticket wrote. Check the path.")
    if "model_type" not in config:
        from partwise.models.network_files import load_network

        return load_network(folder, model=model)
    from partwise.models.uneven_files import load_uneven

    return load_uneven(folder)


def _candidates(
    method: SubnetMethod, model: nn.Module, axes: Sequence[Axis], keep: float, *, num_candidates: int, calibration: Iterable[Any] | None, seed: int
) -> Iterator[tuple[str, Part]]:
    """Parts to try, each with where it is from."""
    from partwise.selection import select
    from partwise.train._scores import unit_scores

    drawn = [_draw(method, model, axes, keep, seed=seed, candidate=candidate) for candidate in range(num_candidates)]
    yield from (("drawn", part) for part in drawn)
    if calibration is None:
        return
    for metric, scores in unit_scores(model, axes, calibration).items():
        # Of every axis as many units as a drawn ticket has.
        ranked = {name: tuple(select(scores[name], keep=len(units)).tolist()) for name, units in drawn[0].units.items() if name in scores}
        yield metric, Part(dict(drawn[0].units) | ranked)


def _draw(method: SubnetMethod, model: nn.Module, axes: Sequence[Axis], keep: float, *, seed: int, candidate: int) -> Part:
    import numpy as np

    return method.ticket_part(model, axes, keep, np.random.default_rng(part_seed(seed, round_number=0, part=candidate)))


def _ticket_of(method: SubnetMethod, model: nn.Module, axes: Sequence[Axis], part: Part, keep: float) -> Ticket:
    from partwise.models import extract, scale_readers

    small = extract(model, part, axes=axes)
    if factors := method.ticket_factors(axes, part):
        small = scale_readers(small, factors, axes=axes)
    return Ticket(small.eval(), part, keep, None, (), sum(tensor.numel() for tensor in small.parameters()), notes=_notes(axes, part, keep))


def _notes(axes: Sequence[Axis], part: Part, keep: float) -> tuple[str, ...]:
    """What a configuration class made a method change: kinds of which it kept another number than the nearest to the fraction."""
    notes: dict[str, str] = {}
    for axis in axes:
        if isinstance(axis, BlockAxis) or axis.kind != "heads" or axis.name not in part.units:
            continue
        kept, wanted = len(part.units[axis.name]), int(keep * axis.size + 0.5)
        if kept != wanted:
            notes[axis.kind] = (
                f"Kept {kept} of {axis.size} head groups per layer, not {wanted}: the nearest number that the model's configuration loads."
            )
    return tuple(notes.values())


def _facts(ticket: Ticket) -> dict[str, Any]:
    return {
        "keep": ticket.keep,
        "num_parameters": ticket.num_parameters,
        "score": ticket.score,
        "scores": list(ticket.scores),
        "kinds": list(ticket.kinds),
        "notes": list(ticket.notes),
        "units": {name: list(units) for name, units in ticket.part.units.items()},
    }


def _is_pretrained(model: nn.Module) -> bool:
    return hasattr(type(model), "config_class") and hasattr(model, "save_pretrained")
