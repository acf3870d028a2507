"""The command in a process of its own, run to its end, killed, or interrupted: for tests of what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from partwise.runs import RunFolder

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Killed(BaseException):
    """Stands for a process that ends between two lines."""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "partwise", *map(str, arguments)]


def num_rows(run: Path) -> int:
    """Rows of metrics so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_to_the_end(*arguments: object) -> None:
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run_and_kill(*arguments: object, out: Path, threshold: int, delay_s: float) -> bool:
    """Start or resume a run, kill it a moment after it has written ``threshold`` rows, and say whether the kill came before the end."""
    resume = ["--resume"] if RunFolder.exists(out) else []
    words = command(*arguments, "--out", out, *resume)
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and num_rows(out) < threshold:
            time.sleep(0.002)
        time.sleep(delay_s)
        process.kill()
    return process.returncode == -signal.SIGKILL


def run_and_interrupt(*arguments: object, out: Path, threshold: int) -> tuple[int, str]:
    """Press Ctrl-C once ``threshold`` rows are there. Returns the exit code and what was said on standard error."""
    words = command(*arguments, "--out", out)
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and num_rows(out) < threshold:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    return process.returncode, said
