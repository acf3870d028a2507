"""The end of a run: the whole model and tickets as folders that open anywhere, what each is worth on the test split, the summary and the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from partwise import report
from partwise.atomic_files import write_folder
from partwise.checks import InputError
from partwise.models import Part
from partwise.train._cards import model_card
from partwise.train._header import describe as describe_method
from partwise.train._metrics import accuracy, decode_speeds, throughputs
from partwise.train._report import describe
from partwise.train.ticket import Ticket, save_ticket, search
from partwise.train.traffic import data_parallel_bytes

if TYPE_CHECKING:
    from torch import nn

    from partwise.runs import RunFolder
    from partwise.train.job import Job
    from partwise.train.trainer import SubnetTrainer

SIZES = (0.75, 0.5, 0.25)  # of the tickets that every run leaves, beside the whole model
NO_TICKET = {"empty-layer", "config-refuses-heads", "no-tickets"}  # why there is none of some size, or none at all
METRICS = {"causal-lm": "perplexity", "classification": "accuracy"}
NUM_RANDOM = 4  # random tickets of each size that are measured on the test split, too, to show what a ticket is worth that nobody chose
PROMPT_LENGTH, NUM_TOKENS, REPEATS = 32, 64, 5  # of the measurement of speed


@dataclass(frozen=True)
class Measured:
    """A ticket, or the whole model, with its worth on the test split, and that of some random ones of its size."""

    ticket: Ticket
    metric: float
    random_metrics: tuple[float, ...] = ()

    @property
    def chosen(self) -> str:
        """Where the ticket is from: drawn at random, or ranked by some score of its units."""
        scores = self.ticket.scores
        return self.ticket.kinds[scores.index(min(scores))] if self.ticket.kinds else "whole"

    @property
    def spread(self) -> dict[str, float] | None:
        """What tickets are worth that were drawn and not chosen; None where there was no choice."""
        metrics = self.random_metrics
        if len(metrics) < 2:
            return None
        return {"number": len(metrics), "mean": statistics.fmean(metrics), "low": min(metrics), "high": max(metrics)}


def finish_run(job: Job, run: RunFolder, trainer: SubnetTrainer) -> dict[str, Any]:
    """Turn a trained model into the files of a finished run.

    Parameters
    ----------
    job, run
        What ran, and where it is written.
    trainer : SubnetTrainer
        After its last round.

    Returns
    -------
    dict
        What is also written to ``summary.json``.
    """
    job.report("measuring", 0, 1 + len(SIZES), "the whole model")
    found, missing = [measure_whole(job, trainer.model)], []
    for number, keep in enumerate(SIZES, start=1):
        job.report("measuring", number, 1 + len(SIZES), f"tickets of {100 * keep:.0f} %")
        try:
            found.append(measure_ticket(job, trainer, keep, num_candidates=job.settings.num_candidates, seed=job.settings.seed))
        except InputError as error:
            if error.code not in NO_TICKET:
                raise
            missing.append({"keep": keep, "code": error.code, "reason": str(error)})
            if error.code == "no-tickets":
                break
    speeds = measure_speeds(job, [one.ticket.model for one in found])
    facts = training_facts(job, run, trainer)
    job.report("writing", 0, 1, "")
    with write_folder(run.result) as inside:
        rows = [write_model(job, one, speed, inside / folder_of(one.ticket.keep), facts) for one, speed in zip(found, speeds, strict=True)]
    summary = facts | {
        "tickets": [row | {"folder": str(run.result / folder_of(row["keep"]))} for row in rows],
        "missing_tickets": missing,
        "result": str(run.result),
        "run": str(run.path),
        "ledger": trainer.ledger.to_json(),
    }
    return report.publish(run, summary, describe)


def folder_of(keep: float) -> str:
    """Where in ``result`` a ticket lies."""
    return "model" if keep == 1 else f"tickets/keep-{100 * keep:g}"


def measure_whole(job: Job, model: nn.Module) -> Measured:
    """The whole model as the ticket that keeps everything."""
    score = job.loss(model, job.task.calibration)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Measured(Ticket(model.eval(), Part({}), 1.0, score, (score,), num_parameters), test_metric(job, model))


def measure_ticket(job: Job, trainer: SubnetTrainer, keep: float, *, num_candidates: int, seed: int) -> Measured:
    """The best of some random and two ranked tickets on the calibration split, and what it and the first random ones are worth on the test split."""
    metrics: list[float] = []

    def evaluate(model: nn.Module) -> float:
        trainer.refresh_statistics(model)
        if len(metrics) < min(NUM_RANDOM, num_candidates):  # those that are drawn come first
            metrics.append(test_metric(job, model))
        return job.loss(model, job.task.calibration)

    ticket = search(
        trainer.method,
        trainer.model,
        trainer.axes,
        keep,
        evaluate=evaluate,
        num_candidates=num_candidates,
        calibration=job.task.calibration if is_drawn(trainer, keep) else None,
        seed=seed,
    )
    drawn = [metric for metric, kind in zip(metrics, ticket.kinds, strict=False) if kind == "drawn"]
    return Measured(ticket, test_metric(job, ticket.model), tuple(drawn))


def is_drawn(trainer: SubnetTrainer, keep: float) -> bool:
    """Whether tickets of a size differ from one draw to the next; where a method says which units stay, there is nothing to choose."""
    parts = [trainer.method.ticket_part(trainer.model, trainer.axes, keep, np.random.default_rng(number)) for number in range(4)]
    return any(part != parts[0] for part in parts)


def test_metric(job: Job, model: nn.Module) -> float:
    """Perplexity or accuracy on the test split."""
    if job.task.kind == "classification":
        return accuracy(model, job.task.test)
    return math.exp(job.loss(model, job.task.test))


def measure_speeds(job: Job, models: Sequence[nn.Module]) -> list[float]:
    """Tokens that each decodes in a second at batch size 1, or rows that it classifies; by turns, so that all have the same machine."""
    job.report("measuring", 0, 1, "speed")
    if job.task.kind == "classification":
        return throughputs(models, job.task.test[0], repeats=REPEATS)
    limit = min(int(getattr(model.config, "max_position_embeddings", None) or PROMPT_LENGTH + NUM_TOKENS) for model in models)
    prompt_length = min(PROMPT_LENGTH, limit // 2)
    return decode_speeds(models, batch_size=1, prompt_length=prompt_length, num_tokens=min(NUM_TOKENS, limit - prompt_length), repeats=REPEATS)


def write_model(job: Job, measured: Measured, speed: float, folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Save a model with its card and say what it is worth; the row of the summary."""
    ticket = measured.ticket
    row = {
        "keep": ticket.keep,
        "num_parameters": ticket.num_parameters,
        "metric": measured.metric,
        "speed": speed,
        "chosen": measured.chosen,
        "random": measured.spread,
        "calibration_loss": ticket.score,
        "notes": list(ticket.notes),
    }
    save_ticket(ticket, folder, tokenizer=job.task.tokenizer, card=model_card(ticket, row, facts))
    return row | {"bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}


def training_facts(job: Job, run: RunFolder, trainer: SubnetTrainer) -> dict[str, Any]:
    """What the summary and the cards say about the training: over all processes that worked on the run."""
    history, task = trainer.history, job.task
    rows = [row for row in run.metrics() if row["kind"] == "round"]
    state = trainer.state
    assert state is not None
    num_steps, num_parameters = sum(report.num_steps for report in history), sum(parameter.numel() for parameter in task.model.parameters())
    return {
        "method": job.name,
        "call": describe_method(job.method),
        "data": task.name,
        "kind": task.kind,
        "unit": task.unit,
        "metric_name": METRICS[task.kind],
        "model": type(task.model).__name__,
        "num_rounds": job.num_rounds,
        "num_parts": job.method.num_parts,
        "mode": job.settings.mode,
        "num_steps": num_steps,
        "num_samples": sum(report.num_samples for report in history),
        "num_lost": sum(part.was_lost for report in history for part in report.parts),
        "bytes_down": sum(report.bytes_down for report in history),
        "bytes_up": sum(report.bytes_up for report in history),
        "data_parallel_bytes": data_parallel_bytes(num_parameters, num_workers=job.method.num_parts, num_steps=-(-num_steps // job.method.num_parts)),
        "coverage": statistics.fmean(report.coverage for report in history),
        "holders": {name: counts.tolist() for name, counts in state.holders.items()},
        "valid_loss": next((row["valid_loss"] for row in reversed(rows) if row.get("valid_loss") is not None), None),
        "wire": {name: sum(row.get("wire", {}).get(name, 0) for row in rows) for name in ("bytes_down", "bytes_up")},
        "mishaps": mishaps_of(rows),
        "seconds": sum(report.seconds for report in history),
        "seed": job.settings.seed,
        "engine": job.place.engine,
        "ledger_total": ledger_total(trainer),
    }


def mishaps_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """What engines counted, over all rounds: workers lost, parts sent again, results refused."""
    found: dict[str, int] = {}
    for row in rows:
        for name, count in row.get("mishaps", {}).items():
            found[name] = found.get(name, 0) + count
    return found


def ledger_total(trainer: SubnetTrainer) -> dict[str, Any]:
    """The ledger in a line: parts, those that were lost, and what they held on average."""
    total = trainer.ledger.total
    num_parts = sum(total.statuses.values())
    return {"parts": num_parts, "statuses": dict(total.statuses), "parameters": total.parameters // max(1, total.rank), "bytes": total.bytes}
