"""MNIST and CIFAR-10 for the programs that train on images, and the small networks that they train.

The images come from a folder of data sets that is not part of the repository (``PARTWISE_DATA``, by default ../shared/data).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from partwise.models.networks import build
from rows import ROOT

NUM_CLASSES = 10


@dataclass(frozen=True)
class Images:
    """A data set cut in three: for training, for choosing settings, and for the final numbers."""

    name: str
    train: TensorDataset
    valid: TensorDataset
    test: TensorDataset

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.train.tensors[0].shape[1:])

    def loader(self, batch_size: int) -> DataLoader[Any]:
        """Shuffled batches for training."""
        return DataLoader(self.train, batch_size=batch_size, shuffle=True)


def loaders() -> Any:
    """The module that reads the data sets.

    Raises
    ------
    FileNotFoundError
        When the folder is not there.
    """
    path = Path(os.environ.get("PARTWISE_DATA", ROOT.parent / "shared" / "data")) / "loaders.py"
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}, expected a folder of data sets with MNIST and CIFAR-10. Set PARTWISE_DATA to the folder that has them."
        )
    spec = importlib.util.spec_from_file_location("loaders", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["loaders"] = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def mnist(*, num_valid: int = 5000, num_train: int | None = None) -> Images:
    """MNIST as rows of 784 numbers."""
    return _cut("MNIST", *loaders().mnist(), num_valid=num_valid, num_train=num_train, flat=True)


def cifar10(*, num_valid: int = 1000, num_train: int | None = None, flat: bool = False) -> Images:
    """The 10,000 + 1,000 images of CIFAR-10 that are there, averaged to 16 x 16, as (3, 16, 16) or as rows of 768 numbers."""
    x_train, y_train, x_test, y_test = loaders().cifar10()
    return _cut("CIFAR-10", _halved(x_train), y_train, _halved(x_test), y_test, num_valid=num_valid, num_train=num_train, flat=flat)


def perceptron(images: Images, *, hidden: Iterable[int], seed: int) -> nn.Module:
    """Hidden layers with batch normalisation."""
    return build({"network": "mlp", "hidden": list(hidden), "num_inputs": images.shape[0], "num_classes": NUM_CLASSES}, seed=seed)


def residual_network(images: Images, *, seed: int, width: int = 16, blocks: tuple[int, ...] = (2, 9, 2)) -> nn.Module:
    """The pre-activation ResNet of the package, with a stride in its first stage as well, for images of 16 x 16."""
    stages = [{"width": width * 2**number, "stride": 2, "inner": [width * 2**number] * count} for number, count in enumerate(blocks)]
    return build({"network": "resnet", "stem": width, "stages": stages, "channels": images.shape[0], "num_classes": NUM_CLASSES}, seed=seed)


def batches(dataset: TensorDataset, size: int = 1000) -> list[tuple[Tensor, Tensor]]:
    inputs, classes = dataset.tensors
    return list(zip(inputs.split(size), classes.split(size), strict=True))


def _halved(images: Any) -> Any:
    """Means of 2 x 2 points: (image, 32, 32, channel) -> (image, 16, 16, channel)."""
    count, height, width, channels = images.shape
    return images.reshape(count, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def _cut(name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any, *, num_valid: int, num_train: int | None, flat: bool) -> Images:
    order = np.random.default_rng(0).permutation(len(x_train))
    rows = {"valid": order[:num_valid], "train": order[num_valid:][:num_train]}
    mean, deviation = (float(getattr(x_train[rows["train"]], statistic)()) for statistic in ("mean", "std"))

    def dataset(images: Any, classes: Any) -> TensorDataset:
        inputs = torch.as_tensor((images - mean) / deviation, dtype=torch.float32)
        inputs = inputs if inputs.ndim == 4 else inputs[..., None]  # (image, height, width, channel)
        inputs = inputs.flatten(1) if flat else inputs.permute(0, 3, 1, 2).contiguous()
        return TensorDataset(inputs, torch.as_tensor(classes, dtype=torch.int64))

    cuts = {cut: dataset(x_train[chosen], y_train[chosen]) for cut, chosen in rows.items()}
    return Images(name, cuts["train"], cuts["valid"], dataset(x_test, y_test))
