"""Claims about dealing the units of a model's axes into parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_families import generators
from partwise.checks import InputError
from partwise.models import BernoulliSampler, CoupledAxis, DisjointSampler, FixedFractionSampler, Part, StratifiedSampler, count_holders, coupled_axes
from tiny import tiny_decoder, tiny_resnet

SAMPLERS: dict[str, Callable[[], Any]] = {
    "disjoint": DisjointSampler,
    "disjoint-with-minimum": lambda: DisjointSampler(minimum=3),
    "stratified": StratifiedSampler,
    "bernoulli": BernoulliSampler,
    "balanced": FixedFractionSampler,
    "unbalanced": lambda: FixedFractionSampler(balanced=False),
}
EVERY_SAMPLER = pytest.mark.parametrize("name", SAMPLERS)


def axis(size: int, *, name: str = "hidden", kind: str = "neurons") -> CoupledAxis:
    return CoupledAxis(name, kind, size, (), ())


@EVERY_SAMPLER
@given(sizes=st.lists(st.integers(4, 20), min_size=1, max_size=3), num_parts=st.integers(1, 4), seed=st.integers(0, 1000))
def test_a_part_holds_distinct_units_of_every_axis_in_rising_order(name: str, sizes: list[int], num_parts: int, seed: int):
    axes = [axis(size, name=str(index)) for index, size in enumerate(sizes)]
    parts = SAMPLERS[name]()(axes, generators(num_parts, seed=seed))
    assert [part.index for part in parts] == list(range(num_parts))
    for part in parts:
        assert part.units.keys() == {"0", *map(str, range(len(sizes)))}
        for index, size in enumerate(sizes):
            units = part.units[str(index)]
            assert units
            assert list(units) == sorted(set(units) & set(range(size)))
            assert all(type(unit) is int for unit in units), "a part is made of plain numbers, so that JSON takes it"


@EVERY_SAMPLER
def test_the_same_seed_and_round_give_the_same_parts_and_others_give_others(name: str):
    axes = [axis(40)]
    draws = [SAMPLERS[name]()(axes, generators(3, seed=seed, round_number=number)) for seed, number in ((0, 1), (0, 1), (1, 1), (0, 2))]
    assert draws[0] == draws[1]
    assert draws[0] not in draws[2:]


@EVERY_SAMPLER
def test_axes_are_dealt_apart(name: str):
    axes = [axis(40, name="first"), axis(40, name="second")]
    assert all(part.units["first"] != part.units["second"] for part in SAMPLERS[name]()(axes, generators(3)))


@EVERY_SAMPLER
def test_axes_that_are_not_passed_stay_whole(name: str):
    assert SAMPLERS[name]()([], generators(2)) == [Part({}, index=0), Part({}, index=1)]


@pytest.mark.parametrize("name", ["disjoint", "stratified"])
@given(size=st.integers(4, 30), num_parts=st.integers(1, 4))
def test_disjoint_samplers_put_every_unit_into_one_part(name: str, size: int, num_parts: int):
    assert count_holders(axis(size), SAMPLERS[name]()([axis(size)], generators(num_parts))) == (1,) * size


def test_blocks_of_a_section_reach_the_minimum_depth_and_none_is_missing():
    section = coupled_axes(tiny_resnet(depths=(1, 1, 6, 1)), kinds=["blocks"])[-1]
    parts = DisjointSampler(minimum=3)([section], generators(4))
    assert [len(part.units["layer3"]) for part in parts] == [3, 3, 3, 3]
    assert min(count_holders(section, parts)) >= 1


@given(keep=st.floats(0.15, 1.0), num_parts=st.integers(1, 6))
def test_a_balanced_fraction_leaves_no_unit_idle_that_another_holds_twice(keep: float, num_parts: int):
    parts = FixedFractionSampler(keep=keep)([axis(10)], generators(num_parts))
    counts = count_holders(axis(10), parts)
    assert max(counts) - min(counts) <= 1
    assert {len(part.units["hidden"]) for part in parts} == {int(keep * 10 + 0.5)}


def test_one_over_num_parts_balanced_is_a_disjoint_cover():
    assert count_holders(axis(16), FixedFractionSampler(keep=0.25)([axis(16)], generators(4))) == (1,) * 16


def test_workers_may_keep_different_fractions():
    parts = FixedFractionSampler(keep=(1.0, 0.5, 0.25))([axis(8)], generators(3))
    assert [len(part.units["hidden"]) for part in parts] == [8, 4, 2]


def test_blocks_stay_together_on_the_kinds_that_have_a_block_size():
    sampler = FixedFractionSampler(keep=0.5, block_size={"neurons": 6})
    parts = sampler(coupled_axes(tiny_decoder("Llama")), generators(3))
    for part in parts:
        neurons, heads = part.units["model.layers.0.mlp"], part.units["model.layers.0.self_attn"]
        assert len(neurons) == 12
        assert all(tuple(range(first, first + 6)) == neurons[start : start + 6] and first % 6 == 0 for start, first in ((0, neurons[0]), (6, neurons[6])))
        assert len(heads) == 2


@pytest.mark.parametrize(("keep", "lowest"), [(0.1, "0.125"), (0.12, "0.125")])
def test_a_fraction_that_leaves_a_layer_empty_is_refused_with_the_lowest_that_does_not(keep: float, lowest: str):
    text = rf"got keep={keep}, which leaves model\.layers\.0\.self_attn with none of its 4 heads\. Pass keep={lowest} or more\."
    axes = coupled_axes(tiny_decoder("Llama"))
    with pytest.raises(InputError, match=text):
        FixedFractionSampler(keep=keep)(axes, generators(2))
    FixedFractionSampler(keep=float(lowest))(axes, generators(2))


def test_a_probability_that_would_mostly_leave_a_layer_empty_is_refused():
    with pytest.raises(InputError, match=r"got keep=0\.2, which leaves hidden with none of its 4 neurons\. Pass keep=0\.25 or more\."):
        BernoulliSampler(keep=0.2)([axis(4)], generators(2))


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, float("nan")])
@pytest.mark.parametrize("sampler", [BernoulliSampler, FixedFractionSampler])
def test_a_fraction_outside_its_range_is_refused(sampler: Any, keep: float):
    with pytest.raises(InputError, match=r"got keep=.*, expected a fraction above 0 and at most 1\. Pass 0\.5 to keep half\."):
        sampler(keep=keep)


def test_fractions_are_one_or_as_many_as_parts():
    with pytest.raises(InputError, match=r"got 2 keep fractions for 3 parts, expected one each\. Pass 3, or one\."):
        FixedFractionSampler(keep=(0.5, 0.5))([axis(8)], generators(3))


@pytest.mark.parametrize(("num_parts", "nearest"), [(3, "2 or 4"), (5, "4")])
def test_parts_that_do_not_divide_the_head_groups_are_told_the_nearest_number_that_does(num_parts: int, nearest: str):
    heads = axis(8, name="model.layers.0.self_attn", kind="heads")
    text = (
        rf"got {num_parts} parts for the 8 heads of model\.layers\.0\.self_attn, expected a number that divides 8\. The nearest is {nearest}\."
    )
    with pytest.raises(InputError, match=text):
        DisjointSampler(require_equal=True)([heads], generators(num_parts))
    assert DisjointSampler()([heads], generators(num_parts)), "without require_equal sizes differ by one"


def test_a_block_size_that_does_not_divide_a_layer_is_told_the_nearest_that_does():
    text = r"got block_size=7 for the 24 neurons of model\.layers\.0\.mlp, expected a number that divides 24\. The nearest is 6 or 8\."
    with pytest.raises(InputError, match=text):
        FixedFractionSampler(block_size={"neurons": 7})(coupled_axes(tiny_decoder("Llama")), generators(2))


@pytest.mark.parametrize("sampler", [DisjointSampler(), StratifiedSampler()])
def test_more_parts_than_the_narrowest_axis_has_units_are_refused(sampler: Any):
    text = r"got 5 parts, but narrow has 4 neurons, so some parts would hold none\. Use 4 parts or fewer\."
    with pytest.raises(InputError, match=text):
        sampler([axis(8), axis(4, name="narrow")], generators(5))


def test_a_minimum_above_the_number_of_units_is_refused():
    with pytest.raises(InputError, match=r"got minimum=5, but hidden has 4 neurons\. Pass minimum=4 or less\."):
        DisjointSampler(minimum=5)([axis(4)], generators(2))


def test_a_sampler_is_rebuilt_by_its_repr():
    for build in SAMPLERS.values():
        names = {kind.__name__: kind for kind in (DisjointSampler, StratifiedSampler, BernoulliSampler, FixedFractionSampler)}
        sampler = build()
        arguments = repr(sampler).partition("(")[2].removesuffix(")")
        fields = {field: getattr(sampler, field) for field in vars(sampler)}
        assert names[type(sampler).__name__](**fields) == sampler
        assert all(f"{field}={value!r}" in arguments for field, value in fields.items())
