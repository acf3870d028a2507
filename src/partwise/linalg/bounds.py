"""What theory says about deflation: error envelopes, warm-up rounds, the cascade of errors, and the rate that is seen in practice."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from partwise.checks import InputError, check_at_least, load_extra

__all__ = [
    "cascade_bound", "deflation_error_bound", "error_envelope", "plan_iterations", "predicted_rates", "theorem_rates", "warm_up_rounds",
]  # fmt: skip


def predicted_rates(singular_values: Sequence[float], *, num_components: int, num_local_steps: int = 1) -> tuple[float, ...]:
    """Factor by which the error of each component shrinks per round of parallel deflation with the ``power`` solver, once it has settled.

    With ``rho_k = (sigma_{k+1} / sigma_k)^2`` it is ``max(rho_{k-1}, rho_k)^num_local_steps``. Component k corrects itself at its own rate; what it
    inherits from component j in front is j's error along component k, which shrinks by ``(sigma_k / sigma_j)^2``, slowest for ``j = k - 1``. Errors
    further in front stay among themselves to first order, so the slowest rate so far, ``max_{j <= k} rho_j``, is an upper bound and often not
    reached. All this describes what is seen after a start-up that is long when two rates nearly tie; it is not a bound with constants.

    Parameters
    ----------
    singular_values : sequence of float
        Of the reduced target, largest first; one after the last is taken as 0.
    num_components : int
        Components to predict (r in the paper).
    num_local_steps : int, default=1
        Solver steps per round.

    References
    ----------
    AdaPaD. arXiv:2605.10741.

    Examples
    --------
    >>> predicted_rates([4.0, 2.0, 1.5, 0.0], num_components=3)
    (0.25, 0.5625, 0.5625)
    """
    check_at_least(num_components, 1, name="num_components")
    num_positive = sum(value > 0 for value in singular_values)
    if num_components > num_positive:
        raise InputError(
            "rank-out-of-range",
            f"num_components={num_components} is more than the {num_positive} singular values above 0. Pass num_components={num_positive} or less.",
        )
    values = [*map(float, singular_values), 0.0]
    rates = [(values[k + 1] / values[k]) ** (2 * num_local_steps) for k in range(num_components)]
    return tuple(max(rates[max(k - 1, 0) : k + 1]) for k in range(num_components))


def theorem_rates(contractions: Sequence[float]) -> tuple[float, ...]:
    """Rates ``m_k`` of the theorem on parallel deflation: ``m_k = max(F_k, 1/k + (k-1)/k m_{k-1})``, with ``m_1 = F_1``.

    Parameters
    ----------
    contractions : sequence of float
        ``F_k`` in (0, 1): the largest factor by which one call of the solver shrinks the error on any target that component k meets from round k on.

    Notes
    -----
    The theorem starts its recursion at ``m_0 = F_1``, which makes ``m_1 = 1`` and says nothing about the first component or those behind it. We take
    ``m_0 = F_1`` to mean the rate of the first component.

    References
    ----------
    Liao, Su, Kyrillidis. Provable Model-Parallel Distributed Principal Component Analysis with Parallel Deflation, Theorem 2. arXiv:2502.17615.

    Examples
    --------
    >>> theorem_rates([0.5, 0.25, 0.25])
    (0.5, 0.75, 0.8333333333333333)
    """
    if not contractions or not all(0 < factor < 1 for factor in contractions):
        raise InputError(
            "contraction-range",
            f"got contractions={tuple(contractions)}, expected one or more factors, each between 0 and 1. Use a solver that contracts.",
        )
    rates = [float(contractions[0])]
    for k, factor in enumerate(contractions[1:], start=2):
        rates.append(max(float(factor), 1 / k + (k - 1) / k * rates[-1]))
    return tuple(rates)


def warm_up_rounds(eigenvalues: Sequence[float], rates: Sequence[float]) -> tuple[float, ...]:
    """Smallest warm-up rounds ``s_k`` that the theorem on parallel deflation allows.

    Parameters
    ----------
    eigenvalues : sequence of float
        Distinct and positive, largest first, one more than there are rates; a last one of 0 is fine.
    rates : sequence of float
        ``m_k`` from ``theorem_rates``.

    Returns
    -------
    tuple of float
        One per rate, the first is 1. Round up where whole rounds are needed.

    References
    ----------
    Liao, Su, Kyrillidis. Provable Model-Parallel Distributed Principal Component Analysis with Parallel Deflation, Theorem 2. arXiv:2502.17615.
    """
    if len(eigenvalues) <= len(rates):
        raise InputError(
            "too-few-eigenvalues",
            f"got {len(eigenvalues)} eigenvalues for {len(rates)} rates, expected one more. Append the next one, or 0 if there is none.",
        )
    starts = [1.0]
    for k in range(1, len(rates)):  # s_{k+1} from components 1..k; index k - 1 is component k
        log_rate = math.log(1 / rates[k - 1])
        settle = max(_lambert(rates[k - 1] * log_rate) / log_rate, (k * rates[k - 1] + 1) / (1 - rates[k - 1]))
        gap = eigenvalues[k] - eigenvalues[k + 1]
        starts.append(max(settle + _lambert(gap / (12 * k * eigenvalues[j]) * log_rate**2) / math.log(1 / rates[j]) + starts[j] for j in range(k)))
    return tuple(starts)


def _lambert(value: float) -> float:
    """``-W_{-1}(-value)`` on (0, 1/e), the lower branch of Lambert's function; 1 from 1/e on."""
    if not value > 0:
        raise InputError("no-gap", f"got a gap term of {value}, expected more than 0. The theorem needs distinct eigenvalues; merge equal ones.")
    if value >= 1 / math.e:
        return 1.0
    special = load_extra("scipy.special", extra="sklearn")  # late: the rest of this module needs no scipy
    return -float(special.lambertw(-value, -1).real)


def error_envelope(round_number: int, *, warm_up: float, rate: float) -> float:
    """Bound ``6 (l - s + 2) m^(l - s + 1)`` on the error of a component at round ``l``, valid from ``l = s - 1`` on.

    Parameters
    ----------
    round_number : int
        ``l``, the first round is 1.
    warm_up, rate : float
        ``s`` from ``warm_up_rounds`` and ``m`` from ``theorem_rates`` of the component.

    References
    ----------
    Liao, Su, Kyrillidis. Provable Model-Parallel Distributed Principal Component Analysis with Parallel Deflation, Theorem 2. arXiv:2502.17615.
    """
    past = round_number - warm_up + 1
    if past < 0:
        raise InputError(
            "before-warm-up",
            f"got round_number={round_number} for warm_up={warm_up:.6g}, expected at least {warm_up - 1:.6g}. The bound starts there.",
        )
    return float(6 * (past + 1) * rate**past)


def cascade_bound(singular_values: Sequence[float], step_errors: Sequence[float]) -> float:
    """Bound on the residual of sequential deflation when each step leaves an error behind.

    ``sqrt(sum_{k > r} sigma_k^2) + sum_k (prod_{j < k} rho_j) ||Psi_k||``, ``rho_j = 2 + 6 sigma_j / (sigma_j - sigma_{j+1})``. It holds while the
    errors that have piled up stay below half of the smallest gap, and it is very loose: use it as a check, never as a prediction.

    Parameters
    ----------
    singular_values : sequence of float
        All singular values of the target, largest first, the first r + 1 distinct; one after the last is taken as 0.
    step_errors : sequence of float
        ``||Psi_k||_F``: distance between what step k found and the best rank-one part of the target it saw, for k = 1 ... r.

    Notes
    -----
    Two texts of the essay disagree on whose singular values these are; we take those of the target, as its current text does.

    References
    ----------
    One Rank at a Time: Cascading Error Dynamics in Sequential Learning, Theorem 1. arXiv:2505.22602.

    Examples
    --------
    >>> cascade_bound([4.0, 2.0, 1.0], [0.0, 0.0])  # exact steps: only the tail is left
    1.0
    """
    values = [*map(float, singular_values), 0.0]
    num_components = len(step_errors)
    growth, cascade = 1.0, 0.0
    for k, error in enumerate(step_errors):
        cascade += growth * error
        gap = values[k] - values[k + 1]
        if not gap > 0:
            raise InputError(
                "no-gap", f"got a gap of {gap} between singular values {k + 1} and {k + 2}, expected more than 0. The bound needs distinct values."
            )
        growth *= 2 + 6 * values[k] / gap
    return math.sqrt(sum(value**2 for value in values[num_components:])) + cascade


def deflation_error_bound(eigenvalues: Sequence[float], deltas: Sequence[float], *, gaps: Sequence[float] | None = None) -> tuple[float, ...]:
    """Bounds on the errors of components that were found one after the other, each on what the ones before it left over.

    With ``D_k`` the norm of the difference between the matrix that component k was searched in and the one that exact components would have left,
    ``D_1 = 0``, ``e_k <= delta_k + 2 sqrt(2) D_k / g_k`` (Davis and Kahan, in the form of Yu, Wang and Samworth) and
    ``D_{k+1} <= 2 D_k + 2 lambda_k e_k``. An error grows by up to ``2 + 4 sqrt(2) lambda_k / g_k`` per component, so the bound is safe and not sharp.

    Parameters
    ----------
    eigenvalues : sequence of float
        Of a positive semi-definite matrix, largest first, one more than there are ``deltas``; a last one of 0 is fine.
    deltas : sequence of float
        ``delta_k``: distance between unit vector k and the exact top eigenvector of the matrix it was searched in, signs aligned.
    gaps : sequence of float, optional
        ``g_k``, as many as ``deltas``, where they are known better than as differences of ``eigenvalues``, which may then be upper bounds.

    Returns
    -------
    tuple of float
        One bound per component on ``min(||v_k - u_k||, ||v_k + u_k||)``. Infinite from the first component on that has no gap to the next
        eigenvalue and needs one, with a warning that names it.

    Raises
    ------
    InputError
        When lengths differ, or the eigenvalues are negative or in ascending order.

    References
    ----------
    On the Error-Propagation of Inexact Hotelling's Deflation for Principal Component Analysis. arXiv:2310.04283.
    The recursion is our own; the constants of the paper are smaller for power iteration.

    Examples
    --------
    >>> [round(error, 6) for error in deflation_error_bound([4.0, 2.0, 1.0], [0.001, 0.001])]  # 0.001 + 2 sqrt(2) 0.008
    [0.001, 0.023627]
    """
    eigenvalues, gaps = _checked_spectrum(eigenvalues, gaps, num_components=len(deltas))
    if not all(delta >= 0 for delta in deltas):
        raise InputError("delta-negative", f"got deltas={tuple(deltas)}, expected distances of at least 0. Pass norms.")
    errors: list[float] = []
    difference = 0.0
    for k, (value, gap, delta) in enumerate(zip(eigenvalues, gaps, deltas, strict=False), start=1):
        inherited = 0.0 if not difference else 2 * math.sqrt(2) * difference / gap if gap > 0 else math.inf
        if gap <= 0 and not (errors and math.isinf(errors[-1])):
            # Without a gap any vector of the cluster is a top eigenvector: delta_k says which of them was found, not that it is u_k.
            warnings.warn(f"component {k} has a gap of {gap:.3g} to the next eigenvalue: errors from component {k} on have no bound.", stacklevel=2)
            inherited = math.inf
        errors.append(delta + inherited)
        difference = 2 * difference + 2 * value * errors[-1] if value > 0 or math.isfinite(errors[-1]) else math.inf
    return tuple(errors)


def plan_iterations(
    eigenvalues: Sequence[float], target: float, *, num_components: int | None = None, start_tangent: float = 1000.0
) -> tuple[float, ...]:
    """Power steps to spend on each component so that the errors of all of them stay below a target.

    The bound of ``deflation_error_bound`` is linear in the errors of the single searches. Each component is given an equal share of the target behind
    it, worked out from the last component back; the steps follow from the ratio of the two largest eigenvalues, made worse by what the components
    in front may leave behind. Like the bound, the plan is safe and asks for more than is needed.

    Parameters
    ----------
    eigenvalues : sequence of float
        Of a positive semi-definite matrix, largest first, one more than there are components; a last one of 0 is fine.
    target : float
        Largest error wanted, above 0: distance between unit vectors, signs aligned.
    num_components : int, optional
        Components to plan for; None: one fewer than ``eigenvalues``.
    start_tangent : float, default=1000.0
        Tangent of the angle between each start and the vector it searches. For a random start in d dimensions it is above ``sqrt(2 d / pi) / p`` with
        a chance of at most p.

    Returns
    -------
    tuple of float
        Whole numbers; infinite from the first component without a gap on, with a warning that names it.

    References
    ----------
    On the Error-Propagation of Inexact Hotelling's Deflation for Principal Component Analysis. arXiv:2310.04283.

    Examples
    --------
    >>> plan_iterations([1.0, 0.5, 0.25], 0.001)
    (26, 21)
    """
    num_components = len(eigenvalues) - 1 if num_components is None else num_components
    check_at_least(num_components, 1, name="num_components")
    eigenvalues, gaps = _checked_spectrum(eigenvalues[: num_components + 1], None, num_components=num_components)
    if not (target > 0 and start_tangent > 0):
        raise InputError("target-range", f"got target={target} and start_tangent={start_tangent}, expected numbers above 0. Pass the error you accept.")
    blocked = next((k for k, gap in enumerate(gaps) if not gap > 0), num_components)
    if blocked < num_components:
        gap = gaps[blocked]
        warnings.warn(f"component {blocked + 1} has a gap of {gap:.3g} to the next eigenvalue: no number of steps tells it apart.", stacklevel=2)
    shares = _shares_of_target(eigenvalues, gaps[:blocked], target)
    steps: list[float] = []
    difference = 0.0
    for k, share in enumerate(shares):
        rate = (eigenvalues[k + 1] + difference) / (eigenvalues[k] - difference)  # Weyl; the shares keep it below 1
        steps.append(max(1, math.ceil(math.log(start_tangent / share) / -math.log(rate)) if rate > 0 else 1))
        error = share + 2 * math.sqrt(2) * difference / gaps[k]
        difference = 2 * difference + 2 * eigenvalues[k] * error
    return (*steps, *[math.inf] * (num_components - blocked))


def _shares_of_target(eigenvalues: Sequence[float], gaps: Sequence[float], target: float) -> list[float]:
    """``delta_j`` such that no error goes above ``target``, and no component's matrix is off by more than a quarter of its gap."""
    num_components = len(gaps)
    limits = [math.inf] * num_components  # for delta_j: its largest effect on any e_k or D_k / g_k, per unit
    for j in range(num_components):
        worst, difference = 1 / target, 2 * eigenvalues[j]  # effects of delta_j on e_j and on D_{j+1}
        for k in range(j + 1, num_components):
            inherited = 2 * math.sqrt(2) * difference / gaps[k]
            worst = max(worst, inherited / target, 4 * difference / gaps[k])
            difference = 2 * difference + 2 * eigenvalues[k] * inherited
        limits[j] = 1 / worst
    return [limit / num_components for limit in limits]


def _checked_spectrum(eigenvalues: Sequence[float], gaps: Sequence[float] | None, *, num_components: int) -> tuple[list[float], list[float]]:
    values = [float(value) for value in eigenvalues]
    if not num_components or len(values) != num_components + 1 or (gaps is not None and len(gaps) != num_components):
        extra = "" if gaps is None else f" and {len(gaps)} gaps"
        raise InputError(
            "lengths-differ",
            f"got {len(values)} eigenvalues{extra} for {num_components} components, expected one eigenvalue more than there are components"
            f"{', and as many gaps' if extra else ''}. Append the next eigenvalue, or 0 if there is none.",
        )
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise InputError("eigenvalue-range", f"got eigenvalues={tuple(values)}, expected finite numbers of at least 0. Pass those of a covariance.")
    if values[0] < values[-1] and values == sorted(values):
        raise InputError("eigenvalues-ascending", f"got eigenvalues={tuple(values)}, expected the largest first. Reverse them.")
    return values, [float(gap) for gap in gaps] if gaps is not None else [values[k] - values[k + 1] for k in range(num_components)]
