"""Claims about what pairs of units do together: block by block it is what the sums say when they are written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partwise.linalg import unit_products as module
from partwise.linalg.unit_products import pull_sizes, unit_products
from tolerances import assert_close


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 60, 2**24])
@given(size=st.integers(1, 5), width=st.integers(1, 4), outputs=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_inner_products_of_what_units_add_come_out(block: int, size: int, width: int, outputs: int, seed: int):
    inputs, weight = draw(7, size * width, seed=seed), draw(size * width, outputs, seed=seed + 1)
    added = [inputs[:, unit * width : (unit + 1) * width] @ weight[unit * width : (unit + 1) * width] for unit in range(size)]
    expected = torch.tensor([[float((one * other).sum()) for other in added] for one in added], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        assert_close(unit_products(weight, inputs.T @ inputs, size=size), expected, claim="sums over places and outputs", rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [1, 60, 2**24])
@given(size=st.integers(1, 5), width=st.integers(1, 4), outputs=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_sizes_of_gradients_are_those_that_autograd_finds(block: int, size: int, width: int, outputs: int, seed: int):
    inputs, weight = draw(7, size * width, seed=seed), draw(size * width, outputs, seed=seed + 1)
    left = (draw(size, seed=seed + 2) > 0).double()
    hidden = inputs.clone().requires_grad_()
    kept = (inputs * (1 - left).repeat_interleave(width)) @ weight
    [gradient] = torch.autograd.grad(0.5 * (hidden @ weight - kept).square().sum(), [hidden])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = pull_sizes(weight, inputs.T @ inputs, left)
    assert_close(found, gradient.square().sum(0).view(size, width).sum(1), claim="the gradient, squared and summed over places", rtol=1e-9, atol=1e-9)


def test_rows_of_sums_that_are_fewer_than_entries_are_used_over_and_over():
    weight, few = draw(6, 3, seed=0), draw(2, 6, seed=1)
    assert_close(unit_products(weight, few, size=3), unit_products(weight, few.repeat(3, 1), size=3), claim="entry e has row e % 2", rtol=0, atol=0)
