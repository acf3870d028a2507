"""The claims on masked neurons at small size."""

from __future__ import annotations

import numpy as np
import pytest

import train_masked_neurons as claims
from partwise.linalg.masked_neurons import infinite_width_kernel


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
