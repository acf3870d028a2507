"""What one AdaPaD adapter knows while it trains: active ranks, levels of samples, growth, and the optimiser's steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from partwise.checks import InputError, RunError
from partwise.tune import _growth
from partwise.tune._budget import Budget
from partwise.tune._levels import deal_levels, make_masks
from partwise.tune._prefix_linear import Masks
from partwise.tune._rotation import rotate_components
from partwise.tune._row_age import YoungComponents, remember_young
from partwise.tune._sharded import agree, worker_rank
from partwise.tune._slot import Slot, SlotState
from partwise.tune._watch import settings_by_parameter, watch_steps

if TYPE_CHECKING:
    from partwise.tune._prefix_linear import PrefixDown, PrefixUp
    from partwise.tune.adapad import AdaPaDConfig

logger = logging.getLogger(__name__)
FORWARDS_WITHOUT_STEP = 4096
MIXED_ROWS, ROTATED = 1, 2  # flags of a saved state


class StageDriver(Protocol):
    """Whoever trains one component after the other."""

    losses: list[float]

    def after_step(self, controller: Controller) -> None:
        """Called after every optimiser step, which is counted already."""

    def resume(self, controller: Controller) -> None:
        """Called once before training goes on from a loaded state."""


@dataclass(eq=False)
class Controller:
    """Ranks, levels and growth of one adapter."""

    settings: AdaPaDConfig
    scale: float
    slots: list[Slot] = field(default_factory=list)
    step: int = 0
    forced_level: int | None = None  # every sample at this level: exact passes, and stages of one-rank-at-a-time
    stages: StageDriver | None = None  # one-rank-at-a-time: decides after each step whether the next component begins
    repeats_levels: bool = False  # each sample of a batch comes once per level

    def __post_init__(self) -> None:
        self.rules = self.settings.rules()
        self.budget = Budget(self.settings, self.slots)
        self._averages: _growth.ImportanceAverages | None = None
        self._lead: Slot | None = None
        self._batch = 0
        self._forwards = 0
        self._mixed_rows = False  # rows of some tensor are not samples: split is impossible
        self._told_small_batch = False
        self._sealed = False
        self._rotated = False
        self._loaded = False
        self._growth_is_over: bool | None = None  # until something changes
        self._dealt: dict[int, Tensor | None] = {}  # levels by batch size, until something changes
        self._mask_cache: dict[Any, Masks | None] = {}
        self._young: list[YoungComponents] = []
        self._release = watch_steps(self)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_young": [], "_mask_cache": {}, "_dealt": {}}
        del state["_release"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._release = watch_steps(self)

    def release(self) -> None:
        """Stop watching optimisers."""
        self._release()

    # ------------------------------------------------------------------ modules
    def add(self, name: str, down: PrefixDown, up: PrefixUp, base: Any) -> Slot:
        """Take one module under control, with seeded starting values."""
        settings = self.settings
        slot = Slot(name, len(self.slots), down, up, base, seed=settings.seed, rank=settings.init_r, births=[0] * settings.r)
        self.slots.append(slot)
        self._forget_levels()
        down.bind(self, slot)
        up.bind(self, slot)
        with torch.no_grad():
            down.weight.copy_(slot.fresh_down(down.weight))
            up.weight.zero_()
        return slot

    def refuse_second_model(self, name: str) -> None:
        """One controller drives one model."""
        if self._sealed or any(slot.name == name for slot in self.slots):
            raise InputError("config-used-twice", f"this AdaPaDConfig already drives a model ({name} is taken). Make one config object per model.")

    def accept_rank(self, slot: Slot, rank: int) -> int:
        """Set the active rank of a slot from the shape of loaded weights."""
        if not 1 <= rank <= self.settings.r:
            raise InputError(
                "adapter-rank-too-large",
                f"the saved adapter has rank {rank} at {slot.name}, this configuration allows 1 to r={self.settings.r}. Pass r={rank} or more.",
            )
        slot.rank = rank
        self._forget_levels()
        return rank

    def seal(self) -> None:
        """Check the budget once all modules are known."""
        if not self._sealed and self.slots:
            self._sealed = True
            self.budget.check()

    @property
    def orders_components(self) -> bool:
        """Whether training itself puts useful components first."""
        return self.stages is not None or self.rules.schedule != "joint"

    @property
    def num_components(self) -> int:
        """Components active now."""
        return sum(slot.rank for slot in self.slots)

    @property
    def num_levels(self) -> int:
        return max(slot.rank for slot in self.slots)

    @property
    def growth_is_over(self) -> bool:
        if self._growth_is_over is None:
            self._growth_is_over = self.budget.is_spent
        return self._growth_is_over

    # ------------------------------------------------------------------ levels of samples
    def force_level(self, level: int | None) -> None:
        """Put every sample at one level (0: private components), or go back to the schedule."""
        self.forced_level = level
        self._forget_levels()

    def phase(self) -> str:
        """What the next step trains by."""
        phase = self.rules.phase(self.step, total_steps=self.settings.total_steps, growth_is_over=self.growth_is_over)
        return "cycle" if phase == "split" and self._mixed_rows else phase

    def levels(self) -> list[int]:
        """Levels that are alive: each component, and 0 where private components train."""
        return [*range(1, self.num_levels + 1), *([0] if any(self.has_private(slot) for slot in self.slots) else [])]

    def levels_to_visit(self) -> list[int]:
        """Levels that a sample visits in an exact step; one while training is joint."""
        return [self.num_levels] if self.phase() == "joint" else self.levels()

    def has_private(self, slot: Slot) -> bool:
        """Whether a module trains one more component before it is active."""
        return bool(self.settings.advance_learning) and self.stages is None and slot.rank < self.settings.r and not self.growth_is_over

    def masks(self, slot: Slot, x: Tensor) -> Masks | None:
        """What the samples of ``x`` see of a module in this training forward. None: all of them see and train everything."""
        rows = x.shape[0] if x.dim() > 1 else 1
        if self._lead is None or slot is self._lead:
            self._lead, self._batch = slot, rows
            self._begin_forward()
        levels = self._levels()
        if levels is None:
            return None
        if len(levels) > 1 and rows != self._batch and (x.dim() != 2 or rows % self._batch):
            self._refuse_mixed_rows(f"{slot.name} sees {rows} rows where the batch has {self._batch}")
            levels = self._levels()
            assert levels is not None
        key = (slot.index, self._batch, x.device)
        if key not in self._mask_cache:
            weight = 0.0 if self.stages is not None else self.rules.successor_weight
            self._mask_cache[key] = make_masks(levels, rank=slot.rank, private=self.has_private(slot), successor_weight=weight, device=x.device)
        return self._mask_cache[key]

    def _begin_forward(self) -> None:
        self.seal()
        self._catch_up()
        if not torch.is_grad_enabled():
            return
        self._forwards += 1
        if self._forwards > FORWARDS_WITHOUT_STEP:
            raise RunError(
                "no-optimiser-step",
                f"{self._forwards} training forwards, no optimiser step seen. The optimiser holds other tensors than the adapter's (FSDP1 and "
                "DeepSpeed ZeRO-3 flatten them). Call partwise.tune.step_done(model) after each step, or train with DDP or FSDP2.",
            )

    def _levels(self) -> Tensor | None:
        """Level of each sample of this batch, (batch,), or one for all of them, (1,). None: they train jointly."""
        if self._batch not in self._dealt:
            self._dealt[self._batch] = self._deal()
        return self._dealt[self._batch]

    def _deal(self) -> Tensor | None:
        if self.forced_level is not None:
            return torch.tensor([self.forced_level])
        schedule, num_groups = self.phase(), len(self.levels())
        if schedule == "joint":
            return None
        if schedule == "exact" and not self.repeats_levels:
            raise InputError(
                "exact-needs-passes",
                "schedule='exact' trains every level on every sample, so one forward is not enough. Write `for _ in level_passes(model): "
                "loss.backward()` in your loop, train inside `with RepeatForLevels(model):`, or use schedule='split'.",
            )
        if schedule == "split" and self._batch < num_groups:
            schedule = "cycle"
            if not self._told_small_batch:
                self._told_small_batch = True
                logger.warning("a batch of %d cannot hold %d levels: such batches are trained with schedule 'cycle'", self._batch, num_groups)
        return deal_levels(
            schedule,
            batch=self._batch,
            step=self.step,
            num_levels=self.num_levels,
            private=num_groups > self.num_levels,
            top_share=self.rules.top_share,
            offset=worker_rank() * self._batch,
        )

    def _refuse_mixed_rows(self, why: str) -> None:
        if self.phase() == "exact":
            raise InputError("rows-are-not-samples", f"{why}, so levels cannot be told apart. Use level_passes(model) instead of RepeatForLevels.")
        self._mixed_rows = True
        self._forget_levels()
        logger.warning("schedule 'split' needs one row of every tensor per sample, but %s: going on with 'cycle'", why)

    def _forget_levels(self) -> None:
        self._growth_is_over = None
        self._dealt.clear()
        self._mask_cache.clear()

    # ------------------------------------------------------------------ one optimiser step
    def owns(self, optimiser: Optimizer) -> bool:
        """Whether ``optimiser`` is about to move this adapter."""
        held = settings_by_parameter(optimiser)
        ours = [weight for slot in self.slots for weight in (slot.down.weight, slot.up.weight)]
        moved = [weight for weight in ours if weight.grad is not None]
        if not moved:
            return False  # another adapter is active
        if any(id(weight) in held for weight in moved):
            return True
        if any(id(parameter) in held for slot in self.slots for parameter in slot.base.parameters() if not parameter.requires_grad):
            raise InputError(
                "optimiser-built-too-early",
                "this optimiser holds frozen base weights and none of the adapter's parameters: it was built before get_peft_model. "
                "Build it after, from the parameters that require gradients.",
            )
        return False

    def before_step(self, optimiser: Optimizer) -> None:
        """Read the gradients that the optimiser is about to use, and remember young components."""
        self.seal()
        self._catch_up()
        self._forwards = 0
        pace = self.budget.pace()
        scoring = not self.growth_is_over and self.stages is None
        if scoring and _growth.scoring_matters(self.step + 1, interval=pace.interval, warmup=pace.warmup):
            down, up = [slot.down.weight for slot in self.slots], [slot.up.weight for slot in self.slots]
            self.averages.update(down, up, beta1=self.settings.beta1, beta2=self.settings.beta2)
        groups, warmup = settings_by_parameter(optimiser), self._component_warmup(pace)
        self._young = []
        for slot in self.slots:
            births = slot.births[: slot.rank + self.has_private(slot)]
            if not any(births):
                continue
            for weight, dim in ((slot.down.weight, 0), (slot.up.weight, 1)):
                state = optimiser.state.get(weight, {})
                group = groups.get(id(weight), optimiser.param_groups[0])
                young = remember_young(weight, dim=dim, births=births, step=self.step, state=state, group=group, warmup=warmup)
                self._young += [] if young is None else [young]

    def after_step(self, optimiser: Optimizer | None) -> None:
        """Correct young components, count the step, grow, change phase."""
        if optimiser is not None and self._young:
            groups = settings_by_parameter(optimiser)
            for young in self._young:
                young.correct(groups.get(id(young.weight), optimiser.param_groups[0]))
        self._young = []
        for slot in self.slots:
            slot.put_back()
        before, pace = self.phase(), self.budget.pace()
        self.step += 1
        self._forget_levels()
        if self.stages is not None:
            self.stages.after_step(self)
        elif not self.growth_is_over and _growth.is_growth_step(self.step, interval=pace.interval, warmup=pace.warmup):
            self.grow()
        if self.settings.advance_learning and self.growth_is_over:
            for slot in self.slots:
                slot.clear_waiting()  # momentum still moves private components that never became active
        if self.rules.joint_start > 0 and not self._rotated and before == "joint" and self.phase() != "joint":
            self._rotated = True
            self.rotate(optimiser)

    def step_done(self) -> None:
        """Count an optimiser step that was not seen. Gradients that are still there count for the scores."""
        self._catch_up()
        self._forwards = 0
        if not self.growth_is_over and self.stages is None:
            down, up = [slot.down.weight for slot in self.slots], [slot.up.weight for slot in self.slots]
            self.averages.update(down, up, beta1=self.settings.beta1, beta2=self.settings.beta2)
        self._young = []
        self.after_step(None)

    def _component_warmup(self, pace: _growth.Pace) -> int:
        chosen = self.settings.component_warmup
        if chosen is None:
            return 0 if self.stages is not None else pace.interval // 2
        return chosen

    # ------------------------------------------------------------------ growth
    @property
    def averages(self) -> _growth.ImportanceAverages:
        """Importance of every component; zeros before the first scored step."""
        if self._averages is None:
            self._averages = _growth.ImportanceAverages(len(self.slots), self.settings.r)
        return self._averages

    def scores(self) -> Tensor:
        """Score of every component, (modules, r_max)."""
        return (self.averages.mean * self.averages.variability).cpu()

    def grow(self) -> None:
        """Give the modules with the best scores more components, within the budget."""
        settings, ranks = self.settings, [slot.rank for slot in self.slots]
        scores = _growth.module_scores(self.averages.mean, self.averages.variability, ranks).tolist()  # one per module
        new = _growth.grown_ranks(
            scores,
            ranks,
            self.budget.costs,
            r=settings.r,
            remaining=self.budget.remaining,
            num_modules=self.budget.pace().modules,
            step=settings.growth_step,
        )
        had_private = [self.has_private(slot) for slot in self.slots]
        for slot, rank, private in zip(self.slots, agree(new, self.slots[0].down.weight.device), had_private, strict=True):
            self._activate(slot, rank, had_private=private)
        self._forget_levels()

    def _activate(self, slot: Slot, rank: int, *, had_private: bool) -> None:
        """Raise the rank of one module. New components start at zero unless they were trained privately."""
        if rank == slot.rank:
            return
        for component in range(slot.rank + had_private, rank):
            slot.begin(component, step=self.step)
        slot.rank = rank
        if self.settings.advance_learning and rank < self.settings.r:
            slot.begin(rank, step=self.step)

    def rotate(self, optimiser: Optimizer | None = None) -> None:
        """Turn every module's components into the singular components of their sum; Adam's averages turn with them."""
        for slot in self.slots:
            rotate_components(slot.down.weight, slot.up.weight, slot.rank, optimiser)

    # ------------------------------------------------------------------ resuming
    def slot_state(self, slot: Slot) -> Tensor:
        """What resuming needs beyond weights and optimiser: step, scores, ages, and the private component; (1, numbers)."""
        tail = slot.read_private() if self.has_private(slot) else torch.zeros(0)
        if self.stages is not None:
            tail = torch.tensor(self.stages.losses, dtype=torch.float64)
        flags = MIXED_ROWS * self._mixed_rows + ROTATED * self._rotated
        mean, variability = self.averages.mean[slot.index], self.averages.variability[slot.index]
        return SlotState(self.step, slot.rank, flags, mean, variability, slot.births, tail).pack()

    def load_slot_state(self, slot: Slot, packed: Tensor) -> None:
        """Undo :meth:`slot_state`."""
        state = SlotState.unpack(packed, width=self.settings.r, name=slot.name)
        self.step, self._loaded = state.step, True
        self._mixed_rows, self._rotated = bool(state.flags & MIXED_ROWS), bool(state.flags & ROTATED)
        self.accept_rank(slot, state.rank)
        self.averages.load(slot.index, state.mean, state.variability)
        slot.births = state.births
        if self.stages is not None:
            self.stages.losses = state.tail.tolist()
        elif len(state.tail):
            slot.write_private(state.tail)

    def _catch_up(self) -> None:
        """After a state was loaded, let stages find out where they are; weights may have come after the state."""
        if self._loaded and self.stages is not None:
            self.stages.resume(self)
        self._loaded = False
