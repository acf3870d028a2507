"""Which settings of the rounds go together, and what is said about those that do not."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING

from partwise.checks import InputError

if TYPE_CHECKING:
    from partwise.decompose._eigen_rounds import ParallelDeflation

__all__ = ["check_combination", "check_step_size", "check_tol"]


def check_tol(tol: object) -> None:
    """Refuse a tolerance that is no share."""
    if not isinstance(tol, Real) or isinstance(tol, bool) or not 0 <= float(tol) < 1:
        raise InputError("tol-range", f"got tol={tol!r}, expected 0 or more and below 1. Pass tol=1e-6, or 0 to run all rounds.")


def check_step_size(step_size: object) -> None:
    """Refuse a step that is no finite number above 0."""
    if step_size is None:
        return
    if not isinstance(step_size, Real) or isinstance(step_size, bool) or not 0 < float(step_size) < float("inf"):
        raise InputError("step-size-range", f"got step_size={step_size!r}, expected a finite number above 0. Pass None for the default.")


def check_combination(method: ParallelDeflation) -> None:
    """Refuse settings that the solver would not use, or cannot work with."""
    if method.batch_size is not None and method.solver in ("power", "lanczos"):
        raise InputError(
            "batch-needs-hebb",
            f"got batch_size={method.batch_size} with solver={method.solver!r}, expected solver='hebb': a full step on one batch does not average the "
            "noise of the batches. Pass solver='hebb', or batch_size=None.",
        )
    if method.step_size is not None and method.solver in ("power", "lanczos"):
        raise InputError(
            "step-needs-hebb",
            f"got step_size={method.step_size} with solver={method.solver!r}, expected solver='hebb': the step of other solvers has no length. "
            "Pass solver='hebb', or step_size=None.",
        )
    if method.block_size is not None and method.solver != "lanczos":
        raise InputError(
            "block-needs-lanczos",
            f"got block_size={method.block_size} with solver={method.solver!r}, expected solver='lanczos': other solvers work on one component per "
            "part. Pass solver='lanczos', or block_size=None.",
        )
    if method.update != "deflation" and method.solver == "lanczos":
        raise InputError(
            "game-needs-steps",
            f"got update={method.update!r} with solver='lanczos', expected 'power', 'hebb' or 'adam': the games have no deflated matrix to solve. "
            "Pass update='deflation', or another solver.",
        )
