"""The claims on masked neurons, cost and lost workers at small size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import train_cost
import train_faults
import train_masked_neurons as claims
from partwise.linalg.masked_neurons import infinite_width_kernel
from partwise.train import IST, LocalSGD
from tiny import tiny_mlp


def mean_ball(**changes: float) -> float:
    setting = claims.Setting(**{"num_neurons": 200, "num_draws": 1} | changes)  # type: ignore[arg-type]
    return float(np.mean([claims.ball(setting, seed=seed, num_rounds=120) for seed in (0, 1)]))


@pytest.mark.parametrize("num_subnets", [1, 4])
def test_the_error_shrinks_at_least_by_the_predicted_factor(num_subnets: int) -> None:
    setting = claims.Setting(keep=0.5, num_subnets=num_subnets, num_local_steps=2, hardest=True, num_draws=6, num_neurons=500)
    smallest = float(np.linalg.eigvalsh(infinite_width_kernel(claims.problem(setting, seed=0)[0]))[0])
    factor, straight = claims.contraction(claims.errors(setting, seed=0, num_rounds=30))
    assert factor <= setting.predicted(smallest) < 1
    assert straight > 0.98


def test_the_ball_shrinks_with_subnets_and_grows_with_local_steps() -> None:
    usual = mean_ball(num_subnets=4, num_local_steps=2)
    assert mean_ball(num_subnets=16, num_local_steps=2) < usual < mean_ball(num_subnets=4, num_local_steps=8)


def test_nothing_is_left_of_the_ball_when_every_neuron_is_kept() -> None:
    assert mean_ball(keep=1.0, num_local_steps=2) < 1e-15 < mean_ball(keep=0.9, num_local_steps=2)


def test_disjoint_subnets_leave_an_error_that_shrinks_with_the_width() -> None:
    narrow, wide = (mean_ball(categorical=True, num_local_steps=4, num_neurons=size) for size in (100, 400))
    assert wide < narrow / 4
    assert mean_ball(categorical=True, num_local_steps=4, num_subnets=1) < 1e-15


def test_a_contraction_is_the_factor_of_a_geometric_course() -> None:
    factor, straight = claims.contraction(0.8 ** np.arange(30.0))
    assert factor == pytest.approx(0.8)
    assert straight == pytest.approx(1)


def small_problem() -> Any:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 6, generator=generator)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=10, shuffle=True)
    method = IST(num_parts=train_faults.NUM_PARTS, num_local_steps=10)
    return train_faults.Problem("small", method, tiny_mlp(6, 32, 32, 3), loader, list(loader), 12)


def test_training_ends_and_reports_coverage_when_one_result_of_every_round_is_lost_for_good() -> None:
    problem = small_problem()
    trainer = problem.train(seed=0, engine=train_faults.Lossy(seed=0))
    assert [report.num_arrived for report in trainer.history] == [3] * 12
    assert {report.coverage for report in trainer.history} == {0.75}
    assert {sum(part.was_lost for part in report.parts) for report in trainer.history} == {1}
    start, end, undisturbed = (problem.loss_of(run) for run in (problem.train(seed=0, num_rounds=1), trainer, problem.train(seed=0)))
    assert undisturbed < end < start


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_killed_in_every_round_changes_no_bit() -> None:
    pytest.importorskip("ray", reason="kills workers of the Ray engine")
    problem = small_problem()
    trainer, num_lost = train_faults.killed_run(problem, seed=0, num_rounds=3)
    assert num_lost == 3
    assert train_faults.same_bits(trainer, problem.train(seed=0, num_rounds=3))
    assert {report.coverage for report in trainer.history} == {1.0}


def test_the_formula_of_cost_counts_what_all_parts_hold() -> None:
    network = train_cost.perceptron(64)
    whole = sum(parameter.numel() for parameter in network.parameters())
    assert [train_cost.held_by_all(LocalSGD(num_parts=size), network) for size in (1, 2, 4)] == [whole, 2 * whole, 4 * whole]
    dealt = [train_cost.held_by_all(IST(num_parts=size), network) for size in (1, 2, 4)]
    biases = 64 + 64 + 10
    assert dealt == [784 * 64 + 64 * 64 / size + 64 * 10 + biases + 10 * (size - 1) for size in (1, 2, 4)]


def test_the_rounds_that_are_timed_are_all_but_the_first() -> None:
    assert len(train_cost.rounds_of(LocalSGD(num_parts=2, num_local_steps=1), train_cost.perceptron(16), train_cost.samples(), num_rounds=3)) == 2
