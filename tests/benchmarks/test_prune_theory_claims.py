"""The claims of theory about greedy selection and i-SpaSP at small size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import prune_greedy_decay as decay
import prune_pretraining_threshold as threshold
import prune_sparse_recovery_decay as recovery


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_errors_fall_with_the_square_and_errors_of_chance_with_the_number(seed: int):
    given = decay.problem(8, seed=seed)
    steps = np.arange(50, 501)
    ours = decay.exponent(steps, decay.greedy_losses(given, num_steps=500)[steps - 1])
    chance = decay.exponent(decay.DRAWN, decay.drawn_losses(given, seed=seed))
    assert ours == pytest.approx(-2, abs=0.3)
    assert chance == pytest.approx(-1, abs=0.15)


def test_a_line_through_logarithms_finds_the_power():
    numbers = np.array([1, 2, 4, 8])
    assert decay.exponent(numbers, 3.0 * numbers**-1.5) == pytest.approx(-1.5)
    slope, straight = recovery.exponent((1, 2, 4, 8), 3.0 * numbers**-1.5)
    assert (slope, straight) == (pytest.approx(-1.5), pytest.approx(1))


def test_the_target_of_a_problem_is_the_mean_of_its_first_units():
    given = decay.problem(6, seed=3, num_units=20, num_targets=4)
    assert torch.allclose(given.target, given.units[:4].mean(0))
    gram, cross, square = given.products
    assert gram[2, 5] == pytest.approx(float(given.units[2] @ given.units[5]))
    assert float(cross[:4].mean()) == pytest.approx(square)


@pytest.mark.parametrize("importance", recovery.Importance.__args__)
def test_what_is_left_falls_faster_where_sizes_do(importance: recovery.Importance):
    slopes = []
    for power in (1.0, 2.0):
        given = recovery.layer(power, seed=0, num_units=128, num_inputs=100, num_outputs=64)
        left = recovery.course(given, importance, kept=(4, 8, 16))
        assert list(left) == sorted(left, reverse=True)
        slopes.append(recovery.exponent((4, 8, 16), left)[0])
    assert slopes[1] < slopes[0] - 0.5
    assert slopes == pytest.approx([-0.5, -1.5], abs=0.35)


def test_a_layer_with_all_units_leaves_nothing():
    given = recovery.layer(1.0, seed=1, num_units=40, num_inputs=30)
    assert given.left(given.recover(40).units) < 1e-14
    assert given.left([]) == pytest.approx(1)


def digits(num_examples: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around three centres."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(num_examples) % 3
    centres = 2 * torch.eye(3, 6)
    inputs = centres[classes] + 0.5 * torch.randn(num_examples, 6, generator=generator)
    return inputs / 6**0.5, torch.nn.functional.one_hot(classes, 3).float()


def test_training_lowers_both_losses_and_the_chosen_network_gets_good_on_the_way():
    curve = threshold.pruned_loss_curve(*digits(90), seed=0, num_neurons=64, num_units=40, num_steps=200, batch_size=30)
    assert curve.steps[0] == 0
    assert curve.steps[-1] == 200
    assert curve.dense[-1] < 0.5 * curve.dense[0]
    assert curve.chosen[-1] < curve.chosen[0]
    assert 0 < threshold.first_good_step(curve) < 200
    loose, strict = (threshold.first_good_step(curve, tolerance=tolerance) for tolerance in (0.5, 0.05))
    assert loose <= strict


def test_the_first_good_step_is_the_one_after_which_no_other_is_bad():
    curve = threshold.Curve((0, 1, 2, 4, 8), (0.0,) * 5, (1.0, 0.05, 0.5, 0.08, 0.0))
    assert threshold.first_good_step(curve) == 4
    assert threshold.first_good_step(curve, tolerance=0.6) == 1
    assert threshold.first_good_step(threshold.Curve((0, 3), (0.0, 0.0), (1.0, 1.0))) == 0


def test_a_step_is_that_of_autograd():
    inputs, targets = digits(12)
    given = threshold.net(5, 6, 3, seed=1)
    weights, biases, reads = (tensor.clone().requires_grad_() for tensor in (given.weights, given.biases, given.reads))
    loss = 0.5 * (threshold.Net(weights, biases, reads).outputs(inputs) - targets).square().sum() / 12
    gradients = torch.autograd.grad(loss, [weights, biases, reads])
    moved = threshold.step(given, inputs, targets, lr=0.1)
    for old, new, gradient in zip((weights, biases, reads), (moved.weights, moved.biases, moved.reads), gradients, strict=True):
        assert torch.allclose(new, old - 0.1 * 5 * gradient, atol=1e-6), "times the number of neurons"


def test_the_chosen_loss_is_that_of_the_mean_of_the_neurons_chosen():
    inputs, targets = digits(15)
    given = threshold.net(7, 6, 3, seed=2)
    best = min(
        0.5 * float((given.hidden(inputs)[:, [unit]] * given.reads[unit] - targets).square().sum()) / 15 for unit in range(7)
    )
    assert threshold.chosen_loss(given, inputs, targets, num_units=1) == pytest.approx(best, rel=1e-5)


def test_looks_begin_before_the_first_step_and_end_with_the_last():
    assert threshold.looks(500)[0] == 0
    assert threshold.looks(500)[-1] == 500
    assert threshold.looks(500) == sorted(set(threshold.looks(500)))


def test_a_level_course_is_explained_by_nothing():
    assert threshold.line((1, 2, 3), (5, 5, 5)) == (0.0, 0.0)
    slope, share = threshold.line((1, 2, 3), (2, 4, 6))
    assert (slope, share) == (pytest.approx(2), pytest.approx(1))


def test_images_are_drawn_by_the_seed():
    try:
        inputs, targets = threshold.some(20, seed=0)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert inputs.shape == (20, 784)
    assert targets.shape == (20, 10)
    assert float(inputs.norm(dim=1).mean()) == pytest.approx(1, abs=0.2)
    assert torch.equal(threshold.some(20, seed=0)[0], inputs)
    assert not torch.equal(threshold.some(20, seed=1)[0], inputs)
