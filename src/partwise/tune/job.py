"""The main job: one model, one data set, one method; out comes a run folder with a plain LoRA adapter that was measured before and after.

``tune`` is what ``partwise tune`` calls. Light to import: the libraries load when a job starts.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise import __version__
from partwise.checks import InputError, load_extra
from partwise.runs import RunFolder, Stopped, begin_run, check_place, flat_settings, installed_version
from partwise.tune._data import DataSettings
from partwise.tune.recipe import Plan, Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from partwise.tune._batches import Encoded
    from partwise.tune._data import TaskData

logger = logging.getLogger(__name__)

DEFAULT_TARGET_R = 2.0
BUILT_IN_LR, OTHER_LR = 6e-3, 5e-4
LARGEST_SEED = 2**63 - 1  # that torch takes
SPLIT_SEED = 0  # the held-out rows stay the same whatever the seed of the run
NUM_CALIBRATION_BATCHES = 8
EVAL_BATCH_SIZE = 64
TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers")

Report = Callable[[str, int, int, "float | None"], None]


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What every method needs to know about a training run.

    Parameters
    ----------
    model : str or None
        Folder or Hugging Face id of the model to adapt. Left out: the small encoder of the ``demo`` extra.
    target_r : float or None
        Size of the adapter, as the rank of a LoRA adapter that has as many parameters. Left out: 2. Excludes ``budget``.
    budget : int or None
        Rank-one components over all modules together. Excludes ``target_r``.
    max_steps : int
        Optimiser steps.
    lr : float or None
        Peak learning rate of AdamW; it warms up over 6 % of the steps and then falls to 0. Left out: 0.006 for the small built-in
        encoder, 0.0005 for any other model.
    batch_size : int
        Rows of one step.
    weight_decay : float
        Weight decay of AdamW.
    seed : int
        Seed of everything random: head, adapter, order of the rows, dropout.
    device : str or None
        ``cpu``, ``cuda``, ``cuda:1``, ... Left out: the GPU if there is one.
    """

    model: str | None = None
    target_r: float | None = None
    budget: int | None = None
    max_steps: int = 200
    lr: float | None = None
    batch_size: int = 16
    weight_decay: float = 0.0
    seed: int = 0
    device: str | None = None

    @property
    def usual_lr(self) -> float:
        """Peak learning rate where none is given. The built-in task's is the best of plain LoRA's own grid (``benchmarks/tune_quality.py``)."""
        return BUILT_IN_LR if self.model is None else OTHER_LR

    @property
    def peak_lr(self) -> float:
        """Peak learning rate of the run."""
        return self.usual_lr if self.lr is None else self.lr

    def check(self) -> None:
        """Refuse values that no run could use."""
        if self.budget is not None and self.target_r is not None:
            raise InputError(
                "budget-and-target-r",
                f"--budget {self.budget} and --target-r {self.target_r:g} were both given, expected one of them. Leave one out.",
            )
        limits = {
            "max_steps": (self.max_steps, 1),
            "batch_size": (self.batch_size, 1),
            "budget": (self.budget, 1),
            "target_r": (self.target_r, 1),
            "seed": (self.seed, 0),
        }
        for name, (value, least) in limits.items():
            if value is not None and value < least:
                raise InputError("setting-out-of-range", f"--{name.replace('_', '-')} is {value:g}, expected at least {least}. Raise it.")
        if self.seed > LARGEST_SEED:
            raise InputError("setting-out-of-range", f"--seed is {self.seed}, expected 0 to {LARGEST_SEED}. Choose one of these.")
        if not 0 < self.peak_lr < float("inf"):
            raise InputError("setting-out-of-range", f"--lr is {self.peak_lr:g}, expected a number above 0. Try {self.usual_lr:g}.")
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError("setting-out-of-range", f"--weight-decay is {self.weight_decay:g}, expected 0 or more. Try 0.")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run works with, once it is loaded."""

    name: str
    recipe: Recipe
    settings: TuneSettings
    plan: Plan
    model: PeftModel
    data: TaskData
    train: Encoded
    valid: Encoded
    pad_token_id: int
    device: str
    report: Report

    def batches(self, step: int) -> dict[str, Tensor]:
        """Training batch of a step, on the device; a pure function of the step."""
        return training_batch(self.train, step, settings=self.settings, pad_token_id=self.pad_token_id, device=self.device)

    def evaluate(self, model: PeftModel | None = None) -> dict[str, float]:
        """Metrics and loss on the held-out rows, the headline metric first."""
        from partwise.tune._metrics import evaluate

        chosen = self.model if model is None else model
        was_training = chosen.training
        chosen.eval()
        num_labels = len(self.data.label_names) or 1
        scores = evaluate(
            chosen.get_base_model(), self.valid, self.data.task, batch_size=EVAL_BATCH_SIZE, pad_token_id=self.pad_token_id, num_labels=num_labels
        )
        chosen.train(was_training)
        return scores


def tune(
    recipe: Recipe,
    settings: TuneSettings,
    data: DataSettings | None = None,
    *,
    name: str,
    out: Path,
    resume: bool = False,
    checkpoint_every: int = 50,
    command: Sequence[str] = (),
    task_data: TaskData | None = None,
    report: Report = lambda phase, done, total, loss: None,
) -> dict[str, Any]:
    """Train an adapter, measure it before and after and cut to every rank, and write everything to a run folder.

    Parameters
    ----------
    recipe : Recipe
        The method, with its settings.
    settings : TuneSettings
        Model, budget, steps, learning rate.
    data : DataSettings, optional
        Where the examples come from. Left out: docstrings of the standard library.
    name : str
        Name of the method.
    out : Path
        The run folder to make.
    resume : bool
        Continue the run in ``out`` to the same bits; a finished run is only reported.
    checkpoint_every : int
        Steps between two checkpoints. Has no influence on the result.
    command : sequence of str
        Written to the run folder.
    task_data : TaskData, optional
        The examples, where they have been read already.
    report : callable
        Told (phase, done, total, loss) as the work goes on.

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
    check_place(out, resume=resume)
    data = data or DataSettings()
    job = prepare(recipe, settings, data, name=name, task_data=task_data, report=report)
    header = run_header(job, data, command=command)
    with begin_run(out, header, has_started=has_started) as create:
        run = RunFolder.resume(out, header) if resume else create()
        try:
            return work(job, run, checkpoint_every=checkpoint_every)
        except KeyboardInterrupt:
            run.set_status("interrupted")
            raise Stopped(out) from None


def has_started(run: RunFolder) -> bool:
    """Whether a run has taken a step, so that its folder is worth keeping."""
    return any(row["kind"] == "train" for row in run.metrics())


def work(job: Job, run: RunFolder, *, checkpoint_every: int) -> dict[str, Any]:
    """From an open run folder to its summary: measure, train, finish."""
    from partwise.atomic_files import read_json
    from partwise.checkpoint import latest_checkpoint
    from partwise.tune._loop import LoopSettings, train
    from partwise.tune._result import finish_run, publish

    if run.status == "finished" and run.summary.exists():
        summary: dict[str, Any] = read_json(run.summary)
        return summary if run.report.exists() else publish(run, summary)
    run.set_status("running")
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is None:
        run.rewind(-1)  # rows of a run that was killed before its first checkpoint
    before = measure_before(job, run)
    job.report("training", 0, job.plan.num_steps, None)
    progress = train(
        job.model,
        job.recipe,
        job.plan,
        batches=job.batches,
        settings=LoopSettings(
            lr=job.settings.peak_lr, weight_decay=job.settings.weight_decay, seed=job.settings.seed, checkpoint_every=checkpoint_every
        ),
        run=run,
        checkpoint=checkpoint,
        held_out_loss=lambda: job.evaluate()["loss"],
        report=lambda step, loss: job.report("training", step, job.plan.num_steps, loss),
    )
    return finish_run(job, run, progress, metric_before=before)


def measure_before(job: Job, run: RunFolder) -> float:
    """Headline metric of the model without the adapter; read from the run's rows where it has been measured already."""
    for row in run.metrics():
        if row["kind"] == "eval" and row["step"] == 0:
            return float(row["metric"])
    job.report("measuring before", 0, 1, None)
    with job.model.disable_adapter():
        scores = job.evaluate()
    metric = next(iter(scores.values()))
    run.append_metrics({"kind": "eval", "step": 0, "metric": metric, "loss": scores["loss"]})
    return metric


def prepare(recipe: Recipe, settings: TuneSettings, data: DataSettings, *, name: str, task_data: TaskData | None, report: Report) -> Job:
    """Read the data, load the model, install the adapter. Writes nothing."""
    load_extra("peft", extra="hf")
    load_extra("transformers", extra="hf")
    import torch

    from partwise.tune._batches import check_batch_fits, encode
    from partwise.tune._data import read_task_data
    from partwise.tune._models import load_model
    from partwise.tune.lora import target_linears

    device = choose_device(settings.device)
    report("reading data", 0, 1, None)
    examples = task_data or read_task_data(data, seed=SPLIT_SEED)
    check_batch_fits(len(examples.train), settings.batch_size)
    report("loading model", 0, 1, None)
    num_labels = len(examples.label_names) or 1
    base, tokenizer = load_model(settings.model, task=examples.task, num_labels=num_labels, seed=settings.seed)
    train, valid = (encode(part, tokenizer, task=examples.task, max_length=data.max_length) for part in (examples.train, examples.valid))
    pad_token_id = tokenizer.pad_token_id
    target_r = DEFAULT_TARGET_R if settings.target_r is None else settings.target_r

    def calibration() -> Iterable[dict[str, Tensor]]:
        for step in range(NUM_CALIBRATION_BATCHES):
            yield training_batch(train, step, settings=settings, pad_token_id=pad_token_id, device=device)

    plan = Plan(
        num_steps=settings.max_steps,
        target_r=target_r,
        budget=settings.budget,
        seed=settings.seed,
        task_type=TASK_TYPES[examples.task],
        calibration=calibration,
        num_modules=len(target_linears(base, recipe.target_modules, task_type=TASK_TYPES[examples.task])),
    )
    torch.manual_seed(settings.seed)
    report("installing adapter", 0, 1, None)
    model = recipe.wrap(base.to(device), plan)
    return Job(
        name=name,
        recipe=recipe,
        settings=settings,
        plan=plan,
        model=model,
        data=examples,
        train=train,
        valid=valid,
        pad_token_id=pad_token_id,
        device=device,
        report=report,
    )


def training_batch(train: Encoded, step: int, *, settings: TuneSettings, pad_token_id: int, device: str) -> dict[str, Tensor]:
    """The rows of one step, on the device."""
    from partwise.tune._batches import batch_at

    batch = batch_at(train, step=step, batch_size=settings.batch_size, seed=settings.seed, pad_token_id=pad_token_id)
    return {key: value.to(device) for key, value in batch.items()}


def choose_device(wanted: str | None) -> str:
    """The device asked for, or the GPU if there is one, or the CPU.

    Raises
    ------
    InputError
        When the device does not exist here.
    """
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())] + (["cuda"] if torch.cuda.is_available() else [])
    if wanted not in known:
        raise InputError("unknown-device", f"--device {wanted} does not exist here. Choose one of: {', '.join(known)}.")
    return wanted


def run_header(job: Job, data: DataSettings, *, command: Sequence[str]) -> dict[str, Any]:
    """What ``run.json`` says about a run: everything that its result depends on."""
    settings = {"method": job.name} | flat_settings(job.recipe) | flat_settings(data) | flat_settings(job.settings)
    settings |= {"device": job.device, "target_r": None if job.plan.budget is not None else job.plan.target_r}
    return {
        "partwise": __version__,
        "room": "tune",
        "method": repr(job.recipe),
        "settings": settings,
        "seed": job.settings.seed,
        "data": {
            "name": job.data.name,
            "fingerprint": job.data.fingerprint,
            "num_train": len(job.data.train),
            "num_valid": len(job.data.valid),
        },
        "versions": {"python": platform.python_version()} | {library: installed_version(library) for library in LIBRARIES},
        "command": list(command),
        "status": "running",
    }
