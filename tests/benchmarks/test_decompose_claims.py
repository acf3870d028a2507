"""The claims on eigenvectors at small size: what does not depend on the clock is held here on every run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import decompose_cost_exponents
import decompose_eigengame
import decompose_peers
from partwise.decompose._eigen_rounds import random_eigenpairs


@pytest.mark.parametrize("spectrum", [1.1 ** -np.arange(200.0), np.arange(1.0, 201.0) ** -0.5], ids=["exponential", "power law"])
@pytest.mark.parametrize("k", [3, 10])
def test_lanczos_and_its_peers_reach_the_residual_that_the_clock_stops_at(spectrum: Any, k: int) -> None:
    X = decompose_peers.synthetic(spectrum, num_samples=1000)
    covariance = np.cov(X.T)
    largest = np.linalg.eigvalsh(covariance)[-1]
    for solve in (decompose_peers.ours, decompose_peers.arpack, decompose_peers.locally_optimal):
        assert decompose_peers.residual(covariance, solve(X, k), largest) <= decompose_peers.TARGET
    assert decompose_peers.residual(covariance, np.eye(200)[:k], largest) > 0.01


def test_real_data_are_left_out_with_a_reason_where_there_are_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.setenv("PARTWISE_DATA", str(tmp_path))
    assert set(decompose_peers.data_sets()) == {"exponential", "power-law"}
    assert "Set PARTWISE_DATA to the folder that has them" in capsys.readouterr().out


def test_deflation_and_the_games_need_about_as_many_rounds_and_floats_on_the_spectra_of_the_paper() -> None:
    for spectrum in decompose_eigengame.SPECTRA.values():
        covariance, basis = decompose_eigengame.exact_covariance(spectrum(10), size=60, seed=0)
        runs = [
            decompose_eigengame.race(estimator, covariance, basis, seed=0, level=1e-3)
            for estimator in decompose_eigengame.players(10, num_rounds=300)
        ]
        assert max(rounds for rounds, _, _ in runs) <= 1.3 * min(rounds for rounds, _, _ in runs) < 300
        assert max(floats for _, floats, _ in runs) <= 1.3 * min(floats for _, floats, _ in runs)
        assert max(error for _, _, error in runs) < 2e-3


def test_angles_are_right_where_cosines_have_lost_their_digits() -> None:
    state, basis = random_eigenpairs(2, 3, seed=0), np.eye(3)
    vectors = np.array([[1.0, 1e-11, 0.0], [0.0, 0.0, -1.0]])
    found = decompose_eigengame.angles(type(state)(vectors, state.values, state.residuals, (1, 1), (True, True)), basis)
    np.testing.assert_allclose(found, [1e-11, np.pi / 2])


def test_an_exponent_is_the_slope_of_the_logarithms() -> None:
    assert decompose_cost_exponents.exponent((2, 4, 8), [3 * size**1.5 for size in (2, 4, 8)]) == pytest.approx(1.5)
    assert decompose_cost_exponents.exponent((64, 128), [decompose_cost_exponents.work_formed(8, d) for d in (64, 128)]) == pytest.approx(2, abs=0.2)


def test_the_rounds_that_are_timed_are_full_ones() -> None:
    method, state = decompose_cost_exponents.everyone_working(decompose_cost_exponents.formed(32), 4)
    assert [part.index for part in method.split(state)] == [0, 1, 2, 3]
    after = method.merge(state, method.work_all(method.split(state)))
    assert method.floats_sent(state, after) == 32 * (4 + 6)
