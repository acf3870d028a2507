"""Keys and values in 4 or 8 bits: each vector on its own, so that a token can leave without touching any other.

A vector is cut into groups of 64 or 32 entries. A group has a minimum and a scale in float16; the code of an entry is the number of steps above the minimum.
The two codes of a key and of the value beside it share a byte at 4 bits, so that unpacking reads and writes memory in one direction.

The scale that is stored is half of the group's range, not its step. For a range below 0.004 the step of 8 bits would be a subnormal float16 with a few
bits left, and for float16 data at both ends of their range it would be the range itself that overflows.

Packing what came out of `unpack` as float32 gives the same bytes again. For this a step is never smaller than the distance between two float16 numbers at the
minimum: a group whose minimum is more than some 70 times its range (4 bits; 4 times for 8 bits) has only that resolution.

References
----------
KIVI. arXiv:2402.02750, which has asymmetric groups too, for keys along the tokens; such groups would break when a member is evicted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from partwise.checks import InputError, check_choice

__all__ = ["Packed", "check_packable", "group_size", "pack", "pair_bytes", "unpack", "unpack_into"]

GROUP_SIZES = (64, 32)
SCALE_BYTES = 4  # of a group: float16 half range and float16 minimum
LARGEST = 65504.0  # of float16
RESOLUTION = 1.01 * 2.0**-10  # of float16, and a little, because the scale is rounded to float16 as well
SMALLEST_STEP = 2.0**-23  # twice the smallest float16, so that a scale has bits enough for its last code to be the last again


class Packed(NamedTuple):
    """Keys and values of some slots.

    Attributes
    ----------
    codes : Tensor
        (1, batch, heads, slots, dim) uint8 at 4 bits, the key's code in the low half of a byte; (2, batch, heads, slots, dim) at 8 bits.
    scales : Tensor
        (4, batch, heads, slots, groups) float16: half ranges of keys, of values, minima of keys, of values.
    """

    codes: Tensor
    scales: Tensor


def group_size(dim: int) -> int | None:
    """Entries that share a scale: 64 where that divides ``dim``, else 32, else None."""
    return next((size for size in GROUP_SIZES if dim % size == 0), None)


def check_packable(dim: int, bits: int) -> None:
    """Refuse widths and head dimensions that cannot be packed.

    Raises
    ------
    InputError
        ``unknown-choice`` for other ``bits`` than 4 and 8, ``head-dim-not-packable``.
    """
    check_choice(str(bits), ("4", "8"), name="bits")
    if dim < 1 or group_size(dim) is None:
        raise InputError(
            "head-dim-not-packable",
            f"got keys and values of {dim} entries per head, expected a multiple of 32, because 32 or 64 entries share a scale. Leave out bits.",
        )


def pair_bytes(dim: int, bits: int) -> int:
    """Bytes that a key and a value of ``dim`` entries take together when packed, scales and minima included."""
    check_packable(dim, bits)
    return 2 * (dim * bits // 8 + SCALE_BYTES * (dim // _group(dim)))


def pack(pairs: Tensor, bits: int) -> Packed:
    """Keys and values, stacked as (2, batch, heads, slots, dim) of any float type, to codes and scales.

    An entry comes back within half a step: 1/30 (4 bits) or 1/510 (8 bits) of the range of its group, or half a unit of float16 at the group's minimum if that
    is more. Entries beyond the range of float16, and infinities, come back at its ends; NaN makes its group NaN.
    """
    levels = 2**bits - 1
    grouped = _by_group(pairs.float(), _group(pairs.shape[-1]))  # (2, batch, heads, slots, groups, group)
    low, high = grouped.aminmax(dim=-1, keepdim=True)  # (2, batch, heads, slots, groups, 1)
    minimum = low.clamp_(-LARGEST, LARGEST).half().add_(0.0)  # adding turns -0 into 0, which is the same number in other bytes
    base = minimum.float()
    finest = base.abs().mul_(RESOLUTION).clamp_(min=SMALLEST_STEP).mul_(levels / 2)
    half_range = torch.maximum((high - base).mul_(0.5), finest).clamp_(max=LARGEST).half()
    codes = (grouped - base).div_(half_range.float().mul_(2 / levels)).round_().clamp_(0, levels).byte().flatten(-2)  # (2, batch, heads, slots, dim)
    if bits == 4:
        codes = codes[1:].bitwise_left_shift(4).bitwise_or_(codes[:1])  # (1, batch, heads, slots, dim)
    return Packed(codes, torch.cat([half_range, minimum]).squeeze(-1))


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The keys and values again, (2, batch, heads, slots, dim)."""
    out = torch.empty(2, *packed.codes.shape[1:], dtype=dtype, device=packed.codes.device)
    unpack_into(out, packed)
    return out


def unpack_into(out: Tensor, packed: Packed) -> None:
    """Unpack into ``out`` (2, batch, heads, slots, dim), which may be a part of a larger tensor; only the keys into (1, batch, heads, slots, dim)."""
    kinds, codes = len(out), packed.codes[: len(out)]
    levels = 15 if len(packed.codes) == 1 else 255
    if levels == 15:
        codes = torch.empty(kinds, *packed.codes.shape[1:], dtype=torch.uint8, device=packed.codes.device)
        torch.bitwise_and(packed.codes[0], 15, out=codes[0])
        if kinds == 2:
            torch.bitwise_right_shift(packed.codes[0], 4, out=codes[1])
    half_range, minimum = (
        packed.scales.view(2, 2, *packed.scales.shape[1:])[:, :kinds].float().unsqueeze(-1)
    )  # (kinds, batch, heads, slots, groups, 1) each
    group = out.shape[-1] // packed.scales.shape[-1]
    grouped = _by_group(codes.float(), group).mul_(half_range.mul_(2 / levels))  # (kinds, batch, heads, slots, groups, group)
    if out.dtype == torch.float16:  # a scale that was rounded upwards must not make an infinity
        out.copy_(grouped.add_(minimum).clamp_(-LARGEST, LARGEST).flatten(-2))
    else:
        torch.add(grouped, minimum, out=_by_group(out, group))


def _by_group(vectors: Tensor, group: int) -> Tensor:
    return vectors.view(*vectors.shape[:-1], -1, group)  # (..., groups, group)


def _group(dim: int) -> int:
    size = group_size(dim)
    assert size is not None, f"check_packable has let {dim} through"
    return size
