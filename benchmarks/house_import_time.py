"""How long a user waits for ``import partwise`` and ``partwise --help``: fresh processes, taking turns with an empty one.

``python benchmarks/house_import_time.py [--repeats 15]``
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import rows

HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "sklearn")
PROGRAMS = {
    "import partwise": "import partwise",
    "partwise --help": "from partwise.cli import main; main(['--help'])",
    "partwise tune --help": "from partwise.cli import main; main(['tune', '--help'])",
    "partwise tune adapad --help": "from partwise.cli import main\ntry: main(['tune', 'adapad', '--help'])\nexcept SystemExit: pass",
}


def seconds(code: str) -> float:
    """Wall-clock time of a fresh interpreter that runs ``code``."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def heavy_modules(code: str) -> list[str]:
    """Which heavy libraries a fresh interpreter has loaded after ``code``."""
    tail = f"\nimport sys; print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    said = subprocess.run([sys.executable, "-c", code + tail], check=True, capture_output=True, text=True).stderr
    return [name for name in HEAVY if repr(name) in said.splitlines()[-1]]


def measure(repeats: int) -> None:
    """Time each command and append a row."""
    start = time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in ("nothing", *PROGRAMS)}
    for _ in range(repeats):
        for name, code in {"nothing": "pass", **PROGRAMS}.items():
            times[name].append(seconds(code))
    for name, code in PROGRAMS.items():
        loaded = heavy_modules(code)
        rows.append(
            "house_import_time",
            rows.Row(
                claim=f"`{name}` takes less than a second and loads no heavy library",
                method=name,
                baseline="an interpreter that does nothing",
                values=times[name],
                baseline_values=times["nothing"],
                unit="seconds",
                seeds=range(repeats),
                expected="median below 1 second; none of " + ", ".join(HEAVY),
                held=statistics.median(times[name]) < 1 and not loaded,
                seconds=time.perf_counter() - start,
                note="loads " + (", ".join(loaded) or "none of them"),
            ),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    measure(parser.parse_args().repeats)
