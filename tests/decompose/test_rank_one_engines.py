"""Rank-one regression on Ray workers: the same bits as in one process. One Ray session for the whole file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone

from matrices import gaussian, matrix_with
from partwise.decompose import ParallelRankOneRegression, SequentialRankOneRegression
from partwise.decompose._rank_one_estimator import ErrorLog
from partwise.decompose.rank_one_rounds import ParallelRankOne, random_pairs
from partwise.engine.ray_actors import RayActors
from partwise.linalg.rank_one import exact_parts, reduce_regression
from partwise.rounds import run_async

pytest.importorskip("ray", reason="tests the Ray engine")
pytestmark = [pytest.mark.ray, pytest.mark.slow]
LEARNED = ["coef_", "components_", "y_loadings_", "errors_per_round_", "eigenvalue_intervals_", "residuals_"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster that the engines of the tests find, so that none of them starts its own."""
    with RayActors(2):
        yield


def data(dtype: Any = np.float64) -> tuple[Any, Any]:
    """Rows are samples: X (samples, 30), y (samples, 21)."""
    inputs = gaussian(80, 30)
    targets = inputs @ matrix_with([0.7**k for k in range(12)], rows=30, columns=21) + 0.01 * gaussian(80, 21, seed=1)
    return inputs.astype(dtype), targets.astype(dtype)


@pytest.mark.parametrize(
    ("model", "dtype", "num_workers"),
    [
        (ParallelRankOneRegression(9, num_rounds=12, tol=0), np.float64, 1),
        (ParallelRankOneRegression(9, num_rounds=12, tol=0), np.float32, 3),
        (ParallelRankOneRegression(9, num_rounds=12, tol=0, activation="staggered", solver="gd", num_local_steps=3), np.float64, 3),
        (ParallelRankOneRegression(3, num_rounds=3, tol=0, solver="svd"), np.float64, 3),
        (SequentialRankOneRegression(3, num_steps=12), np.float32, 3),
    ],
)
def test_ray_and_inline_give_the_same_bits(model: Any, dtype: type, num_workers: int) -> None:
    X, y = data(dtype)
    here = clone(model).set_params(random_state=0).fit(X, y)
    there = clone(here).set_params(engine="ray", num_workers=num_workers).fit(X, y)
    for name in LEARNED:
        np.testing.assert_array_equal(getattr(there, name), getattr(here, name), err_msg=name)


def test_an_asynchronous_fit_on_ray_finds_the_same_maps_and_replays_here_to_the_same_bits() -> None:
    X, y = data()
    model = ParallelRankOneRegression(4, num_rounds=100, mode="async", max_staleness=3, engine="ray", num_workers=2, random_state=0).fit(X, y)
    assert model.errors_per_round_[-1].max() < 1e-4
    problem, seed = reduce_regression(X.T, y.T), int(np.random.RandomState(0).randint(np.iinfo(np.int32).max))
    exact = exact_parts(problem.target, num_components=4)
    target, errors = problem.target / exact.singular_values[0], ErrorLog(exact, exact.singular_values[0])
    start = random_pairs(target, num_components=4, seed=seed)
    run_async(ParallelRankOne(target=target), start, schedule=model.schedule_, progress=errors)
    np.testing.assert_array_equal(errors.rows, model.errors_per_round_)


def test_the_target_travels_once_and_then_one_pair_per_map() -> None:
    X, y = data()
    model = ParallelRankOneRegression(2, num_rounds=4, tol=0, activation="all", engine="ray", num_workers=2, random_state=0).fit(X, y)
    target, pair = 21 * 30 * 8, (21 + 30) * 8
    assert target < model.traffic_.placed_bytes < target + 2000
    assert [row.worker for row in model.traffic_.rows] == [0, 1] * 4
    for row in model.traffic_.rows[2:]:  # from round 2 on the first map is published, and the second reads it
        assert (1 + row.worker) * pair < row.bytes_down < (1 + row.worker) * pair + 1000
        assert pair < row.bytes_up < pair + 1000
