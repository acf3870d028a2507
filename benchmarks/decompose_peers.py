"""Time to a residual of 1e-6 against the solvers that people use: ARPACK, LOBPCG, and scikit-learn's PCA.

Every solver gets the data in memory as float64 and returns components; the clock runs over all it does, the covariance matrix included. It counts
processor time, of all threads, so that what else runs on the machine does not count; set OMP_NUM_THREADS=1 and it is what an idle machine would take.
Solvers take turns in one process, three times. The residual is the largest ``|S v - value v|`` over the largest eigenvalue, computed here on the
exact covariance.
Solvers with a tolerance get one that reaches it; randomized PCA has none, so it gets 20 power iterations, and the note says what was reached.
Real data come from a folder of data sets that is not part of the repository (``PARTWISE_DATA``, by default ../shared/data); without it they are
left out, with a line that says so. ``python benchmarks/decompose_peers.py [--only mnist] [--repeats 3]`` (minutes for each data set).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import eigsh, lobpcg
from sklearn.decomposition import PCA

from partwise.decompose import ParallelDeflationPCA
from partwise.decompose._covariance import covariance_of
from partwise.linalg.certificate import certify
from partwise.linalg.products import one_blas_thread
from rows import ROOT, Row, append

NAME = "decompose_peers"
TARGET = 1e-6
NUM_COMPONENTS = (10, 30)
Array = NDArray[np.float64]
Solver = Callable[[Array, int], Array]


def synthetic(spectrum: Array, *, num_samples: int = 5000, seed: int = 0) -> Array:
    """Gaussian rows with this covariance spectrum, rotated."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((len(spectrum), len(spectrum))))[0]
    return np.ascontiguousarray(rng.standard_normal((num_samples, len(spectrum))) * np.sqrt(spectrum) @ basis)


def loaders() -> Any:
    """The module that reads the real data sets, or None."""
    path = Path(os.environ.get("PARTWISE_DATA", ROOT.parent / "shared" / "data")) / "loaders.py"
    if not path.exists():
        print(f"MNIST and CIFAR-10 are left out: there is no {path}. Set PARTWISE_DATA to the folder that has them.")
        return None
    spec = importlib.util.spec_from_file_location("loaders", path)
    if spec is None or spec.loader is None:
        return None
    module = sys.modules["loaders"] = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def images(read: Callable[[], tuple[Any, ...]], num_samples: int) -> Array:
    return np.asarray(read()[0][:num_samples], dtype=np.float64).reshape(num_samples, -1) / 255


def data_sets() -> dict[str, tuple[str, Callable[[], Array]]]:
    """Short name -> what it is, and how to make it."""
    sets: dict[str, tuple[str, Callable[[], Array]]] = {
        "exponential": ("5,000 x 1,000, spectrum 1.1^-i", lambda: synthetic(1.1 ** -np.arange(1000.0))),
        "power-law": ("5,000 x 1,000, spectrum i^-1/2", lambda: synthetic(np.arange(1.0, 1001.0) ** -0.5)),
    }
    real = loaders()
    if real is not None:
        sets["mnist"] = ("MNIST, 20,000 x 784", lambda: images(real.mnist, 20_000))
        sets["cifar"] = ("CIFAR-10, 4,000 x 3,072", lambda: images(real.cifar10, 4000))
    return sets


def ours(X: Array, k: int) -> Array:
    return ParallelDeflationPCA(k, solver="lanczos", random_state=0).fit(X).components_


def power(X: Array, k: int) -> Array:
    return ParallelDeflationPCA(k, num_rounds=2000, random_state=0).fit(X).components_


def arpack(X: Array, k: int) -> Array:
    centred = X - X.mean(axis=0)
    return eigsh(centred.T @ centred / (len(X) - 1), k=k, which="LA", tol=TARGET / 2, rng=np.random.default_rng(0))[1].T


def locally_optimal(X: Array, k: int) -> Array:
    centred = X - X.mean(axis=0)
    covariance = centred.T @ centred / (len(X) - 1)
    largest = eigsh(covariance, k=1, which="LA", tol=1e-2, return_eigenvectors=False)[0]
    start = np.random.default_rng(0).standard_normal((X.shape[1], k))
    return lobpcg(covariance, start, tol=TARGET * largest, maxiter=1000, largest=True)[1].T


def scikit(**settings: Any) -> Solver:
    return lambda X, k: PCA(k, random_state=0, **settings).fit(X).components_


PEERS: dict[str, Solver] = {
    f"scipy.sparse.linalg.eigsh(covariance, which='LA', tol={TARGET / 2})": arpack,
    f"scipy.sparse.linalg.lobpcg(covariance, tol={TARGET} * largest)": locally_optimal,
    f"sklearn PCA(svd_solver='arpack', tol={TARGET})": scikit(svd_solver="arpack", tol=TARGET),
    "sklearn PCA(svd_solver='randomized', iterated_power=20)": scikit(svd_solver="randomized", iterated_power=20),
    "sklearn PCA(svd_solver='covariance_eigh')": scikit(svd_solver="covariance_eigh"),
}
ARPACK = next(iter(PEERS))


def residual(covariance: Array, components: Array, largest: float) -> float:
    unit = components / np.linalg.norm(components, axis=1, keepdims=True)
    images_of = unit @ covariance
    values = np.einsum("kd,kd->k", unit, images_of)
    return float(np.linalg.norm(images_of - values[:, None] * unit, axis=1).max() / largest)


def measure(short: str, what: str, X: Array, k: int, repeats: int) -> None:
    centred = X - X.mean(axis=0)
    covariance = centred.T @ centred / (len(X) - 1)
    largest = float(eigsh(covariance, k=1, which="LA", return_eigenvectors=False)[0])
    del centred
    lanczos = repr(ParallelDeflationPCA(k, solver="lanczos", random_state=0))
    solvers: dict[str, Solver] = {lanczos: ours, **PEERS}
    rounds = repr(ParallelDeflationPCA(k, num_rounds=2000, random_state=0))
    if short != "cifar" and k == 10:  # minutes otherwise, and no other lesson
        solvers[rounds] = power
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    reached: dict[str, float] = {}
    started = time.perf_counter()
    for _ in range(repeats):
        for name, solve in solvers.items():
            before = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                components = solve(X, k)
            seconds[name].append(time.process_time() - before)
            reached[name] = residual(covariance, components, largest)
        print(what, k, {name[:45]: (round(times[-1], 2), f"{reached[name]:.0e}") for name, times in seconds.items()}, flush=True)
    total = time.perf_counter() - started
    for peer in [*PEERS, *([rounds] if rounds in solvers else [])]:
        asked = peer == ARPACK
        append(
            NAME,
            Row(
                claim=f"Processor time to a residual of {TARGET:g}: {what}, {k} components",
                method=lanczos,
                values=seconds[lanczos],
                unit="seconds",
                seeds=tuple(range(repeats)),
                seconds=total,
                baseline=peer,
                baseline_values=seconds[peer],
                expected="at most twice as long, median" if asked else "",
                held=statistics.median(seconds[lanczos]) <= 2 * statistics.median(seconds[peer]) if asked else None,
                note=f"Reached: {reached[lanczos]:.0e} and {reached[peer]:.0e}"
                + (", short of the target." if reached[peer] > TARGET else ".")
                + f" {threads()}",
            ),
        )
    measure_certificate(what, X, k, repeats)


def measure_certificate(what: str, X: Array, k: int, repeats: int) -> None:
    """Share of the fit that the certificate takes: fits and certificates take turns."""
    started = time.perf_counter()
    model, covariance, shares = ParallelDeflationPCA(k, solver="lanczos", random_state=0), covariance_of(X), []
    for _ in range(repeats):
        before = time.process_time()
        model.fit(X)
        fit = time.process_time() - before
        with one_blas_thread():
            certify(covariance.product, model.components_, seed=0)
        shares.append((time.process_time() - before - fit) / fit)
    append(
        NAME,
        Row(
            claim=f"Share of the fit that the certificate takes: {what}, {k} components",
            method=repr(model),
            values=shares,
            unit="share of the processor time of the fit",
            seeds=tuple(range(repeats)),
            seconds=time.perf_counter() - started,
            expected="at most 0.1, median",
            held=statistics.median(shares) <= 0.1,
            note=threads(),
        ),
    )


def threads() -> str:
    return f"Threads: OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="exponential, power-law, mnist or cifar")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--components", type=int, nargs="*", default=NUM_COMPONENTS)
    arguments = parser.parse_args()
    for short, (what, make) in data_sets().items():
        if arguments.only in (None, short):
            X = make()
            for k in arguments.components:
                measure(short, what, X, k, arguments.repeats)


if __name__ == "__main__":
    main()
