"""The main job of the room: one model, one method, some text; out comes a run folder with the smaller model, measured beside the whole one.

``prune`` is what ``partwise prune`` calls. Light to import: the libraries load when a job starts.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.prune._header import describe_method, run_header
from partwise.prune._texts import TextSettings, read_texts
from partwise.runs import RunFolder, Stopped, begin_run, check_place, stop_flag

if TYPE_CHECKING:
    from partwise.prune._recorder import Recorder
    from partwise.prune._subject import ModelFlags, Subject
    from partwise.prune._texts import Texts
    from partwise.prune.method import PruneMethod, Report
    from partwise.prune.plan import PrunePlan

__all__ = ["Job", "describe_method", "prune"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run works with, once it is loaded.

    Parameters
    ----------
    name : str
        Of the method, as in ``partwise list prune``.
    method : PruneMethod
        With its settings.
    subject : Subject
        The model.
    texts : Texts
        Rows to calibrate on, and to measure on.
    settings : TextSettings
        What was asked for about them.
    report : callable
        Told (phase, done, total, note) as the work goes on.
    """

    name: str
    method: PruneMethod
    subject: Subject
    texts: Texts
    settings: TextSettings
    report: Report

    @property
    def needs_text(self) -> bool:
        """Whether the method looks at the calibration rows."""
        return bool(getattr(self.method, "NEEDS_DATA", True))


def prune(
    method: PruneMethod,
    source: ModelFlags,
    settings: TextSettings,
    *,
    name: str,
    out: Path,
    resume: bool = False,
    command: Sequence[str] = (),
    report: Report = lambda phase, done, total, note: None,
) -> dict[str, Any]:
    """Plan, cut, measure before and after, and write everything to a run folder.

    Parameters
    ----------
    method : PruneMethod
        Decides what stays.
    source : ModelFlags
        The model.
    settings : TextSettings
        Text to calibrate on, and to measure on.
    name : str
        Name of the method, as in ``partwise list prune``.
    out : Path
        The run folder to make.
    resume : bool
        Continue the run in ``out``, to the same bits as a run that was never stopped. A finished run is only reported.
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
    RunError
        When the run cannot go on; its last checkpoint is kept.
    Stopped
        After Ctrl-C, once the state is saved.
    """
    check_place(out, resume=resume)
    job = prepare(method, source, settings, name=name, report=report)
    header = run_header(job.subject, job.texts, settings, source, name=name, call=repr(method), method=method, command=command)
    if not resume:
        with begin_run(out, header, has_started=lambda run: bool(run.metrics())) as create:
            return work(job, create())
    run = RunFolder.resume(out, header)
    return finished_summary(run) if run.status == "finished" and run.summary.exists() else work(job, run)


def prepare(method: PruneMethod, source: ModelFlags, settings: TextSettings, *, name: str, report: Report) -> Job:
    """Load the model and read the text. Writes nothing."""
    from partwise.prune._subject import open_subject

    report("loading the model", 0, 1, "")
    subject = open_subject(source)
    axes_of(method, subject.opened.model)
    report("reading text", 0, 1, "")
    return Job(name=name, method=method, subject=subject, texts=read_texts(subject.opened, settings), settings=settings, report=report)


def work(job: Job, run: RunFolder) -> dict[str, Any]:
    """From a loaded job to its summary."""
    from partwise.prune._recorder import Recorder
    from partwise.prune._result import finish_run

    run.set_status("running")
    try:
        with stop_flag() as stop:
            recorder = Recorder(run, axes_of(job.method, job.subject.opened.model), should_stop=stop.is_set)
            plan = recorder.plan or recorder.finish(make_plan(job, recorder))
            if stop.is_set():
                raise KeyboardInterrupt
        return finish_run(job, run, plan, seconds=recorder.seconds)
    except Stopped:
        raise
    except KeyboardInterrupt:
        run.set_status("interrupted")
        raise Stopped(run.path) from None


def make_plan(job: Job, recorder: Recorder) -> PrunePlan:
    """What the method decides; axis by axis where it can go on from some that were decided before."""
    from partwise.prune.unit_method import Steps

    data = job.texts.calibration.ids if job.needs_text else None
    model = job.subject.opened.model
    options: dict[str, Any] = {}
    if "steps" in inspect.signature(job.method.plan).parameters:
        options["steps"] = Steps(done=recorder.done, note=recorder.note)
    return job.method.plan(model, data, report=job.report, **options)


def axes_of(method: PruneMethod, model: Any) -> Sequence[Any]:
    """What the method may cut; a model in which there is nothing of the kind is refused here, before anything is written."""
    find: Callable[[Any], Sequence[Any]] | None = getattr(method, "find_axes", None)
    return find(model) if find is not None else ()


def finished_summary(run: RunFolder) -> dict[str, Any]:
    """The summary of a run that is done; its report is drawn again where it is gone."""
    from partwise import report
    from partwise.atomic_files import read_json
    from partwise.prune._report import describe

    summary: dict[str, Any] = read_json(run.summary)
    return summary if run.report.exists() else report.publish(run, summary, describe)
