"""The claims of ``benchmarks/decompose_deflation_theory.py`` at small size."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the claims are about estimators of scikit-learn")

import decompose_deflation_theory as theory

POWER_LAW = np.arange(1.0, 61.0) ** -0.5
EXPONENTIAL = 1.2 ** -np.arange(60.0)


@pytest.mark.parametrize("num_local_steps", [1, 5])
def test_from_the_warm_up_on_no_error_of_parallel_deflation_crosses_the_envelope(num_local_steps: int) -> None:
    measured = theory.envelope_use(1, num_local_steps=num_local_steps, num_components=3, num_rounds=200)
    assert measured is not None  # with this seed the solver contracts at every call, as the theorem assumes
    use, seen, promised = measured
    assert 0 < use <= 1
    assert seen <= promised


def test_errors_of_parallel_deflation_shrink_at_the_predicted_rate() -> None:
    assert theory.rate_deviation(0, num_local_steps=1, num_components=4) <= 0.01


@pytest.mark.parametrize("num_steps", [30, 120])
@pytest.mark.parametrize("spectrum", [EXPONENTIAL, POWER_LAW], ids=["exponential", "power law"])
def test_one_after_the_other_no_error_crosses_its_bound(spectrum: np.ndarray, num_steps: int) -> None:
    largest, last = theory.bound_use(2, spectrum, num_steps, num_components=4)
    assert 0 < last <= largest <= 1


def test_planned_steps_reach_the_target() -> None:
    assert theory.planned_error(0, 1e-2, 1.4 ** -np.arange(30.0), 3)[0] <= 1


def test_what_stays_in_sequence_heals_in_parallel() -> None:
    healed, frozen = theory.healed_and_frozen(0, num_steps=20, spectrum=EXPONENTIAL)
    assert healed < 1e-9
    assert frozen > 1e-3


def test_damage_heals() -> None:
    before, after = theory.healing_after_damage(0, num_rounds=350)
    assert before > 0.05
    assert after < 1e-9


@pytest.mark.parametrize("max_staleness", [None, 1])
def test_without_a_barrier_every_component_converges(max_staleness: int | None) -> None:
    updates, final = theory.updates_to(1e-3, 0, max_staleness=max_staleness, spectrum=EXPONENTIAL, num_updates=60)
    assert updates < 60
    assert final < 1e-6
