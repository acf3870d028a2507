"""Claims about how layers read units: sums over one pass say what calling the layer for every unit says."""

from __future__ import annotations

import pytest
import torch

from partwise.linalg.unit_products import unit_products
from partwise.prune import _reading as module
from partwise.prune._reading import readings_of
from reading_layers import CASES, Case
from tolerances import assert_close


def gram_of(case: Case) -> torch.Tensor:
    total = torch.zeros(case.axis.size, case.axis.size, dtype=torch.float64)

    def add(reader: str, values: torch.Tensor) -> None:
        total.add_(unit_products(readings[reader].weight, readings[reader].moments(values), size=case.axis.size))

    with case.visit() as visit:
        readings = readings_of(visit)
        visit.show_reader_inputs(add)
    return total


@pytest.mark.parametrize("name", CASES)
def test_inner_products_of_what_units_add_are_those_of_calling_the_layer_for_each(name: str):
    case = CASES[name]()
    added = case.contributions()
    assert_close(gram_of(case), added @ added.T, claim="moments and weights say it all", rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["filters with a norm behind the reader", "steps and gaps"])
def test_patches_are_taken_a_few_images_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]()
    at_once = gram_of(case)
    monkeypatch.setattr(module, "BLOCK", 1)
    assert_close(gram_of(case), at_once, claim="one image at a time")
    with case.visit() as visit:
        [reading] = readings_of(visit).values()
        [hidden] = case.hidden().values()
        assert len(list(reading.rows(hidden))) == len(hidden) == 3


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_sums_of_absolute_values(name: str):
    case = CASES[name]()
    with case.visit() as visit:
        for reader, reading in readings_of(visit).items():
            hidden = case.hidden()[reader]
            by_unit = hidden.movedim(1, 0).flatten(1) if hidden.ndim == 4 else hidden.flatten(0, -2).T  # (channels, places)
            assert_close(reading.sizes(hidden), by_unit.abs().sum(1), claim=reader)
