"""What theory says about training one hidden layer by subnetworks, and the training itself, to measure it against.

A net has m ReLU neurons and fixed output signs: ``f(x) = m^{-1/2} sum_r a_r max(<w_r, x>, 0)``. A subnetwork keeps some neurons of it, each with
probability ``keep``, and is not scaled up for that; so the whole net is read as ``u = keep * f``. All arrays are float64, inputs have length 1.

References
----------
Liao, Kyrillidis. On the Convergence of Shallow Neural Network Training with Randomly Masked Neurons. arXiv:2112.02668.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from partwise.checks import InputError, check_at_least

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.float64]
    Masks: TypeAlias = NDArray[np.bool_]

__all__ = [
    "ShallowNet", "bernoulli_masks", "bernoulli_sampling_cost", "categorical_masks", "error_ball", "finite_width_kernel", "held_probability",
    "infinite_width_kernel", "masked_round", "predicted_contraction", "random_shallow_net", "subset_sampling_cost",
]  # fmt: skip


@dataclass(frozen=True)
class ShallowNet:
    """One hidden ReLU layer with fixed output weights of plus and minus one.

    Parameters
    ----------
    weights : ndarray of shape (num_neurons, num_features)
        What is trained.
    signs : ndarray of shape (num_neurons,)
        1 or -1 each.
    """

    weights: Array
    signs: Array

    def contributions(self, inputs: Array) -> Array:
        """What each neuron adds to each output: (num_samples, num_neurons)."""
        return np.asarray(self.signs * np.maximum(inputs @ self.weights.T, 0) / len(self.signs) ** 0.5)

    def outputs(self, inputs: Array, *, keep: float = 1.0) -> Array:
        """Outputs of the whole net, read as the mean over subnetworks that keep each neuron with probability ``keep``: (num_samples,)."""
        return np.asarray(keep * self.contributions(inputs).sum(axis=1))


def random_shallow_net(num_neurons: int, num_features: int, *, scale: float, generator: np.random.Generator) -> ShallowNet:
    """Weights drawn from a normal distribution of standard deviation ``scale``, and random signs.

    Examples
    --------
    >>> random_shallow_net(5, 3, scale=1.0, generator=np.random.default_rng(0)).weights.shape
    (5, 3)
    """
    check_at_least(num_neurons, 1, name="num_neurons")
    weights = generator.normal(scale=scale, size=(num_neurons, num_features))
    return ShallowNet(weights, generator.choice([-1.0, 1.0], size=num_neurons))


def bernoulli_masks(num_neurons: int, *, num_subnets: int, keep: float, generator: np.random.Generator) -> Masks:
    """Which neurons each subnetwork holds, each with probability ``keep`` on its own: (num_subnets, num_neurons). A subnetwork may be empty."""
    _check_keep(keep)
    return generator.random((num_subnets, num_neurons)) < keep


def categorical_masks(num_neurons: int, *, num_subnets: int, generator: np.random.Generator) -> Masks:
    """Each neuron in exactly one subnetwork, every one equally likely, as in IST: (num_subnets, num_neurons)."""
    return np.asarray(generator.integers(num_subnets, size=num_neurons) == np.arange(num_subnets)[:, None])


def masked_round(net: ShallowNet, inputs: Array, targets: Array, masks: Masks, *, num_local_steps: int, lr: float) -> ShallowNet:
    """Train every subnetwork on its own from the same weights, then move each neuron by the mean over the subnetworks that held it.

    A subnetwork makes plain gradient steps on half the sum of its squared errors. A neuron that nobody held stays where it is.

    Parameters
    ----------
    net : ShallowNet
        The whole net, not changed.
    inputs : ndarray of shape (num_samples, num_features)
        Every row of length 1.
    targets : ndarray of shape (num_samples,)
        What the net should say.
    masks : ndarray of bool of shape (num_subnets, num_neurons)
        From `bernoulli_masks` or `categorical_masks`.
    num_local_steps : int
        Gradient steps of each subnetwork (tau in the paper).
    lr : float
        Size of a step (eta in the paper).
    """
    check_at_least(num_local_steps, 1, name="num_local_steps")
    _check_unit_rows(inputs)
    signed = masks * net.signs / masks.shape[1] ** 0.5  # (subnets, neurons)
    local = np.repeat(net.weights[None], len(masks), axis=0)  # (subnets, neurons, features)
    for _ in range(num_local_steps):
        reached = local @ inputs.T  # (subnets, neurons, samples)
        errors = np.einsum("sr,sri->si", signed, np.maximum(reached, 0)) - targets  # (subnets, samples)
        local -= lr * signed[:, :, None] * (((reached > 0) * errors[:, None, :]) @ inputs)  # (subnets, neurons, features)
    num_holders = masks.sum(axis=0)  # (neurons,)
    share = np.minimum(num_holders, 1) / np.maximum(num_holders, 1)
    return replace(net, weights=net.weights + share[:, None] * (local - net.weights).sum(axis=0))


def infinite_width_kernel(inputs: Array) -> Array:
    """Tangent kernel of the hidden layer with infinitely many neurons: ``c (pi - arccos c) / (2 pi)`` for two inputs with cosine c.

    Its least eigenvalue (lambda_0 in the paper) is positive when no two inputs are parallel.

    Parameters
    ----------
    inputs : ndarray of shape (num_samples, num_features)
        Every row of length 1.

    Returns
    -------
    ndarray of shape (num_samples, num_samples)

    Examples
    --------
    >>> infinite_width_kernel(np.eye(2)).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    _check_unit_rows(inputs)
    cosines = np.clip(inputs @ inputs.T, -1, 1)
    np.fill_diagonal(cosines, 1)  # rounding of 1 is not a small angle to arccos
    return np.asarray(cosines * (np.pi - np.arccos(cosines)) / (2 * np.pi))


def finite_width_kernel(weights: Array, inputs: Array) -> Array:
    """The same kernel with these neurons: ``<x_i, x_j>`` times the share of neurons that are on for both inputs."""
    _check_unit_rows(inputs)
    is_on = (inputs @ weights.T > 0).astype(np.float64)  # (samples, neurons)
    return np.asarray((inputs @ inputs.T) * (is_on @ is_on.T) / len(weights))


def held_probability(keep: float, *, num_subnets: int) -> float:
    """Chance that at least one subnetwork holds a neuron: ``1 - (1 - keep)^num_subnets`` (theta in the paper).

    Examples
    --------
    >>> held_probability(0.5, num_subnets=2)
    0.75
    """
    _check_keep(keep)
    check_at_least(num_subnets, 1, name="num_subnets")
    return float(1 - (1 - keep) ** num_subnets)


def predicted_contraction(smallest_eigenvalue: float, *, lr: float, keep: float, num_subnets: int = 1, num_local_steps: int = 1) -> float:
    """Factor ``1 - lr theta tau lambda_0 / 4`` by which the expected squared error shrinks per round at least, down to an error ball.

    It is stated for wide nets and small steps, with masks drawn neuron by neuron.

    Parameters
    ----------
    smallest_eigenvalue : float
        Of `infinite_width_kernel` (lambda_0).
    lr, keep : float
        Size of a gradient step (eta), and probability that a subnetwork holds a neuron (xi).
    num_subnets, num_local_steps : int, default=1
        Subnetworks of a round (p), and gradient steps of each (tau).

    Examples
    --------
    >>> predicted_contraction(0.4, lr=0.1, keep=0.5, num_subnets=2, num_local_steps=4)
    0.97
    """
    check_at_least(num_local_steps, 1, name="num_local_steps")
    return float(1 - lr * held_probability(keep, num_subnets=num_subnets) * num_local_steps * smallest_eigenvalue / 4)


def error_ball(keep: float, *, num_subnets: int, num_local_steps: int = 1, num_samples: int, num_rounds: int) -> float:
    """How large the ball is that training ends in, up to a constant that theory leaves open: use ratios of two of them.

    ``(1 - xi)^2 / (n K) + (theta - xi^2) / p + ((tau - 1) / tau)^2 theta^2 (1 - xi)``, for weights that begin with standard deviation ``n^{-1/2}``. More
    subnetworks make it smaller, more local steps larger, and at ``keep=1`` it is 0 but for rounding.

    Parameters
    ----------
    keep : float
        Probability that a subnetwork holds a neuron (xi).
    num_subnets, num_local_steps : int
        Subnetworks of a round (p), and gradient steps of each (tau).
    num_samples, num_rounds : int
        Training data (n), and rounds (K).

    Notes
    -----
    The second term is that of the paper's general theorem; its corollary on IST prints ``(theta - xi) / p``. At ``keep=1`` theta is 1, so the second
    term vanishes.

    Examples
    --------
    >>> error_ball(1.0, num_subnets=4, num_local_steps=10, num_samples=100, num_rounds=50)
    0.0
    """
    for name, value in {"num_local_steps": num_local_steps, "num_samples": num_samples, "num_rounds": num_rounds}.items():
        check_at_least(value, 1, name=name)
    held = held_probability(keep, num_subnets=num_subnets)
    drift = ((num_local_steps - 1) / num_local_steps) ** 2 * held**2 * (1 - keep)
    return float((1 - keep) ** 2 / (num_samples * num_rounds) + (held - keep**2) / num_subnets + drift)


def bernoulli_sampling_cost(contributions: Array, targets: Array, *, keep: float) -> float:
    """Expected squared error of a subnetwork that keeps each neuron with probability ``keep``: ``||y - xi A 1||^2 + xi (1 - xi) ||A||_F^2``.

    Parameters
    ----------
    contributions : ndarray of shape (num_samples, num_neurons)
        What each neuron adds to each output (A), as `ShallowNet.contributions` gives it. Any net whose output is a sum over units will do.
    targets : ndarray of shape (num_samples,)
        What the net should say (y).
    keep : float
        Above 0 and at most 1 (xi).

    Examples
    --------
    >>> bernoulli_sampling_cost(np.array([[1.0, 1.0]]), np.array([1.0]), keep=0.5)  # 0, 1, 1 or 2 in place of 1
    0.5
    """
    _check_keep(keep)
    _check_targets(contributions, targets)
    missed = np.sum((targets - keep * contributions.sum(axis=1)) ** 2)
    return float(missed + keep * (1 - keep) * np.sum(contributions**2))


def subset_sampling_cost(contributions: Array, targets: Array, *, num_kept: int) -> float:
    """Expected squared error of a subnetwork of exactly ``num_kept`` neurons, every choice equally likely.

    With k of m neurons: ``||y - (k/m) A 1||^2 + k (1 - k/m) / (m - 1) sum_ir (A_ir - mean_r A_ir)^2``. A piece of a net that is cut into p equal pieces
    is such a subnetwork with ``k = m / p``.

    Parameters
    ----------
    contributions : ndarray of shape (num_samples, num_neurons)
        What each neuron adds to each output (A).
    targets : ndarray of shape (num_samples,)
        What the net should say (y).
    num_kept : int
        Neurons of the subnetwork (k), from 1 to all.

    Examples
    --------
    >>> subset_sampling_cost(np.array([[1.0, 1.0]]), np.array([1.0]), num_kept=1)  # equal neurons: always right
    0.0
    """
    _check_targets(contributions, targets)
    check_at_least(num_kept, 1, name="num_kept")
    num_neurons = contributions.shape[1]
    if num_kept > num_neurons:
        raise InputError(
            "too-many-kept", f"got num_kept={num_kept} of {num_neurons} neurons, expected at most all. Pass num_kept={num_neurons} or less."
        )
    missed = np.sum((targets - num_kept / num_neurons * contributions.sum(axis=1)) ** 2)
    if num_kept == num_neurons:
        return float(missed)
    spread = np.sum((contributions - contributions.mean(axis=1, keepdims=True)) ** 2)
    return float(missed + num_kept * (1 - num_kept / num_neurons) / (num_neurons - 1) * spread)


def _check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise InputError("keep-range", f"got keep={keep}, expected a fraction above 0 and at most 1. Pass 0.5 to keep half.")


def _check_unit_rows(inputs: Array) -> None:
    lengths = np.linalg.norm(inputs, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < 1e-6))
    if len(wrong):
        raise InputError(
            "inputs-not-unit",
            f"got an input of length {lengths[wrong[0]]:.6g} in row {wrong[0]}, expected length 1, which the theory assumes. Divide each row by its length.",
        )


def _check_targets(contributions: Array, targets: Array) -> None:
    if contributions.ndim != 2 or targets.shape != contributions.shape[:1]:
        raise InputError(
            "targets-shape",
            f"got targets of shape {targets.shape} for contributions of shape {contributions.shape}, expected one target for each row. Pass arrays of shapes "
            "(samples,) and (samples, neurons).",
        )
