from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from partwise import checkpoint
from partwise.atomic_files import read_json
from partwise.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from partwise.checks import InputError, RunError
from tolerances import assert_close

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
]


def raw_bytes(tensor: Tensor) -> bytes:
    dense = tensor.flatten().clone(memory_format=torch.contiguous_format)  # (numel,)
    return bytes(dense.view(torch.uint8).tolist()) if tensor.numel() else b""


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    numel = int(torch.tensor(shape).prod()) if shape else 1
    content = draw(st.binary(min_size=numel * dtype.itemsize, max_size=numel * dtype.itemsize))
    if dtype == torch.bool:
        content = bytes(byte % 2 for byte in content)
    flat = torch.tensor(list(content), dtype=torch.uint8).view(dtype) if content else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    views = [tensor, tensor.transpose(0, -1) if tensor.ndim > 1 else tensor, tensor[::2] if tensor.ndim else tensor]
    return draw(st.sampled_from(views))


json_leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
json_values = st.recursive(
    json_leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6
)
names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@settings(max_examples=40, deadline=None)
@given(values=st.dictionaries(names, tensors(), max_size=4), state=st.dictionaries(st.text(max_size=4), json_values, max_size=3))
def test_tensors_and_state_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Tensor], state: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("round-trip")
    loaded, loaded_state = load_checkpoint(save_checkpoint(folder, step=7, tensors=values, state=state))
    assert loaded.keys() == values.keys()
    for name, tensor in values.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(loaded[name]) == raw_bytes(tensor), "NaN payloads and negative zeros included"
    assert json.dumps(loaded_state, sort_keys=True) == json.dumps(state, sort_keys=True)


def test_tensors_that_share_storage_come_back_equal_and_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    values = {
        "whole": base,
        "again": base,
        "row": base[1],
        "column": base[:, 2],
        "parameter": torch.nn.Parameter(base),
        "broadcast": base[:1].expand(5, 4),
    }
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, step=1, tensors=values, state={}))
    for name, tensor in values.items():
        assert_close(loaded[name], tensor.detach(), claim=name, rtol=0, atol=0)
    loaded["whole"].zero_()
    assert_close(loaded["again"], base, claim="a loaded tensor is writable and owns its memory", rtol=0, atol=0)


def test_saving_leaves_the_tensors_untouched(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    before = tensor.clone()
    save_checkpoint(tmp_path, step=1, tensors={"tensor": tensor}, state={})
    assert tensor.stride() == (1, 3)
    assert_close(tensor, before, claim="saving copies", rtol=0, atol=0)


def test_the_generator_state_of_torch_survives(tmp_path: Path) -> None:
    torch.manual_seed(3)
    path = save_checkpoint(tmp_path, step=1, tensors={"rng": torch.get_rng_state()}, state={})
    expected = torch.rand(3)
    torch.set_rng_state(load_checkpoint(path)[0]["rng"])
    assert_close(torch.rand(3), expected, claim="same generator state, same numbers", rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("__metadata__", torch.ones(1)), ("wide", torch.ones(1, dtype=torch.complex128)), ("sparse", torch.eye(2).to_sparse())],
    ids=["reserved name", "complex128", "sparse"],
)
def test_a_tensor_that_safetensors_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path, name: str, tensor: Tensor) -> None:
    with pytest.raises(InputError, match=rf"tensor '{name}' .* cannot be saved: safetensors holds dense tensors .* Rename or convert") as caught:
        save_checkpoint(tmp_path, step=1, tensors={name: tensor}, state={})
    assert caught.value.code == "tensor-not-storable"
    assert list(tmp_path.iterdir()) == []


def test_the_newest_two_checkpoints_stay(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000, 99_999_999):
        save_checkpoint(tmp_path, step=step, tensors={}, state={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100000000", "step-99999999"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100000000", "ordered by number, not by text"


def test_keeping_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"keep=0 must be an integer of at least 1\. Pass keep=1") as caught:
        save_checkpoint(tmp_path, step=1, tensors={}, state={}, keep=0)
    assert caught.value.code == "below-minimum"


def test_without_checkpoints_there_is_no_latest_one(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, step=1, tensors={}, state={"try": 1})
    path = save_checkpoint(tmp_path, step=1, tensors={}, state={"try": 2})
    assert load_checkpoint(path)[1] == {"try": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_killed_writers_are_never_read_and_are_cleared(tmp_path: Path) -> None:
    whole = save_checkpoint(tmp_path, step=3, tensors={}, state={})
    (tmp_path / ".tmp-step-00000004-1-ab").mkdir()
    (tmp_path / ".tmp-step-00000004-1-ab" / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-run.json-1-ab").write_bytes(b"{")
    save_checkpoint(tmp_path, step=2, tensors={}, state={}).rename(tmp_path / ".old-step-00000003")
    assert latest_checkpoint(tmp_path) == whole
    assert list(tmp_path.iterdir()) == [whole]


def test_a_checkpoint_that_stepped_aside_for_one_that_never_came_is_put_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=3, tensors={}, state={"here": True})
    path.rename(tmp_path / ".old-step-00000003")
    assert latest_checkpoint(tmp_path) == path
    assert load_checkpoint(path)[1] == {"here": True}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["tensors.safetensors", "state.json"]))
def test_a_checkpoint_with_a_changed_byte_is_the_same_or_refused(tmp_path: Path, data: st.DataObject, name: str) -> None:
    path = save_checkpoint(tmp_path, step=3, tensors={"a": torch.arange(3.0)}, state={"loss": 0.123456789, "note": "text"})
    content = bytearray((path / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (path / name).write_bytes(bytes(content))
    try:
        loaded, state = load_checkpoint(path)
    except RunError as error:
        assert str(path) in str(error)
        return
    assert state == {"loss": 0.123456789, "note": "text"}
    assert_close(loaded["a"], torch.arange(3.0), claim="accepted, so unchanged", rtol=0, atol=0)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_a_damaged_file_is_named_together_with_the_checkpoint_before_it(tmp_path: Path, name: str, damage: str) -> None:
    save_checkpoint(tmp_path, step=1, tensors={"a": torch.ones(50)}, state={})
    path = save_checkpoint(tmp_path, step=2, tensors={"a": torch.ones(50)}, state={})
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(b"" if damage == "empty" else (path / name).read_bytes()[:-9])
    with pytest.raises(
        RunError, match=rf"{re.escape(str(path / name))} is damaged: got .* Delete .*step-00000002 to go on from step-00000001\."
    ) as caught:
        load_checkpoint(path)
    assert caught.value.code == "checkpoint-damaged"


def test_a_lone_damaged_checkpoint_says_to_start_again(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=2, tensors={}, state={})
    (path / "state.json").write_text("[]")
    with pytest.raises(RunError, match=r"JSON without the keys format, step, sha256, state.* no earlier checkpoint: start the run again"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_format_names_both_formats(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=2, tensors={}, state={})
    (path / "state.json").write_text(json.dumps(read_json(path / "state.json") | {"format": 2}))
    with pytest.raises(RunError, match=r"state\.json has format 2, expected 1: another version of partwise") as caught:
        load_checkpoint(path)
    assert caught.value.code == "checkpoint-format"


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_intact(tmp_path: Path) -> None:
    before = save_checkpoint(tmp_path, step=1, tensors={"a": torch.ones(3)}, state={})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a real failure inside write(2), after 50 kB went to the disk
    try:
        with pytest.raises(RunError, match=r"step-00000002 cannot be written: got File too large .* saved before is intact") as caught:
            save_checkpoint(tmp_path, step=2, tensors={"a": torch.ones(100_000)}, state={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == "disk-full"
    assert list(tmp_path.iterdir()) == [before]
    load_checkpoint(before)


def test_a_file_system_that_is_really_full_is_survived(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        before = save_checkpoint(tmp_path, step=1, tensors={"a": torch.ones(3)}, state={})
        with pytest.raises(RunError, match="No space left on device") as caught:
            save_checkpoint(tmp_path, step=2, tensors={"a": torch.ones(100_000)}, state={})
        assert caught.value.code == "disk-full"
        assert list(tmp_path.iterdir()) == [before]
        load_checkpoint(before)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


KILL_A_WRITER_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from partwise.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
folder, random_delay = Path(sys.argv[1]), random.Random(0)
step, num_in_flight, num_kills = 0, 0, 0
while num_kills < 40 or num_in_flight < 10 or step < 10:
    num_kills += 1
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            step += 1
            for attempt in range(2):  # the second replaces the first
                values = {name: torch.full((2000,), float(step)) for name in "abc"}
                save_checkpoint(folder, step=step, tensors=values, state={"step": step})
            os.write(writer, step.to_bytes(4, "little"))
    os.close(writer)
    time.sleep(random_delay.uniform(0.0, 0.01 + 0.001 * num_kills))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reported = b""
    while piece := os.read(reader, 65536):
        reported += piece
    os.close(reader)
    promised = int.from_bytes(reported[-4:], "little") if reported else step
    num_in_flight += any(path.name.startswith(".") for path in folder.iterdir()) if folder.exists() else 0
    latest = latest_checkpoint(folder)
    if latest is None:
        assert promised == 0, "a checkpoint that was saved is gone"
        continue
    values, state = load_checkpoint(latest)
    step = state["step"]
    assert step >= promised, (step, promised)
    assert values.keys() == set("abc") and all(bool((value == step).all()) for value in values.values())
    names = [path.name for path in folder.iterdir()]
    assert all(name.startswith("step-") for name in names) and len(names) <= 3, names
"""


def test_a_writer_killed_at_any_moment_never_loses_a_saved_checkpoint_nor_leaves_half_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILL_A_WRITER_AGAIN_AND_AGAIN), str(tmp_path / "checkpoints")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_checkpoint_module_loads_without_torch() -> None:
    code = f"import sys; import {checkpoint.__name__}; print('torch' in sys.modules, 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split() == ["False", "False"]
