"""How the cost of a round grows with components, features, rows and workers: fitted exponents beside those of the formula.

An exponent is the slope of a line through the logarithms of size and cost. The formula counts multiplications and goes through the same fit, so that
it needs no asymptotics: a round of K components with T local steps costs ``(T + 1) K`` products with the matrix and ``T K (K - 1) d`` for what the
components in front take away; a product costs ``d^2`` when the matrix is formed and ``2 n d`` when it is not. What workers tell each other is counted
and not timed. Times are processor time, the smallest of several rounds; with worker processes, wall-clock time.
Run: ``python benchmarks/decompose_cost_exponents.py [--no-ray]`` (minutes on two cores).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np

from partwise.decompose import ParallelDeflationPCA
from partwise.decompose._covariance import Covariance, GramCovariance, covariance_of
from partwise.decompose._eigen_rounds import Eigenpairs, ParallelDeflation, random_eigenpairs
from partwise.engine import Engine, open_engine
from partwise.linalg.products import one_blas_thread
from rows import Row, append

NAME = "decompose_cost_exponents"
REPEATS = (0, 1, 2)
STEPS = 5
Clock = Callable[[], float]
METHOD = "ParallelDeflationPCA(tol=0)"


def formed(num_features: int) -> GramCovariance:
    """A covariance matrix that is there already; its entries do not change the cost."""
    half = np.random.default_rng(0).standard_normal((num_features, num_features)) / num_features**0.5
    return GramCovariance(half.T @ half, np.zeros(num_features), num_features, None)


def applied(num_rows: int, num_features: int) -> Covariance:
    """Data with fewer rows than features: every product passes over the rows."""
    return covariance_of(np.random.default_rng(0).standard_normal((num_rows, num_features)))


def everyone_working(covariance: Covariance, num_components: int) -> tuple[ParallelDeflation, Eigenpairs]:
    """A state in which all components have published, so that a round is a full one."""
    method = ParallelDeflationPCA(num_components, num_local_steps=STEPS, tol=0).round_method(covariance, 0)
    start = random_eigenpairs(num_components, covariance.num_features, seed=0)
    known = {name: array for name, array in start.to_arrays().items() if name not in ("updates", "values")}
    ones = np.ones(num_components)
    return method, Eigenpairs.from_arrays({**known, "updates": ones.astype(np.int64), "values": ones})


def seconds_per_round(method: ParallelDeflation, state: Eigenpairs, engine: Engine, *, clock: Clock = time.process_time, rounds: int = 5) -> float:
    """The fastest of several rounds, the first left out."""
    times = []
    for _ in range(rounds + 1):
        before = clock()
        method.merge(state, engine(method, method.split(state)))
        times.append(clock() - before)
    return min(times[1:])


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def report(claim: str, measured: Sequence[float], formula: float, *, started: float, note: str, expected: str = "", held: bool | None = None) -> None:
    row = Row(
        claim=claim,
        method=METHOD,
        values=tuple(measured),
        unit="exponent",
        seeds=REPEATS,
        seconds=time.perf_counter() - started,
        baseline="the formula",
        baseline_values=(formula,) * len(measured),
        expected=expected,
        held=held,
        note=note,
    )
    append(NAME, row)
    print(claim, [f"{value:.2f}" for value in measured], f"formula {formula:.2f}", flush=True)


def work_formed(num_components: int, num_features: int) -> float:
    return (STEPS + 1) * num_components * num_features**2 + STEPS * num_components * (num_components - 1) * num_features


def growth(claim: str, sizes: Sequence[int], make: Callable[[int], tuple[ParallelDeflation, Eigenpairs]], formula: Sequence[float], note: str) -> None:
    started, methods = time.perf_counter(), [make(size) for size in sizes]
    with open_engine("inline") as engine:  # sizes take turns, so that a busy machine slows all of them
        measured = [exponent(sizes, [seconds_per_round(*each, engine) for each in methods]) for _ in REPEATS]
    report(claim, measured, exponent(sizes, formula), started=started, note=f"{note} Sizes {', '.join(map(str, sizes))}.")


def time_grows() -> None:
    components, features, counts = (8, 16, 32, 64), (256, 512, 1024, 2048), (256, 512, 1024, 2048)
    matrix = formed(1024)
    growth(
        "Time of a round against the number of components",
        components,
        lambda size: everyone_working(matrix, size),
        [work_formed(size, 1024) for size in components],
        "1,024 features, the matrix formed.",
    )
    growth(
        "Time of a round against the number of features",
        features,
        lambda size: everyone_working(formed(size), 16),
        [work_formed(16, size) for size in features],
        "16 components, the matrix formed.",
    )
    growth(
        "Time of a round against the number of rows, the matrix not formed",
        counts,
        lambda size: everyone_working(applied(size, 4200), 8),
        [float(size) for size in counts],
        "4,200 features, 8 components; each product passes over the rows.",
    )


def forming_grows() -> None:
    """The one pass that forms the matrix."""
    started, sizes, measured = time.perf_counter(), (4000, 8000, 16_000, 32_000), []
    data = np.random.default_rng(0).standard_normal((max(sizes), 400))
    for _ in REPEATS:
        costs = []
        for size in sizes:
            times = []
            for _ in range(3):
                before = time.process_time()
                with one_blas_thread():
                    covariance_of(data[:size])
                times.append(time.process_time() - before)
            costs.append(min(times))
        measured.append(exponent(sizes, costs))
    report("Time to form the matrix against the number of rows", measured, 1.0, started=started, note="400 features. Once per fit.")


def floats_grow() -> None:
    """What workers tell each other, counted by the method in real rounds and again from the formula."""
    started, sizes, num_features = time.perf_counter(), (4, 8, 16, 32), 256
    matrix, sent = formed(num_features), []
    for size in sizes:
        method, state = everyone_working(matrix, size)
        sent.append(float(method.floats_sent(state, method.merge(state, method.work_all(method.split(state))))))
    formula = [float(num_features * (size + size * (size - 1) // 2)) for size in sizes]
    report(
        "Floats sent per round against the number of workers, one component each",
        [exponent(sizes, sent)] * len(REPEATS),
        exponent(sizes, formula),
        started=started,
        note=f"{num_features} features; K d up and d sum (k - 1) down. Counted, so all repetitions are equal.",
        expected="the same count at every size",
        held=sent == formula,
    )


def workers_share() -> None:
    """Ray workers on one machine: time of a round, and bytes to and from all workers."""
    matrix, workers, measured = formed(2000), (1, 2), []
    method, state = everyone_working(matrix, 16)
    started, traffic = time.perf_counter(), []
    for _ in REPEATS:
        costs = []
        for size in workers:
            with open_engine("ray", num_workers=size) as engine:
                costs.append(seconds_per_round(method, state, engine, clock=time.perf_counter))
                traffic.append((engine.traffic.bytes_down + engine.traffic.bytes_up) / max(row.round_number for row in engine.traffic.rows))
        measured.append(exponent(workers, costs))
    report(
        "Time of a round against the number of worker processes",
        measured,
        -1.0,
        started=started,
        note=f"2,000 features, 16 components, 1 and 2 processes of one thread on 2 shared cores, every part sent on its own; "
        f"{np.median(traffic) / 2**20:.1f} MiB per round in total. The formula leaves out what it costs to send. "
        "Two cores that other programs share cannot show a speed-up, so this row says what an exchange costs and not how rounds scale.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--no-ray", action="store_true", help="leave out the part that starts worker processes")
    arguments = parser.parse_args()
    time_grows()
    forming_grows()
    floats_grow()
    if not arguments.no_ray:
        workers_share()


if __name__ == "__main__":
    main()
