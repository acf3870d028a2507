"""Rows of tokens to measure on, from files. Which files and which part of each is drawn; reading is deterministic."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LIBRARY", "TextRows", "read_rows"]

LIBRARY = "standard library"  # as partwise.train calls it
ENDINGS = (".py", ".txt", ".md", ".rst", ".tokens", ".raw")
CHARACTERS = 16  # of a file that are read for each token that is wanted, at most
# Folders of the standard library that are no ordinary source: its tests, other packages, and tables or texts that a program wrote.
NOT_LIBRARY = {
    "__pycache__", "distutils", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib", "lib-dynload", "lib2to3", "msilib", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip


@dataclass(frozen=True)
class TextRows:
    """Pieces of text of equal length.

    Parameters
    ----------
    name : str
        Where they are from.
    files : tuple of str
        The file of each row.
    ids : Tensor of shape (rows, tokens), int64
        With what the tokenizer puts in front of a text at the start of each row.
    """

    name: str
    files: tuple[str, ...]
    ids: Tensor

    def sha256(self) -> str:
        """Digest of the tokens."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()


def read_rows(source: str | None, tokenizer: Any, *, num_rows: int, num_tokens: int, seed: int = 0, held_out: Sequence[str] = ()) -> TextRows:
    """Rows of consecutive tokens, each from the middle of another file; where there are too few files that long, several from one, or across files.

    Parameters
    ----------
    source : str or None
        A text file, or a folder of them: *.py, *.txt, *.md, *.rst, *.tokens, *.raw. None is the source of Python's standard library, without its tests.
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the model that is measured.
    num_rows, num_tokens : int
        Size of the result.
    seed : int, default=0
        Of the order in which files are taken.
    held_out : sequence of str
        Where there is no source: names of files of the library that the model was not trained on. Only these are read, if they exist.

    Raises
    ------
    InputError
        ``data-not-found``, ``file-unreadable``, ``wrong-encoding``, ``no-text``, ``no-library-source`` or ``too-little-text``.
    """
    import torch

    folder, paths = _files(source, held_out)
    drawn = sorted(paths, key=lambda path: hashlib.sha256(f"{seed}\n{path.relative_to(folder).as_posix()}".encode()).digest())
    prefix, end = _prefix_of(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    length = num_tokens - len(prefix)
    rows: list[tuple[str, list[int]]] = []
    spare: list[tuple[str, list[int]]] = []
    for name, text in _texts(drawn, folder):
        tokens = _tokens(tokenizer, _middle(text, CHARACTERS * num_rows * num_tokens))
        blocks = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
        if blocks:
            rows.append((name, blocks.pop(len(blocks) // 2)))
        spare.append((name, [token for block in blocks for token in block] + tokens[len(tokens) // length * length :] + end))
        if len(rows) == num_rows:
            break
    if not spare:
        raise InputError("no-text", f"{source} holds no text, expected UTF-8 text such as *.txt, *.md or *.py. Check --text.")
    rows += _joined(spare, length)[: num_rows - len(rows)]
    if len(rows) < num_rows:
        raise InputError(
            "too-little-text",
            f"{source or 'the ' + LIBRARY} gives {len(rows)} rows of {num_tokens} tokens, expected {num_rows}. Pass more text, or lower --tokens or --rows.",
        )
    is_held_out = source is None and all(path.relative_to(folder).as_posix() in held_out for path in paths)
    name = Path(source).resolve().name if source is not None else f"{LIBRARY}, held-out files" if is_held_out else LIBRARY
    return TextRows(name, tuple(name for name, _ in rows), torch.tensor([[*prefix, *tokens] for _, tokens in rows]))


def _files(source: str | None, held_out: Sequence[str]) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files."""
    if source is None:
        folder = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in folder.rglob("*.py") if not NOT_LIBRARY & set(path.relative_to(folder).parts)]
        if not paths:
            raise InputError(
                "no-library-source",
                f"found no source files of the standard library under {folder}, expected some. Pass your own text with --text, or use a Python that comes "
                "with its library as source files.",
            )
        chosen = [path for path in paths if path.relative_to(folder).as_posix() in set(held_out)]
        return folder, chosen or paths
    path = Path(source).expanduser()
    if path.is_dir():
        inside = [found for found in path.rglob("*") if found.suffix.lower() in ENDINGS and found.is_file()]
        return path, [found for found in inside if not any(part.startswith(".") for part in found.relative_to(path).parts)]
    if not path.exists():
        raise InputError("data-not-found", f"there is no file or folder {str(path)!r} in {Path.cwd()}. Check --text.")
    return path.parent, [path]


def _texts(paths: Sequence[Path], folder: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of files that are not empty."""
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise InputError("file-unreadable", f"cannot read {path}: {error.strerror or error}. Check the file and its permissions.") from error
        except UnicodeDecodeError as error:
            raise InputError(
                "wrong-encoding", f"{path} is not UTF-8 text, at byte {error.start}. Convert it (iconv -f latin1 -t utf-8), or remove it."
            ) from error
        if text.strip():
            yield path.relative_to(folder).as_posix(), text


def _middle(text: str, most: int) -> str:
    """So many characters from the middle of a longer text, from the beginning of a line on: tokenising all of it would take long and be of no use."""
    if len(text) <= most:
        return text
    start = (len(text) - most) // 2
    return text[text.rfind("\n", 0, start) + 1 :][:most]


def _tokens(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False)["input_ids"]
    return tokens


def _prefix_of(tokenizer: Any) -> list[int]:
    """Tokens that the tokenizer puts in front of every text, such as one for the beginning: models are used to a row that starts so."""
    start = tokenizer.bos_token_id
    return [start] if start is not None and tokenizer("a")["input_ids"][:1] == [start] else []


def _joined(spare: Sequence[tuple[str, list[int]]], length: int) -> list[tuple[str, list[int]]]:
    """Rows from what files have left, one file after the other; a row is named after the file in which it starts."""
    names = [name for name, tokens in spare for _ in tokens]
    stream = [token for _, tokens in spare for token in tokens]
    return [(names[start], stream[start : start + length]) for start in range(0, len(stream) - length + 1, length)]
