"""What the components of all modules together may cost, and how fast they may spend it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partwise.checks import InputError
from partwise.tune import _growth

if TYPE_CHECKING:
    from partwise.tune._slot import Slot
    from partwise.tune.adapad import AdaPaDConfig


@dataclass(frozen=True, eq=False)
class Budget:
    """The common purse of the modules of one adapter."""

    settings: AdaPaDConfig
    slots: Sequence[Slot]  # the controller's own list, which fills while layers are installed

    def check(self) -> None:
        """Refuse a budget that these modules cannot spend."""
        settings, num_modules = self.settings, len(self.slots)
        if settings.budget is None:
            return
        low, high = num_modules * settings.init_r, num_modules * settings.r
        if not low <= settings.budget <= high:
            raise InputError(
                "budget-out-of-range",
                f"budget={settings.budget} components cannot be dealt to {num_modules} modules of rank {settings.init_r} to {settings.r}: "
                f"it must be between {low} and {high}. Change budget, or raise r.",
            )

    @property
    def costs(self) -> list[int]:
        """Price of one component of each module: 1 under ``budget``, its parameters under ``target_r``."""
        return [slot.component_parameters if self.settings.budget is None else 1 for slot in self.slots]

    @property
    def total(self) -> int:
        """What all components together may cost; under ``target_r`` the parameters of a LoRA adapter of that rank."""
        if self.settings.budget is not None:
            return self.settings.budget
        target = 2.0 if self.settings.target_r is None else self.settings.target_r
        target = min(max(target, self.settings.init_r), self.settings.r)
        return math.floor(target * sum(self.costs) + 1e-9)

    @property
    def remaining(self) -> int:
        """What is not spent yet."""
        return self.total - sum(slot.rank * cost for slot, cost in zip(self.slots, self.costs, strict=True))

    @property
    def is_spent(self) -> bool:
        """Whether no module can take and pay another component."""
        remaining = self.remaining
        return not any(slot.rank < self.settings.r and cost <= remaining for slot, cost in zip(self.slots, self.costs, strict=True))

    def pace(self) -> _growth.Pace:
        """When modules grow and how many at a time."""
        settings, num_modules, costs = self.settings, len(self.slots), self.costs
        missing = math.ceil((self.total - settings.init_r * sum(costs)) * num_modules / sum(costs) / settings.growth_step)
        return _growth.pace(
            missing,
            num_modules,
            total_steps=settings.total_steps,
            interval=settings.growth_interval,
            warmup=settings.growth_warmup,
            modules=settings.growth_modules,
        )
