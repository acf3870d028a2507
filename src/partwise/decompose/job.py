"""The main job of the room: one matrix, one method; out comes a run folder with components, eigenvalues and intervals that are guaranteed.

``decompose`` is what ``partwise decompose`` calls. Light to import: the libraries load when a job starts.
"""

from __future__ import annotations

import inspect
import logging
import platform
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise import __version__
from partwise.checks import InputError, check_at_least, check_choice, load_extra
from partwise.decompose import METHODS
from partwise.engine.place import Place
from partwise.flags import load_target
from partwise.runs import RunFolder, Stopped, begin_run, check_place, installed_version, stop_flag

if TYPE_CHECKING:
    from partwise.decompose._eigen_estimator import EigenEstimator

logger = logging.getLogger(__name__)

PARALLEL = "parallel-deflation-pca"
DIGITS = "scikit-learn's digits"
LARGEST_SEED = 2**32 - 1  # that scikit-learn takes
LIBRARIES = ("numpy", "scipy", "scikit-learn", "safetensors")

Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Data of a run, with what ``run.json`` says about it."""

    name: str
    rows: Any
    columns: Sequence[str] | None
    fingerprint: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run works with, once it is loaded."""

    name: str
    estimator: EigenEstimator
    settings: Mapping[str, Any]
    seed: int
    place: Place
    data: Matrix
    checkpoint_every: int | None
    report: Report


def decompose(
    method: str,
    path: Path | None,
    settings: Mapping[str, Any],
    *,
    out: Path,
    key: str | None = None,
    seed: int = 0,
    place: Place | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    command: Sequence[str] = (),
    report: Report = lambda phase, done, total, note: None,
) -> dict[str, Any]:
    """Find the leading eigenvectors of the covariance of a matrix, and write everything to a run folder.

    Parameters
    ----------
    method : str
        Name of the method, as in ``partwise list decompose``.
    path : Path or None
        A ``.npy``, ``.npz``, ``.csv``, ``.parquet`` or ``.mtx`` file, or a zarr folder; rows are samples. None: scikit-learn's digits.
    settings : mapping
        Arguments of the method's estimator, without ``random_state`` and ``engine``.
    out : Path
        The run folder to make.
    key : str, optional
        Name of the array in a file that holds several.
    seed : int
        Seed of everything random.
    place : Place, optional
        Where the parts run. Left out: in this process.
    resume : bool
        Continue the run in ``out``; synchronous rounds end with the same bits as a run that was never stopped. A finished run is only reported.
    checkpoint_every : int, optional
        Rounds between two checkpoints. Left out: about a second, or more where saving is slow. Has no influence on the result.
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
    check_place(out, resume=resume)
    if checkpoint_every is not None and checkpoint_every < 1:
        raise InputError("setting-out-of-range", f"--checkpoint-every is {checkpoint_every}, expected at least 1. Raise it.")
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError("setting-out-of-range", f"--seed is {seed}, expected 0 to {LARGEST_SEED}. Choose one of these.")
    place = place or Place()
    estimator = estimator_class(method)(**settings, random_state=seed)
    check_at_least(estimator.n_components, 1, name="n_components")
    estimator._check_settings()
    check_place_fits(method, estimator, place)
    report("reading data", 0, 1, "")
    job = Job(
        name=method,
        estimator=estimator,
        settings=settings,
        seed=seed,
        place=place,
        data=read_matrix(path, key=key),
        checkpoint_every=checkpoint_every,
        report=report,
    )
    header = run_header(job, path, key=key, command=command)
    if not resume:
        return start(job, out, header)
    check_same_data(RunFolder.open(out), header)
    run = RunFolder.resume(out, header)
    if run.status == "finished" and run.summary.exists():
        return finished_summary(run)
    return work(job, lambda: run)


def start(job: Job, out: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Run from the beginning; when that fails before the first round, no folder is left behind."""
    with begin_run(out, header, has_started=lambda run: bool(run.metrics())) as create:
        return work(job, create)


def work(job: Job, open_run: Callable[[], RunFolder]) -> dict[str, Any]:
    """From a loaded job to its summary. The run folder is opened once the engine stands and the data have been read."""
    from partwise.checkpoint import latest_checkpoint
    from partwise.decompose._covariance import covariance_of
    from partwise.decompose._recorder import Recorder
    from partwise.decompose._result import finish_run
    from partwise.engine import open_engine

    place, estimator = job.place, job.estimator
    opened = open_engine(
        place.engine, num_workers=place.num_workers, num_parts=num_parts(estimator), address=place.address, timeout=place.timeout, seed=job.seed
    )
    with opened as engine:
        job.report("covariance", 0, 1, "")
        with entries_named(job.data):
            covariance = covariance_of(job.data.rows)
        estimator._check_fit_of(covariance)
        run = open_run()
        run.set_status("running")
        try:
            with stop_flag() as stop, plain_warnings() as said:
                recorder = Recorder(job, run, stop, traffic=getattr(engine, "traffic", None))
                first = recorder.restore(latest_checkpoint(run.checkpoints))
                if "engine" in estimator.get_params(deep=False):
                    estimator.set_params(engine=engine)
                estimator.fit_from(covariance, start=first, progress=recorder)
            return finish_run(job, run, covariance, recorder, said=said, num_workers=getattr(engine, "num_workers", None))
        except KeyboardInterrupt:
            run.set_status("interrupted")
            raise Stopped(run.path) from None


@contextmanager
def entries_named(data: Matrix) -> Iterator[None]:
    """Say of which file NaN entries are, and what their column is called."""
    try:
        yield
    except InputError as error:
        if error.code != "not-finite":
            raise
        text = str(error).replace("X has", f"{data.name} has", 1)
        place = re.search(r"(?:column|feature) (\d+)", text)
        if place is not None and data.columns is not None:
            text = text.replace(place[0], f"{place[0]}, {data.columns[int(place[1])]!r}", 1)
        raise InputError("not-finite", text) from error


@contextmanager
def plain_warnings() -> Iterator[list[str]]:
    """Collect what the method warns of: it belongs into the summary, and in plain words on the terminal."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield said
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            said.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def estimator_class(name: str) -> type[Any]:
    """The estimator of a method by name.

    Raises
    ------
    InputError
        ``unknown-choice`` for an unknown name, ``needs-target`` for a method that learns to predict.
    """
    known = methods_without_target()
    if name in METHODS and name not in known:
        kind = METHODS[name].rpartition(":")[2]
        raise InputError(
            "needs-target",
            f"{name} predicts a target y, and the command reads one matrix; expected one of: {', '.join(known)}. "
            f"Call it from Python: from partwise.decompose import {kind}.",
        )
    check_choice(name, known, name="method")
    load_extra("sklearn", extra="sklearn")
    found: type[Any] = load_target(METHODS[name])
    return found


def methods_without_target() -> list[str]:
    """Names of the methods that need one matrix and nothing else: all but the regressions."""
    return [name for name in METHODS if not name.endswith("-regression")]


def num_parts(estimator: EigenEstimator) -> int:
    """How many parts can be at work at once."""
    if not hasattr(estimator, "round_method"):
        return 1
    count: int = estimator.round_method(None, 0).num_parts(estimator.n_components)
    return count


def check_place_fits(name: str, estimator: EigenEstimator, place: Place) -> None:
    """Refuse workers for a method that has nothing to give them."""
    if "engine" not in estimator.get_params(deep=False) and place != Place():
        given = ", ".join(f"{field}={value!r}" for field, value in vars(place).items() if value is not None)
        raise InputError(
            "one-part-at-a-time",
            f"got {given} for {name}, expected no workers: it finishes one component before it begins the next. Leave them out, or choose {PARALLEL}.",
        )


def read_matrix(path: Path | None, *, key: str | None) -> Matrix:
    """Open a file, or take the built-in data."""
    if path is not None:
        from partwise.decompose._matrix_files import open_matrix

        rows, columns, fingerprint = open_matrix(path, key=key)
        return Matrix(name=path.name, rows=rows, columns=columns, fingerprint=fingerprint)
    if key is not None:
        raise InputError("data-missing", f"--key {key} was given without a file, expected both or neither. Pass the file too.")
    from partwise.decompose._fingerprint import fingerprint_of_array

    digits = load_extra("sklearn.datasets", extra="sklearn").load_digits()
    return Matrix(name=DIGITS, rows=digits.data, columns=digits.feature_names, fingerprint=fingerprint_of_array(digits.data))


def check_same_data(run: RunFolder, header: Mapping[str, Any]) -> None:
    """Refuse to go on with a file that is not what it was, saying what about it changed."""
    then, now = run.header.get("data", {}), header["data"]
    changed = [name for name in sorted({*then, *now}) if name != "name" and then.get(name) != now.get(name)]
    if changed:
        lines = "; ".join(f"{name}: got {_brief(now.get(name))}, expected {_brief(then.get(name))}" for name in changed)
        raise InputError(
            "data-changed",
            f"{now['name']} is no longer what the run in {run.path} was started with: {lines}. Restore the file, or start a new run with another --out.",
        )


def _brief(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def run_header(job: Job, path: Path | None, *, key: str | None, command: Sequence[str]) -> dict[str, Any]:
    """What ``run.json`` says about a run. Its result depends on ``settings``, ``seed`` and ``data``; ``place`` says where it ran."""
    libraries = (*LIBRARIES, "ray") if job.place.engine == "ray" else LIBRARIES
    return {
        "partwise": __version__,
        "room": "decompose",
        "method": describe(job.estimator),
        "settings": {"method": job.name, **job.settings, "key": key},
        "seed": job.seed,
        "data": {"name": job.data.name, **job.data.fingerprint},
        "place": {"file": None if path is None else str(path.resolve()), **vars(job.place)},
        "versions": {"python": platform.python_version()} | {library: installed_version(library) for library in libraries},
        "command": list(command),
    }


def describe(estimator: EigenEstimator) -> str:
    """The call that makes the estimator, without what is as usual."""
    usual = {name: parameter.default for name, parameter in inspect.signature(type(estimator)).parameters.items()}
    given = {name: value for name, value in estimator.get_params(deep=False).items() if value != usual[name]}
    return f"{type(estimator).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def finished_summary(run: RunFolder) -> dict[str, Any]:
    """The summary of a run that is done; its report is drawn again where it is gone."""
    from partwise import report
    from partwise.atomic_files import read_json
    from partwise.decompose._report import describe as describe_run

    summary: dict[str, Any] = read_json(run.summary)
    return summary if run.report.exists() else report.publish(run, summary, describe_run)
