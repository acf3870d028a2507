"""How near the sum of some of a few random numbers comes to a target, if each of them may move by a little; by trying all subsets.

A weight of a trained network can be built from random weights by choosing which of them stay; how many are needed is a question about sums of subsets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from partwise.checks import InputError, check_radius

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array: TypeAlias = NDArray[np.float64]
    Integers: TypeAlias = NDArray[np.int64]

__all__ = ["best_subset_errors", "errors_by_size", "subset_sums"]

MAX_CANDIDATES = 20  # a million subsets


def subset_sums(candidates: ArrayLike) -> tuple[Array, Integers]:
    """Sums of all subsets, the empty one first, and how many numbers each has.

    Parameters
    ----------
    candidates : array of shape (num_candidates,)
        At most 20 finite numbers.

    Returns
    -------
    sums : ndarray of shape (2 ** num_candidates,)
        Subset number ``i`` holds candidate ``j`` where bit ``j`` of ``i`` is set.
    sizes : ndarray of shape (2 ** num_candidates,), int64
        Numbers in each.

    Raises
    ------
    InputError
        ``too-many-candidates``, ``not-finite``.

    Examples
    --------
    >>> subset_sums([1.0, -3.0])
    (array([ 0.,  1., -3., -2.]), array([0, 1, 1, 2]))
    """
    values = np.asarray(candidates, dtype=np.float64).ravel()
    if len(values) > MAX_CANDIDATES:
        raise InputError(
            "too-many-candidates", f"got {len(values)} candidates, expected at most {MAX_CANDIDATES}: all subsets are tried. Pass fewer, or some of them."
        )
    _refuse_not_finite(values, "candidates")
    sums, sizes = np.zeros(1), np.zeros(1, dtype=np.int64)
    for value in values:
        sums, sizes = np.concatenate([sums, sums + value]), np.concatenate([sizes, sizes + 1])  # twice as many
    return sums, sizes


def errors_by_size(candidates: ArrayLike, targets: ArrayLike) -> Array:
    """Distance of each target from the nearest sum of exactly so many candidates.

    Parameters
    ----------
    candidates : array of shape (num_candidates,)
        At most 20 finite numbers.
    targets : array of shape (num_targets,)
        Finite numbers.

    Returns
    -------
    ndarray of shape (num_candidates + 1, num_targets)
        Row ``k`` is for subsets of ``k`` candidates.
    """
    sums, sizes = subset_sums(candidates)
    wanted = np.asarray(targets, dtype=np.float64).ravel()  # (targets,)
    _refuse_not_finite(wanted, "targets")
    found = np.empty((int(sizes[-1]) + 1, len(wanted)))
    for size in range(len(found)):
        group = np.sort(sums[sizes == size])
        above = np.searchsorted(group, wanted).clip(max=len(group) - 1)
        found[size] = np.minimum(np.abs(group[above] - wanted), np.abs(group[(above - 1).clip(min=0)] - wanted))
    return found


def best_subset_errors(candidates: ArrayLike, targets: ArrayLike, *, radius: float = 0.0) -> Array:
    """Smallest distance of each target from the sum of a subset whose members may each move by at most ``radius``.

    ``k`` chosen candidates move their sum by anything up to ``k * radius``, so the error of a subset is ``max(0, |target - sum| - k * radius)``. The empty
    subset counts, with a sum of 0.

    Parameters
    ----------
    candidates : array of shape (num_candidates,)
        At most 20 finite numbers.
    targets : array of shape (num_targets,)
        Finite numbers.
    radius : float, default=0
        0 or more (epsilon in the paper).

    Returns
    -------
    ndarray of shape (num_targets,)

    Raises
    ------
    InputError
        ``radius-range``, ``too-many-candidates``, ``not-finite``.

    References
    ----------
    Strong Lottery Ticket Hypothesis with epsilon-perturbation. arXiv:2210.16589.

    Examples
    --------
    >>> best_subset_errors([0.5, -0.125], [0.25, 0.5])
    array([0.125, 0.   ])
    >>> best_subset_errors([0.5, -0.125], [0.25, 0.5], radius=0.05)  # 0.5 - 0.125, each moved
    array([0.025, 0.   ])
    """
    check_radius(radius)
    distances = errors_by_size(candidates, targets)
    slack = np.arange(len(distances)) * radius if radius < np.inf else np.where(np.arange(len(distances)) > 0, np.inf, 0.0)
    return np.asarray(np.maximum(0.0, distances - slack[:, None]).min(axis=0))


def _refuse_not_finite(values: Array, name: str) -> None:
    num_bad = int((~np.isfinite(values)).sum())
    if num_bad:
        raise InputError("not-finite", f"{name} has {num_bad} NaN or infinite entries out of {len(values)}. Check how they were computed.")
