"""Turning the components of a module into the singular components of their sum, the optimiser's averages with them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from partwise.linalg.subspace import singular_factors
from partwise.tune._sharded import read_components, write_components


def rotate_components(down: Tensor, up: Tensor, rank: int, optimiser: Optimizer | None = None) -> None:
    """Rotate the first ``rank`` components to singular order in place, keeping the norm of each row of ``down`` near where it was.

    With ``down' = T down`` and ``up' = up T^-1`` the gradients turn with ``T^-T`` and ``T^T``. Adam's first average turns alike; its
    second is mapped as the variance of a sum of independent entries. A module with a component that is still zero stays as it is.

    Parameters
    ----------
    down : Tensor, (r_max, in)
    up : Tensor, (out, r_max)
    """
    old_down = read_components(down, dim=0, start=0, stop=rank).double()  # (rank, in)
    old_up = read_components(up, dim=1, start=0, stop=rank).double()  # (out, rank)
    left, values, right = singular_factors(old_up, old_down)
    if not bool((values > 1e-9 * values[0].clamp_min(1e-300)).all()):
        return
    size = old_down.norm(dim=1).mean()
    new_down, new_up = right * size, left * (values / size)  # (rank, in), (out, rank)
    turn = new_down @ torch.linalg.pinv(old_down)  # (rank, rank)
    write_components(down, new_down, dim=0, start=0)
    write_components(up, new_up, dim=1, start=0)
    if optimiser is not None:
        _turn_averages(optimiser.state.get(down, {}), torch.linalg.inv(turn).T, dim=0)
        _turn_averages(optimiser.state.get(up, {}), turn, dim=1)


def _turn_averages(state: dict[str, Tensor], matrix: Tensor, *, dim: int) -> None:
    for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        if name in state:
            average = read_components(state[name], dim=dim, start=0, stop=len(matrix))
            mix = matrix.to(average) ** power  # (rank, rank)
            write_components(state[name], mix @ average if dim == 0 else average @ mix.T, dim=dim, start=0)
