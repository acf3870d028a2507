"""The language model that a command works with: given, or the newest that ``partwise train`` has left. Safetensors only, nothing printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partwise.checks import InputError, PartwiseError, load_extra
from partwise.models.loading import check_source, load_decoder

__all__ = ["OpenedModel", "TrainRun", "choose_device", "newest_train_run", "open_model"]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class OpenedModel:
    """A causal language model, in evaluation mode, with its tokenizer.

    Parameters
    ----------
    name : str
        Folder or id that it came from.
    model : transformers.PreTrainedModel
        On its device, in its dtype.
    tokenizer : transformers.PreTrainedTokenizerBase
        What turns text into its tokens.
    run : TrainRun or None
        The run of ``partwise train`` that it lies in.
    """

    name: str
    model: Any
    tokenizer: Any
    run: TrainRun | None = None


@dataclass(frozen=True)
class TrainRun:
    """A finished run of ``partwise train`` with a language model.

    Parameters
    ----------
    path : Path
        Folder of the run.
    model : Path
        Its largest model, whose layers may differ in size.
    data : dict
        What it was trained on, as its ``run.json`` says.
    """

    path: Path
    model: Path
    data: dict[str, Any]


def open_model(source: str | None, *, device: str | None = None, dtype: str | None = None) -> OpenedModel:
    """Load a model and its tokenizer.

    Parameters
    ----------
    source : str or None
        A folder as save_pretrained, `partwise.models.uneven_files.save_uneven` or `partwise.prune.save` writes it, with its tokenizer, or an id of the Hugging
        Face hub. None: the newest finished run of ``partwise train`` under ``runs``.
    device : str, optional
        Left out: the GPU if there is one, else the CPU.
    dtype : {"float32", "bfloat16", "float16"}, optional
        Left out: float32 on a CPU, which has no fast half precision, and the model's own elsewhere.

    Raises
    ------
    InputError
        ``no-model``, ``model-not-found``, ``model-incomplete``, ``model-unavailable``, ``pickle-refused``, ``damaged-weights``, ``weights-do-not-match``,
        ``task-not-supported`` or ``unknown-device``; for a folder whose layers differ in size or are of low rank also what
        `partwise.models.uneven_files.load_uneven` raises.
    """
    run = None if source is not None else newest_train_run()
    if source is None:
        if run is None:
            raise InputError(
                "no-model",
                f"got no --model, and {Path('runs').resolve()} holds no finished run of `partwise train` with a language model, expected one of them. "
                "Pass --model FOLDER, or run `partwise train` first.",
            )
        source = str(run.model)
    run = run or _run_around(Path(source).expanduser())
    transformers = load_extra("transformers", extra="hf")
    import torch

    place = choose_device(device)
    kind = torch.float32 if dtype is None and place == "cpu" else "auto" if dtype is None else getattr(torch, dtype)
    source = check_source(source)
    model, tokenizer = load_decoder(transformers, source, dtype=kind)
    return OpenedModel(source, model.to(place).eval(), tokenizer, run)


def choose_device(wanted: str | None) -> str:
    """The device asked for, or the GPU if there is one, or the CPU; one that does not exist is refused."""
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if wanted not in known:
        raise InputError("unknown-device", f"--device {wanted} does not exist here. Choose one of: {', '.join(known)}.")
    return wanted


def newest_train_run(parent: Path = Path("runs")) -> TrainRun | None:
    """Of the finished runs of ``partwise train`` with a language model the one that finished last, or None."""
    finished = [path for path in parent.glob("*/summary.json") if path.is_file()]
    for summary in sorted(finished, key=lambda path: (path.stat().st_mtime, str(path)), reverse=True):
        if (run := _train_run(summary.parent)) is not None:
            return run
    return None


def _train_run(folder: Path) -> TrainRun | None:
    from partwise.runs import RunFolder

    try:
        header = RunFolder.open(folder).header
    except PartwiseError:  # damaged, or no run at all: there may be others
        return None
    if header.get("room") != "train" or header.get("status") != "finished":
        return None
    model = next((inside for inside in _models_in(folder / "result") if _is_decoder(inside)), None)
    return None if model is None else TrainRun(folder, model, header.get("data") or {})


def _models_in(result: Path) -> Iterator[Path]:
    """The whole model, then tickets, the largest first."""
    yield result / "model"
    sizes = {path: float(path.name.removeprefix("keep-")) for path in result.glob("tickets/keep-*") if path.name.removeprefix("keep-").isdecimal()}
    yield from sorted(sizes, key=lambda path: -sizes[path])


def _is_decoder(folder: Path) -> bool:
    """Whether the folder holds a language model with a tokenizer."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict) or not (folder / "tokenizer_config.json").is_file():
        return False
    return any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())


def _run_around(model: Path) -> TrainRun | None:
    """The run that a model lies in, such as RUN/result/model or RUN/result/tickets/keep-50."""
    for folder in list(model.absolute().parents)[1:3]:
        if (folder / "run.json").is_file() and (run := _train_run(folder)) is not None:
            return TrainRun(run.path, model, run.data)
    return None
