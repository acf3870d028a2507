"""How a finished training looks in the terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from partwise.train._terminal import summary_parts, ticket_lines


def a_ticket(keep: float = 1.0, **changes: Any) -> dict[str, Any]:
    size = round(1_000_000 * keep)
    row = {
        "keep": keep,
        "num_parameters": size,
        "metric": 10 / keep,
        "speed": 200 / keep,
        "random": None,
        "chosen": "drawn",
        "notes": [],
        "bytes": 4 * size,
    }
    return row | {"calibration_loss": 2.0, "folder": f"runs/[bold]x/result/{'model' if keep == 1 else f'tickets/keep-{100 * keep:g}'}"} | changes


def a_summary(**changes: Any) -> dict[str, Any]:
    spread = {"number": 4, "mean": 21.5, "low": 20.0, "high": 23.25}
    return {
        "method": "twist",
        "call": "TwIST(keep=0.25)",
        "data": "[bold]notes",
        "kind": "causal-lm",
        "unit": "tokens",
        "metric_name": "perplexity",
        "tickets": [a_ticket(), a_ticket(0.5, random=spread)],
        "missing_tickets": [],
        "num_rounds": 1234,
        "num_parts": 4,
        "num_steps": 98_720,
        "num_lost": 0,
        "bytes_down": 2000,
        "bytes_up": 1000,
        "coverage": 0.875,
        "holders": {"a": [1, 2]},
        "wire": {"bytes_down": 0, "bytes_up": 0},
        "mishaps": {},
        "seconds": 7.25,
        "report": None,
        "run": "runs/[bold]x",
    } | changes


def printed(summary: dict[str, Any]) -> str:
    console = Console(width=80, file=io.StringIO(), record=True, highlight=False)
    for part in summary_parts(summary):
        console.print(part, soft_wrap=True)
    return console.export_text()


def test_every_size_is_a_line_with_its_quality_beside_that_of_random_tickets():
    lines = [line.split() for line in printed(a_summary()).splitlines()]
    assert ["100", "%", "1,000,000", "10", "-", "200", "4.0", "MB"] in lines
    assert ["50", "%", "500,000", "20", "21.5", "(20", "to", "23.25)", "400", "2.0", "MB"] in lines
    assert ["50", "%", "runs/[bold]x/result/tickets/keep-50"] in lines
    assert ["units", "parameters", "perplexity", "random:", "mean", "(range)", "tokens/s", "size"] in lines


def test_the_table_of_large_numbers_fits_a_terminal_of_80_columns():
    row = a_ticket(num_parameters=123_456_789_012, metric=1234.5, speed=123_456, bytes=10**12)
    row["random"] = {"number": 4, "mean": 1234.56, "low": 1234.1, "high": 1299.25}
    lines = printed(a_summary(tickets=[row])).splitlines()
    assert any("123,456,789,012" in line and "1000.0 GB" in line for line in lines)
    assert max(len(line.rstrip()) for line in lines[:5]) <= 80


def test_what_came_out_and_what_was_sent_are_said_as_they_are():
    said = printed(a_summary())
    assert "TwIST(keep=0.25) on [bold]notes" in said
    assert "the ticket that keeps 50 % of its units has 20 and is 2 times as fast" in said
    assert "traffic: 2.0 kB to the parts, 1.0 kB back; 87.5 % of the units trained per round" in said
    assert "1,234 rounds of 4 parts, 98,720 local steps, took 7.2 s" in said
    assert "report   not drawn" in said
    assert "other sizes: partwise train ticket runs/[bold]x --keep 0.4 --out runs/[bold]x-keep-40" in said


def test_the_wire_mishaps_lost_results_and_untrained_units_are_said_where_there_were_any():
    said = printed(a_summary(wire={"bytes_down": 4000, "bytes_up": 3000}, mishaps={"lost": 2, "placed_bytes": 9}, num_lost=3, holders={"a": [0, 2]}))
    assert "(on the wire 4.0 kB and 3.0 kB); 2 lost;" in said
    assert "3 results of parts were lost, and the run went on without them" in said
    assert "1 units were never trained: raise --num-rounds" in said


def test_a_method_without_tickets_says_why_and_offers_none():
    said = printed(a_summary(tickets=[a_ticket()], missing_tickets=[{"keep": 0.75, "code": "no-tickets", "reason": "LocalSGD splits nothing."}]))
    assert "LocalSGD splits nothing." in said
    assert "other sizes" not in said
    assert "the ticket that keeps" not in said


def test_a_cut_ticket_is_compared_with_the_whole_model():
    spread = {"number": 3, "mean": 21.5, "low": 20.0, "high": 23.25}
    lines = ticket_lines(a_ticket(0.4, random=spread) | {"metric_name": "perplexity", "unit": "tokens", "whole": a_ticket()})
    assert lines[0] == "perplexity on the test split: 10 whole, 25 cut to 40 % of the units"
    assert lines[1] == "parameters: 1,000,000 -> 400,000, 1.6 MB"
    assert lines[2] == "speed: 200 -> 500 tokens per second"
    assert lines[3] == "3 random tickets of this size: 21.5 on average, 20 to 23.25; chosen on the calibration split: drawn"
