"""Slow twins and small nets for the methods of the room train: an ordinary training loop, images, and what a round does without training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from partwise.models import extract, merge, tensors_of
from partwise.train import OptimizerSettings, SubnetTrainer
from partwise.train.method import SubnetMethod
from tiny import PreActBlock, tiny_resnet

MOMENTUM = OptimizerSettings(optimizer="sgd", lr=0.05)


def preact_resnet(depths: Sequence[int] = (2, 2, 4, 1), **options: Any) -> nn.Module:
    """Channels of 4, 8, 16, 32; blocks that add last."""
    return tiny_resnet(PreActBlock, depths, **options)


def image_loader(num_rows: int = 24, *, batch_size: int = 4) -> DataLoader[tuple[Tensor, ...]]:
    """Images of 3 x 8 x 8 whose class, of five, is where a bright row lies."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_rows, 3, 8, 8, generator=generator)
    classes = torch.randint(5, (num_rows,), generator=generator)
    images[torch.arange(num_rows), :, classes] += 3
    return DataLoader(TensorDataset(images, classes), batch_size=batch_size, shuffle=True)


def plain_training(model: nn.Module, trainer: SubnetTrainer, *, num_rounds: int) -> nn.Module:
    """What a student would write, on the batches of part 0 and with a new SGD every round."""
    model = copy.deepcopy(model).train()
    settings, steps = trainer.optimizer, trainer.method.steps_of(0)
    assert trainer._batches is not None
    for number in range(1, num_rounds + 1):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=settings.momentum, weight_decay=settings.weight_decay)
        for step, (inputs, classes) in enumerate(trainer._batches.of(0, round_number=number, steps=(steps,) * trainer.method.num_parts)):
            optimizer.param_groups[0]["lr"] = settings.lr_at((number - 1) * steps + step, num_rounds * steps)
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), classes).backward()
            if settings.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
            optimizer.step()
    return model


def cut_and_merged(model: nn.Module, method: SubnetMethod, generators: Sequence[Any]) -> dict[str, Tensor]:
    """Tensors after a round in which nobody trains."""
    axes = method.find_axes(model)
    parts = method.deal(axes, generators)
    return tensors_of(merge(model, [(part, extract(model, part, axes=axes, loadable=False)) for part in parts], axes=axes))


def sizes_of(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
