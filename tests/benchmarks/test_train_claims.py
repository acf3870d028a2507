"""The claims on training images by parts at small size: what needs neither hours nor many seeds is held here on every run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import images
import train_ist_accuracy
import train_resnets
import train_traffic
from partwise.models import tensors_of
from partwise.train import IST, LocalSGD, LoFT, OptimizerSettings
from partwise.train._metrics import accuracy


def clusters(*, shape: tuple[int, ...] = (16,), num_train: int = 600, num_valid: int = 100) -> images.Images:
    """Ten clusters, so that a test needs no data set."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, *shape, generator=generator)
    classes = torch.randint(10, (num_train + 2 * num_valid,), generator=generator)
    inputs = centres[classes] + 0.7 * torch.randn(len(classes), *shape, generator=generator)
    cuts = (slice(num_train), slice(num_train, num_train + num_valid), slice(num_train + num_valid, None))
    return images.Images("clusters", *(TensorDataset(inputs[cut], classes[cut]) for cut in cuts))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows of programs that run here, which go to no file."""
    rows: list[Any] = []
    for program in (train_ist_accuracy, train_resnets, train_traffic):
        monkeypatch.setattr(program, "append", lambda _, row: rows.append(row))
    return rows


@pytest.mark.slow
def test_ist_reaches_the_accuracy_of_local_sgd_on_mnist() -> None:
    try:
        digits = images.mnist(num_train=4000, num_valid=1000)
    except FileNotFoundError as error:
        pytest.skip(f"needs MNIST: {error}")
    entries = train_ist_accuracy.entries(6, growth=2)

    def score(name: str) -> float:
        model = images.perceptron(digits, hidden=(64, 64), seed=0)
        return accuracy(train_ist_accuracy.train(model, entries[name], digits, lr=0.1, seed=0).model, images.batches(digits.test))

    theirs = score("local SGD")
    assert theirs > 0.9
    assert score("IST") > 0.8
    assert score("IST, equal multiplications") > theirs - 0.05


@pytest.mark.slow
def test_every_method_is_measured_with_its_bytes(written: list[Any]) -> None:
    train_ist_accuracy.compare(clusters(), seeds=(0,), rates=(0.1,), num_rounds=2)
    bytes_rows = [row for row in written if row.unit.startswith("bytes")]
    assert [row.held for row in bytes_rows] == [True] * 3
    assert len(written) == len(bytes_rows) + 2 * 3


def test_a_subnetwork_needs_the_share_of_multiplications_that_its_weights_are() -> None:
    growth = train_ist_accuracy.multiplications(IST(num_parts=4), images.perceptron(clusters(), hidden=(8, 8), seed=0))
    assert growth == pytest.approx((16 * 8 + 8 * 8 + 8 * 10) / (16 * 2 + 2 * 2 + 2 * 10))


def test_ist_saves_bytes_at_equal_samples_and_none_at_equal_multiplications(written: list[Any]) -> None:
    train_ist_accuracy.report_totals(clusters())
    few, equal = (row.values[0] / row.baseline_values[0] for row in written)
    assert few < 1 / 4
    assert equal == pytest.approx(1, rel=0.25)


@pytest.mark.slow
def test_a_worker_of_ist_needs_a_quarter_of_the_memory_of_one_of_local_sgd() -> None:
    ours, formula = train_ist_accuracy.memory_apart("ist", 2048)
    theirs, whole = train_ist_accuracy.memory_apart("local-sgd", 2048)
    assert ours <= theirs / 4
    assert formula < ours
    assert whole < theirs < 3 * whole


@pytest.mark.slow
def test_resnets_and_tickets_are_measured_with_the_same_fine_tuning(written: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_resnets, "BLOCKS", (1, 5, 1))
    monkeypatch.setattr(train_resnets, "KEPT", (0.5,))
    train_resnets.compare(clusters(shape=(3, 16, 16), num_train=160), seeds=(0,), rates=(0.1,), num_rounds=1, tune_steps=4)
    assert [row.claim.startswith("A ticket") for row in written] == [False] * 2 * 3 + [True] * 3
    assert "sends 0." in written[0].note


def test_tickets_keep_the_largest_filters_and_as_many_random_ones() -> None:
    model = images.residual_network(clusters(shape=(3, 16, 16)), seed=0, blocks=train_resnets.BLOCKS)
    name = LoFT().find_axes(model)[0].name
    with torch.no_grad():
        model.get_submodule(name).weight[5] *= 100
    [ours, theirs] = (tensors_of(make(model))[f"{name}.weight"] for make in (
        lambda whole: train_resnets.largest(whole, keep=0.3), lambda whole: train_resnets.drawn(whole, keep=0.3, seed=0)
    ))  # fmt: skip
    assert ours.shape == theirs.shape
    assert len(ours) == round(0.3 * 32)
    assert any(torch.equal(row, model.get_submodule(name).weight[5]) for row in ours)


def blobs() -> train_traffic.Task:
    data = clusters(num_train=4000)
    settings = OptimizerSettings(optimizer="sgd", schedule="constant")
    [valid] = images.batches(data.valid)
    make = lambda seed: images.perceptron(data, hidden=(64, 64), seed=seed)  # noqa: E731
    return train_traffic.Task("MNIST", "clusters", make, data.train, valid, 8, settings, (0.01,), 6)


def test_ist_sends_fewer_bytes_than_the_others_until_a_loss(written: list[Any]) -> None:
    train_traffic.measure(blobs(), seeds=(0,))
    assert [row.baseline.partition("(")[0].partition(",")[0] for row in written] == ["DDP", "LocalSGD", "DiLoCo"]
    assert all(np.isfinite(row.values).all() for row in written)
    assert written[0].held


def test_a_course_stops_where_the_level_is_reached_and_counts_the_bytes_until_then() -> None:
    task = blobs()
    whole = train_traffic.course(task, LocalSGD(num_parts=2, num_local_steps=3), lr=0.05, seed=0, num_rounds=6)
    level = whole.losses[2]
    short = train_traffic.course(task, LocalSGD(num_parts=2, num_local_steps=3), lr=0.05, seed=0, num_rounds=6, level=level)
    assert len(short.losses) == whole.rounds_to(level)
    assert short.num_bytes == whole.num_bytes[: len(short.losses)]
    assert replace(whole, losses=[2.0, 1.0]).rounds_to(0.5) is None


def test_programs_say_where_the_data_should_be(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    monkeypatch.setenv("PARTWISE_DATA", str(tmp_path))
    for program in (train_resnets, train_traffic):
        program.main()
    assert capsys.readouterr().out.count("Set PARTWISE_DATA to the folder that has them") == 2
