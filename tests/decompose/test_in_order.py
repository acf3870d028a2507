"""Claims of work on pieces with several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from partwise.decompose import _in_order
from partwise.decompose._in_order import map_in_order, num_threads


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(_in_order, "num_threads", lambda: request.param)
    return request.param


def test_results_come_in_the_order_of_the_pieces(threads: int) -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.01 if number % threads == 0 else 0.0)
        return number**2

    assert list(map_in_order(slow_first, range(20))) == [number**2 for number in range(20)]
    assert list(map_in_order(slow_first, [])) == []


def test_pieces_are_drawn_only_as_far_ahead_as_memory_allows(threads: int) -> None:
    drawn: list[int] = []

    def pieces() -> Iterator[int]:
        for number in range(20):
            drawn.append(number)
            yield number

    for done, _ in enumerate(map_in_order(lambda number: number, pieces(), bytes_each=100, limit_bytes=300)):
        assert len(drawn) - done <= max(2, 3)


def test_what_a_piece_raises_is_raised_here_and_the_rest_is_given_up(threads: int) -> None:
    seen: list[int] = []

    def fail_at_three(number: int) -> int:
        seen.append(number)
        if number == 3:
            raise RuntimeError("piece 3")
        return number

    results = map_in_order(fail_at_three, range(1000))
    with pytest.raises(RuntimeError, match="piece 3"):
        list(results)
    assert len(seen) < 20
    assert list(map_in_order(abs, range(5))) == [0, 1, 2, 3, 4]


def test_pieces_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_in_order, "num_threads", lambda: 2)
    meet = threading.Barrier(2, timeout=30)  # breaks unless two pieces wait for each other
    assert len(list(map_in_order(lambda _: meet.wait(), range(4)))) == 4


def test_the_number_of_threads_is_that_of_the_cores_or_what_the_engine_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3})
    for wanted, expected in (("", 4), ("2", 2), ("9", 4), ("0", 1), ("2,1", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
        assert num_threads() == expected
