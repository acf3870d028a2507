"""What a user can set for AdaPaD. Light to import: the command line makes its flags from this class."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from partwise.checks import InputError, check_choice

if TYPE_CHECKING:
    from partwise.tune._levels import LevelRules

SCHEDULES = ("exact", "split", "cycle", "joint")
PRESETS: dict[str, dict[str, Any]] = {
    "nested": {
        "schedule": "split", "successor_weight": 1.0, "top_share": 0.3, "joint_start": 0.0, "finish": "joint", "finish_fraction": 0.15,
        "advance_learning": False,
    },
    "balanced": {
        "schedule": "split", "successor_weight": 1.0, "top_share": 0.5, "joint_start": 0.0, "finish": "joint", "finish_fraction": 0.3,
        "advance_learning": False,
    },
    "ordered": {
        "schedule": "split", "successor_weight": 1.0, "top_share": 0.5, "joint_start": 0.6, "finish": "deflate", "finish_fraction": 0.3,
        "advance_learning": False,
    },
    "paper": {
        "schedule": "split", "successor_weight": 0.0, "top_share": 0.0, "joint_start": 0.0, "finish": "deflate", "finish_fraction": 0.3,
        "advance_learning": True,
    },
}  # fmt: skip
"""What the presets fill in where a setting is left out. ``nested``: nested prefixes, jointly for a short end. ``balanced``: the same with more
samples at the top and a longer end. ``ordered``: joint, rotated to singular order, then nested prefixes. ``paper``: pure deflation."""


@dataclass(kw_only=True)
class AdaPaDSettings:
    """Growth and levels. Every field is also a flag of ``partwise tune adapad``.

    Parameters
    ----------
    preset : {"nested", "balanced", "ordered", "paper"}
        Fills in the settings below that are left out: schedule, successor_weight, top_share, joint_start, finish, finish_fraction,
        advance_learning.
    r : int
        Largest rank of a module.
    init_r : int
        Rank of every module at the start.
    growth_interval : int or None
        Optimiser steps between two growth events. Left out: 100, or what spends the budget within the first third of a run whose
        number of steps is known.
    growth_warmup : int or None
        No growth up to and including this step. Left out: one interval.
    growth_modules : int or None
        Modules that grow at an event. Left out: one in 24, rounded up; more if a short run has too few events.
    growth_step : int
        Components that a chosen module gains.
    beta1, beta2 : float
        Smoothing of the importance and of its variability, in [0, 1).
    schedule : {"exact", "split", "cycle", "joint"}
        Which samples a component learns from. ``exact``: every sample once per level (a component and its predecessors). ``split``:
        each sample belongs to one level. ``cycle``: a whole batch belongs to one level. ``joint``: ordinary LoRA.
    successor_weight : float
        Weight with which predecessors learn from a level's samples, in [0, 1]. 0 is deflation, 1 is nested training.
    top_share : float
        Share of samples that see all components, in [0, 1].
    joint_start : float
        Share of the steps that is trained jointly before levels begin; every module is then rotated to singular order.
        Where the number of steps is unknown, the joint start ends when the budget is spent.
    finish : {"deflate", "joint"}
        How training ends: by levels, or jointly.
    finish_fraction : float or None
        Share of the steps that a joint finish takes. Where the number of steps is unknown, it begins when the budget is spent.
    advance_learning : bool
        Train the next component of every module privately before it is activated.
    component_warmup : int or None
        Steps over which a new component's learning rate rises from 0. Left out: half of the growth interval.
    """

    preset: Literal["nested", "balanced", "ordered", "paper"] = "nested"
    r: int = 4
    init_r: int = 1
    growth_interval: int | None = None
    growth_warmup: int | None = None
    growth_modules: int | None = None
    growth_step: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    schedule: Literal["exact", "split", "cycle", "joint"] | None = None
    successor_weight: float | None = None
    top_share: float | None = None
    joint_start: float | None = None
    finish: Literal["deflate", "joint"] | None = None
    finish_fraction: float | None = None
    advance_learning: bool | None = None
    component_warmup: int | None = None

    def fill_in(self) -> None:
        """Replace what was left out by what the preset says, then refuse values that no model could use."""
        check_choice(self.preset, tuple(PRESETS), name="preset")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("r", "init_r", "growth_interval", "growth_modules", "growth_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError("setting-out-of-range", f"{name}={value} must be at least 1.")
        for name in ("growth_warmup", "component_warmup"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError("setting-out-of-range", f"{name}={value} must be at least 0.")
        if self.init_r > self.r:
            raise InputError("init-r-above-r", f"init_r={self.init_r} is above the largest rank r={self.r}. Lower init_r or raise r.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError("setting-out-of-range", f"{name}={getattr(self, name)} must lie in [0, 1). The usual value is 0.85.")
        for name in ("successor_weight", "top_share", "finish_fraction", "joint_start"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise InputError("setting-out-of-range", f"{name}={value} must lie in [0, 1].")
        check_choice(self.schedule, SCHEDULES, name="schedule")
        check_choice(self.finish, ("deflate", "joint"), name="finish")

    def rules(self) -> LevelRules:
        """The settings that say who learns from whom, once :meth:`fill_in` has run."""
        from partwise.tune._levels import LevelRules

        return LevelRules(*(getattr(self, item.name) for item in fields(LevelRules)))
