from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from partwise.checks import InputError
from partwise.ledger import STATUSES, Ledger, Part

scores = st.none() | st.floats(allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6)
parts = st.builds(
    Part,
    where=st.sampled_from(["layer.0.q", "layer.0.v", "head"]),
    index=st.integers(0, 99),
    parameters=st.integers(0, 10**9),
    bytes=st.integers(0, 10**12),
    score=scores,
    status=st.sampled_from(STATUSES),
)


def part(**changes: Any) -> Part:
    return Part(**({"where": "a", "index": 0, "parameters": 3, "bytes": 12, "score": 0.5, "status": "kept"} | changes))


@given(st.lists(parts, max_size=12).map(tuple).map(Ledger))
def test_a_ledger_comes_back_from_json_unchanged(ledger: Ledger) -> None:
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


@given(st.lists(parts, max_size=12).map(tuple).map(Ledger))
def test_the_modules_add_up_to_the_whole(ledger: Ledger) -> None:
    modules, total = ledger.by_module(), ledger.total
    assert sum(module.rank for module in modules) == total.rank
    assert sum(module.parameters for module in modules) == total.parameters
    assert sum(module.bytes for module in modules) == total.bytes
    assert sum(total.statuses.values()) == len(ledger.parts)
    assert [module.where for module in modules] == list(dict.fromkeys(part.where for part in ledger.parts))


def test_only_parts_in_the_result_cost_and_count() -> None:
    ledger = Ledger(tuple(part(index=index, status=status) for index, status in enumerate(STATUSES)))
    total = ledger.total
    assert (total.rank, total.parameters, total.bytes, total.score) == (3, 9, 36, 1.5)
    assert total.statuses == dict.fromkeys(STATUSES, 1)


def test_a_module_without_scores_has_none_rather_than_zero() -> None:
    assert Ledger((part(score=None),)).total.score is None
    assert Ledger((part(score=None), part(score=0.0))).total.score == 0.0
    assert Ledger(()).total.score is None


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"where": "a", "index": 0}, r"row 0 of the ledger .* it lacks parameters, bytes, score, status"),
        (part().__dict__ | {"status": "gone"}, r"row 0 of the ledger .* one of kept, grown, dropped, lost, late in status"),
        (part().__dict__ | {"bytes": "12"}, r"row 0 of the ledger .* whole numbers in index, parameters and bytes"),
    ],
    ids=["missing fields", "unknown status", "text for a number"],
)
def test_a_malformed_row_is_named(row: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text + r".* Make the ledger with Ledger\.to_json") as caught:
        Ledger.from_json([row])
    assert caught.value.code == "ledger-malformed"


def test_a_field_of_a_later_version_is_ignored() -> None:
    assert Ledger.from_json([part().__dict__ | {"colour": "blue"}]) == Ledger((part(),))


def test_the_ledger_loads_without_heavy_libraries() -> None:
    code = "import sys, partwise.ledger, partwise.runs, partwise.report; print({'torch', 'matplotlib', 'jinja2', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "set()"
