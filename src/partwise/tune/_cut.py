"""A smaller adapter from a finished run, measured on the run's own held-out rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.atomic_files import refuse_pickles
from partwise.checks import InputError
from partwise.flags import from_settings
from partwise.runs import RunFolder
from partwise.tune._data import DataSettings
from partwise.tune.job import Job, TuneSettings, prepare
from partwise.tune.lora import lora_ranks
from partwise.tune.recipe import Plan, Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class SavedAdapter(Recipe):
    """An adapter that exists already, in place of a method that would train one."""

    folder: Path

    def wrap(self, model: nn.Module, plan: Plan) -> PeftModel:
        """Load it with stock peft."""
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(self.folder))

    def ranks(self, model: PeftModel) -> dict[str, int]:
        """Rank of each module."""
        return lora_ranks(model)


def truncate_run(run: Path, *, rank: int | None = None, budget: int | None = None, out: Path) -> dict[str, Any]:
    """Cut the adapter of a finished run, write the smaller one, and measure both.

    Parameters
    ----------
    run : Path
        The run's folder.
    rank : int, optional
        Keep at most this many components in every module.
    budget : int, optional
        Keep this many over all modules together. Give one of the two.
    out : Path
        Folder for the smaller adapter; must be new.

    Returns
    -------
    dict
        ``metric_name``, ``metric_before``, ``metric_after``, ``parameters_before``, ``saved_parameters``, ``bytes_before``, ``saved_bytes``,
        ``ranks``, ``adapter``, ``run``.

    Raises
    ------
    InputError
        ``run-not-finished``, ``rank-or-budget``, ``cut-out-of-range``, ``folder-exists``, ``pickle-refused``, ``data-changed``. Nothing is written then.
    """
    if (rank is None) == (budget is None):
        raise InputError("rank-or-budget", f"got --rank {rank} and --budget {budget}, expected exactly one of them. Pass --rank 1, for example.")
    folder = RunFolder.open(run)
    if folder.status != "finished" or not folder.result.is_dir():
        raise InputError(
            "run-not-finished", f"{run} is {folder.status}, expected a finished run with an adapter. Finish it: partwise tune --out {run} --resume"
        )
    refuse_pickles(folder.result)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("folder-exists", f"{out} exists already, expected a new folder. Choose another --out.")
    job = load_job(folder)
    return cut(job, folder, rank=rank, budget=budget, out=out)


def load_job(folder: RunFolder) -> Job:
    """Model, adapter and examples of a finished run."""
    header = folder.header
    settings = from_settings(TuneSettings, header["settings"])
    job = prepare(
        SavedAdapter(folder=folder.result),
        settings,
        from_settings(DataSettings, header["settings"]),
        name=header["settings"]["method"],
        task_data=None,
        report=lambda phase, done, total, loss: None,
    )
    if job.data.fingerprint != header["data"]["fingerprint"]:
        raise InputError(
            "data-changed",
            f"{job.data.name} is no longer what the run was measured on: its fingerprint is {job.data.fingerprint[:12]}, "
            f"expected {header['data']['fingerprint'][:12]}. Restore the data, or make the run again.",
        )
    return job


def cut(job: Job, folder: RunFolder, *, rank: int | None, budget: int | None, out: Path) -> dict[str, Any]:
    """Measure, cut in the order that the run's method leaves or else in singular order, measure again, save."""
    from partwise.atomic_files import read_json
    from partwise.tune._result import WEIGHTS, build_ledger, count_parameters, model_card, save_adapter
    from partwise.tune.truncation import compact, plan_cut, ranks_of, singular_order

    scores_before = job.evaluate()
    metric_name, before = next(iter(scores_before.items()))
    first_ranks = ranks_of(job.model)
    if read_json(folder.summary)["cut"] == "by SVD":
        singular_order(job.model)
    compact(job.model, plan_cut(job.model, rank=rank, budget=budget))
    scores = job.evaluate()
    ledger = build_ledger(job.model, first_ranks=first_ranks)
    saved = save_adapter(job.model, out, readme=lambda size: model_card(job, ledger, size, before=before, scores=scores))
    return {
        "metric_name": metric_name,
        "metric_before": before,
        "metric_after": scores[metric_name],
        "parameters_before": count_parameters(folder.result / WEIGHTS),
        "saved_parameters": saved["parameters"],
        "bytes_before": (folder.result / WEIGHTS).stat().st_size,
        "saved_bytes": saved["bytes"],
        "ranks": ranks_of(job.model),
        "adapter": str(out),
        "run": str(folder.path),
    }
