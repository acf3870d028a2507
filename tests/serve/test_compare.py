"""What is measured of caches beside the full one, and how a comparison looks as a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from partwise.checks import InputError
from partwise.serve import compare as module
from partwise.serve.cache import BudgetedCache
from partwise.serve.compare import FULL, Compared, bytes_of, compare, measure
from partwise.serve.h2o import H2O
from partwise.serve.scissorhands import Scissorhands
from partwise.serve.sliding_window import SlidingWindow
from serve_models import random_ids, small_decoder
from tolerances import assert_close

RULES = {"scissorhands": Scissorhands(recent=2, drop=2), "sliding-window": SlidingWindow(), "h2o": H2O()}


@pytest.fixture
def model() -> Any:
    return small_decoder()


def attention_of(model: Any) -> str:
    return model.config._attn_implementation


def logits_one_by_one(model: Any, ids: torch.Tensor, cache: Any, *, num_prefill: int) -> torch.Tensor:
    """Predictions of tokens num_prefill + 1 and on, (rows, steps, vocabulary), as a student would get them."""
    with torch.no_grad():
        model(ids[:, :num_prefill], cache=cache)
        positions = range(num_prefill, ids.shape[1] - 1)
        return torch.cat([model(ids[:, position : position + 1], cache=cache).logits for position in positions], dim=1)


def test_a_cache_that_is_never_full_predicts_what_the_full_cache_predicts_to_the_bit(model: Any):
    ids = random_ids()
    caches = {name: BudgetedCache(model, rule, budget=60) for name, rule in RULES.items()} | {"another full one": DynamicCache()}
    found = measure(model, ids, caches, num_prefill=8)
    assert list(found) == [FULL, *caches]
    for measured in found.values():
        assert (measured.loss, measured.kl, measured.agreement, measured.evictions) == (found[FULL].loss, 0.0, 1.0, 0)
    assert found["another full one"].bytes == found[FULL].bytes
    assert found["another full one"].max_bytes is None


def test_the_loss_of_the_full_cache_is_that_of_one_pass_over_the_text(model: Any):
    ids = random_ids()
    with torch.no_grad():
        logits = model(ids).logits
    for first_scored in (None, 20):
        found = measure(model, ids, {}, num_prefill=8, first_scored=first_scored)[FULL]
        start = first_scored or 8
        expected = nn.functional.cross_entropy(logits[:, start:-1].flatten(0, 1), ids[:, start + 1 :].flatten())
        assert_close(torch.tensor(found.loss), expected, claim="teacher forcing, token by token")
        assert found.num_scored == 2 * (39 - start)
        assert found.perplexity == math.exp(found.loss)


def test_divergence_and_agreement_are_those_of_predictions_made_one_by_one(model: Any):
    ids = random_ids()
    full = logits_one_by_one(model, ids, DynamicCache(), num_prefill=8).log_softmax(-1)
    small = logits_one_by_one(model, ids, BudgetedCache(model, SlidingWindow(), budget=8), num_prefill=8).log_softmax(-1)
    found = measure(model, ids, {"small": BudgetedCache(model, SlidingWindow(), budget=8)}, num_prefill=8)["small"]
    expected = nn.functional.kl_div(small, full, log_target=True, reduction="none").sum(-1).mean()
    assert expected > 0.01
    assert_close(torch.tensor(found.kl), expected, claim="KL(full || small), mean over rows and tokens")
    assert_close(torch.tensor(found.agreement), (small.argmax(-1) == full.argmax(-1)).float().mean(), claim="the same likeliest token")
    assert found.agreement < 1


def test_the_curve_along_the_text_has_the_mean_of_all_steps_and_ends_with_the_last(model: Any):
    ids = random_ids(num_tokens=100)
    found = measure(model, ids, {"small": BudgetedCache(model, SlidingWindow(), budget=8)}, num_prefill=8)["small"]
    ends = [position for position, _ in found.kl_curve]
    assert ends == [*range(11, 99, 4), 98]
    lengths = [4] * 22 + [3]
    mean = sum(value * length for (_, value), length in zip(found.kl_curve, lengths, strict=True)) / sum(lengths)
    assert_close(torch.tensor(mean), torch.tensor(found.kl), claim="stretches of four steps, and what is left")


def test_bytes_are_the_most_that_was_held_and_stay_within_the_promise(model: Any):
    ids = random_ids(num_tokens=60)
    cache = BudgetedCache(model, RULES["scissorhands"], budget=16)
    found = measure(model, ids, {"small": cache}, num_prefill=16)
    small, full = found["small"], found[FULL]
    assert full.bytes == full.peak_bytes == 2 * 59 * 2 * 2 * 4 * 4 * 4  # rows, tokens, layers, keys and values, heads, dimensions, bytes
    assert small.bytes == bytes_of(cache)
    assert small.bytes <= small.peak_bytes <= small.max_bytes < full.bytes
    assert small.evictions > 0
    assert 0 < small.mass_kept <= 1


def test_caches_take_turns_and_the_first_turn_goes_round(model: Any, monkeypatch: pytest.MonkeyPatch):
    order: list[int] = []
    timed = module._timed

    def listening(model: Any, ids: Any, cache: Any) -> Any:
        order.append(id(cache))
        return timed(model, ids, cache)

    monkeypatch.setattr(module, "_timed", listening)
    caches = {FULL: DynamicCache(), "a": DynamicCache(), "b": DynamicCache()}
    measure(model, random_ids(num_tokens=8), caches, num_prefill=3)
    full, a, b = (id(cache) for cache in caches.values())
    assert order == [full, a, b, full, a, b, a, b, full, b, full, a, full, a, b]


def test_seconds_are_per_step_and_speed_counts_all_rows(model: Any, monkeypatch: pytest.MonkeyPatch):
    timed = module._timed
    monkeypatch.setattr(module, "_timed", lambda *arguments: (timed(*arguments)[0], 0.5))
    found = measure(model, random_ids(num_rows=3, num_tokens=12), {}, num_prefill=4)[FULL]
    assert (found.prefill_seconds, found.seconds, found.step_seconds, found.tokens_per_second) == (0.5, 3.5, 0.5, 6.0)


def test_the_model_is_left_as_it_was_even_after_a_failure(model: Any):
    model.train()
    before = attention_of(model)
    try:
        compare(model, random_ids(), {"sliding-window": SlidingWindow()}, budgets=[8])
        assert model.training
        assert attention_of(model) == before
        with pytest.raises(ZeroDivisionError):
            compare(model, random_ids(), {"sliding-window": SlidingWindow()}, budgets=[8], report=lambda *_: 1 / 0)
        assert model.training
        assert attention_of(model) == before
    finally:
        model.eval()


def test_every_method_is_measured_at_every_budget_beside_a_full_cache(model: Any):
    said: list[tuple[Any, ...]] = []
    found = compare(model, random_ids(), RULES, budgets=[12, 20], report=lambda *news: said.append(news))
    assert [(one.method, one.budget) for one in found] == [(name, budget) for budget in (12, 20) for name in RULES]
    assert found[0].setting == repr(RULES["scissorhands"])
    assert len({one.full.loss for one in found}) == 1
    assert (said[0], said[-1]) == (("budget 12", 2, 28, ""), ("budget 20", 28, 28, ""))
    one = found[0]
    assert one.perplexity_change == one.measured.perplexity / one.full.perplexity - 1
    assert one.ratio == one.full.bytes / one.measured.peak_bytes
    assert isinstance(one, Compared)


def test_settings_that_a_cache_refuses_are_refused_before_anything_is_measured(model: Any):
    said: list[Any] = []
    with pytest.raises(InputError, match=r"got a budget of 12 tokens, expected at least 17") as caught:
        compare(model, random_ids(), RULES | {"long": Scissorhands(recent=10, drop=6)}, budgets=[12, 30], report=lambda *news: said.append(news))
    assert caught.value.code == "cache-budget"
    assert said == []


@pytest.mark.parametrize(("num_prefill", "first_scored"), [(0, None), (39, None), (8, 7), (8, 39)])
def test_a_row_without_a_step_to_score_is_refused(model: Any, num_prefill: int, first_scored: int | None):
    with pytest.raises(InputError, match=r"for rows of 40 tokens, expected 1 <= num_prefill <= first_scored <= 38\. Pass longer rows\."):
        measure(model, random_ids(), {}, num_prefill=num_prefill, first_scored=first_scored)


def test_budgets_that_are_never_full_are_refused_with_a_length_that_would_do(model: Any):
    with pytest.raises(InputError, match=r"rows of 40 tokens for a smallest budget of 39, expected at least 41: .* Pass --tokens 78 or more"):
        compare(model, random_ids(), RULES, budgets=[39, 64])
