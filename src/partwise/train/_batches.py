"""Which batches a part trains on: the same ones whenever it is asked, so that a part can be sent again.

Rows of a dataset are dealt to the parts once; each part walks through its own shard in an order of its own, epoch after epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from partwise.checks import InputError
from partwise.rounds import part_seed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Batches", "OwnShards", "Shards", "Stream", "batches_of", "num_samples_in"]

LARGEST_SAMPLE = 50  # batches of a stream that are kept for statistics
ORDER_SALT = 0x5EED  # keeps the order of rows apart from what the samplers draw with the same seed


class Batches(Protocol):
    """Where the batches of a part come from."""

    @property
    def travels(self) -> bool:
        """Whether batches go with the part, because a worker cannot read them itself."""
        ...

    def of(self, part: int, *, round_number: int, steps: Sequence[int], most: int | None = None) -> list[Any]:
        """The batches of one part in one round, or the first ``most`` of them; ``steps`` are the local steps of all parts."""
        ...

    def sample(self, number: int) -> list[Any]:
        """At most ``number`` batches of all parts, always the same ones."""
        ...


@dataclass(eq=False)
class Shards:
    """A map-style dataset dealt to the parts.

    Parameters
    ----------
    dataset : Dataset
        With ``len`` and ``[index]``.
    batch_size : int
        Rows of a batch; batches are always full and run across the ends of epochs.
    collate : callable
        Makes a batch of a list of rows.
    shuffle : bool
        Whether rows are drawn, anew in every epoch, or read in their order.
    num_parts : int
        Parts that share the rows.
    seed : int
        Of the order.
    """

    dataset: Any
    batch_size: int
    collate: Callable[[list[Any]], Any]
    shuffle: bool
    num_parts: int
    seed: int
    travels: bool = field(default=False, init=False)
    _shards: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False)
    _orders: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False)  # of the latest epochs

    def __post_init__(self) -> None:
        if len(self.dataset) < self.num_parts:
            raise InputError(
                "too-few-rows", f"got {len(self.dataset)} rows for {self.num_parts} parts, expected at least one each. Pass more data, or fewer parts."
            )

    def of(self, part: int, *, round_number: int, steps: Sequence[int], most: int | None = None) -> list[Any]:
        """See `Batches`."""
        first = (round_number - 1) * steps[part]
        return [self._batch(part, first + step) for step in range(steps[part] if most is None else most)]

    def sample(self, number: int) -> list[Any]:
        """See `Batches`."""
        number = min(number, -(-len(self.dataset) // self.batch_size))
        return [self._batch(k % self.num_parts, k // self.num_parts) for k in range(number)]

    def _batch(self, part: int, number: int) -> Any:
        size = len(self._shard(part))
        rows = []
        for position in range(number * self.batch_size, (number + 1) * self.batch_size):
            epoch, place = divmod(position, size)
            rows.append(self.dataset[int(self._order(part, epoch)[place])])
        return self.collate(rows)

    def _shard(self, part: int) -> NDArray[np.int64]:
        if part not in self._shards:
            import numpy as np

            rows = np.arange(len(self.dataset))
            if self.shuffle:
                np.random.default_rng(part_seed(self.seed, round_number=0, part=ORDER_SALT)).shuffle(rows)
            self._shards[part] = rows[part :: self.num_parts]
        return self._shards[part]

    def _order(self, part: int, epoch: int) -> NDArray[np.int64]:
        """Rows of a part in the order of an epoch."""
        if not self.shuffle:
            return self._shard(part)
        if (part, epoch) not in self._orders:
            import numpy as np

            for outdated in [key for key in self._orders if key[0] == part and key[1] < epoch - 1]:
                del self._orders[outdated]
            generator = np.random.default_rng(part_seed(self.seed, round_number=epoch, part=ORDER_SALT + 1 + part))
            self._orders[part, epoch] = generator.permutation(self._shard(part))
        return self._orders[part, epoch]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_shards": {}, "_orders": {}}  # made again where they are needed


@dataclass(frozen=True, eq=False)
class OwnShards:
    """A loader for each part: shards that somebody else cut."""

    shards: tuple[Shards, ...]
    travels: bool = field(default=False, init=False)

    def of(self, part: int, *, round_number: int, steps: Sequence[int], most: int | None = None) -> list[Any]:
        """See `Batches`."""
        return self.shards[part].of(0, round_number=round_number, steps=(steps[part],), most=most)

    def sample(self, number: int) -> list[Any]:
        """See `Batches`."""
        each = -(-number // len(self.shards))
        return [batch for shard in self.shards for batch in shard.sample(each)][:number]


@dataclass(eq=False)
class Stream:
    """Batches that can only be read in order; they are read here and travel with the parts.

    Parameters
    ----------
    loader : iterable
        Batches. One that can be read again is, when it ends; an iterator cannot.
    """

    loader: Iterable[Any]
    travels: bool = field(default=True, init=False)
    _batches: Iterator[Any] = field(init=False, repr=False)
    _num_read: int = field(default=0, init=False)
    _ahead: deque[Any] = field(default_factory=deque, init=False, repr=False)  # read by `sample`, not yet handed out
    _first: list[Any] = field(default_factory=list, init=False, repr=False)
    _is_first_pass: bool = field(default=True, init=False, repr=False)
    _round: tuple[int, list[Any]] = field(default=(0, []), init=False, repr=False)

    def __post_init__(self) -> None:
        self._batches = iter(self.loader)

    def of(self, part: int, *, round_number: int, steps: Sequence[int], most: int | None = None) -> list[Any]:
        """See `Batches`. Rounds are asked for in order."""
        while self._round[0] < round_number:
            self._round = self._round[0] + 1, [self._next(self._round[0] + 1, sum(steps)) for _ in range(sum(steps))]
        first = sum(steps[:part])
        return self._round[1][first : first + (steps[part] if most is None else most)]

    def sample(self, number: int) -> list[Any]:
        """See `Batches`: the first of the stream, as many as are kept; parts that come later still get them."""
        while self._is_first_pass and len(self._first) < min(number, LARGEST_SAMPLE) and (found := next(self._batches, None)) is not None:
            self._first.append(found)
            self._ahead.append(found)
        return self._first[:number]

    def _next(self, round_number: int, wanted: int) -> Any:
        if self._ahead:
            self._num_read += 1
            return self._ahead.popleft()
        for batch in self._batches:
            self._num_read += 1
            if self._is_first_pass and len(self._first) < LARGEST_SAMPLE:
                self._first.append(batch)
            return batch
        if self._num_read and iter(self.loader) is not self.loader:
            self._batches, self._num_read, self._is_first_pass = iter(self.loader), 0, False
            return self._next(round_number, wanted)
        raise InputError(
            "loader-ended",
            f"the loader ended after {self._num_read} batches, in round {round_number}, expected {wanted} for every round. Pass a DataLoader or a list, "
            "which can be read again and again, or fewer rounds.",
        )


def batches_of(loader: Any, *, num_parts: int, seed: int) -> Batches:
    """Batches of a loader, in the way that suits it best.

    Parameters
    ----------
    loader : DataLoader, sequence of DataLoader or iterable
        A DataLoader that draws or reads the rows of a map-style dataset is dealt to the parts. A sequence of such loaders has one for each part. Anything else
        is read in order.
    num_parts : int
        Parts of a round.
    seed : int
        Of the order of rows.

    Raises
    ------
    InputError
        ``too-few-rows``, ``loaders-per-part`` or ``no-loader``.
    """
    from torch.utils.data import DataLoader

    if isinstance(loader, list | tuple) and loader and all(isinstance(one, DataLoader) for one in loader):
        if len(loader) != num_parts:
            raise InputError(
                "loaders-per-part", f"got {len(loader)} loaders for {num_parts} parts, expected one each. Pass {num_parts}, or one loader for all parts."
            )
        shards = [_shards(one, num_parts=1, seed=seed + 1 + number) for number, one in enumerate(loader)]
        if not all(isinstance(one, Shards) for one in shards):
            raise InputError(
                "loaders-per-part", "got a loader per part that reads a stream, expected ones over a map-style dataset. Pass those, or one stream."
            )
        return OwnShards(tuple(one for one in shards if isinstance(one, Shards)))
    if isinstance(loader, DataLoader):
        return _shards(loader, num_parts=num_parts, seed=seed)
    if not isinstance(loader, Iterable):
        raise InputError("no-loader", f"got a {type(loader).__name__} as loader, expected a DataLoader or an iterable of batches. Wrap the data in one.")
    return Stream(loader)


def _shards(loader: Any, *, num_parts: int, seed: int) -> Shards | Stream:
    """The dataset of a loader dealt to the parts, unless the loader has an order of its own."""
    from torch.utils.data import IterableDataset, RandomSampler, SequentialSampler

    plain = type(loader.sampler) in {RandomSampler, SequentialSampler} and not getattr(loader.sampler, "replacement", False)
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None or not plain:
        return Stream(loader)
    return Shards(loader.dataset, loader.batch_size, loader.collate_fn, isinstance(loader.sampler, RandomSampler), num_parts, seed)


def num_samples_in(batch: Any) -> int:
    """Rows of a batch: the length of the first tensor in it."""
    from torch import Tensor

    if isinstance(batch, Tensor):
        return len(batch)
    entries = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((num_samples_in(entry) for entry in entries if isinstance(entry, Tensor | Mapping | list | tuple)), 1)
