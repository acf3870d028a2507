"""Whether an inference server loads an adapter and applies it as it was trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from partwise.atomic_files import refuse_pickles
from partwise.checks import InputError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SERVED_KEY = re.compile(r"\.lora_[AB]\.weight$")


def check_servable(path: str | Path, *, max_lora_rank: int = 16) -> None:
    """Refuse an adapter folder that a server such as vLLM would reject or apply wrongly.

    Parameters
    ----------
    path : str or Path
        Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
    max_lora_rank : int
        The server's ``--max-lora-rank``.

    Raises
    ------
    InputError
        Naming every reason: missing or pickled files, a rank above ``max_lora_rank``, scales that differ between modules (servers use
        one factor for all), DoRA, biases, heads saved along, tensors that are no LoRA factors, a growing adapter that was not finalised.

    Notes
    -----
    The rules follow vLLM's ``PEFTHelper`` and weight loader, which ignore ``rank_pattern`` and ``alpha_pattern``.
    """
    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError("no-adapter-folder", f"{folder} has no {name}. Pass the folder that save_pretrained wrote, or RUN/result.")
    refuse_pickles(folder)
    config = json.loads((folder / CONFIG).read_text())
    reasons = [*_config_reasons(config, max_lora_rank), *_weight_reasons(folder / WEIGHTS)]
    if reasons:
        raise InputError("not-servable", f"{folder} cannot be served: " + "; ".join(reasons) + ".")


def _config_reasons(config: dict[str, Any], max_lora_rank: int) -> list[str]:
    if config.get("peft_type") != "LORA":
        return [f"it is of type {config.get('peft_type')} and not LORA"]
    reasons = []
    if config.get("r", 0) > max_lora_rank:
        reasons.append(
            f"its rank {config['r']} is above max_lora_rank={max_lora_rank}: start the server with --max-lora-rank {config['r']}, or truncate"
        )
    power = 0.5 if config.get("use_rslora") else 1.0
    scale = config["lora_alpha"] / config["r"] ** power
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for name in {*ranks, *alphas}:
        own = alphas.get(name, config["lora_alpha"]) / ranks.get(name, config["r"]) ** power
        if abs(own - scale) > 1e-6 * abs(scale):
            reasons.append(
                f"{name} is scaled by {own:g} and others by {scale:g}, but a server uses one scale: rewrite it with partwise.tune.finalize"
            )
            break
    if config.get("use_dora"):
        reasons.append("it is a DoRA adapter: train without use_dora")
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={config['bias']!r} changes base weights: train with bias='none'")
    if config.get("modules_to_save"):
        reasons.append(f"it saves whole modules ({', '.join(config['modules_to_save'])}), such as a classification head: serve it with transformers")
    return reasons


def _weight_reasons(weights: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        names = list(file.keys())
    if any(name.endswith("adapad_state") for name in names):
        return ["it is a checkpoint of a growing adapter: call partwise.tune.finalize(model) before save_pretrained, or train with AdaPaDCallback"]
    foreign = [name for name in names if not SERVED_KEY.search(name)]
    return [f"{len(foreign)} tensors are no LoRA factors (first: {foreign[0]})"] if foreign else []
