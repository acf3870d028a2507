"""One rank at a time: train a rank-one adapter, freeze it, add the next, stop when another no longer helps."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from partwise.checks import InputError
from partwise.linalg.compute_schedule import compute_schedule
from partwise.tune._growing_recipe import GrowingRecipe
from partwise.tune.recipe import WARMUP_SHARE, Plan

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from partwise.tune._controller import Controller
    from partwise.tune.adapad import AdaPaDConfig


@dataclass(eq=False)
class Stages:
    """Which component trains now, and whether the next one is worth beginning.

    Parameters
    ----------
    steps : tuple of int
        Optimiser steps of each component.
    tol : float or None
        Stop when a component lowers the held-out loss by less than this share. None: never.
    held_out_loss : callable or None
        Asked at the end of a component, where ``tol`` is given.
    """

    steps: tuple[int, ...]
    tol: float | None = None
    held_out_loss: Callable[[], float] | None = None
    component: int = 0
    losses: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def ends(self) -> tuple[int, ...]:
        """Number of optimiser steps after which each component is done."""
        return tuple(itertools.accumulate(self.steps))

    def begin(self, controller: Controller, *, fresh: bool = True) -> None:
        """Freeze the components before the current one and train that one, from its starting values or as it is."""
        for slot in controller.slots:
            slot.freeze(self.component)
            if fresh and self.component > 0:
                slot.begin(self.component, step=controller.step)
            slot.rank = self.component + 1
        controller.force_level(self.component + 1)

    def stop(self, controller: Controller, *, num_kept: int) -> None:
        """Keep the first ``num_kept`` components (at least one) as they are and train no more."""
        self.stopped = True
        for slot in controller.slots:
            slot.rank = min(slot.rank, max(1, num_kept))
            slot.clear_waiting()
            slot.freeze(slot.rank)

    def after_step(self, controller: Controller) -> None:
        """Freeze a component whose steps are spent and begin the next, unless the last one did not help."""
        if self.stopped or controller.step != self.ends[self.component]:
            return
        helped = True
        if self.tol is not None and self.held_out_loss is not None:
            self.losses.append(self.held_out_loss())
            helped = self.gain() >= self.tol
        if not helped or self.component + 1 == len(self.steps):
            self.stop(controller, num_kept=self.component + helped)
        else:
            self.component += 1
            self.begin(controller)

    def resume(self, controller: Controller) -> None:
        """Find the current component from the number of steps and the ranks that were loaded."""
        self.component = min(bisect.bisect_right(self.ends, controller.step), len(self.steps) - 1)
        if controller.step >= self.ends[-1] or controller.num_levels <= self.component:
            self.stop(controller, num_kept=controller.num_levels)
        else:
            self.begin(controller, fresh=False)

    def gain(self) -> float:
        """Share by which the last component lowered the held-out loss; the first always counts."""
        if len(self.losses) < 2:
            return math.inf
        before, after = self.losses[-2:]
        return (before - after) / abs(before) if before else 0.0


class OneRankAtATime:
    """Train rank-one adapters one after the other; each is frozen when its steps are spent.

    A component starts at zero on top of the frozen ones and gets optimiser steps as from a new optimiser, so your loop, ``Trainer`` or
    ``accelerate`` keeps one optimiser for the whole run and calls nothing extra.

    Parameters
    ----------
    model : nn.Module
        The base model; it is wrapped by ``get_peft_model``.
    config : AdaPaDConfig
        ``r`` is the number of components. Growth and levels are not used.
    num_steps : int
        Optimiser steps of the whole run, dealt to the components.
    schedule : float, default=0
        Slope of the steps per component: 0 deals equally, 1 gives more to the first, -1 more to the last.
    min_steps : int, default=1
        What every component gets at least.
    tol : float, optional
        Stop when a component lowers the held-out loss by less than this share; that component is dropped.
    held_out_loss : callable, optional
        Returns the loss on held-out data; required with ``tol``. It is called with the model in evaluation mode and without gradients.

    Attributes
    ----------
    model : PeftModel
        What to train.

    Raises
    ------
    InputError
        When the steps do not suffice, the schedule is not finite, or ``tol`` comes without ``held_out_loss``.

    References
    ----------
    One Rank at a Time: Cascading Error Dynamics in Sequential Learning. arXiv:2505.22602.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdaPaDConfig,
        *,
        num_steps: int,
        schedule: float = 0.0,
        min_steps: int = 1,
        tol: float | None = None,
        held_out_loss: Callable[[], float] | None = None,
    ) -> None:
        from peft import PeftModel, get_peft_model

        if tol is not None and held_out_loss is None:
            raise InputError(
                "tol-needs-loss", f"tol={tol} was given without held_out_loss, which decides when to stop. Pass a function without arguments."
            )
        check_tol(tol)
        steps = compute_schedule(config.r, num_steps, min_steps=min_steps, alpha=schedule)
        adapted = get_peft_model(model, config)
        assert isinstance(adapted, PeftModel)
        asked = None if held_out_loss is None else functools.partial(evaluated, adapted, held_out_loss)
        self.model, self._stages = adapted, Stages(steps, tol, asked)
        begin(adapted, self._stages)

    @property
    def steps(self) -> tuple[int, ...]:
        """Optimiser steps of each component."""
        return self._stages.steps

    @property
    def done(self) -> bool:
        """True when the last component is frozen or the rule stopped the run."""
        return self._stages.stopped

    @property
    def held_out_losses(self) -> tuple[float, ...]:
        """Held-out loss after each finished component, where ``tol`` was given."""
        return tuple(self._stages.losses)


def begin(model: nn.Module, stages: Stages) -> None:
    """Put a freshly wrapped model under the stages."""
    from partwise.tune.adapad import controller_of

    controller = controller_of(model)
    controller.stages = stages
    stages.begin(controller)


def check_tol(tol: float | None) -> None:
    """Refuse a share that no gain can be compared with."""
    if tol is not None and not 0 <= tol < 1:
        raise InputError("tol-range", f"tol={tol} must lie in [0, 1). Pass 0.01 to stop when a component gains less than 1 %, or leave it out.")


def evaluated(model: nn.Module, loss: Callable[[], float]) -> float:
    """``loss()`` with the model in evaluation mode and without gradients; its mode comes back, also after an error."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return float(loss())
    finally:
        model.train(was_training)


@dataclass(frozen=True, kw_only=True)
class OneRank(GrowingRecipe):
    """Rank-one adapters trained one after the other, each frozen before the next begins.

    Parameters
    ----------
    more_first : float
        Slope of the steps per component: 0 deals equally, 1 gives more to the first, -1 more to the last.
    tol : float or None
        Stop when a component lowers the held-out loss by less than this share. Left out: train all of them.

    References
    ----------
    One Rank at a Time: Cascading Error Dynamics in Sequential Learning. arXiv:2505.22602.
    """

    more_first: float = 0.0
    tol: float | None = None

    @property
    def orders_components(self) -> bool:
        """Earlier components were trained on what mattered most."""
        return True

    def wrap(self, model: nn.Module, plan: Plan) -> PeftModel:
        """Install layers of the full rank with one component active."""
        from peft import get_peft_model

        from partwise.tune.adapad import AdaPaDConfig, controller_of
        from partwise.tune.lora import modules_to_save, target_linears

        targets = target_linears(model, self.target_modules, task_type=plan.task_type)
        num_components = self.num_components(plan, num_modules=len(targets))
        config = AdaPaDConfig(
            r=num_components,
            target_r=num_components,
            lora_alpha=2 * num_components if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=sorted(targets),
            modules_to_save=modules_to_save(model),
            task_type=plan.task_type,
            seed=plan.seed,
        )
        check_tol(self.tol)
        steps = self.steps(num_components, plan.num_steps)
        adapted = get_peft_model(model, config)
        controller_of(adapted).seal()
        begin(adapted, Stages(steps))
        return adapted

    def num_components(self, plan: Plan, *, num_modules: int) -> int:
        """Components of every module that the budget buys."""
        wanted = plan.target_r if plan.budget is None else plan.budget / num_modules
        if wanted < 1:
            raise InputError(
                "budget-too-small",
                f"the budget is {plan.budget} components for {num_modules} modules, expected at least one each. "
                f"Pass --budget {num_modules} or more, or name fewer --target-modules.",
            )
        return math.floor(wanted + 1e-9)

    def steps(self, num_components: int, num_steps: int) -> tuple[int, ...]:
        """Optimiser steps of each component."""
        return compute_schedule(num_components, num_steps, alpha=self.more_first if num_components > 1 else 0.0)

    def lr_factor(self, step: int, plan: Plan) -> float:
        """Linear warm-up and linear decay to 0 within each component."""
        if plan.budget is not None and plan.num_modules is None:
            return super().lr_factor(step, plan)
        start = 0
        for length in self.steps(self.num_components(plan, num_modules=plan.num_modules or 1), plan.num_steps):
            if step < start + length:
                inside, num_warmup = step - start, max(1, math.ceil(WARMUP_SHARE * length))
                return (inside + 1) / num_warmup if inside < num_warmup else (length - inside) / max(1, length - num_warmup)
            start += length
        return 0.0

    def after_step(self, model: PeftModel, step: int, plan: Plan, *, held_out_loss: Callable[[], float]) -> bool:
        """Judge a component that has just ended; False when it did not help."""
        stages = self._stages(model)
        if self.tol is None or step + 1 not in stages.ends:
            return True
        finished = stages.ends.index(step + 1)
        stages.losses.append(held_out_loss())
        if stages.gain() >= self.tol:
            return True
        stages.stop(self.controller(model), num_kept=finished)
        return False

    def _stages(self, model: PeftModel) -> Stages:
        return cast("Stages", self.controller(model).stages)
