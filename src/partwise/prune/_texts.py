"""The text that a run works with: rows to calibrate on, and other rows to measure on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError, check_at_least
from partwise.text_files import LIBRARY, library_files, name_in
from partwise.text_rows import TextRows, read_rows

if TYPE_CHECKING:
    from partwise.opened_models import OpenedModel

__all__ = ["TextSettings", "Texts", "read_texts"]

USUAL_TOKENS = 256
FEW = ("too-little-text", "no-text")


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The text to calibrate on, and to measure on.

    Parameters
    ----------
    calibration : str or None
        Text that the method looks at: a file, or a folder of *.py, *.txt, *.md, *.rst. Best is text like what the model will read. Left out: the source of
        Python's standard library; of a model that `partwise train` made from it, files held out.
    evaluation : str or None
        Text on which perplexity is measured, before and after. Left out: other rows of the calibration text, from other files where there are enough.
    rows : int
        Rows of text to calibrate on, each from another file if there are enough.
    evaluation_rows : int
        Rows of text to measure on.
    tokens : int or None
        Tokens of a row. Left out: 256, or as many as the model can read.
    seed : int
        Of the choice of calibration rows, and of methods that draw. The rows to measure on do not depend on it.
    """

    calibration: str | None = None
    evaluation: str | None = None
    rows: int = 64
    evaluation_rows: int = 64
    tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"rows": 1, "evaluation_rows": 1, "tokens": 2, "seed": 0}.items():
            if getattr(self, name) is not None:
                check_at_least(getattr(self, name), least, name=name)


@dataclass(frozen=True)
class Texts:
    """Rows to calibrate on, and rows to measure on, which are never the same.

    Parameters
    ----------
    calibration, evaluation : TextRows
        Of one length.
    """

    calibration: TextRows
    evaluation: TextRows


def read_texts(opened: OpenedModel, settings: TextSettings) -> Texts:
    """Read both.

    Parameters
    ----------
    opened : OpenedModel
        Its tokenizer reads; the run that it lies in says which files it was not trained on.
    settings : TextSettings
        Which text, how much of it, and a seed.

    Raises
    ------
    InputError
        What `partwise.text_rows.read_rows` refuses; ``max-length``; ``evaluation-seen`` when most rows to measure on are rows to calibrate on, too.
    """
    settings = replace(settings, tokens=length_of_rows(opened, settings.tokens))
    if settings.evaluation not in (None, settings.calibration):
        evaluation = _evaluation(opened, settings, source=settings.evaluation)
        left_out = _names_elsewhere(evaluation.files, settings.evaluation, settings.calibration)
        texts = Texts(_calibration(opened, settings, left_out=left_out), evaluation)
        _refuse_copies(texts)
        return texts
    return _from_one_source(opened, settings)


def length_of_rows(opened: OpenedModel, wanted: int | None) -> int:
    """Tokens of a row: what was asked for, if the model can read so many."""
    longest: int | None = getattr(opened.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if wanted is None:
        return USUAL_TOKENS if longest is None else min(USUAL_TOKENS, longest)
    if longest is not None and wanted > longest:
        raise InputError("max-length", f"--tokens {wanted} is more than the {longest} that {opened.name} can read. Pass --tokens {longest} or less.")
    return wanted


def _from_one_source(opened: OpenedModel, settings: TextSettings) -> Texts:
    """Rows of different files. Where there are too few files, different rows of the same ones, whatever the seed."""
    evaluation = _evaluation(opened, settings, source=settings.calibration)
    try:
        return Texts(_calibration(opened, settings, left_out=evaluation.files), evaluation)
    except InputError as error:
        if error.code not in FEW:
            raise
    number = settings.evaluation_rows + settings.rows
    assert settings.tokens is not None
    both = read_rows(settings.calibration, opened.tokenizer, num_rows=number, num_tokens=settings.tokens, flag="--calibration")
    first = settings.evaluation_rows
    return Texts(*(TextRows(both.name, both.files[part], both.ids[part]) for part in (slice(first, None), slice(first))))


def _evaluation(opened: OpenedModel, settings: TextSettings, *, source: str | None) -> TextRows:
    assert settings.tokens is not None
    flag = "--calibration" if source == settings.calibration else "--evaluation"
    held_out = _held_out(opened, "test") if source is None else ()
    return read_rows(source, opened.tokenizer, num_rows=settings.evaluation_rows, num_tokens=settings.tokens, held_out=held_out, flag=flag)


def _calibration(opened: OpenedModel, settings: TextSettings, *, left_out: tuple[str, ...] = ()) -> TextRows:
    assert settings.tokens is not None
    held_out = _held_out(opened, "calibration") if settings.calibration is None else ()
    return read_rows(
        settings.calibration,
        opened.tokenizer,
        num_rows=settings.rows,
        num_tokens=settings.tokens,
        seed=settings.seed,
        held_out=held_out,
        left_out=left_out,
        flag="--calibration",
    )


def _held_out(opened: OpenedModel, part: str) -> tuple[str, ...]:
    """Files of the standard library that the model was not trained on, where its run tells."""
    data: Mapping[str, Any] = {} if opened.run is None else opened.run.data
    if data.get("name") != LIBRARY or data.get("held_out_by") != "file":
        return ()
    return tuple(data["held_out"].get(part, ()))


def _names_elsewhere(files: tuple[str, ...], source: str, other: str | None) -> tuple[str, ...]:
    """What files of one source are called in another one, as far as they lie in it."""
    def folder_of(path: Path) -> Path:
        return path if path.is_dir() else path.parent

    here = folder_of(Path(source).expanduser()).resolve()
    there = library_files()[0].resolve() if other is None else folder_of(Path(other).expanduser()).resolve()
    paths = [(here / name).resolve() for name in files]
    return tuple(name_in(there, path) for path in paths if path.is_relative_to(there))


def _refuse_copies(texts: Texts) -> None:
    """What is measured on text that the method has looked at says nothing about other text. Some rows, such as a licence, may well be everywhere."""
    seen = {tuple(row) for row in texts.calibration.ids.tolist()}
    shared = sum(tuple(row) in seen for row in texts.evaluation.ids.tolist())
    if shared > len(texts.evaluation.ids) / 2:
        raise InputError(
            "evaluation-seen",
            f"{shared} of {len(texts.evaluation.ids)} rows to measure on are rows to calibrate on, too. Pass another --evaluation, or leave it out: then other "
            "rows of --calibration are taken.",
        )
