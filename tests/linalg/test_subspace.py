"""The thin singular value decomposition of a product."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from partwise.linalg.subspace import singular_factors
from tolerances import assert_close


@st.composite
def products(draw):
    """Two thin factors, some of them rank-deficient or wider than the matrix is large."""
    num_outputs, num_inputs, rank = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    up = torch.randn(num_outputs, rank, generator=generator, dtype=torch.float64)
    down = torch.randn(rank, num_inputs, generator=generator, dtype=torch.float64)
    dead = draw(st.integers(0, rank - 1))
    up[:, rank - dead :] = 0
    return up, down


@given(products())
def test_the_factors_multiply_to_the_product_and_keep_the_number_of_components(factors):
    up, down = factors
    left, values, right = singular_factors(up, down)
    assert (left.shape, values.shape, right.shape) == (up.shape, (up.shape[1],), down.shape)
    assert_close(left * values @ right, up @ down, claim="same matrix", atol=1e-10)


@given(products())
def test_values_are_those_of_the_product_in_descending_order(factors):
    up, down = factors
    _, values, _ = singular_factors(up, down)
    expected = torch.linalg.svdvals(up @ down)
    size = min(len(expected), len(values))
    assert_close(values[:size], expected[:size], claim="svd of the formed product", atol=1e-10)
    assert bool((values.diff() <= 1e-12).all())
    assert not bool(values[size:].any())


@given(products())
def test_directions_are_orthonormal_as_far_as_the_matrix_has_room(factors):
    up, down = factors
    left, _, right = singular_factors(up, down)
    room = min(up.shape[0], down.shape[1], up.shape[1])
    eye = torch.eye(room, dtype=torch.float64)
    assert_close(left[:, :room].T @ left[:, :room], eye, claim="left", atol=1e-10)
    assert_close(right[:room] @ right[:room].T, eye, claim="right", atol=1e-10)


def test_signs_do_not_depend_on_the_library():
    _, _, right = singular_factors(torch.randn(5, 3), torch.randn(3, 4))
    assert bool((right.gather(1, right.abs().argmax(dim=1, keepdim=True)) > 0).all())
