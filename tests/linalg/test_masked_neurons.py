from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partwise.checks import InputError
from partwise.linalg.masked_neurons import (
    ShallowNet,
    bernoulli_masks,
    bernoulli_sampling_cost,
    categorical_masks,
    error_ball,
    finite_width_kernel,
    held_probability,
    infinite_width_kernel,
    masked_round,
    predicted_contraction,
    random_shallow_net,
    subset_sampling_cost,
)
from partwise.linalg.partition import deal
from tolerances import assert_close


def problem(*, num_samples: int = 6, num_features: int = 5, num_neurons: int = 8, seed: int = 0) -> tuple[ShallowNet, Any, Any]:
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(num_samples, num_features))
    inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
    net = random_shallow_net(num_neurons, num_features, scale=1.0, generator=generator)
    return net, inputs, generator.uniform(-1, 1, num_samples)


def cost_of(contributions: Any, targets: Any, kept: Any) -> float:
    return float(np.sum((targets - contributions[:, kept].sum(axis=1)) ** 2))


@given(st.integers(1, 7), st.floats(0.05, 1), st.integers(0, 100))
def test_the_cost_of_independent_masks_is_the_mean_over_all_masks(num_neurons: int, keep: float, seed: int) -> None:
    net, inputs, targets = problem(num_neurons=num_neurons, seed=seed)
    contributions, mean = net.contributions(inputs), 0.0
    for mask in itertools.product([False, True], repeat=num_neurons):
        num_kept = sum(mask)
        mean += keep**num_kept * (1 - keep) ** (num_neurons - num_kept) * cost_of(contributions, targets, np.array(mask))
    assert bernoulli_sampling_cost(contributions, targets, keep=keep) == pytest.approx(mean)


@given(st.integers(1, 8), st.data(), st.integers(0, 100))
def test_the_cost_of_masks_of_one_size_is_the_mean_over_all_of_them(num_neurons: int, data: st.DataObject, seed: int) -> None:
    num_kept = data.draw(st.integers(1, num_neurons))
    net, inputs, targets = problem(num_neurons=num_neurons, seed=seed)
    contributions = net.contributions(inputs)
    costs = [cost_of(contributions, targets, list(kept)) for kept in itertools.combinations(range(num_neurons), num_kept)]
    assert subset_sampling_cost(contributions, targets, num_kept=num_kept) == pytest.approx(np.mean(costs), rel=1e-9, abs=1e-12)


def test_the_pieces_that_ist_deals_cost_what_the_formula_says() -> None:
    net, inputs, targets = problem(num_neurons=40)
    contributions, generator, num_draws = net.contributions(inputs), np.random.default_rng(1), 2000
    costs = [np.mean([cost_of(contributions, targets, piece) for piece in deal(40, 4, generator)]) for _ in range(num_draws)]
    assert subset_sampling_cost(contributions, targets, num_kept=10) == pytest.approx(np.mean(costs), abs=5 * np.std(costs) / math.sqrt(num_draws))


def round_slowly(net: ShallowNet, inputs: Any, targets: Any, masks: Any, *, num_local_steps: int, lr: float) -> Any:
    """The round, one neuron at a time."""
    num_neurons = len(net.signs)
    moved = np.zeros_like(net.weights)
    for mask in masks:
        weights = net.weights.copy()
        for _ in range(num_local_steps):
            outputs = [sum(net.signs[r] * max(weights[r] @ x, 0) for r in range(num_neurons) if mask[r]) / math.sqrt(num_neurons) for x in inputs]
            for r in (r for r in range(num_neurons) if mask[r]):
                slopes = [
                    (output - y) * net.signs[r] / math.sqrt(num_neurons) * x * (weights[r] @ x > 0)
                    for output, y, x in zip(outputs, targets, inputs, strict=True)
                ]
                weights[r] = weights[r] - lr * sum(slopes)
        moved += weights - net.weights
    holders = [sum(mask[r] for mask in masks) for r in range(num_neurons)]
    return np.array([net.weights[r] + (moved[r] / holders[r] if holders[r] else 0) for r in range(num_neurons)])


def test_a_round_is_what_the_theory_writes_down() -> None:
    net, inputs, targets = problem()
    masks = bernoulli_masks(8, num_subnets=3, keep=0.4, generator=np.random.default_rng(7))
    assert set(masks.sum(axis=0).tolist()) >= {0, 1, 2}  # nobody, one and several hold a neuron
    after = masked_round(net, inputs, targets, masks, num_local_steps=3, lr=0.3)
    slow = round_slowly(net, inputs, targets, masks, num_local_steps=3, lr=0.3)
    assert_close(after.weights, slow, claim="the same round")
    assert np.array_equal(after.weights[masks.sum(axis=0) == 0], net.weights[masks.sum(axis=0) == 0])


def test_subnets_that_all_hold_everything_train_the_net_as_usual() -> None:
    net, inputs, targets = problem()
    masks = np.ones((3, 8), dtype=bool)
    together, usual = masked_round(net, inputs, targets, masks, num_local_steps=4, lr=0.2), net
    for _ in range(4):
        reached = inputs @ usual.weights.T
        errors = usual.outputs(inputs) - targets
        gradient = usual.signs[:, None] / math.sqrt(8) * (((reached > 0) * errors[:, None]).T @ inputs)
        usual = ShallowNet(usual.weights - 0.2 * gradient, usual.signs)
    assert_close(together.weights, usual.weights, claim="gradient descent")


def test_the_closed_form_of_the_kernel_is_the_limit_of_wide_nets() -> None:
    _, inputs, _ = problem()
    num_neurons = 400_000
    wide = random_shallow_net(num_neurons, 5, scale=1.0, generator=np.random.default_rng(0))
    limit = infinite_width_kernel(inputs)
    assert np.abs(finite_width_kernel(wide.weights, inputs) - limit).max() < 5 * 0.5 / math.sqrt(num_neurons)
    assert np.linalg.eigvalsh(limit)[0] > 0
    assert_close(np.diag(limit).copy(), np.full(6, 0.5), claim="an input is on half of the time")


def test_the_least_eigenvalue_vanishes_for_parallel_inputs_only() -> None:
    _, inputs, _ = problem()
    assert np.linalg.eigvalsh(infinite_width_kernel(np.vstack([inputs, inputs[:1]])))[0] == pytest.approx(0, abs=1e-12)
    assert np.linalg.eigvalsh(infinite_width_kernel(np.vstack([inputs, -inputs[:1]])))[0] > 1e-3  # it is on where the other is off


def test_each_neuron_is_in_exactly_one_categorical_subnet_and_in_a_share_of_the_others() -> None:
    masks = categorical_masks(9000, num_subnets=3, generator=np.random.default_rng(0))
    assert masks.shape == (3, 9000)
    assert (masks.sum(axis=0) == 1).all()
    assert np.abs(masks.mean(axis=1) - 1 / 3).max() < 5 * math.sqrt(2 / 9 / 9000)
    drawn = bernoulli_masks(9000, num_subnets=3, keep=0.2, generator=np.random.default_rng(0))
    assert np.abs(drawn.mean(axis=1) - 0.2).max() < 5 * math.sqrt(0.16 / 9000)
    assert float(drawn.any(axis=0).mean()) == pytest.approx(held_probability(0.2, num_subnets=3), abs=0.03)


def test_the_ball_shrinks_with_subnets_grows_with_local_steps_and_vanishes_at_keep_1() -> None:
    def ball(keep: float = 0.5, num_subnets: int = 4, num_local_steps: int = 2) -> float:
        return error_ball(keep, num_subnets=num_subnets, num_local_steps=num_local_steps, num_samples=10, num_rounds=100)

    assert ball(num_subnets=2) > ball(num_subnets=4) > ball(num_subnets=64)
    assert ball(num_local_steps=1) < ball(num_local_steps=2) < ball(num_local_steps=8)
    assert ball(keep=0.9) > ball(keep=0.99) > ball(keep=1.0) == 0
    assert ball(num_local_steps=1, num_subnets=10**6) == pytest.approx(0.25 / 1000, rel=0.01)


def test_the_predicted_factor_counts_held_neurons_and_local_steps() -> None:
    assert predicted_contraction(0.4, lr=0.1, keep=1.0) == pytest.approx(0.99)
    assert predicted_contraction(0.4, lr=0.1, keep=0.5, num_subnets=2, num_local_steps=8) == pytest.approx(1 - 0.1 * 0.75 * 8 * 0.1)
    assert predicted_contraction(0.4, lr=0.1, keep=0.5, num_subnets=100) == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        (lambda: held_probability(0.0, num_subnets=2), "keep-range", r"keep=0\.0, expected a fraction above 0 and at most 1"),
        (lambda: held_probability(math.nan, num_subnets=2), "keep-range", r"keep=nan"),
        (lambda: held_probability(0.5, num_subnets=0), "below-minimum", r"num_subnets=0"),
        (lambda: infinite_width_kernel(np.array([[1.0, 0.0], [1.0, 1.0]])), "inputs-not-unit", r"length 1\.41421 in row 1, expected length 1"),
        (lambda: subset_sampling_cost(np.ones((2, 3)), np.ones(2), num_kept=4), "too-many-kept", r"num_kept=4 of 3 neurons"),
        (
            lambda: bernoulli_sampling_cost(np.ones((2, 3)), np.ones(3), keep=0.5),
            "targets-shape",
            r"shape \(3,\) for contributions of shape \(2, 3\)",
        ),
        (lambda: error_ball(0.5, num_subnets=1, num_local_steps=0, num_samples=1, num_rounds=1), "below-minimum", r"num_local_steps=0"),
    ],
)
def test_what_the_theory_does_not_cover_is_refused(call: Any, code: str, text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        call()
    assert caught.value.code == code
