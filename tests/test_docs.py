"""The pages run, their links lead somewhere, and what is generated is up to date.

Code blocks of a page run in order, each page in its own namespace and in an empty folder. Info strings after the language:

* ```` ```python ```` runs; ```` ```python not-run: <reason> ```` is shown only.
* ```` ```console run ```` and ```` ```bash run ```` run line by line and must exit with 0; without ``run`` they are shown only.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import report

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "partwise"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```\s*$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)(?: \"[^\"]*\")?\)|(?:src|href|srcset)=\"(?P<html>[^\"]+)\"")
ERRORS = {"PartwiseError", "InputError", "RunError", "MissingExtra"}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    info: str
    code: str

    @property
    def language(self) -> str:
        return self.info.split(" ")[0]

    @property
    def runs(self) -> bool:
        if self.language == "python":
            return not self.info.startswith("python not-run: ")
        return self.language in {"console", "bash"} and self.info.split()[1:] == ["run"]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text[: match.start("code")].count("\n") + 1, match["info"].strip(), re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE))
        for match in FENCE.finditer(text)
    ]


def prose_of(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))


BLOCKS = {page: blocks_of(page) for page in PAGES}


def test_a_block_is_found_with_its_line_and_indentation(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n* item\n  ```python\n  x = 1\n  if x:\n      y = 2\n  ```\n```bash run\ntrue\n```\n```python not-run: needs a GPU\n1 / 0\n```\n")
    python, bash, shown = blocks_of(page)
    assert (python.line, python.code, python.runs) == (5, "x = 1\nif x:\n    y = 2\n", True)
    assert (bash.code, bash.runs, shown.runs) == ("true\n", True, False)


def pages_with_python() -> list[Any]:
    """Pages to run; those that load peft, and so probably train something, are slow."""
    python = {page: "".join(block.code for block in blocks if block.language == "python" and block.runs) for page, blocks in BLOCKS.items()}
    return [pytest.param(page, marks=pytest.mark.slow if "peft" in code else (), id=short(page)) for page, code in python.items() if code]


@pytest.mark.parametrize("page", pages_with_python())
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in BLOCKS[page]:
        if block.language == "python" and block.runs:
            # Padded, so that a traceback shows the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)  # noqa: S102 - our own pages


def commands_of(block: Block) -> list[str]:
    """Lines that a reader would type; of a console block only those after the prompt, without comments."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_commands_of_a_console_block_are_the_lines_after_the_prompt():
    assert commands_of(Block(ROOT, 1, "console run", "$ partwise list \\\n    tune\noutput\n$ true  # why\n")) == ["partwise list      tune", "true  # why"]
    assert commands_of(Block(ROOT, 1, "bash run", "# why\n\ntrue\n")) == ["true"]


def test_the_commands_of_the_pages_run(tmp_path: Path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}
    for page, blocks in BLOCKS.items():
        folder = tmp_path / short(page).replace("/", "-")
        folder.mkdir()
        for block in blocks:
            for command in commands_of(block) if block.language != "python" and block.runs else []:
                result = subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False)
                assert result.returncode == 0, f"{short(page)}, line {block.line}: {command}\n{result.stdout}\n{result.stderr}"


def anchors_of(page: Path) -> set[str]:
    """Anchors of the headings as GitHub builds them, and explicit ones."""
    text = FENCE.sub("", page.read_text())
    anchors, seen = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text)), defaultdict(int)
    for heading in re.findall(r"^#{1,6} +(.+?)\s*#*$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return anchors


def links_of(page: Path) -> Iterator[str]:
    for match in LINK.finditer(prose_of(page)):
        yield match["target"] or match["html"]


def broken_links_of(page: Path) -> list[str]:
    broken = []
    for link in links_of(page):
        address, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", address):
            continue  # another site; there is no network
        target = (page.parent / address).resolve() if address else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


def test_a_broken_link_is_seen(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` c!\n[ok](#a-b-c) [no](#a) [ok](page.md) ![no](no.png) `[no link](x)` <img src=\"gone.svg\"> [far](https://example.org/x)\n")
    assert broken_links_of(page) == ["#a", "no.png", "gone.svg"]


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_of_a_page_lead_somewhere(page: Path):
    assert not broken_links_of(page)


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = [(page.parent / link.partition("#")[0]).resolve() for link in links_of(page) if not re.match(r"[a-z]+:", link)]
        waiting += [target for target in targets if target.suffix == ".md" and target.exists()]
    assert not [short(page) for page in PAGES if page not in reached]


def test_generated_text_is_up_to_date():
    for page, text in report.generated_pages().items():
        assert page.exists(), f"{short(page)} is missing: run make docs"
        assert page.read_text() == text, f"{short(page)} is out of date: run make docs"


def error_classes_of(tree: ast.AST) -> set[str]:
    """Names by which a module may raise our errors: the known ones and classes derived from them."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return ERRORS | {node.name for node in classes if any(isinstance(base, ast.Name) and base.id in ERRORS for base in node.bases)}


def codes_of(path: Path) -> Iterator[str]:
    """First arguments of the errors that a module makes."""
    tree = ast.parse(path.read_text())
    classes = error_classes_of(tree)
    for node in ast.walk(tree):
        name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and name in classes:
            assert node.args, f"{short(path)}, line {node.lineno}: {name} needs its code as the first argument"
            yield from literals_of(node.args[0], path)


def literals_of(code: ast.expr, path: Path) -> Iterator[str]:
    """The texts that ``code`` may stand for: a literal, or one of two in a conditional expression."""
    if isinstance(code, ast.IfExp):
        yield from literals_of(code.body, path)
        yield from literals_of(code.orelse, path)
        return
    assert isinstance(code, ast.Constant), f"{short(path)}, line {code.lineno}: write the code of an error as a literal, so that it can be found"
    yield str(code.value)


def documented_codes() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "errors.md").read_text(), flags=re.MULTILINE)


def test_every_error_code_has_a_row_and_every_row_an_error():
    used = {code: short(path) for path in SOURCE.rglob("*.py") for code in codes_of(path)}
    documented = documented_codes()
    assert not {code: where for code, where in used.items() if code not in documented}, "codes without a row in docs/errors.md"
    assert not set(documented) - set(used), "rows in docs/errors.md for codes that nothing raises"
    assert documented == sorted(set(documented)), "rows in docs/errors.md are sorted and there is one for each code"
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code) for code in used)


@pytest.mark.parametrize("path", [path for path in sorted(SOURCE.rglob("*.py")) if ">>> " in path.read_text()], ids=short)
def test_examples_in_docstrings_are_true(path: Path):
    name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
