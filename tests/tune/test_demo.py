from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from partwise.checks import InputError
from partwise.tune import demo
from partwise.tune._data import DataSettings, TaskData, read_task_data
from partwise.tune.demo import PACKAGES, demo_examples


@pytest.fixture(scope="module")
def data() -> TaskData:
    return demo_examples()


def write_library(folder: Path, **docstrings: list[str]) -> Path:
    for name, texts in docstrings.items():
        body = "\n".join(f"def f{number}():\n    '''{text}'''" for number, text in enumerate(texts))
        (folder / f"{name}.py").write_text(body)
    return folder


def test_there_are_twenty_packages_and_800_held_out_rows(data):
    assert data.task == "classification"
    assert data.label_names == PACKAGES
    assert len(data.valid) == 800
    assert len(data.train) > 1500


def test_no_class_is_large_and_each_gives_its_share_to_the_held_out_rows(data):
    train, valid = Counter(data.train.targets), Counter(data.valid.targets)
    share = 800 / (len(data.train) + 800)
    for target in range(20):
        assert 40 <= train[target] + valid[target] <= demo.MAX_PER_CLASS
        assert abs(valid[target] - share * (train[target] + valid[target])) <= 1


def test_no_text_holds_the_name_of_any_package(data):
    texts = [text.lower() for text in data.train.texts + data.valid.texts]
    assert [name for name in PACKAGES if any(name in text for text in texts)] == []


def test_no_text_occurs_twice_so_none_is_both_learnt_and_measured(data):
    texts = data.train.texts + data.valid.texts
    assert len(set(texts)) == len(texts)


def test_texts_are_short_and_have_a_few_words(data):
    for text in data.train.texts + data.valid.texts:
        assert len(text) <= demo.MAX_CHARACTERS
        assert len(text.split()) >= demo.MIN_WORDS


def test_two_calls_give_the_same_rows_and_another_seed_gives_another_split_of_them(data):
    assert demo_examples().fingerprint == data.fingerprint
    other = demo_examples(1)
    assert sorted(other.train.texts + other.valid.texts) == sorted(data.train.texts + data.valid.texts)
    assert other.valid.texts != data.valid.texts


def test_the_default_data_of_the_command_are_the_docstrings(data):
    assert read_task_data(DataSettings()).fingerprint == data.fingerprint


def test_the_rows_do_not_depend_on_the_hash_seed(data):
    program = "from partwise.tune.demo import demo_examples; print(demo_examples().fingerprint)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == data.fingerprint


def test_no_module_is_imported_for_its_docstrings(tmp_path):
    texts = [f"text number {number} has five words" for number in range(4)]
    library = write_library(tmp_path, doctest=texts, mailbox=[text + " more" for text in texts])
    (library / "doctest.py").write_text((library / "doctest.py").read_text() + "\nraise SystemExit('imported')\n")
    assert demo_examples(library=library).label_names == ("doctest", "mailbox")


def test_tests_are_left_out_and_private_twins_count_for_their_package(tmp_path):
    write_library(
        tmp_path, _pydecimal=["sum of two exact numbers", "product of two exact numbers"], mailbox=["open one box of mail", "close one box of mail"]
    )
    (tmp_path / "unittest" / "test").mkdir(parents=True)
    write_library(tmp_path / "unittest" / "test", test_case=["one case of a test", "two cases of a test"])
    data = demo_examples(library=tmp_path)
    assert data.label_names == ("decimal", "mailbox")


def test_names_are_masked_inside_words_and_in_any_case(tmp_path):
    write_library(
        tmp_path,
        http=["Open an HTTPConnection to the given host", "Close the base of httpd now please"],
        mailbox=["Send this Email to the mailboxes", "Keep all of the letters here"],
    )
    texts = set(demo_examples(library=tmp_path).train.texts + demo_examples(library=tmp_path).valid.texts)
    assert {"Open an ___Connection to the given host", "Close the base of ___d now please", "Send this ___ to the ___es"} <= texts


def test_a_docstring_of_two_packages_belongs_to_neither(tmp_path):
    shared = "Return the size of this thing"
    write_library(tmp_path, doctest=[shared, "one two three four five", "six five four three two"], mailbox=[shared, "a b c d e", "f g h i j"])
    data = demo_examples(library=tmp_path)
    assert shared not in data.train.texts + data.valid.texts


def test_sources_that_the_compiler_warns_of_are_read_in_silence(tmp_path):
    write_library(tmp_path, doctest=["one two three four five", "six five four three two"], mailbox=["a b c d e", "f g h i j"])
    path = tmp_path / "mailbox.py"
    path.write_text(path.read_text() + "\nPATTERN = '\\d'\n")
    with pytest.warns(SyntaxWarning if sys.version_info >= (3, 12) else DeprecationWarning):
        ast.parse(path.read_text())
    assert demo_examples(library=tmp_path).label_names == ("doctest", "mailbox")


def test_a_python_without_sources_is_told_to_bring_its_own_data(tmp_path):
    with pytest.raises(
        InputError, match=r"found the sources of 0 packages .* expected at least 2 of asyncio, .* Pass your own data with --data"
    ) as caught:
        demo_examples(library=tmp_path)
    assert caught.value.code == "no-library-source"
