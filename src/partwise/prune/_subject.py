"""The model that a command prunes: opened, checked, and told apart from every other one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partwise.atomic_files import read_json
from partwise.checks import InputError, PartwiseError

if TYPE_CHECKING:
    import torch

    from partwise.opened_models import OpenedModel

__all__ = ["ModelFlags", "Subject", "model_type", "open_subject"]

SAMPLED = 4096  # entries of a tensor that its fingerprint looks at


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which model, and where it runs.

    Parameters
    ----------
    model : str or None
        A causal language model: a folder as save_pretrained writes it, or a Hugging Face id. Left out: the newest finished run of `partwise train` under
        runs/, and of its models the whole one.
    device : str or None
        cpu, cuda, cuda:1. Left out: the GPU if there is one.
    dtype : str or None
        In which to compute. Left out: float32 on a CPU, the model's own on a GPU; the result is then saved in the model's own, wherever it was computed.
    """

    model: str | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


@dataclass(frozen=True)
class Subject:
    """A model with what its file said.

    Parameters
    ----------
    opened : OpenedModel
        Model and tokenizer.
    saved_dtype : torch.dtype
        In which the small model is to be saved.
    """

    opened: OpenedModel
    saved_dtype: torch.dtype

    def fingerprint(self) -> str:
        """Digest of names, shapes and some entries of all tensors: another model has another one."""
        import torch

        digest = hashlib.sha256()
        for name, tensor in self.opened.model.state_dict().items():
            entries = tensor.detach().flatten()
            entries = entries[:: max(1, len(entries) // SAMPLED)].cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode() + entries.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def open_subject(flags: ModelFlags) -> Subject:
    """Load what the flags name.

    Raises
    ------
    InputError
        ``quantised-model``; ``network-on-command-line`` for a perceptron or ResNet; what `partwise.opened_models.open_model` refuses.
    """
    from partwise.opened_models import open_model

    if flags.model is not None:
        _refuse_others(Path(flags.model).expanduser())
    opened = open_model(flags.model, device=flags.device, dtype=flags.dtype)
    if getattr(opened.model.config, "quantization_config", None) is not None:
        raise _quantised(opened.name)
    computed: torch.dtype = next(opened.model.parameters()).dtype
    stored = None if flags.dtype is not None else _stored_dtype(opened.name)
    return Subject(opened, computed if stored is None else stored)


def model_type(source: str | None) -> str | None:
    """What ``config.json`` calls the family of a model, before anything of it is loaded; None where that cannot be told."""
    if source is None:
        from partwise.opened_models import newest_train_run

        run = newest_train_run()
        return None if run is None else model_type(str(run.model))
    folder = Path(source).expanduser()
    if folder.is_dir():
        found = _settings_of(folder).get("model_type")
        return found if isinstance(found, str) else None
    try:
        return str(_config_of(source).model_type)
    except PartwiseError:  # opening the model will say what is wrong
        return None


def _refuse_others(folder: Path) -> None:
    """Refuse what has a configuration that this command cannot work with."""
    settings = _settings_of(folder)
    if settings.get("quantization_config") is not None:
        raise _quantised(str(folder))
    if {"network", "class"} & set(settings) and "model_type" not in settings:
        kind = settings.get("network") or settings.get("class")
        raise InputError(
            "network-on-command-line",
            f"{folder} holds a network of kind {kind!r}, expected a language model, because the command measures perplexity. Prune it from Python: "
            "model = partwise.load(folder); plan = ISpaSP(keep=0.5).plan(model, batches); partwise.prune.apply(model, plan).",
        )


def _settings_of(folder: Path) -> Mapping[str, Any]:
    """What ``config.json`` of a folder says, nothing where it says nothing that can be read."""
    try:
        settings = read_json(folder / "config.json")
    except PartwiseError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _stored_dtype(source: str) -> torch.dtype | None:
    """The dtype that a model has in its file; None where its configuration does not say."""
    import torch

    folder = Path(source)
    said: Any
    if folder.is_dir():
        settings = _settings_of(folder)
        said = settings.get("dtype") or settings.get("torch_dtype")
    else:
        said = getattr(_config_of(source), "dtype", None)
    found = getattr(torch, said, None) if isinstance(said, str) else said
    return found if isinstance(found, torch.dtype) else None


def _config_of(source: str) -> Any:
    """The configuration of a model of the hub."""
    from partwise.checks import load_extra
    from partwise.models.loading import open_part, quiet

    transformers = load_extra("transformers", extra="hf")
    with quiet(transformers):
        return open_part(transformers.AutoConfig, source)


def _quantised(name: str) -> InputError:
    return InputError(
        "quantised-model", f"{name} is quantised, expected weights in floating point. Dequantise it first (model.dequantize()), prune, then quantise again."
    )
