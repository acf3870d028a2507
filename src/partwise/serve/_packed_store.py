"""The keys and values of one layer: recent ones as the model made them, older ones in 4 or 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from partwise.checks import InputError, check_at_least
from partwise.serve._packing import Packed, check_packable, pack, pair_bytes, unpack_into

__all__ = ["PackedStore"]

FIRST = 64  # slots that are allocated at least, where the limit allows as many
TOGETHER = 4  # slots that are packed at once while tokens come one by one, which costs little more than one


class PackedStore:
    """Keys and values in slots. A slot is packed by the time it is no longer among the last ``residual``, and is never packed again: eviction copies bytes.

    What is appended waits in the model's own dtype until `settle`, so that attention sees it as it is, and a long prompt can be cut down by `keep` before
    anything of it is packed. No gradient flows through a store.

    Parameters
    ----------
    limit : int
        Slots that memory is held for: the budget and one more, for the token that is being attended to.
    bits : {4, 8}
        Width of a code.
    residual : int
        Slots that stay in the model's own dtype, the last ones; up to three of them may be packed already, and there are fewer after a `keep` that dropped
        some.
    """

    moves_single_slots = False

    def __init__(self, limit: int, *, bits: int, residual: int) -> None:
        check_at_least(limit, 1, name="limit")
        check_at_least(residual, 0, name="residual")
        self.limit, self.bits, self.residual = limit, bits, residual
        self._num_packed = 0
        self._packed: Packed | None = None  # with free slots at the end
        self._tail: Tensor | None = None  # (2, batch, heads, slots, dim), without

    @staticmethod
    def bound(*, limit: int, batch_size: int, num_heads: int, dim: int, value_dim: int, itemsize: int, bits: int, residual: int) -> int:
        """Bytes that are never exceeded between two calls of the model."""
        _check_pair(dim, value_dim)
        tail = min(residual, limit)
        return batch_size * num_heads * ((limit - tail) * pair_bytes(dim, bits) + tail * 2 * dim * itemsize)

    @property
    def num_slots(self) -> int:
        """Slots in use."""
        return self._num_packed + (0 if self._tail is None else self._tail.shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes held now, free slots included."""
        held = [self._tail, *(self._packed or ())]
        return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens: (batch, kv_heads, new, dim) each."""
        if self._tail is None:
            _check_pair(keys.shape[-1], values.shape[-1])
            check_packable(keys.shape[-1], self.bits)
        new = torch.stack([keys.detach(), values.detach()])  # (2, batch, heads, new, dim)
        self._tail = new if self._tail is None else torch.cat([self._tail, new], 3)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, (batch, kv_heads, slots, dim) each, in the model's dtype."""
        keys, values = self._read(2)
        return keys, values

    def read_keys(self) -> Tensor:
        """Keys of all slots, (batch, kv_heads, slots, dim)."""
        return self._read(1)[0]

    def _read(self, kinds: int) -> Tensor:
        tail = self._recent()[:kinds]
        if not self._num_packed:
            return tail
        _, batch, heads, _, dim = tail.shape
        out = tail.new_empty(kinds, batch, heads, self.num_slots, dim)
        unpack_into(out[:, :, :, : self._num_packed], self._used())
        out[:, :, :, self._num_packed :] = tail
        return out

    def settle(self) -> None:
        """Pack all slots but the last ``residual``, and a few of those where there is room, so that this has not to be done for every token."""
        tail = self._recent()
        num_new = tail.shape[3] - self.residual
        if num_new > 0:
            together = min(TOGETHER, self.residual)
            room = self.limit - self.residual - self._num_packed
            if together > 1 and room > num_new:
                num_new = min(-(-num_new // together) * together, room)
            self._write(pack(tail[:, :, :, :num_new], self.bits), start=self._num_packed)
            self._tail = tail[:, :, :, num_new:].clone()
        elif self._capacity + tail.shape[3] > self.limit:  # `keep` left fewer recent slots than there are again now
            self._move_to(max(self.limit - self.residual, self._num_packed))

    def keep(self, kept: Tensor) -> None:
        """Keep some slots and free the others.

        Parameters
        ----------
        kept : Tensor
            (batch, kv_heads, kept) slot numbers, ascending in every head; numbers of slots that will be taken as empty may stand before them in any order.
        """
        tail, old = self._recent(), self._num_packed
        if not old:
            self._tail = _gather(tail, kept)
            return
        assert self._packed is not None
        place = torch.arange(1, kept.shape[2] + 1, device=kept.device)
        # A head that keeps fewer packed slots than another has recent ones packed early, so that all have equally many.
        split = max(int(((kept < old) * place).max()), kept.shape[2] - self.residual)
        source, num_new = self._packed, int(kept[:, :, :split].max()) + 1 - old if split else 0
        if num_new > 0:
            new = pack(tail[:, :, :, :num_new], self.bits)
            if old + num_new <= self._capacity:
                self._write(new, start=old)
            else:
                source = Packed(*(torch.cat(parts, 3) for parts in zip(self._used(), new, strict=True)))
        self._tail = _gather(tail, kept[:, :, split:] - old)
        self._write(Packed(*(_gather(part, kept[:, :, :split]) for part in source)), start=0)

    def select_rows(self, rows: Tensor) -> None:
        """Rows of the batch, in this order; a row may occur several times or not at all."""
        self._tail = self._recent().index_select(1, rows.to(self._recent().device))
        if self._packed is not None:
            with torch.inference_mode(False):
                self._packed = Packed(*(part.index_select(1, rows.to(part.device)) for part in self._packed))

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self._tail = self._recent().to(device)
        if self._packed is not None:
            with torch.inference_mode(False):
                self._packed = Packed(*(part.to(device) for part in self._packed))

    def _recent(self) -> Tensor:
        assert self._tail is not None, "nothing was appended yet"
        return self._tail

    def _used(self) -> Packed:
        assert self._packed is not None
        return Packed(*(part[:, :, :, : self._num_packed] for part in self._packed))

    @property
    def _capacity(self) -> int:
        return 0 if self._packed is None else self._packed.codes.shape[3]

    def _write(self, new: Packed, *, start: int) -> None:
        """Put packed slots at ``start``; they are the last packed ones then."""
        end = start + new.codes.shape[3]
        if end > self._capacity:
            wanted = min(max(2 * self._capacity, FIRST), self.limit - self.residual)
            self._move_to(max(wanted, end), like=new)
        assert self._packed is not None
        for part, values in zip(self._packed, new, strict=True):
            part[:, :, :, start:end] = values
        self._num_packed = end

    def _move_to(self, capacity: int, like: Packed | None = None) -> None:
        """A buffer for so many slots, writable in and out of inference mode, takes over."""
        like = like or self._packed
        assert like is not None
        with torch.inference_mode(False):
            larger = Packed(*(torch.empty(*part.shape[:3], capacity, part.shape[4], dtype=part.dtype, device=part.device) for part in like))
        if self._packed is not None:
            for part, values in zip(larger, self._used(), strict=True):
                part[:, :, :, : self._num_packed] = values
        self._packed = larger


def _check_pair(dim: int, value_dim: int) -> None:
    if dim != value_dim:
        raise InputError(
            "keys-values-differ",
            f"got keys of {dim} and values of {value_dim} entries per head, expected as many: a key and its value share their bytes. Leave out bits.",
        )


def _gather(tensor: Tensor, kept: Tensor) -> Tensor:
    """Slots ``kept`` (batch, heads, kept) of ``tensor`` (planes, batch, heads, slots, entries)."""
    planes, batch, heads, slots, entries = tensor.shape
    first = torch.arange(planes * batch * heads, device=kept.device).view(planes, batch, heads, 1) * slots
    rows = (first + kept).flatten()  # (planes * batch * heads * kept,)
    return tensor.reshape(-1, entries).index_select(0, rows).view(planes, batch, heads, kept.shape[2], entries)
