"""Run folders as a real run would leave them, from a seed: for the tests of the report."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from partwise.atomic_files import write_json
from partwise.ledger import Ledger, Part
from partwise.runs import RunFolder

BERT_KINDS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense")
LLAMA_KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def bert_names(num_layers: int = 6) -> list[str]:
    return [f"encoder.layer.{layer}.{kind}" for layer in range(num_layers) for kind in BERT_KINDS]


def llama_names(num_layers: int = 32) -> list[str]:
    return [f"model.layers.{layer}.{kind}" for layer in range(num_layers) for kind in LLAMA_KINDS]


def make_run(
    path: Path, *, names: Sequence[str] | None = None, num_steps: int = 400, compare: Sequence[str] = (), finished: bool = True, grows: bool = True
) -> RunFolder:
    """A run of ``num_steps`` steps over modules ``names``; without an end, it stops at 60 percent."""
    names = bert_names() if names is None else names
    chance = random.Random(0)
    header = {
        "partwise": "0.1.0",
        "room": "tune",
        "method": "AdaPaD(lora_alpha=16, lora_dropout=0.0, schedule='split', target_r=2.0)",
        "settings": {"target_r": 2.0, "lr": 0.002, "batch_size": 16, "max_steps": num_steps, "target_modules": ["query", "value"], "model": None},
        "seed": 0,
        "data": {"name": "standard-library docstrings", "fingerprint": "9f2c41d07be3", "num_train": 3120, "num_valid": 800},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "command": ["partwise", "tune", "adapad", "--target-r", "2", "--out", "runs/a b"],
    }
    run = RunFolder.create(path, header)
    last = num_steps if finished else num_steps * 6 // 10
    ranks = _train(run, names, last, num_steps, chance, grows)
    if finished:
        write_json(run.summary, _summary(names, ranks, num_steps, compare, chance))
        run.set_status("finished")
    return run


def _train(run: RunFolder, names: Sequence[str], last: int, num_steps: int, chance: random.Random, grows: bool) -> dict[str, int]:
    depth = {name: index / len(names) for index, name in enumerate(names)}
    wish = {name: 0.25 + depth[name] + (0.7 if "value" in name or "v_proj" in name else 0.0) + chance.random() * 0.6 for name in names}
    ranks = dict.fromkeys(names, 1 if grows else 2)
    run.append_metrics({"kind": "growth", "step": 0, "ranks": ranks})
    for step in range(1, last + 1):
        loss = 0.55 + 2.3 * math.exp(-step / (num_steps / 5)) + chance.gauss(0, 0.12)
        run.append_metrics({"kind": "train", "step": step, "loss": loss, "lr": 0.002 * (1 - step / num_steps)})
        if grows and step % max(1, num_steps // 20) == 0 and step < num_steps * 0.8:
            for name in sorted(names, key=lambda name: ranks[name] / wish[name] + chance.random() * 0.3)[: max(1, len(names) // 15)]:
                ranks[name] += 1
            run.append_metrics({"kind": "growth", "step": step, "ranks": ranks})
        if step % max(1, num_steps // 8) == 0:
            done = 1 - math.exp(-step / (num_steps / 4))
            run.append_metrics({"kind": "eval", "step": step, "metric": 0.06 + 0.79 * done, "loss": 0.75 + 2.1 * (1 - done)})
    return ranks


def _summary(names: Sequence[str], ranks: dict[str, int], num_steps: int, compare: Sequence[str], chance: random.Random) -> dict[str, Any]:
    parts = []
    for name in names:
        for index in range(ranks[name] + (chance.random() < 0.15)):
            status = "dropped" if index >= ranks[name] else "kept" if index == 0 else "grown"
            parts.append(Part(where=name, index=index, parameters=768, bytes=3072, score=chance.random() / (index + 1), status=status))
    ledger = Ledger(tuple(parts))
    curve = _curve(ranks, 0.845, 0.055, chance)
    summary = {
        "task": "classification",
        "method": "adapad",
        "metric_name": "accuracy",
        "metric_before": 0.0612,
        "metric_after": curve[-1]["metric"],
        "saved_parameters": ledger.total.parameters,
        "saved_bytes": ledger.total.bytes,
        "ranks": ranks,
        "kept_rank_curve": curve,
        "seconds": 192.4,
        "num_steps": num_steps,
        "seed": 0,
        "ledger": ledger.to_json(),
    }
    if compare:
        drops = {"adapad": 0.055, "lora": 0.29, "lora, cut by SVD": 0.13, "adalora": 0.2}
        summary["comparison"] = [
            {
                "method": method,
                "seeds": [0, 1, 2, 3, 4],
                "metric": [0.845 + chance.gauss(0, 0.008) for _ in range(5)],
                "saved_parameters": [ledger.total.parameters] * 5,
                "seconds_per_step": [0.42 + chance.random() * 0.02 for _ in range(5)],
                "kept_rank_curve": [_curve(ranks, 0.845, drops.get(method, 0.2), chance) for _ in range(5)],
            }
            for method in compare
        ]
    return summary


def _curve(ranks: dict[str, int], full: float, drop: float, chance: random.Random) -> list[dict[str, Any]]:
    most = max(ranks.values())
    kept = {rank: sum(min(rank, own) for own in ranks.values()) for rank in range(1, most + 1)}
    noise = chance.gauss(0, 0.006)
    metric = {rank: full + noise - drop * (1 - (rank - 1) / max(1, most - 1)) ** 2 for rank in kept}
    return [{"rank": rank, "parameters": 768 * count, "bytes": 3072 * count, "metric": metric[rank]} for rank, count in kept.items()]
