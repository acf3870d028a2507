"""The main job of the room: one model, one data set, one method; out comes a run folder with a whole model and smaller ones, measured on unseen data.

``train`` is what ``partwise train`` calls, and ``_cut.cut_run`` what ``partwise train ticket`` calls. Light to import: the libraries load when a job starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partwise.checks import InputError, RunError
from partwise.engine.place import Place
from partwise.runs import RunFolder, Stopped, begin_run, check_place, stop_flag
from partwise.train._header import check_same_data, run_header

if TYPE_CHECKING:
    from torch import nn

    from partwise.train._recorder import Recorder
    from partwise.train.method import SubnetMethod
    from partwise.train.optimizer import OptimizerSettings
    from partwise.train.task import TaskSettings, TrainTask
    from partwise.train.trainer import SubnetTrainer

DEFAULT_METHOD = "twist"
# Where --num-rounds is left out: local steps of all parts together, by kind of task. A run with no flags then takes minutes on 2 cores, measuring included.
DEFAULT_STEPS = {"causal-lm": 900, "classification": 4000}
# What settings of a method that are left open become where the model starts from random weights, unless --keep bounds what a part may hold.
FOR_NEW_MODELS = {"whole_share": 0.7}
NUM_VALIDATIONS = 10  # where --valid-every is left out
LARGEST_SEED = 2**63 - 1  # that torch takes

Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long to train and how to measure; the same for all methods.

    Parameters
    ----------
    num_rounds : int or None
        Rounds of split, local steps and merge. Left out: as many as take some minutes on two cores for the built-in data, the same number of local steps
        whatever the method.
    mode : str
        sync: a round ends when all parts are back. async: every part is merged when it arrives and goes off again; the order of arrival decides the result,
        so such a run, once resumed, does not end with the same bits.
    max_staleness : int or None
        In asynchronous runs, how many updates a part may be behind the others. Left out: any number.
    num_threads : int or None
        Threads that train one part; another number rounds sums differently. Left out: one per core. With Ray workers on one machine, 1 is fastest.
    valid_every : int or None
        Rounds between two measurements on the validation split. Left out: about ten over the run.
    num_candidates : int
        Random tickets of each size that are tried on the calibration split; the best one is kept.
    seed : int
        Seed of everything random: weights, order of the data, subnetworks, tickets.
    """

    num_rounds: int | None = None
    mode: Literal["sync", "async"] = "sync"
    max_staleness: int | None = None
    num_threads: int | None = None
    valid_every: int | None = None
    num_candidates: int = 16
    seed: int = 0

    def check(self) -> None:
        """Refuse values that no run could use."""
        for name in ("num_rounds", "max_staleness", "num_threads", "valid_every", "num_candidates"):
            check_setting(getattr(self, name), 1, name=name)
        check_setting(self.seed, 0, name="seed")
        if self.seed > LARGEST_SEED:
            raise InputError("setting-out-of-range", f"--seed is {self.seed}, expected 0 to {LARGEST_SEED}. Choose one of these.")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run works with, once it is loaded; ``settings`` has no open numbers any more."""

    name: str
    method: SubnetMethod
    optimizer: OptimizerSettings
    settings: TrainSettings
    sources: TaskSettings
    task: TrainTask
    place: Place
    checkpoint_every: int | None
    report: Report

    @property
    def num_rounds(self) -> int:
        """Rounds of the run."""
        assert self.settings.num_rounds is not None
        return self.settings.num_rounds

    @property
    def reports_per_round(self) -> int:
        """What the trainer reports in a round: itself, or in asynchronous runs an arrival of every part."""
        return self.method.num_parts if self.settings.mode == "async" else 1

    def loss(self, model: nn.Module, batches: Iterable[Any]) -> float:
        """Mean loss of a model, per token or per row."""
        from partwise.train._local import task_loss
        from partwise.train._metrics import mean_loss

        return mean_loss(model, batches, loss=task_loss)

    def trainer(self, engine: Any = "inline") -> SubnetTrainer:
        """A trainer that has not begun."""
        from partwise.train.trainer import SubnetTrainer

        settings = self.settings
        return SubnetTrainer(
            self.task.model,
            self.method,
            optimizer=self.optimizer,
            engine=engine,
            mode=settings.mode,
            max_staleness=settings.max_staleness,
            seed=settings.seed,
            num_threads=settings.num_threads,
        )


def train(
    method: SubnetMethod,
    sources: TaskSettings,
    settings: TrainSettings,
    optimizer: OptimizerSettings,
    *,
    name: str,
    out: Path,
    place: Place | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    command: Sequence[str] = (),
    report: Report = lambda phase, done, total, note: None,
) -> dict[str, Any]:
    """Train a model by subnetworks, cut tickets out of it, measure all of them, and write everything to a run folder.

    Parameters
    ----------
    method : SubnetMethod
        How the model is cut into subnetworks.
    sources : TaskSettings
        Model and data.
    settings : TrainSettings
        Rounds, seed, what is measured.
    optimizer : OptimizerSettings
        Of the local steps.
    name : str
        Name of the method, as in ``partwise list train``.
    out : Path
        The run folder to make.
    place : Place, optional
        Where the parts train. Left out: in this process.
    resume : bool
        Continue the run in ``out``; synchronous rounds end with the same bits as a run that was never stopped. A finished run is only reported.
    checkpoint_every : int, optional
        Rounds between two checkpoints. Has no influence on the result.
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
    settings.check()
    check_setting(checkpoint_every, 1, name="checkpoint_every")
    check_place(out, resume=resume)
    job = prepare(method, sources, settings, optimizer, name=name, place=place or Place(), checkpoint_every=checkpoint_every, report=report)
    header = run_header(job, command=command)
    if not resume:
        return start(job, out, header)
    check_same_data(RunFolder.open(out), header)
    run = RunFolder.resume(out, header)
    if run.status == "finished" and run.summary.exists():
        return finished_summary(run)
    return work(job, lambda: run)


def prepare(
    method: SubnetMethod,
    sources: TaskSettings,
    settings: TrainSettings,
    optimizer: OptimizerSettings,
    *,
    name: str,
    place: Place,
    checkpoint_every: int | None,
    report: Report,
) -> Job:
    """Read the data, make or load the model, and fill in what the settings leave open. Writes nothing."""
    import torch

    from partwise.train.task import open_task

    report("reading data", 0, 1, "")
    task = open_task(name, sources, seed=settings.seed)
    if starts_new(sources):
        method = for_new_model(method)
    num_rounds = settings.num_rounds or default_rounds(method, task.kind)
    valid_every = settings.valid_every or max(1, num_rounds // NUM_VALIDATIONS)
    return Job(
        name=name,
        method=method,
        optimizer=optimizer,
        settings=replace(settings, num_rounds=num_rounds, valid_every=valid_every, num_threads=settings.num_threads or torch.get_num_threads()),
        sources=sources,
        task=task,
        place=place,
        checkpoint_every=checkpoint_every,
        report=report,
    )


def starts_new(sources: TaskSettings) -> bool:
    """Whether the model starts from random weights."""
    from partwise.models.networks import NETWORKS

    return sources.model is None or sources.model in NETWORKS


def for_new_model(method: SubnetMethod) -> SubnetMethod:
    """The method with what a new model wants in settings that were left open."""
    if getattr(method, "keep", None) is not None:
        return method
    names = {item.name for item in fields(method)}
    chosen: dict[str, Any] = {name: value for name, value in FOR_NEW_MODELS.items() if name in names and getattr(method, name) is None}
    return replace(method, **chosen)


def default_rounds(method: SubnetMethod, kind: str) -> int:
    """Rounds that make as many local steps as every method gets."""
    per_round = sum(method.steps_of(part) for part in range(method.num_parts))
    return max(1, round(DEFAULT_STEPS[kind] / per_round))


def start(job: Job, out: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Run from the beginning; when that fails before the first round, no folder is left behind."""
    with begin_run(out, header, has_started=lambda run: bool(run.metrics())) as create:
        return work(job, create)


def work(job: Job, open_run: Callable[[], RunFolder]) -> dict[str, Any]:
    """From a loaded job to its summary. The run folder is opened once the engine stands and the method has accepted the model."""
    from partwise.engine import open_engine
    from partwise.train._recorder import Recorder
    from partwise.train._result import finish_run

    place = job.place
    opened = open_engine(
        place.engine,
        num_workers=place.num_workers,
        num_parts=job.method.num_parts,
        address=place.address,
        timeout=place.timeout,
        seed=job.settings.seed,
    )
    run: RunFolder | None = None
    try:
        with opened as engine:
            trainer = job.trainer(engine)
            run = open_run()
            run.set_status("running")
            with stop_flag() as stop:
                recorder = Recorder(job, run, traffic=getattr(engine, "traffic", None))
                fit(job, run, trainer, recorder, should_stop=stop.is_set)
        return finish_run(job, run, trainer)  # the workers are gone: they would slow down what is measured
    except KeyboardInterrupt:
        if run is None:
            raise
        run.set_status("interrupted")
        raise Stopped(run.path) from None


def fit(job: Job, run: RunFolder, trainer: SubnetTrainer, recorder: Recorder, *, should_stop: Callable[[], bool]) -> None:
    """All rounds that are left.

    Raises
    ------
    Stopped
        When asked to stop; the state is saved.
    RunError
        When a round fails; the state before it is saved.
    """
    recorder.rewind()
    try:
        trainer.fit(
            job.task.loader,
            num_rounds=job.num_rounds,
            checkpoints=run.checkpoints,
            checkpoint_every=job.checkpoint_every,
            progress=recorder,
            should_stop=should_stop,
        )
    except RunError as error:
        run.set_status("interrupted")
        if error.code not in ("loss-not-finite", "diverged") or not trainer.history:
            raise
        error.args = (
            f"{error} Round {len(trainer.history)} is saved: `partwise train ticket {run.path} --keep 1 --out FOLDER` takes its model. --resume would come "
            "to the same numbers; start again with a lower --lr and another --out.",
        )
        raise


def check_setting(value: int | None, least: int, *, name: str) -> None:
    """Refuse a number below the least that makes sense; None is a number left open."""
    if value is not None and value < least:
        raise InputError("setting-out-of-range", f"--{name.replace('_', '-')} is {value}, expected at least {least}. Raise it.")


def finished_summary(run: RunFolder) -> dict[str, Any]:
    """The summary of a run that is done; its report is drawn again where it is gone."""
    from partwise import report
    from partwise.atomic_files import read_json
    from partwise.train._report import describe as describe_run

    summary: dict[str, Any] = read_json(run.summary)
    return summary if run.report.exists() else report.publish(run, summary, describe_run)
