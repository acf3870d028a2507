"""A router's rule on disk: ``router.json`` and ``router.safetensors``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from partwise.atomic_files import read_bytes, read_json, to_json_bytes, write_folder
from partwise.checks import RunError
from partwise.serve._routing_rule import LinearHead, RoutingRule

__all__ = ["read", "write"]

SETTINGS, TENSORS = "router.json", "router.safetensors"
FORMAT = 1
TYPES = {"models": list, "features": str, "layers": list, "max_length": int, "num_layers": int, "domains": list, "best_single": int, "link": str}


def write(folder: Path, settings: dict[str, Any], rule: RoutingRule) -> Path:
    """Write a rule and the ``settings`` of its router; the folder appears whole or not at all."""
    import safetensors.numpy

    head = rule.head
    arrays = {"mean": head.mean, "scale": head.scale, "weight": head.weight, "bias": head.bias} | (
        {} if rule.table is None else {"table": rule.table}
    )
    own = {"format": FORMAT, "domains": list(rule.domains), "best_single": rule.best_single, "link": head.link, "margin": rule.margin}
    with write_folder(folder) as inside:
        (inside / SETTINGS).write_bytes(to_json_bytes(settings | own))  # an infinite margin becomes null
        (inside / TENSORS).write_bytes(
            safetensors.numpy.save({name: np.ascontiguousarray(array, dtype=np.float64) for name, array in arrays.items()})
        )
    return folder


def read(folder: Path) -> tuple[dict[str, Any], RoutingRule]:
    """The settings, and the rule."""
    import safetensors
    import safetensors.numpy

    settings = read_json(folder / SETTINGS)
    if not isinstance(settings, dict) or settings.get("format") != FORMAT or "margin" not in settings:
        raise _damaged(folder / SETTINGS, f"no router of format {FORMAT}")
    wrong = [name for name, kind in TYPES.items() if not isinstance(settings.get(name), kind)]
    if wrong or not isinstance(settings["margin"], float | int | None):
        raise _damaged(folder / SETTINGS, f"no usable {', '.join(wrong or ['margin'])}")
    try:
        arrays = safetensors.numpy.load(read_bytes(folder / TENSORS))
    except safetensors.SafetensorError as error:
        raise _damaged(folder / TENSORS, str(error)) from error
    _check_shapes(folder, settings, {name: array.shape for name, array in arrays.items()})
    head = LinearHead(arrays["mean"], arrays["scale"], arrays["weight"], arrays["bias"], settings["link"])
    margin = math.inf if settings["margin"] is None else float(settings["margin"])
    return settings, RoutingRule(head, arrays.get("table"), tuple(settings["domains"]), settings["best_single"], margin)


def _check_shapes(folder: Path, settings: dict[str, Any], got: dict[str, tuple[int, ...]]) -> None:
    num_models, num_domains = len(settings["models"]), len(settings["domains"])
    outputs, width = num_domains or num_models, got.get("mean", (0,))[0]
    expected = {"mean": (width,), "scale": (width,), "weight": (outputs, width), "bias": (outputs,)}
    if num_domains:
        expected["table"] = (num_domains, num_models)
    if got != expected or not 0 <= settings["best_single"] < num_models or settings["link"] not in {"softmax", "sigmoid", "identity"}:
        raise _damaged(folder / TENSORS, f"arrays {got}")


def _damaged(path: Path, got: str) -> RunError:
    return RunError(
        "router-damaged", f"{path} is damaged: got {got}, expected what DomainRouter.save writes. Restore it from a copy, or fit the router again."
    )
