"""Claims about directions of outputs: sums that arrive in pieces are those of the whole, and moments of inputs say what moments of outputs say."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partwise.linalg.output_basis import Moments, output_basis, projected_layer, thin_layer
from tolerances import assert_close

SEEDS = st.integers(0, 10_000)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments_of(rows: Tensor) -> Moments:
    moments = Moments()
    moments.add(rows)
    return moments


@given(SEEDS, st.lists(st.integers(0, 7), min_size=1, max_size=5), st.floats(-1e4, 1e4))
def test_moments_of_pieces_are_those_of_all_rows(seed: int, lengths: list[int], offset: float):
    rows = drawn(sum(lengths) + 1, 3, seed=seed) + offset
    moments = Moments()
    for piece in rows.split([*lengths, 1]):
        moments.add(piece)
    assert moments.count == len(rows)
    assert_close(moments.mean, rows.mean(0), claim="mean")
    assert_close(moments.second(centred=True), (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows), claim="covariance")
    assert_close(moments.second(centred=False), rows.T @ rows / len(rows), claim="mean of products")


def test_a_large_mean_costs_no_digits_even_in_float32():
    rows = (drawn(500, 2, seed=0) + 1e4).float()
    expected = torch.cov(rows.double().T, correction=0)
    assert_close(moments_of(rows).second(centred=True), expected, claim="covariance of rows far from zero")


@given(SEEDS, st.booleans())
def test_moments_of_inputs_say_what_moments_of_outputs_say(seed: int, centred: bool):
    weight, inputs = drawn(9, 4, seed=seed), drawn(30, 4, seed=seed + 1) + 1
    of_outputs, basis = output_basis(moments_of(inputs @ weight.T).second(centred=centred))
    of_inputs, narrow = output_basis(moments_of(inputs).second(centred=centred), weight=weight)
    assert_close(of_inputs, of_outputs[:4], claim="the same energies", rtol=1e-8)
    assert float(of_outputs[4:].max()) < 1e-12 * float(of_outputs[0]), "and none elsewhere"
    for rank in range(1, 5):
        first, second = (directions[:, :rank] @ directions[:, :rank].T for directions in (basis, narrow))
        # Directions are as exact as the gap to the next energy is wide.
        assert_close(first, second, claim="the same directions", rtol=0, atol=1e-7)


@given(SEEDS)
def test_directions_are_orthonormal_and_hold_the_energy_that_is_told(seed: int):
    outputs = drawn(40, 6, seed=seed) @ drawn(6, 6, seed=seed + 1)
    energies, basis = output_basis(moments_of(outputs).second(centred=True))
    assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64), claim="orthonormal", atol=1e-10)
    assert bool((energies[:-1] >= energies[1:]).all())
    along = ((outputs - outputs.mean(0)) @ basis).square().mean(0)
    assert_close(along, energies, claim="energy along each direction", rtol=1e-8, atol=1e-10 * float(energies[0]))


@given(SEEDS, st.integers(1, 5), st.booleans())
def test_thin_layers_are_the_projected_one_and_keep_the_mean_of_the_outputs(seed: int, rank: int, has_bias: bool):
    weight, inputs = drawn(5, 7, seed=seed), drawn(50, 7, seed=seed + 1) + 2
    bias = drawn(5, seed=seed + 2) if has_bias else None
    outputs = inputs @ weight.T + (0 if bias is None else bias)
    mean = outputs.mean(0) if has_bias else None
    basis = output_basis(moments_of(outputs).second(centred=has_bias))[1][:, :rank]
    inner, outer, outer_bias = thin_layer(weight, bias, basis, mean)
    projected, projected_bias = projected_layer(weight, bias, basis, mean)
    assert (inner.shape, outer.shape) == ((rank, 7), (5, rank))
    assert_close(outer @ inner, projected, claim="one product")
    if bias is None:
        assert outer_bias is None
        assert projected_bias is None
    else:
        assert torch.equal(outer_bias, projected_bias)
        assert_close((inputs @ inner.T @ outer.T + outer_bias).mean(0), outputs.mean(0), claim="the mean stays at any rank")
