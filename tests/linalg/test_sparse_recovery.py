"""Claims about the iteration of i-SpaSP: it finds what is alive, settles, and does what is written line by line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partwise.checks import InputError
from partwise.linalg.sparse_recovery import recover_units
from partwise.linalg.unit_products import pull_sizes


def network(num_hidden: int, *, num_alive: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor, set[int]]:
    """Hidden units of random inputs behind ReLU, (inputs, units), what reads them, (outputs, units), and which units are alive."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 20, generator=generator, dtype=torch.float64)
    first = torch.randn(num_hidden, 20, generator=generator, dtype=torch.float64)
    hidden = (inputs @ first.T).relu()
    alive = set(torch.randperm(num_hidden, generator=generator)[: num_hidden if num_alive is None else num_alive].tolist())
    hidden[:, [unit for unit in range(num_hidden) if unit not in alive]] = 0
    return hidden, torch.randn(10, num_hidden, generator=generator, dtype=torch.float64), alive


def signed(hidden: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Sum over inputs of ``W^T (U - U_S)``, written out."""
    return lambda left: ((hidden @ weight.T - (hidden * (1 - left)) @ weight.T) @ weight).sum(0)


def unsigned(hidden: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda left: pull_sizes(weight.T, hidden.T @ hidden, left).sqrt()


def residual(hidden: Tensor, weight: Tensor, units: tuple[int, ...]) -> float:
    """Relative distance of the output from that of some units."""
    whole = hidden @ weight.T
    return float((whole - hidden[:, list(units)] @ weight[:, list(units)].T).norm() / whole.norm())


def recover_slowly(importance: Callable[[Tensor], Tensor], sizes: Tensor, keep: int, num_iterations: int, must: set[int]) -> list[int]:
    """All iterations, with sorted lists."""
    chosen: list[int] = []
    for _ in range(num_iterations):
        worth = importance(torch.tensor([0.0 if unit in chosen else 1.0 for unit in range(len(sizes))], dtype=torch.float64)).tolist()
        best = sorted(range(len(sizes)), key=lambda unit: (-worth[unit], unit))[: 2 * keep]
        candidates = {*best, *chosen, *must}
        order = sorted(candidates, key=lambda unit: (unit not in must, -float(sizes[unit]), unit))
        chosen = sorted(order[:keep])
    return chosen


@pytest.mark.parametrize("importance", [signed, unsigned])
@pytest.mark.parametrize("seed", range(5))
def test_the_units_that_are_alive_are_found_and_explain_everything(importance: Callable[..., Callable[[Tensor], Tensor]], seed: int):
    hidden, weight, alive = network(60, num_alive=12, seed=seed)
    found = recover_units(importance(hidden, weight), hidden.sum(0), keep=12, num_iterations=20)
    assert set(found.units) == alive
    assert residual(hidden, weight, found.units) < 1e-14


def test_all_units_leave_nothing_and_fewer_leave_more():
    hidden, weight, _ = network(60)
    left = [residual(hidden, weight, recover_units(signed(hidden, weight), hidden.sum(0), keep=keep, num_iterations=20).units) for keep in (10, 20, 30, 45, 60)]
    assert left[-1] < 1e-14
    assert left == sorted(left, reverse=True)
    assert left[0] < 1


@given(st.integers(1, 12), st.data(), st.integers(0, 10**6), st.sampled_from([signed, unsigned]))
def test_the_iteration_does_what_is_written(num_units: int, data: st.DataObject, seed: int, kind: Callable[..., Callable[[Tensor], Tensor]]):
    hidden, weight, _ = network(num_units, seed=seed)
    keep, num_iterations = data.draw(st.integers(1, num_units)), data.draw(st.integers(1, 8))
    must = data.draw(st.sets(st.integers(0, num_units - 1), max_size=keep))
    protect = torch.tensor([unit in must for unit in range(num_units)])
    importance = kind(hidden, weight)
    found = recover_units(importance, hidden.sum(0), keep=keep, num_iterations=num_iterations, protect=protect)
    assert list(found.units) == recover_slowly(importance, hidden.sum(0), keep, num_iterations, must)
    assert must <= set(found.units)
    assert found.num_iterations <= num_iterations


def test_it_ends_when_an_iteration_changes_nothing_and_more_would_not():
    hidden, weight, _ = network(40, seed=2)
    found = recover_units(signed(hidden, weight), hidden.sum(0), keep=6, num_iterations=1000)
    assert found.is_settled
    assert found.num_iterations < 20
    enough = recover_units(signed(hidden, weight), hidden.sum(0), keep=6, num_iterations=found.num_iterations - 1)
    assert not enough.is_settled
    assert enough.units == found.units


def test_with_half_of_the_units_to_keep_the_largest_stay_whatever_is_important():
    sizes = torch.tensor([5.0, 1.0, 4.0, 2.0])
    for importance in (lambda left: left, lambda left: -sizes, lambda left: torch.tensor([0.0, 9.0, 0.0, 9.0])):
        assert recover_units(importance, sizes, keep=2, num_iterations=20).units == (0, 2)


def test_a_large_unit_that_explains_nothing_does_not_become_a_candidate():
    importance = torch.tensor([0.0, 3.0, 2.0, 1.0, 1.0])
    assert recover_units(lambda left: importance * left, torch.tensor([9.0, 1.0, 2.0, 3.0, 1.0]), keep=1, num_iterations=20).units != (0,)


def test_bad_numbers_are_refused_with_what_was_got():
    sizes = torch.ones(3)
    for keep in (0, 4):
        with pytest.raises(InputError, match=rf"got keep={keep} for 3 units, expected a number from 1 to 3. Change keep") as raised:
            recover_units(torch.clone, sizes, keep=keep, num_iterations=1)
        assert raised.value.code == "keep-out-of-range"
    with pytest.raises(InputError, match=r"num_iterations=0 must be an integer of at least 1"):
        recover_units(torch.clone, sizes, keep=1, num_iterations=0)
    with pytest.raises(InputError, match=r"protect marks 2 units but keep=1, expected at most 1"):
        recover_units(torch.clone, sizes, keep=1, num_iterations=1, protect=torch.tensor([True, True, False]))
    with pytest.raises(InputError, match=r"sizes of units has 1 NaN or infinite entries out of 3"):
        recover_units(torch.clone, torch.tensor([1.0, torch.nan, 2.0]), keep=1, num_iterations=1)
