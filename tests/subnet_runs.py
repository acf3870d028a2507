"""Small models, data and methods for tests of the room train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from partwise.models import Axis, CoupledAxis, DisjointSampler, FixedFractionSampler, Part, coupled_axes
from partwise.train import OptimizerSettings
from partwise.train.method import SubnetMethod

SGD = OptimizerSettings(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, grad_clip=None, schedule="constant", warmup=0.0)
ADAMW = OptimizerSettings(lr=0.01)


@dataclass(frozen=True, kw_only=True)
class Halves(SubnetMethod):
    """Every part holds half of each hidden layer, multiplied by two; with ``disjoint``, nobody holds what another holds."""

    num_parts: int = 2
    num_local_steps: int | tuple[int, ...] = 3
    disjoint: bool = False
    keep: float = 0.5

    def find_axes(self, model: nn.Module) -> tuple[Axis, ...]:
        return coupled_axes(model)

    def deal(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator]) -> list[Part]:
        return (DisjointSampler() if self.disjoint else FixedFractionSampler(keep=self.keep))(axes, generators)

    def factors(self, axes: Sequence[Axis], part: Part) -> dict[str, float]:
        return {axis.name: axis.size / len(part.units[axis.name]) for axis in axes if isinstance(axis, CoupledAxis)}


@dataclass(frozen=True, kw_only=True)
class Whole(SubnetMethod):
    """Nothing is split."""

    num_parts: int = 1
    num_local_steps: int | tuple[int, ...] = 3

    def find_axes(self, model: nn.Module) -> tuple[Axis, ...]:
        return ()

    def deal(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator]) -> list[Part]:
        raise AssertionError("nothing is dealt where nothing is split")


def perceptron(*, seed: int = 0, width: int = 8, dropout: float = 0.0) -> nn.Sequential:
    """Two hidden layers on six inputs and three classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def dataset(num_rows: int = 64, *, seed: int = 0) -> TensorDataset:
    """Rows whose class is the largest of three sums."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, 6, generator=generator)
    return TensorDataset(rows, (rows @ torch.randn(6, 3, generator=generator)).argmax(1))


def loader(num_rows: int = 64, *, batch_size: int = 8, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(dataset(num_rows, seed=seed), batch_size=batch_size, shuffle=True)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors agree to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
