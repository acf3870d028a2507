"""A comparison as a run: its folder with settings, numbers and report."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise import __version__
from partwise.runs import RunFolder, begin_run, check_place, fresh_run, installed_version

if TYPE_CHECKING:
    from partwise.opened_models import OpenedModel
    from partwise.serve._flags import CompareSettings, ModelFlags
    from partwise.serve.compare import Compared, Measurement
    from partwise.serve.rule import EvictionRule
    from partwise.text_rows import TextRows

LIBRARIES = ("torch", "numpy", "transformers", "tokenizers", "safetensors")
Report = Callable[[str, int, int, str], None]


def record_comparison(
    source: ModelFlags,
    settings: CompareSettings,
    *,
    out: Path | None = None,
    command: Sequence[str] = (),
    report: Report = lambda phase, done, total, note: None,
) -> dict[str, Any]:
    """Compare methods and write everything to a run folder.

    Parameters
    ----------
    source : ModelFlags
        The model.
    settings : CompareSettings
        What to measure.
    out : Path, optional
        The run folder to make. Left out: the first free ``runs/compare-001``, ``-002``, ...
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
        When something that was passed cannot be used. Nothing is written then, and nothing is left after Ctrl-C.
    """
    from partwise import report as page
    from partwise.opened_models import open_model
    from partwise.serve._report import describe
    from partwise.serve.compare import check_caches, check_sizes, compare

    out = fresh_run("compare") if out is None else out
    check_place(out, resume=False)
    budgets, rules = settings.budget_numbers(), settings.rules()
    check_sizes(budgets, num_tokens=settings.tokens)
    report("loading the model", 0, 1, "")
    opened = open_model(source.model, device=source.device, dtype=source.dtype)
    check_length(opened, settings.tokens)
    check_caches(opened.model, rules, budgets=budgets, bits=settings.bits)
    report("reading text", 0, 1, "")
    text = read_text(opened, settings)
    with _whole_or_absent(out, _header(opened, text, settings, rules, command)) as create:
        run, start = create(), time.perf_counter()
        found = compare(opened.model, text.ids, rules, budgets=budgets, bits=settings.bits, report=report)
        facts = _facts(opened, text, settings, budgets) | {"seconds": time.perf_counter() - start, "run": str(out)}
        full, rows = full_row(found), [row_of(one) for one in found]
        for row in (full, *rows):
            run.append_metrics({"kind": "measurement"} | row)
        return page.publish(run, facts | {"full": full, "measurements": rows}, describe)


def check_length(opened: OpenedModel, num_tokens: int) -> None:
    """Refuse rows that are longer than the model can read."""
    from partwise.checks import InputError

    longest = getattr(opened.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and num_tokens > longest:
        raise InputError(
            "max-length", f"--tokens {num_tokens} is more than the {longest} that {opened.name} can read. Pass --tokens {longest} or less."
        )


def read_text(opened: OpenedModel, settings: CompareSettings) -> TextRows:
    """Rows of the text; of the standard library those files that the model was not trained on, where its run tells."""
    from partwise.text_files import LIBRARY
    from partwise.text_rows import read_rows

    data: Mapping[str, Any] = {} if opened.run is None else opened.run.data
    known = settings.text is None and data.get("name") == LIBRARY and data.get("held_out_by") == "file"
    held_out = data["held_out"]["test"] if known else ()
    return read_rows(settings.text, opened.tokenizer, num_rows=settings.rows, num_tokens=settings.tokens, seed=settings.seed, held_out=held_out)


def full_row(found: Sequence[Compared]) -> dict[str, Any]:
    """The full cache as a row: it ran beside every budget, so its speed is over all of these loops."""
    loops = {one.budget: one.full for one in found}
    first, seconds = next(iter(loops.values())), sum(full.seconds for full in loops.values())
    steps = sum(full.seconds * full.tokens_per_second for full in loops.values())
    return {"method": "full", "setting": "DynamicCache()", "budget": None} | _numbers(first) | {"tokens_per_second": steps / seconds}


def row_of(one: Compared) -> dict[str, Any]:
    """A method at a budget as a row of JSON."""
    row = {"method": one.method, "setting": one.setting, "budget": one.budget} | _numbers(one.measured)
    speed = one.measured.tokens_per_second / one.full.tokens_per_second
    return row | {"perplexity_change": one.perplexity_change, "ratio": one.ratio, "speed_against_full": speed}


def _numbers(measured: Measurement) -> dict[str, Any]:
    return {"perplexity": measured.perplexity} | dataclasses.asdict(measured) | {"kl_curve": [list(point) for point in measured.kl_curve]}


def _facts(opened: OpenedModel, text: TextRows, settings: CompareSettings, budgets: Sequence[int]) -> dict[str, Any]:
    """What was measured on what."""
    parameter = next(opened.model.parameters())
    return {
        "model": opened.name,
        "num_parameters": sum(parameter.numel() for parameter in opened.model.parameters()),
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "data": text.name,
        "files": list(text.files),
        "num_rows": settings.rows,
        "num_tokens": settings.tokens,
        "num_prefill": min(budgets),
        "budgets": list(budgets),
        "bits": settings.bits,
    }


def _header(
    opened: OpenedModel, text: TextRows, settings: CompareSettings, rules: Mapping[str, EvictionRule], command: Sequence[str]
) -> dict[str, Any]:
    """What ``run.json`` says."""
    asked = dataclasses.asdict(settings) | {"budgets": settings.budget_numbers(), "methods": [repr(rule) for rule in rules.values()]}
    seed, source = asked.pop("seed"), asked.pop("text")
    return {
        "partwise": __version__,
        "room": "serve",
        "method": "compare",
        "settings": {"model": Path(opened.name).name} | asked,
        "seed": seed,
        "data": {"name": text.name, "sha256": text.sha256(), "files": list(text.files)},
        "place": {"model": str(Path(opened.name).resolve()) if Path(opened.name).exists() else opened.name, "text": source},
        "versions": {"python": platform.python_version()} | {library: installed_version(library) for library in LIBRARIES},
        "command": list(command),
    }


@contextmanager
def _whole_or_absent(out: Path, header: Mapping[str, Any]) -> Iterator[Callable[[], RunFolder]]:
    """As `begin_run`, and Ctrl-C takes the folder away, too: there is nothing in it to go on from."""
    was_there, made = out.exists(), False
    try:
        with begin_run(out, header, has_started=lambda run: False) as create:

            def note_and_create() -> RunFolder:
                nonlocal made
                run = create()
                made = True
                return run

            yield note_and_create
    except KeyboardInterrupt:
        if made:
            for path in out.iterdir() if was_there else ():  # it was empty
                path.unlink()
            if not was_there:
                shutil.rmtree(out, ignore_errors=True)
        raise
