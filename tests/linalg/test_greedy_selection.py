"""Claims about greedy forward selection: what it picks, how fast its error falls, and that inner products are enough."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partwise.checks import InputError
from partwise.linalg.greedy_selection import SCALES, Course, Scale, Subset, greedy_course, greedy_subset
from tolerances import assert_close


def problem(num_units: int, num_examples: int, *, seed: int = 0, inside: bool = False) -> tuple[Tensor, Tensor]:
    """Units, one in each row, and a target: the mean of all units, or anything."""
    generator = torch.Generator().manual_seed(seed)
    units = torch.randn(num_units, num_examples, generator=generator, dtype=torch.float64)
    return units, units.mean(0) if inside else torch.randn(num_examples, generator=generator, dtype=torch.float64)


def products(units: Tensor, target: Tensor) -> tuple[Tensor, Tensor, float]:
    return units @ units.T, units @ target, float(target @ target)


def loss(total: Tensor, target: Tensor, number: int, scale: Scale) -> float:
    """Half the squared distance of a scaled sum from the target, evaluated as it is written."""
    if scale == "mean":
        factor = 1 / number
    else:
        factor = max(float(total @ target), 0.0) / float(total @ total) if bool(total.any()) else 0.0
    return 0.5 * float((factor * total - target).square().sum())


def course_slowly(units: Tensor, target: Tensor, *, num_steps: int, scale: Scale, allow_repeats: bool) -> Course:
    """Try every unit at every step."""
    chosen: list[int] = []
    losses: list[float] = []
    for number in range(1, num_steps + 1):
        tried = {
            unit: loss(units[[*chosen, unit]].sum(0), target, number, scale) for unit in range(len(units)) if allow_repeats or unit not in chosen
        }
        best = min(tried, key=lambda unit: (tried[unit], unit))
        chosen.append(best)
        losses.append(tried[best])
    return Course(tuple(chosen), tuple(losses))


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from(SCALES), st.booleans(), st.booleans())
def test_inner_products_choose_what_trying_every_unit_chooses(num_units: int, num_examples: int, seed: int, scale: Scale, allow_repeats: bool, inside: bool):
    units, target = problem(num_units, num_examples, seed=seed, inside=inside)
    num_steps = 6 if allow_repeats else num_units
    fast = greedy_course(*products(units, target), num_steps=num_steps, scale=scale, allow_repeats=allow_repeats)
    slow = course_slowly(units, target, num_steps=num_steps, scale=scale, allow_repeats=allow_repeats)
    for step, (ours, theirs) in enumerate(zip(fast.losses, slow.losses, strict=True), start=1):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)
        assert ours == pytest.approx(loss(units[list(fast.chosen[:step])].sum(0), target, step, scale), rel=1e-9, abs=1e-9)
        if fast.chosen[step - 1] != slow.chosen[step - 1]:  # equally good but for rounding; from here on both may go their own way
            break


@pytest.mark.parametrize("scale", SCALES)
def test_a_unit_that_is_the_target_is_chosen_first_and_nothing_is_left(scale: Scale):
    units, _ = problem(30, 20)
    course = greedy_course(*products(units, units[17]), num_steps=1, scale=scale)
    assert course.chosen == (17,)
    assert course.losses[0] < 1e-12


@pytest.mark.parametrize("scale", SCALES)
def test_of_one_unit_that_one_is_chosen(scale: Scale):
    units, target = problem(1, 5)
    assert greedy_course(*products(units, target), num_steps=3, scale=scale).chosen == (0, 0, 0)
    assert greedy_subset(*products(units, target), num_units=1, max_steps=5, scale=scale).units == (0,)


@pytest.mark.parametrize("scale", SCALES)
def test_of_equal_units_the_one_with_the_lowest_index_is_chosen(scale: Scale):
    units = torch.tensor([[0.0, 2.0], [4.0, 1.0], [4.0, 1.0], [4.0, 1.0]], dtype=torch.float64)
    assert greedy_course(*products(units, torch.tensor([4.0, 1.0], dtype=torch.float64)), num_steps=3, scale=scale).chosen[0] == 1
    course = greedy_course(*products(units, torch.tensor([4.0, 1.0], dtype=torch.float64)), num_steps=3, scale=scale, allow_repeats=False)
    assert course.chosen == (1, 2, 3)


def exponent(steps: np.ndarray, losses: np.ndarray) -> float:
    """Of the power of the number of steps that the errors follow."""
    return float(np.polyfit(np.log(steps), np.log(losses), 1)[0])


@pytest.mark.parametrize("seed", range(3))
def test_the_error_falls_with_the_square_of_the_steps_where_the_target_is_a_mean_of_units_and_at_random_with_the_steps(seed: int):
    generator = torch.Generator().manual_seed(seed)
    inputs, weights, signs = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((10, 10), (200, 10), (200, 1)))
    units = (weights @ inputs.T).relu() * signs  # (200 neurons, 10 examples)
    target = units[:40].mean(0)
    steps = np.arange(50, 501)
    losses = np.array(greedy_course(*products(units, target), num_steps=500).losses)
    assert exponent(steps, losses[steps - 1]) == pytest.approx(-2, abs=0.25)
    numbers, draws = np.array([5, 20, 80, 200]), np.random.default_rng(seed)
    by_chance = np.array([np.mean([loss(units[draws.integers(40, size=k)].sum(0), target, k, "mean") for _ in range(100)]) for k in numbers])
    assert exponent(numbers, by_chance) == pytest.approx(-1, abs=0.15)
    assert all(losses[k - 1] < chance for k, chance in zip(numbers, by_chance, strict=True))


def test_with_a_fitted_scale_no_step_is_worse_than_with_the_mean_of_the_same_units():
    units, target = problem(20, 15, seed=3)
    course = greedy_course(*products(units, target), num_steps=60, scale="fitted")
    for step, found in enumerate(course.losses, start=1):
        total = units[list(course.chosen[:step])].sum(0)
        assert found <= loss(total, target, step, "mean") + 1e-12


def test_counts_say_how_often_each_unit_was_chosen():
    assert Course((2, 0, 2), ()).counts(4).tolist() == [1, 0, 2, 0]
    assert Course((), ()).counts(2).tolist() == [0, 0]


def evaluated(units: Tensor, target: Tensor, subset: Subset) -> float:
    return 0.5 * float((subset.weights @ units[list(subset.units)] - target).square().sum())


@given(st.integers(1, 10), st.data(), st.integers(0, 10**6), st.sampled_from(SCALES), st.booleans())
def test_a_subset_has_as_many_units_as_asked_for_with_those_that_must_be_there(num_units: int, data: st.DataObject, seed: int, scale: Scale, repeats: bool):
    units, target = problem(num_units, 6, seed=seed)
    keep = data.draw(st.integers(1, num_units))
    must = torch.tensor([unit < data.draw(st.integers(0, keep)) for unit in range(num_units)])
    steps = data.draw(st.integers(keep, 8 * num_units))
    subset = greedy_subset(*products(units, target), num_units=keep, max_steps=steps, scale=scale, allow_repeats=repeats, must=must)
    assert len(subset.units) == keep == len(set(subset.units))
    assert list(subset.units) == sorted(subset.units)
    assert set(must.nonzero().flatten().tolist()) <= set(subset.units)
    assert subset.loss == pytest.approx(evaluated(units, target, subset), rel=1e-8, abs=1e-9)
    assert len(subset.course.chosen) == (steps if repeats else keep)
    if scale == "mean":
        assert float(subset.weights.sum()) == pytest.approx(1)
    if not repeats:
        assert_close(subset.weights, subset.weights[:1].expand(keep), claim="once each, so all alike", rtol=0, atol=0)


def test_a_subset_takes_the_best_of_the_steps_at_which_the_number_of_units_was_right():
    units, target = problem(12, 9, seed=1)
    subset = greedy_subset(*products(units, target), num_units=4, max_steps=100)
    seen = [len(set(subset.course.chosen[:step])) for step in range(1, 101)]
    assert seen[-1] == 4
    assert subset.loss == min(found for found, number in zip(subset.course.losses, seen, strict=True) if number == 4)


def test_more_steps_sharpen_the_weights_of_a_subset():
    units, target = problem(40, 60, inside=True)
    few, many = (greedy_subset(*products(units, target), num_units=10, max_steps=steps) for steps in (10, 400))
    assert many.loss < few.loss


def test_units_that_do_nothing_fill_a_subset_up_and_change_nothing_when_the_scale_is_fitted():
    units = torch.zeros(8, 3, dtype=torch.float64)
    units[[1, 4]] = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    subset = greedy_subset(*products(units, target), num_units=5, max_steps=40, scale="fitted")
    assert {1, 4} < set(subset.units)
    assert subset.loss < 1e-12


def test_a_subset_that_points_away_from_the_target_gets_no_weight():
    units = torch.tensor([[-1.0, 0.0], [1.0, 5.0]], dtype=torch.float64)
    subset = greedy_subset(
        *products(units, torch.tensor([2.0, 0.0], dtype=torch.float64)), num_units=1, max_steps=4, scale="fitted", must=torch.tensor([True, False])
    )
    assert subset.units == (0,)
    assert subset.weights.tolist() == [0.0]
    assert subset.loss == 2.0


@pytest.mark.parametrize("scale", SCALES)
def test_the_error_is_never_reported_as_negative(scale: Scale):
    units = torch.full((3, 7), 0.1, dtype=torch.float64)
    losses = greedy_course(*products(units, units[0]), num_steps=50, scale=scale).losses
    assert all(0 <= found < 1e-15 for found in losses)


def test_arguments_are_not_changed():
    units, target = problem(6, 4)
    gram, cross, square = products(units, target)
    before = gram.clone(), cross.clone()
    greedy_subset(gram, cross, square, num_units=3, max_steps=20)
    assert torch.equal(gram, before[0])
    assert torch.equal(cross, before[1])


def test_bad_numbers_are_refused_with_what_was_got():
    gram, cross, square = products(*problem(4, 3))
    with pytest.raises(InputError, match=r"num_steps=0 must be an integer of at least 1") as raised:
        greedy_course(gram, cross, square, num_steps=0)
    assert raised.value.code == "below-minimum"
    with pytest.raises(InputError, match=r"got 5 different units to choose out of 4, expected at most 4. Lower the number, or allow repeats") as raised:
        greedy_course(gram, cross, square, num_steps=5, allow_repeats=False)
    assert raised.value.code == "too-few-units"
    with pytest.raises(InputError, match=r"num_units=0 must be an integer of at least 1"):
        greedy_subset(gram, cross, square, num_units=0, max_steps=4)
    with pytest.raises(InputError, match=r"got 5 different units to choose out of 4"):
        greedy_subset(gram, cross, square, num_units=5, max_steps=9)
    with pytest.raises(InputError, match=r"max_steps=2 must be an integer of at least 3"):
        greedy_subset(gram, cross, square, num_units=3, max_steps=2)
    with pytest.raises(InputError, match=r"must marks 3 units but num_units=2, expected at most 2") as raised:
        greedy_subset(gram, cross, square, num_units=2, max_steps=9, must=torch.tensor([True, True, False, True]))
    assert raised.value.code == "too-many-protected"
    with pytest.raises(InputError, match=r"scale='sum' is not known. Choose one of: mean, fitted"):
        greedy_course(gram, cross, square, num_steps=1, scale="sum")  # type: ignore[arg-type]


def test_examples_that_are_there_a_thousand_times_choose_the_same_units():
    units, target = problem(5, 10, seed=2)
    wide = math.sqrt(1000.0)
    once = greedy_course(*products(units, target), num_steps=20)
    repeated = greedy_course(*products(units.repeat(1, 1000) / wide, target.repeat(1000) / wide), num_steps=20)
    assert repeated.chosen == once.chosen
