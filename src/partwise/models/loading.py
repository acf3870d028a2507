"""Loading models of transformers: safetensors only, custom code never, and without a word on the terminal."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from partwise.atomic_files import read_json
from partwise.checks import InputError

__all__ = ["check_complete", "check_model_folder", "check_source", "check_tokenizer", "load_decoder", "open_part", "quiet", "reading_weights"]

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence the progress bars and reports of loading, and put back what was there."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    log = transformers.utils.logging
    verbosity, bars, hub_bars = log.get_verbosity(), log.is_progress_bar_enabled(), not are_progress_bars_disabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


def check_model_folder(folder: Path) -> None:
    """Refuse a folder without a configuration, without weights, or with pickled weights only."""
    if not (folder / "config.json").is_file():
        raise InputError("model-incomplete", f"{folder} has no config.json, expected a model as save_pretrained writes it. Check --model.")
    if any(folder.glob("*.safetensors")):
        return
    if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED):
        raise _pickled(str(folder), ", ".join(pickled))
    raise InputError("model-incomplete", f"{folder} has no *.safetensors file, expected the weights there. Download or save the model again.")


def check_source(source: str, *, others: Sequence[str] = ()) -> str:
    """The folder or the id of a model that writes text, after the checks that need no library.

    Parameters
    ----------
    source : str
        A folder as save_pretrained writes it, or an id of the Hugging Face hub.
    others : sequence of str, optional
        What else the caller takes, for the message.

    Raises
    ------
    InputError
        ``model-not-found``, ``model-incomplete`` or ``pickle-refused``.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        check_model_folder(folder)
        return str(folder)
    if source.startswith(("/", ".", "~")) or source.count("/") != 1:
        known = "a folder, or a Hugging Face id such as owner/name"
        if others:
            known = f"a folder, a Hugging Face id such as owner/name, or one of {', '.join(others)}"
        raise InputError("model-not-found", f"there is no folder {source!r} in {Path.cwd()}. Check --model; it takes {known}.")
    return source


def open_part(kind: Any, source: str, **options: Any) -> Any:
    """A configuration or a tokenizer."""
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unavailable(source, error) from error


@contextlib.contextmanager
def reading_weights(source: str) -> Iterator[None]:
    """Say what is wrong with weights that cannot be read inside the block."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise InputError("damaged-weights", f"a safetensors file of {source} cannot be read ({error}). Download or save the model again.") from error
    except (OSError, KeyError, ImportError) as error:
        if "safetensors" in str(error) and not Path(source).is_dir():
            raise _pickled(source, "on the hub") from error
        raise _unavailable(source, error) from error


def check_complete(unfit: list[str], source: str) -> None:
    """Refuse weights that lack some tensors, by name: these would be drawn at random without a word."""
    if unfit:
        raise InputError(
            "weights-do-not-match",
            f"the weights of {source} lack {len(unfit)} tensors that its config.json asks for, such as {unfit[0]}, or have them in another shape. "
            "Check that both files belong together.",
        )


def check_tokenizer(tokenizer: Any, source: str) -> None:
    """Refuse the empty tokenizer that transformers makes up where a vocabulary is missing."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise InputError(
            "model-incomplete",
            f"{source} has no vocabulary for its tokenizer, expected tokenizer.json beside config.json. Save the tokenizer there too.",
        )


def load_decoder(transformers: Any, source: str, *, dtype: Any) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a folder that was checked or from the hub."""
    if _layers_differ(Path(source)):
        model, tokenizer = _load_uneven_decoder(transformers, source, dtype=dtype)
    else:
        model, tokenizer = _load_stock_decoder(transformers, source, dtype=dtype)
    check_tokenizer(tokenizer, source)
    num_known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_known:
        raise InputError(
            "weights-do-not-match",
            f"the tokenizer of {source} has {len(tokenizer)} tokens, but the model has embeddings for {num_known}. Check that both belong together.",
        )
    return model, tokenizer


def _layers_differ(folder: Path) -> bool:
    """Whether a folder holds a model that stock transformers cannot build, because its layers have sizes of their own or are of low rank."""
    settings = read_json(folder / "config.json") if folder.is_dir() else None
    return isinstance(settings, dict) and bool(settings.get("per_layer_config") or (folder / "low_rank.json").is_file())


def _load_uneven_decoder(transformers: Any, source: str, *, dtype: Any) -> tuple[Any, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from partwise.models.uneven_files import load_uneven

    model: Any = load_uneven(source)
    if type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise InputError("task-not-supported", f"{source} holds a {type(model).__name__}, which writes no text. Pass --model with a decoder such as Llama.")
    with quiet(transformers):
        # With the configuration at hand, because reading it as stock code does asks for one size of all layers.
        tokenizer = open_part(transformers.AutoTokenizer, source, config=model.config)
    return model if dtype == "auto" else model.to(dtype), tokenizer


def _load_stock_decoder(transformers: Any, source: str, *, dtype: Any) -> tuple[Any, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    with quiet(transformers):
        tokenizer = open_part(transformers.AutoTokenizer, source)
        config = open_part(transformers.AutoConfig, source)
        is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
        if is_encoder or type(config) not in transformers.AutoModelForCausalLM._model_mapping:
            raise InputError(
                "task-not-supported", f"{source} is of type {config.model_type}, which writes no text. Pass --model with a decoder such as Llama."
            )
        options = {"trust_remote_code": False, "use_safetensors": True, "dtype": dtype, "output_loading_info": True}
        with reading_weights(source):
            try:
                model, info = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
            except ValueError as error:
                raise _unavailable(source, error) from error
    check_complete(sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}), source)
    return model, tokenizer


def _pickled(source: str, names: str) -> InputError:
    return InputError(
        "pickle-refused",
        f"{source} has pickled weights only ({names}); loading a pickle can run any code, so it is refused. Take a version with *.safetensors, or, if you "
        "trust it, load it with transformers elsewhere and save it with save_pretrained.",
    )


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
