"""Learning by parts: cut a model or matrix into parts, work on them independently, put them back, keep only the useful ones.

Rooms
-----
tune : adapters by rank-one parts; finds the rank while training.
train : whole models by subnetworks; tickets of any size.
prune : smaller dense models, cut out of trained ones.
serve : generation in a fixed memory; caches that keep to a budget.
decompose : scikit-learn estimators built from rank-one parts.

Functions
---------
load : open a model that this package has saved, whatever the sizes of its layers.

Importing this package loads nothing heavy; each room loads its libraries when one of its names is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from torch import nn

__version__ = "0.1.0"
ROOMS = ("tune", "train", "prune", "serve", "decompose")

__all__ = ["ROOMS", "__version__", "load"]


def load(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """Open a model that this package, or ``save_pretrained``, has saved, in evaluation mode. No pickle is read and no code of the folder is run.

    Parameters
    ----------
    path : str or path
        A folder with ``config.json`` and safetensors: a Llama, Mistral, Qwen2, Qwen3, GPT-2, GPT-NeoX, Mamba2 or ViT model of transformers whose layers may
        differ in size or be of low rank, a perceptron or ResNet of ``partwise train``, or a part of a network of your own.
    model : torch.nn.Module, optional
        For a network of your own only: the whole one, as its own constructor makes it, trained or not. The part is taken out of a copy.

    Returns
    -------
    torch.nn.Module
        Of the class that the folder names, with the dtype of the file.

    Raises
    ------
    InputError
        When the folder holds pickles or no model, the architecture is not known, ``config.json`` contradicts the tensors, or ``model`` is needed.
    """
    # By name, because this module lies below everything else.
    loaded: nn.Module = importlib.import_module("partwise.saved_models").load(path, model=model)
    return loaded
