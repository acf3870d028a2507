"""Claims about cutting entries out of tensors and putting pieces back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partwise.linalg.slicing import mean_over_holders, take, take_shape
from tolerances import assert_close

KEPT = st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True).map(sorted)


def mean_slowly(old: Tensor, pieces: list[tuple[dict[int, Tensor], Tensor]]) -> Tensor:
    """Coordinate by coordinate, as a student would write it."""
    new = old.clone()
    for place in itertools.product(*map(range, old.shape)):
        values = []
        for entries, piece in pieces:
            here = [entries[dim].tolist() if dim in entries else list(range(old.shape[dim])) for dim in range(old.ndim)]
            if all(index in kept for index, kept in zip(place, here, strict=True)):
                values.append(piece[tuple(kept.index(index) for index, kept in zip(place, here, strict=True))])
        if values:
            new[place] = sum(values) / len(values)
    return new


@given(pieces=st.lists(st.fixed_dictionaries({}, optional={0: KEPT, 1: KEPT}), max_size=4))
def test_the_mean_over_holders_agrees_with_a_loop_over_coordinates(pieces: list[dict[int, list[int]]]):
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(5, 5, 2, dtype=torch.float64, generator=generator)
    held = []
    for kept in pieces:
        entries = {dim: torch.tensor(units) for dim, units in kept.items()}
        held.append((entries, torch.randn(take_shape(old.shape, entries), dtype=torch.float64, generator=generator)))
    before = old.clone()
    assert_close(mean_over_holders(old, held), mean_slowly(old, held), claim="one coordinate at a time gives the same")
    assert torch.equal(old, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
@given(rows=st.lists(KEPT, min_size=0, max_size=7))
def test_taking_and_putting_back_is_the_identity_to_the_bit(rows: list[list[int]], dtype: torch.dtype):
    old = (torch.randn(5, 3, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    entries = [{0: torch.tensor(kept)} for kept in rows]
    assert torch.equal(mean_over_holders(old, [(kept, take(old, kept)) for kept in entries]), old)


def test_one_holder_gives_its_bits_even_the_sign_of_zero():
    new = mean_over_holders(torch.ones(3), [({0: torch.tensor([1])}, torch.tensor([-0.0]))])
    assert new.tolist() == [1.0, 0.0, 1.0]
    assert bool(torch.signbit(new[1]))


def test_counts_become_the_largest_of_the_holders():
    pieces = [({}, torch.tensor(3)), ({}, torch.tensor(7)), ({}, torch.tensor(5))]
    assert mean_over_holders(torch.tensor(9), pieces).item() == 7
    assert mean_over_holders(torch.tensor(9), []).item() == 9


def test_what_is_taken_does_not_share_memory():
    old = torch.zeros(2, 2)
    take(old, {}).fill_(1)
    take(old, {0: torch.tensor([0, 1])}).fill_(1)
    assert old.tolist() == [[0, 0], [0, 0]]
