"""Several methods side by side: same data, steps, seeds, learning rate and budget of components, interleaved in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from partwise.checks import InputError
from partwise.runs import RunFolder, check_place
from partwise.tune._data import DataSettings, read_task_data
from partwise.tune.job import SPLIT_SEED, Report, TuneSettings, prepare, tune
from partwise.tune.recipe import Recipe


def compare(
    recipes: Mapping[str, Recipe],
    settings: TuneSettings,
    data: DataSettings | None = None,
    *,
    num_seeds: int = 1,
    out: Path,
    resume: bool = False,
    checkpoint_every: int = 50,
    command: Sequence[str] = (),
    report: Report = lambda phase, done, total, loss: None,
) -> dict[str, Any]:
    """Run each method with each seed, seed by seed, and put the numbers side by side.

    The first method with the first seed is the run in ``out``; the others are whole runs below ``out/compare``. Every method appears twice: its
    components cut as they stand, and rotated to singular order before the cut.

    Parameters
    ----------
    recipes : mapping of str to Recipe
        Methods by name, the main one first. They share ``settings``; what is their own is in the recipe.
    num_seeds : int
        Seeds ``settings.seed``, ``settings.seed + 1``, ...
    out, resume, checkpoint_every, command, report
        As in ``tune``.

    Returns
    -------
    dict
        Summary of the first run with the key ``comparison``: one entry per method, lists by seed.

    Raises
    ------
    InputError
        ``nothing-to-compare`` for fewer than two methods or no seed; else as ``tune``.
    """
    from partwise.tune._result import publish

    if len(recipes) < 2 or num_seeds < 1:
        raise InputError(
            "nothing-to-compare",
            f"got {len(recipes)} different methods ({', '.join(recipes)}) and {num_seeds} seeds, expected at least two methods and one seed. "
            "Name another method, as in --compare lora.",
        )
    settings.check()
    check_place(out, resume=resume)
    data = data or DataSettings()
    examples = read_task_data(data, seed=SPLIT_SEED)
    seeds = list(range(settings.seed, settings.seed + num_seeds))
    main = next(iter(recipes))
    for name, recipe in recipes.items():  # a method that cannot work says so before another one has trained
        if name != main and not resume:
            prepare(recipe, settings, data, name=name, task_data=examples, report=lambda phase, done, total, loss: None)
    summaries: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
    for number, seed in enumerate(seeds):
        for name, recipe in recipes.items():
            place = out if (name, number) == (main, 0) else out / "compare" / f"{name}-seed-{seed}"
            summary = tune(
                recipe,
                replace(settings, seed=seed),
                data,
                name=name,
                out=place,
                resume=resume and (place / "run.json").exists(),
                checkpoint_every=checkpoint_every,
                command=command,
                task_data=examples,
                report=lambda phase, done, total, loss, name=name, seed=seed: report(f"{name}, seed {seed}: {phase}", done, total, loss),  # type: ignore[misc]
            )
            summaries[name].append(summary)
    whole = dict(summaries[main][0])
    whole["comparison"] = [row for name in recipes for row in comparison_rows(name, summaries[name], seeds=seeds)]
    return publish(RunFolder.open(out), whole)


def comparison_rows(name: str, summaries: Sequence[Mapping[str, Any]], *, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Two rows of the comparison for one method: cut as it stands, and cut by singular value."""
    row = {
        "seeds": list(seeds),
        "metric": [summary["metric_after"] for summary in summaries],
        "saved_parameters": [summary["saved_parameters"] for summary in summaries],
        "seconds_per_step": [summary["seconds_per_step"] for summary in summaries],
    }
    orders = {name: "kept_rank_curve", f"{name}, by SVD": "kept_rank_curve_svd"}
    return [{"method": label, **row, "kept_rank_curve": [summary[key] for summary in summaries]} for label, key in orders.items()]
