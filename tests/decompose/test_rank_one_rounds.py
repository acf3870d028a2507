"""Claims of parallel and sequential deflation as rounds, on matrices whose spectrum is known."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from decompose_rank_one_rates import envelope_use
from matrices import gaussian, matrix_with
from partwise.checks import RunError
from partwise.decompose.rank_one_rounds import Pairs, ParallelRankOne, SequentialRankOne, random_pairs
from partwise.engine.inline import inline
from partwise.linalg.bounds import cascade_bound, predicted_rates
from partwise.linalg.compute_schedule import compute_schedule
from partwise.linalg.deflation import deflate, deflation_errors
from partwise.linalg.rank_one import exact_parts, rank_one_step
from partwise.rounds import run_rounds
from tolerances import assert_close

SPECTRUM = [1.0, 0.7, 0.55, 0.4, 0.32, 0.25, 0.2, 0.15, 0.1, 0.05]


def errors_of(state: Pairs, target: NDArray[Any]) -> NDArray[Any]:
    """G of every component, (r,); 1 for what is not published."""
    exact = exact_parts(target, num_components=len(state.left))
    return deflation_errors(state.published_left, state.right, exact.left, exact.scaled_right)


def error_history(target: NDArray[Any], *, num_components: int, num_rounds: int, seed: int = 0, **settings: Any) -> NDArray[Any]:
    """G after every round of ``ParallelRankOne`` with these settings, (rounds, r)."""
    rows: list[NDArray[Any]] = []
    start = random_pairs(target, num_components=num_components, seed=seed)
    method = ParallelRankOne(target=target, **settings)
    run_rounds(method, start, num_rounds=num_rounds, progress=lambda _, state: rows.append(errors_of(state, target)))
    return np.stack(rows)


def parallel_slowly(target: NDArray[Any], start: Pairs, *, activation: str, num_rounds: int, num_steps: int) -> tuple[NDArray[Any], NDArray[Any], list[bool]]:
    """The loop a student would write: formed targets, one worker after the other, all reading last round's snapshot."""
    left, right, published = list(start.left), list(start.right), [False] * len(start.left)
    for round_number in range(1, num_rounds + 1):
        snapshot = [(b, z) if shown else None for b, z, shown in zip(left, right, published, strict=True)]
        for k in range(len(left)):
            if activation == "staggered" and k + 1 > round_number:
                continue
            rest = target - sum((np.outer(*pair) for pair in snapshot[:k] if pair is not None), start=np.zeros_like(target))
            for _ in range(num_steps):
                left[k] = rest @ right[k] / (right[k] @ right[k])
                right[k] = rest.T @ left[k] / (left[k] @ left[k])
            published[k] = published[k] or activation == "all" or k + 1 <= round_number
    return np.stack(left), np.stack(right), published


@pytest.mark.parametrize("activation", ["staggered", "advance", "all"])
def test_the_rounds_agree_with_the_plain_loop(activation: str) -> None:
    target = matrix_with(SPECTRUM, rows=12, columns=10)
    start = random_pairs(target, num_components=4, seed=0)
    for num_rounds in (1, 2, 3, 6):
        last = run_rounds(ParallelRankOne(target=target, activation=activation, num_local_steps=2), start, num_rounds=num_rounds)
        left, right, published = parallel_slowly(target, start, activation=activation, num_rounds=num_rounds, num_steps=2)
        assert list(last.published) == published
        for k in range(4):
            assert_close(np.outer(last.left[k], last.right[k]), np.outer(left[k], right[k]), claim=f"component {k + 1}, round {num_rounds}")


RATES_BY_HAND = [
    ([1.0, 0.6, 0.5, 0.3, 0.25, 0.1], [0.36, 0.25 / 0.36, 0.25 / 0.36, 0.0625 / 0.09]),  # each component is as slow as the slowest up to it
    ([1.0, 0.9, 0.6, 0.45, 0.3, 0.1], [0.81, 0.81, 0.5625, 0.5625]),  # a slow first pair does not slow the third
]


@pytest.mark.parametrize("num_local_steps", [1, 2])
@pytest.mark.parametrize(("spectrum", "by_hand"), RATES_BY_HAND)
def test_errors_shrink_per_round_at_the_predicted_rates(spectrum: list[float], by_hand: list[float], num_local_steps: int) -> None:
    target = matrix_with(spectrum, rows=10, columns=8)
    predicted = predicted_rates(spectrum, num_components=4, num_local_steps=num_local_steps)
    assert predicted == pytest.approx([rate**num_local_steps for rate in by_hand])
    history = error_history(target, num_components=4, num_rounds=150, num_local_steps=num_local_steps)
    for k in range(4):
        first, last = (int(np.argmax(history[:, k] < level)) for level in (1e-8, 1e-12))  # past the start, above rounding
        measured = float(history[last, k] / history[first, k]) ** (1 / (last - first))
        assert measured == pytest.approx(predicted[k], rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_the_envelope_of_the_theorem_is_never_crossed_after_the_warm_up(seed: int) -> None:
    largest_use, seen, promised = envelope_use(seed, num_rounds=300)
    assert 0 < largest_use <= 1
    assert seen < promised


def test_exact_workers_are_done_after_one_round_per_component() -> None:
    target = matrix_with(SPECTRUM, rows=12, columns=10)
    for activation in ("staggered", "all"):
        history = error_history(target, num_components=5, num_rounds=5, solver="svd", activation=activation)
        for k in range(5):
            assert_close(history[k, : k + 1], np.zeros(k + 1), claim=f"round {k + 1} settles component {k + 1}", atol=1e-13)
    assert float(history[0, 1]) > 0.5  # the second is still wrong after one round


def test_what_is_not_published_counts_as_absent_and_has_the_error_one() -> None:
    target = matrix_with(SPECTRUM, rows=12, columns=10)
    for activation, first_round in (("staggered", 1), ("advance", 1), ("all", 4)):
        history = error_history(target, num_components=4, num_rounds=4, activation=activation)
        assert int((history[0] != 1).sum()) == first_round


def test_private_learning_changes_the_start_and_nothing_published_before_it() -> None:
    target = matrix_with(SPECTRUM, rows=12, columns=10)
    start = random_pairs(target, num_components=3, seed=0)
    staggered, advance = (run_rounds(ParallelRankOne(target=target, activation=name), start, num_rounds=2) for name in ("staggered", "advance"))
    assert_close(advance.left[0], staggered.left[0], claim="the first component never waits")
    assert staggered.published == advance.published == (True, True, False)
    assert_close(staggered.left[2], start.left[2], claim="the third has not started", rtol=0.0, atol=0.0)
    assert not np.array_equal(advance.left[2], start.left[2])
    assert not np.allclose(advance.left[1], staggered.left[1])


def test_scaling_the_target_scales_every_part() -> None:
    target = matrix_with(SPECTRUM, rows=12, columns=10)
    start = random_pairs(target, num_components=4, seed=0)
    plain, scaled = (run_rounds(ParallelRankOne(target=factor * target), start, num_rounds=12) for factor in (1.0, 3.0))
    for k in range(4):
        expected = 3.0 * np.outer(plain.left[k], plain.right[k])
        assert_close(np.outer(scaled.left[k], scaled.right[k]), expected, claim="Y -> 3 Y gives 3 b a^T", rtol=1e-9)


def test_a_worker_that_never_answers_leaves_its_component_to_the_next() -> None:
    target = matrix_with(SPECTRUM, rows=12, columns=10)
    method, state = ParallelRankOne(target=target, activation="all"), random_pairs(target, num_components=3, seed=0)
    for _ in range(80):
        state = method.merge(state, [result for result in inline(method, method.split(state)) if result.index != 1])
    assert state.published == (True, False, True)
    exact = exact_parts(target, num_components=2)
    third = deflation_errors(state.left[2:], state.right[2:], exact.left[1:], exact.scaled_right[1:])
    assert_close(third, np.zeros(1), claim="component 3 finds the second singular part")


def test_lost_results_only_slow_the_parallel_rounds_down() -> None:
    target = matrix_with(SPECTRUM, rows=12, columns=10)
    method, state = ParallelRankOne(target=target), random_pairs(target, num_components=3, seed=0)
    for round_number in range(150):
        results = inline(method, method.split(state))
        state = method.merge(state, [result for result in results if (result.index + round_number) % 3])  # every third is lost
    assert_close(errors_of(state, target), np.zeros(3), claim="same parts in the end", atol=1e-12)


def test_sequential_exact_steps_are_the_truncated_svd() -> None:
    target = matrix_with(SPECTRUM, rows=12, columns=10)
    last = run_rounds(SequentialRankOne(target=target, steps=(1,) * 4, solver="svd"), random_pairs(target, num_components=4, seed=0), num_rounds=4)
    exact = exact_parts(target, num_components=4)
    assert_close(last.left.T @ last.right, exact.left.T @ exact.scaled_right, claim="Eckart-Young")


def test_a_later_stage_leaves_frozen_components_bit_identical() -> None:
    target = matrix_with(SPECTRUM, rows=12, columns=10)
    states: list[Pairs] = [random_pairs(target, num_components=4, seed=0)]
    run_rounds(SequentialRankOne(target=target, steps=(3, 2, 2, 1)), states[0], num_rounds=4, progress=lambda _, state: states.append(state))
    for stage in range(1, 5):
        assert np.array_equal(states[stage].left[: stage - 1], states[stage - 1].left[: stage - 1])
        assert np.array_equal(states[stage].right[: stage - 1], states[stage - 1].right[: stage - 1])
        assert np.array_equal(states[stage].left[stage:], states[0].left[stage:])
    more = run_rounds(SequentialRankOne(target=target, steps=(3, 2, 2, 1)), states[-1], num_rounds=1)
    assert np.array_equal(more.left, states[-1].left)


def test_a_stage_whose_result_is_lost_is_done_again() -> None:
    target = matrix_with(SPECTRUM, rows=12, columns=10)
    method, state = SequentialRankOne(target=target, steps=(2, 2)), random_pairs(target, num_components=2, seed=0)
    for num_results, frozen in ((0, (False, False)), (1, (True, False)), (0, (True, False)), (1, (True, True))):
        state = method.merge(state, inline(method, method.split(state))[:num_results])
        assert state.published == frozen


def test_errors_of_frozen_components_stay_and_those_of_parallel_ones_vanish() -> None:
    target, start_seed = matrix_with(SPECTRUM, rows=12, columns=10), 0
    start = random_pairs(target, num_components=4, seed=start_seed)
    sequential = run_rounds(SequentialRankOne(target=target, steps=(4,) * 4), start, num_rounds=4)
    more_rounds = run_rounds(SequentialRankOne(target=target, steps=(4,) * 4), sequential, num_rounds=60)
    parallel = run_rounds(ParallelRankOne(target=target, num_local_steps=4), start, num_rounds=60)
    assert float(errors_of(sequential, target).min()) > 1e-3
    assert_close(errors_of(more_rounds, target), errors_of(sequential, target), claim="frozen is frozen", rtol=0.0, atol=0.0)
    assert_close(errors_of(parallel, target), np.zeros(4), claim="healed", atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_on_a_target_of_exact_rank_the_sequential_residual_is_zero_while_its_parts_are_wrong(seed: int) -> None:
    target = matrix_with(SPECTRUM[:4], rows=12, columns=10, seed=seed)
    last = run_rounds(SequentialRankOne(target=target, steps=(1,) * 4), random_pairs(target, num_components=4, seed=seed), num_rounds=4)
    rest = deflate(target, last.left, last.right)
    assert_close(rest, np.zeros_like(rest), claim="each step removes one rank exactly; rounding is magnified by small pivots", atol=1e-9)
    assert float(errors_of(last, target).max()) > 0.4


@pytest.mark.parametrize("seed", range(3))
def test_the_cascade_bound_holds_for_unfinished_steps_below_the_true_rank(seed: int) -> None:
    spectrum = [0.5**k for k in range(10)]
    target = matrix_with(spectrum, rows=12, columns=10, seed=seed)
    method, state = SequentialRankOne(target=target, steps=(14,) * 4), random_pairs(target, num_components=4, seed=seed)
    step_errors = []
    for k in range(4):
        rest = deflate(target, state.left[:k], state.right[:k])
        state = method.merge(state, inline(method, method.split(state)))
        best = exact_parts(rest, num_components=1)
        step_errors.append(
            float(np.linalg.norm(np.outer(state.left[k], state.right[k]) - np.outer(best.left[0], best.scaled_right[0])))
        )
    assert sum(step_errors) < 0.5 * min(a - b for a, b in itertools.pairwise(spectrum[:6]))  # the regime of the bound
    residual = float(np.linalg.norm(deflate(target, state.left, state.right)))
    assert min(step_errors) > 0
    assert residual <= cascade_bound(spectrum, step_errors)


def relative_residual(target: NDArray[Any], *, steps: tuple[int, ...], solver: str, seed: int) -> float:
    method = SequentialRankOne(target=target, steps=steps, solver=solver, lr=0.1)
    last = run_rounds(method, random_pairs(target, num_components=len(steps), seed=seed), num_rounds=len(steps))
    return float(np.linalg.norm(deflate(target, last.left, last.right)) / np.linalg.norm(target))


def mean_residuals(spectrum: list[float], *, num_components: int, num_steps: int, solver: str, alphas: tuple[float, ...]) -> dict[float, float]:
    schedules = {alpha: compute_schedule(num_components, num_steps, min_steps=2, alpha=alpha) for alpha in alphas}
    targets = [matrix_with(spectrum, rows=len(spectrum), columns=len(spectrum), seed=seed) for seed in range(8)]
    return {
        alpha: sum(relative_residual(target, steps=steps, solver=solver, seed=seed) for seed, target in enumerate(targets)) / len(targets)
        for alpha, steps in schedules.items()
    }


def test_more_steps_first_pay_when_gradient_steps_are_slow_and_the_gain_saturates() -> None:
    slow = mean_residuals([k**-0.8 for k in range(1, 51)], num_components=20, num_steps=500, solver="gd", alphas=(0.0, 0.5, 1.0, 1.5))
    assert slow[0.0] > slow[0.5] + 0.02 > slow[1.0] + 0.04
    assert slow[1.0] - slow[1.5] < 0.8 * (slow[0.5] - slow[1.0])  # over 32 seeds about one half, over 8 up to 0.7


def test_more_steps_first_do_not_pay_with_least_squares_steps() -> None:
    fast = mean_residuals([k**-0.8 for k in range(1, 51)], num_components=20, num_steps=500, solver="power", alphas=(0.0, 0.5, 1.0))
    assert fast[0.0] < fast[0.5] < fast[1.0]


def test_fewer_steps_first_pay_when_gradient_steps_suffice_for_the_large_components() -> None:
    ample = mean_residuals([0.7**k for k in range(20)], num_components=6, num_steps=1200, solver="gd", alphas=(-0.5, 0.0, 1.0))
    assert ample[-0.5] < ample[0.0] < ample[1.0]


def test_the_start_of_a_pair_depends_on_the_seed_and_its_index_only() -> None:
    target = gaussian(6, 5)
    few, many = random_pairs(target, num_components=2, seed=7), random_pairs(target, num_components=5, seed=7)
    assert np.array_equal(many.left[:2], few.left)
    assert np.array_equal(many.right[:2], few.right)
    single = random_pairs(target.astype(np.float32), num_components=2, seed=7)
    assert single.left.dtype == np.float32
    assert_close(single.left.astype(float), few.left, claim="same draw, rounded", rtol=1e-6, atol=1e-7)


def test_a_part_alone_is_enough_for_its_worker() -> None:
    target = matrix_with(SPECTRUM, rows=12, columns=10)
    method = ParallelRankOne(target=target, activation="all", num_local_steps=3)
    state = run_rounds(method, random_pairs(target, num_components=3, seed=0), num_rounds=2)
    result = method.work(method.split(state)[2])
    left, right = rank_one_step(target, state.left[2], state.right[2], (state.left[:2], state.right[:2]), num_steps=3)
    assert_close(result.left, left, claim="the part carries what is in front of it", rtol=0.0, atol=0.0)
    assert_close(result.right, right, claim="the part carries what is in front of it", rtol=0.0, atol=0.0)


def test_a_result_of_another_shape_or_dtype_is_refused() -> None:
    target = matrix_with(SPECTRUM, rows=12, columns=10)
    state = random_pairs(target, num_components=2, seed=0)
    for method in (ParallelRankOne(target=target), SequentialRankOne(target=target, steps=(1, 1))):
        part = method.split(state)[0]
        result = method.work(part)
        method.check(part, result)
        for broken in (replace(result, left=result.left[1:]), replace(result, right=result.right.astype(np.float32))):
            with pytest.raises(RunError, match=r"got a pair with .*, expected \[\(\(12,\), 'float64'\), \(\(10,\), 'float64'\)\]\. Use the same version"):
                method.check(part, broken)
