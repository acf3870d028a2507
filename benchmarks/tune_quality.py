"""Quality of every AdaPaD preset beside LoRA, AdaLoRA and IncreLoRA on the built-in task, whole and cut to every rank.

Same data, steps, learning rate, batch and seeds for all, interleaved seed by seed in one process, and equal saved parameters: growth stops where the
next component would make the adapter larger than LoRA's. The learning rate is the best of LoRA's own grid (``--grid`` measures it). Every adapter is cut twice:
as it stands, and rotated to singular order first; LoRA cut by SVD is the strongest cheap rival. Needs the extras hf and demo.

``python benchmarks/tune_quality.py [--seeds 5] [--target-r 2] [--grid]``. An interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import rows
from partwise.atomic_files import read_json
from partwise.tune._data import DataSettings, read_task_data
from partwise.tune.adalora import AdaLoRA
from partwise.tune.adapad_recipe import AdaPaD
from partwise.tune.adapad_settings import PRESETS, AdaPaDSettings
from partwise.tune.compare import comparison_rows
from partwise.tune.increlora import IncreLoRA
from partwise.tune.job import SPLIT_SEED, TuneSettings, tune
from partwise.tune.lora import LoRA
from partwise.tune.recipe import Recipe

NAME = "tune_quality"
FRESH = 5  # the presets were chosen on seeds below
DEFAULT_PRESET = AdaPaDSettings().preset
GRID = (0.003, 0.006, 0.012)
TASK: dict[str, Any] = {"max_steps": 200, "batch_size": 16, "lr": 0.006}  # the built-in task; lr is the best of the grid
SVD = "lora, by SVD"


def recipes(*, r: int) -> dict[str, Recipe]:
    """Everything that is compared, LoRA first."""
    presets = {f"adapad {preset}": AdaPaD(settings=AdaPaDSettings(preset=preset, r=r)) for preset in PRESETS}  # type: ignore[arg-type]
    return {"lora": LoRA(), **presets, "increlora": IncreLoRA(r=r), "adalora": AdaLoRA()}


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def at_rank(entry: Mapping[str, Any], rank: int) -> list[float] | None:
    """Metric of each seed with ``rank`` components kept; None where a seed's adapter has no such rank."""
    points = [{point["rank"]: point["metric"] for point in curve} for curve in entry["kept_rank_curve"]]
    return [curve[rank] for curve in points] if all(rank in curve for curve in points) else None


def measure(methods: Mapping[str, Recipe], settings: TuneSettings, seeds: Sequence[int], runs: Path) -> None:
    """Train every method with every seed, seed by seed; finished runs are left as they are."""
    examples = read_task_data(DataSettings(), seed=SPLIT_SEED)
    for seed in seeds:
        for name, recipe in methods.items():
            place = runs / f"{name.replace(' ', '-')}-{seed}"
            if not (place / "summary.json").exists():
                tune(recipe, replace(settings, seed=seed), name=name, out=place, resume=(place / "run.json").exists(), task_data=examples)


def quality(num_seeds: int, target_r: float, runs: Path, *, only: int | None, confirm: bool) -> None:
    """Run the comparison, or only one seed of it, and append the rows once all runs are there."""
    start = time.perf_counter()
    methods = recipes(r=max(4, int(2 * target_r)))
    if confirm:
        methods = {name: methods[name] for name in ("lora", f"adapad {DEFAULT_PRESET}")}
    settings = TuneSettings(target_r=target_r, **TASK)
    seeds = range(FRESH, FRESH + num_seeds) if confirm else range(num_seeds)
    runs = runs / f"target-r-{target_r:g}"
    measure(methods, settings, seeds if only is None else [only], runs)
    if only is not None:
        return
    summaries = {name: [read_json(runs / f"{name.replace(' ', '-')}-{seed}" / "summary.json") for seed in seeds] for name in methods}
    table = {entry["method"]: entry for name in methods for entry in comparison_rows(name, summaries[name], seeds=seeds)}
    seconds = sum(summary["seconds"] for group in summaries.values() for summary in group) + time.perf_counter() - start
    summary = summaries["lora"][0]
    lora, size = table["lora"], f"target rank {target_r:g}, {settings.max_steps} steps{', fresh seeds' * confirm}"
    common: dict[str, Any] = {"unit": summary["metric_name"], "seeds": lora["seeds"], "seconds": seconds}
    for preset in (DEFAULT_PRESET,) if confirm else PRESETS:
        name = f"adapad {preset}"
        own = table[name]
        note = f"{size}; saved parameters: median {statistics.median(own['saved_parameters']):.0f}, LoRA {statistics.median(lora['saved_parameters']):.0f}"
        difference = statistics.mean(own["metric"]) - statistics.mean(lora["metric"])
        allowed = standard_error(lora["metric"])
        rows.append(
            NAME,
            rows.Row(
                claim=f"AdaPaD ({preset}) is within one standard error of LoRA with all components ({size})",
                method=repr(methods[name]),
                baseline=repr(methods["lora"]),
                values=own["metric"],
                baseline_values=lora["metric"],
                expected="mean at least LoRA's mean less LoRA's standard error",
                held=difference >= -allowed,
                note=f"{note}; difference of means {difference:+.4f}, LoRA's standard error {allowed:.4f}",
                **common,
            ),
        )
        cut, rival = at_rank(own, 1), at_rank(table[SVD], 1)
        assert cut is not None
        assert rival is not None
        rows.append(
            NAME,
            rows.Row(
                claim=f"AdaPaD ({preset}) cut to one component in each module is above LoRA cut there by SVD ({size})",
                method=repr(methods[name]),
                baseline=f"{methods['lora']!r}, rotated to singular order before the cut",
                values=cut,
                baseline_values=rival,
                expected="mean above",
                held=statistics.mean(cut) > statistics.mean(rival),
                note=f"the smallest cut that leaves every module a component; difference of means {statistics.mean(cut) - statistics.mean(rival):+.4f}",
                **common,
            ),
        )
    for label, entry in table.items():
        for rank in range(1, 2 * int(target_r) + 5):
            values = at_rank(entry, rank)
            if values is not None:
                parameters = [next(point["parameters"] for point in curve if point["rank"] == rank) for curve in entry["kept_rank_curve"]]
                rows.append(
                    NAME,
                    rows.Row(
                        claim=f"curve: {label}, at most {rank} components in a module ({size})",
                        method=label,
                        values=values,
                        note=f"median {statistics.median(parameters):.0f} saved parameters; {statistics.median(entry['seconds_per_step']):.3f} s a step",
                        **common,
                    ),
                )


def grid(num_seeds: int, runs: Path) -> None:
    """Tune LoRA's learning rate, the one that everybody then gets."""
    from partwise.checks import RunError

    for lr in GRID:
        start = time.perf_counter()
        values = []
        for seed in range(num_seeds):
            place = runs / f"grid-{lr:g}-{seed}"
            try:
                summary = tune(
                    LoRA(),
                    replace(TuneSettings(target_r=2.0, **TASK), lr=lr, seed=seed),
                    name="lora",
                    out=place,
                    resume=(place / "run.json").exists(),
                )
            except RunError:
                continue
            values.append(summary["metric_after"])
        if values:
            rows.append(
                NAME,
                rows.Row(
                    claim=f"tuning: LoRA at learning rate {lr:g}",
                    method=repr(LoRA()),
                    values=values,
                    unit="accuracy",
                    seeds=range(len(values)),
                    seconds=time.perf_counter() - start,
                    note="LoRA's own grid; the built-in task's learning rate is chosen from it",
                ),
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--target-r", type=float, default=2.0)
    parser.add_argument("--only", type=int, help="train one seed and append nothing: several processes can share the work")
    parser.add_argument("--confirm", action="store_true", help="the default preset and LoRA again, on as many seeds that no choice was made on")
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--runs", type=Path, default=rows.ROOT / "runs" / "bench-tune-quality")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.grid:
        grid(2, options.runs)
    else:
        quality(options.seeds, options.target_r, options.runs, only=options.only, confirm=options.confirm)
