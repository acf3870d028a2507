from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrices import matrix_with
from partwise.checks import InputError
from partwise.linalg.bounds import cascade_bound, error_envelope, predicted_rates, theorem_rates, warm_up_rounds
from partwise.linalg.deflation import deflate


def test_a_component_is_predicted_to_be_as_slow_as_itself_or_the_one_in_front() -> None:
    spectrum = [4.0, 3.6, 1.8, 1.08, 0.9]  # ratios 0.9, 0.5, 0.6, ...
    assert predicted_rates(spectrum, num_components=3) == pytest.approx((0.81, 0.81, 0.36))
    assert predicted_rates(spectrum, num_components=3, num_local_steps=3) == pytest.approx((0.81**3, 0.81**3, 0.36**3))


def test_after_the_last_singular_value_comes_zero() -> None:
    assert predicted_rates([4.0], num_components=1) == (0.0,)
    assert cascade_bound([4.0], [0.5]) == 0.5


def test_rates_of_the_theorem_follow_its_recursion() -> None:
    assert theorem_rates([0.5, 0.25, 0.9]) == pytest.approx((0.5, 0.5 + 0.5 * 0.5, 0.9))
    creeping = theorem_rates([0.1] * 200)
    assert all(earlier < later < 1 for earlier, later in itertools.pairwise(creeping))
    assert creeping[-1] > 0.99  # towards 1 with k: the theorem is slower than what happens


def test_warm_up_by_hand_for_two_components() -> None:
    rate, eigenvalues = 0.5, [3.0, 2.0, 1.0]
    log_rate = math.log(2)
    settle = max(_lower_lambert(rate * log_rate) / log_rate, (rate + 1) / (1 - rate))
    second = settle + _lower_lambert((2 - 1) / (12 * 3) * log_rate**2) / log_rate + 1
    assert warm_up_rounds(eigenvalues, [0.5, 0.75]) == pytest.approx((1.0, second))


def _lower_lambert(value: float) -> float:
    """The larger solution of w e^-w = value by bisection; 1 where there is none."""
    if value >= math.exp(-1):
        return 1.0
    low, high = 1.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.exp(-middle) > value else (low, middle)
    return low


def test_a_smaller_gap_lengthens_the_warm_up() -> None:
    wide, narrow = (warm_up_rounds([3.0, 2.0, after], [0.5, 0.75])[1] for after in (1.0, 1.99))
    assert narrow > wide


def test_the_envelope_starts_at_six_times_two_at_the_warm_up_and_then_decays() -> None:
    assert error_envelope(10, warm_up=10, rate=0.5) == 6 * 2 * 0.5
    assert error_envelope(9, warm_up=10, rate=0.5) == 6
    assert error_envelope(60, warm_up=10, rate=0.5) < 1e-12


@given(st.lists(st.floats(0.0, 0.02), min_size=1, max_size=4), st.integers(0, 5))
def test_the_cascade_bound_holds_for_steps_with_errors_of_any_size_in_its_regime(sizes: list[float], seed: int) -> None:
    spectrum = [8.0, 4.0, 2.0, 1.0, 0.5]
    target = matrix_with(spectrum, rows=7, columns=6, seed=seed)
    rng = np.random.default_rng(seed)
    rest = target
    for size in sizes:
        left, values, right = np.linalg.svd(rest)
        part = values[0] * np.outer(left[:, 0], right[0])
        error = np.outer(*(draw / np.linalg.norm(draw) for draw in (rng.standard_normal(7), rng.standard_normal(6))))
        rest = rest - part - size * error  # Psi_k is of rank one and of the size asked for
    residual = float(np.linalg.norm(rest))
    assert residual <= cascade_bound(spectrum, sizes) + 1e-12


def test_the_cascade_bound_by_hand_for_two_components() -> None:
    growth = 2 + 6 * 4 / (4 - 2)  # of the first error on its way through the second step
    assert cascade_bound([4.0, 2.0, 1.0], [0.1, 0.2]) == pytest.approx(1 + 0.1 + growth * 0.2)


def test_the_cascade_bound_of_exact_steps_is_the_residual() -> None:
    spectrum = [8.0, 4.0, 2.0, 1.0]
    target = matrix_with(spectrum, rows=6, columns=5)
    left, values, right = np.linalg.svd(target, full_matrices=False)
    rest = deflate(target, left.T[:2], values[:2, None] * right[:2])
    assert cascade_bound(spectrum, [0.0, 0.0]) == pytest.approx(float(np.linalg.norm(rest)))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: predicted_rates([2.0, 1.0, 0.0], num_components=3), r"num_components=3 is more than the 2 singular values above 0"),
        (lambda: theorem_rates([0.5, 1.0]), r"contractions=\(0\.5, 1\.0\), expected one or more factors, each between 0 and 1"),
        (lambda: theorem_rates([]), r"contractions=\(\), expected one or more factors"),
        (lambda: warm_up_rounds([2.0, 1.0], [0.5, 0.75]), r"got 2 eigenvalues for 2 rates, expected one more"),
        (lambda: warm_up_rounds([2.0, 1.0, 1.0], [0.5, 0.75]), r"gap term of 0\.0, expected more than 0.* needs distinct eigenvalues"),
        (lambda: error_envelope(3, warm_up=10, rate=0.5), r"round_number=3 for warm_up=10, expected at least 9\. The bound starts there"),
        (lambda: cascade_bound([2.0, 2.0, 1.0], [0.1]), r"gap of 0\.0 between singular values 1 and 2, expected more than 0"),
    ],
)
def test_what_a_theorem_does_not_cover_is_refused(call: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        call()  # type: ignore[operator]
