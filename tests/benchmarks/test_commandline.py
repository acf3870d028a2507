from __future__ import annotations

import commandline
from partwise.tune import METHODS


def test_every_method_has_its_flags_on_the_page():
    page = commandline.page("")
    for method in METHODS:
        section = page.partition(f"\n## partwise tune {method}\n")[2].partition("\n## ")[0]
        assert "--max-steps INT" in section, method
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
