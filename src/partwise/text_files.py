"""Text from files: which files there are, and how they are read. All rooms read text by these rules."""

from __future__ import annotations

import contextlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from partwise.checks import InputError

__all__ = ["LIBRARY", "decoded", "files_of", "library_files", "library_missing", "name_in", "readable"]

LIBRARY = "standard library"
# Folders of the standard library that are no ordinary source: its tests, other packages, and tables or texts that a program wrote.
NOT_LIBRARY = {
    "__pycache__", "distutils", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib", "lib-dynload", "lib2to3", "msilib", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip


def library_files() -> tuple[Path, list[Path]]:
    """The folder of Python's standard library, and its source files in the order of their names, without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in folder.rglob("*.py") if not NOT_LIBRARY & set(path.relative_to(folder).parts))
    return folder, sorted(path for path in paths if path.is_file())


def library_missing(folder: Path, num_found: int, *, least: int, flag: str) -> InputError:
    """The error to raise where the library has too few source files."""
    return InputError(
        "no-library-source",
        f"found {num_found} source files of the standard library under {folder}, expected at least {least}. Pass your own text with {flag}, or use a Python "
        "that comes with its library as source files.",
    )


def files_of(path: Path, *, flag: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files: the one, or all of a folder in the order of their names, without hidden ones.

    Parameters
    ----------
    path : Path
        A file or a folder.
    flag : str
        Where the path is from, for the message.

    Raises
    ------
    InputError
        ``data-not-found``.
    """
    if path.is_dir():
        return path, sorted(found for found in path.rglob("*") if not _is_hidden(found.relative_to(path)) and found.is_file())
    if not path.exists():
        raise InputError("data-not-found", f"there is no file or folder {str(path)!r} in {Path.cwd()}. Check {flag}.")
    return path.parent, [path]


def name_in(folder: Path, path: Path) -> str:
    """The name of a file inside a folder, as text that can be written, whatever bytes the file system has in it."""
    return path.relative_to(folder).as_posix().encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say which file or folder it was that could not be read inside the block.

    Raises
    ------
    InputError
        ``file-unreadable``.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            "file-unreadable", f"cannot read {error.filename or path}: {error.strerror or error}. Check the file and its permissions."
        ) from error


def decoded(content: bytes, path: Path) -> str:
    """The text of a file, which is UTF-8 with or without a byte order mark.

    Raises
    ------
    InputError
        ``wrong-encoding``.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            "wrong-encoding",
            f"{path} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}. Convert it (iconv -f latin1 -t utf-8), or remove it.",
        ) from error


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
