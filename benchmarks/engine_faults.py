"""What faults do to a result: nothing. At least 1,000 of them, over the inline engine and Ray, with the rounds of ParallelDeflationPCA.

Workers and whole runs are ended with ``kill -9``, results come late, twice, with NaN, in the wrong shape or for the wrong part, checkpoints are cut
short. Every run must end, and with the bits of a run in which nothing went wrong.

Run: ``python benchmarks/engine_faults.py`` (about 15 minutes on two cores); ``--small`` does a tenth and writes no rows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from faults import Faulty
from partwise.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from partwise.checks import RunError
from partwise.decompose._covariance import covariance_of
from partwise.decompose._eigen_rounds import Eigenpairs, ParallelDeflation, random_eigenpairs
from partwise.engine.inline import InlineWorkers, inline
from partwise.engine.ray_actors import RayActors
from partwise.rounds import run_async, run_rounds
from rows import Row, append

NAME = "engine_faults"
EXPECTED = "every run ends, with the bits of a run without faults"
NUM_PARTS, NUM_ROUNDS = 6, 30
LIMIT_S = 180.0  # of one run; a run that takes longer counts as hung
TIMEOUT_S = 0.3  # of a worker


@dataclass
class Tally:
    """Faults that were injected and runs that did not end as they should, for one kind of fault on one engine."""

    kind: str
    engine: str
    faults: list[int] = field(default_factory=list)  # one entry per run
    num_wrong: int = 0
    seconds: float = 0.0
    note: str = ""
    method: str = f"ParallelDeflation(solver='power', num_local_steps=2, tol=0), {NUM_PARTS} parts, {NUM_ROUNDS} rounds"

    @contextlib.contextmanager
    def run(self, *, limit_s: float = LIMIT_S) -> Iterator[None]:
        """One run: timed, and wrong when it does not end in time or raises."""
        begin = time.perf_counter()
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            yield
        except (TimeoutError, RunError, subprocess.CalledProcessError) as error:
            self.num_wrong += 1
            print(f"  WRONG: {self.kind}, {self.engine}: {error}", flush=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self.seconds += time.perf_counter() - begin

    def expect(self, holds: bool) -> None:
        """Count a run whose end is not what it should be."""
        if not holds:
            self.num_wrong += 1
            print(f"  WRONG: {self.kind}, {self.engine}: not the expected end", flush=True)

    def row(self) -> Row:
        """All runs as one row."""
        note = f"{sum(self.faults)} faults in {len(self.faults)} runs, {self.num_wrong} runs wrong or hung. {self.note}".strip()
        claim = f"No fault of this kind changes a bit of the result: {self.kind}, {self.engine}"
        return Row(
            claim=claim,
            method=self.method,
            values=tuple(map(float, self.faults)),
            unit="faults in a run",
            seeds=tuple(range(len(self.faults))),
            expected=EXPECTED,
            held=self.num_wrong == 0,
            seconds=self.seconds,
            note=note,
        )


def _too_long(*_: Any) -> None:
    raise TimeoutError("no end in time")


def problem() -> tuple[ParallelDeflation, Eigenpairs]:
    rows = np.random.default_rng(0).normal(size=(200, 60)) * np.arange(1, 61) ** -0.5
    method = ParallelDeflation(covariance=covariance_of(rows), num_local_steps=2, tol=0.0)
    return method, random_eigenpairs(NUM_PARTS, 60, seed=0)


METHOD, START = problem()
ANSWER = run_rounds(METHOD, START, num_rounds=NUM_ROUNDS)


def same(state: Eigenpairs, expected: Eigenpairs = ANSWER) -> bool:
    one, other = state.to_arrays(), expected.to_arrays()
    return all(np.array_equal(one[name], other[name]) for name in other)


def plan(kinds: Sequence[str], num_faults: int, *, seed: int) -> dict[tuple[int, int], str]:
    """Which part misbehaves the how-manieth time, and how. Part k joins in round k, so it works NUM_ROUNDS - k times at least."""
    rng = random.Random(seed)
    places = [(k, n) for k in range(NUM_PARTS) for n in range(NUM_ROUNDS - k)]
    return {place: rng.choice(kinds) for place in rng.sample(places, num_faults)}


def injected(folder: Path, faults: dict[tuple[int, int], str]) -> int:
    return sum((folder / f"{k}-{n}").exists() for k, n in faults)


@contextlib.contextmanager
def faulty(kinds: Sequence[str], num_faults: int, *, seed: int, tally: Tally, delay: float = 0.0) -> Iterator[Faulty]:
    """The method with planned faults; afterwards those that happened are counted."""
    with tempfile.TemporaryDirectory() as name:
        faults = plan(kinds, num_faults, seed=seed)
        try:
            yield Faulty(method=METHOD, folder=Path(name), faults=faults, delay=delay)
        finally:
            tally.faults.append(injected(Path(name), faults))


def broken_results(engine: Any, where: str, *, num_runs: int, num_faults: int) -> Tally:
    tally = Tally("NaN, wrong shape or another part's number in a result", where)
    for seed in range(num_runs):
        with tally.run(), faulty(["nan", "shape", "index"], num_faults, seed=seed, tally=tally) as method:
            tally.expect(same(run_rounds(method, START, num_rounds=NUM_ROUNDS, engine=engine)))
    return tally


def broken_results_async(engine: Any, where: str, *, num_runs: int, num_faults: int) -> Tally:
    tally = Tally("NaN, wrong shape or another part's number in a result, asynchronous, against the replay of its schedule", where)
    for seed in range(num_runs):
        with tally.run(), faulty(["nan", "shape", "index"], num_faults, seed=seed, tally=tally) as method:
            state, schedule = run_async(method, START, engine=engine, num_updates=NUM_PARTS * NUM_ROUNDS, max_staleness=3)
            tally.expect(same(state, run_async(METHOD, START, schedule=schedule)[0]))
    return tally


def duplicates(*, num_runs: int) -> Tally:
    tally = Tally("a result arrives twice", "inline")
    for seed in range(num_runs):
        rng, count = random.Random(seed), [0]

        def doubling(method: Any, parts: Sequence[Any], rng: random.Random = rng, count: list[int] = count) -> list[Any]:
            results = inline(method, parts)
            again = [result for result in results if rng.random() < 0.2]
            count[0] += len(again)
            return rng.sample([*results, *again], len(results) + len(again))

        with tally.run():
            tally.expect(same(run_rounds(METHOD, START, num_rounds=NUM_ROUNDS, engine=doubling)))
        tally.faults.append(count[0])
    return tally


def killed_workers(engine: RayActors, *, num_runs: int, num_faults: int) -> Tally:
    tally = Tally("kill -9 of a worker in the middle of its work", "ray")
    for seed in range(num_runs):
        with tally.run(), faulty(["kill"], num_faults, seed=seed, tally=tally) as method:
            tally.expect(same(run_rounds(method, START, num_rounds=NUM_ROUNDS, engine=engine)))
    return tally


def workers_killed_from_outside(engine: RayActors, *, num_runs: int) -> Tally:
    """At moments that nothing in the program decides."""
    tally = Tally("kill -9 of a worker from outside, at any moment", "ray")
    for seed in range(num_runs):
        rng, stop, count = random.Random(seed), threading.Event(), [0]

        def assassin(rng: random.Random = rng, stop: threading.Event = stop, count: list[int] = count) -> None:
            while not stop.wait(rng.uniform(0.3, 1.5)):
                process = re.search(r"process (\d+)", rng.choice(engine.workers or ("",)))
                if process:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(process[1]), signal.SIGKILL)
                        count[0] += 1

        thread = threading.Thread(target=assassin)
        thread.start()
        try:
            with tally.run():
                for _ in range(4):
                    with tempfile.TemporaryDirectory() as name:
                        slow = Faulty(method=METHOD, folder=Path(name), faults={(k, 10): "delay" for k in range(NUM_PARTS)}, delay=0.1)
                        tally.expect(same(run_rounds(slow, START, num_rounds=NUM_ROUNDS, engine=engine)))
        finally:
            stop.set()
            thread.join()
        tally.faults.append(count[0])
    return tally


def delays(*, num_runs: int, num_faults: int) -> Tally:
    tally = Tally("a worker takes longer than its timeout; later its result arrives twice", "ray")
    counts = np.zeros(2, dtype=int)
    with RayActors(2, timeout=TIMEOUT_S, max_attempts=10) as engine:
        for seed in range(num_runs):
            with tally.run(), faulty(["delay"], num_faults, seed=seed, tally=tally, delay=3 * TIMEOUT_S) as method:
                tally.expect(same(run_rounds(method, START, num_rounds=NUM_ROUNDS, engine=engine)))
        counts += [engine.traffic.num_late, engine.traffic.num_duplicate]
    tally.note = f"{counts[0]} late and {counts[1]} duplicate results were recognised."
    return tally


def everything_at_once(*, num_runs: int, num_faults: int) -> Tally:
    tally = Tally("killed workers, delays and broken results in one asynchronous run, against the replay of its schedule", "ray")
    with RayActors(2, timeout=1.0, max_attempts=10) as engine:
        for seed in range(num_runs):
            with tally.run(), faulty(["kill", "delay", "nan", "shape", "index"], num_faults, seed=seed, tally=tally, delay=1.5) as method:
                state, schedule = run_async(method, START, engine=engine, num_updates=NUM_PARTS * NUM_ROUNDS, max_staleness=3)
                tally.expect(same(state, run_async(METHOD, START, schedule=schedule)[0]))
    return tally


def save(folder: Path, state: Eigenpairs) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in state.to_arrays().items()}
    save_checkpoint(folder, step=state.num_rounds, tensors=tensors, state={})


def resumed(folder: Path, *, progress: Callable[[int, Eigenpairs], None] | None = None) -> Eigenpairs:
    """What a resumed run does: the newest checkpoint, or the start when there is none, and on to the last round."""
    newest = latest_checkpoint(folder) if folder.exists() else None
    state = START
    if newest is not None:
        state = Eigenpairs.from_arrays({name: tensor.numpy() for name, tensor in load_checkpoint(newest)[0].items()})
    left = NUM_ROUNDS - state.num_rounds
    return run_rounds(METHOD, state, num_rounds=left, progress=progress) if left else state


def killed_processes(*, num_runs: int, num_faults: int) -> Tally:
    """A child process runs, saves after every round, and is killed; the next goes on from what it left."""
    tally = Tally("kill -9 of the process that drives the rounds, which saves every round", "inline")
    rng = random.Random(0)
    for _ in range(num_runs):
        with tally.run(), tempfile.TemporaryDirectory() as name:
            folder, num_killed = Path(name) / "checkpoints", 0
            for _ in range(num_faults):
                child = os.fork()
                if child == 0:
                    resumed(folder, progress=lambda _, state, folder=folder: save(folder, state))
                    os._exit(0)
                time.sleep(rng.uniform(0.001, 0.02))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                num_killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            tally.expect(same(resumed(folder)))
            tally.faults.append(num_killed)
    return tally


def cut_checkpoints(*, num_runs: int) -> Tally:
    """A checkpoint that is cut short anywhere must be refused; the one before it leads to the same bits."""
    tally = Tally("a checkpoint is cut short", "inline")
    for seed in range(num_runs):
        rng = random.Random(seed)
        with tally.run(), tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run_rounds(METHOD, START, num_rounds=rng.randrange(2, NUM_ROUNDS), progress=lambda _, state, folder=folder: save(folder, state))
            newest = latest_checkpoint(folder)
            assert newest is not None
            victim = rng.choice(sorted(newest.iterdir()))
            os.truncate(victim, rng.randrange(victim.stat().st_size))
            try:
                resumed(folder)
            except RunError as error:
                tally.expect(str(newest) in str(error))
            else:
                tally.expect(False)
            shutil.rmtree(newest)
            tally.expect(same(resumed(folder)))
            tally.faults.append(1)
    return tally


def command(folder: Path, out: str, *flags: str) -> list[str]:
    settings = ["--n-components", "4", "--num-rounds", "600", "--tol", "0", "--seed", "1", "--checkpoint-every", "5"]
    return [sys.executable, "-m", "partwise", "decompose", "parallel-deflation-pca", str(folder / "x.npy"), *settings, "--out", str(folder / out), *flags]


def killed_commands(where: str, *flags: str, num_faults: int, num_cut: int) -> Tally:
    """The command itself is killed again and again, some checkpoints are cut short, and ``--resume`` goes on."""
    tally = Tally("kill -9 of the command, and checkpoints cut short, then --resume", where)
    rng, num_killed, num_left = random.Random(1), 0, num_cut
    with tally.run(limit_s=(num_faults + num_cut) * 60), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(400, 200)) * np.arange(1, 201) ** -0.5)
        subprocess.run(command(folder, "whole"), check=True, capture_output=True)
        metrics, resume = folder / "killed" / "metrics.jsonl", []
        while num_killed < num_faults:
            begin = _num_lines(metrics)
            process = subprocess.Popen(command(folder, "killed", *flags, *resume), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            goal = begin + rng.randrange(5, 550 // num_faults)
            while process.poll() is None and _num_lines(metrics) < goal:
                time.sleep(0.002)
            process.kill()
            num_killed += process.wait() == -signal.SIGKILL
            resume = ["--resume"] if (folder / "killed" / "run.json").exists() else []
            if num_left and (newest := latest_checkpoint(folder / "killed" / "checkpoints")):
                num_left -= 1
                victim = rng.choice(sorted(newest.iterdir()))
                os.truncate(victim, rng.randrange(victim.stat().st_size))
                refused = subprocess.run(command(folder, "killed", *flags, *resume), check=False, capture_output=True, text=True)
                tally.expect(refused.returncode == 3 and "checkpoint-damaged" in refused.stderr)
                shutil.rmtree(newest)
            if process.returncode == 0:
                break
        subprocess.run(command(folder, "killed", *flags, *resume), check=True, capture_output=True)
        whole, killed = ((folder / run / "result" / "components.safetensors").read_bytes() for run in ("whole", "killed"))
        tally.expect(whole == killed)
    tally.faults.append(num_killed + num_cut - num_left)
    tally.note = f"Killed {num_killed} times."
    tally.method = "partwise decompose parallel-deflation-pca --n-components 4 --num-rounds 600 --tol 0 --checkpoint-every 5"
    return tally


def _num_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def tallies(scale: float) -> Iterator[Tally]:
    def some(number: int) -> int:
        return max(1, round(number * scale))

    yield broken_results(InlineWorkers(max_attempts=10), "inline", num_runs=some(5), num_faults=40)
    yield broken_results_async(InlineWorkers(max_attempts=10), "inline", num_runs=some(3), num_faults=40)
    yield duplicates(num_runs=some(5))
    yield cut_checkpoints(num_runs=some(150))
    yield killed_processes(num_runs=some(10), num_faults=15)
    with RayActors(2):  # the cluster that the others find
        with RayActors(2, max_attempts=10) as engine:
            yield broken_results(engine, "ray", num_runs=some(5), num_faults=40)
            yield broken_results_async(engine, "ray", num_runs=some(3), num_faults=40)
            yield killed_workers(engine, num_runs=some(10), num_faults=6)
            yield workers_killed_from_outside(engine, num_runs=some(5))
        yield delays(num_runs=some(5), num_faults=6)
        yield everything_at_once(num_runs=some(4), num_faults=12)
    yield killed_commands("inline", num_faults=some(25), num_cut=some(5))
    yield killed_commands("ray", "--engine", "ray", "--num-workers", "2", num_faults=some(8), num_cut=some(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tenth of the faults, and no rows")
    small = parser.parse_args().small
    begin, done = time.perf_counter(), []
    for tally in tallies(0.1 if small else 1.0):
        done.append(tally)
        row = tally.row()
        print(f"{tally.seconds:6.0f} s  {row.claim}: {row.note}", flush=True)
        if not small:
            append(NAME, row)
    total = sum(sum(tally.faults) for tally in done)
    print(f"{total} faults in all, {sum(tally.num_wrong for tally in done)} runs wrong or hung")
    if not small:
        row = Row(
            claim="At least 1,000 faults were injected, over inline and Ray",
            method="ParallelDeflation(solver='power', num_local_steps=2, tol=0)",
            values=(float(total),),
            unit="faults",
            seeds=(0,),
            expected="at least 1,000",
            held=total >= 1000,
            seconds=time.perf_counter() - begin,
        )
        append(NAME, row)


if __name__ == "__main__":
    main()
