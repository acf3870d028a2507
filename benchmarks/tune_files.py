"""What stock peft makes of an AdaPaD adapter on disk: logits as it is, logits merged, warnings, and fields of its configuration.

MiniLM on the built-in task, a few steps per seed so that ranks are uneven. Needs the extras hf and demo. ``python benchmarks/tune_files.py [--seeds 5]``.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rows

STEPS, BATCH, SEQ = 12, 8, 24


def trained(seed: int) -> tuple[Any, dict[str, Tensor]]:
    """An adapted encoder after a few steps, and inputs to compare on."""
    from peft import get_peft_model

    from partwise.tune import AdaPaDConfig
    from partwise.tune._models import load_model

    base, _ = load_model(None, task="classification", num_labels=20, seed=seed)
    config = AdaPaDConfig(target_modules="all-linear", task_type="SEQ_CLS", target_r=2, r=4, total_steps=STEPS, seed=seed)
    model = get_peft_model(base, config).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        ids = torch.randint(1000, 20000, (BATCH, SEQ), generator=generator)
        model(input_ids=ids, labels=torch.randint(20, (BATCH,), generator=generator)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval(), {"input_ids": torch.randint(1000, 20000, (32, SEQ), generator=generator)}


def differences(seed: int, *, finalised: bool) -> tuple[float, float, int, list[str]]:
    """Largest logit difference reloaded and merged, number of warnings, and configuration fields that a LoraConfig does not know."""
    from dataclasses import fields

    from peft import LoraConfig, PeftModel

    from partwise.tune import finalize
    from partwise.tune._models import load_model

    model, inputs = trained(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    logits = model(**inputs).logits
    if finalised:
        finalize(model)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        base, _ = load_model(None, task="classification", num_labels=20, seed=seed)
        before = len(caught)
        again = PeftModel.from_pretrained(base, folder).eval()
        num_warnings = sum("is_gradient_checkpointing" not in str(entry.message) for entry in caught[before:])  # peft says this of every adapter
        reloaded = float((again(**inputs).logits - logits).abs().max())
        merged = float((again.merge_and_unload()(**inputs).logits - logits).abs().max())
    return reloaded, merged, num_warnings, sorted(set(config) - {item.name for item in fields(LoraConfig)})


def measure(num_seeds: int) -> None:
    """Compare for each seed and append the rows."""
    for finalised in (True, False):
        start = time.perf_counter()
        found = [differences(seed, finalised=finalised) for seed in range(num_seeds)]
        state = "finalised" if finalised else "still growing"
        clean = all(not number and not unknown for _, _, number, unknown in found)
        common: dict[str, Any] = {"method": "AdaPaDConfig(target_r=2, r=4)", "unit": "largest logit difference", "seeds": range(num_seeds)}
        for what, column, limit in (("reloaded by stock peft", 0, 1e-6), ("reloaded and merged by stock peft", 1, 1e-5)):
            values = [entry[column] for entry in found]
            rows.append(
                "tune_files",
                rows.Row(
                    claim=f"an adapter ({state}) {what} gives the same logits, without a warning or a foreign field",
                    values=values,
                    expected=f"at most {limit:g} in float32; no warning; only LoraConfig fields",
                    held=max(values) <= limit and clean,
                    seconds=time.perf_counter() - start,
                    note="no warnings, no foreign fields" if clean else f"warnings or fields: {found}",
                    **common,
                ),
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    logging.disable(logging.WARNING)
    measure(parser.parse_args().seeds)
