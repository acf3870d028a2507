"""The claims about tickets at small size: a character model of half a minute instead of a checkpoint."""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import train_ticket_speed as speed
import train_twist_tickets as claims
from partwise.train._text import TokenBlocks
from tiny import tiny_decoder

CONTEXT = 32
NO_MODEL = f"there is no {claims.MODEL}; set PARTWISE_MODELS to the folder that has the trained model"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CONTEXT": CONTEXT, "CALIBRATION_TOKENS": 2048, "TEST_TOKENS": 4096}.items():
        monkeypatch.setattr(claims, name, value)


def characters() -> claims.Text:
    """Source text as ASCII, in four stretches."""
    codes = np.frombuffer(Path(argparse.__file__).read_bytes(), dtype=np.uint8).clip(max=127).astype(np.int32)
    train, calibration, valid, test = np.split(codes, [int(share * len(codes)) for share in (0.8, 0.85, 0.9)])
    return claims.Text(*(TokenBlocks(part, CONTEXT) for part in (train, calibration, valid, test)))


def character_model() -> Any:
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


def experiment(**changes: Any) -> claims.Experiment:
    settings: dict[str, Any] = {"lr": 2e-3, "num_rounds": 24, "batch_size": 16}
    return claims.Experiment(**({"name": "tiny", "title": "characters", "text": characters, "start": lambda seed: trained()} | settings | changes))


@functools.cache
def trained() -> Any:
    """What a checkpoint is at full size."""
    return experiment(lr=5e-3, num_rounds=60).dense(character_model(), characters(), seed=5)


@functools.cache
def found() -> dict[str, Any]:
    return claims.measure(experiment(), characters(), seed=0)


@pytest.mark.slow
def test_the_whole_model_after_twist_is_nearly_as_good_as_after_dense_training() -> None:
    assert found()["twist"] <= 1.1 * found()["dense"]
    assert found()["dense"] < 1.1 * found()["start"]


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "ratio"), [("0.5", 0.9), ("0.25", 0.8)])
def test_tickets_are_better_than_dense_models_pruned_to_their_shape(keep: str, ratio: float) -> None:
    size = found()["sizes"][keep]
    assert size["ticket"] <= ratio * min(size["pruned"].values())


@pytest.mark.slow
def test_tickets_that_nobody_chose_are_worse_than_those_that_were_trained() -> None:
    size = found()["sizes"]["0.5"]
    assert size["ticket"] < 0.9 * statistics.mean(size["random"])


@pytest.mark.skipif(not claims.MODEL.exists(), reason=NO_MODEL)
def test_no_file_that_the_checkpoint_learned_from_is_tested_or_chosen_by() -> None:
    parts = claims.code_files()
    held_out = [path for part in ("calibration", "valid", "test") for path in parts[part]]
    names = {path.as_posix() for path in held_out}
    assert len(names) == len(held_out) == len(claims.read_json(claims.MODEL / "partwise_base.json")["held_out_files"])
    assert not names & {path.as_posix() for path in parts["train"]}
    assert all(parts[part] for part in parts)


@pytest.mark.parametrize("method", ["twist", "dense"])
def test_both_kinds_of_training_see_as_many_tokens_in_as_many_steps(method: str) -> None:
    tiny = experiment(num_rounds=2)
    ways: dict[str, Any] = {"twist": tiny.twist, "dense": claims.LocalSGD(num_parts=1, num_local_steps=claims.LOCAL_STEPS)}
    trainer = tiny.train(ways[method], character_model(), characters(), seed=0)
    assert sum(report.num_samples for report in trainer.history) * CONTEXT == tiny.num_tokens
    assert {part.num_steps for report in trainer.history for part in report.parts} == {claims.LOCAL_STEPS}


def test_tickets_are_smaller_on_disk_in_proportion_to_their_parameters() -> None:
    found = speed.tickets(tiny_decoder("Llama", hidden_size=128, intermediate_size=512, head_dim=16))
    sizes = [speed.bytes_on_disk(ticket) for ticket in found]
    assert [ticket.keep for ticket in found] == [1.0, *speed.SIZES]
    for ticket, size in zip(found, sizes, strict=True):
        assert 4 * ticket.num_parameters <= size <= 4 * ticket.num_parameters + 20_000  # the file begins with its names


def test_every_turn_times_every_model() -> None:
    found = speed.tickets(tiny_decoder("Llama", intermediate_size=32))
    turns = speed.speeds([ticket.model for ticket in found], batch_size=2, threads=1, repeats=3)
    assert [len(of_model) for of_model in turns] == [3] * len(found)
    assert all(value > 0 for of_model in turns for value in of_model)
