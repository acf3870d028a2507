"""Open whatever model this package has saved, from the path of its folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from partwise import atomic_files
from partwise.checks import InputError

if TYPE_CHECKING:
    import os

    from torch import nn

__all__ = ["load"]


def load(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """Open a saved model; see `partwise.load`."""
    folder = Path(path).expanduser()
    atomic_files.refuse_pickles(folder)
    if not (folder / "config.json").is_file():
        advice = "Check the path."
        if (folder / "adapter_config.json").is_file():
            advice = "This is an adapter: use peft.PeftModel.from_pretrained(model, folder)."
        raise InputError("model-incomplete", f"{folder} has no config.json, expected a model as this package or save_pretrained writes it. {advice}")
    settings = atomic_files.read_json(folder / "config.json")
    if isinstance(settings, dict) and {"network", "class"} & set(settings) and "model_type" not in settings:
        from partwise.models.network_files import load_network

        return load_network(folder, model=model)
    from partwise.models.uneven_files import load_uneven

    return load_uneven(folder)
