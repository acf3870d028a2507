"""Text to train on: read from files, held out by file, as blocks of tokens. Reading is deterministic."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from partwise.checks import InputError, check_at_least, load_extra
from partwise.text_files import LIBRARY, decoded, files_of, library_files, library_missing, name_in, readable

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["PARTS", "Corpus", "Document", "TokenBlocks", "blocks_of", "read_corpus", "train_tokenizer"]

PARTS = ("train", "valid", "test", "calibration")
END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and the end of a text
TOKENIZER_CHARACTERS = 10_000_000  # that a tokenizer learns from, taken evenly from more; some seconds on one core
SNIFFED = 8192  # bytes of a file by which a binary one is told before it is read
PIECE = 20_000  # characters of what is taken at a time
FEWEST_FILES = 10  # of which whole ones are held out; of fewer, too much of the text would be

_TEXT_ENDINGS = {".py", ".txt", ".md", ".rst"}
_SPLIT_FILE = re.compile(r"(?:[\w-]+\.)?(train|valid|validation|val|dev|test)(?:\.(?:txt|tokens|raw))+", re.IGNORECASE)
_SPLIT_NAMES = {"validation": "valid", "val": "valid", "dev": "valid"}

Item = TypeVar("Item")


@dataclass(frozen=True)
class Document:
    """A text with the name of its file."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out.

    Parameters
    ----------
    name : str
        File or folder that they come from.
    parts : mapping of str to tuple of Document
        ``train``, ``valid``, ``test`` and ``calibration``. No text is in two of them.
    held_out_by : {"file", "stretch", "given"}
        file: the held-out parts are whole files, drawn. stretch: they are consecutive stretches at the end of a file. given: files named train, valid and
        test say it; what was not given is a stretch at the end of the text to train on.
    """

    name: str
    parts: Mapping[str, tuple[Document, ...]]
    held_out_by: str

    def names(self, part: str) -> list[str]:
        """Files of a part."""
        return [document.name for document in self.parts[part]]

    def sha256(self) -> str:
        """Digest of all names and texts, in order. Equal digests mean equal texts and an equal split."""
        digest = hashlib.sha256()
        for part in PARTS:
            for document in self.parts[part]:
                text = document.text.encode()
                digest.update(f"{part}\n{document.name}\n{len(text)}\n".encode() + text)
        return digest.hexdigest()


def read_corpus(text: str | None, *, valid_fraction: float = 0.05, seed: int = 0) -> Corpus:
    """Read texts and hold some out.

    Files are held out whole. Which ones depends on ``seed`` and on their names, not on their order: a file that is added later moves few others. Where there
    are fewer than ten files, the end of every file is held out instead, in consecutive stretches. Of files with the same text only the first is read, so
    that no text is held out and trained on.

    Parameters
    ----------
    text : str or None
        A text file, or a folder of them: all ``*.py``, ``*.txt``, ``*.md`` and ``*.rst``, and other files that are UTF-8 text. Hidden files and folders are
        left out, and so are binary files. A folder with ``train.txt``, ``valid.txt`` and ``test.txt`` (or ``wiki.train.tokens`` and so on) is split as
        given, and its other files are not read.
        None is the source of Python's standard library, without its tests.
    valid_fraction : float, default=0.05
        Share of the text in ``valid``, and in ``test``; ``calibration`` gets half as much.
    seed : int, default=0
        Of the choice of files.

    Raises
    ------
    InputError
        ``data-not-found``, ``file-unreadable``, ``no-text``, ``wrong-encoding``, ``too-little-text`` or ``no-library-source``.
    """
    fractions = {"valid": valid_fraction, "test": valid_fraction, "calibration": valid_fraction / 2}
    if text is None:
        return _by_file(LIBRARY, _library(), fractions, seed)
    path = Path(text).expanduser()
    documents = _read(path)
    given: dict[str, tuple[Document, ...]] = {}
    for document in documents if path.is_dir() else ():
        if (part := _named_part(document.name)) is not None:
            given[part] = (*given.get(part, ()), document)
    if "train" in given and len(given) > 1:
        return _as_given(path.name, given, fractions)
    if len(documents) < FEWEST_FILES:
        return _by_stretch(path.name, documents, fractions)
    return _by_file(path.name, documents, fractions, seed)


def _library() -> list[Document]:
    folder, paths = library_files()
    found = _documents(paths, folder)
    if len(found) < FEWEST_FILES:
        raise library_missing(folder, len(found), least=FEWEST_FILES, flag="--text")
    return found


def _read(path: Path) -> list[Document]:
    """Documents of a file or folder, those of a folder ordered by name."""
    with readable(path):
        folder, paths = files_of(path, flag="--text")
        documents = _documents(paths, folder, must_be_text=folder != path)
    if not documents:
        what = "holds no text files" if path.is_dir() else "is empty"
        raise InputError(
            "no-text", f"{path} {what}, expected UTF-8 text such as *.txt, *.md or *.py. Check --text, or leave it out for the built-in text."
        )
    return documents


def _documents(paths: Sequence[Path], folder: Path, *, must_be_text: bool = False) -> list[Document]:
    """The texts of files, each text once."""
    found: dict[str, Document] = {}
    for path in paths:
        if (document := _document(path, folder, must_be_text=must_be_text)) is not None:
            found.setdefault(document.text, document)
    return list(found.values())


def _document(path: Path, folder: Path, *, must_be_text: bool = False) -> Document | None:
    """The text of a file; None where there is none, or where a file without an ending of text files turns out to be binary."""
    must_be_text = must_be_text or path.suffix.lower() in _TEXT_ENDINGS
    with path.open("rb") as file:
        content = file.read(SNIFFED)
        if not must_be_text and b"\0" in content:
            return None
        content += file.read()
    try:
        text = decoded(content, path)
    except InputError:
        if not must_be_text:
            return None
        raise
    name = name_in(folder, path)
    return Document(name, text) if text.strip() else None


def _named_part(name: str) -> str | None:
    """The part that the name of a file asks for."""
    match = _SPLIT_FILE.fullmatch(name)
    return None if match is None else _SPLIT_NAMES.get(match[1].lower(), match[1].lower())


def _by_file(name: str, documents: Sequence[Document], fractions: Mapping[str, float], seed: int) -> Corpus:
    """Go through the files in a drawn order and give each to the first part that it fits into; every part gets one."""
    drawn = sorted(documents, key=lambda document: hashlib.sha256(f"{seed}\n{document.name}".encode()).digest())
    total = sum(len(document.text) for document in documents)
    home: dict[str, str] = {}
    for part, fraction in fractions.items():
        free, later = fraction * total, len(PARTS) - 1 - list(fractions).index(part)
        left = [document for document in drawn if document.name not in home]
        for document in left:
            if len(document.text) <= free and len(drawn) - len(home) > later:
                home[document.name] = part
                free -= len(document.text)
        if free == fraction * total:  # all files are larger than its share
            home[min(left, key=lambda document: len(document.text)).name] = part
    parts = {part: tuple(one for one in documents if home.get(one.name, "train") == part) for part in PARTS}
    return Corpus(name, parts, "file")


def _by_stretch(name: str, documents: Sequence[Document], fractions: Mapping[str, float]) -> Corpus:
    parts: dict[str, tuple[Document, ...]] = dict.fromkeys(PARTS, ())
    for document in documents:
        for part, stretch in _cut_off(document, fractions).items():
            parts[part] += (stretch,)
    return Corpus(name, parts, "stretch")


def _as_given(name: str, given: Mapping[str, tuple[Document, ...]], fractions: Mapping[str, float]) -> Corpus:
    missing = {part: fraction for part, fraction in fractions.items() if part not in given}
    cut = _by_stretch(name, given["train"], missing).parts if missing else {}
    return Corpus(name, {**given, **{part: cut[part] for part in ("train", *missing) if missing}}, "given")


def _cut_off(document: Document, fractions: Mapping[str, float]) -> dict[str, Document]:
    """Stretches at the end of a document, each from the beginning of a line where one is near; the rest is to train on."""
    text, end, found = document.text, len(document.text), {}
    for part, fraction in fractions.items():
        wanted = end - round(fraction * len(text))
        line = text.rfind("\n", 0, max(0, wanted)) + 1
        start = line if wanted - line < fraction * len(text) / 2 else max(0, wanted)
        found[part] = Document(f"{document.name}, characters {start} to {end}", text[start:end])
        end = start
    return {"train": Document(f"{document.name}, characters 0 to {end}", text[:end]), **found}


def train_tokenizer(documents: Sequence[Document], *, vocab_size: int, context: int) -> Any:
    """Learn a byte-level BPE tokenizer, which can write any text, from at most ten million characters taken evenly from the documents.

    Parameters
    ----------
    documents : sequence of Document
        Texts to learn from, as a rule those to train on.
    vocab_size : int
        Tokens at most, 257 or more: every byte is one, and so is the end of a text, with number 0. Short texts give fewer.
    context : int
        Longest input in tokens that the tokenizer tells.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        Without tokens that are put in front or behind.
    """
    check_at_least(vocab_size, SMALLEST_VOCABULARY, name="vocab_size")
    transformers = load_extra("transformers", extra="hf")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_evenly(documents), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _evenly(documents: Sequence[Document]) -> Iterator[str]:
    """All texts, or every so-many-th piece of them where they are long."""
    step = -(-sum(len(document.text) for document in documents) // TOKENIZER_CHARACTERS)
    if step <= 1:
        yield from (document.text for document in documents)
        return
    pieces = (document.text[start : start + PIECE] for document in documents for start in range(0, len(document.text), PIECE))
    yield from (piece for number, piece in enumerate(pieces) if number % step == 0)


class TokenBlocks(Dataset[dict[str, "Tensor"]]):
    """Consecutive blocks of a stream of tokens. What does not fill the last block is left out.

    Parameters
    ----------
    tokens : ndarray
        Of whole numbers, one after the other.
    context : int
        Tokens of a block.
    """

    def __init__(self, tokens: NDArray[np.int32], context: int) -> None:
        self.blocks = torch.from_numpy(tokens[: len(tokens) // context * context].reshape(-1, context))  # (block, token), int32

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.blocks[index].long()
        return {"input_ids": tokens, "labels": tokens}  # models of transformers shift the labels themselves

    def evenly(self, most: int) -> TokenBlocks:
        """At most so many blocks, spread over all of them."""
        if len(self) <= most:
            return self
        found = TokenBlocks.__new__(TokenBlocks)
        found.blocks = self.blocks[torch.arange(most) * len(self) // most]
        return found


def blocks_of(corpus: Corpus, tokenizer: Any, *, context: int) -> dict[str, TokenBlocks]:
    """Blocks of every part, each document followed by the token that ends a text.

    Raises
    ------
    InputError
        ``no-end-token``, or ``too-little-text`` when a part has not one block.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "no-end-token",
            "the tokenizer of the model has no end token, expected one to put between texts. Set eos_token in its tokenizer_config.json.",
        )
    blocks = {part: TokenBlocks(_stream(corpus.parts[part], tokenizer), context) for part in PARTS}
    if not all(map(len, blocks.values())):
        counts = ", ".join(f"{len(blocks[part])} for {part}" for part in PARTS)
        raise InputError(
            "too-little-text",
            f"{corpus.name} gives these blocks of {context} tokens: {counts}; expected at least one each. Pass more text, a lower --context, or a higher "
            "--valid-fraction.",
        )
    return blocks


def _stream(documents: Sequence[Document], tokenizer: Any) -> NDArray[np.int32]:
    pieces: list[NDArray[np.int32]] = []
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    for some in _batched(documents, 64):
        texts = [document.text for document in some]
        found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False)["input_ids"]
        for tokens in found:
            pieces += [np.asarray(tokens, dtype=np.int32), end]
    return np.concatenate(pieces) if pieces else end[:0]


def _batched(items: Sequence[Item], size: int) -> Iterable[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
