"""Claims of the rounds behind ParallelDeflationPCA and EigenGame: what they equal, how fast they are, and what they survive."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from partwise.checks import InputError, RunError
from partwise.decompose._covariance import GramCovariance
from partwise.decompose._eigen_rounds import Eigenpairs, EigenResult, ParallelDeflation, random_eigenpairs
from partwise.decompose._eigen_steps import Ahead, Mover
from partwise.decompose._readers import rows_of
from partwise.linalg.products import one_blas_thread, tiled_product
from partwise.rounds import run_rounds
from tolerances import assert_close

EXPONENTIAL, POWER_LAW = 1.1 ** -np.arange(300.0), np.arange(1.0, 301.0) ** -0.5
UPDATES = ("deflation", "mu", "alpha")
SAME_BITS = {"rtol": 0.0, "atol": 0.0}


def covariance_with(spectrum: Sequence[float] | NDArray[Any], *, size: int | None = None, seed: int = 0) -> tuple[GramCovariance, NDArray[Any]]:
    """A covariance with these eigenvalues, and its eigenvectors as rows."""
    size = size or len(spectrum)
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0][:, : len(spectrum)].T  # (k, d)
    matrix = (basis.T * np.asarray(spectrum)) @ basis
    return GramCovariance((matrix + matrix.T) / 2, np.zeros(size), 1000, None), np.ascontiguousarray(basis)


def with_rows(spectrum: Sequence[float] | NDArray[Any], *, num_samples: int = 400, seed: int = 0) -> GramCovariance:
    """The covariance of random rows, which batches can be drawn from."""
    rows = np.random.default_rng(seed).standard_normal((num_samples, len(spectrum))) * np.sqrt(spectrum)
    mean = rows.mean(axis=0)
    return GramCovariance((rows - mean).T @ (rows - mean) / (num_samples - 1), mean, num_samples, rows_of(rows))


def errors(state: Eigenpairs, basis: NDArray[Any]) -> NDArray[Any]:
    """Distance of each vector from its eigenvector, signs aside."""
    overlaps = np.abs((state.vectors * basis[: len(state.vectors)]).sum(axis=1))
    return np.sqrt(np.clip(2 - 2 * overlaps, 0, None))


def run(method: ParallelDeflation, num_components: int, *, num_rounds: int, seed: int = 0, **options: Any) -> Eigenpairs:
    start = random_eigenpairs(num_components, method.covariance.num_features, seed=seed, with_moments=method.solver == "adam")
    return run_rounds(method, start, num_rounds=num_rounds, stop=lambda _, state: method.settled(state), **options)


def rounds_to(method: ParallelDeflation, basis: NDArray[Any], *, level: float, seed: int) -> int:
    """Rounds until every error is below ``level``."""
    state = random_eigenpairs(10, len(basis), seed=seed)
    for number in range(1, 400):
        state = method.merge(state, method.work_all(method.split(state)))
        if errors(state, basis).max() < level:
            return number
    raise AssertionError("never got there")


def test_one_component_is_the_power_iteration_bit_for_bit() -> None:
    covariance, _ = covariance_with(EXPONENTIAL)
    found = run(ParallelDeflation(covariance=covariance, num_local_steps=3, tol=0), 1, num_rounds=7)
    vector = random_eigenpairs(1, 300, seed=0).vectors[0]
    with one_blas_thread():
        for _ in range(21):
            image = tiled_product(vector[None], covariance.matrix)[0]
            vector = image / np.linalg.norm(image)
    assert_close(found.vectors[0], vector, claim="21 power steps", **SAME_BITS)


def test_many_local_steps_and_one_round_each_are_sequential_deflation() -> None:
    covariance, basis = covariance_with(EXPONENTIAL[:120])
    found = run(ParallelDeflation(covariance=covariance, num_local_steps=500, tol=0), 8, num_rounds=8)
    assert errors(found, basis).max() < 1e-7  # 2e-8 is what the measure makes of one unit in the last place


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("solver", ["power", "hebb", "adam"])
def test_exact_eigenvectors_sit_still_under_every_update(update: str, solver: str) -> None:
    covariance, basis = covariance_with(EXPONENTIAL[:60])
    start = random_eigenpairs(6, 60, seed=0, with_moments=solver == "adam")
    exact = replace(start, vectors=basis[:6].copy(), values=EXPONENTIAL[:6].copy(), updates=(1,) * 6)
    method = ParallelDeflation(covariance=covariance, solver=solver, update=update, tol=0)
    moved = method.merge(exact, method.work_all(method.split(exact)))
    # Adam divides rounding by the size of rounding: it may take its whole step, and is held at a fixed point by nothing else.
    limit = 0.1 if solver == "adam" else 1e-12
    assert np.abs(np.abs(moved.vectors) - np.abs(basis[:6])).max() < limit
    np.testing.assert_allclose(moved.values, EXPONENTIAL[:6], rtol=1e-2 if solver == "adam" else 1e-12)


@pytest.mark.parametrize(
    ("spectrum", "num_local_steps", "measured"),
    [(EXPONENTIAL, 5, 26), (POWER_LAW, 5, 44), pytest.param(EXPONENTIAL, 1, 90, marks=pytest.mark.slow)],
    ids=["exponential", "power law", "one step"],
)
def test_rounds_to_an_error_of_one_in_a_thousand(spectrum: NDArray[Any], num_local_steps: int, measured: int) -> None:
    counts = []
    for seed in range(5):
        covariance, basis = covariance_with(spectrum, seed=seed)
        counts.append(rounds_to(ParallelDeflation(covariance=covariance, num_local_steps=num_local_steps, tol=0), basis, level=1e-3, seed=seed))
    assert 0.7 * measured <= np.median(counts) <= 1.3 * measured, counts


def test_many_rounds_reach_the_floor_of_the_measure() -> None:
    covariance, basis = covariance_with(EXPONENTIAL)
    assert errors(run(ParallelDeflation(covariance=covariance, tol=0), 10, num_rounds=100), basis).max() <= 1e-7


@pytest.mark.parametrize(("lag", "limit"), [(1, 26), (3, 40), (8, 51)])
def test_stale_vectors_in_front_cost_rounds_and_no_accuracy(lag: int, limit: int) -> None:
    covariance, basis = covariance_with(EXPONENTIAL)
    method, rng = ParallelDeflation(covariance=covariance, tol=0), np.random.default_rng(0)
    states = [random_eigenpairs(10, 300, seed=0)]
    while errors(states[-1], basis).max() > 1e-7 and len(states) < 200:
        now, parts = states[-1], []
        for part in method.split(now):
            old = states[max(len(states) - 1 - int(rng.integers(lag + 1)), 0)]
            parts.append(replace(part, ahead_vectors=old.vectors[: part.index], ahead_values=old.values[: part.index]))
        states.append(method.merge(now, [method.work(part) for part in parts]))
    assert errors(states[-1], basis).max() <= 1e-7
    first = next(number for number, state in enumerate(states) if errors(state, basis).max() < 1e-3)
    assert first <= 1.3 * limit


METHODS: list[dict[str, Any]] = [
    *({"solver": solver, "update": update} for solver in ("power", "hebb", "adam") for update in UPDATES),
    *({"solver": "hebb", "update": update, "batch_size": 7} for update in UPDATES),
    {"solver": "adam", "update": "mu", "batch_size": 7},
    {"solver": "lanczos"},
    {"solver": "lanczos", "block_size": 2},
]


@pytest.mark.parametrize("chosen", METHODS, ids=repr)
@settings(max_examples=5)
@given(num_features=st.integers(23, 60), num_components=st.integers(1, 12), num_local_steps=st.integers(1, 3), seed=st.integers(0, 99))
def test_all_parts_at_once_give_the_bits_of_one_at_a_time(
    chosen: dict[str, Any], num_features: int, num_components: int, num_local_steps: int, seed: int
) -> None:
    covariance = with_rows(1.2 ** -np.arange(num_features), num_samples=30, seed=seed)
    method = ParallelDeflation(covariance=covariance, num_local_steps=num_local_steps, seed=seed, tol=1e-12, **chosen)
    state = random_eigenpairs(num_components, num_features, seed=seed, with_moments=method.solver == "adam")
    for _ in range(min(num_components, 4) + 1):
        parts = method.split(state)
        together, alone = method.work_all(parts), [method.work(part) for part in parts]
        for one, other in zip(together, alone, strict=True):
            for name, array in state_of(other).items():
                np.testing.assert_array_equal(state_of(one)[name], array, err_msg=name)
        state = method.merge(state, together)


def state_of(result: EigenResult) -> dict[str, Any]:
    return {item.name: np.asarray(getattr(result, item.name)) for item in dataclasses.fields(result) if getattr(result, item.name) is not None}


def test_parts_of_different_ages_in_one_batch_keep_their_own_vectors_in_front() -> None:
    covariance, _ = covariance_with(EXPONENTIAL[:40])
    method = ParallelDeflation(covariance=covariance, update="alpha", tol=0)
    states = [random_eigenpairs(4, 40, seed=0)]
    for _ in range(6):
        states.append(method.merge(states[-1], method.work_all(method.split(states[-1]))))
    parts = [*method.split(states[-3])[:3], method.split(states[-1])[3]]
    for one, part in zip(method.work_all(parts), parts, strict=True):
        np.testing.assert_array_equal(one.vectors, method.work(part).vectors)


@given(num_components=st.integers(1, 8), num_features=st.integers(8, 20))
def test_floats_of_a_round_follow_the_formula(num_components: int, num_features: int) -> None:
    covariance, _ = covariance_with(1.5 ** -np.arange(num_features))
    method = ParallelDeflation(covariance=covariance, tol=0)
    before = run(method, num_components, num_rounds=num_components)  # now everyone works
    after = method.merge(before, method.work_all(method.split(before)))
    behind = sum(k for k in range(num_components))
    assert method.floats_sent(before, after) == num_components * num_features + behind * num_features
    assert method.floats_sent(after, after) == 0


def test_blocks_exchange_their_vectors_as_one() -> None:
    covariance, _ = covariance_with(EXPONENTIAL[:40])
    method = ParallelDeflation(covariance=covariance, solver="lanczos", block_size=2, tol=1e-12)
    start = random_eigenpairs(5, 40, seed=0)
    first = method.merge(start, method.work_all(method.split(start)))
    second = method.merge(first, method.work_all(method.split(first)))
    assert method.num_parts(5) == 3
    assert method.floats_sent(start, first) == 2 * 40
    assert {k for k in range(5) if second.updates[k]} == {0, 1, 2, 3}


def test_vectors_become_orthogonal_though_nobody_makes_them_so() -> None:
    covariance, _ = covariance_with(EXPONENTIAL)
    found = run(ParallelDeflation(covariance=covariance, tol=1e-9), 10, num_rounds=500).vectors
    overlaps = np.abs(found @ found.T - np.eye(10))
    assert overlaps.max() < 1e-6


@pytest.mark.parametrize(("solver", "block_size"), [("power", None), ("hebb", None), ("lanczos", 1)])
def test_a_repeated_eigenvalue_gives_its_subspace(solver: str, block_size: int | None) -> None:
    covariance, basis = covariance_with([4.0, 2.0, 2.0, 2.0, *1.1 ** -np.arange(46.0)])
    found = run(ParallelDeflation(covariance=covariance, solver=solver, block_size=block_size, tol=1e-8), 4, num_rounds=500)
    inside = np.linalg.svd(np.linalg.qr(found.vectors.T)[0].T @ basis[:4].T, compute_uv=False)
    assert np.sqrt(max(0.0, 1 - inside.min() ** 2)) <= 1e-6


@given(seed=st.integers(0, 999), num_ahead=st.integers(1, 5))
def test_the_three_updates_agree_when_the_vectors_in_front_are_exact(seed: int, num_ahead: int) -> None:
    covariance, basis = covariance_with(1.3 ** -np.arange(12.0), seed=seed)
    vector = np.random.default_rng(seed).standard_normal(12)
    front, values = basis[:num_ahead], 1.3 ** -np.arange(float(num_ahead))
    images = front @ covariance.matrix
    gradients = [Ahead(front, values, images, update).taken_from(covariance.matrix @ vector, vector) for update in UPDATES]
    for other in gradients[1:]:
        np.testing.assert_allclose(other, gradients[0], atol=1e-12)


def test_the_updates_differ_when_the_vectors_in_front_are_rough() -> None:
    covariance, basis = covariance_with(1.3 ** -np.arange(12.0))
    rough = np.linalg.qr((basis[:1] + 0.3 * basis[1:2]).T)[0].T
    values = np.einsum("kd,kd->k", rough, rough @ covariance.matrix)
    vector = basis[2] + basis[1]
    gradients = {u: Ahead(rough, values, rough @ covariance.matrix, u).taken_from(covariance.matrix @ vector, vector) for u in UPDATES}
    assert np.linalg.norm(gradients["mu"] - gradients["deflation"]) > 1e-2
    assert np.linalg.norm(gradients["alpha"] - gradients["mu"]) > 1e-2


def test_alpha_takes_nothing_away_along_a_direction_without_variance() -> None:
    ahead = Ahead(np.eye(3)[:2], np.array([0.0, 1.0]), np.array([[0.0, 0, 0], [0, 1.0, 0]]), "alpha")
    np.testing.assert_array_equal(ahead.taken_from(np.array([5.0, 1.0, 2.0]), np.ones(3)), [5.0, 0.0, 2.0])


@pytest.mark.parametrize("update", UPDATES)
def test_a_single_player_does_the_same_under_every_update(update: str) -> None:
    covariance, _ = covariance_with(EXPONENTIAL[:30])
    deflation = run(ParallelDeflation(covariance=covariance, tol=0), 1, num_rounds=5)
    game = run(ParallelDeflation(covariance=covariance, update=update, tol=0), 1, num_rounds=5)
    assert_close(game.vectors, deflation.vectors, claim="nobody is in front", **SAME_BITS)


@pytest.mark.parametrize(("solver", "limit"), [("power", 35), ("hebb", 45), ("adam", 400)])
@pytest.mark.parametrize("update", UPDATES)
def test_every_solver_finds_the_eigenvectors_under_every_update(solver: str, limit: int, update: str) -> None:
    covariance, basis = covariance_with(EXPONENTIAL[:100])
    found = run(ParallelDeflation(covariance=covariance, solver=solver, update=update, tol=1e-4), 5, num_rounds=limit)
    assert errors(found, basis).max() < 5e-3
    np.testing.assert_allclose(found.values, EXPONENTIAL[:5], rtol=1e-5)


def test_a_negative_eigenvalue_of_the_deflated_matrix_does_not_capture_power_steps() -> None:
    # Two copies of the leading vector in front: taking both away leaves an eigenvalue of -1, larger in size than the 0.5 that is looked for.
    matrix = np.diag([1.0, 0.5, 0.25])
    ahead = Ahead(np.eye(3)[[0, 0]], np.array([1.0, 1.0]))
    start = np.array([0.8, 0.5, 0.3]) / np.linalg.norm([0.8, 0.5, 0.3])

    def final(mover: Mover) -> NDArray[Any]:
        vector = start
        for _ in range(200):
            vector = mover.move(vector, ahead.taken_from(matrix @ vector, vector))
        return vector

    assert abs(final(Mover("power", 1.0, scale=0.0))[0]) > 0.99  # without a shift
    assert abs(final(Mover("power", 1.0, scale=1.0))[1]) > 0.99


@pytest.mark.parametrize("solver", ["power", "hebb", "lanczos"])
def test_components_beyond_the_rank_are_absent_and_not_noise(solver: str) -> None:
    covariance, basis = covariance_with([3.0, 2.0, 1.0], size=50)
    found = run(ParallelDeflation(covariance=covariance, solver=solver), 6, num_rounds=100)
    assert found.num_present == 3
    assert found.num_rounds < 20
    assert errors(replace(found, vectors=found.vectors[:3]), basis).max() < 1e-5


def test_values_far_below_the_tolerance_are_sought_beside_the_vectors_in_front() -> None:
    spectrum = 10.0 ** -np.arange(10)
    covariance, basis = covariance_with(spectrum, size=40)
    found = run(ParallelDeflation(covariance=covariance, tol=1e-6), 10, num_rounds=100)
    assert found.num_present == 10
    np.testing.assert_allclose(found.values[:8], spectrum[:8], rtol=1e-2)
    assert errors(found, basis).max() < 1e-2


def test_component_k_joins_in_round_k_and_waits_for_the_one_in_front() -> None:
    covariance, _ = covariance_with(EXPONENTIAL[:30])
    method = ParallelDeflation(covariance=covariance, tol=0)
    state = random_eigenpairs(4, 30, seed=0)
    for number in range(1, 6):
        parts = method.split(state)
        assert [part.index for part in parts] == list(range(min(number, 4)))
        state = method.merge(state, method.work_all(parts))
    assert state.updates == (5, 4, 3, 2)
    lost = random_eigenpairs(4, 30, seed=0)
    lost = method.merge(lost, [])  # the only result was lost
    assert [part.index for part in method.split(lost)] == [0]


def test_what_has_settled_in_front_sits_still() -> None:
    covariance, _ = covariance_with([1.0, *0.1 * EXPONENTIAL[:39]])
    method, indices = ParallelDeflation(covariance=covariance, tol=1e-4), []

    def engine(worker: ParallelDeflation, parts: Sequence[Any]) -> list[Any]:
        indices.append([part.index for part in parts])
        return worker.work_all(parts)

    found = run(method, 3, num_rounds=100, engine=engine)
    assert method.settled(found)
    assert indices[-1] == [1, 2]
    assert method.settled(found)
    assert not method.settled(replace(found, residuals=np.array([0.0, 1.0, 0.0])))


def test_a_result_that_comes_twice_counts_once() -> None:
    covariance, _ = covariance_with(EXPONENTIAL[:30])
    method = ParallelDeflation(covariance=covariance)
    start = random_eigenpairs(2, 30, seed=0)
    result = method.work(method.split(start)[0])
    assert method.merge(start, [result, result]).updates == method.merge(start, [result]).updates == (1, 0)


@pytest.mark.parametrize("solver", ["power", "adam"])
def test_a_state_comes_back_from_its_arrays_and_goes_on_with_the_same_bits(solver: str) -> None:
    covariance, _ = covariance_with(EXPONENTIAL[:30])
    method = ParallelDeflation(covariance=covariance, solver=solver, tol=0)
    middle = run(method, 3, num_rounds=4)
    again = Eigenpairs.from_arrays({name: array.copy() for name, array in middle.to_arrays().items()})
    last, resumed = (run_rounds(method, state, num_rounds=3) for state in (middle, again))
    assert (resumed.updates, resumed.present, resumed.num_rounds) == (last.updates, last.present, 7)
    for name, array in last.to_arrays().items():
        np.testing.assert_array_equal(resumed.to_arrays()[name], array)


def test_batches_learn_the_components_and_two_seeds_draw_different_ones() -> None:
    covariance = with_rows(1.5 ** -np.arange(20.0), num_samples=2000)
    basis = np.linalg.eigh(covariance.matrix)[1][:, ::-1].T
    method = ParallelDeflation(covariance=covariance, solver="hebb", batch_size=100, seed=1)
    found = run(method, 3, num_rounds=200)
    assert errors(found, basis).max() < 0.1
    assert not method.settled(replace(found, residuals=np.zeros(3)))  # the residual on a batch says nothing
    other = run(replace(method, seed=2), 3, num_rounds=200)
    assert not np.array_equal(found.vectors, other.vectors)


def test_steps_on_batches_shrink_so_that_noise_averages_out() -> None:
    covariance = with_rows(1.5 ** -np.arange(20.0), num_samples=2000)
    basis = np.linalg.eigh(covariance.matrix)[1][:, ::-1].T
    method = ParallelDeflation(covariance=covariance, solver="hebb", batch_size=50)
    early, late = (np.median([errors(run(replace(method, seed=s), 2, num_rounds=n), basis).max() for s in range(5)]) for n in (10, 160))
    assert late < early / 2


def test_a_batch_estimates_the_covariance_without_bias() -> None:
    covariance = with_rows([3.0, 2.0, 1.0], num_samples=10)
    method = ParallelDeflation(covariance=covariance, solver="hebb", batch_size=10, step_size=1e-12, num_local_steps=1)
    part = method.split(replace(random_eigenpairs(1, 3, seed=0), updates=(0,)))[0]
    values = [replace(method, seed=seed).work(part).values[0] for seed in range(4000)]
    assert abs(np.mean(values) - part.vectors[0] @ covariance.matrix @ part.vectors[0]) < 4 * np.std(values) / np.sqrt(4000)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"solver": "newton"}, r"solver='newton' is not known\. Choose one of: power, hebb, adam, lanczos"),
    ({"update": "beta"}, r"update='beta' is not known\. Choose one of: deflation, alpha, mu"),
    ({"num_local_steps": 0}, r"num_local_steps=0 must be an integer of at least 1"),
    ({"block_size": 0, "solver": "lanczos"}, r"block_size=0 must be an integer of at least 1"),
    ({"batch_size": 0, "solver": "hebb"}, r"batch_size=0 must be an integer of at least 1"),
    ({"batch_size": 9}, r"batch_size=9 with solver='power', expected solver='hebb': .* Pass solver='hebb'"),
    ({"batch_size": 9, "solver": "lanczos"}, r"batch_size=9 with solver='lanczos'"),
    ({"block_size": 2}, r"block_size=2 with solver='power', expected solver='lanczos'"),
    ({"update": "mu", "solver": "lanczos"}, r"update='mu' with solver='lanczos', expected 'power', 'hebb' or 'adam'"),
    ({"step_size": 0.0}, r"got step_size=0\.0, expected a finite number above 0"),
    ({"step_size": float("nan")}, r"got step_size=nan"),
    ({"tol": -1.0}, r"got tol=-1\.0, expected 0 or more and below 1"),
    ({"tol": float("nan")}, r"got tol=nan"),
]


@pytest.mark.parametrize(("chosen", "text"), REFUSED)
def test_bad_settings_are_refused_with_what_to_do(chosen: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        ParallelDeflation(covariance=covariance_with([1.0, 0.5])[0], **chosen)


SPOILS: list[tuple[Callable[[EigenResult], EigenResult], str]] = [
    (lambda result: replace(result, vectors=result.vectors[:, :-1]), r"got vectors of shape \(1, 29\), expected \(1, 30\)"),
    (lambda result: replace(result, values=np.zeros(2)), r"expected \(1, 30\)\. Use the same version"),
    (lambda result: replace(result, vectors=2 * result.vectors), r"got vectors of length 2 to 2, expected 1\. Check the worker"),
]


@pytest.mark.parametrize(("spoil", "text"), SPOILS)
def test_a_result_that_is_no_set_of_unit_vectors_is_refused(spoil: Callable[[EigenResult], EigenResult], text: str) -> None:
    method = ParallelDeflation(covariance=covariance_with(EXPONENTIAL[:30])[0])
    part = method.split(random_eigenpairs(2, 30, seed=0))[0]
    method.check(part, method.work(part))
    with pytest.raises(RunError, match=text):
        method.check(part, spoil(method.work(part)))
