"""The README.md beside a model that a run leaves: what it is, how to load it, what it is worth, and the ledger in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from partwise.report import format_bytes, format_metric
from partwise.train._report import format_speed

if TYPE_CHECKING:
    from partwise.train.ticket import Ticket

ORIGINS = {
    "drawn": "one of the random tickets",
    "wanda": "units ranked by weights and activations (Wanda)",
    "fluctuation": "units ranked by the variance of their activations (FLAP)",
}


def model_card(ticket: Ticket, row: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Markdown text with a YAML head.

    Parameters
    ----------
    ticket : Ticket
        What lies beside the card.
    row : mapping
        What it is worth: ``num_parameters``, ``metric``, ``speed``, ``random``, ``notes``.
    facts : mapping
        About the training.
    """
    kept = (
        "The whole model"
        if ticket.keep == 1
        else f"A ticket of {100 * ticket.keep:g} %: a subnetwork of the trained model, used as it is, without further training"
    )
    lines = [
        ("trained by", f"`{facts['call']}`"),
        ("data", facts["data"]),
        ("rounds, parts of each, local steps of all parts", f"{facts['num_rounds']:,}, {facts['num_parts']}, {facts['num_steps']:,}"),
        ("parameters", f"{row['num_parameters']:,}"),
        (f"{facts['metric_name']} on the test split", format_metric(row["metric"])),
        (f"{facts['unit']} per second where it was made{', one at a time' * (facts['kind'] == 'causal-lm')}", format_speed(row["speed"])),
        ("seed", facts["seed"]),
    ]
    if row["random"]:
        spread = row["random"]
        text = f"{format_metric(spread['mean'])} on average, {format_metric(spread['low'])} to {format_metric(spread['high'])}"
        lines.insert(5, (f"the same of {spread['number']} random tickets of this size", text))
        lines.insert(6, ("chosen on other data, the calibration split; where from", ORIGINS.get(row["chosen"], row["chosen"])))
    table = "\n".join(f"| {name} | {value} |" for name, value in lines)
    notes = "".join(f"\n{note}\n" for note in row["notes"])
    return f"""---
{head(ticket)}tags: [partwise, {facts["method"]}]
---

# {facts["model"]} trained by subnetworks

{kept}. {how_to_load(ticket)}
{notes}
| | |
|---|---|
{table}

## Part ledger

{ledger_lines(facts)}
"""


def head(ticket: Ticket) -> str:
    """What a hub wants to know first."""
    return "library_name: transformers\npipeline_tag: text-generation\n" if hasattr(ticket.model, "config") else ""


def how_to_load(ticket: Ticket) -> str:
    """The line that opens the folder."""
    config = getattr(ticket.model, "config", None)
    if config is None or getattr(config, "is_heterogeneous", False):
        return '`partwise.train.ticket.load_ticket("this folder")` opens it.'
    return f'`transformers.{type(ticket.model).__name__}.from_pretrained("this folder")` opens it; no other code is needed.'


def ledger_lines(facts: Mapping[str, Any]) -> str:
    """Totals: every part of every round is in ``summary.json`` of the run."""
    total = facts["ledger_total"]
    statuses = ", ".join(f"{count:,} {status}" for status, count in total["statuses"].items())
    return (
        f"{total['parts']:,} parts in {facts['num_rounds']:,} rounds: {statuses}. A part held {total['parameters']:,} parameters on average; "
        f"{format_bytes(facts['bytes_down'])} went to the parts and {format_bytes(facts['bytes_up'])} came back. "
        f"{100 * facts['coverage']:.1f} % of the units were trained in a round on average."
    )
