"""Small networks with AdaPaD adapters, data for them, and the loops a student would write."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from partwise.linalg.rank_one import exact_parts, reduce_regression
from partwise.tune import AdaPaDConfig, level_passes
from partwise.tune._controller import Controller
from partwise.tune.adapad import controller_of

SPECTRUM = (3, 1.8, 1, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
SIZES = (6, 8, 8, 5)
LAYERS = ["0", "2", "4"]
PLAIN: dict[str, Any] = {"successor_weight": 0.0, "top_share": 0.0, "joint_start": 0.0, "finish": "deflate", "advance_learning": False}


def mlp(*, seed: int = 0, sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Linear layers named 0, 2, 4, ... with GELU between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(num_inputs, num_outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def data(num_samples: int = 12, *, seed: int = 1, sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs (samples, in) and targets (samples, out)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, sizes[0], generator=generator, dtype=dtype), torch.randn(num_samples, sizes[-1], generator=generator, dtype=dtype)


def grower(base: nn.Module | None = None, *, scatter: float = 0.0, ranks: tuple[int, ...] | None = None, **settings: Any) -> Any:
    """A model with an AdaPaD adapter on all linear layers. ``scatter``: size of random values put into all of lora_B."""
    base = mlp() if base is None else base
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    model = get_peft_model(base, AdaPaDConfig(**({"target_modules": names, "schedule": "split"} | PLAIN | settings)))
    controller = controller_of(model)
    for slot in controller.slots:
        slot.up.to(slot.base.weight.dtype)
        slot.down.to(slot.base.weight.dtype)
        if scatter:
            generator = torch.Generator().manual_seed(slot.index)
            slot.up.weight.data.copy_(torch.randn(slot.up.weight.shape, generator=generator) * scatter)
    if ranks is not None:
        set_ranks(controller, ranks)
    return model.train()


def set_ranks(controller: Controller, ranks: tuple[int, ...]) -> None:
    for slot, rank in zip(controller.slots, ranks, strict=True):
        controller.accept_rank(slot, rank)


def lora(base: nn.Module, *, names: list[str], r: int, scale: float = 2.0, ranks: dict[str, int] | None = None, like: Any = None) -> Any:
    """Plain peft LoRA whose starting values are those of the growing model ``like``."""
    ranks = {} if ranks is None else ranks
    pattern = {"rank_pattern": ranks, "alpha_pattern": {name: scale * rank for name, rank in ranks.items()}}
    model = get_peft_model(base, LoraConfig(target_modules=names, r=r, lora_alpha=scale * r, **pattern))
    if like is not None:
        for slot in controller_of(like).slots:
            layer = model.base_model.model.get_submodule(slot.name)
            for own, theirs in ((layer.lora_A["default"], slot.down), (layer.lora_B["default"], slot.up)):
                own.to(theirs.weight.dtype)
                rank = slot.rank
                own.weight.data.copy_(theirs.weight.data[:rank] if theirs is slot.down else theirs.weight.data[:, :rank])
    return model.train()


def adapter_weights(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(model(x), y)


def train(
    model: nn.Module, x: Tensor, y: Tensor, *, num_steps: int, lr: float = 1e-2, optimiser: torch.optim.Optimizer | None = None
) -> tuple[list[float], torch.optim.Optimizer]:
    """Full-batch AdamW. Returns the losses and the optimiser."""
    optimiser = torch.optim.AdamW(adapter_weights(model), lr=lr) if optimiser is None else optimiser
    losses = []
    for _ in range(num_steps):
        loss = loss_of(model, x, y)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses, optimiser


def truncated_gradients(
    model: Any, x: Tensor, y: Tensor, levels: Tensor, *, successor_weight: float = 0.0, loss: Callable[[Tensor, Tensor], Tensor] = functional.mse_loss
) -> dict[str, Tensor]:
    """Brute force: for every sample, build the network its level sees with plain matrices, and let autograd differentiate one component at a time.

    ``levels`` (samples,); 0 is the private level. Gradients are those of the mean over samples of ``loss``, by ``module.A`` and ``module.B``.
    """
    controller = controller_of(model)
    base = copy.deepcopy(model.base_model.model)
    gradients: dict[str, Tensor] = {}
    for slot in controller.slots:
        gradients[f"{slot.name}.A"] = torch.zeros_like(slot.down.weight)
        gradients[f"{slot.name}.B"] = torch.zeros_like(slot.up.weight)
    for sample, level in enumerate(levels.tolist()):
        leaves = {}
        plain = copy.deepcopy(base)
        for slot in controller.slots:
            down, up = slot.down.weight.detach().clone().requires_grad_(), slot.up.weight.detach().clone().requires_grad_()
            leaves[slot.name] = (down, up)
            seen = slot.rank + (slot.rank < controller.settings.r) if level == 0 else min(level, slot.rank)
            update = controller.scale * up[:, :seen] @ down[:seen]
            parent, _, last = slot.name.rpartition(".")
            setattr(plain.get_submodule(parent), last, _Shifted(slot.base, update))
        (loss(plain(x[sample : sample + 1]), y[sample : sample + 1]) / len(levels)).backward()
        for slot in controller.slots:
            down, up = leaves[slot.name]
            for component in range(slot.rank + 1 if level == 0 else slot.rank):
                share = 1.0 if component == (slot.rank if level == 0 else level - 1) else successor_weight * (0 <= component < level - 1)
                if share and component < len(down) and down.grad is not None and up.grad is not None:
                    gradients[f"{slot.name}.A"][component] += share * down.grad[component]
                    gradients[f"{slot.name}.B"][:, component] += share * up.grad[:, component]
    return gradients


class _Shifted(nn.Module):
    def __init__(self, linear: nn.Linear, update: Tensor) -> None:
        super().__init__()
        self.linear, self.update = linear, update

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.linear.weight.detach() + self.update, self.linear.bias)


def own_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of the adapter after backward, by ``module.A`` and ``module.B``."""
    found = {}
    for slot in controller_of(model).slots:
        found[f"{slot.name}.A"], found[f"{slot.name}.B"] = (
            torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in (slot.down.weight, slot.up.weight)
        )
    return found


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference over the largest expected entry."""
    size = max(float(value.abs().max()) for value in expected.values())
    return max(float((actual[name] - value).abs().max()) for name, value in expected.items()) / size


def levels_in_use(model: Any, batch: int) -> Tensor:
    """Levels that a training forward of ``batch`` samples would get now."""
    controller = controller_of(model)
    controller._batch = batch
    levels = controller._levels()
    assert levels is not None
    return levels.expand(batch)


def spectrum_problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs (64, 12) and targets (64, 10) whose best linear map has the singular values 3, 1.8, 1, 0.5, then six of 0.1."""
    generator = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(64, 12, generator=generator, dtype=dtype)).Q
    u = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=dtype)).Q
    v = torch.linalg.qr(torch.randn(12, 10, generator=generator, dtype=dtype)).Q
    values = torch.tensor(SPECTRUM, dtype=dtype)
    return q, q @ (u @ torch.diag(values) @ v.T).T


def fit_one_layer(schedule: str, num_steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adam on one layer with four components and no growth. Returns inputs, targets, lora_A and lora_B."""
    x, y = spectrum_problem()
    base = nn.Sequential(nn.Linear(12, 10, bias=False)).to(torch.float64)
    base[0].weight.data.zero_()
    model = grower(base, schedule=schedule, r=4, init_r=4, target_r=4, lora_alpha=4)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(num_steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-2 * (1 - step / num_steps)
        for _ in level_passes(model) if schedule == "exact" else (None,):
            (functional.mse_loss(model(x), y) * 100).backward()
        optimiser.step()
        optimiser.zero_grad()
    slot = controller_of(model).slots[0]
    return x, y, slot.down.weight.detach(), slot.up.weight.detach()


def component_errors(x: Tensor, y: Tensor, down: Tensor, up: Tensor) -> list[float]:
    """Distance of each component's map, applied to the inputs, from the exact one, over its singular value."""
    regression = reduce_regression(x.T.numpy(), y.T.numpy())
    exact = exact_parts(regression.target, num_components=4)
    maps = [(torch.outer(up[:, k], down[k]) @ x.T).numpy() for k in range(4)]
    wanted = [np.outer(exact.left[k], exact.scaled_right[k]) @ regression.basis.T for k in range(4)]
    return [float(np.linalg.norm(found - known) / value) for found, known, value in zip(maps, wanted, exact.singular_values, strict=False)]
