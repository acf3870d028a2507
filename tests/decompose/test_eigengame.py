"""Claims of EigenGame itself: what its settings mean in the rounds that it shares with parallel deflation."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from matrices import gaussian
from partwise.decompose import EigenGame, ParallelDeflationPCA
from partwise.decompose._covariance import covariance_of

X = gaussian(400, 20) * 1.2 ** -np.arange(20.0)
MEANINGS: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({}, ("mu", "power")),
    ({"variant": "alpha"}, ("alpha", "power")),
    ({"step_size": 3.0}, ("mu", "hebb")),
    ({"batch_size": 50}, ("mu", "hebb")),
    ({"optimizer": "adam"}, ("mu", "adam")),
    ({"optimizer": "adam", "batch_size": 50, "step_size": 0.1}, ("mu", "adam")),
]


@pytest.mark.parametrize(("settings", "meaning"), MEANINGS)
def test_settings_choose_what_players_take_away_and_how_they_move(settings: dict[str, Any], meaning: tuple[str, str]) -> None:
    method = EigenGame(3, tol=1e-3, **settings).round_method(covariance_of(X), 7)
    assert (method.update, method.solver) == meaning
    assert (method.batch_size, method.step_size) == (settings.get("batch_size"), settings.get("step_size"))
    assert (method.tol, method.seed) == (5e-4, 7)


def test_the_games_and_deflation_find_the_same_players_by_different_ways() -> None:
    models = [
        ParallelDeflationPCA(4, random_state=0),
        EigenGame(4, random_state=0),
        EigenGame(4, variant="alpha", random_state=0),
        EigenGame(4, step_size=1.0, random_state=0),
        EigenGame(4, optimizer="adam", random_state=0),
    ]
    for model in models:
        model.fit(X)
        np.testing.assert_allclose(model.explained_variance_, models[0].explained_variance_, rtol=1e-6)
    ways = {tuple(model.history_[5]["values"]) for model in models}
    assert len(ways) == len(models)


def test_short_steps_need_more_rounds_than_a_gradient_that_replaces_the_vector() -> None:
    whole, short = (EigenGame(3, step_size=step, random_state=0).fit(X).n_iter_ for step in (None, 1.0))
    assert short > 1.5 * whole


@pytest.mark.parametrize("settings", [{"variant": "mu"}, {"variant": "alpha"}, {"optimizer": "adam"}])
def test_batches_bring_the_players_near_their_places(settings: dict[str, Any]) -> None:
    exact = np.linalg.eigvalsh(np.cov(X.T))[::-1][:3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = EigenGame(3, batch_size=100, num_rounds=150, random_state=0, **settings).fit(X)
    np.testing.assert_allclose(model.explained_variance_, exact, rtol=0.03)
    assert not model.converged_


def test_there_is_no_stream_for_games() -> None:
    assert not hasattr(EigenGame(), "partial_fit")
