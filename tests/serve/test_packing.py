"""Claims about keys and values in 4 or 8 bits."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from partwise.checks import InputError
from partwise.serve._packing import Packed, check_packable, group_size, pack, pair_bytes, unpack
from tolerances import assert_close

BITS = pytest.mark.parametrize("bits", [4, 8])
LEVELS = {4: 15, 8: 255}
FLOAT16_UNIT = 2.0**-10


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def again(pairs: Tensor, bits: int) -> Tensor:
    return unpack(pack(pairs, bits), pairs.dtype)


def same(first: Packed, second: Packed) -> bool:
    return torch.equal(first.codes, second.codes) and torch.equal(first.scales.view(torch.int16), second.scales.view(torch.int16))


def half_steps(pairs: Tensor, bits: int) -> Tensor:
    """The largest error that an entry may have, from the range and the minimum of its group."""
    grouped = pairs.unflatten(-1, (-1, group_size(pairs.shape[-1])))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = torch.maximum((high - low) / LEVELS[bits], low.abs() * FLOAT16_UNIT)
    return (step * 0.52 + 2.0**-23).expand_as(grouped).flatten(-2)


def unpack_slowly(packed: Packed, *, dim: int, bits: int) -> Tensor:
    """A loop over groups, with the layout of a byte spelled out."""
    _, batch, heads, slots, groups = packed.scales.shape
    out = torch.zeros(2, batch, heads, slots, dim)
    for kind, row, head, slot, entry in torch.cartesian_prod(*(torch.arange(size) for size in out.shape)).tolist():
        group = entry // (dim // groups)
        byte = int(packed.codes[0 if bits == 4 else kind, row, head, slot, entry])
        code = byte if bits == 8 else (byte >> 4 if kind == 1 else byte & 15)
        half_range, minimum = (float(packed.scales[2 * which + kind, row, head, slot, group]) for which in (0, 1))
        out[kind, row, head, slot, entry] = minimum + code * 2 * half_range / LEVELS[bits]
    return out


@BITS
@pytest.mark.parametrize("dim", [32, 96, 128])
def test_unpacking_is_minimum_plus_code_times_step(bits: int, dim: int):
    packed = pack(normal(2, 2, 3, 2, dim), bits)
    assert packed.codes.shape == (1 if bits == 4 else 2, 2, 3, 2, dim)
    assert packed.scales.shape == (4, 2, 3, 2, dim // group_size(dim))
    assert_close(unpack(packed, torch.float32), unpack_slowly(packed, dim=dim, bits=bits), claim="the fast way is the slow way")


def test_four_bits_in_groups_of_32_cost_8_percent_of_a_normal_vector_and_eight_bits_half_a_percent():
    pairs = normal(2, 1, 4, 2000, 32)
    for bits, expected in ((4, 0.079), (8, 0.0047)):
        error = float((again(pairs, bits) - pairs).norm() / pairs.norm())
        assert error == pytest.approx(expected, rel=0.03)


@BITS
@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**31),
    spread=st.floats(-9, 5),
    offset=st.floats(-9, 5),
    dim=st.sampled_from([32, 64, 96]),
    negative=st.booleans(),
)
def test_packing_what_was_unpacked_gives_the_same_bytes_at_any_scale_and_offset(
    bits: int, seed: int, spread: float, offset: float, dim: int, negative: bool
):
    pairs = normal(2, 1, 2, 3, dim, seed=seed) * 10**spread + (-1 if negative else 1) * 10**offset
    packed = pack(pairs, bits)
    assert same(pack(unpack(packed, torch.float32), bits), packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_get_the_same_4_bit_codes_again_too(dtype: torch.dtype):
    packed = pack(normal(2, 2, 3, 200, 64).to(dtype), 4)
    restored = unpack(packed, dtype)
    assert restored.dtype == dtype
    assert torch.equal(pack(restored, 4).codes, packed.codes)


@BITS
@settings(max_examples=200)
@given(seed=st.integers(0, 2**31), spread=st.floats(-9, 3.5), offset=st.floats(-9, 3.5))
def test_an_entry_comes_back_within_half_a_step(bits: int, seed: int, spread: float, offset: float):
    pairs = normal(2, 1, 2, 3, 32, seed=seed) * 10**spread + 10**offset
    assert bool(((again(pairs, bits) - pairs).abs() <= half_steps(pairs, bits)).all())


@BITS
def test_the_smallest_and_the_largest_entry_get_the_first_and_the_last_code(bits: int):
    pairs = normal(2, 1, 1, 5, 32)
    codes = pack(pairs, bits).codes
    both = torch.stack([codes[0] & 15, codes[0] >> 4]) if bits == 4 else codes
    assert bool((both.gather(-1, pairs.argmin(-1, keepdim=True)) == 0).all())
    assert bool((both.gather(-1, pairs.argmax(-1, keepdim=True)) == LEVELS[bits]).all())


@BITS
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, 1e-7, 0.333251953125, 65504.0, -65504.0])
def test_constant_groups_come_back_exactly_when_float16_has_the_number(bits: int, value: float):
    pairs = torch.full((2, 1, 1, 2, 32), float(torch.tensor(value).half()))
    assert torch.equal(again(pairs, bits), pairs)


@BITS
def test_other_constants_come_back_as_float16_rounds_them(bits: int):
    pairs = torch.full((2, 1, 1, 1, 64), 0.1)
    assert torch.equal(again(pairs, bits), pairs.half().float())


@BITS
def test_double_precision_is_packed_as_single(bits: int):
    pairs = normal(2, 1, 1, 5, 64)
    assert torch.equal(again(pairs.double(), bits), again(pairs, bits).double())


@BITS
def test_groups_do_not_disturb_each_other(bits: int):
    quiet = normal(2, 1, 1, 4, 96)
    loud = quiet.clone()
    loud[..., 32:64] *= 1e4
    assert torch.equal(again(loud, bits)[..., :32], again(quiet, bits)[..., :32])
    assert torch.equal(again(loud, bits)[..., 64:], again(quiet, bits)[..., 64:])


@BITS
def test_vectors_and_keys_and_values_are_packed_each_on_its_own(bits: int):
    pairs = normal(2, 3, 2, 5, 32)
    whole = again(pairs, bits)
    for row in range(3):
        assert torch.equal(again(pairs[:, row : row + 1], bits), whole[:, row : row + 1])
    assert torch.equal(again(pairs[:, :, :, 2:3], bits), whole[:, :, :, 2:3])
    assert torch.equal(again(pairs.flip(0), bits), whole.flip(0))


@BITS
@pytest.mark.parametrize("extremes", [(-65504.0, 65504.0), (0.0, 65504.0), (-1.3, 65504.0), (-65504.0, -65000.0)])
def test_the_whole_range_of_float16_packs_without_an_infinity(bits: int, extremes: tuple[float, float]):
    pairs = torch.zeros(2, 1, 1, 1, 32, dtype=torch.float16)
    pairs[:] = torch.tensor(extremes, dtype=torch.float16).repeat(16)
    restored = again(pairs, bits)
    assert bool(restored.isfinite().all())
    assert_close(restored, pairs, claim="both ends of a group have a code", rtol=2e-3, atol=1.0)


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_beyond_float16_come_back_at_its_ends(bits: int, dtype: torch.dtype):
    pairs = torch.zeros(2, 1, 1, 1, 64, dtype=dtype)
    pairs[..., 0], pairs[..., 1], pairs[..., 2] = -1e30, 1e30, float("inf")
    restored = again(pairs, bits).float()
    assert bool(restored.isfinite().all())
    assert restored[0].flatten()[:3].tolist() == pytest.approx([-65504.0, 65504.0, 65504.0], rel=1e-2)
    assert same(pack(restored, bits), pack(pairs, bits)) or dtype == torch.bfloat16


@BITS
def test_a_nan_is_not_hidden_and_stays_in_its_group(bits: int):
    pairs = normal(2, 1, 1, 2, 96)
    pairs[0, 0, 0, 1, 40] = float("nan")
    lost = again(pairs, bits).isnan()
    assert bool(lost[0, 0, 0, 1, 32:64].all())
    assert int(lost.sum()) == 32


@pytest.mark.parametrize(("dim", "bits", "expected"), [(32, 4, 40), (64, 4, 72), (128, 4, 144), (96, 4, 120), (64, 8, 136), (32, 8, 72)])
def test_bytes_of_a_pair_are_those_that_are_stored(dim: int, bits: int, expected: int):
    packed = pack(normal(2, 1, 1, 1, dim), bits)
    assert pair_bytes(dim, bits) == expected == sum(part.numel() * part.element_size() for part in packed)


def test_groups_of_64_cost_four_and_a_half_bits_an_entry():
    assert pair_bytes(128, 4) * 8 / (2 * 128) == 4.5


@BITS
def test_the_input_is_left_alone(bits: int):
    pairs = normal(2, 1, 1, 3, 32)
    before = pairs.clone()
    pack(pairs, bits)
    assert torch.equal(pairs, before)


@pytest.mark.parametrize("dim", [0, 4, 16, 48, 80])
def test_head_dimensions_without_a_group_are_refused_with_advice(dim: int):
    with pytest.raises(InputError, match=rf"got keys and values of {dim} entries per head, expected a multiple of 32.*Leave out bits\.") as refused:
        check_packable(dim, 4)
    assert refused.value.code == "head-dim-not-packable"


@pytest.mark.parametrize("bits", [2, 16, 0, True])
def test_other_widths_are_refused(bits: int):
    with pytest.raises(InputError, match=r"bits='.*' is not known\. Choose one of: 4, 8\."):
        check_packable(64, bits)
