"""What one AdaPaD adapter knows while it trains: active ranks, levels of samples, growth, and the optimiser's steps.

Growth needs no callback. Two process-wide optimiser hooks watch for steps of the optimiser that holds this adapter's parameters.
"""

from __future__ import annotations

import hashlib
import logging
import math
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from partwise.checks import InputError, RunError
from partwise.linalg.subspace import singular_factors
from partwise.selection import spend
from partwise.tune import _growth
from partwise.tune._levels import deal_levels, make_masks
from partwise.tune._prefix_linear import Masks

if TYPE_CHECKING:
    from partwise.tune._prefix_linear import PrefixDown, PrefixUp
    from partwise.tune.adapad import AdaPaDConfig

logger = logging.getLogger(__name__)
FORWARDS_WITHOUT_STEP = 4096
STATE_HEADER = 4  # version, step, rank, whether split fell back to cycle


@dataclass(eq=False)
class Slot:
    """One adapted module: its two maps and how many components are active."""

    name: str
    index: int
    down: PrefixDown
    up: PrefixUp
    rank: int
    births: list[int]  # controller step at which each component began to learn
    base: Any
    masks: Masks | None = None
    private_up: Tensor | None = None  # private column of lora_B waiting for lora_B to be loaded
    frozen: tuple[Tensor, Tensor] | None = None  # finished components of one-rank-at-a-time, put back after every step

    @property
    def component_parameters(self) -> int:
        return int(self.down.weight.shape[1] + self.up.weight.shape[0])


class StageDriver(Protocol):
    """Whoever trains one component after the other."""

    def after_step(self, controller: Controller) -> None:
        """Called after every optimiser step, which is counted already."""


@dataclass(eq=False)
class Controller:
    """Ranks, levels and growth of one adapter."""

    settings: AdaPaDConfig
    scale: float
    slots: list[Slot] = field(default_factory=list)
    step: int = 0
    forced_level: int | None = None  # every sample at this level: exact passes, and stages of one-rank-at-a-time
    stages: StageDriver | None = None  # one-rank-at-a-time: decides after each step whether the next component begins
    repeats_levels: bool = False  # the collator repeats each sample once per level

    def __post_init__(self) -> None:
        self.rules = self.settings.rules()
        self._mean = self._variability = torch.zeros(0)
        self._lead: Slot | None = None
        self._batch = 0
        self._forwards = 0
        self._fell_back = False
        self._sealed = False
        self._rotated = False
        self._mask_cache: dict[Any, Masks | None] = {}
        self._before: list[tuple[Slot, int, Tensor, Tensor]] = []
        self._watch()

    # ------------------------------------------------------------------ optimiser hooks
    def _watch(self) -> None:
        reference = weakref.ref(self)

        def before(optimiser: Optimizer, *_: Any) -> None:
            controller = reference()
            if controller is not None and controller._owns(optimiser):
                controller.before_step(optimiser)

        def after(optimiser: Optimizer, *_: Any) -> None:
            controller = reference()
            if controller is not None and controller._owns(optimiser):
                controller.after_step(optimiser)

        handles = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))
        self._owners: weakref.WeakKeyDictionary[Optimizer, tuple[int, dict[int, int]]] = weakref.WeakKeyDictionary()
        self._release = weakref.finalize(self, _remove, handles)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_before": [], "_mask_cache": {}}
        del state["_owners"], state["_release"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch()

    def release(self) -> None:
        """Stop watching optimisers."""
        self._release()

    def _owns(self, optimiser: Optimizer) -> bool:
        known = self._owners.get(optimiser)
        if known is None or known[0] != len(optimiser.param_groups):
            groups = {id(parameter): index for index, group in enumerate(optimiser.param_groups) for parameter in group["params"]}
            self._owners[optimiser] = known = (len(optimiser.param_groups), groups)
            self._check_not_built_early(groups)
        return any(id(slot.down.weight) in known[1] for slot in self.slots[:1])

    def _check_not_built_early(self, groups: dict[int, int]) -> None:
        if any(id(slot.down.weight) in groups for slot in self.slots):
            return
        waiting = any(slot.down.weight.grad is not None for slot in self.slots)
        frozen = any(id(parameter) in groups for slot in self.slots for parameter in slot.base.parameters() if not parameter.requires_grad)
        if waiting and frozen:
            raise InputError(
                "optimiser-built-too-early",
                "this optimiser holds frozen base weights and none of the adapter's parameters: it was built before get_peft_model. "
                "Build it after, from the parameters that require gradients.",
            )

    # ------------------------------------------------------------------ modules
    def add(self, name: str, down: PrefixDown, up: PrefixUp, base: Any) -> Slot:
        """Take one module under control, with seeded starting values."""
        slot = Slot(name, len(self.slots), down, up, self.settings.init_r, [0] * self.settings.r, base)
        self.slots.append(slot)
        down.bind(self, slot)
        up.bind(self, slot)
        with torch.no_grad():
            down.weight.copy_(self.fresh_weight(slot, like=down.weight, component_dim=0))
            up.weight.zero_()
        return slot

    def fresh_weight(self, slot: Slot, *, like: Tensor, component_dim: int) -> Tensor:
        """Starting values shaped like ``like``: zeros for ``lora_B``; for ``lora_A`` rows that depend on (seed, module, component) alone."""
        fresh = torch.zeros_like(like)
        if component_dim == 0:
            for component in range(fresh.shape[0]):
                fresh[component] = self._fresh_row(slot, component).to(fresh)
        return fresh

    def _fresh_row(self, slot: Slot, component: int) -> Tensor:
        key = hashlib.sha256(f"{self.settings.seed}/{slot.name}/{component}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        num_inputs = slot.down.weight.shape[1]
        return (torch.rand(num_inputs, generator=generator) * 2 - 1) / math.sqrt(num_inputs)  # (in,), peft's Kaiming bound

    def accept_rank(self, slot: Slot, rank: int) -> int:
        """Set the active rank of a slot from the shape of loaded weights."""
        if not 1 <= rank <= self.settings.r:
            raise InputError(
                "adapter-rank-too-large",
                f"the saved adapter has rank {rank} at {slot.name}, this configuration allows 1 to r={self.settings.r}. Pass r={rank} or more.",
            )
        slot.rank = rank
        self._mask_cache.clear()
        return rank

    def seal(self) -> None:
        """Check the budget once all modules are known."""
        if self._sealed or not self.slots:
            return
        self._sealed = True
        settings, num_modules = self.settings, len(self.slots)
        low, high = num_modules * settings.init_r, num_modules * settings.r
        if not low <= self.budget <= high:
            raise InputError(
                "budget-out-of-range",
                f"budget={self.budget} components cannot be dealt to {num_modules} modules of rank {settings.init_r} to {settings.r}: "
                f"it must be between {low} and {high}. Change budget, or raise r.",
            )

    @property
    def budget(self) -> int:
        """Components over all modules."""
        if self.settings.budget is not None:
            return self.settings.budget
        target = 2.0 if self.settings.target_r is None else self.settings.target_r
        target = min(max(target, self.settings.init_r), self.settings.r)
        return math.floor(target * len(self.slots) + 1e-9)

    @property
    def num_components(self) -> int:
        """Components active now."""
        return sum(slot.rank for slot in self.slots)

    @property
    def num_levels(self) -> int:
        return max(slot.rank for slot in self.slots)

    @property
    def growth_is_over(self) -> bool:
        return self.num_components >= self.budget

    @property
    def trains_in_stages(self) -> bool:
        return self.stages is not None

    def begin_stage(self, component: int) -> None:
        """Freeze the components before ``component`` (from 0), train that one on what they leave over."""
        for slot in self.slots:
            with torch.no_grad():
                slot.frozen = (slot.down.weight[:component].clone(), slot.up.weight[:, :component].clone())
            slot.rank, slot.births[component] = component + 1, self.step
        self.force_level(component + 1)

    def drop_component(self, component: int) -> None:
        """Forget component ``component`` (from 0) and all after it, but never the first; then freeze what remains."""
        for slot in self.slots:
            slot.rank = min(slot.rank, max(1, component))
        self.freeze()

    def freeze(self) -> None:
        """Keep every active component as it is, whatever optimisers do."""
        for slot in self.slots:
            slot.frozen = (slot.down.weight.detach()[: slot.rank].clone(), slot.up.weight.detach()[:, : slot.rank].clone())

    # ------------------------------------------------------------------ phases and levels
    def force_level(self, level: int | None) -> None:
        """Put every sample at one level, or go back to the schedule."""
        self.forced_level = level
        self._mask_cache.clear()

    def phase(self) -> str:
        """What the next step trains by."""
        phase = self.rules.phase(self.step, total_steps=self.settings.total_steps, growth_is_over=self.growth_is_over)
        return "cycle" if phase == "split" and self._fell_back else phase

    def masks(self, slot: Slot, x: Tensor) -> Masks | None:
        """What the samples of ``x`` see of a module in this training forward. None: all of them see and train everything."""
        if self._lead is None or slot is self._lead:
            self._lead = slot
            self._batch = x.shape[0]
            self.seal()
            self._count_forward()
        if self.forced_level is None and self.phase() == "joint":
            return None
        fits = x.shape[0] == self._batch or (x.dim() == 2 and x.shape[0] % self._batch == 0)
        if not fits and self.forced_level is None:
            self._fall_back(f"{slot.name} sees {x.shape[0]} rows where the batch has {self._batch}")
        key = (self._batch, slot.rank, self._private(slot), x.device, self.phase(), self.forced_level)
        if key not in self._mask_cache:
            self._mask_cache[key] = self._make_masks(slot, x.device)
        return self._mask_cache[key]

    def _count_forward(self) -> None:
        self._forwards += 1
        if self._forwards > FORWARDS_WITHOUT_STEP:
            raise RunError(
                "no-optimiser-step",
                f"{self._forwards} training forwards, no optimiser step seen. The optimiser holds other tensors than the adapter's (FSDP1 and "
                "DeepSpeed ZeRO-3 flatten them). Call partwise.tune.step_done(model) after each step, or train with DDP or FSDP2.",
            )

    def _fall_back(self, why: str) -> None:
        if not self._fell_back:
            self._fell_back = True
            self._mask_cache.clear()
            logger.warning("schedule 'split' needs one row of every tensor per sample, but %s: going on with 'cycle'", why)

    def _private(self, slot: Slot) -> bool:
        return bool(self.settings.advance_learning) and slot.rank < self.settings.r and not self.growth_is_over and self.forced_level is None

    def _make_masks(self, slot: Slot, device: torch.device) -> Masks:
        weight = 0.0 if self.trains_in_stages else self.rules.successor_weight
        return make_masks(self._levels(), rank=slot.rank, private=self._private(slot), successor_weight=weight, device=device)

    def _levels(self) -> Tensor:
        """Level of each sample of this batch, or one for all of them."""
        if self.forced_level is not None:
            return torch.tensor([self.forced_level])
        private = any(self._private(slot) for slot in self.slots)
        schedule = self.phase()
        if schedule == "exact" and not self.repeats_levels:
            raise InputError(
                "exact-needs-passes",
                "schedule='exact' trains every level on every sample, so one forward is not enough. Write `for _ in level_passes(model): "
                "loss.backward()` in your loop, wrap the collator with RepeatForLevels, or use schedule='split'.",
            )
        if schedule == "split" and self._batch < self.num_levels + private:
            self._fall_back(f"a batch of {self._batch} cannot hold {self.num_levels + private} levels")
            schedule = "cycle"
        return deal_levels(
            schedule,
            batch=self._batch,
            step=self.step,
            num_levels=self.num_levels,
            private=private,
            top_share=self.rules.top_share,
            offset=_worker_rank() * self._batch,
        )

    # ------------------------------------------------------------------ one optimiser step
    def before_step(self, optimiser: Optimizer) -> None:
        """Read the gradients that the optimiser is about to use, and remember young components."""
        self.seal()
        self._forwards = 0
        scoring = not self.growth_is_over and not self.trains_in_stages
        if scoring and _growth.scoring_matters(self.step + 1, interval=self.pace.interval, warmup=self.pace.warmup):
            self._score()
        self._before = []
        for slot in self.slots:
            betas, _ = self._group(optimiser, slot.down.weight)
            limit = _growth.young_for(betas, warmup=self._component_warmup)
            width = slot.rank + self._private(slot)
            young = [k for k in range(width) if slot.births[k] > 0 and self.step - slot.births[k] < limit]
            if young:
                first = young[-1] if self.trains_in_stages else young[0]
                down, up = slot.down.weight.detach(), slot.up.weight.detach()
                self._before.append((slot, first, down[first:width].clone(), up[:, first:width].clone()))

    def after_step(self, optimiser: Optimizer) -> None:
        """Correct young components, count the step, grow, change phase."""
        for slot, first, old_down, old_up in self._before:
            self._correct(optimiser, slot, first, old_down, old_up)
        self._before = []
        for slot in self.slots:
            if slot.frozen is not None:
                down, up = slot.frozen
                slot.down.weight.detach()[: len(down)] = down
                slot.up.weight.detach()[:, : up.shape[1]] = up
        before = self.phase()
        self.step += 1
        self._mask_cache.clear()
        if (
            not self.trains_in_stages
            and not self.growth_is_over
            and _growth.is_growth_step(self.step, interval=self.pace.interval, warmup=self.pace.warmup)
        ):
            self.grow()
        if self.stages is not None:
            self.stages.after_step(self)
        if self.rules.joint_start > 0 and not self._rotated and before == "joint" and self.phase() != "joint":
            self._rotated = True
            self.rotate(optimiser)

    @property
    def _component_warmup(self) -> int:
        chosen = self.settings.component_warmup
        return self.pace.interval // 2 if chosen is None else chosen

    @property
    def pace(self) -> _growth.Pace:
        """When modules grow and how many at a time."""
        settings, num_modules = self.settings, len(self.slots)
        missing = math.ceil((self.budget - num_modules * settings.init_r) / settings.growth_step)
        return _growth.pace(
            missing, num_modules, total_steps=settings.total_steps,
            interval=settings.growth_interval, warmup=settings.growth_warmup, modules=settings.growth_modules,
        )  # fmt: skip

    def _group(self, optimiser: Optimizer, parameter: Tensor) -> tuple[tuple[float, float] | None, dict[str, Any]]:
        group = optimiser.param_groups[self._owners[optimiser][1].get(id(parameter), 0)]
        return group.get("betas"), group

    def _correct(self, optimiser: Optimizer, slot: Slot, first: int, old_down: Tensor, old_up: Tensor) -> None:
        """Scale what the optimiser did to components ``first`` and later as if it were as old as they are."""
        width = first + len(old_down)
        for parameter, old, dim in ((slot.down.weight, old_down, 0), (slot.up.weight, old_up, 1)):
            betas, group = self._group(optimiser, parameter)
            optimiser_age = int(optimiser.state.get(parameter, {}).get("step", self.step + 1))
            ages = [self.step + 1 - slot.births[k] for k in range(first, width)]
            factors = [_growth.age_factor(age, optimiser_age, betas=betas, warmup=self._component_warmup) for age in ages]
            factor = torch.tensor(factors, dtype=old.dtype, device=old.device)
            if group.get("decoupled_weight_decay"):
                old = old * (1 - float(group["lr"]) * group["weight_decay"])
            new = parameter.detach().narrow(dim, first, width - first)
            new.copy_(old + (new - old) * (factor[:, None] if dim == 0 else factor))

    # ------------------------------------------------------------------ growth
    def _score(self) -> None:
        down, up = [slot.down.weight for slot in self.slots], [slot.up.weight for slot in self.slots]
        grads = [_whole(torch.zeros_like(p) if p.grad is None else p.grad) for p in (*down, *up)]
        values = [_whole(p.detach()) for p in (*down, *up)]
        num = len(down)
        value = _growth.importance(values[:num], grads[:num], values[num:], grads[num:]).float()
        self._averages(value.device)
        _growth.smooth(self._mean, self._variability, value, beta1=self.settings.beta1, beta2=self.settings.beta2)

    def _averages(self, device: torch.device) -> None:
        if self._mean.numel() == 0:
            self._mean = torch.zeros(len(self.slots), self.settings.r, device=device)
            self._variability = torch.zeros_like(self._mean)

    def scores(self) -> Tensor:
        """Score of every component, (modules, r_max); zeros before the first scored step."""
        self._averages(torch.device("cpu"))
        return (self._mean * self._variability).cpu()

    def grow(self) -> None:
        """Give the modules with the best scores more components, within the budget."""
        settings = self.settings
        self._averages(torch.device("cpu"))
        ranks = [slot.rank for slot in self.slots]
        scores = _growth.module_scores(self._mean, self._variability, ranks)  # (modules,)
        room = [slot for slot in self.slots if slot.rank < settings.r]
        remaining = self.budget - sum(ranks)
        chosen = spend([float(scores[slot.index]) for slot in room], [1] * len(room), budget=remaining, limit=self.pace.modules)
        for index in chosen:
            slot = room[index]
            gain = min(settings.growth_step, settings.r - slot.rank, remaining)
            ranks[slot.index] += gain
            remaining -= gain
        for slot, rank in zip(self.slots, _agreed(ranks, self.slots[0].down.weight.device), strict=True):
            self.activate(slot, rank)

    def activate(self, slot: Slot, rank: int) -> None:
        """Raise the rank of one module. New components start at zero unless they were trained privately."""
        private = self._private(slot)
        with torch.no_grad():
            for component in range(slot.rank, rank):
                if private and component == slot.rank:
                    continue
                slot.births[component] = self.step
                slot.down.weight[component] = self._fresh_row(slot, component).to(slot.down.weight)
                slot.up.weight[:, component] = 0
        if rank > slot.rank and self.settings.advance_learning and rank < self.settings.r:
            slot.births[rank] = self.step
        slot.rank = rank
        self._mask_cache.clear()

    def rotate(self, optimiser: Optimizer | None = None) -> None:
        """Turn every module's components into the singular components of their sum; Adam's averages turn with them."""
        for slot in self.slots:
            rotate_components(slot.down.weight, slot.up.weight, slot.rank, optimiser)

    # ------------------------------------------------------------------ resuming
    def slot_state(self, slot: Slot) -> Tensor:
        """What resuming needs beyond weights and optimiser: step, scores, ages, and the private component."""
        self._averages(torch.device("cpu"))
        width = self.settings.r
        parts = [torch.tensor([1.0, self.step, slot.rank, float(self._fell_back) + 2 * self._rotated])]
        parts += [self._mean[slot.index], self._variability[slot.index], torch.tensor([float(b) for b in slot.births])]
        if self._private(slot):
            parts += [_whole(slot.down.weight.detach())[slot.rank], _whole(slot.up.weight.detach())[:, slot.rank]]
        assert sum(len(part) for part in parts[:4]) == STATE_HEADER + 3 * width
        flat = torch.cat([part.detach().to("cpu", torch.float64).flatten() for part in parts])
        return flat[None, :]  # (1, numbers): peft takes a 1-D LoRA tensor for a shard that was not gathered

    def load_slot_state(self, slot: Slot, state: Tensor) -> None:
        """Undo :meth:`slot_state`."""
        width = self.settings.r
        state = state.to("cpu", torch.float64).flatten()
        if len(state) < STATE_HEADER + 3 * width or (len(state) - STATE_HEADER) < 3 * width:
            raise InputError("resume-differs", f"the saved growth state of {slot.name} was made with another r than r={width}. Use the same r.")
        self._averages(slot.down.weight.device)
        self.step = int(state[1])
        self.accept_rank(slot, int(state[2]))
        self._fell_back, self._rotated = bool(int(state[3]) & 1), bool(int(state[3]) & 2)
        body = state[STATE_HEADER:]
        self._mean[slot.index] = body[:width].to(self._mean)
        self._variability[slot.index] = body[width : 2 * width].to(self._mean)
        slot.births = [int(b) for b in body[2 * width : 3 * width]]
        private = body[3 * width :]
        if len(private):
            num_inputs = slot.down.weight.shape[1]
            with torch.no_grad():
                slot.down.weight[slot.rank] = private[:num_inputs].to(slot.down.weight)
                slot.up.weight[:, slot.rank] = private[num_inputs:].to(slot.up.weight)
            slot.private_up = private[num_inputs:]


def rotate_components(down: Tensor, up: Tensor, rank: int, optimiser: Optimizer | None = None) -> None:
    """Rotate the first ``rank`` components to singular order in place, keeping the norm of each row of ``down`` near where it was.

    With ``down' = T down`` and ``up' = up T^-1`` the gradients turn with ``T^-T`` and ``T^T``. Adam's first average turns alike; its
    second is mapped as the variance of a sum of independent entries.
    """
    old_down, old_up = down.detach()[:rank].double(), up.detach()[:, :rank].double()
    left, values, right = singular_factors(old_up, old_down)
    alive = values > 1e-9 * values[0].clamp_min(1e-300)
    if not bool(alive.all()):
        return  # a component that is still zero has no direction to rotate to
    size = old_down.norm(dim=1).mean()
    new_down, new_up = right * size, left * (values / size)  # (rank, in), (out, rank)
    turn = new_down @ torch.linalg.pinv(old_down)  # (rank, rank)
    back = torch.linalg.inv(turn).T  # (rank, rank)
    with torch.no_grad():
        down[:rank] = new_down.to(down)
        up[:, :rank] = new_up.to(up)
        for parameter, matrix, dim in ((down, back, 0), (up, turn, 1)):
            state = {} if optimiser is None else optimiser.state.get(parameter, {})
            for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                if name not in state:
                    continue
                average = state[name].narrow(dim, 0, rank)
                mix = matrix.to(average) ** power
                average.copy_(mix @ average if dim == 0 else average @ mix.T)


def _remove(handles: tuple[RemovableHandle, ...]) -> None:
    for handle in handles:
        handle.remove()


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a sharded one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _worker_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0


def _agreed(ranks: list[int], device: torch.device) -> list[int]:
    """Worker 0's decision, on every worker."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ranks
    decision = torch.tensor(ranks, device=device)
    torch.distributed.broadcast(decision, src=0)
    return [int(rank) for rank in decision]
