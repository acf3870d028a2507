"""Quality against size: several methods at several sizes, on the same text, each cut model measured beside the whole one.

``sweep`` is what ``partwise prune sweep`` calls. Light to import: the libraries load when a job starts.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partwise.checks import InputError, check_at_least, check_choice
from partwise.flags import load_target
from partwise.prune import METHODS
from partwise.prune._header import describe_method, run_header
from partwise.prune._texts import TextSettings, read_texts
from partwise.runs import RunFolder, Stopped, begin_run, check_place, stop_flag

if TYPE_CHECKING:
    from partwise.prune._subject import ModelFlags, Subject
    from partwise.prune._texts import Texts
    from partwise.prune.method import PruneMethod, Report
    from partwise.prune.plan import PrunePlan

__all__ = ["MASKS", "SweepSettings", "command_names", "sweep"]

MASKS = ("edge-popup",)  # methods whose result is as large as the model, so that there is nothing to save or to time
BASELINES = ("magnitude", "random")
WHOLE = "whole model"


def command_names() -> list[str]:
    """Methods that make a model smaller."""
    return [name for name in METHODS if name not in MASKS]


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What to compare.

    Parameters
    ----------
    methods : tuple of str
        Some of them, ghost,magnitude,random, or all. Left out: the usual one for the model, and the baselines magnitude and random.
    keeps : tuple of str
        Fractions of the units that stay: 0.9,0.7,0.5.
    num_seeds : int
        Draws of methods that draw, and calibration texts of those that look at text. The text to measure on is one and the same.
    kinds : tuple of str
        Kinds of units: states, neurons, filters, heads. Left out: those that each method is for, as far as the model has them.
    scope : {"layer", "model"}
        layer: the same fraction of every layer. model: the best units of the whole model.
    recalibrate : bool
        Score each layer on what the pruned layers before it pass on. Otherwise on what the whole model passes on, which needs one calibration for all sizes.
    """

    methods: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ("0.9", "0.7", "0.5", "0.3", "0.1")
    num_seeds: int = 1
    kinds: tuple[str, ...] = ()
    scope: Literal["layer", "model"] = "layer"
    recalibrate: bool = True

    def __post_init__(self) -> None:
        check_at_least(self.num_seeds, 1, name="num_seeds")

    def fractions(self) -> list[float]:
        """Fractions that stay, each once, the largest first."""
        words = _words(self.keeps)
        try:
            found = sorted({float(word) for word in words}, reverse=True)
        except ValueError:
            found = []
        if not found or not all(0 < value <= 1 for value in found):
            raise InputError(
                "keep-range", f"--keeps is {' '.join(self.keeps) or 'empty'}, expected fractions above 0 and at most 1. Write them as --keeps 0.9,0.5,0.1."
            )
        return found

    def names(self, usual: str) -> list[str]:
        """Methods, each once; ``usual`` is the one that fits the model where none are named."""
        words = _words(self.methods) or [usual, *BASELINES]
        for word in words:
            check_choice(word, ["all", *command_names()], name="method")
        return command_names() if "all" in words else list(dict.fromkeys(words))

    def method(self, name: str, keep: float, seed: int) -> PruneMethod:
        """A method with what the flags say of its settings."""
        kind: type[PruneMethod] = load_target(METHODS[name])
        known = {item.name for item in fields(kind)}
        said = {"keep": keep, "kinds": tuple(_words(self.kinds)), "scope": self.scope, "recalibrate": self.recalibrate, "seed": seed}
        return kind(**{key: value for key, value in said.items() if key in known})


def _words(parts: Sequence[str]) -> list[str]:
    """Words separated by commas or spaces."""
    return [word.strip() for part in parts for word in part.split(",") if word.strip()]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method at one size with one seed: what is measured once.

    Parameters
    ----------
    name : str
        Of the method.
    method : PruneMethod
        With its settings.
    keep : float
        Fraction that stays.
    seed : int
        Of draws, or of the calibration text.
    """

    name: str
    method: PruneMethod
    keep: float
    seed: int

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells it apart from all others of a sweep."""
        return self.name, self.keep, self.seed


def sweep(
    source: ModelFlags,
    settings: SweepSettings,
    text: TextSettings,
    *,
    usual: str,
    out: Path,
    resume: bool = False,
    command: Sequence[str] = (),
    report: Report = lambda phase, done, total, note: None,
) -> dict[str, Any]:
    """Measure every method at every size, and write everything to a run folder.

    Parameters
    ----------
    source : ModelFlags
        The model.
    settings : SweepSettings
        Methods and sizes.
    text : TextSettings
        Text to calibrate on, and to measure on.
    usual : str
        The method to take where none are named.
    out : Path
        The run folder to make.
    resume : bool
        Go on with the sweep in ``out``: what is measured stays.
    command : sequence of str
        Written to the run folder.
    report : callable
        Told (phase, done, total, note) as the work goes on.

    Returns
    -------
    dict
        The content of ``summary.json``.

    Raises
    ------
    InputError
        When something that was passed cannot be used. Nothing is written then.
    Stopped
        After Ctrl-C, once what was measured is saved.
    """
    from partwise.prune._subject import open_subject

    check_place(out, resume=resume)
    names = settings.names(usual)
    points = [_at(settings, name, keep, seed) for name in names for seed in _seeds(settings, name, text.seed) for keep in settings.fractions()]
    report("loading the model", 0, 1, "")
    subject = open_subject(source)
    left_out = _unfit(points, subject, asked_for_all="all" in _words(settings.methods))
    points = [point for point in points if point.name not in left_out]
    report("reading text", 0, 1, "")
    texts = {seed: read_texts(subject.opened, replace(text, seed=seed)) for seed in sorted({text.seed, *(point.seed for point in points)})}
    resolved = replace(settings, methods=tuple(names))
    call = f"sweep(methods={list(names)}, keeps={settings.fractions()}, num_seeds={settings.num_seeds})"
    header = run_header(subject, texts[text.seed], text, source, name="sweep", call=call, method=resolved, command=command)
    job = _Sweep(subject, texts, text.seed, tuple(points), tuple(left_out), report)
    if not resume:
        with begin_run(out, header, has_started=lambda run: bool(run.metrics())) as create:
            return _work(job, create())
    run = RunFolder.resume(out, header)
    if run.status == "finished" and run.summary.exists():
        from partwise.prune.job import finished_summary

        return finished_summary(run)
    return _work(job, run)


@dataclass(frozen=True)
class _Sweep:
    """Everything a sweep works with, once it is loaded."""

    subject: Subject
    texts: Mapping[int, Texts]
    first_seed: int
    points: tuple[Point, ...]
    left_out: tuple[str, ...]
    report: Report

    @property
    def evaluation(self) -> Any:
        """Rows to measure on, the same for all."""
        return self.texts[self.first_seed].evaluation


def _at(settings: SweepSettings, name: str, keep: float, seed: int) -> Point:
    return Point(name=name, method=settings.method(name, keep, seed), keep=keep, seed=seed)


def _seeds(settings: SweepSettings, name: str, first: int) -> range:
    """Seeds that make a difference to a method."""
    kind: Any = load_target(METHODS[name])
    varies = getattr(kind, "NEEDS_DATA", True) or "seed" in {item.name for item in fields(kind)}
    return range(first, first + (settings.num_seeds if varies else 1))


def _unfit(points: Sequence[Point], subject: Subject, *, asked_for_all: bool) -> list[str]:
    """Methods with nothing to cut in this model. Only where all methods were asked for may there be any."""
    from partwise.prune.job import axes_of

    unfit = []
    for point in {point.name: point for point in points}.values():
        try:
            axes_of(point.method, subject.opened.model)
        except InputError as error:
            if not asked_for_all or error.code != "kinds-absent":
                raise
            unfit.append(point.name)
    return unfit


def _work(job: _Sweep, run: RunFolder) -> dict[str, Any]:
    """Measure what is not measured yet; then the summary."""
    from partwise import report
    from partwise.prune._report import describe

    run.set_status("running")
    try:
        with stop_flag() as stop:
            rows = {(row["method"], row["keep"], row["seed"]): row for row in run.metrics()}
            for number, (key, row) in enumerate(_measurements(job, rows)):
                rows[key] = row
                run.append_metrics(row | {"kind": "measurement", "step": number})
                run.sync()
                if stop.is_set():
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        run.set_status("interrupted")
        raise Stopped(run.path) from None
    kept = [{name: value for name, value in row.items() if name not in ("kind", "step")} for row in run.metrics()]
    whole = next(row for row in kept if row["method"] == WHOLE)
    measured = [row for row in kept if row["method"] != WHOLE]
    facts = _facts(job) | {"whole": whole, "measurements": measured, "seconds": sum(row["seconds"] for row in kept), "run": str(run.path)}
    return report.publish(run, facts, describe)


def _measurements(job: _Sweep, rows: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, float, int], dict[str, Any]]]:
    """Rows that are missing, in order; ``rows`` are those that are there."""
    from partwise import prune

    model, scored = job.subject.opened.model, _Scored()
    total = len(job.points) + 1
    whole = (WHOLE, 1.0, job.first_seed)
    if whole not in rows:
        start = time.perf_counter()
        row = {"method": WHOLE, "keep": 1.0, "seed": job.first_seed, "call": "", "kept": None, "of": None, "plan_seconds": 0.0}
        row |= _measured(job, model, phase=f"1 of {total}: {WHOLE}")
        yield whole, row | {"seconds": time.perf_counter() - start}
    for number, point in enumerate(job.points, start=2):
        if point.key in rows:
            continue
        start = time.perf_counter()
        phase = f"{number} of {total}: {point.name} at {100 * point.keep:g} %"
        plan = scored.plan(point, model, job.texts[point.seed].calibration.ids, _inside(job.report, phase))
        seconds = time.perf_counter() - start
        total_row = plan.ledger(model).total
        row = {"method": point.name, "keep": point.keep, "seed": point.seed, "call": describe_method(point.method), "kept": total_row.rank}
        row |= {"of": sum(total_row.statuses.values()), "plan_seconds": seconds}
        row |= _measured(job, prune.apply(model, plan).eval(), phase=phase)
        yield point.key, row | {"seconds": time.perf_counter() - start}


def _inside(report: Report, phase: str) -> Report:
    return lambda what, done, total, note: report(phase, done, total, what)


def _measured(job: _Sweep, model: Any, *, phase: str) -> dict[str, Any]:
    from partwise.prune._measuring import costs_of, perplexity

    value = perplexity(model, job.evaluation.ids, progress=lambda done, total: job.report(phase, done, total, "evaluating"))
    costs = costs_of(model, dtype=job.subject.saved_dtype)
    return {"perplexity": value if math.isfinite(value) else None} | dataclasses.asdict(costs) | {"sequence_bytes": costs.sequence_bytes}


def _facts(job: _Sweep) -> dict[str, Any]:
    """What was measured on what."""
    opened, evaluation = job.subject.opened, job.evaluation
    num_rows, num_tokens = evaluation.ids.shape
    calibration = job.texts[job.first_seed].calibration
    return {
        "model": opened.name,
        "class": type(opened.model).__name__,
        "method": "sweep",
        "device": str(opened.model.device),
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "saved_dtype": str(job.subject.saved_dtype).removeprefix("torch."),
        "calibration": {"data": calibration.name, "num_tokens": calibration.ids.numel()},
        "evaluation": {"data": evaluation.name, "num_rows": num_rows, "num_tokens": num_tokens},
        "left_out": list(job.left_out),
    }


class _Scored:
    """Plans of methods whose scores do not depend on how much stays: their data are looked at once for all sizes."""

    def __init__(self) -> None:
        self._scores: dict[tuple[str, int], Mapping[str, Any]] = {}

    def plan(self, point: Point, model: Any, ids: Any, report: Report) -> PrunePlan:
        """The plan of a point, as its method would make it."""
        if not _scores_once(point.method):
            return point.method.plan(model, ids, report=report)
        key = (point.name, point.seed)
        if key not in self._scores:
            every: Any = replace(point.method, keep=1.0, scope="layer")  # type: ignore[call-arg]
            self._scores[key] = every.plan(model, ids, report=report).scores
        known = _known(point.method, self._scores[key])
        plan: PrunePlan = known.plan(model)
        return replace(plan, method=repr(point.method))


def _scores_once(method: PruneMethod) -> bool:
    """Whether the method scores units by what does not depend on what was pruned before, and keeps the best."""
    from partwise.prune.unit_method import UnitMethod

    if not isinstance(method, UnitMethod) or type(method).choose is not UnitMethod.choose:
        return False
    return not (method.NEEDS_DATA and method.WALKS and method.recalibrate)


def _known(method: Any, scores: Mapping[str, Any]) -> Any:
    """The same method with scores that are known already."""
    kind: Callable[..., Any] = type(
        type(method).__name__,
        (type(method),),
        {"NEEDS_DATA": False, "prepare": lambda self, *given: {}, "score": lambda self, visit: scores[visit.axis.name]},
    )
    return kind(**{item.name: getattr(method, item.name) for item in fields(method)})
