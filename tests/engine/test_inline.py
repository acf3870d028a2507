"""The inline engine: one process that refuses what a cluster would refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from chain import chain
from faults import Faulty
from partwise.checks import InputError, RunError
from partwise.engine import open_engine
from partwise.engine.arrivals import Traffic, TrafficRow, flaw_of
from partwise.engine.inline import InlineWorkers, inline
from partwise.rounds import run_rounds
from tolerances import assert_close

SAME_BITS = {"rtol": 0.0, "atol": 0.0}


@pytest.mark.parametrize("fault", ["nan", "shape", "index"])
def test_a_broken_result_is_refused_and_the_part_run_again(tmp_path: Path, fault: str) -> None:
    method, start = chain()
    engine = InlineWorkers()
    state = run_rounds(Faulty(method=method, folder=tmp_path, faults={(1, 1): fault, (3, 0): fault}), start, num_rounds=3, engine=engine)
    assert_close(state.vectors, run_rounds(method, start, num_rounds=3).vectors, claim="nothing broken is merged", **SAME_BITS)
    assert (engine.traffic.num_refused, engine.traffic.num_reissued) == (2, 2)


def test_broken_results_without_end_end_the_run(tmp_path: Path) -> None:
    method, start = chain()
    faulty = Faulty(method=method, folder=tmp_path, faults={(2, n): "nan" for n in range(3)})
    with pytest.raises(RunError, match=r"the inline worker returned 1 NaN or infinite numbers out of 6 in vector, 3 times for part 2") as caught:
        run_rounds(faulty, start, num_rounds=1, engine=InlineWorkers())
    assert caught.value.code == "result-refused"


def test_a_flaw_is_found_wherever_it_is() -> None:
    method, start = chain()
    part = method.split(start)[1]
    assert flaw_of(method, part, method.work(part)) is None
    assert flaw_of(object(), None, (1.0, [float("nan")])) == "1 NaN or infinite numbers out of 1 in [1][0]"
    assert flaw_of(object(), None, {"not": "looked into"}) is None


def test_an_engine_is_opened_by_name_or_passed_on_as_it_is() -> None:
    with open_engine("inline", num_workers=2, num_parts=2, seed=5) as engine:
        assert repr(engine) == "InlineWorkers(2, seed=5)"
    with open_engine(engine, num_parts=1) as same:  # a spare worker does no harm
        assert same is engine
        assert copy.deepcopy(same) is engine
    with open_engine(inline, num_parts=1) as plain:
        assert plain is inline


@pytest.mark.parametrize(
    ("engine", "options", "text"),
    [
        ("dask", {}, r"engine='dask' is not known\. Choose one of: inline, ray"),
        ("inline", {"num_workers": 0}, r"num_workers=0 must be an integer of at least 1"),
        ("inline", {"num_workers": 3, "num_parts": 2}, r"got num_workers=3 for 2 parts, expected at most one each\. Pass num_workers=2 or fewer"),
        ("inline", {"address": "a:1"}, r"got address='a:1' for the inline engine, expected none"),
        ("inline", {"timeout": 9}, r"got timeout=9 for the inline engine, expected none\. Pass engine='ray', or leave it out"),
        (None, {}, r"engine=None is not known\. Choose one of: inline, ray"),
        (InlineWorkers(), {"timeout": 9.0}, r"got timeout=9\.0 with an engine that is open already"),
        (InlineWorkers(), {"num_workers": 2}, r"got num_workers=2 with an engine that is open already"),
        (InlineWorkers(), {"address": "a:1"}, r"got address='a:1' with an engine that is open already"),
    ],
)
def test_an_engine_that_cannot_be_opened_says_why(engine: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        open_engine(engine, **options)


def test_traffic_adds_up_and_turns_into_json() -> None:
    traffic = Traffic([TrafficRow(1, 0, 10, 3), TrafficRow(1, 1, 20, 4)], num_lost=1)
    assert (traffic.bytes_down, traffic.bytes_up) == (30, 7)
    assert traffic.to_json()["rows"][1] == {"round_number": 1, "worker": 1, "bytes_down": 20, "bytes_up": 4}
    assert traffic.to_json()["num_lost"] == 1
