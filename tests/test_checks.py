from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from partwise.checks import (
    InputError,
    MissingExtra,
    PartwiseError,
    RunError,
    check_at_least,
    check_choice,
    check_finite,
    check_rank,
    load_extra,
)


@pytest.mark.parametrize("rank", [0, 5, 9, -1])
def test_a_rank_that_a_matrix_cannot_have_names_the_limit(rank: int):
    with pytest.raises(InputError, match=rf"r={rank} does not fit a matrix of shape \(6, 4\): it must be between 1 and 4\. Pass r=4") as caught:
        check_rank(rank, (6, 4), name="r")
    assert caught.value.code == "rank-out-of-range"


def test_the_limit_of_a_rank_comes_from_the_last_two_sides():
    check_rank(4, (2, 6, 4))
    with pytest.raises(InputError, match="between 1 and 4"):
        check_rank(5, (100, 6, 4))


def test_numbers_that_are_none_are_counted():
    check_finite(torch.zeros(3), name="weights")
    with pytest.raises(InputError, match="weights has 2 NaN or infinite entries out of 3") as caught:
        check_finite(torch.tensor([float("nan"), 0.0, float("-inf")]), name="weights")
    assert caught.value.code == "not-finite"


def test_an_unknown_name_lists_the_known_ones():
    check_choice("a", ["a", "b"], name="kind")
    with pytest.raises(InputError, match=r"kind='c' is not known\. Choose one of: a, b\.") as caught:
        check_choice("c", ["a", "b"], name="kind")
    assert caught.value.code == "unknown-choice"


@pytest.mark.parametrize("value", [1, 1.5, "3", True, None, float("nan")])
def test_a_count_must_be_an_integer_that_is_large_enough(value: object):
    with pytest.raises(InputError, match=r"num_rounds=.* must be an integer of at least 2") as caught:
        check_at_least(value, 2, name="num_rounds")
    assert caught.value.code == "below-minimum"


def test_a_numpy_integer_is_a_count():
    check_at_least(np.int64(2), 2, name="num_rounds")


def test_a_missing_library_names_the_command_that_installs_it():
    with pytest.raises(MissingExtra, match=r"no_such_library is not installed, and this needs it\. Run: pip install 'partwise\[report\]'") as caught:
        load_extra("no_such_library", extra="report")
    assert caught.value.code == "missing-extra"
    assert load_extra("json", extra="report").loads("1") == 1


def test_each_kind_of_error_is_also_the_builtin_one_and_has_its_own_exit_code():
    kinds = {InputError: (ValueError, 2), RunError: (RuntimeError, 3), MissingExtra: (ImportError, 4)}
    for kind, (builtin, exit_code) in kinds.items():
        assert issubclass(kind, PartwiseError)
        assert issubclass(kind, builtin)
        error = kind("some-code", "what to do")
        assert (str(error), error.code, error.exit_code) == ("what to do", "some-code", exit_code)


def test_checks_load_without_torch():
    subprocess.run([sys.executable, "-c", "import partwise.checks, sys; assert 'torch' not in sys.modules"], check=True)
