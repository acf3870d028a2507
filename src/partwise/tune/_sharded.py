"""Weights that may be spread over several workers (FSDP2), and decisions that all workers must share."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a sharded one; any other tensor as it is. All workers must call this together."""
    return cast("Tensor", cast("Any", tensor).full_tensor()) if isinstance(tensor, DTensor) else tensor


def read_components(weight: Tensor, *, dim: int, start: int, stop: int) -> Tensor:
    """A copy of components ``start`` to ``stop`` (excluded), which lie along ``dim`` of ``weight``."""
    return whole(weight.detach()).narrow(dim, start, stop - start).clone()


def write_components(weight: Tensor, values: Tensor, *, dim: int, start: int) -> None:
    """Put ``values`` into ``weight`` from component ``start`` on, in place and unseen by autograd."""
    weight = weight.detach()
    if not isinstance(weight, DTensor):
        weight.narrow(dim, start, values.shape[dim]).copy_(values)
        return
    full = whole(weight).clone()
    full.narrow(dim, start, values.shape[dim]).copy_(values)
    weight.copy_(distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None))


def worker_rank() -> int:
    """Number of this worker, from 0."""
    return torch.distributed.get_rank() if _several_workers() else 0


def agree(numbers: list[int], device: torch.device) -> list[int]:
    """Worker 0's numbers, on every worker."""
    if not _several_workers():
        return numbers
    decision = torch.tensor(numbers, device=device)
    torch.distributed.broadcast(decision, src=0)
    return [int(number) for number in decision]


def _several_workers() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
