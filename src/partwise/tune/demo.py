"""The built-in example task: tell from a docstring which package of Python's standard library it belongs to.

It needs no network and no file of ours: every Python installation carries the material. The sources are read by ``ast``; no module is imported.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from partwise.checks import InputError
from partwise.tune._data import Examples, TaskData, split_rows, task_data

PACKAGES = (
    "asyncio",
    "datetime",
    "decimal",
    "doctest",
    "email",
    "encodings",
    "http",
    "importlib",
    "inspect",
    "ipaddress",
    "logging",
    "mailbox",
    "multiprocessing",
    "pathlib",
    "pydoc",
    "tarfile",
    "typing",
    "unittest",
    "urllib",
    "xml",
)
"""The twenty classes: packages with many docstrings that every build of Python ships and no recent version drops (so no tkinter, idlelib, distutils)."""

MASK = "___"
MIN_WORDS = 5
MAX_CHARACTERS = 140
MAX_PER_CLASS = 200
NUM_VALID = 800

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_NAMES = re.compile("|".join(sorted(PACKAGES, key=len, reverse=True)), re.IGNORECASE)


def demo_examples(seed: int = 0, *, library: Path | None = None) -> TaskData:
    """Docstrings of the standard library with the package each comes from.

    The names of all twenty packages are masked in every text, so that no text gives its class away. Docstrings that occur twice are left out,
    as are those of fewer than five words; long ones are cut after a word, to at most 140 characters, which keeps a training step on a CPU short. No class
    has more than 200 rows.

    Parameters
    ----------
    seed : int, default=0
        Decides which rows are held out. The rows themselves depend on the Python version only.
    library : pathlib.Path, optional
        Folder that holds the sources. By default the standard library of the running interpreter.

    Returns
    -------
    TaskData
        A classification task. 800 rows are held out, or a fifth where fewer than 2000 rows were found; every class keeps its share.

    Raises
    ------
    InputError
        ``no-library-source`` when the folder holds the sources of fewer than two of the packages.
    """
    folder = library if library is not None else Path(sysconfig.get_path("stdlib"))
    rows = [(text, name) for name, texts in _unique_texts(folder).items() for text in _at_most(texts, MAX_PER_CLASS, name)]
    label_names = tuple(sorted({name for _, name in rows}))
    if len(label_names) < 2:
        raise InputError(
            "no-library-source",
            f"found the sources of {len(label_names)} packages of the standard library under {folder}, expected at least 2 of {', '.join(PACKAGES)}. "
            "Pass your own data with --data, or use a Python that comes with its library as source files.",
        )
    targets = tuple(label_names.index(name) for _, name in rows)
    num_valid = NUM_VALID if len(rows) >= 2.5 * NUM_VALID else len(rows) // 5
    train, valid = split_rows(len(rows), num_valid=num_valid, seed=seed, strata=targets)
    examples = Examples(texts=tuple(text for text, _ in rows), pairs=None, targets=targets)
    return task_data("classification", "stdlib-docstrings", examples.rows(train), examples.rows(valid), label_names=label_names)


def _unique_texts(folder: Path) -> dict[str, list[str]]:
    """Masked docstrings of each package, without those that occur twice anywhere."""
    texts = {name: list(_texts(folder, name)) for name in PACKAGES}
    times: dict[str, int] = {}
    for found in texts.values():
        for text in found:
            times[text] = times.get(text, 0) + 1
    unique = {name: [text for text in found if times[text] == 1] for name, found in texts.items()}
    return {name: found for name, found in unique.items() if len(found) >= 2}


def _texts(folder: Path, name: str) -> Iterator[str]:
    for path in _sources(folder, name):
        for docstring in _docstrings(path):
            text = textwrap.shorten(_NAMES.sub(MASK, docstring), MAX_CHARACTERS, placeholder="")
            if len(text.split()) >= MIN_WORDS:
                yield text


def _sources(folder: Path, name: str) -> list[Path]:
    """Files of a package, also where its code sits in a private twin such as ``_pydecimal``. Tests are left out."""
    found = [path for stem in (name, f"_py{name}") for path in (folder / f"{stem}.py", *sorted((folder / stem).rglob("*.py")))]
    return [path for path in found if path.is_file() and not _TEST_FOLDERS & set(path.relative_to(folder).parts)]


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources hold escapes that the compiler warns of
        tree = ast.parse(path.read_bytes(), filename=str(path))
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield docstring


def _at_most(texts: list[str], limit: int, name: str) -> list[str]:
    """``limit`` of the texts in their old order, the same ones every time."""
    chosen = random.Random(name).sample(range(len(texts)), min(limit, len(texts)))
    return [texts[index] for index in sorted(chosen)]
