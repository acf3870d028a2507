"""Claims about parts as values."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

from partwise.models import Part, count_holders, coupled_axes
from partwise.models.axes import names_in_part, sliced_entries
from tiny import tiny_mlp, tiny_resnet


def test_a_part_travels_as_json_and_as_a_pickle_of_a_trusted_cluster():
    part = Part({"0": (1, 4), "2": (0,)}, index=3)
    fields = json.loads(json.dumps({"units": part.units, "index": part.index}))
    assert Part({name: tuple(units) for name, units in fields["units"].items()}, index=fields["index"]) == part
    assert pickle.loads(pickle.dumps(part)) == part  # noqa: S301 - as Ray does it


def test_holders_are_counted_per_unit_and_an_axis_that_is_not_named_is_held_whole():
    [axis] = coupled_axes(tiny_mlp(3, 4, 2))
    assert count_holders(axis, [Part({"0": (0, 1)}), Part({"0": (1, 3)}), Part({})]) == (2, 3, 1, 2)
    assert count_holders(axis, []) == (0, 0, 0, 0)


def test_a_unit_of_several_entries_takes_them_all():
    axes = coupled_axes(tiny_resnet())
    entries = sliced_entries(axes, Part({"layer1.0.conv1": (1, 3), "layer3": (0,)}))
    assert {name: {dim: kept.tolist() for dim, kept in dims.items()} for name, dims in entries.items()} == {
        "layer1.0.conv1.weight": {0: [1, 3]},
        **{f"layer1.0.bn1.{tensor}": {0: [1, 3]} for tensor in ("weight", "bias", "running_mean", "running_var")},
        "layer1.0.conv2.weight": {1: [1, 3]},
    }


def test_blocks_that_stay_move_up_and_those_that_go_have_no_name():
    axes = coupled_axes(tiny_resnet(), kinds=["blocks"])
    names = ["conv1.weight", "layer3.0.conv1.weight", "layer3.1.conv1.weight", "layer3.2.conv1.weight", "layer3.3.conv1.weight"]
    assert names_in_part(axes, Part({"layer3": (2,)}), names) == {
        "conv1.weight": "conv1.weight",
        "layer3.0.conv1.weight": "layer3.0.conv1.weight",
        "layer3.3.conv1.weight": "layer3.1.conv1.weight",
    }


def test_names_of_parts_and_samplers_load_no_torch():
    program = "import sys; from partwise.models import Part, FixedFractionSampler, extract; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
