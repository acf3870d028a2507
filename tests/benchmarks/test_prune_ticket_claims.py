"""The claims about tickets of untrained networks and about subset sums, at small size."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import prune_strong_tickets as tickets
import prune_subset_sums as sums
import rows
from images import Images
from partwise.linalg.subset_sums import best_subset_errors
from partwise.models import tensors_of
from partwise.prune.edge_popup import maskable_weights


@pytest.fixture(scope="module")
def runs() -> list[sums.Distances]:
    return [sums.measure(seed, num_draws=300, most=12) for seed in (0, 1)]


def test_the_error_of_the_best_subset_falls_as_fast_as_subsets_get_denser(runs: list[sums.Distances]) -> None:
    factors = [(np.median(sums.errors(run[12], 0)) / np.median(sums.errors(run[5], 0))) ** (1 / 7) for run in runs]
    theory = 0.5 * (12 / 5) ** (0.5 / 7)
    assert np.mean(factors) == pytest.approx(theory, rel=0.15)


def test_errors_from_distances_by_size_are_those_of_the_best_subset(runs: list[sums.Distances]) -> None:
    generator = np.random.default_rng(0)
    candidates, targets = generator.uniform(-1, 1, (300, 12)), generator.uniform(-0.5, 0.5, (300, 1))
    for radius in (0.0, 0.01):
        found = sums.errors(runs[0][7], radius)[:20]
        assert found.tolist() == [best_subset_errors(row[:7], target, radius=radius)[0] for row, target in zip(candidates[:20], targets[:20], strict=True)]


@pytest.mark.parametrize("radius", [0.01, 0.1])
def test_fewer_numbers_are_needed_when_each_may_move(runs: list[sums.Distances], radius: float) -> None:
    for run in runs:
        without, needed = (sums.number_needed(run, radius=each, error=0.01) for each in (0.0, radius))
        assert needed / without <= 1 / (1 + radius)
        assert abs(needed - sums.rule(without, radius=radius, error=0.01)) < 1.5


def test_the_number_needed_lies_where_the_share_of_draws_crosses_the_chance() -> None:
    reached = [[5.0, 5.0, 5.0, 5.0], [0.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 5.0], [0.0] * 4]  # shares 0, 1/4, 3/4, 1 with 0 to 3 candidates
    run = [np.array(errors)[:, None] for errors in reached]
    assert [sums.number_needed(run, radius=0, error=1.0, chance=chance) for chance in (0.25, 0.5, 0.875)] == [1.0, 1.5, 2.5]
    with pytest.raises(ValueError, match="2 candidates reach an error of 1 in 75%"):
        sums.number_needed(run[:3], radius=0, error=1)


def test_the_rule_changes_nothing_without_a_radius() -> None:
    assert sums.rule(9.0, radius=0.0, error=0.01) == 9.0
    assert sums.rule(9.0, radius=0.1, error=0.01) < sums.rule(9.0, radius=0.01, error=0.01) < 9.0


def small_images() -> Images:
    generator = torch.Generator().manual_seed(0)

    def cut(count: int) -> TensorDataset:
        inputs = torch.randn(count, 10, generator=generator)
        return TensorDataset(inputs, inputs[:, :4].argmax(1))

    return Images("small", cut(1500), cut(500), cut(500))


SETTINGS = tickets.Settings(1.0, 0.1, num_epochs=9, perturb_epochs=3)


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    """Means over two seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tickets, "BATCH_SIZE", 32)
        runs = [tickets.measure(small_images(), SETTINGS, seed=seed, radii=(0.1,), hidden=(48, 48)) for seed in (0, 1)]
    return {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}


@pytest.mark.slow
def test_a_ticket_of_frozen_weights_is_much_better_than_chance_and_worse_than_training(found: dict[str, float]) -> None:
    assert 0.6 < found["frozen"] < found["full training"]


@pytest.mark.slow
def test_a_ticket_of_moved_weights_beats_frozen_ones_and_ones_moved_at_random(found: dict[str, float]) -> None:
    assert found["moved by 0.1"] > found["frozen"]
    assert found["moved by 0.1"] > found["shuffled 0.1"]
    assert found["moved by 0.1"] > max(found["frozen, fewer steps"], found["shuffled 0.1, fewer steps"])


def test_every_rival_makes_as_many_steps() -> None:
    for method in (SETTINGS.ticket(0), SETTINGS.ticket(0, radius=0.1), SETTINGS.full(0)):
        assert (method.perturb_epochs if method.radius else 0) + (method.num_epochs if method.keep < 1 else 0) == SETTINGS.num_epochs
    assert SETTINGS.fewer_steps(0).num_epochs == SETTINGS.ticket(0, radius=0.1).num_epochs


def test_shuffled_changes_are_as_large_and_lie_elsewhere() -> None:
    model = tickets.network(small_images(), seed=0, hidden=(12,))
    before, generator = tensors_of(model), torch.Generator().manual_seed(0)
    names = maskable_weights(model)
    moved = {name: before[name].detach() + torch.rand(before[name].shape, generator=generator) for name in names}
    shuffled = tensors_of(tickets.with_shuffled_changes(model, moved, seed=1))

    def changes(after: dict[str, Tensor], name: str) -> Tensor:
        return (after[name] - before[name]).detach().flatten()

    for name in names:
        torch.testing.assert_close(changes(shuffled, name).sort().values, changes(moved, name).sort().values)
        assert not torch.allclose(changes(shuffled, name), changes(moved, name))
    assert all(torch.equal(shuffled[name], before[name]) for name in before if name not in names)


def test_the_rows_say_what_was_asked_for_and_whether_it_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[dict[str, Any]] = []
    for program in (tickets, sums):
        monkeypatch.setattr(program, "append", lambda name, row: kept.append({"name": name} | dataclasses.asdict(row)))
    scores = {"full training": [0.9], "frozen": [0.85], "moved by 0.1": [0.895], "shuffled 0.1": [0.896], "unmasked 0.1": [0.8]}
    scores |= {"frozen, fewer steps": [0.8], "shuffled 0.1, fewer steps": [0.9]}
    tickets.compare(scores, SETTINGS, radii=(0.1,), seconds=1.0)
    assert [row["held"] for row in kept] == [True, False, True, False, None, False, True]
    kept.clear()
    monkeypatch.setattr(sums, "ERRORS", (0.01,))
    runs = [sums.measure(0, num_draws=100, most=12)]
    monkeypatch.setattr(sums, "MOST", 12)
    for part in (sums.decay, sums.means, sums.counts):
        part(runs, 0.0)
    assert len(kept) == 1 + 6 + 3 + 1
    assert all(math.isfinite(value) for row in kept for value in row["values"])
    assert rows.Row(**{name: value for name, value in json.loads(json.dumps(kept[0])).items() if name != "name"}).unit


def test_networks_start_from_the_weights_that_the_paper_wants() -> None:
    model = tickets.network(small_images(), seed=0, hidden=(400, 400))
    weight = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][1].detach()
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
