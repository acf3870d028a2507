from __future__ import annotations

import doctest
from typing import Any

import report
import rows
from report import MethodEntry, claims_block, claims_page, fill_blocks, methods_block
from rows import Row

FACTS: dict[str, Any] = {"method": "Parts(n=2)", "values": (2.0, 1.0, 4.0), "unit": "ms", "seeds": (0, 1, 2), "seconds": 3.0, "commit": "abc", "machine": "m"}
HELD = Row(claim="fast enough", expected="below 5", held=True, baseline="Whole(a|b)", baseline_values=(3.0, 3.0, 3.0), paper="1 ms on a GPU", **FACTS)
FAILED = Row(claim="smaller too", expected="below 1", held=False, **FACTS)
TOLD = Row(claim="for information", **FACTS)


def test_examples_in_docstrings_are_true():
    assert doctest.testmod(report).failed == 0
    assert doctest.testmod(rows).failed == 0


def test_a_failing_claim_is_counted_listed_on_top_and_marked_in_its_row():
    page = claims_page({"room_speed": [HELD, FAILED, TOLD]})
    assert "Of 2 claims with something asked for, 1 held and 1 did not." in page
    assert page.index("* smaller too (asked for: below 1; ours: 2 (1 to 4) ms)") < page.index("## room_speed")
    assert "| 2 | smaller too | 2 (1 to 4) ms | - | - | below 1 | **no** | 3 | 3 | abc | m |" in page


def test_the_page_keeps_the_papers_number_apart_from_ours_and_shows_what_ran():
    page = claims_page({"room_speed": [HELD]})
    assert "| 1 | fast enough | 2 (1 to 4) ms | 3 (3 to 3) | 1 ms on a GPU | below 5 | yes |" in page
    assert "1. `Parts(n=2)` against `Whole(a|b)`" in page


def test_a_row_measured_again_is_shown_once_with_its_newest_values():
    again = Row(**{**FACTS, "claim": "smaller too", "values": (0.5, 0.5, 0.5), "held": True, "expected": "below 1"})
    page = claims_page({"room_speed": [FAILED, again]})
    assert "0.5 (0.5 to 0.5) ms" in page
    assert "**no**" not in page


def test_a_bar_inside_a_cell_does_not_split_it():
    row = Row(**{**FACTS, "claim": "a|b\nc"})
    assert "| a\\|b c |" in claims_block([row], claims_page="claims.md")


def test_blocks_are_filled_in_place_and_filling_twice_changes_nothing():
    text = "before\n<!-- claims:speed -->\nold\n<!-- /claims -->\nmiddle\n<!-- methods -->\n<!-- /methods -->\nafter\n"
    once = fill_blocks(text, claims={"speed": "rows of speed\n"}, methods="methods\n")
    assert once == (
        "before\n<!-- claims:speed -->\nrows of speed\n<!-- /claims -->\nmiddle\n<!-- methods -->\nmethods\n<!-- /methods -->\nafter\n"
    )
    assert fill_blocks(once, claims={"speed": "rows of speed\n"}, methods="methods\n") == once


def test_a_block_without_rows_says_so():
    assert claims_block([], claims_page="claims.md").startswith("No rows yet")


def test_the_method_table_counts_the_claims_of_each_method():
    entries = [MethodEntry("parts", "tune", "Parts", "Cuts", "-"), MethodEntry("other", "tune", "Other", "Waits", "-")]
    text = methods_block(entries, [HELD, FAILED, TOLD], to_docs="docs/")
    assert "| parts | tune | Cuts | - | [1 of 2 claims held](docs/claims.md) |" in text
    assert "| other | tune | Waits | - | - |" in text
