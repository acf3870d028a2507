"""The house itself: what tests may rely on, and that build files, extras and pages agree."""

from __future__ import annotations

import ast
import os
import re
import socket
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tolerances import assert_close

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def test_tests_reach_no_network_but_this_machine():
    with pytest.raises(OSError, match=r"tests have no network, and something asked for 'example\.org'"):
        socket.create_connection(("example.org", 80), timeout=1)
    with pytest.raises(OSError, match="tests have no network"), socket.socket() as client:
        client.connect(("192.0.2.1", 80))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5) as client:
        assert client.getpeername() == server.getsockname()


@pytest.mark.parametrize("attempt", [1, 2])
def test_every_test_starts_from_the_same_random_numbers(attempt: int):
    assert_close(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)), claim=f"attempt {attempt}", rtol=0, atol=0)
    assert np.random.rand() == np.random.RandomState(0).rand()  # noqa: NPY002 - the global generator is the subject


def test_the_number_of_threads_is_fixed():
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def test_a_failed_comparison_begins_with_its_claim():
    with pytest.raises(AssertionError, match=r"\Atwo is three\n"):
        assert_close(torch.tensor(2.0), torch.tensor(3.0), claim="two is three")
    with pytest.raises(AssertionError, match="same kind"):
        assert_close(torch.ones(1), torch.ones(1, dtype=torch.float64), claim="same kind")
    assert_close(torch.tensor([1, 2]), torch.tensor([1, 2]), claim="integers have no tolerance")


def test_every_extra_that_an_error_names_can_be_installed():
    extras = PROJECT["optional-dependencies"]
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "extra" and isinstance(node.value, ast.Constant):
                assert node.value.value in extras, f"{path.relative_to(ROOT)} names the extra {node.value.value!r}"
        for name in re.findall(r"partwise\[([\w,]+)\]", path.read_text()):
            assert set(name.split(",")) <= extras.keys()


def test_the_extra_all_holds_every_extra_for_users():
    [everything] = PROJECT["optional-dependencies"]["all"]
    assert set(re.findall(r"\w+", everything)) - {"partwise"} == PROJECT["optional-dependencies"].keys() - {"all", "dev"}


def test_the_torch_that_make_installs_is_one_that_the_package_accepts():
    version = re.search(r"^TORCH \?= torch==([\d.]+)$", MAKEFILE, flags=re.MULTILINE)
    [bound] = [requirement for requirement in PROJECT["dependencies"] if requirement.startswith("torch")]
    assert version
    assert bound.startswith(f"torch>={version[1].rpartition('.')[0]}")


def test_the_versions_that_make_installs_are_those_of_every_dependency_but_torch_and_within_its_bounds():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    bounds = [Requirement(line) for line in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])]
    for bound in bounds:
        if bound.name not in {"torch", "partwise"}:
            assert bound.specifier.contains(pinned[canonicalize_name(bound.name)]), f"{bound} and {pinned[canonicalize_name(bound.name)]}"


def test_every_make_target_that_a_page_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    for page in [ROOT / "README.md", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)) <= targets, page.name


def test_the_check_script_calls_the_test_command_of_the_readme_first():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert re.findall(r"^make .*$", script, flags=re.MULTILINE) == ["make test", "make lint", "make docs"]
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_make_says_which_python_it_needs_when_it_finds_none(tmp_path: Path):
    (tmp_path / "Makefile").write_text(MAKEFILE)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("")
    result = subprocess.run(["make", "test", "PYTHON=/no/such/python"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "partwise needs Python 3.11 or later" in result.stderr
    assert "make test PYTHON=/path/to/python3" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_licence_is_the_one_that_the_package_declares():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
