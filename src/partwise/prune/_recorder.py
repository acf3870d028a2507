"""What happens after each axis that is decided: a row, a checkpoint with all choices so far, and a look at whether to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from partwise.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from partwise.prune.plan import load_plan
from partwise.prune.unit_method import Choice
from partwise.runs import RunFolder, Stopped

if TYPE_CHECKING:
    from partwise.models.axes import CoupledAxis
    from partwise.prune.plan import PrunePlan

__all__ = ["Recorder"]

PLAN = "plan"  # in the folder of checkpoints, once the whole plan is made


class Recorder:
    """Keeps what was decided, so that a run that was killed goes on to the same bits.

    Parameters
    ----------
    run : RunFolder
        Where rows and checkpoints go. Rows after the last checkpoint are dropped: their axes will be decided again.
    axes : sequence of CoupledAxis
        What is decided about, for the rows.
    should_stop : callable
        Asked after each axis.

    Attributes
    ----------
    done : dict of str to Choice
        Axis name -> what was chosen before this process.
    plan : PrunePlan or None
        The whole plan, when it was made before.
    """

    def __init__(self, run: RunFolder, axes: Sequence[CoupledAxis], *, should_stop: Callable[[], bool]) -> None:
        self._run, self._axes, self._should_stop = run, {axis.name: axis for axis in axes}, should_stop
        newest = latest_checkpoint(run.checkpoints)
        self.plan: PrunePlan | None = load_plan(run.checkpoints / PLAN) if (run.checkpoints / PLAN).is_dir() else None
        self.done: dict[str, Choice] = {} if newest is None else _choices_in(*load_checkpoint(newest))
        if self.plan is None:
            run.rewind(len(self.done))
        self._choices = dict(self.done)
        self._clock = time.perf_counter()

    def note(self, name: str, choice: Choice) -> None:
        """After each axis.

        Raises
        ------
        Stopped
            When asked to stop; the choice is saved.
        """
        self._choices[name] = choice
        axis = self._axes[name]
        self._row("axis", len(self._choices), where=name, units=axis.kind, kept=len(choice.units), of=axis.size)
        tensors, order = _tensors_of(self._choices), list(self._choices)
        save_checkpoint(self._run.checkpoints, step=len(self._choices), tensors=tensors, state={"axes": order})
        if self._should_stop():
            self._run.set_status("interrupted")
            raise Stopped(self._run.path)

    def finish(self, plan: PrunePlan) -> PrunePlan:
        """Once the plan is whole: save it, and give it as a run that resumes would have it."""
        self._row("plan", len(self._choices) + 1, num_tokens=plan.num_tokens)
        plan.save(self._run.checkpoints / PLAN)
        return load_plan(self._run.checkpoints / PLAN)

    @property
    def seconds(self) -> float:
        """That the plan took, over all processes."""
        return sum(float(row["seconds"]) for row in self._run.metrics() if row.get("kind") in ("axis", "plan"))

    def _row(self, kind: str, step: int, **values: Any) -> None:
        now = time.perf_counter()
        self._run.append_metrics({"kind": kind, "step": step} | values | {"seconds": now - self._clock})
        self._run.sync()
        self._clock = now


def _tensors_of(choices: dict[str, Choice]) -> dict[str, Any]:
    import torch

    tensors = {}
    for number, choice in enumerate(choices.values()):
        tensors[f"{number}/units"] = torch.tensor(choice.units, dtype=torch.int64)
        tensors[f"{number}/scores"] = choice.scores
        if choice.factors is not None:
            tensors[f"{number}/factors"] = choice.factors
    return tensors


def _choices_in(tensors: dict[str, Any], state: dict[str, Any]) -> dict[str, Choice]:
    return {
        name: Choice(tuple(tensors[f"{number}/units"].tolist()), tensors[f"{number}/scores"], tensors.get(f"{number}/factors"))
        for number, name in enumerate(state["axes"])
    }
