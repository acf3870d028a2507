"""A ticket of any size out of a run, finished or stopped, measured on the run's own test split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.checkpoint import latest_checkpoint
from partwise.checks import InputError
from partwise.engine.place import Place
from partwise.flags import from_settings
from partwise.runs import RunFolder
from partwise.train._flags import flags_of, method_class, stored_run
from partwise.train._header import check_same_data, run_header
from partwise.train.job import Job, Report, TrainSettings, check_setting, prepare
from partwise.train.optimizer import OptimizerSettings
from partwise.train.task import TaskSettings

if TYPE_CHECKING:
    from partwise.train.trainer import SubnetTrainer


def cut_run(
    run: Path, *, keep: float, out: Path, num_candidates: int = 16, seed: int | None = None, report: Report = lambda phase, done, total, note: None
) -> dict[str, Any]:
    """Cut a ticket out of the newest checkpoint of a run, write it, and measure it beside the whole model.

    Parameters
    ----------
    run : Path
        The run's folder.
    keep : float
        Fraction of the units of every layer that stays; 1 gives the whole model.
    out : Path
        Folder for the ticket; must be new.
    num_candidates : int
        Random tickets that are tried on the calibration split.
    seed : int, optional
        Of the candidates. Left out: the run's.
    report : callable
        Told (phase, done, total, note) as the work goes on.

    Returns
    -------
    dict
        The row of the ticket as in ``summary.json``, ``whole`` with the same numbers of the whole model, ``metric_name``, ``unit``, ``run`` and the
        ``round_number`` it was cut from.

    Raises
    ------
    InputError
        ``run-not-found``, ``run-without-checkpoint``, ``folder-exists``, ``data-changed``, ``keep-range``, ``empty-layer``, ``no-tickets``. Nothing is
        written then.
    """
    from partwise.train._result import measure_speeds, measure_ticket, measure_whole, training_facts, write_model

    check_setting(num_candidates, 1, name="candidates")
    check_setting(seed, 0, name="seed")
    if not 0 < keep <= 1:
        raise InputError("keep-range", f"got --keep {keep:g}, expected a fraction above 0 and at most 1. Pass 0.5 to keep half.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("folder-exists", f"{out} exists already, expected a new folder. Choose another --out.")
    stored_run(str(run), engine=None)  # refuses a run of another room
    job = load_job(RunFolder.open(run), report=report)
    folder = RunFolder.resume(run, run_header(job, command=()))  # held, so that nobody else writes there meanwhile
    trainer = restored_trainer(job, folder)
    report("measuring", 0, 2, "the whole model")
    whole = measure_whole(job, trainer.model)
    report("measuring", 1, 2, "tickets")
    seed = job.settings.seed if seed is None else seed
    ticket = whole if keep == 1 else measure_ticket(job, trainer, keep, num_candidates=num_candidates, seed=seed)
    speeds = measure_speeds(job, [whole.ticket.model, ticket.ticket.model])
    facts = training_facts(job, folder, trainer)
    row = write_model(job, ticket, speeds[1], out, facts)
    return row | {
        "unit": job.task.unit,
        "metric_name": facts["metric_name"],
        "whole": {"num_parameters": whole.ticket.num_parameters, "metric": whole.metric, "speed": speeds[0]},
        "round_number": len(trainer.history),
        "folder": str(out),
        "run": str(run),
    }


def load_job(folder: RunFolder, *, report: Report) -> Job:
    """What a run was started with, from its ``run.json``."""
    values = flags_of(folder.header)
    name = values["method"]
    job = prepare(
        from_settings(method_class(name), values),
        from_settings(TaskSettings, values),
        from_settings(TrainSettings, values),
        from_settings(OptimizerSettings, values),
        name=name,
        place=from_settings(Place, values),
        checkpoint_every=None,
        report=report,
    )
    check_same_data(folder, run_header(job, command=()))
    return job


def restored_trainer(job: Job, folder: RunFolder) -> SubnetTrainer:
    """A trainer with the state of the newest checkpoint."""
    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise InputError(
            "run-without-checkpoint",
            f"{folder.path} has no checkpoint yet ({folder.status}), expected one to cut from. Let it run on: partwise train --out {folder.path} --resume",
        )
    return job.trainer().restore(checkpoint, job.task.loader)
