"""The claims about routing at small size: planted kinds of prompts and a random probe instead of trained models."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest

import serve_domain_router as claims
from partwise.serve import DomainRouter
from tiny import tiny_llama, tiny_llama_tokenizer

REVIEWS, NUMBERS = ("the", "a", "film", "book", "is", "good", "bad", "very"), ("one", "two", "three", "four", "five", "six", "red", "green")


def score(prompt: str, following: str) -> list[float]:
    """Bits per byte: the first model knows reviews, the second one numbers."""
    is_review = any(word in prompt for word in ("film", "book", "good", "bad", "very"))
    return [1.0, 3.0] if is_review else [3.0, 2.0]


def sample(seed: int) -> claims.Sample:
    draw = random.Random(99)
    texts = {name: [" ".join(draw.choices(words, k=4000))] for name, words in (("reviews", REVIEWS), ("numbers", NUMBERS))}
    return claims.draw(texts, score, number=40, length=60, seed=seed)


@pytest.fixture(scope="module")
def found() -> dict[str, list[float]]:
    router = partial(DomainRouter, tiny_llama(), tiny_llama_tokenizer(), models=claims.MODELS)
    ways = {way: choose for way, choose in claims.ways_to_choose(router).items() if way not in {claims.MEANING, "router, trace", "router, last"}}
    return claims.measure([(sample(0), sample(1)), (sample(2), sample(3))], ways)


def test_stretches_follow_their_prompts_and_have_the_asked_length() -> None:
    seen: list[tuple[str, str]] = []
    claims.draw({"a": ["0123456789" * 100]}, lambda prompt, following: seen.append((prompt, following)) or [1.0, 2.0], number=5, length=30, seed=0)
    assert all(len(prompt) == 30 and len(following) == claims.WRITTEN for prompt, following in seen)
    assert all((prompt + following) in "0123456789" * 100 for prompt, following in seen)


def test_the_router_gains_what_the_oracle_gains_on_planted_kinds(found: dict[str, list[float]]) -> None:
    assert claims.gains(found, claims.ORACLE) == [1.0, 1.0]
    assert claims.gains(found, claims.SINGLE) == [0.0, 0.0]
    for way in ("router, mean", "router, scores", "router, domains", claims.WORDS, claims.CHARACTERS):
        assert min(claims.gains(found, way)) > 0.9, way
    assert max(claims.gains(found, "a random model")) < 0.3


def test_with_shuffled_scores_the_router_keeps_to_the_best_single_model() -> None:
    router = partial(DomainRouter, tiny_llama(), tiny_llama_tokenizer(), models=claims.MODELS)
    row = claims.shuffled_row([(sample(0), sample(1)), (sample(2), sample(3))], router, "planted kinds")
    assert row.held
    assert row.values == row.baseline_values


def test_rows_say_what_was_asked_and_whether_it_held(found: dict[str, list[float]]) -> None:
    whole = found | {claims.MEANING: [9.0, 9.0]}
    rows = claims.rows_of("planted kinds", whole, 1.0, asked=True)
    against = {row.baseline: row for row in rows if row.claim.startswith("Bits per byte")}
    assert against[claims.SINGLE].held
    assert against[claims.MEANING].held
    assert against[claims.ORACLE].held is None
    assert all(row.held is None for row in claims.rows_of("planted kinds", whole, 1.0, asked=False))
    worse = whole | {"router, mean": [2.9, 2.9]}
    lost = {row.baseline: row.held for row in claims.rows_of("planted kinds", worse, 1.0, asked=True) if row.claim.startswith("Bits per byte")}
    assert (lost[claims.SINGLE], lost[claims.WORDS]) == (False, False)


def test_the_sample_knows_the_better_model_and_what_a_choice_costs() -> None:
    taken: Any = claims.Sample(["a", "b"], ["x", "y"], -np.array([[1.0, 3.0], [3.0, 2.0]]))
    assert taken.labels == list(claims.MODELS)
    assert taken.bits(claims.MODELS) == 1.5
    assert taken.bits([claims.MODELS[1]] * 2) == 2.5
