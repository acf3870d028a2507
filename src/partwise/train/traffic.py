"""What a round sends, computed from the model and the method before anything is trained.

Every worker gets its part from a coordinator and sends it back. A tensor of which a part holds a fraction along each of two dimensions travels with the
product of both, so that what lies between two split layers costs the square. Seeds travel instead of indices and count as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from partwise.checks import check_at_least

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.models import Axis, Part
    from partwise.train.method import SubnetMethod
    from partwise.train.optimizer import OptimizerSettings

__all__ = ["RoundTraffic", "bytes_per_round", "data_parallel_bytes", "star_bytes"]

NUM_DRAWN = 1000  # parts over which sizes that are drawn at random are averaged
STEP_BYTES = 4  # counts of steps are float32, whatever the parameters are


@dataclass(frozen=True)
class RoundTraffic:
    """Bytes of one round, without what an engine adds to them.

    Parameters
    ----------
    down, up : float
        To all parts together, and back.
    per_worker : tuple of float
        Of each part, one way.
    shared_parameters, split_parameters : int
        Parameters that every part holds whole, and those along a split axis or in a block that can be left out.
    """

    down: float
    up: float
    per_worker: tuple[float, ...]
    shared_parameters: int
    split_parameters: int

    @property
    def total(self) -> float:
        """Down and up."""
        return self.down + self.up


def bytes_per_round(
    method: SubnetMethod, model: nn.Module, *, bytes_per_number: int = 4, optimizer: OptimizerSettings | None = None, num_rounds: int | None = None
) -> RoundTraffic:
    """What one round of a method sends for a model: what ``RoundReport.bytes_down`` and ``bytes_up`` will count.

    Where the sizes of parts are drawn anew in every round (``TwIST()``, ``IST(sampler="bernoulli")``), this is the mean over so many rounds that 1,000
    parts are drawn, good to about one in a hundred. Parts that were lost send nothing back; asynchronous rounds send each part by itself.

    Parameters
    ----------
    method : SubnetMethod
        How the model is cut.
    model : torch.nn.Module
        Only its shapes are looked at, so it may be on the device "meta". Saved buffers travel too, such as the statistics of batch normalisation.
    bytes_per_number : int, default=4
        Of every floating-point number: 4 for float32, 2 for bfloat16. Whole numbers keep the size they have.
    optimizer : OptimizerSettings, optional
        When its moments are carried, they travel with the parameters. AdamW's two moments make that three times the parameters; its counts of steps, one for
        each entry along a split dimension, are little on top, except for weights between two split layers, which have one each and cost four times. SGD's
        momentum makes it twice. Left out: only the model travels.
    num_rounds : int, optional
        Take the mean over a run of so many rounds, those included in which the method trains the whole model, as ``TwIST(whole_share=...)`` does. Left out:
        a round in which the model is split.

    Raises
    ------
    InputError
        When the method cannot split this model.

    References
    ----------
    Distributed Learning of Deep Neural Networks using Independent Subnet Training. arXiv:1910.02120.

    Examples
    --------
    >>> from torch import nn
    >>> from partwise.train import IST
    >>> model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    >>> bytes_per_round(IST(num_parts=4), model).down  # 4 parts of 4 neurons with 12 weights of 4 bytes
    768.0
    """
    from partwise.models import tensors_of

    check_at_least(bytes_per_number, 1, name="bytes_per_number")
    axes = method.find_axes(model)
    layout = _Layout.of(axes, tensors_of(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    costs: dict[tuple[str, ...], int] = {}  # axes that a tensor is split along -> bytes that such tensors have when they are whole
    for name, tensor in layout.tensors.items():
        width = bytes_per_number if tensor.is_floating_point() else tensor.element_size()
        costs[layout.axes_of(name)] = costs.get(layout.axes_of(name), 0) + tensor.numel() * width
        for slot in _carried_slots(method, optimizer) if name in trained else ():
            extra = layout.num_steps(name) * STEP_BYTES if slot == "step" else tensor.numel() * bytes_per_number
            costs[layout.axes_of(name)] += extra
    if num_rounds is not None:
        check_at_least(num_rounds, 1, name="num_rounds")
    whole = Fraction(sum(method.is_whole_round(number, num_rounds) for number in range(1, num_rounds + 1)), num_rounds) if num_rounds else Fraction(0)
    per_worker = tuple(float(whole * sum(costs.values()) + (1 - whole) * mean) for mean in _mean_over_rounds(method, axes, costs))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    split = sum(size for name, size in sizes.items() if layout.axes_of(name))
    return RoundTraffic(sum(per_worker), sum(per_worker), per_worker, sum(sizes.values()) - split, split)


def data_parallel_bytes(num_parameters: int, *, num_workers: int, num_steps: int = 1, bytes_per_number: int = 4) -> int:
    """What data-parallel training (DDP) sends and receives in all, for the same steps: a ring all-reduce of the gradients at every step.

    ``2 (S - 1) P b`` for each of ``num_steps``. Every byte is counted once, as in ``RoundTraffic.total``.

    Parameters
    ----------
    num_parameters : int
        P.
    num_workers : int
        S; one alone sends nothing.
    num_steps : int, default=1
        Steps; the local steps of a round (tau) for the same work as one.
    bytes_per_number : int, default=4
        b.

    Examples
    --------
    >>> data_parallel_bytes(1000, num_workers=4, num_steps=20)
    480000
    """
    for name, value in {
        "num_parameters": num_parameters,
        "num_workers": num_workers,
        "num_steps": num_steps,
        "bytes_per_number": bytes_per_number,
    }.items():
        check_at_least(value, 1, name=name)
    return 2 * (num_workers - 1) * num_parameters * bytes_per_number * num_steps


def star_bytes(shared_parameters: float, split_parameters: float, *, num_parts: int, copies: float = 1.0, bytes_per_number: int = 4) -> float:
    """Bytes of a round, down and up, from counts of parameters alone: ``2 b (S P_shared + copies P_split)``.

    Parameters
    ----------
    shared_parameters, split_parameters : float
        What every part holds, and what is split along one dimension or by whole blocks.
    num_parts : int
        S.
    copies : float, default=1.0
        Mean number of parts that hold a split parameter: 1 where parts are disjoint (LoFT, ResIST without a minimum), ``keep * num_parts`` for TwIST,
        ``1 / num_parts`` for weights between two layers that are both dealt (IST), ``num_parts`` where nothing is split (local SGD, DiLoCo).
    bytes_per_number : int, default=4
        b.

    Examples
    --------
    >>> star_bytes(15_422_116, 25_974_784, num_parts=2) / 1e9  # ResIST's public model
    0.454552128
    """
    check_at_least(num_parts, 1, name="num_parts")
    return 2 * bytes_per_number * (num_parts * shared_parameters + copies * split_parameters)


@dataclass(frozen=True)
class _Layout:
    """Which dimensions of which tensors lie along an axis, and which tensors are in a block that can be left out."""

    tensors: Mapping[str, Tensor]
    sliced: Mapping[str, Mapping[int, str]]  # tensor -> dimension -> axis
    blocks: Mapping[str, str]  # "section.block." -> axis

    @classmethod
    def of(cls, axes: Sequence[Axis], tensors: Mapping[str, Tensor]) -> _Layout:
        from partwise.models import BlockAxis

        sliced: dict[str, dict[int, str]] = {}
        blocks: dict[str, str] = {}
        for axis in axes:
            if isinstance(axis, BlockAxis):
                blocks |= {f"{block}.": axis.name for block in axis.blocks}
            else:
                for member in axis.members:
                    sliced.setdefault(member.tensor, {})[member.dim] = axis.name
        return cls(tensors, sliced, blocks)

    def axes_of(self, name: str) -> tuple[str, ...]:
        """Axes that a tensor is split along, once for each dimension; nothing for one that every part holds whole."""
        block = next((axis for block, axis in self.blocks.items() if name.startswith(block)), None)
        return (*sorted(self.sliced.get(name, {}).values()), *(() if block is None else (block,)))

    def num_steps(self, name: str) -> int:
        """Counts of steps of the whole tensor: one for each entry of the dimensions along an axis."""
        return math.prod(self.tensors[name].shape[dim] for dim in self.sliced.get(name, {}))


def _carried_slots(method: SubnetMethod, optimizer: OptimizerSettings | None) -> tuple[str, ...]:
    if optimizer is None or optimizer.state_rule(method.optimizer_state) != "carry":
        return ()
    from partwise.train._moments import SLOTS

    return SLOTS[optimizer.optimizer]


def _mean_over_rounds(method: SubnetMethod, axes: Sequence[Axis], costs: Mapping[tuple[str, ...], int]) -> list[Fraction]:
    """What each part costs, on average over rounds.

    Every unit of an axis is as likely to be held as any other, so the number of units that a part holds of each axis is all that an average needs.
    """
    import numpy as np

    from partwise.rounds import part_seed

    numbers = range(method.num_parts)
    if not axes:
        return [Fraction(sum(costs.values()))] * method.num_parts
    known: dict[tuple[int, ...], Fraction] = {}

    def cost(part: Part) -> Fraction:
        held = tuple(len(part.units.get(axis.name, range(axis.size))) for axis in axes)
        if held not in known:
            shares = {axis.name: Fraction(number, axis.size) for axis, number in zip(axes, held, strict=True)}
            known[held] = sum((size * math.prod((shares[axis] for axis in split), start=Fraction(1)) for split, size in costs.items()), Fraction(0))
        return known[held]

    def costs_of(round_number: int) -> list[Fraction]:
        return [cost(part) for part in method.deal(axes, [np.random.default_rng(part_seed(0, round_number=round_number, part=k)) for k in numbers])]

    rounds = [costs_of(number) for number in range(1, 1 + max(2, NUM_DRAWN // 30 // method.num_parts))]
    if all(one == rounds[0] for one in rounds):
        return rounds[0]  # nothing is drawn but which units
    rounds += [costs_of(number) for number in range(1 + len(rounds), 1 + NUM_DRAWN // method.num_parts)]
    return [sum(of_part, Fraction(0)) / len(rounds) for of_part in zip(*rounds, strict=True)]
