from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partwise.checks import InputError
from partwise.linalg.compute_schedule import compute_schedule

slopes = st.floats(min_value=-3, max_value=3, allow_nan=False)


@st.composite
def dealings(draw: st.DrawFn) -> tuple[int, int, int]:
    num_components, min_steps = draw(st.integers(2, 30)), draw(st.integers(1, 5))
    return num_components, num_components * min_steps + draw(st.integers(0, 300)), min_steps


@pytest.mark.parametrize(("alpha", "first", "last"), [(-1.0, 2, 48), (0.0, 25, 25), (1.0, 48, 2)])
def test_the_first_and_last_budgets_of_the_papers_figure_come_out(alpha: float, first: int, last: int) -> None:
    steps = compute_schedule(20, 500, min_steps=2, alpha=alpha)
    assert (steps[0], steps[-1], sum(steps)) == (first, last, 500)


@given(dealings(), slopes)
def test_steps_sum_to_the_total_and_nobody_gets_less_than_the_minimum(dealing: tuple[int, int, int], alpha: float) -> None:
    num_components, num_steps, min_steps = dealing
    steps = compute_schedule(num_components, num_steps, min_steps=min_steps, alpha=alpha)
    assert len(steps) == num_components
    assert sum(steps) == num_steps
    assert min(steps) >= min_steps


@given(dealings())
def test_a_slope_of_zero_deals_equally_to_within_one_step(dealing: tuple[int, int, int]) -> None:
    num_components, num_steps, min_steps = dealing
    steps = compute_schedule(num_components, num_steps, min_steps=min_steps, alpha=0.0)
    assert max(steps) - min(steps) <= 1


@given(dealings(), slopes)
def test_each_number_is_within_one_step_of_its_formula(dealing: tuple[int, int, int], alpha: float) -> None:
    num_components, num_steps, min_steps = dealing
    weights = [max(1 + alpha * (1 - 2 * k / (num_components - 1)), 1e-9) for k in range(num_components)]
    formula = [min_steps + (num_steps - num_components * min_steps) * weight / sum(weights) for weight in weights]
    steps = compute_schedule(num_components, num_steps, min_steps=min_steps, alpha=alpha)
    assert all(abs(step - exact) < 1 + 1e-6 for step, exact in zip(steps, formula, strict=True))


@given(dealings(), st.floats(min_value=0, max_value=3, allow_nan=False))
def test_a_positive_slope_never_rises_from_first_to_last_by_more_than_rounding(dealing: tuple[int, int, int], alpha: float) -> None:
    num_components, num_steps, min_steps = dealing
    steps = compute_schedule(num_components, num_steps, min_steps=min_steps, alpha=alpha)
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(steps))


def test_one_component_gets_everything() -> None:
    assert compute_schedule(1, 7) == (7,)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_components": 3, "num_steps": 5, "min_steps": 2}, r"num_steps=5 for 3 components of at least 2 steps, expected at least 6"),
        ({"num_components": 1, "num_steps": 5, "alpha": 1.0}, r"alpha=1\.0 for one component, expected at least two .* Pass alpha=0"),
        ({"num_components": 3, "num_steps": 9, "alpha": float("nan")}, r"alpha=nan, expected a finite number"),
        ({"num_components": 3, "num_steps": 9, "alpha": float("inf")}, r"alpha=inf, expected a finite number"),
        ({"num_components": 0, "num_steps": 9}, r"num_components=0 must be an integer of at least 1"),
        ({"num_components": 3, "num_steps": 9.5}, r"num_steps=9\.5 must be an integer of at least 1"),
        ({"num_components": 3, "num_steps": 9, "min_steps": 0}, r"min_steps=0 must be an integer of at least 1"),
    ],
)
def test_a_dealing_that_cannot_be_made_is_refused(arguments: dict[str, float], text: str) -> None:
    with pytest.raises(InputError, match=text):
        compute_schedule(**arguments)  # type: ignore[arg-type]


def test_dealing_steps_loads_no_torch() -> None:
    code = "import sys, partwise.linalg.compute_schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
