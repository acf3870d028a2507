"""Persistence of importance: planted heads, chance, a twin of loops; and the shares of a budget that follow from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_models import decoder, shared_decoder, words
from partwise.checks import InputError
from partwise.serve.persistence import allocate_budgets, persistence_ratio
from tolerances import assert_close


def slow_persistence(attention: torch.Tensor, place: int) -> tuple[float, float]:
    """Ratio and share of one head from its whole matrix (tokens, tokens)."""
    tokens = len(attention)
    pivotal = [{key for key in range(query + 1) if attention[query, key] > (1 + 1e-5) / (query + 1)} for query in range(tokens)]
    early = set().union(*pivotal[:place])
    late = {key for key in set().union(*pivotal[place:]) if key < place}
    return (len(early & late) / len(late) if late else 1.0), len(early) / place


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("split", [0.25, 0.5])
def test_persistence_is_that_of_a_twin_of_loops(family, split):
    model, ids = decoder(family, kernel="eager"), words(2, 40)
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True).attentions
    found = persistence_ratio(model, ids, split=split)
    for layer, attention in enumerate(attentions):
        for head in range(attention.shape[1]):
            slow = [slow_persistence(attention[row, head], round(40 * split)) for row in range(2)]
            assert_close(found.ratio[layer, head], torch.tensor(sum(ratio for ratio, _ in slow) / 2), claim="ratio of a head")
            assert_close(found.pivotal_share[layer, head], torch.tensor(sum(share for _, share in slow) / 2), claim="share of a head")


def test_a_model_in_training_is_measured_without_dropout_and_trains_on():
    model, ids = decoder("opt"), words(2, 40)
    quiet = persistence_ratio(model, ids)
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    model.train()
    model.lm_head.eval()
    found = persistence_ratio(model, ids)
    assert torch.equal(found.ratio, quiet.ratio)
    assert model.training
    assert not model.lm_head.training


def test_what_is_no_model_and_what_is_no_tensor_is_refused():
    with pytest.raises(InputError, match=r"got str, which cannot have a cache with a budget: it is no model of transformers"):
        persistence_ratio("my/llama", words(1, 30))
    with pytest.raises(InputError, match=r"got input_ids of shape \(\) and split=0\.5"):
        persistence_ratio(shared_decoder("llama"), ["a text"])


def test_ratio_share_and_lift_have_a_row_for_each_layer_with_a_budget():
    model = shared_decoder("gemma3")
    found = persistence_ratio(model, words(1, 30))
    assert found.ratio.shape == found.pivotal_share.shape == found.lift.shape == (2, 4)
    expected = (found.ratio - found.pivotal_share) / (1 - found.pivotal_share)
    assert_close(found.lift[found.pivotal_share < 1], expected[found.pivotal_share < 1], claim="lift")
    assert bool((found.lift[found.pivotal_share == 1] == 0).all())


def planted_model(tokens: int, planted: list[int]):
    """A model of one head whose logits are 30 for planted words and 0 for others: word n is planted where it is in the list."""
    model = decoder("gpt-neox", num_attention_heads=1, num_hidden_layers=1, hidden_size=64, rotary_pct=0.01, vocab_size=tokens)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.zero_()
        embedding[:, 0], embedding[:, 1] = 1.0, -1.0
        embedding[planted, 2], embedding[planted, 3] = 1.0, -1.0
        attention = model.gpt_neox.layers[0].attention.query_key_value
        attention.weight.zero_(), attention.bias.zero_()
        attention.bias[40], attention.weight[64 + 40, 2] = 40.0, 6.0  # query and key of the last dimensions, which are not rotated
    return model


def test_a_planted_head_has_ratio_one_and_the_share_that_was_planted():
    planted = list(range(0, 100, 10))
    model = planted_model(200, planted)
    found = persistence_ratio(model, torch.arange(200)[None])
    assert float(found.ratio) == 1.0
    assert float(found.pivotal_share) == pytest.approx(0.1)
    assert float(found.lift) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("shape", "split"), [((1, 3), 0.5), ((30,), 0.5), ((1, 30), 0.0), ((1, 30), 1.0), ((1, 30), float("nan"))], ids=lambda value: repr(value)
)
def test_texts_that_are_too_short_and_splits_outside_are_refused(shape, split):
    with pytest.raises(
        InputError, match=r"got input_ids of shape .* expected \(rows, at least 4 tokens\) and a share between 0 and 1\. Tokenize a longer text"
    ):
        persistence_ratio(shared_decoder("llama"), words(*shape), split=split)


@given(
    ratios=st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=12),
    minimum=st.integers(1, 50),
    more=st.integers(0, 300),
)
def test_budgets_have_the_sum_the_minimum_and_the_order_of_need(ratios, minimum, more):
    budgets = allocate_budgets(ratios, average=minimum + more, minimum=minimum)
    assert sum(budgets) == len(ratios) * (minimum + more)
    assert min(budgets) >= minimum
    for one, first in enumerate(ratios):
        for other, second in enumerate(ratios):
            if first < second:
                assert budgets[one] >= budgets[other] - (1 if second - first < 1e-9 else 0)
    if len(set(ratios)) == 1:
        assert max(budgets) == min(budgets) == minimum + more


def test_budgets_follow_the_ratio_and_make_a_cache():
    assert allocate_budgets(torch.tensor([0.9, 0.9, 0.7]), average=100, minimum=50) == [80, 80, 140]
    assert allocate_budgets([1.0, 1.0, 1.0], average=10, minimum=4) == [10, 10, 10]
    assert allocate_budgets([0.0, 1.0], average=10, minimum=4) == [16, 4]
    assert allocate_budgets([0.5, 0.5, 0.5], average=7, minimum=7) == [7, 7, 7]


BAD = [
    ({"ratio": [], "average": 9, "minimum": 3}, r"got ratios \[\], expected one between 0 and 1 for each layer"),
    ({"ratio": [0.5, 1.5], "average": 9, "minimum": 3}, r"got ratios \[0\.5, 1\.5\], expected .* Pass persistence_ratio"),
    ({"ratio": [0.5, float("nan")], "average": 9, "minimum": 3}, r"got ratios \[0\.5, nan\]"),
    ({"ratio": [0.5], "average": 9, "minimum": 0}, r"minimum=0"),
    ({"ratio": [0.5], "average": 9, "minimum": 10}, r"average=9"),
]


@pytest.mark.parametrize(("settings", "text"), BAD, ids=[text for _, text in BAD])
def test_shares_that_cannot_be_are_refused(settings, text):
    ratio = settings.pop("ratio")
    with pytest.raises(InputError, match=text):
        allocate_budgets(ratio, **settings)
