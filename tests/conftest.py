"""No network, a fixed number of threads, fixed seeds: the same for every test."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

# Before anything imports numpy, torch or transformers. Child processes of tests inherit all of it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="partwise-tests-hf-")  # a user's cache must not decide whether a test passes
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# The same examples in every run, and no deadline: the first call of a library is slow, which says nothing about the claim.
hypothesis.settings.register_profile("partwise", deadline=None, derandomize=True)
hypothesis.settings.load_profile("partwise")

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")
_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def _refuse_network(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if isinstance(name, str) and not name.startswith(LOOPBACK) and name != "":
        raise OSError(f"tests have no network, and something asked for {name!r}. Use local material, or mock the call.")


def _guarded_connect(self: socket.socket, address: Any) -> None:
    if self.family != socket.AF_UNIX:
        _refuse_network(address[0])
    return _connect(self, address)


def _guarded_connect_ex(self: socket.socket, address: Any) -> int:
    if self.family != socket.AF_UNIX:
        _refuse_network(address[0])
    return _connect_ex(self, address)


def _guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
    _refuse_network(host)
    return _getaddrinfo(host, *args, **kwargs)


# At import, not in a fixture: a download while a test module is being collected is refused as well.
socket.socket.connect = _guarded_connect  # type: ignore[method-assign]
socket.socket.connect_ex = _guarded_connect_ex  # type: ignore[method-assign]
socket.getaddrinfo = _guarded_getaddrinfo


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seed the three global generators, so that a test's result does not depend on which tests ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third-party code still draws from the old global generator
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).parents[1]
