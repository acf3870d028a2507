"""What the estimators of eigenvectors share: the checks at the door, the attributes they learn, the certificate, and their warnings."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from partwise.checks import InputError, check_at_least
from partwise.decompose._covariance import Covariance, covariance_of
from partwise.decompose._eigen_rounds import Eigenpairs
from partwise.decompose._eigen_runs import Progress
from partwise.decompose._units import check_variance, in_unit, rows_told_in, scaled, told_as, told_in, unit_of
from partwise.linalg.certificate import Certificate, MissedValueTest, certify
from partwise.linalg.products import one_blas_thread

__all__ = ["EigenEstimator", "Progress", "Solved", "positive_largest", "rayleigh_ritz"]

NEARLY_EQUAL = 1e-6  # with tol=0, which asks for all rounds: a value outside that is closer than this to the smallest one kept is a tie
CHUNK_BYTES = 1 << 26  # of rows that are transformed at once when the data are not in memory


@dataclass(frozen=True, eq=False)
class Solved:
    """What a method hands back to the estimator.

    Attributes
    ----------
    vectors : ndarray of shape (k, d)
        Unit rows in any order; fewer than asked for when the data have no more directions.
    history : list of dict
        One record per round.
    num_iter : int
        Rounds done.
    converged : bool
        Whether the method's own rule to stop was met.
    traffic : Any
        What the engine counted, or None.
    """

    vectors: NDArray[Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    num_iter: int = 0
    converged: bool = True
    traffic: Any = None


class _Seen(Protocol):
    """What the learned attributes need to know of the data."""

    @property
    def num_samples(self) -> int: ...

    @property
    def mean(self) -> NDArray[Any]: ...

    @property
    def total_variance(self) -> float: ...


class EigenEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Base of the estimators that learn leading eigenvectors of a covariance matrix. A child writes ``_check_settings`` and ``_solve``."""

    n_components: int
    tol: float
    random_state: int | np.random.RandomState | None

    @abstractmethod
    def _check_settings(self) -> None:
        """Refuse settings that no data could make right."""

    @abstractmethod
    def _solve(self, covariance: Covariance, seed: int, *, start: Eigenpairs | None = None, progress: Progress | None = None) -> Solved:
        """Find the leading eigenvectors, from ``start`` if there is one; call ``progress(round_number, state)`` after each round."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def fit(self, X: Any, y: None = None) -> Self:
        """Learn ``n_components`` eigenvectors of the covariance of ``X``.

        Parameters
        ----------
        X : array-like, sparse matrix, memory map, LinearOperator or RowSource of shape (n_samples, n_features)
            Rows are samples. Nothing is copied or made dense as a whole; centring is implicit. A ``LinearOperator`` is the data, not the covariance.
        y : None
            Ignored.

        Returns
        -------
        self
            The fitted estimator.

        Raises
        ------
        InputError
            When a setting is out of range, or the data cannot be used: NaN, complex or half-precision numbers, no variance, fewer samples or features
            than components. A ``ValueError``.

        Warns
        -----
        ConvergenceWarning
            When an eigenvalue is known less well than ``tol`` asks for.
        UserWarning
            When the probe found an eigenvalue that was missed, or when the data have fewer directions than ``n_components``.
        """
        check_at_least(self.n_components, 1, name="n_components")
        self._check_settings()
        return self.fit_from(self._covariance(X))

    def fit_from(self, covariance: Covariance, *, start: Eigenpairs | None = None, progress: Progress | None = None) -> Self:
        """Learn from a covariance that was built before, possibly from a state in the middle of a run.

        Parameters
        ----------
        covariance : Covariance
            What ``fit`` makes of its data.
        start : Eigenpairs, optional
            A state of an earlier run with the same settings, data and integer ``random_state``: the rest of the run has the same bits.
        progress : callable, optional
            Called after each round as ``progress(round_number, state)``.

        Returns
        -------
        self
            The fitted estimator.
        """
        self._check_settings()
        self.n_features_in_ = covariance.num_features
        self._check_fit_of(covariance)
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        unit = unit_of(covariance.total_variance)  # so that no result depends on the unit of the data
        inner, inner_start = in_unit(covariance, unit), None if start is None else scaled(start, 1 / unit)
        solved = self._solve(inner, seed, start=inner_start, progress=told_in(progress, unit))
        if not len(solved.vectors):
            raise InputError(
                "no-variance",
                "got data whose variance is lost in the rounding of their means, expected columns that vary by more than 1e-15 of their size. "
                "Subtract a constant from each column, or leave out those that do not vary.",
            )
        vectors, certificate = self._certified(inner, solved.vectors, seed)
        certificate = told_as(certificate, unit)
        order = np.argsort(-certificate.values, kind="stable")
        intervals = certificate.intervals[order] + np.array([-covariance.rounding, covariance.rounding])  # (K, 2)
        self._learn(covariance, positive_largest(vectors[order]), certificate.values[order])
        self.residuals_ = certificate.residuals[order]
        self.eigenvalue_intervals_ = intervals
        self.missed_value_test_ = certificate.missed_value_test
        self.history_ = rows_told_in(solved.history, unit)
        self.n_iter_, self.converged_, self.traffic_ = solved.num_iter, solved.converged, solved.traffic
        for name in ("_stream", "n_samples_seen_"):  # a stream that was under way does not know these rows
            self.__dict__.pop(name, None)
        self._warn(certificate.missed_value_test, intervals)
        return self

    def _certified(self, covariance: Covariance, vectors: NDArray[Any], seed: int) -> tuple[NDArray[Any], Certificate]:
        """The vectors with their certificate, once what a probe found to be missing has been put in its place, if the method knows how."""
        tolerance = self.tol or NEARLY_EQUAL
        with one_blas_thread():
            certificate = certify(covariance.product, vectors, seed=seed, tolerance=tolerance)
            for _ in range(len(vectors)):
                mended = None if certificate.missed_value_test.passed else self._mended(covariance, vectors, seed)
                if mended is None:
                    break
                vectors = mended
                certificate = certify(covariance.product, vectors, seed=seed, tolerance=tolerance)
        return vectors, certificate

    def _mended(self, covariance: Covariance, vectors: NDArray[Any], seed: int) -> NDArray[Any] | None:
        """Better vectors, after a probe found a larger eigenvalue outside their span; None when the method has no way but more rounds."""
        return None

    def _covariance(self, X: Any) -> Covariance:
        """The covariance of data in any form; sets what scikit-learn keeps about the input."""
        if _is_plain(X):
            # The covariance looks for NaN itself, in the pass that it makes anyway, and says where the first is.
            X = validate_data(self, X, accept_sparse=["csr", "csc"], dtype="numeric", ensure_min_samples=2, ensure_all_finite=False)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        self._dtype = np.dtype(np.float32 if X.dtype == np.float32 else np.float64)
        return covariance_of(X)

    def _check_fit_of(self, covariance: Covariance) -> None:
        """Refuse data that cannot have as many components, or any."""
        shape = (covariance.num_samples, covariance.num_features)
        if self.n_components > min(shape):
            raise InputError(
                "too-many-components",
                f"n_components={self.n_components} does not fit data of {shape[0]} samples and {shape[1]} features: it must be between 1 and "
                f"{min(shape)}. Pass n_components={min(shape)} or fewer.",
            )
        check_variance(covariance)

    def _learn(self, seen: _Seen, components: NDArray[Any], values: NDArray[Any]) -> None:
        dtype = getattr(self, "_dtype", np.dtype(np.float64))
        values = np.maximum(values, 0.0)
        self.components_: NDArray[Any] = components.astype(dtype, copy=False)
        # In float64 whatever the data are: squares of float32 numbers leave its range.
        self.explained_variance_: NDArray[np.float64] = values.astype(np.float64, copy=False)
        self.explained_variance_ratio_: NDArray[np.float64] = self.explained_variance_ / seen.total_variance
        self.singular_values_: NDArray[np.float64] = np.sqrt(self.explained_variance_ * (seen.num_samples - 1))
        self.mean_: NDArray[Any] = np.asarray(seen.mean).astype(dtype, copy=False)
        self.n_components_ = len(components)
        self.n_samples_ = seen.num_samples

    def _warn(self, test: MissedValueTest, intervals: NDArray[np.float64]) -> None:
        widths = np.diff(intervals, axis=1)[:, 0] / 2  # (K,)
        largest = float(intervals.mean(axis=1).max())
        wide = np.flatnonzero(widths > self.tol * largest) if self.tol else np.array([], dtype=int)
        if len(wide):
            worst = int(wide[np.argmax(widths[wide])])
            warnings.warn(
                f"{len(wide)} of {len(widths)} eigenvalues are known less well than tol={self.tol} asks for: component {worst + 1} to within "
                f"{widths[worst] / largest:.1e} of the largest eigenvalue. {self._advice()}",
                ConvergenceWarning,
                stacklevel=3,
            )
        if not test.passed:
            warnings.warn(
                f"A larger eigenvalue was missed: {test.probe_value:.6g} lies outside the components, whose smallest is {test.smallest_kept:.6g}. "
                f"The components are not the leading ones. {self._advice()}",
                UserWarning,
                stacklevel=3,
            )
        if self.n_components_ < self.n_components:
            warnings.warn(self._shortage(), UserWarning, stacklevel=3)

    def _shortage(self) -> str:
        return (
            f"The data have only {counted(self.n_components_, 'direction')} with variance, fewer than n_components={self.n_components}; "
            f"the fit has {counted(self.n_components_, 'component')}."
        )

    def _advice(self) -> str:
        return "Raise num_rounds, or tol."

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def transform(self, X: Any) -> NDArray[Any]:
        """Coordinates of samples along the components: ``(X - mean_) @ components_.T``.

        Parameters
        ----------
        X : array-like, sparse matrix, memory map, LinearOperator or RowSource of shape (n_samples, n_features)
            Sparse data stay sparse.

        Returns
        -------
        ndarray of shape (n_samples, n_components_)
            In the dtype that was fitted.
        """
        check_is_fitted(self)
        directions = self.components_.T  # (features, components)
        if not _is_plain(X):
            return self._transform_lazily(X, directions)
        X = validate_data(self, X, accept_sparse=["csr", "csc"], dtype=[np.float64, np.float32], reset=False)
        if scipy.sparse.issparse(X):
            scores: NDArray[Any] = np.asarray(X @ directions) - self.mean_ @ directions
        else:
            scores = (X - self.mean_) @ directions
        return scores

    def _transform_lazily(self, X: Any, directions: NDArray[Any]) -> NDArray[Any]:
        if len(X.shape) != 2 or X.shape[1] != self.n_features_in_:
            raise InputError(
                "feature-count", f"X has {X.shape[-1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features as input. "
                "Pass data with the columns that were fitted."
            )  # fmt: skip
        if hasattr(X, "matmat"):  # a LinearOperator: its rows cannot be centred one by one
            scores: NDArray[Any] = np.asarray(X.matmat(directions)) - self.mean_ @ directions
            return scores
        size = max(1, CHUNK_BYTES // (8 * X.shape[1]))
        chunks = X.chunks(size) if hasattr(X, "chunks") else (X[i : i + size] for i in range(0, X.shape[0], size))
        return np.concatenate([(np.asarray(chunk, dtype=self.mean_.dtype) - self.mean_) @ directions for chunk in chunks])

    def inverse_transform(self, X: ArrayLike) -> NDArray[Any]:
        """Points in the original space with these coordinates: ``X @ components_ + mean_``.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_components_)
            Coordinates, as ``transform`` returns them.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            The nearest points in the span of the components.
        """
        check_is_fitted(self)
        scores = np.asarray(X, dtype=self.components_.dtype)
        if scores.ndim != 2 or scores.shape[1] != len(self.components_):
            raise InputError(
                "score-count", f"got coordinates of shape {scores.shape}, expected (n_samples, {len(self.components_)}). Pass what transform returned."
            )
        points: NDArray[Any] = scores @ self.components_ + self.mean_
        return points


def rayleigh_ritz(covariance: Covariance, vectors: NDArray[Any]) -> NDArray[Any]:
    """The best eigenvectors within the span of unit rows (k, d), orthonormal, largest first."""
    with one_blas_thread():
        basis = np.ascontiguousarray(np.linalg.qr(vectors.T)[0].T)  # (k, d)
        small = basis @ covariance.product(basis).T  # (k, k)
        _, rotation = np.linalg.eigh((small + small.T) / 2)
        rotated: NDArray[Any] = rotation[:, ::-1].T @ basis
        return rotated


def positive_largest(vectors: NDArray[Any]) -> NDArray[Any]:
    """Rows with the sign that makes their largest entry in size positive; the first of equals counts."""
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None], axis=1)  # (k, 1)
    signed: NDArray[Any] = vectors * np.where(largest < 0, -1, 1)
    return signed


def _is_plain(X: Any) -> bool:
    """Whether scikit-learn's own checks apply. Memory maps, operators and readers are checked while they are read."""
    return not (isinstance(X, np.memmap) or callable(getattr(X, "chunks", None)) or hasattr(X, "matmat"))


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
