"""The README.md beside a pruned model: what it is, how to open it, what it is worth beside the whole one, and what stayed of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partwise.prune._report import LAYER_LABELS, calibrated_on, comparison_cells, evaluated_on, kept_of, layer_cells

__all__ = ["model_card"]


def model_card(facts: Mapping[str, Any], *, is_plain: bool) -> str:
    """Markdown text with a YAML head.

    Parameters
    ----------
    facts : mapping
        About the run, as in ``summary.json``.
    is_plain : bool
        Whether stock transformers opens the folder.
    """
    if is_plain:
        opening = "It is an ordinary checkpoint: `AutoModelForCausalLM.from_pretrained(FOLDER)` of transformers opens it, with nothing else installed."
    else:
        opening = "`partwise.load(FOLDER)` opens it. No code in the folder is run, and nothing is unpickled."
    name = Path(facts["model"]).name
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in comparison_cells(facts))
    layers = "\n".join(f"| {' | '.join(cells)} |" for cells in (LAYER_LABELS, ["---", "---", *["---:"] * (len(LAYER_LABELS) - 2)], *layer_cells(facts)))
    notes = "".join(f"\n> {note}\n" for note in facts["notes"])
    head = "library_name: transformers\npipeline_tag: text-generation\n" if is_plain else ""
    return f"""---
{head}tags: [partwise, pruned, {facts["method"]}]
---

# {name}, pruned

A smaller {facts["class"]}: {kept_of(facts)}. Nothing was trained afterwards. {opening}
{notes}
Made by `{facts["call"]}`, seed {facts["seed"]}. {calibrated_on(facts)}

| | before | after | change |
|---|---:|---:|---:|
{table}

Perplexity on {evaluated_on(facts)}. Speed where it was made, one text at a time, in {facts["dtype"]} on {facts["device"]}.

## Part ledger

{layers}
"""
