"""A certificate for anybody's components: those of scikit-learn, of scipy, of another program, of a file."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator

from partwise.checks import InputError
from partwise.decompose._covariance import covariance_of
from partwise.decompose._readers import RowSource
from partwise.linalg.certificate import Certificate
from partwise.linalg.certificate import certify as certify_products
from partwise.linalg.products import one_blas_thread

__all__ = ["certify"]


def certify(
    X: Any, components: ArrayLike, *, mean: ArrayLike | None = None, seed: int = 0, num_probe_steps: int | None = None, tolerance: float = 1e-6
) -> Certificate:
    """Certify directions as principal components of data, whoever computed them.

    Works on the components alone: neither the eigenvalues that came with them nor the program that made them is trusted.

    Parameters
    ----------
    X : array-like, sparse matrix, memory map, LinearOperator or RowSource of shape (n_samples, n_features)
        The data, rows are samples. Not copied and not made dense; centring is implicit.
    components : array-like of shape (n_components, n_features)
        One direction per row, as ``PCA.components_``; transpose what ``scipy.sparse.linalg.eigsh`` returns. Lengths do not matter, and they need not
        be orthogonal.
    mean : array-like of shape (n_features,), optional
        What the data were centred by; None: their mean. Zeros for ``TruncatedSVD``, which does not centre.
    seed : int, default=0
        Of the random starts of the probe.
    num_probe_steps : int, default=10
        Most steps of the probe, each a product of the covariance with 8 vectors. More steps resolve smaller gaps.
    tolerance : float, default=1e-6
        A value outside the components counts as missed when it is larger than the smallest one kept by this share of the largest value.

    Returns
    -------
    Certificate
        ``values``, ``residuals`` and ``intervals`` in the order of ``components``, and ``missed_value_test``. The eigenvalues are those of the
        covariance with n_samples - 1, as in ``explained_variance_``. Each of the K intervals holds an eigenvalue of its own: guaranteed, up to
        rounding. That these are the K largest rests on the probe, which says with what chance it can have been fooled.

    Raises
    ------
    InputError
        When the data or components cannot be used. A ``ValueError``.

    See Also
    --------
    ParallelDeflationPCA : Certifies its own components.

    References
    ----------
    Parlett. The Symmetric Eigenvalue Problem, theorems 4.5.1 and 11.5.1. doi:10.1137/1.9781611971163.

    Examples
    --------
    >>> from sklearn.decomposition import PCA
    >>> X = np.random.default_rng(0).normal(size=(2000, 500))  # a flat spectrum
    >>> certify(X, PCA(5, random_state=0).fit(X).components_).missed_value_test.passed
    False
    >>> certify(X, PCA(5, svd_solver="covariance_eigh").fit(X).components_).missed_value_test.passed
    True
    """
    if not (isinstance(X, (np.ndarray, LinearOperator, RowSource)) or scipy.sparse.issparse(X)):
        X = np.asarray(X)  # a list, a DataFrame, or anything else that knows how to become an array
    rows = np.asarray(components)
    if len(X.shape) != 2:
        raise InputError("data-shape", f"got data of shape {X.shape}, expected a matrix of at least 2 samples and 1 feature. Pass one row per sample.")
    if rows.ndim != 2 or rows.shape[1] != X.shape[-1] or not 1 <= len(rows) <= rows.shape[1]:
        hint = " Transpose them." if rows.ndim == 2 and rows.shape[0] == X.shape[-1] else " Pass one component per row."
        raise InputError(
            "components-shape", f"got components of shape {rows.shape} for data of shape {X.shape}, expected (n_components, {X.shape[-1]}).{hint}"
        )
    if rows.dtype.kind not in "fiu":
        raise InputError("components-dtype", f"got components of type {rows.dtype}, expected real numbers. Convert them: components.astype(float).")
    covariance = covariance_of(X, mean=None if mean is None else np.asarray(mean, dtype=np.float64))
    with one_blas_thread():
        certificate = certify_products(
            covariance.product,
            rows.astype(covariance.dtype),
            seed=seed,
            num_probe_steps=num_probe_steps,
            tolerance=tolerance,
            rounding=covariance.rounding,
        )
    intervals: NDArray[np.float64] = np.maximum(certificate.intervals, 0.0)  # a covariance has no eigenvalues below 0
    return dataclasses.replace(certificate, intervals=intervals)
