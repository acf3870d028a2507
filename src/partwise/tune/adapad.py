"""AdaPaD: adapters by rank-one parts that train in parallel; the rank of every module is found while training."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from torch import nn

from partwise.atomic_files import write_json
from partwise.checks import InputError
from partwise.tune import truncation
from partwise.tune._controller import Controller
from partwise.tune._prefix_linear import PrefixDown, PrefixUp
from partwise.tune._slot import Slot
from partwise.tune.adapad_settings import AdaPaDSettings

SETTINGS_FILE = "adapad.json"
VARIANT_FIELDS = (
    "use_dora", "lora_bias", "use_bdlora", "use_qalora", "target_parameters", "layer_replication",
    "arrow_config", "alora_invocation_tokens", "trainable_token_indices", "monteclora_config", "kasa_config", "velora_config",
)  # fmt: skip


@dataclass
class AdaPaDConfig(AdaPaDSettings, LoraConfig):
    """Configuration of an AdaPaD adapter; use it wherever peft takes a ``LoraConfig``.

    You give a total budget instead of a rank. Every module starts with ``init_r`` components; capacity goes to the modules that are
    still learning until the budget is spent. What is saved is a plain LoRA adapter with a rank per module and one scale for all.

    Takes the fields of ``peft.LoraConfig`` (``r`` is the largest rank of a module, ``lora_alpha / r`` the scale of every update), those
    of :class:`~partwise.tune.adapad_settings.AdaPaDSettings`, and the following.

    Parameters
    ----------
    target_r : float, optional
        Size to reach, as a rank: growth stops where the next component would give the adapter more parameters than LoRA of this rank.
        Left out: 2. Excludes ``budget``.
    budget : int, optional
        Rank-one components over all modules together. Excludes ``target_r``.
    total_steps : int, optional
        Optimiser steps of the whole training, where they are known; ``AdaPaDCallback`` fills them in.
    seed : int
        Seed of the starting values of components.

    Raises
    ------
    InputError
        When settings contradict each other or cannot work with growing ranks.

    Notes
    -----
    A worker per component is the paper's picture. Here all components of all modules train in one pass: a mask on the rank axis says
    which prefix a sample sees and which components learn from it. Only the abstract of the paper was readable to us; what happens
    inside a deep network is our reconstruction, and ``docs/methods/adapad.md`` lists every choice.

    References
    ----------
    AdaPaD: rank-one adapters by parallel deflation. arXiv:2605.10741.
    """

    lora_alpha: float = 8
    target_r: float | None = None
    budget: int | None = None
    total_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.fill_in()
        self._check_budget()
        self._refuse_foreign_fields()
        super().__post_init__()
        rank_stabilised = bool(cast("LoraConfig", self).use_rslora)
        self._scale = self.lora_alpha / (math.sqrt(self.r) if rank_stabilised else self.r)
        self.lora_alpha = self._scale * self.r
        self.use_rslora = False
        self._controllers: dict[str, Controller] = {}
        self._register_custom_module(cast("Any", {nn.Module: self._make}))

    def _check_budget(self) -> None:
        if self.budget is not None and self.target_r is not None:
            raise InputError("budget-and-target-r", f"budget={self.budget} and target_r={self.target_r} exclude each other. Pass one of them.")
        if self.target_r is not None and not self.init_r <= self.target_r <= self.r:
            raise InputError(
                "target-r-out-of-range",
                f"target_r={self.target_r} must lie between init_r={self.init_r} and r={self.r}. Change target_r, or raise r.",
            )
        if self.total_steps is not None and self.total_steps < 1:
            raise InputError("setting-out-of-range", f"total_steps={self.total_steps} must be at least 1. Leave it out where it is unknown.")

    def _refuse_foreign_fields(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name):
                raise InputError("pattern-is-an-output", f"{name} was given, but ranks are what AdaPaD finds. Leave it out, or use LoraConfig.")
        for name in VARIANT_FIELDS:
            if getattr(self, name, None):
                raise InputError(
                    "lora-variant", f"{name}={getattr(self, name)!r} does not work with AdaPaD: its layers must be plain LoRA. Leave it out."
                )
        if self.init_lora_weights is not True:
            raise InputError(
                "lora-variant",
                f"init_lora_weights={self.init_lora_weights!r} sets all components at once, but AdaPaD starts each one when it is added. Leave it out.",
            )

    # ------------------------------------------------------------------ installation
    def _make(self, target: nn.Module, adapter_name: str, *, config: LoraConfig, target_name: str = "", **kwargs: Any) -> nn.Module:
        plain = copy.copy(self)
        plain._custom_modules = None
        kwargs.update(r=self.r, lora_alpha=self._scale * self.r, target_name=target_name)
        layer = LoraModel._create_new_module(plain, adapter_name, target, **kwargs)
        self._take_over(cast("LoraLayer", layer), adapter_name, target_name)
        return cast("nn.Module", layer)

    def _take_over(self, layer: LoraLayer, adapter_name: str, name: str) -> None:
        down = layer.lora_A[adapter_name] if adapter_name in layer.lora_A else None  # noqa: SIM401  (a ModuleDict has no get)
        up = layer.lora_B[adapter_name] if adapter_name in layer.lora_B else None  # noqa: SIM401
        if type(down) is not nn.Linear or type(up) is not nn.Linear or isinstance(layer.get_base_layer(), nn.MultiheadAttention):
            raise InputError(
                "unsupported-module",
                f"{name} is a {type(layer.get_base_layer()).__name__}; AdaPaD adapts linear layers only. Leave it out of target_modules.",
            )
        limit = min(up.weight.shape[0], down.weight.shape[1])
        if self.r > limit:
            raise InputError(
                "rank-out-of-range",
                f"r={self.r} does not fit {name}, whose weight is {up.weight.shape[0]} x {down.weight.shape[1]}: pass r={limit} or less, or leave the "
                "module out of target_modules.",
            )
        if adapter_name not in self._controllers:
            self._controllers[adapter_name] = Controller(self, self._scale)
        controller = self._controllers[adapter_name]
        controller.refuse_second_model(name)
        down.__class__, up.__class__ = PrefixDown, PrefixUp
        controller.add(name, cast("PrefixDown", down), cast("PrefixUp", up), layer.get_base_layer())

    # ------------------------------------------------------------------ on disk
    def to_dict(self) -> dict[str, Any]:
        """Fields of a plain ``LoraConfig`` that describes the adapter as it stands now."""
        everything = super().to_dict()
        plain = {item.name: everything[item.name] for item in fields(LoraConfig) if item.name in everything}
        for controller in self._controllers.values():
            ranks = {slot.name: slot.rank for slot in controller.slots}
            plain.update(truncation.pattern_fields(ranks, dict.fromkeys(ranks, self._scale)))
        plain["lora_alpha"] = truncation._whole_number(plain["lora_alpha"])
        return plain

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` as a plain LoRA's, and this configuration's own settings to ``adapad.json`` beside it."""
        if self.inference_mode and not self._controllers:  # peft sets inference_mode when it saves a model
            raise InputError(
                "not-attached",
                "this adapter has a fixed rank: peft added it to layers that carry LoRA already. Call partwise.tune.attach(model, adapter_name) "
                "before training.",
            )
        super().save_pretrained(save_directory, **kwargs)
        names = [item.name for item in fields(AdaPaDSettings)] + ["target_r", "budget", "total_steps", "seed"]
        own = {name: getattr(self, name) for name in names}
        write_json(Path(save_directory) / SETTINGS_FILE, own)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_custom_modules": None, "_controllers": {}}  # a configuration travels without its model

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register_custom_module(cast("Any", {nn.Module: self._make}))

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaPaDConfig:
        twin = copy.copy(self)
        memo[id(self)] = twin
        for item in fields(self):
            setattr(twin, item.name, copy.deepcopy(getattr(self, item.name), memo))
        twin._controllers = {name: copy.deepcopy(controller, memo) for name, controller in self._controllers.items()}
        return twin


def controller_of(model: nn.Module, adapter_name: str | None = None) -> Controller:
    """The controller behind a model's AdaPaD adapter.

    Raises
    ------
    InputError
        When the model has none, or it was finalised already.
    """
    for module in model.modules():
        if isinstance(module, PrefixDown) and (adapter_name is None or module.slot in _adapter_slots(model, adapter_name)):
            return module.controller
    raise InputError(
        "no-adapad-adapter",
        "this model has no growing AdaPaD adapter. Wrap it with get_peft_model(model, AdaPaDConfig(...)); on layers that already carry "
        "another LoRA adapter call attach(model, adapter_name) after add_adapter.",
    )


def _adapter_slots(model: nn.Module, adapter_name: str) -> list[Slot]:
    layers = truncation.lora_layers(model, adapter_name).values()
    downs = [layer.lora_A[adapter_name] for layer in layers]
    return [down.slot for down in downs if isinstance(down, PrefixDown)]


def attach(model: nn.Module, adapter_name: str) -> None:
    """Take over an adapter that peft added to layers which already carry LoRA.

    ``model.add_adapter(name, AdaPaDConfig(...))`` on such a model makes plain LoRA layers; this turns them into growing ones.

    Parameters
    ----------
    model : nn.Module
        The peft model.
    adapter_name : str
        The adapter that was added with an ``AdaPaDConfig``.

    Raises
    ------
    InputError
        When the adapter's configuration is not an AdaPaDConfig, or all of the adapter grows already.
    """
    config = cast("Any", model).peft_config.get(adapter_name)
    if not isinstance(config, AdaPaDConfig):
        raise InputError(
            "no-adapad-adapter", f"adapter {adapter_name!r} was not configured with AdaPaDConfig but {type(config).__name__}. Add it with one."
        )
    layers = truncation.lora_layers(model, adapter_name)
    plain = {name: layer for name, layer in layers.items() if not isinstance(layer.lora_A[adapter_name], PrefixDown)}
    if not plain:
        raise InputError("already-attached", f"adapter {adapter_name!r} grows already. Leave attach out.")
    for name, layer in plain.items():
        layer.scaling[adapter_name] = config._scale
        config._take_over(layer, adapter_name, name)


def step_done(model: nn.Module) -> None:
    """Tell the adapter of an optimiser step that torch's hooks cannot see (no correction of young components then).

    Parameters
    ----------
    model : nn.Module
        With a growing AdaPaD adapter.
    """
    controller_of(model).step_done()
