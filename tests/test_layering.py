"""What the source may import, contain and be called; and how light it is to load."""

from __future__ import annotations

import ast
import json
import os
import resource
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import partwise

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "partwise"
MODULES = sorted(SOURCE.rglob("*.py"))
ALL_CODE = sorted([*MODULES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("examples/**/*.py")])
# The rooms that the design knows, so that a file of a future room is judged as one too.
ROOMS = {"tune", "train", "prune", "serve", "federate", "decompose", "solve", "measure", "optim"}
# From the bottom up. A unit may import itself and units in lower rows. A new top-level file needs a place here.
LAYERS: tuple[set[str], ...] = (
    {"partwise"},  # the version and the names of the rooms
    {"checks"},
    {"linalg", "atomic_files", "text_files"},
    {"engine"},
    {"rounds", "selection", "models", "checkpoint", "ledger"},
    {"runs", "figures", "commands", "text_rows"},
    {"report", "flags", "opened_models"},
    ROOMS,
    {"doctor", "saved_models"},
    {"cli"},
    {"__main__"},
)
BANNED_STEMS = {"utils", "util", "helpers", "helper", "common", "misc", "core", "base"}
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "sklearn", "scipy", "matplotlib", "pandas", "ray", "flwr", "numpy"}
PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
MAX_LINES, MAX_BODY_LINES = 500, 60


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_names(source: str) -> list[str]:
    """Dotted names that a source file imports anywhere, late and type-checking imports included."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def units_imported_by(source: str) -> set[str]:
    """First-level parts of this package that ``source`` imports."""
    units = {part for path in SOURCE.iterdir() if (part := path.stem) not in {"__init__", "__pycache__"}} | ROOMS
    ours = [name.split(".") for name in imported_names(source) if name.split(".")[0] == "partwise"]
    return {parts[1] if len(parts) > 1 and parts[1] in units else "partwise" for parts in ours}


def unit_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return "partwise" if parts == ("__init__",) else parts[0]


def level_of(unit: str) -> int:
    for level, units in enumerate(LAYERS):
        if unit in units:
            return level
    raise AssertionError(f"src/partwise/{unit} has no place in LAYERS of tests/test_layering.py: say what it may import and who may import it")


def test_every_way_to_import_a_unit_is_seen():
    source = "import partwise.tune\nfrom partwise import selection, ROOMS\ndef f():\n    from partwise.decompose.x import y\n"
    assert units_imported_by(source) == {"tune", "selection", "partwise", "decompose"}


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_imports_point_down_only_and_no_room_imports_a_room(path: Path):
    unit = unit_of(path)
    for imported in units_imported_by(path.read_text()) - {unit}:
        assert level_of(imported) < level_of(unit), f"{short(path)} imports partwise.{imported}, which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_imports_are_absolute(path: Path):
    assert not [name for name in imported_names(path.read_text()) if name.startswith(".")]


@pytest.mark.parametrize("path", ALL_CODE, ids=short)
def test_names_of_files_say_something(path: Path):
    assert path.stem.strip("_") not in BANNED_STEMS
    assert all(part not in BANNED_STEMS for part in path.relative_to(ROOT).parts)


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_no_module_has_the_name_of_a_standard_module(path: Path):
    assert path.stem not in sys.stdlib_module_names - {"__main__"}


def test_no_package_is_under_tests():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_package_has_an_init_file():
    folders = {parent for path in MODULES for parent in path.parents if SOURCE in (parent, *parent.parents)}
    assert not [short(folder) for folder in folders if not (folder / "__init__.py").exists()]


@pytest.mark.parametrize("path", ALL_CODE, ids=short)
def test_files_stay_short_and_ascii(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert text.isascii(), f"{short(path)}: {[letter for letter in text if not letter.isascii()][:5]}"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_functions_stay_short(path: Path):
    for function in functions(ast.parse(path.read_text())):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        num_lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
        assert num_lines <= MAX_BODY_LINES, f"{short(path)}: {function.name} has {num_lines} lines"


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem != "cli"], ids=short)
def test_only_the_command_line_prints(path: Path):
    tree = ast.parse(path.read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"print", "rprint", "input"}
    attributes = {(node.value.id, node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    assert not attributes & {("sys", "stdout"), ("sys", "__stdout__"), ("rich", "print")}


def dangers_in(source: str) -> set[str]:
    """Ways to run code that came with data: pickles, evaluated text, remote code."""
    tree = ast.parse(source)
    found = {f"import {name}" for name in imported_names(source) if name.split(".")[0] in PICKLING}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in {"load", "save"}:
            found.add(f"torch.{node.attr}")
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and {alias.name for alias in node.names} & {"load", "save"}:
            found.add("from torch import load")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec", "compile", "__import__"}:
            found.add(node.func.id)
        switched_off = isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is False
        if isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"} and not switched_off:
            found.add(node.arg)
    return found


def test_every_danger_is_seen():
    source = "import joblib\nfrom torch import load\ntorch.load(f)\neval(x)\nmodel.eval()\nf(trust_remote_code=flag)\nf(allow_pickle=False)\n"
    assert dangers_in(source) == {"import joblib", "from torch import load", "torch.load", "eval", "trust_remote_code"}
    assert dangers_in("import pickle as p\nfrom dill import loads\n") == {"import pickle", "import dill.loads"}


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_no_file_or_message_can_bring_code(path: Path):
    assert not dangers_in(path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_a_todo_names_the_event_that_ends_it(path: Path):
    with path.open("rb") as file:
        comments = [token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    todos = [comment for comment in comments if "TODO" in comment or "FIXME" in comment or "XXX" in comment]
    assert all("TODO(" in todo or " when " in todo or " once " in todo or " after " in todo for todo in todos), todos


def heavy_modules_after(code: str) -> tuple[set[str], float]:
    """Heavy packages loaded by ``code`` in a fresh process, and the processor seconds it took."""
    program = f"{code}\nimport sys, json\nsys.stderr.write(json.dumps(sorted({HEAVY!r} & set(sys.modules))))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("COVERAGE", "COV_"))}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return set(json.loads(result.stderr.splitlines()[-1])), seconds


HELP = """
import sys
from partwise.cli import main
sys.argv = ["partwise", "--help"]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
assert not code, code
"""
LIGHT = {
    "import partwise": "import partwise",
    "partwise --help": HELP,
    **{f"import partwise.{room}": f"import partwise.{room}" for room in partwise.ROOMS},
}


@pytest.mark.parametrize("name", LIGHT)
def test_loading_the_package_or_its_help_loads_nothing_heavy_and_takes_under_a_second(name: str):
    # Processor time, because a busy machine must not fail this; the best of three, because the first run compiles.
    runs = [heavy_modules_after(LIGHT[name]) for _ in range(3)]
    assert runs[0][0] == set(), f"{name} loads {sorted(runs[0][0])}"
    assert min(seconds for _, seconds in runs) < 1.0
