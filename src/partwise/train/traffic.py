"""What a round sends, computed from the model and the method before anything is trained.

Every worker gets its part from a coordinator and sends it back. A tensor of which a part holds a fraction along each of two dimensions travels with the
product of both, so that what lies between two split layers costs the square. Seeds travel instead of indices and count as nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from partwise.checks import check_at_least

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.models import Axis
    from partwise.train.method import SubnetMethod
    from partwise.train.optimizer import OptimizerSettings

__all__ = ["RoundTraffic", "bytes_per_round", "data_parallel_bytes", "star_bytes"]

NUM_DEALS = 200  # over which sizes that are drawn at random are averaged
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


def bytes_per_round(method: SubnetMethod, model: nn.Module, *, bytes_per_number: int = 4, optimizer: OptimizerSettings | None = None) -> RoundTraffic:
    """What one round of a method sends for a model: what ``RoundReport.bytes_down`` and ``bytes_up`` will count.

    Where the sizes of parts are drawn at random (``IST(sampler="bernoulli")``), their mean over 200 rounds is taken. Parts that were lost send nothing
    back; asynchronous rounds send each part by itself.

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
    slots = _carried_slots(method, optimizer)
    per_worker = []
    for shares in _mean_shares(method, axes):
        total = Fraction(0)
        for name, tensor in layout.tensors.items():
            numbers = layout.numbers(name, shares)
            total += numbers * (bytes_per_number if tensor.is_floating_point() else tensor.element_size())
            for slot in slots if name in trained else ():
                total += layout.steps(name, shares) * STEP_BYTES if slot == "step" else numbers * bytes_per_number
        per_worker.append(float(total))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    split = sum(size for name, size in sizes.items() if layout.is_split(name))
    return RoundTraffic(sum(per_worker), sum(per_worker), tuple(per_worker), sum(sizes.values()) - split, split)


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

    def is_split(self, name: str) -> bool:
        """Whether some part may hold less than all of a tensor."""
        return name in self.sliced or self._block(name) is not None

    def numbers(self, name: str, shares: Mapping[str, Fraction]) -> Fraction:
        """Entries of a tensor that a part holds, on average over rounds."""
        return self._held(name, shares, self.tensors[name].numel(), self.sliced.get(name, {}))

    def steps(self, name: str, shares: Mapping[str, Fraction]) -> Fraction:
        """Counts of steps: one for each entry of the dimensions along an axis."""
        dims = self.sliced.get(name, {})
        size = 1
        for dim in dims:
            size *= self.tensors[name].shape[dim]
        return self._held(name, shares, size, dims)

    def _held(self, name: str, shares: Mapping[str, Fraction], size: int, dims: Mapping[int, str]) -> Fraction:
        held = Fraction(size)
        for axis in dims.values():
            held *= shares[axis]
        block = self._block(name)
        return held * (shares[block] if block is not None else 1)

    def _block(self, name: str) -> str | None:
        return next((axis for block, axis in self.blocks.items() if name.startswith(block)), None)


def _carried_slots(method: SubnetMethod, optimizer: OptimizerSettings | None) -> tuple[str, ...]:
    if optimizer is None or optimizer.state_rule(method.optimizer_state) != "carry":
        return ()
    from partwise.train.optimizer import SLOTS

    return SLOTS[optimizer.optimizer]


def _mean_shares(method: SubnetMethod, axes: Sequence[Axis]) -> list[dict[str, Fraction]]:
    """For each part, axis -> share of its units that it holds on average.

    Every unit of an axis is as likely to be held as any other, and axes are dealt independently, so these numbers are all that an average needs.
    """
    import numpy as np

    from partwise.rounds import part_seed

    if not axes:
        return [{} for _ in range(method.num_parts)]

    def sizes(round_number: int) -> list[dict[str, int]]:
        generators = [np.random.default_rng(part_seed(0, round_number=round_number, part=k)) for k in range(method.num_parts)]
        return [{axis.name: len(part.units.get(axis.name, range(axis.size))) for axis in axes} for part in method.deal(axes, generators)]

    rounds = [sizes(1), sizes(2)]
    if rounds[0] == rounds[1]:
        rounds = rounds[:1]
    else:
        rounds += [sizes(number) for number in range(3, NUM_DEALS + 1)]
    return [
        {axis.name: Fraction(sum(dealt[part][axis.name] for dealt in rounds), axis.size * len(rounds)) for axis in axes}
        for part in range(method.num_parts)
    ]
