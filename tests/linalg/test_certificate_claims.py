"""The claims of ``benchmarks/decompose_certificates.py`` at small size."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="one of the claims is about its solvers")

import decompose_certificates as claims


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_every_interval_has_an_eigenvalue_of_its_own(dtype: type) -> None:
    assert claims.broken_intervals(100, dtype=dtype, num_problems=100) == 0


def test_the_default_solver_of_scikit_learn_is_found_out_and_the_exact_one_is_not() -> None:
    error, alarm = claims.flat_error_and_alarm(100, "auto")
    assert error > 0.01
    assert alarm == 1
    assert claims.flat_error_and_alarm(100, "covariance_eigh")[1] == 0


@pytest.mark.parametrize("kind", ["triple", "isolated"])
def test_planted_misses_are_found(kind: str) -> None:
    assert claims.planted_misses_found(100, kind=kind, num_rotations=3) == 1


def test_correct_results_raise_no_alarm() -> None:
    assert claims.false_alarms(100, num_rotations=1) == 0


def test_intervals_are_wider_than_the_error_and_not_by_much() -> None:
    width, error = claims.widths(100)
    assert error <= width < 1e-5
