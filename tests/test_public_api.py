"""Every public name is documented, every method can be found, and the lists that say so agree."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import partwise

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "partwise"
ROOMS = partwise.ROOMS
SECTIONS = (
    "Parameters", "Attributes", "Returns", "Yields", "Raises", "Warns", "Warnings", "See Also", "Notes", "References", "Examples",
)  # fmt: skip


def load_room(room: str) -> ModuleType:
    return importlib.import_module(f"partwise.{room}")


def public_objects(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name in module.__all__:
        if name != "METHODS":
            yield f"{module.__name__}.{name}", getattr(module, name)


def load_method(target: str) -> type:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def sections_of(docstring: str) -> list[str]:
    """Underlined headings of a NumPy docstring, in order."""
    return re.findall(r"^([A-Z][A-Za-z ]+)\n-{3,}$", inspect.cleandoc(docstring), flags=re.MULTILINE)


def named_parameters(thing: Any) -> set[str]:
    """What a caller passes by name: fields of a dataclass, or arguments of a signature."""
    if dataclasses.is_dataclass(thing):
        return {field.name for field in dataclasses.fields(thing) if field.init}
    try:
        signature = inspect.signature(thing)
    except (ValueError, TypeError):  # a class written in C has none
        return set()
    variadic = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    return {name for name, parameter in signature.parameters.items() if parameter.kind not in variadic and name not in {"self", "cls"}}


def documented_parameters(docstring: str) -> set[str]:
    """Names in front of `` : type`` under Parameters and Attributes, several to a line allowed."""
    blocks = re.split(r"^(?=[A-Z][A-Za-z ]+\n-{3,}$)", inspect.cleandoc(docstring), flags=re.MULTILINE)
    lines = [line for block in blocks if block.startswith(("Parameters\n", "Attributes\n")) for line in block.splitlines()[2:]]
    heads = [line.partition(" : ")[0] for line in lines if line and not line.startswith(" ")]
    return {name.strip().lstrip("*") for head in heads for name in head.split(",")}


def documented_by_parents(thing: Any) -> set[str]:
    parents = inspect.getmro(thing)[1:] if inspect.isclass(thing) else ()
    return {name for parent in parents for name in named_parameters(parent)}


def test_the_package_names_its_rooms_and_version():
    assert set(partwise.__all__) == {"ROOMS", "__version__", "load"}
    assert "\nload : " in (partwise.__doc__ or "")
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", partwise.__version__)
    assert all(f"\n{room} : " in (partwise.__doc__ or "") for room in ROOMS)


def test_every_folder_that_is_no_layer_is_an_announced_room():
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")} - {"engine", "linalg", "models"}
    assert folders <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_of_a_room_exist_and_load_late(room: str):
    module = load_room(room)
    assert len(set(module.__all__)) == len(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    assert all(thing is not None for _, thing in public_objects(module))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_have_numpy_docstrings_that_name_every_parameter(room: str):
    for name, thing in public_objects(load_room(room)):
        if not callable(thing):
            continue
        text = inspect.getdoc(thing) or ""
        own = thing.__doc__ or ""
        assert own.strip(), f"{name} has no docstring of its own"
        assert text.splitlines()[0].endswith((".", "?", ":")), f"{name}: the first line is no sentence"
        headings = [heading for heading in sections_of(text) if heading in SECTIONS]
        assert headings == [section for section in SECTIONS if section in headings], f"{name}: sections in the wrong order: {headings}"
        missing = named_parameters(thing) - documented_by_parents(thing) - documented_parameters(text)
        assert not missing, f"{name} does not document {sorted(missing)}"


@pytest.mark.parametrize("room", ROOMS)
def test_methods_are_lazy_names_of_classes_that_cite_their_paper(room: str):
    methods = load_room(room).METHODS
    assert methods, f"{room} has no METHODS"
    for name, target in methods.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name), f"{name} is not kebab-case"
        assert re.fullmatch(rf"partwise\.{room}(\.\w+)+:\w+", target), f"{name}: {target} is not module:Class"
        method = load_method(target)
        assert inspect.isclass(method)
        text = method.__doc__ or ""
        assert "References" in sections_of(text), f"{target} has no References section"
        assert re.search(r"arXiv:\d{4}\.\d{4,5}|https?://|doi:", text, flags=re.IGNORECASE), f"{target} cites nothing that can be opened"


@pytest.mark.parametrize("room", ROOMS)
def test_the_index_of_a_room_lists_every_method_with_what_it_does(room: str):
    module = load_room(room)
    for name in module.METHODS:
        line = rf"^\s*([-*] )?`*{re.escape(name)}`* (-|:) \S+"
        assert re.search(line, module.__doc__ or "", flags=re.MULTILINE), f"the docstring of {room} has no line '{name} - ...'"


@pytest.mark.parametrize("room", ROOMS)
def test_every_method_has_a_page_with_the_five_things_a_page_says(room: str):
    for name in load_room(room).METHODS:
        page = ROOT / "docs" / "methods" / f"{name}.md"
        assert page.exists(), f"{name} has no page docs/methods/{name}.md"
        text = page.read_text()
        assert "```python" in text or "```bash" in text, f"{page.name} has no lines that run"
        assert re.search(r"^#+ .*when not to use", text, flags=re.MULTILINE | re.IGNORECASE), f"{page.name} has no section on when not to use it"
        assert re.search(r"^#+ .*differen", text, flags=re.MULTILINE | re.IGNORECASE), f"{page.name} has no section on differences from the paper"
        assert "<!-- claims:" in text or "claims.md" in text, f"{page.name} does not lead to what was measured"


def test_every_page_of_a_method_belongs_to_a_method():
    methods = {name for room in ROOMS for name in importlib.import_module(f"partwise.{room}").METHODS}
    pages = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages <= methods


def test_public_functions_of_the_shapes_are_documented_like_those_of_rooms():
    for path in sorted(SOURCE.glob("*.py")):
        if path.stem in {"__init__", "__main__", "cli"}:
            continue
        module = importlib.import_module(f"partwise.{path.stem}")
        for name, thing in vars(module).items():
            if callable(thing) and not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__:
                assert (thing.__doc__ or "").strip(), f"{module.__name__}.{name} has no docstring"
