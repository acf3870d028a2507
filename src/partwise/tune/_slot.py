"""One adapted module in training, and the numbers that resuming needs beyond weights and optimiser."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partwise.checks import InputError
from partwise.tune._sharded import read_components, write_components

if TYPE_CHECKING:
    from partwise.tune._prefix_linear import Masks, PrefixDown, PrefixUp

FORMAT = 1.0
HEADER = 5  # format, r_max, step, rank, flags


@dataclass(eq=False)
class Slot:
    """One adapted module: its two maps and how many components are active."""

    name: str
    index: int
    down: PrefixDown
    up: PrefixUp
    base: Any
    seed: int
    rank: int
    births: list[int]  # controller step at which each component began to learn
    masks: Masks | None = None
    private_up: Tensor | None = None  # private column of lora_B waiting for lora_B to be loaded
    frozen: tuple[Tensor, Tensor] | None = None  # finished components of one-rank-at-a-time, put back after every step

    def fresh_down(self, like: Tensor) -> Tensor:
        """Starting values of ``lora_A``, (r_max, in), placed as ``like``."""
        return torch.stack([self._fresh_row(component) for component in range(like.shape[0])]).to(like)

    def _fresh_row(self, component: int) -> Tensor:
        """Uniform within the Kaiming bound, as in peft, (in,). Drawn from (seed, module, component) alone, so a resumed run has the same."""
        key = hashlib.sha256(f"{self.seed}/{self.name}/{component}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        num_inputs = self.down.weight.shape[1]
        return (torch.rand(num_inputs, generator=generator) * 2 - 1) / math.sqrt(num_inputs)

    @property
    def component_parameters(self) -> int:
        """Numbers in one component: in features plus out features."""
        return int(self.down.weight.shape[1] + self.up.weight.shape[0])

    def begin(self, component: int, *, step: int) -> None:
        """Give ``component`` (from 0) its starting values: a fresh row of ``lora_A``, and zero in ``lora_B``."""
        self.births[component] = step
        row, column = self._fresh_row(component)[None, :], torch.zeros(self.up.weight.shape[0], 1)
        write_components(self.down.weight, row.to(self.down.weight.device), dim=0, start=component)
        write_components(self.up.weight, column.to(self.up.weight.device), dim=1, start=component)

    def freeze(self, num_components: int) -> None:
        """Keep the first components as they are now, whatever optimisers do."""
        self.frozen = (
            read_components(self.down.weight, dim=0, start=0, stop=num_components),  # (components, in)
            read_components(self.up.weight, dim=1, start=0, stop=num_components),  # (out, components)
        )

    def put_back(self) -> None:
        """Undo what an optimiser did to frozen components."""
        if self.frozen is not None and self.frozen[0].shape[0]:
            write_components(self.down.weight, self.frozen[0], dim=0, start=0)
            write_components(self.up.weight, self.frozen[1], dim=1, start=0)

    def clear_waiting(self) -> None:
        """Zero the columns of ``lora_B`` that are not active, so that a merge adds nothing of them."""
        num_outputs, width = self.up.weight.shape
        if self.rank < width:
            write_components(self.up.weight, torch.zeros(num_outputs, width - self.rank, device=self.up.weight.device), dim=1, start=self.rank)

    def read_private(self) -> Tensor:
        """The component after the active ones as one vector, (in + out,)."""
        row = read_components(self.down.weight, dim=0, start=self.rank, stop=self.rank + 1)
        column = read_components(self.up.weight, dim=1, start=self.rank, stop=self.rank + 1)
        return torch.cat([row.flatten(), column.flatten()])

    def write_private(self, values: Tensor) -> None:
        """Undo :meth:`read_private`."""
        num_inputs = self.down.weight.shape[1]
        write_components(self.down.weight, values[None, :num_inputs].to(self.down.weight.device), dim=0, start=self.rank)
        write_components(self.up.weight, values[num_inputs:, None].to(self.up.weight.device), dim=1, start=self.rank)


@dataclass(frozen=True)
class SlotState:
    """Step, ranks, scores and ages of one module. ``mean``, ``variability`` and ``births`` have ``r_max`` entries each.

    ``tail`` is the private component of advance learning, or the held-out losses of one-rank-at-a-time.
    """

    step: int
    rank: int
    flags: int
    mean: Tensor
    variability: Tensor
    births: list[int]
    tail: Tensor

    def pack(self) -> Tensor:
        """One row of float64, (1, numbers): peft takes a 1-D LoRA tensor for a shard that was not gathered."""
        parts = [
            torch.tensor([FORMAT, len(self.mean), self.step, self.rank, self.flags]),
            self.mean,
            self.variability,
            torch.tensor(self.births),
            self.tail,
        ]
        return torch.cat([part.detach().to("cpu", torch.float64) for part in parts])[None, :]

    @classmethod
    def unpack(cls, packed: Tensor, *, width: int, name: str) -> SlotState:
        """Undo :meth:`pack`; ``width`` is ``r_max``."""
        numbers = packed.to("cpu", torch.float64).flatten()
        if numbers[:2].tolist() != [FORMAT, width]:
            raise InputError("resume-differs", f"the saved growth state of {name} was made with another r than r={width}. Use the same r.")
        _, _, step, rank, flags = (int(number) for number in numbers[:HEADER])
        mean, variability, births = numbers[HEADER : HEADER + 3 * width].view(3, width)
        return cls(step, rank, flags, mean, variability, [int(birth) for birth in births], numbers[HEADER + 3 * width :])
