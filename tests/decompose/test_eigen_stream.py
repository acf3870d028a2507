"""Claims of ``partial_fit``: any batch from one row on, what is learned refers to all rows seen, and the tail of a flat spectrum is not lost."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.exceptions import NotFittedError

from partwise.checks import InputError
from partwise.decompose import ParallelDeflationPCA
from partwise.decompose._eigen_stream import EigenStream, StreamCovariance, num_kept
from tolerances import assert_close

SAME_BITS = {"rtol": 0.0, "atol": 0.0}
FLAT, STEEP = np.arange(1.0, 101.0) ** -0.5, 1.2 ** -np.arange(100.0)


def stream_of(spectrum: NDArray[Any], *, num_samples: int = 4000, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((len(spectrum), len(spectrum))))[0]
    return rng.standard_normal((num_samples, len(spectrum))) * np.sqrt(spectrum) @ basis + 2.0


def fed(X: NDArray[Any], *, batch_size: int, n_components: int = 5, **options: Any) -> ParallelDeflationPCA:
    model = ParallelDeflationPCA(n_components, random_state=0, **options)
    for begin in range(0, len(X), batch_size):
        model.partial_fit(X[begin : begin + batch_size])
    return model


def sine(components: NDArray[Any], exact: NDArray[Any]) -> float:
    """Of the largest angle between two spans of rows."""
    inside = np.linalg.svd(np.linalg.qr(components.T)[0].T @ exact.T, compute_uv=False)
    return float(np.sqrt(max(0.0, 1 - inside.min() ** 2)))


@pytest.mark.parametrize("spectrum", [FLAT, STEEP], ids=["flat", "steep"])
@pytest.mark.parametrize("solver", ["power", "hebb", "lanczos"])
def test_a_stream_keeps_several_times_more_of_the_subspace_than_incremental_pca(spectrum: NDArray[Any], solver: str) -> None:
    X = stream_of(spectrum)
    exact = PCA(5, svd_solver="full").fit(X)
    ours = fed(X, batch_size=100, solver=solver)
    theirs = IncrementalPCA(5, batch_size=100).fit(X)
    assert sine(ours.components_, exact.components_) < sine(theirs.components_, exact.components_) / 3
    deviations = [np.abs(model.explained_variance_ / exact.explained_variance_ - 1).max() for model in (ours, theirs)]
    assert deviations[0] < 0.02
    assert deviations[0] < deviations[1] / 2


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64, 4000])
def test_what_is_learned_refers_to_all_rows_seen(batch_size: int) -> None:
    X = stream_of(STEEP[:20], num_samples=400)
    exact = PCA(3, svd_solver="full").fit(X)
    model = fed(X, batch_size=batch_size, n_components=3)
    assert model.n_samples_seen_ == 400
    np.testing.assert_allclose(model.mean_, X.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(model.explained_variance_, exact.explained_variance_, rtol=0.02)
    # Nothing is lost in the total: the ratio is as good as the variance.
    total = model.explained_variance_ / model.explained_variance_ratio_
    np.testing.assert_allclose(total, X.var(axis=0, ddof=1).sum(), rtol=1e-10)


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=8), seed=st.integers(0, 99))
def test_while_all_directions_fit_in_nothing_is_lost_whatever_the_batches(sizes: list[int], seed: int) -> None:
    X = stream_of(STEEP[:8], num_samples=sum(sizes), seed=seed)
    model, begin = ParallelDeflationPCA(2, random_state=0), 0
    for size in sizes:
        model.partial_fit(X[begin : begin + size])
        begin += size
    exact = PCA(svd_solver="full").fit(X)
    found = min(2, len(X) - 1)
    np.testing.assert_allclose(model.explained_variance_[:found], exact.explained_variance_[:found], rtol=1e-6)


def test_the_first_row_is_taken_and_the_second_gives_a_component() -> None:
    X = stream_of(STEEP[:10], num_samples=5)
    model = ParallelDeflationPCA(3, random_state=0).partial_fit(X[:1])
    assert model.n_samples_seen_ == 1
    assert model.components_.shape == (0, 10)
    assert model.partial_fit(X[1:2]).components_.shape == (1, 10)
    np.testing.assert_allclose(model.transform(X[:2]) @ model.components_ + model.mean_, X[:2])
    assert model.partial_fit(X[2:5]).components_.shape == (3, 10)


def test_equal_rows_have_no_direction_and_do_no_harm() -> None:
    X = stream_of(STEEP[:10], num_samples=50)
    model = ParallelDeflationPCA(2, random_state=0).partial_fit(np.repeat(X[:1], 4, axis=0))
    assert model.components_.shape == (0, 10)
    model.partial_fit(X)
    everything = np.concatenate([np.repeat(X[:1], 4, axis=0), X])
    np.testing.assert_allclose(model.explained_variance_, PCA(2).fit(everything).explained_variance_, rtol=1e-6)


def test_the_memory_does_not_grow_with_the_rows() -> None:
    X = stream_of(FLAT, num_samples=1000)

    def floats(model: ParallelDeflationPCA) -> int:
        return sum(value.size for value in vars(model._stream).values() if isinstance(value, np.ndarray))

    after_few, after_many = floats(fed(X[:200], batch_size=50)), floats(fed(X, batch_size=50))
    assert after_few == after_many == num_kept(5, 100) * 101 + 100


def test_more_local_steps_make_a_round_more_accurate() -> None:
    X = stream_of(FLAT)
    exact = PCA(5, svd_solver="full").fit(X).components_
    one, five = (sine(fed(X, batch_size=100, num_local_steps=steps).components_, exact) for steps in (1, 5))
    assert five < one


def test_a_stream_goes_on_after_a_fit() -> None:
    X = stream_of(STEEP)
    model = ParallelDeflationPCA(5, solver="lanczos", random_state=0).fit(X[:2000])
    for begin in range(2000, 4000, 200):
        model.partial_fit(X[begin : begin + 200])
    exact = PCA(5, svd_solver="full").fit(X)
    np.testing.assert_allclose(model.explained_variance_, exact.explained_variance_, rtol=0.05)
    np.testing.assert_allclose(model.mean_, exact.mean_, rtol=1e-10)
    assert sine(model.components_, exact.components_) < 0.2
    fitted = model.fit(X).explained_variance_  # and a fit starts anew
    np.testing.assert_allclose(fitted, exact.explained_variance_, rtol=1e-6)


def test_one_seed_gives_one_answer_and_the_batch_is_not_changed() -> None:
    X = stream_of(FLAT, num_samples=300)
    kept = X.copy()
    assert_close(fed(X, batch_size=37).components_, fed(X, batch_size=37).components_, claim="the same stream", **SAME_BITS)
    np.testing.assert_array_equal(X, kept)


def test_float32_is_kept_and_sums_are_not_made_in_it() -> None:
    X = (stream_of(STEEP[:10], num_samples=2000) + 1000).astype(np.float32)
    model = fed(X, batch_size=50, n_components=2)
    assert model.components_.dtype == model.mean_.dtype == np.float32
    np.testing.assert_allclose(model.explained_variance_, PCA(2).fit(X.astype(float)).explained_variance_, rtol=1e-3)


def test_the_covariance_of_a_stream_is_that_of_its_rows() -> None:
    rows = np.random.default_rng(0).standard_normal((9, 6))
    covariance, vectors = StreamCovariance(rows, 9), np.random.default_rng(1).standard_normal((11, 6))
    expected = vectors @ rows.T @ rows / 8
    np.testing.assert_allclose(covariance.product(vectors), expected)
    np.testing.assert_allclose(covariance.apply(vectors[0]), expected[0])
    np.testing.assert_array_equal(covariance.product(vectors)[3], covariance.product(vectors[3:4])[0])
    assert covariance.total_variance == pytest.approx(np.square(rows).sum() / 8)
    assert (covariance.num_features, covariance.dtype, covariance.rounding) == (6, np.float64, 0.0)
    np.testing.assert_array_equal(covariance.rows(np.array([2])), rows[2:3])
    assert not covariance.mean.any()


def test_an_empty_stream_has_no_variance() -> None:
    stream = EigenStream.empty(4, num_components=2, seed=0)
    assert stream.total_variance == 0.0
    assert len(stream.values) == 0


def test_bad_batches_are_refused_and_leave_what_was_learned() -> None:
    model = ParallelDeflationPCA(2, random_state=0)
    with pytest.raises(NotFittedError):
        model.transform(np.zeros((1, 3)))
    model.partial_fit(stream_of(STEEP[:5], num_samples=20))
    kept = copy.deepcopy(model.components_)
    with pytest.raises(ValueError, match="X has 4 features, but ParallelDeflationPCA is expecting 5 features as input"):
        model.partial_fit(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="NaN"):
        model.partial_fit(np.full((3, 5), np.nan))
    with pytest.raises(ValueError, match="0 sample"):
        model.partial_fit(np.zeros((0, 5)))
    np.testing.assert_array_equal(model.components_, kept)


def test_a_stream_needs_rounds_in_step_and_no_more_components_than_features() -> None:
    with pytest.raises(InputError, match=r"got mode='async' in partial_fit, expected mode='sync': the next batch can only be joined"):
        ParallelDeflationPCA(2, mode="async").partial_fit(np.eye(3))
    with pytest.raises(InputError, match=r"n_components=4 does not fit data of 3 features: it must be between 1 and 3"):
        ParallelDeflationPCA(4).partial_fit(np.eye(3))


@pytest.mark.parametrize("batch", [np.eye(6)[:1], np.random.default_rng(1).standard_normal((50, 6))], ids=["one row", "many rows"])
def test_a_stream_after_a_fit_keeps_no_certificate_of_that_fit(batch: NDArray[Any]) -> None:
    fitted = ParallelDeflationPCA(2, mode="async", random_state=0).fit(stream_of(STEEP[:6], num_samples=80))
    of_the_fit = ("residuals_", "eigenvalue_intervals_", "missed_value_test_", "converged_", "history_", "n_iter_", "schedule_", "traffic_")
    assert all(hasattr(fitted, name) for name in of_the_fit)
    with pytest.raises(ValueError, match="NaN"):
        fitted.set_params(mode="sync").partial_fit(np.full((2, 6), np.nan))
    assert hasattr(fitted, "residuals_")  # a batch that was refused changes nothing
    fitted.partial_fit(batch)
    assert [name for name in of_the_fit if hasattr(fitted, name)] == []
    fitted.fit(stream_of(STEEP[:6], num_samples=80))
    assert all(hasattr(fitted, name) for name in of_the_fit)
    assert not hasattr(fitted, "n_samples_seen_")


def test_a_sparse_batch_is_taken_row_by_row() -> None:
    X = np.where(np.random.default_rng(0).random((60, 8)) < 0.3, 1.0, 0.0) * np.arange(1, 9)
    dense, compressed = ParallelDeflationPCA(2, random_state=0), ParallelDeflationPCA(2, random_state=0)
    for begin in range(0, 60, 20):
        dense.partial_fit(X[begin : begin + 20])
        compressed.partial_fit(scipy.sparse.csc_array(X[begin : begin + 20]))
    assert_close(compressed.components_, dense.components_, claim="the same rows", **SAME_BITS)


def test_batches_hold_the_same_numbers_as_a_fit() -> None:
    with pytest.raises(InputError, match=r"got integers up to 1152921504606846987 in size, expected at most 2\^53"):
        ParallelDeflationPCA(2).partial_fit(np.arange(2**60, 2**60 + 12).reshape(4, 3))
    with pytest.raises(InputError, match="got float16 numbers, expected float32, float64 or integers"):
        ParallelDeflationPCA(2).partial_fit(np.eye(3, dtype=np.float16))


@pytest.mark.parametrize("exponent", [-400, 460])
def test_a_stream_has_the_same_bits_in_any_unit_that_is_a_power_of_two(exponent: int) -> None:
    X, unit = stream_of(STEEP[:30], num_samples=200), 2.0**exponent
    plain, scaled = fed(X, batch_size=50, n_components=2), fed(X * unit, batch_size=50, n_components=2)
    assert_close(scaled.components_, plain.components_, claim="another unit", rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scaled.explained_variance_ / unit**2, plain.explained_variance_, rtol=1e-9)


@pytest.mark.parametrize(("size", "text"), [(1e-140, "expected absolute values above 1e-130"), (1e150, "expected absolute values below 1e[+]148")])
def test_batches_whose_squares_cannot_be_told_are_refused(size: float, text: str) -> None:
    with pytest.raises(InputError, match=text):
        ParallelDeflationPCA(2).partial_fit(size * np.eye(3))
