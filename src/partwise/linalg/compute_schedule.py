"""Deal a total number of steps to components that are trained one after the other. Plain integers, no tensors."""

from __future__ import annotations

import math
from fractions import Fraction

from partwise.checks import InputError, check_at_least

__all__ = ["compute_schedule"]

SMALLEST_WEIGHT = Fraction(1, 10**9)  # keeps the sum of weights positive for any slope


def compute_schedule(num_components: int, num_steps: int, *, min_steps: int = 1, alpha: float = 0.0) -> tuple[int, ...]:
    """Steps per component: ``min_steps`` each, the rest in proportion to weights that fall (or rise) linearly from first to last.

    With ``x_k`` going from 1 at the first component to -1 at the last in equal steps, component ``k`` has the weight ``1 + alpha * x_k``, cut off
    just above 0. Whole steps come from largest remainders, so the steps always sum to ``num_steps``; of equal remainders the earlier wins.

    Parameters
    ----------
    num_components : int
        Number of components (r in the paper).
    num_steps : int
        Steps to deal in total (T in the paper), at least ``num_components * min_steps``.
    min_steps : int, default=1
        What every component gets, at least 1.
    alpha : float, default=0.0
        0 deals equally, above 0 more to the first components, below 0 more to the last. From 1 on the least favoured get ``min_steps`` only.

    Returns
    -------
    tuple of int
        One number of steps per component.

    Raises
    ------
    InputError
        When the steps do not suffice, ``alpha`` is not finite, or ``alpha`` is not 0 though there is only one component.

    References
    ----------
    One Rank at a Time: Cascading Error Dynamics in Sequential Learning. arXiv:2505.22602.

    Examples
    --------
    >>> compute_schedule(4, 30, min_steps=2, alpha=1.0)
    (13, 9, 6, 2)
    """
    check_at_least(num_components, 1, name="num_components")
    check_at_least(min_steps, 1, name="min_steps")
    check_at_least(num_steps, 1, name="num_steps")
    if not math.isfinite(alpha):
        raise InputError("alpha-not-finite", f"got alpha={alpha}, expected a finite number. Pass 0 for equal steps, or 1 for more steps first.")
    if num_components == 1 and alpha != 0:
        raise InputError(
            "one-component", f"got alpha={alpha} for one component, expected at least two to deal steps between. Pass alpha=0, or more components."
        )
    spare = num_steps - num_components * min_steps
    if spare < 0:
        raise InputError(
            "too-few-steps",
            f"got num_steps={num_steps} for {num_components} components of at least {min_steps} steps, "
            f"expected at least {num_components * min_steps}. Raise num_steps, or lower min_steps or the number of components.",
        )
    weights = _linear_weights(num_components, Fraction(alpha))
    quotas = [spare * weight / sum(weights) for weight in weights]
    steps = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(num_components), key=lambda k: (steps[k] - quotas[k], k))
    for k in by_remainder[: spare - sum(steps)]:
        steps[k] += 1
    return tuple(min_steps + extra for extra in steps)


def _linear_weights(num_components: int, alpha: Fraction) -> list[Fraction]:
    if num_components == 1:
        return [Fraction(1)]
    positions = (1 - Fraction(2 * k, num_components - 1) for k in range(num_components))  # 1 ... -1
    return [max(1 + alpha * position, SMALLEST_WEIGHT) for position in positions]
