"""Rounds of subnetworks: cut the model, train the parts apart, take the mean over holders. The same for every method of the room.

A worker knows the model without its weights, the method and the data. What travels is the weights of a part; which part it is follows from the numbers of
run, round and part, so that no list of indices is sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from partwise.checks import RunError
from partwise.linalg.slicing import take_shape
from partwise.models import Part, count_holders, extract, merge_tensors, slice_tensors, tensors_of, with_tensors
from partwise.models.axes import BlockAxis, check_part, names_in_part, sliced_entries
from partwise.rounds import part_seed
from partwise.train._batches import num_samples_in
from partwise.train._local import scaled_inputs, train_alone, with_threads
from partwise.train._moments import Moments, fresh_moments
from partwise.train.optimizer import OptimizerSettings
from partwise.train.round_report import PartReport, RoundReport

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partwise.models.axes import Axis
    from partwise.train._batches import Batches
    from partwise.train._local import Loss
    from partwise.train.method import SubnetMethod

__all__ = ["SubnetRounds", "SubnetState", "Tensors"]


class Tensors(dict[str, torch.Tensor]):
    """Tensors by name that travel as safetensors bytes."""

    def __reduce__(self) -> tuple[Callable[[bytes], Tensors], tuple[bytes]]:
        import safetensors.torch

        return _unpacked, (safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in self.items()}),)

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries."""
        return sum(tensor.nbytes for tensor in self.values())


def _unpacked(data: bytes) -> Tensors:
    import safetensors.torch

    return Tensors(safetensors.torch.load(data))  # numbers and names only: the format has no pickle


@dataclass(frozen=True)
class SubnetState:
    """What there is between two rounds.

    Parameters
    ----------
    tensors : dict of str to Tensor
        The whole model, by the names of ``partwise.models.tensors_of``; no correction of a part is in it.
    optimizer : dict
        The optimiser's moments, slot -> name -> tensor; empty unless they are carried.
    outer : dict of str to Tensor
        What the method itself remembers, such as DiLoCo's momentum.
    updates : tuple of int
        Results of each part that were merged.
    round_number : int
        Rounds done; in asynchronous runs, arrivals.
    holders : dict of str to Tensor
        Axis -> how often each of its units has been trained.
    report : RoundReport or None
        Of the last round.
    """

    tensors: dict[str, Tensor]
    optimizer: Moments
    outer: dict[str, Tensor]
    updates: tuple[int, ...]
    round_number: int
    holders: dict[str, Tensor]
    report: RoundReport | None = None


@dataclass(frozen=True)
class PartToTrain:
    """What is sent to a worker."""

    index: int
    round_number: int
    tensors: Tensors
    moments: dict[str, Tensors]
    batches: list[Any] | None  # of a stream, which the worker cannot read


@dataclass(frozen=True)
class TrainedPart:
    """What a worker sends back."""

    index: int
    round_number: int
    tensors: Tensors
    moments: dict[str, Tensors]
    num_steps: int
    num_samples: int
    loss_after_split: float
    loss_after_local: float | None


@dataclass(frozen=True, eq=False)
class SubnetRounds:
    """The round method that runs on engines; see ``SubnetTrainer`` for what a user calls.

    Parameters
    ----------
    method : SubnetMethod
        What is cut, and how.
    template : torch.nn.Module
        The model without its weights: every saved tensor is on the device "meta".
    axes : tuple of Axis
        What ``method.find_axes`` found.
    batches : Batches
        What parts train on.
    settings : OptimizerSettings
        How they train.
    loss : callable
        Mean loss of model and batch.
    num_rounds : int
        Rounds in all, which the schedule of the learning rate looks at.
    seed : int
        Of everything random.
    is_async : bool
        Whether a part counts its own rounds and an arrival is blended in.
    num_threads : int or None
        Threads of each part.
    probe_every : int
        Rounds from one measurement of the losses to the next; 0: never.
    device : torch.device
        Where parts train.
    """

    method: SubnetMethod
    template: nn.Module
    axes: tuple[Axis, ...]
    batches: Batches
    settings: OptimizerSettings
    loss: Loss
    num_rounds: int
    seed: int
    is_async: bool
    num_threads: int | None
    probe_every: int
    device: torch.device
    clock: list[float] = field(default_factory=lambda: [time.perf_counter()], repr=False)

    @property
    def steps(self) -> tuple[int, ...]:
        """Local steps of each part."""
        return tuple(self.method.steps_of(part) for part in range(self.method.num_parts))

    def first_state(self, tensors: dict[str, Tensor]) -> SubnetState:
        """The state before the first round."""
        trained = {name: tensors[name] for name, parameter in self.template.named_parameters() if parameter.requires_grad}
        carries = self.settings.state_rule(self.method.optimizer_state) == "carry"
        state = SubnetState(
            tensors=tensors,
            optimizer=fresh_moments(self.settings, trained, self.axes) if carries else {},
            outer={},
            updates=(0,) * self.method.num_parts,
            round_number=0,
            holders={axis.name: torch.zeros(axis.size, dtype=torch.int64) for axis in self.axes},
        )
        return self.method.between_rounds(state, self)

    def parts_of(self, round_number: int) -> list[Part]:
        """Which units each part holds in a round; the same wherever it is asked."""
        numbers = range(self.method.num_parts)
        if not self.axes or self.method.is_whole_round(round_number, self.num_rounds):
            return [Part({}, index=k) for k in numbers]
        parts = self.method.deal(self.axes, [np.random.default_rng(part_seed(self.seed, round_number=round_number, part=k)) for k in numbers])
        for part in parts:
            check_part(self.axes, part)
        return parts

    def split(self, state: SubnetState) -> list[PartToTrain]:
        """One part per subnetwork, with the weights it holds."""
        dealt: dict[int, list[Part]] = {}
        sent = []
        for k in range(self.method.num_parts):
            number = self._next_round(state, k)
            if number not in dealt:
                dealt[number] = self.parts_of(number)
            part = dealt[number][k]
            moments = {slot: Tensors(self._sliced_moments(of_slot, part)) for slot, of_slot in state.optimizer.items()}
            batches = self.batches.of(k, round_number=number, steps=self.steps) if self.batches.travels else None
            sent.append(PartToTrain(k, number, Tensors(slice_tensors(state.tensors, self.axes, part)), moments, batches))
        return sent

    def work(self, part: PartToTrain) -> TrainedPart:
        """Train one part on its own batches."""
        k, number = part.index, part.round_number
        held = self.parts_of(number)[k]
        bare = extract(self.template, held, axes=self.axes, loadable=False) if self.axes else self.template
        small = with_tensors(bare, {name: tensor.to(self.device, copy=True) for name, tensor in part.tensors.items()})
        batches = part.batches if part.batches is not None else self._batches_of(k, number)
        before = [len(batches) * (number - 1) + step for step in range(len(batches))]
        moments = {slot: {name: tensor.to(self.device, copy=True) for name, tensor in of_slot.items()} for slot, of_slot in part.moments.items()}
        with with_threads(self.num_threads), torch.random.fork_rng(), scaled_inputs(small, self.reader_factors(held)):
            torch.manual_seed(part_seed(self.seed, round_number=number, part=k))  # dropout
            run = train_alone(
                small,
                batches,
                settings=self.settings,
                moments=moments,
                lr=[self.settings.lr_at(step, len(batches) * self.num_rounds) for step in before],
                loss=self.loss,
                probe=self._probes(number),
                where=f"part {k} in round {number}",
            )
        return TrainedPart(
            k,
            number,
            Tensors({name: tensor.detach().cpu() for name, tensor in tensors_of(small).items()}),
            {slot: Tensors({name: tensor.cpu() for name, tensor in of_slot.items()}) for slot, of_slot in run.moments.items()},
            len(batches),
            sum(num_samples_in(batch) for batch in batches),
            run.loss_after_split,
            run.loss_after_local,
        )

    def check(self, part: PartToTrain, result: TrainedPart) -> None:
        """Refuse a result that is not finite or does not fit its part."""
        for name, tensor in part.tensors.items():
            got = result.tensors.get(name)
            if got is None or got.shape != tensor.shape:
                shape = "nothing" if got is None else f"shape {tuple(got.shape)}"
                raise RunError("part-mismatch", f"got {shape} for {name}, expected shape {tuple(tensor.shape)}. Send the part again.")
            if got.is_floating_point() and not bool(got.isfinite().all()):
                raise RunError("part-mismatch", f"got {int((~got.isfinite()).sum())} NaN or infinite numbers in {name}, expected none. Send the part again.")

    def merge(self, state: SubnetState, results: Sequence[TrainedPart]) -> SubnetState:
        """The mean over those who held a coordinate; what nobody held keeps its value."""
        arrived = sorted({result.index: result for result in results}.values(), key=lambda result: result.index)
        held = {result.index: self.parts_of(result.round_number)[result.index] for result in arrived}
        blend = self.method.blend if self.is_async else 1.0
        merged = merge_tensors(state.tensors, [(held[result.index], result.tensors) for result in arrived], axes=self.axes, blend=blend)
        tensors, outer = self.method.after_merge(state, merged)
        optimizer = {slot: self._merged_moments(of_slot, slot, arrived, held, blend=blend) for slot, of_slot in state.optimizer.items()}
        updates = tuple(number + (k in held) for k, number in enumerate(state.updates))
        holders = {
            axis.name: state.holders[axis.name] + torch.tensor(count_holders(axis, held.values()), dtype=torch.int64) for axis in self.axes
        }
        after = replace(
            state, tensors=tensors, outer=outer, optimizer=optimizer, updates=updates, round_number=state.round_number + 1, holders=holders, report=None
        )
        return self.method.between_rounds(replace(after, report=self._report(state, after, arrived, held)), self)

    def whole_model(self, state: SubnetState) -> nn.Module:
        """The whole model as it is to be used."""
        model = with_tensors(self.template, {name: tensor.to(self.device, copy=True) for name, tensor in state.tensors.items()})
        return self.method.deployed(model, self.axes)

    def reader_factors(self, part: Part) -> dict[str, float]:
        """Weight in the part -> what its input is multiplied by."""
        factors = self.method.factors(self.axes, part)
        readers = {reader: factors[axis.name] for axis in self.axes if not isinstance(axis, BlockAxis) and axis.name in factors for reader in axis.readers}
        names = names_in_part(self.axes, part, readers)
        return {names[reader]: factor for reader, factor in readers.items() if reader in names}

    def _batches_of(self, part: int, round_number: int, *, most: int | None = None) -> list[Any]:
        """Batches read here; what a dataset draws while it is read, as augmentation does, depends on part and round only."""
        with torch.random.fork_rng():
            torch.manual_seed(part_seed(self.seed, round_number=round_number, part=part))
            return self.batches.of(part, round_number=round_number, steps=self.steps, most=most)

    def _next_round(self, state: SubnetState, part: int) -> int:
        return (state.updates[part] if self.is_async else state.round_number) + 1

    def _probes(self, round_number: int) -> bool:
        return self.probe_every > 0 and (round_number % self.probe_every == 0 or round_number in {1, self.num_rounds})

    def _sliced_moments(self, of_slot: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
        return slice_tensors(of_slot, self.axes, part)

    def _merged_moments(
        self, of_slot: dict[str, Tensor], slot: str, arrived: Sequence[TrainedPart], held: Mapping[int, Part], *, blend: float
    ) -> dict[str, Tensor]:
        # A count of steps is no quantity to blend: it is that of the newest.
        whole = 1.0 if slot == "step" else blend
        return merge_tensors(of_slot, [(held[result.index], result.moments[slot]) for result in arrived], axes=self.axes, blend=whole)

    def _report(self, before: SubnetState, after: SubnetState, arrived: Sequence[TrainedPart], held: Mapping[int, Part]) -> RoundReport:
        if self.is_async:
            sent, numbers = dict(held), {result.index: result.round_number for result in arrived}
        else:
            sent = dict(enumerate(self.parts_of(after.round_number)))
            numbers = dict.fromkeys(sent, after.round_number)
        by_index = {result.index: result for result in arrived}
        parts = tuple(self._part_report(before, k, part, by_index.get(k)) for k, part in sorted(sent.items()))
        num_units = sum(axis.size for axis in self.axes)
        covered = sum(sum(count > 0 for count in count_holders(axis, held.values())) for axis in self.axes)
        began, self.clock[0] = self.clock[0], time.perf_counter()
        probes = bool(arrived) and self._probes(max(numbers.values(), default=0))
        return RoundReport(
            round_number=after.round_number,
            num_parts=len(sent),
            num_arrived=len(arrived),
            num_steps=sum(result.num_steps for result in arrived),
            num_samples=sum(result.num_samples for result in arrived),
            seconds=self.clock[0] - began,
            bytes_down=sum(part.bytes for part in parts),
            bytes_up=sum(part.bytes for part in parts if not part.was_lost),
            coverage=covered / num_units if num_units else float(bool(arrived)),
            loss_after_split=_mean([result.loss_after_split for result in arrived]),
            loss_after_local=_mean([result.loss_after_local for result in arrived]),
            loss_after_merge=self._loss_of_whole(after, arrived) if probes else None,
            parts=parts,
        )

    def _part_report(self, state: SubnetState, index: int, part: Part, result: TrainedPart | None) -> PartReport:
        entries = sliced_entries(self.axes, part)
        names = names_in_part(self.axes, part, state.tensors)
        trained = {name for name, _ in self.template.named_parameters()}
        sizes = {name: (_num_entries(state.tensors[name], entries.get(name, {})), state.tensors[name].element_size()) for name in names}
        num_bytes = sum(number * width for number, width in sizes.values())
        for of_slot in state.optimizer.values():
            num_bytes += sum(_num_entries(tensor, entries.get(name, {})) * tensor.element_size() for name, tensor in of_slot.items() if name in names)
        parameters = sum(number for name, (number, _) in sizes.items() if name in trained)
        if result is None:
            return PartReport(index, parameters, num_bytes, 0, None, None, was_lost=True)
        return PartReport(index, parameters, num_bytes, result.num_steps, result.loss_after_split, result.loss_after_local)

    def _loss_of_whole(self, state: SubnetState, arrived: Sequence[TrainedPart]) -> float | None:
        model = self.whole_model(state).train()
        with with_threads(self.num_threads), torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(part_seed(self.seed, round_number=state.round_number, part=0))
            first = [self._batches_of(result.index, result.round_number, most=1)[0] for result in arrived]
            return _mean([float(self.loss(model, batch)) for batch in first])


def _num_entries(tensor: Tensor, entries: Mapping[int, Tensor]) -> int:
    return int(np.prod(take_shape(tensor.shape, entries), dtype=np.int64))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
