"""What the Ray engine survives, counts and refuses. One Ray session for the whole file."""

from __future__ import annotations

import copy
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chain import Chain, chain
from faults import Faulty
from partwise.checks import InputError, RunError
from partwise.engine import _ray_flights, open_engine, ray_actors
from partwise.engine._ray_session import RaySession
from partwise.engine.inline import inline
from partwise.engine.ray_actors import RayActors
from partwise.rounds import run_async, run_rounds
from tolerances import assert_close

ray = pytest.importorskip("ray", reason="tests the Ray engine")
pytestmark = [pytest.mark.ray, pytest.mark.slow]
SAME_BITS = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster that the engines of the tests find, so that none of them starts its own."""
    with RayActors(2):
        yield


def inline_answer(num_rounds: int = 3) -> Chain:
    method, start = chain()
    return run_rounds(method, start, num_rounds=num_rounds)


def with_faults(folder: Path, faults: dict[tuple[int, int], str], *, num_rounds: int = 3, delay: float = 0.0, **options: Any) -> tuple[Chain, RayActors]:
    method, start = chain()
    with RayActors(2, **options) as engine:
        state = run_rounds(Faulty(method=method, folder=folder, faults=faults, delay=delay), start, num_rounds=num_rounds, engine=engine)
    return state, engine


def test_ray_and_inline_give_the_same_bits() -> None:
    method, start = chain()
    for num_workers in (1, 3):
        with RayActors(num_workers) as engine:
            state = run_rounds(method, start, num_rounds=3, engine=engine)
        assert_close(state.vectors, inline_answer().vectors, claim=f"{num_workers} workers", **SAME_BITS)


def test_the_method_travels_once_and_the_bytes_of_parts_and_results_are_counted() -> None:
    method, start = chain(num_parts=3, size=300)
    with RayActors(2) as engine:
        run_rounds(method, start, num_rounds=3, engine=engine)
    traffic = engine.traffic
    assert method.data.nbytes < traffic.placed_bytes < method.data.nbytes + 2000
    assert [(row.round_number, row.worker) for row in traffic.rows] == [(r, w) for r in (1, 2, 3) for w in (0, 1)]
    vector = 300 * 8
    for row in traffic.rows:
        num_parts = 2 if row.worker == 0 else 1
        assert 2 * num_parts * vector < row.bytes_down < 2 * num_parts * vector + 1000
        assert num_parts * vector < row.bytes_up < num_parts * vector + 1000
    assert traffic.to_json()["bytes_down"] == traffic.bytes_down == sum(row.bytes_down for row in traffic.rows)


def test_a_killed_worker_is_replaced_and_its_parts_are_sent_again(tmp_path: Path) -> None:
    state, engine = with_faults(tmp_path, {(1, 0): "kill", (2, 1): "kill"})
    assert_close(state.vectors, inline_answer().vectors, claim="a death costs time only", **SAME_BITS)
    assert (engine.traffic.num_lost, engine.traffic.num_reissued) == (2, 4)  # each worker holds two of the four parts


def test_a_part_that_kills_every_worker_ends_the_run_with_the_worker_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"worker 1 died at part 1, which was sent 3 times, expected it to live\. Look for a full memory") as caught:
        with_faults(tmp_path, {(1, n): "kill" for n in range(3)})
    assert caught.value.code == "worker-lost"


def test_a_straggler_is_sent_again_and_only_one_of_its_two_results_counts(tmp_path: Path) -> None:
    method, start = chain()
    faulty = Faulty(method=method, folder=tmp_path, faults={(1, 0): "delay"}, delay=4.0)
    with RayActors(2, timeout=2.0) as engine:  # long enough for a busy machine
        state = run_rounds(faulty, start, num_rounds=1, engine=engine)
        time.sleep(4.0)
        state = run_rounds(faulty, state, num_rounds=2, engine=engine)
    assert_close(state.vectors, inline_answer().vectors, claim="whichever came first", **SAME_BITS)
    assert engine.traffic.num_reissued == engine.traffic.num_late == engine.traffic.num_duplicate == 2  # both parts of the slow worker
    assert engine.traffic.num_lost == 0


def test_a_part_that_never_comes_in_time_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"part 0 was sent 2 times, last to worker 0 \(process \d+ on .*\), and got no answer within 0\.2 s") as caught:
        with_faults(tmp_path, {(0, n): "delay" for n in range(2)}, delay=30.0, timeout=0.2, max_attempts=2)
    assert caught.value.code == "worker-timeout"


def stop_first_worker(engine: RayActors) -> int:
    """Make worker 0 hang without dying, as a machine that swaps does."""
    pid = int(engine.workers[0].split("process ")[1].split()[0])
    os.kill(pid, signal.SIGSTOP)
    return pid


def assert_ends(*pids: int) -> None:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_worker_that_hangs_without_dying_is_passed_by_and_ended(caplog: pytest.LogCaptureFixture) -> None:
    method, start = chain()
    with open_engine("ray", num_workers=2, timeout=3.0) as engine:
        state = run_rounds(method, start, num_rounds=1, engine=engine)
        stopped = stop_first_worker(engine)
        state = run_rounds(method, state, num_rounds=2, engine=engine)
    assert_close(state.vectors, inline_answer().vectors, claim="a hanging worker costs time only", **SAME_BITS)
    assert (engine.traffic.num_reissued, engine.traffic.num_lost) == (2, 0)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"worker 0 (process {stopped} on 127.0.0.2) has not answered within 3 s: sending its parts to a fresh worker too"]
    assert_ends(stopped)


def test_without_a_timeout_a_worker_that_hangs_is_passed_by_after_a_multiple_of_the_slowest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ray_flights, "LEAST_S", 0.5)
    method, start = chain()
    with RayActors(2) as engine:
        state = run_rounds(method, start, num_rounds=1, engine=engine)
        engine._patience.slowest = 0.06  # the first answer takes longer where the machine is busy
        stop_first_worker(engine)
        state = run_rounds(method, state, num_rounds=2, engine=engine)
    assert_close(state.vectors, inline_answer().vectors, claim="a hanging worker costs time only", **SAME_BITS)
    assert engine.traffic.num_reissued == 2


def test_without_a_timeout_slow_parts_are_waited_for_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_ray_flights, "FIRST_S", 0.1)
    monkeypatch.setattr(_ray_flights, "LEAST_S", 0.1)
    monkeypatch.setattr(_ray_flights, "FACTOR", 0.0)
    state, _ = with_faults(tmp_path, {(0, n): "delay" for n in range(2)}, delay=3.0, num_rounds=1, max_attempts=2)
    assert_close(state.vectors, inline_answer(1).vectors, claim="slow is not wrong", **SAME_BITS)
    assert any("has not answered within 0.2 s, after its parts were sent 2 times: waiting on" in record.getMessage() for record in caplog.records)


def test_an_open_engine_is_pickled_as_its_settings() -> None:
    with RayActors(2, timeout=9.0, max_attempts=5) as engine:
        copied = pickle.loads(pickle.dumps(engine))  # noqa: S301 - written in the same line
    assert repr(copied) == repr(RayActors(2, timeout=9.0, max_attempts=5))
    with pytest.raises(InputError, match="RayActors is not open"):
        copied(chain()[0], [1])


@pytest.mark.parametrize("fault", ["nan", "shape", "index"])
def test_a_broken_result_is_refused_and_the_part_sent_again(tmp_path: Path, fault: str) -> None:
    state, engine = with_faults(tmp_path, {(3, 1): fault})
    assert_close(state.vectors, inline_answer().vectors, claim="nothing broken is merged", **SAME_BITS)
    assert (engine.traffic.num_refused, engine.traffic.num_reissued) == (1, 1)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("nan", r"worker 1 \(process \d+ on .*\) returned 1 NaN or infinite numbers out of 6 in vector; part 3 was sent 3 times"),
        ("shape", r"worker 1 .* returned a result that does not fit: got a vector of shape \(5,\), expected \(6,\)"),
        ("index", r"worker 1 .* returned a result for part 4; part 3 was sent"),
    ],
)
def test_broken_results_without_end_name_the_worker(tmp_path: Path, fault: str, text: str) -> None:
    with pytest.raises(RunError, match=text):
        with_faults(tmp_path, {(3, n): fault for n in range(3)})


def test_an_exception_of_the_method_names_the_worker_and_ends_the_run_at_once(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"worker 0 \(process \d+ on .*\) raised ZeroDivisionError: part 2 fell over, expected a result") as caught:
        with_faults(tmp_path, {(2, 0): "raise"})
    assert caught.value.code == "worker-failed"


@pytest.mark.parametrize("max_staleness", [None, 2])
def test_an_asynchronous_run_with_faults_replays_inline_to_the_same_bits(tmp_path: Path, max_staleness: int | None) -> None:
    method, start = chain()
    faulty = Faulty(method=method, folder=tmp_path, faults={(1, 1): "kill", (2, 0): "nan", (3, 1): "delay", (0, 2): "shape"}, delay=2.5)
    with RayActors(2, timeout=1.5) as engine:
        state, schedule = run_async(faulty, start, engine=engine, num_updates=20, max_staleness=max_staleness)
    assert schedule.num_updates == 20
    if max_staleness is not None:  # without a bound the other worker may be done with all updates before the death is noticed
        assert max(schedule.ages) <= max_staleness
        assert (engine.traffic.num_lost, engine.traffic.num_refused) == (1, 2)
    replayed, _ = run_async(method, start, schedule=schedule)
    assert_close(replayed.vectors, state.vectors, claim="what went wrong on the way is not in the schedule, and need not be", **SAME_BITS)


def test_an_asynchronous_run_that_is_stopped_leaves_a_usable_engine() -> None:
    method, start = chain()
    with RayActors(2) as engine:
        run_async(method, start, engine=engine, num_updates=50, stop=lambda _, after: after.num_rounds == 3)
        state = run_rounds(method, start, num_rounds=3, engine=engine)
    assert_close(state.vectors, inline_answer().vectors, claim="leftovers are dropped", **SAME_BITS)
    assert engine.traffic.num_late >= 1


class Refuses:
    def work(self, part: Any) -> Any:
        raise InputError("not-today", "got a part, expected none. Come back tomorrow.")


def test_an_error_for_the_user_comes_home_as_it_is() -> None:
    Refuses.__module__ = "__main__"  # so that it travels by value: workers cannot import this file
    with RayActors(1) as engine, pytest.raises(InputError, match="Come back tomorrow") as caught:
        engine(Refuses(), [0])
    assert caught.value.code == "not-today"


class Deadly:
    """Ends every process that unpickles it, as data do that are too large for the worker's memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return signal.raise_signal, (signal.SIGKILL,)


def test_a_method_that_no_worker_survives_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actors, "START_ATTEMPTS", 2)
    with RayActors(1) as engine:
        with pytest.raises(RunError, match=r"worker 0 died while it took over the method, 2 times, expected it to live") as caught:
            engine(Deadly(), [0])
        assert caught.value.code == "worker-lost"
        assert engine.traffic.num_lost == 2


def test_a_worker_that_does_not_start_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actors, "START_TIMEOUT_S", 1e-3)
    with RayActors(1) as engine, pytest.raises(RunError, match=r"worker 0 did not start within 0\.001 s, expected a free core") as caught:
        engine(chain()[0], [1])
    assert caught.value.code == "worker-not-started"


def test_an_engine_goes_on_after_an_error_and_with_another_method(tmp_path: Path) -> None:
    method, start = chain()
    with RayActors(2) as engine:
        with pytest.raises(RunError, match="fell over"):
            run_rounds(Faulty(method=method, folder=tmp_path, faults={(0, 0): "raise"}), start, num_rounds=1, engine=engine)
        state = run_rounds(method, start, num_rounds=3, engine=engine)
    assert_close(state.vectors, inline_answer().vectors, claim="what the failed round left behind does not count", **SAME_BITS)


def test_no_parts_need_no_worker_and_copies_share_the_engine() -> None:
    with RayActors(2) as engine:
        assert engine(chain()[0], []) == []
        assert copy.deepcopy(engine) is engine
        assert engine.traffic.rows == []
    with pytest.raises(InputError, match=r"RayActors is not open, expected a call inside its block"):
        engine(*[chain()[0], [1]])


def test_workers_end_with_the_block_and_a_cluster_that_was_there_stays() -> None:
    method, start = chain()
    with RayActors(2) as engine:
        run_rounds(method, start, num_rounds=1, engine=engine)
        names = [re.fullmatch(r"worker (\d) \(process (\d+) on \S+\)", text) for text in engine.workers]
    assert [name[1] for name in names if name] == ["0", "1"]
    assert engine.workers == ()
    assert_ends(*(int(name[2]) for name in names if name))
    assert ray.is_initialized()


def test_another_address_than_the_cluster_of_the_process_is_refused() -> None:
    with pytest.raises(InputError, match=r"got address='127\.0\.0\.1:1' in a process that is connected to the Ray cluster at 127\.0\.0\.2:\d+"), RayActors(
        address="127.0.0.1:1"
    ):
        pass
    here = ray.get_runtime_context().gcs_address
    with open_engine("ray", num_workers=1, address=here) as engine:
        assert engine(chain()[0], []) == []


@pytest.mark.parametrize(("options", "text"), [({"num_workers": 0}, "num_workers=0 must be"), ({"timeout": 0}, r"got timeout=0, expected more than 0 seconds")])
def test_bad_settings_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        RayActors(**options)


def test_more_workers_than_parts_are_refused_before_anything_starts() -> None:
    with pytest.raises(InputError, match=r"got num_workers=5 for 4 parts, expected at most one each\. Pass num_workers=4 or fewer"):
        open_engine("ray", num_workers=5, num_parts=4)
    with open_engine("ray", num_parts=1) as engine:
        assert engine.num_workers == 1


OUTSIDE = """
import sys
from partwise.checks import InputError
from partwise.engine.ray_actors import RayActors
try:
    with RayActors(address=sys.argv[1]):
        pass
except InputError as error:
    sys.exit(f"{error.code}: {error}")
"""


def test_an_address_where_nobody_answers_is_refused_within_seconds() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    begin = time.monotonic()
    for given, text in [
        (address, f"cluster-unreachable: no Ray cluster answers at address='{address}' (["),
        ("nowhere", "cluster-address: got address='nowhere', expected host:port"),
    ]:
        result = subprocess.run([sys.executable, "-c", OUTSIDE, given], capture_output=True, text=True, check=False, env=os.environ)
        assert result.stderr.startswith(text)
    assert time.monotonic() - begin < 20


class Slow:
    """A Ray that does not start in time, so often."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures, self.calls = num_failures, list[str]()

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.calls.append("init")
        if self.calls.count("init") <= self.num_failures:
            raise Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup or the GCS is full.")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def test_a_local_cluster_that_does_not_start_is_tried_again_and_then_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for num_failures in (1, 2):
        slow = Slow(num_failures)
        monkeypatch.setattr("partwise.engine._ray_session.load_extra", lambda *_, slow=slow, **__: slow)
        if num_failures == 1:
            assert RaySession.open(None, num_cpus=1).ray is slow
            assert slow.calls == ["init", "shutdown", "init"]
            continue
        with pytest.raises(RunError, match=r"Ray did not start on this machine, 2 times \(The current node timed out .* is full\), expected") as caught:
            RaySession.open(None, num_cpus=1)
        assert caught.value.code == "cluster-not-started"
        assert slow.calls == ["init", "shutdown"] * 2


def test_inline_is_the_reference_of_this_file() -> None:
    method, start = chain()
    assert [result.index for result in inline(method, method.split(start))] == [0, 1, 2, 3]
