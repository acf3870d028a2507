from __future__ import annotations

import commandline
from partwise.decompose.job import methods_without_target
from partwise.tune import METHODS


def test_every_method_has_its_flags_on_the_page():
    page = commandline.page("")
    expected = {f"tune {method}": "--max-steps INT" for method in METHODS} | {f"decompose {method}": "--n-components" for method in methods_without_target()}
    for command, flag in expected.items():
        section = page.partition(f"\n## partwise {command}\n")[2].partition("\n## ")[0]
        assert flag in section, command
    assert "\n## partwise doctor\n" in page


def test_the_page_stays_as_it_is_when_only_the_layout_differs():
    page = commandline.page("")
    other_layout = page.replace("--max-steps INT ", "--max-steps INT\n    | ")
    assert other_layout != page
    assert commandline.page(other_layout) == other_layout
    assert commandline.page(page.replace("--max-steps", "--num-steps")) == page


def test_every_command_prints_its_help():
    for command in commandline.commands():
        assert len(commandline.help_of(command)) > 40, command
