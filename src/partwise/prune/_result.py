"""The end of a run: the model is cut and measured beside the whole one, and everything is saved."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from partwise.atomic_files import write_folder
from partwise.prune._budget import CONTEXT
from partwise.prune._header import describe_method

if TYPE_CHECKING:
    from partwise.ledger import Ledger, Part
    from partwise.prune.job import Job
    from partwise.prune.plan import PrunePlan
    from partwise.runs import RunFolder

__all__ = ["finish_run", "ledger_rows", "notes_about", "open_line"]

MOST_PARTS = 6000  # of which the summary holds each, for the report to draw
POINTS = 40  # of a curve
MUCH = 2  # times the perplexity of the whole model: more is said in words


def finish_run(job: Job, run: RunFolder, plan: PrunePlan, *, seconds: float) -> dict[str, Any]:
    """Cut the model, measure both, save the small one with its card, and write summary and report.

    Parameters
    ----------
    job : Job
        Whole model and text.
    run : RunFolder
        Where everything goes.
    plan : PrunePlan
        What stays.
    seconds : float
        That the plan took.
    """
    from partwise import prune, report
    from partwise.prune._cards import model_card
    from partwise.prune._report import describe

    whole = job.subject.opened.model
    job.report("cutting", 0, 1, "")
    ledger = plan.ledger(whole)
    layers = ledger_rows(whole, ledger, job.method)
    small = prune.apply(whole, plan).eval()
    before, after = measure(job, small)
    facts = run_facts(job, plan, seconds) | {"before": before, "after": after, "layers": layers}
    facts["notes"] = notes_about(whole, layers, before, after)
    job.report("writing", 0, 1, "")
    small = small.to(job.subject.saved_dtype)
    is_plain = opens_alone(small)
    with write_folder(run.result) as inside:
        prune.save(small, inside / "model", plan=plan, tokenizer=job.subject.opened.tokenizer, card=model_card(facts, is_plain=is_plain))
    place = run.result / "model"
    summary = facts | {
        "is_plain": is_plain,
        "result": str(place),
        "open": open_line(str(place), is_plain=is_plain),
        "plan": str(place / "plan"),
        "run": str(run.path),
        "ledger": ledger.to_json() if len(ledger.parts) <= MOST_PARTS else [],
    }
    return report.publish(run, summary, describe)


def measure(job: Job, small: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Perplexity, size and speed of the whole model and of the small one."""
    from partwise.prune._measuring import costs_of, decode_speeds, perplexity

    whole, ids = job.subject.opened.model, job.texts.evaluation.ids
    found = []
    for name, model in (("the whole model", whole), ("the small model", small)):
        value = perplexity(model, ids, progress=lambda done, total, name=name: job.report("evaluating", done, total, name))  # type: ignore[misc]
        costs = costs_of(model, dtype=job.subject.saved_dtype)
        found.append({"perplexity": value if math.isfinite(value) else None} | dataclasses.asdict(costs) | {"sequence_bytes": costs.sequence_bytes})
    job.report("evaluating", 0, 1, "speed of writing")
    speeds = decode_speeds([whole, small])
    before, after = (row | {"tokens_per_second": speed} for row, speed in zip(found, speeds, strict=True))
    return before, after


def run_facts(job: Job, plan: PrunePlan, seconds: float) -> dict[str, Any]:
    """What was done, with what."""
    opened, texts = job.subject.opened, job.texts
    num_rows, num_tokens = texts.evaluation.ids.shape
    return {
        "model": opened.name,
        "class": type(opened.model).__name__,
        "method": job.name,
        "call": describe_method(job.method),
        "seed": job.settings.seed,
        "device": str(opened.model.device),
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "saved_dtype": str(job.subject.saved_dtype).removeprefix("torch."),
        "calibration": {"data": texts.calibration.name if job.needs_text else None, "num_tokens": plan.num_tokens, "seconds": seconds},
        "evaluation": {"data": texts.evaluation.name, "num_rows": num_rows, "num_tokens": num_tokens},
        "context": CONTEXT,
    }


def ledger_rows(model: Any, ledger: Ledger, method: Any) -> list[dict[str, Any]]:
    """One row per axis, or per layer that was made thin: what stays of it, what that costs, and how much of what all of it is worth.

    Parameters
    ----------
    model : torch.nn.Module
        The whole one.
    ledger : Ledger
        Of the plan for this model.
    method : PruneMethod
        Says how its scores add up.

    Returns
    -------
    list of dict
        ``where``, ``units`` (their kind), ``kept``, ``of``, ``parameters``, ``share`` of the scores that stays (None where nothing was scored, or scores do
        not add up), and ``curve``: the share that the best units hold, for 0 to all of them.
    """
    from partwise.models import coupled_axes

    kinds = {axis.name: getattr(axis, "kind", "blocks") for axis in coupled_axes(model)}
    parts: dict[str, list[Part]] = {}
    for part in ledger.parts:
        parts.setdefault(part.where, []).append(part)
    rows = []
    for total in ledger.by_module():
        worth = _worth(parts[total.where], method)
        kept = sum(value for value, part in zip(worth, parts[total.where], strict=True) if part.is_present) if worth else None
        row = {"where": total.where, "units": kinds.get(total.where, "directions"), "kept": total.rank, "of": len(parts[total.where])}
        rows.append(row | {"parameters": total.parameters, "share": kept, "curve": _curve(worth)})
    return rows


def _worth(parts: Sequence[Part], method: Any) -> list[float]:
    """Each unit's share of the sum of all scores; nothing where scores are missing or do not add up to anything."""
    import torch

    scores = [part.score for part in parts]
    if None in scores:
        return []
    worth = torch.tensor(scores, dtype=torch.float64)
    worth = method.shares(worth) if hasattr(method, "shares") else worth
    total = float(worth.sum())
    return (worth / total).tolist() if 0 < total < math.inf and float(worth.min()) >= 0 else []


def _curve(worth: Sequence[float]) -> list[float]:
    """The share of the best units, at `POINTS` steps from none to all."""
    if not worth:
        return []
    sums = [0.0, *itertools.accumulate(sorted(worth, reverse=True))]
    places = [(len(sums) - 1) * point / POINTS for point in range(POINTS + 1)]
    return [sums[int(place)] + (place % 1) * (sums[min(int(place) + 1, len(sums) - 1)] - sums[int(place)]) for place in places]


def notes_about(model: Any, layers: Sequence[Mapping[str, Any]], before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What a user should know before relying on the result.

    Parameters
    ----------
    model : torch.nn.Module
        The whole one.
    layers : sequence of mapping
        From `ledger_rows`.
    before, after : mapping
        What both models are worth.
    """
    from partwise.prune.safe_scores import advise, safe_score

    notes = []
    if any(row["units"] == "states" for row in layers):
        notes.append("States are a small part of the weights. What shrinks is the memory that every sequence holds.")
    for kind in ("neurons", "heads"):
        if rows := [row for row in layers if row["units"] == kind]:
            keep = sum(row["kept"] for row in rows) / sum(row["of"] for row in rows)
            notes += advise(safe_score(model), keep=keep, kinds=(kind,))
    if not before["perplexity"]:
        notes.append("The perplexity of the whole model is no finite number: look at the model and at the text before anything else.")
    elif not after["perplexity"] or after["perplexity"] > MUCH * before["perplexity"]:
        notes.append("The small model predicts much worse. Keep more, take another method (partwise prune sweep shows several), or train what is left.")
    return notes


def opens_alone(small: Any) -> bool:
    """Whether stock transformers opens a model once it is saved: its layers are whole layers, and of one size."""
    from partwise.models.low_rank_layers import ranks_of

    return not ranks_of(small) and not small.config.is_heterogeneous


def open_line(folder: str, *, is_plain: bool) -> str:
    """The line that opens the small model."""
    return f'AutoModelForCausalLM.from_pretrained("{folder}")  # transformers' if is_plain else f'partwise.load("{folder}")'
