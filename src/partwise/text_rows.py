"""Rows of tokens to measure on or to calibrate with, from files. Which files and which part of each is drawn; reading is deterministic."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError
from partwise.text_files import LIBRARY, decoded, files_of, library_files, library_missing, name_in, readable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TextRows", "read_rows"]

ENDINGS = (".py", ".txt", ".md", ".rst", ".tokens", ".raw")
CHARACTERS = 16  # of a file that are read for each token that is wanted, at most


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


def read_rows(
    source: str | None,
    tokenizer: Any,
    *,
    num_rows: int,
    num_tokens: int,
    seed: int = 0,
    held_out: Sequence[str] = (),
    left_out: Sequence[str] = (),
    flag: str = "--text",
) -> TextRows:
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
    left_out : sequence of str
        Names of files that are not read, because other rows are from them.
    flag : str, default="--text"
        What messages call the source.

    Raises
    ------
    InputError
        ``data-not-found``, ``file-unreadable``, ``wrong-encoding``, ``no-text``, ``no-library-source`` or ``too-little-text``.
    """
    import torch

    folder, paths = _files(source, held_out, flag=flag)
    paths = [path for path in paths if name_in(folder, path) not in set(left_out)]
    drawn = sorted(paths, key=lambda path: hashlib.sha256(f"{seed}\n{name_in(folder, path)}".encode()).digest())
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
        raise InputError("no-text", f"{source} holds no text, expected UTF-8 text such as *.txt, *.md or *.py. Check {flag}.")
    rows += _joined(spare, length)[: num_rows - len(rows)]
    if len(rows) < num_rows:
        raise InputError(
            "too-little-text",
            f"{source or 'the ' + LIBRARY} gives {len(rows)} rows of {num_tokens} tokens, expected {num_rows}. Pass more text with {flag}, or ask for fewer or "
            "shorter rows.",
        )
    is_held_out = source is None and all(name_in(folder, path) in held_out for path in paths)
    name = Path(source).resolve().name if source is not None else f"{LIBRARY}, held-out files" if is_held_out else LIBRARY
    return TextRows(name, tuple(name for name, _ in rows), torch.tensor([[*prefix, *tokens] for _, tokens in rows]))


def _files(source: str | None, held_out: Sequence[str], *, flag: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files."""
    if source is None:
        folder, paths = library_files()
        if not paths:
            raise library_missing(folder, 0, least=1, flag=flag)
        wanted = set(held_out)
        return folder, [path for path in paths if name_in(folder, path) in wanted] or paths
    path = Path(source).expanduser()
    with readable(path):
        folder, paths = files_of(path, flag=flag)
    return folder, [found for found in paths if found == path or found.suffix.lower() in ENDINGS]


def _texts(paths: Sequence[Path], folder: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of files that are not empty."""
    for path in paths:
        with readable(path):
            content = path.read_bytes()
        if (text := decoded(content, path)).strip():
            yield name_in(folder, path), text


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
