"""The language model that a command works with: given, or the newest that ``partwise train`` has left. Safetensors only, nothing printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partwise.checks import InputError, PartwiseError, load_extra
from partwise.models.loading import quiet

__all__ = ["OpenedModel", "TrainRun", "newest_train_run", "open_model"]

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
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
        Its largest model that transformers opens alone.
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
        A folder as save_pretrained writes it, or an id of the Hugging Face hub. None: the newest finished run of ``partwise train`` under ``runs``.
    device : str, optional
        Left out: the GPU if there is one, else the CPU.
    dtype : {"float32", "bfloat16", "float16"}, optional
        Left out: float32 on a CPU, which has no fast half precision, and the model's own elsewhere.

    Raises
    ------
    InputError
        ``no-model``, ``model-not-found``, ``model-incomplete``, ``model-unavailable``, ``pickle-refused``, ``damaged-weights``, ``weights-do-not-match``,
        ``task-not-supported`` or ``unknown-device``.
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
    source = _checked(source)
    with quiet(transformers):
        tokenizer = _from_pretrained(transformers.AutoTokenizer, source)
        model = _weights(transformers, source, kind)
    _check_tokenizer(tokenizer, model, source)
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
    model = next((inside for inside in _models_in(folder / "result") if _is_plain_decoder(inside)), None)
    return None if model is None else TrainRun(folder, model, header.get("data") or {})


def _models_in(result: Path) -> Iterator[Path]:
    """The whole model, then tickets, the largest first."""
    yield result / "model"
    sizes = {path: float(path.name.removeprefix("keep-")) for path in result.glob("tickets/keep-*") if path.name.removeprefix("keep-").isdecimal()}
    yield from sorted(sizes, key=lambda path: -sizes[path])


def _is_plain_decoder(folder: Path) -> bool:
    """Whether transformers opens the folder as a language model without help: layers of one size, with a tokenizer."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict) or config.get("per_layer_config") or not (folder / "tokenizer_config.json").is_file():
        return False
    return any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())


def _run_around(model: Path) -> TrainRun | None:
    """The run that a model lies in, such as RUN/result/model or RUN/result/tickets/keep-50."""
    for folder in list(model.absolute().parents)[1:3]:
        if (folder / "run.json").is_file() and (run := _train_run(folder)) is not None:
            return TrainRun(run.path, model, run.data)
    return None


def _checked(source: str) -> str:
    """The folder or the id, after the checks that need no library."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if source.startswith(("/", ".", "~")) or source.count("/") != 1:
            raise InputError(
                "model-not-found",
                f"there is no folder {source!r} in {Path.cwd()}. Check --model; it takes a folder, or a Hugging Face id such as owner/name.",
            )
        return source
    if not (folder / "config.json").is_file():
        raise InputError("model-incomplete", f"{folder} has no config.json, expected a model as save_pretrained writes it. Check --model.")
    if not any(folder.glob("*.safetensors")):
        if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED):
            raise _pickled(str(folder), ", ".join(pickled))
        raise InputError("model-incomplete", f"{folder} has no *.safetensors file, expected the weights there. Download or save the model again.")
    return str(folder)


def _pickled(source: str, names: str) -> InputError:
    return InputError(
        "pickle-refused",
        f"{source} has pickled weights only ({names}); loading a pickle can run any code, so it is refused. Take a version with *.safetensors, or, if you "
        "trust it, load it with transformers elsewhere and save it with save_pretrained.",
    )


def _from_pretrained(kind: Any, source: str) -> Any:
    try:
        return kind.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unavailable(source, error) from error


def _unavailable(source: str, error: Exception) -> InputError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
    if Path(source).is_dir():
        return InputError(
            "model-incomplete", f"{source} cannot be loaded: {reason}. Check that it holds a model and its tokenizer; custom code is not run."
        )
    return InputError(
        "model-unavailable",
        f"cannot load {source!r}: there is no folder of that name, and the Hugging Face hub did not give it ({reason}). Check the id. Without a network, "
        f"download it elsewhere first (hf download {source} --local-dir FOLDER) and pass --model FOLDER.",
    )


def _weights(transformers: Any, source: str, dtype: Any) -> Any:
    from safetensors import SafetensorError
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = _from_pretrained(transformers.AutoConfig, source)
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if is_encoder or type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise InputError(
            "task-not-supported",
            f"{source} is of type {config.model_type}, which writes no text. Pass --model with a decoder such as Llama.",
        )
    options: dict[str, Any] = {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **options)
    except SafetensorError as error:
        raise InputError("damaged-weights", f"a safetensors file of {source} cannot be read ({error}). Download or save the model again.") from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "safetensors" in str(error) and not Path(source).is_dir():
            raise _pickled(source, "on the hub") from error
        raise _unavailable(source, error) from error
    unfit = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if unfit:  # would be drawn at random without a word
        raise InputError(
            "weights-do-not-match",
            f"the weights of {source} lack {len(unfit)} tensors that its config.json asks for, such as {unfit[0]}, or have them in another shape. "
            "Check that both files belong together.",
        )
    return model


def _check_tokenizer(tokenizer: Any, model: Any, source: str) -> None:
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise InputError(
            "model-incomplete", f"{source} has no vocabulary for its tokenizer, expected tokenizer.json beside config.json. Save it there too."
        )
    num_known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_known:
        raise InputError(
            "weights-do-not-match",
            f"the tokenizer of {source} has {len(tokenizer)} tokens, but the model has embeddings for {num_known}. Check that both belong together.",
        )
