"""The claims about pruning at small size: random and planted models in the place of trained ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import images
import prune_calibration_cost
import prune_decode_speed
import prune_equality
import prune_ghost_quality
import prune_llama_quality
import prune_models
import prune_networks
import prune_recall
from partwise.models.networks import build
from partwise.prune import GHOST, Magnitude, Random, Taylor
from resumable import KeptValues
from tiny import WORDS, save_tiny, tiny_decoder, tiny_llama_tokenizer, tiny_mamba2

PROGRAMS = (prune_calibration_cost, prune_decode_speed, prune_equality, prune_ghost_quality, prune_llama_quality, prune_networks, prune_recall)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows of programs that run here, which go to no file."""
    rows: list[Any] = []
    for program in PROGRAMS:
        monkeypatch.setattr(program, "append", lambda _, row: rows.append(row))
    return rows


@pytest.fixture
def values(tmp_path: Path) -> KeptValues:
    return KeptValues("test", resume=False, folder=tmp_path / "values")


def ids(num_rows: int, num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 3 + len(WORDS), (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))


def planted(num_quiet: int = 4) -> Any:
    """A Mamba2 in which the first states hardly reach the output, though their weights are the largest of all."""
    model = tiny_mamba2()
    with torch.no_grad():
        for layer in model.backbone.layers:
            mixer = layer.mixer
            width, states = mixer.intermediate_size, mixer.ssm_state_size
            writes, reads = (slice(2 * width + place * states, 2 * width + place * states + num_quiet) for place in (0, 1))
            mixer.in_proj.weight[writes] *= 8
            mixer.in_proj.weight[reads] *= 8
            mixer.conv1d.weight[width + states : width + states + num_quiet] *= 1e-3  # what is read from them
            mixer.conv1d.bias[width + states : width + states + num_quiet] *= 1e-3
    return model


def bench(model: Any) -> prune_ghost_quality.Bench:
    draws = [ids(8, 12, seed) for seed in prune_ghost_quality.DRAWS]
    return prune_ghost_quality.Bench("planted", model, draws, ids(8, 16, 9), draws[::-1], ids(8, 16, 10))


# Values that are kept


def test_a_value_is_measured_once_and_comes_back_after_an_interruption(tmp_path: Path) -> None:
    first = KeptValues("test", resume=False, folder=tmp_path)
    assert first.of("a", lambda: [1.5, 2]) == [1.5, 2]
    assert first.of("a", lambda: pytest.fail("measured twice")) == [1.5, 2]
    with first.path.open("a") as file:
        file.write('{"name": "b", "val')  # cut off
    second = KeptValues("test", resume=True, folder=tmp_path)
    assert second.has("a")
    assert not second.has("b")
    assert second.of("b", lambda: 3) == 3
    assert second.of("a", lambda: pytest.fail("measured again")) == [1.5, 2]
    assert [json.loads(line)["name"] for line in second.path.read_text().splitlines()] == ["a", "b"]
    assert second.seconds > 0
    assert not KeptValues("test", resume=False, folder=tmp_path).has("a")


# Models and plans


@pytest.mark.parametrize("method", [GHOST(), GHOST(recalibrate=False, factor="observability"), Taylor(), Magnitude(), Random(seed=3)])
def test_plans_at_several_sizes_are_those_of_each_size(method: Any) -> None:
    import dataclasses

    model, data = tiny_mamba2(), ids(4, 10)
    for keep, plan in prune_models.plans_at(method, model, data, (0.75, 0.5, 0.25)):
        alone = dataclasses.replace(method, keep=keep).plan(model, data)
        assert plan.units == alone.units
        assert plan.method == alone.method


def test_draws_of_calibration_text_share_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_models, "texts", lambda name, use: [" ".join(WORDS[number % len(WORDS)] for number in range(400))])
    monkeypatch.setattr(prune_models, "_stretches", lambda tokenizer, text, number: [[row] * number for row in range(90)])
    draws = prune_models.draws_of("any", tiny_llama_tokenizer(), num_draws=3, num_rows=10, num_tokens=4)
    firsts = [set(draw[:, 0].tolist()) for draw in draws]
    assert [len(first) for first in firsts] == [10, 10, 10]
    assert len(set.union(*firsts)) == 30


def test_a_method_is_written_without_what_it_has_by_default() -> None:
    assert prune_models.written(GHOST(keep=0.5, recalibrate=False)) == "GHOST(keep=0.5, recalibrate=False)"


# GHOST


def test_ghost_finds_the_states_that_matter_and_magnitude_does_not(written: list[Any], values: KeptValues, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_ghost_quality, "REMOVED", (0.1, 0.5))
    prune_ghost_quality.quality(bench(planted()), values)
    found = {row.claim: row for row in written}
    claim = "Perplexity with 50% of the states removed: planted, GHOST"
    assert found[claim].held
    assert max(found[claim].values) / found[claim].baseline_values[0] < 1.001
    for rival in prune_ghost_quality.FORWARD_ONLY:
        asked = found[f"GHOST is ahead of {rival} with 50% of the states removed: planted"]
        assert asked.expected == "lower in every draw"
        assert asked.held is not None
        assert found[f"GHOST is ahead of {rival} with 10% of the states removed: planted"].held is None
    assert found["GHOST is ahead of Magnitude with 50% of the states removed: planted"].baseline_values[0] > 1.001 * found[claim].baseline_values[0]
    assert len(found["Perplexity with 50% of the states removed: planted, Random"].values) == len(prune_ghost_quality.SEEDS)
    assert len(found["Perplexity with 50% of the states removed: planted, Magnitude"].values) == 1
    assert "calibration" not in found["Perplexity with 50% of the states removed: planted, Magnitude"].note


def test_the_rankings_of_magnitude_and_ghost_disagree_on_the_planted_states(written: list[Any], values: KeptValues) -> None:
    prune_ghost_quality.rankings(bench(planted()), values)
    disagreement, correlation, _ = written
    assert min(disagreement.values) == 100
    assert max(correlation.values) < 0


def test_other_text_is_compared_draw_by_draw(written: list[Any], values: KeptValues) -> None:
    prune_ghost_quality.transfer(bench(planted()), values)
    assert [row.claim.rpartition("tested on its ")[2] for row in written] == ["own text", "other text"]
    assert all(len(row.values) == len(row.baseline_values) == len(prune_ghost_quality.DRAWS) for row in written)


def test_probes_of_recall_ask_for_what_was_told() -> None:
    assert prune_ghost_quality.repeated(torch.tensor([[1, 2, 3, 1, 2, 4, 1, 2, 4]])).tolist() == [[False, False, False, True, False, False, True, True]]
    words = torch.arange(10, 60)
    again, anew = prune_ghost_quality.copies(words, num_rows=3, length=5)
    assert torch.equal(again[:, :5], again[:, 5:])
    assert torch.equal(again[:, 5:], anew[:, 5:])
    assert not torch.equal(anew[:, :5], anew[:, 5:])
    tokenizer = tiny_llama_tokenizer([*WORDS, "="])
    told, untold = prune_ghost_quality.look_ups(tokenizer, words, num_rows=6, num_pairs=4)
    for row, other in zip(told.tolist(), untold.tolist(), strict=True):
        name, value = row[-3], row[-1]
        assert [row[place + 2] for place in range(len(row) - 3) if row[place] == name and row[place + 1] == row[-2]] == [value]
        assert value not in other[:-1]
        assert sum(first != second for first, second in zip(row, other, strict=True)) == 1


def test_texts_of_the_recall_task_ask_for_what_they_told() -> None:
    ids, labels = prune_recall.texts(5, seed=0)
    for row, answers in zip(ids.tolist(), labels.tolist(), strict=True):
        told = dict(zip(row[: 2 * prune_recall.PAIRS : 2], row[1 : 2 * prune_recall.PAIRS : 2], strict=True))
        asked = {row[place - 1]: answer for place, answer in enumerate(answers) if answer != -100}
        assert asked == told
        assert len(told) == prune_recall.PAIRS


def test_what_is_recalled_is_scored_for_every_method_and_size(
    written: list[Any], values: KeptValues, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(prune_recall, "TEST", 32)
    models = {seed: prune_recall.trained(seed, num_steps=2, folder=tmp_path) for seed in (0, 1)}
    prune_recall.run(models, values, removed=(0.5, 0.9))
    assert len(written) == 2 * len(prune_recall.ENTRIES)
    assert [row.claim for row in written if row.held is not None] == ["Values that are looked up with 50% of the states removed: GHOST"]
    assert all(len(row.values) == 2 for row in written)


def test_the_figure_is_drawn_from_the_rows(written: list[Any], values: KeptValues, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(prune_ghost_quality, "REMOVED", (0.1, 0.5))
    prune_ghost_quality.quality(bench(planted()), values)
    monkeypatch.setattr(prune_ghost_quality, "MODELS", {"planted": (tmp_path, "any")})
    monkeypatch.setattr(prune_ghost_quality, "read", lambda _: written)
    monkeypatch.setattr(prune_ghost_quality, "ROOT", tmp_path)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    prune_ghost_quality.figure()
    assert (tmp_path / "docs" / "images" / "prune_ghost.png").stat().st_size > 1000


# Equality


@pytest.mark.parametrize("family", list(prune_equality.FAMILIES))
def test_slicing_equals_masking_and_files_come_back_in_every_family(family: str) -> None:
    found = list(prune_equality.compare(family, prune_equality.FAMILIES[family], 0))
    assert {"Magnitude", "Random", "Taylor"} <= {each.method for each in found}
    assert max(each.from_mask for each in found) <= prune_equality.LIMIT
    assert min(each.from_whole for each in found) > 1e-3
    model, data = prune_equality.FAMILIES[family](0)
    uneven = [] if family in ("GPT-2", "ViT") else [prune_equality.uneven_choice(0)]
    for method in (Random(keep=0.5), *uneven):
        assert prune_equality.come_back(model, data, method) == (0.0, True)


def test_ghosts_squared_score_is_what_removing_the_state_changes() -> None:
    model, rows = prune_equality.FAMILIES["Mamba2"](0)
    assert max(prune_equality.errors_of_identity(model, rows, (0, 5, 20))) <= 1e-4


# Cost


def test_a_walk_holds_the_activations_of_one_layer_whatever_the_depth() -> None:
    held = [prune_calibration_cost.memory_of("ghost", "Mamba2", depth)[1] for depth in (1, 3)]
    tokens = prune_calibration_cost.NUM_ROWS * prune_calibration_cost.ROW_TOKENS
    assert held == [tokens * prune_calibration_cost.WIDTH * 4 / 1e6] * 2


def test_rows_of_memory_ask_for_what_walks_promise() -> None:
    held = prune_calibration_cost.NUM_ROWS * prune_calibration_cost.ROW_TOKENS * prune_calibration_cost.WIDTH * 4 / 1e6
    flat, between = prune_calibration_cost.memory_rows("Mamba2", "ghost", {2: [(10.0, held)], 8: [(11.0, held)]}, (0,), 1.0)
    assert (flat.held, between.held) == (True, True)
    [grown, more] = prune_calibration_cost.memory_rows("Mamba2", "ghost", {2: [(10.0, held)], 8: [(14.0, 2 * held)]}, (0,), 1.0)
    assert (grown.held, more.held) == (False, False)
    [taylor] = prune_calibration_cost.memory_rows("Mamba2", "taylor", {2: [(10.0, 0.0)], 8: [(40.0, 0.0)]}, (0,), 1.0)
    assert taylor.held is None


def test_exponents_are_fitted_for_every_turn(written: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_calibration_cost, "seconds_of", lambda name, model, rows: float(len(rows)) ** (2 if name == "taylor" else 1))
    monkeypatch.setattr(prune_calibration_cost, "MEASURED", {"Mamba2": ("ghost", "taylor")})
    prune_calibration_cost.times("tokens", sizes=(2, 4, 8), repeats=(0, 1))
    ghost, taylor = written
    assert ghost.values == pytest.approx((1, 1))
    assert ghost.held
    assert taylor.values == pytest.approx((2, 2))
    assert taylor.held is None


# Speed


@pytest.fixture
def quiet_caches() -> Iterator[None]:
    """transformers renames the argument that a cache is passed in."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated and will be removed", category=FutureWarning)
        yield


@pytest.mark.usefixtures("quiet_caches")
def test_half_of_the_states_is_half_of_the_bytes_and_half_of_the_heads_too(written: list[Any]) -> None:
    data = ids(2, 8)
    subjects = [
        prune_decode_speed.Subject.of("Mamba2", tiny_mamba2(), data, (prune_decode_speed.STATES,)),
        prune_decode_speed.Subject.of("Llama", tiny_decoder("Llama"), data, (prune_decode_speed.NEURONS, prune_decode_speed.HEADS)),
    ]
    for subject in subjects:
        prune_decode_speed.held_bytes(subject)
    assert [row.held for row in written] == [True, None, True]
    written.clear()
    for subject in subjects:
        prune_decode_speed.speed(subject, repeats=1, batches=(1,), num_tokens=2)
        whole = prune_decode_speed.moved_bytes(subject.whole, batch_size=8)
        assert all(prune_decode_speed.moved_bytes(small, batch_size=8) < whole for small in subject.small.values())
    assert len(written) == 3
    assert all(row.values[0] > 0 for row in written)


# Networks and the Llama


def clusters() -> images.Images:
    """Ten clusters, so that a test needs no data set."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 16, generator=generator)
    classes = torch.randint(10, (1600,), generator=generator)
    inputs = centres[classes] + 0.5 * torch.randn(1600, 16, generator=generator)
    return images.Images("clusters", *(TensorDataset(inputs[cut], classes[cut]) for cut in (slice(1200), slice(1200, 1400), slice(1400, None))))


def test_pruned_networks_are_measured_before_and_after_the_same_fine_tuning(
    written: list[Any], values: KeptValues, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(prune_networks, "ROOT", tmp_path)
    dense = prune_networks.dense
    monkeypatch.setattr(prune_networks, "dense", lambda task, seed: dense(task, seed, folder=tmp_path))
    config = {"network": "mlp", "hidden": [24, 16], "num_inputs": 16, "num_classes": 10, "norm": False}
    make = lambda seed: build(config, seed=seed)  # noqa: E731
    task = prune_networks.Task("clusters", clusters(), make, 150, 0.1)
    prune_networks.run(task, values, seeds=(0,), kept=(0.75, 0.5), tune_steps=20)
    found = {row.claim: row for row in written}
    whole = found["Test accuracy with 75% of the units, before fine-tuning: clusters, magnitude"].baseline_values[0]
    assert whole > 0.9
    names = prune_networks.available()
    for name in names:
        before, after = (found[f"Test accuracy with 50% of the units, {when} fine-tuning: clusters, {name}"] for when in ("before", "after"))
        assert after.values[0] >= before.values[0] - 0.05
        assert (before.held is not None) == (name in prune_networks.ASKED)
        assert after.held is None
    best = {name: found[f"Test accuracy with 75% of the units, before fine-tuning: clusters, {name}"].values[0] for name in names}
    assert max(best.values()) > 0.6
    first = dense(task, 0, folder=tmp_path)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first.parameters(), dense(task, 0, folder=tmp_path).parameters(), strict=True))
    assert isinstance(first, nn.Module)


def test_methods_on_a_llama_have_equal_sizes_and_low_rank_no_more(
    written: list[Any], values: KeptValues, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "llama", tiny_decoder("Llama"), tiny_llama_tokenizer())
    text = " ".join(WORDS[(number * number + 3) % len(WORDS)] for number in range(2000))
    monkeypatch.setattr(prune_models, "texts", lambda name, use: [text])
    monkeypatch.setattr(prune_llama_quality, "MODELS", {prune_llama_quality.TITLE: (folder, "any")})
    monkeypatch.setattr(prune_llama_quality, "PARTS", {"neurons": (("neurons",), (0.5,))})
    prune_llama_quality.run("neurons", values, calibration=(4, 16), test=(4, 24))
    found = {row.claim.rpartition(f"{prune_llama_quality.TITLE}, ")[2]: row for row in written}
    assert {"magnitude", "random", "taylor", "wanda"} <= set(found)
    assert {name for name, row in found.items() if row.held is not None} == set(prune_llama_quality.ASKED)
    assert len(found["magnitude"].values) == 1
    assert all(len(row.values) == 3 for name, row in found.items() if name != "magnitude")
    sizes = {name: int(row.note.partition("; ")[2].partition(" of ")[0].replace(",", "")) for name, row in found.items()}
    assert all(size <= sizes["magnitude"] if name.startswith("lord") else size == sizes["magnitude"] for name, size in sizes.items())
