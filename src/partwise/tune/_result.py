"""The end of a run: save the adapter as peft does, measure it whole and cut to every rank, build the ledger, write the summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

from partwise.atomic_files import write_folder
from partwise.ledger import Ledger, Part
from partwise.tune.truncation import active_adapter, component_energy, factors, keep_components, lora_layers, plan_cut, ranks_of, singular_order

if TYPE_CHECKING:
    from peft import PeftModel

    from partwise.runs import RunFolder
    from partwise.tune._loop import Progress
    from partwise.tune.job import Job

WEIGHTS = "adapter_model.safetensors"
BYTES_PER_NUMBER = 4


def finish_run(job: Job, run: RunFolder, progress: Progress, *, metric_before: float) -> dict[str, Any]:
    """Turn a trained model into the files of a finished run.

    Returns
    -------
    dict
        What is also written to ``summary.json``.
    """
    job.report("measuring after", 0, 1, None)
    model = job.recipe.finish(job.model).eval()
    scores = job.evaluate(model)
    metric_name, metric_after = next(iter(scores.items()))
    if not any(row["kind"] == "eval" and row["step"] == progress.step for row in run.metrics() if progress.step > 0):
        run.append_metrics({"kind": "eval", "step": progress.step, "metric": metric_after, "loss": scores["loss"]})
    ledger = build_ledger(model, first_ranks=progress.first_ranks)
    saved = save_adapter(model, run.result, readme=lambda size: model_card(job, ledger, size, before=metric_before, scores=scores))
    curve = kept_rank_curve(job, model, saved, metric_after=metric_after)
    singular_order(model)
    curve_svd = kept_rank_curve(job, model, saved, metric_after=metric_after)
    summary = {
        "method": job.name,
        "task": job.data.task,
        "metric_name": metric_name,
        "metric_before": metric_before,
        "metric_after": metric_after,
        "metrics_after": scores,
        "saved_parameters": saved["parameters"],
        "saved_bytes": saved["bytes"],
        "ranks": ranks_of(model),
        "kept_rank_curve": curve,
        "kept_rank_curve_svd": curve_svd,
        "cut": "as it stands" if job.recipe.orders_components else "by SVD",
        "seconds": progress.seconds,
        "seconds_per_step": progress.seconds_per_step,
        "num_steps": progress.step,
        "seed": job.settings.seed,
        "adapter": str(run.result),
        "run": str(run.path),
        "ledger": ledger.to_json(),
    }
    return publish(run, summary)


def publish(run: RunFolder, summary: dict[str, Any]) -> dict[str, Any]:
    """Write ``summary.json``, call the run finished, and draw the report."""
    from partwise import report
    from partwise.tune._report import describe

    return report.publish(run, summary, describe)


def save_adapter(model: PeftModel, folder: Path, *, readme: Callable[[dict[str, int]], str]) -> dict[str, int]:
    """Write the adapter as stock peft reads it; the folder appears whole or not at all.

    Returns
    -------
    dict
        ``parameters`` (numbers in the file, a trained head included) and ``bytes`` of the weights file.
    """
    config: Any = model.peft_config[active_adapter(model)]
    for field in ("target_modules", "modules_to_save"):  # sets, whose order in the file would differ from run to run
        if isinstance(getattr(config, field), set | list):
            setattr(config, field, sorted(getattr(config, field)))
    with write_folder(folder) as inside:
        model.save_pretrained(str(inside), safe_serialization=True)
        size = {"parameters": count_parameters(inside / WEIGHTS), "bytes": (inside / WEIGHTS).stat().st_size}
        (inside / "README.md").write_text(readme(size), encoding="utf-8")
    return size


def count_parameters(weights: Path) -> int:
    """Numbers stored in a safetensors file."""
    with safetensors.safe_open(weights, framework="pt") as file:
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118


def kept_rank_curve(job: Job, model: PeftModel, saved: Mapping[str, int], *, metric_after: float) -> list[dict[str, Any]]:
    """Metric with only the first 1, 2, ... components of every module, up to the largest rank, and what such an adapter would weigh."""
    ranks = ranks_of(model)
    sizes = component_sizes(model)
    highest = max(ranks.values())
    points = []
    for rank in range(1, highest + 1):
        job.report("cutting to every rank", rank, highest, None)
        kept = plan_cut(model, rank=rank)
        if rank == highest:
            metric = metric_after
        else:
            with keep_components(model, kept):
                metric = next(iter(job.evaluate(model).values()))
        dropped = sum((ranks[name] - kept[name]) * sizes[name] for name in ranks)
        points.append(
            {"rank": rank, "parameters": saved["parameters"] - dropped, "bytes": saved["bytes"] - BYTES_PER_NUMBER * dropped, "metric": metric}
        )
    return points


def component_sizes(model: PeftModel) -> dict[str, int]:
    """Numbers in one rank-one component of each module: in features plus out features."""
    adapter = active_adapter(model)
    pairs = {name: factors(layer, adapter) for name, layer in lora_layers(model).items()}
    return {name: down.shape[1] + up.shape[0] for name, (down, up, _) in pairs.items()}


def build_ledger(model: PeftModel, *, first_ranks: Mapping[str, int]) -> Ledger:
    """One row per rank-one component: where, what it costs, its size ``scale * |a| * |b|`` as score, and what became of it.

    Components beyond a module's first rank were grown; those of the first rank that the adapter no longer has were dropped.
    """
    sizes = component_sizes(model)
    parts = []
    for name, energies in component_energy(model).items():
        first = first_ranks.get(name, 0)
        for index, energy in enumerate(energies):
            parts.append(
                Part(
                    where=name,
                    index=index,
                    parameters=sizes[name],
                    bytes=BYTES_PER_NUMBER * sizes[name],
                    score=energy**0.5,
                    status="kept" if index < first else "grown",
                )
            )
        parts += [dropped_part(name, index) for index in range(len(energies), first)]
    for name in first_ranks.keys() - sizes.keys():
        parts += [dropped_part(name, index) for index in range(first_ranks[name])]
    return Ledger(tuple(parts))


def dropped_part(name: str, index: int) -> Part:
    """A component that training took away; it costs nothing any more."""
    return Part(where=name, index=index, parameters=0, bytes=0, score=None, status="dropped")


def model_card(job: Job, ledger: Ledger, size: Mapping[str, int], *, before: float, scores: Mapping[str, float]) -> str:
    """The README.md beside the adapter."""
    from partwise.report import ledger_markdown

    metric_name, after = next(iter(scores.items()))
    base = getattr(job.model.get_base_model().config, "_name_or_path", "") or "the base model"
    return f"""---
library_name: peft
tags: [lora, partwise]
---

# Adapter trained by partwise

A plain LoRA adapter for `{base}`; load it with `peft.PeftModel.from_pretrained(base_model, "this folder")`.

| | |
|---|---|
| method | `{job.recipe!r}` |
| data | {job.data.name} ({len(job.data.train)} rows to train on, {len(job.data.valid)} held out) |
| task | {job.data.task} |
| steps, batch size, peak learning rate, seed | {job.settings.max_steps}, {job.settings.batch_size}, {job.settings.peak_lr:g}, {job.settings.seed} |
| {metric_name} on held-out rows, before | {before:.4f} |
| {metric_name} on held-out rows, after | {after:.4f} |
| numbers saved | {size["parameters"]:,} |

## Part ledger

{ledger_markdown(ledger)}
"""
