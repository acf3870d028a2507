"""The end of a run: components, eigenvalues and scores as files, the ledger, the summary and the report."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from partwise import report
from partwise.atomic_files import to_json_line, write_folder
from partwise.decompose._report import describe
from partwise.decompose.job import num_parts
from partwise.ledger import Ledger, Part
from partwise.linalg.products import one_blas_thread

if TYPE_CHECKING:
    from partwise.decompose._covariance import Covariance
    from partwise.decompose._eigen_estimator import EigenEstimator
    from partwise.decompose._recorder import Recorder
    from partwise.decompose.job import Job
    from partwise.ledger import Status
    from partwise.rounds import Schedule
    from partwise.runs import RunFolder

MAX_SCORES = 5000  # rows of scores.csv
ROWS_AT_ONCE = 64

Array = NDArray[Any]


def finish_run(
    job: Job, run: RunFolder, covariance: Covariance, recorder: Recorder, *, said: Sequence[str], num_workers: int | None
) -> dict[str, Any]:
    """Turn a fitted estimator into the files of a finished run.

    Parameters
    ----------
    job, run, covariance, recorder
        What ran, where it is written, on what, and what was counted on the way.
    said : sequence of str
        What the estimator warned of.
    num_workers : int or None
        Workers of the engine.

    Returns
    -------
    dict
        What is also written to ``summary.json``.
    """
    job.report("writing", 0, 1, "")
    estimator = job.estimator
    schedule = None if recorder.was_resumed else getattr(estimator, "schedule_", None)  # of a resumed run only the end is known
    write_result(run.result, estimator, covariance, columns=job.data.columns, schedule=schedule)
    rows = component_rows(estimator)
    test = estimator.missed_value_test_
    summary = {
        "method": job.name,
        "data": job.data.name,
        "num_samples": int(covariance.num_samples),
        "num_features": int(covariance.num_features),
        "num_components": len(rows),
        "components": rows,
        "total_variance": float(covariance.total_variance),
        "share": sum(row["share"] for row in rows),
        "worst_residual": max(row["residual"] for row in rows) / rows[0]["value"],
        "converged": bool(estimator.converged_),
        "tol": float(estimator.tol),
        "num_rounds": int(estimator.n_iter_),
        "missed_value_test": None if test is None else plain(dataclasses.asdict(test)),
        "warnings": list(said),
        "seconds": recorder.seconds,
        "seed": job.seed,
        "engine": job.place.engine,
        "traffic": traffic_of(run, recorder),
        "result": str(run.result),
        "run": str(run.path),
        "ledger": build_ledger(job, recorder, covariance, num_workers=num_workers).to_json(),
    }
    return report.publish(run, summary, describe)


def component_rows(estimator: EigenEstimator) -> list[dict[str, Any]]:
    """One object per component: eigenvalue, share of the variance, residual, and the interval that is sure to hold an eigenvalue."""
    columns = (estimator.explained_variance_, estimator.explained_variance_ratio_, estimator.residuals_, *estimator.eigenvalue_intervals_.T)
    names = ("value", "share", "residual", "lower", "upper")
    rows = zip(*columns, strict=True)
    return [{"component": number, **dict(zip(names, map(float, row), strict=True))} for number, row in enumerate(rows, start=1)]


def traffic_of(run: RunFolder, recorder: Recorder) -> dict[str, int]:
    """Bytes of all rounds, from the rows, and what the engines counted: over all processes that worked on the run."""
    sent = [message for row in run.metrics() for message in row.get("traffic", [])]
    counts = recorder.all_counts()
    totals = {"bytes_down": sum(down for _, down, _ in sent), "bytes_up": sum(up for _, _, up in sent), "placed_bytes": counts["placed_bytes"]}
    return totals | {name.removeprefix("num_"): count for name, count in counts.items() if name.startswith("num_")}


def build_ledger(job: Job, recorder: Recorder, covariance: Covariance, *, num_workers: int | None) -> Ledger:
    """One row per component that was asked for: which worker has it, what it costs, its share of the variance, and what became of it.

    A component is dropped when the data have no such direction, and lost when its worker never published it.
    """
    estimator, state = job.estimator, recorder.state
    size = -(-estimator.n_components // num_parts(estimator))  # components of one part
    parts = []
    for index in range(estimator.n_components):
        is_there = index < estimator.n_components_
        never = state is not None and index < len(state.updates) and state.updates[index] == 0 and state.present[index]
        status: Status = "lost" if never else "kept" if is_there else "dropped"
        cost = covariance.num_features if status == "kept" else 0
        where = "this process" if job.place.engine == "inline" else f"worker {index // size % (num_workers or 1)}"
        score = float(estimator.explained_variance_ratio_[index]) if is_there else None
        parts.append(
            Part(where=where, index=index, parameters=cost, bytes=cost * estimator.components_.dtype.itemsize, score=score, status=status)
        )
    return Ledger(tuple(parts))


def write_result(
    folder: Path, estimator: EigenEstimator, covariance: Covariance, *, columns: Sequence[str] | None, schedule: Schedule | None
) -> None:
    """Write ``components.safetensors``, three tables, and the ``schedule.json`` of an asynchronous run; the folder appears whole or not at all."""
    arrays = {
        "components": estimator.components_,
        "mean": estimator.mean_,
        "explained_variance": estimator.explained_variance_,
        "residuals": estimator.residuals_,
        "intervals": estimator.eigenvalue_intervals_,
    }
    names = [f"component_{number}" for number in range(1, len(estimator.components_) + 1)]
    features = columns if columns is not None else [f"x{number}" for number in range(covariance.num_features)]
    rows = component_rows(estimator)
    with write_folder(folder) as inside:
        (inside / "components.safetensors").write_bytes(safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
        write_csv(
            inside / "components.csv",
            ["feature", "mean", *names],
            ([feature, *numbers] for feature, numbers in zip(features, np.column_stack([estimator.mean_, estimator.components_.T]), strict=True)),
        )
        write_csv(inside / "eigenvalues.csv", list(rows[0]), (list(row.values()) for row in rows))
        if schedule is not None:
            (inside / "schedule.json").write_bytes(to_json_line(schedule.to_json()))
        chosen, scores = first_scores(estimator, covariance)
        write_csv(inside / "scores.csv", ["row", *names[:2]], ([int(row), *numbers] for row, numbers in zip(chosen, scores, strict=True)))


def first_scores(estimator: EigenEstimator, covariance: Covariance) -> tuple[Array, Array]:
    """Numbers of at most 5000 evenly spaced rows of the data, and their coordinates along the first two components."""
    num_rows = min(covariance.num_samples, MAX_SCORES)
    chosen = np.arange(num_rows) * covariance.num_samples // num_rows  # (rows,)
    with one_blas_thread():  # a few rows at a time: rows that lie far apart in a mapped file bring their whole neighbourhood into memory
        pieces = np.array_split(chosen, -(-num_rows // ROWS_AT_ONCE))
        scores = np.concatenate([covariance.rows(piece) @ estimator.components_[:2].T for piece in pieces])  # (rows, 2)
    return chosen, scores


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with every digit that the numbers have."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([number.item() if isinstance(number, np.generic) else number for number in row] for row in rows)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of numpy as Python's own, as JSON wants them."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
