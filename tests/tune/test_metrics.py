from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from partwise.checks import RunError
from partwise.tune._batches import IGNORED, Encoded, encode
from partwise.tune._data import Examples, Task
from partwise.tune._metrics import evaluate, headline, score
from tiny import tiny_bert, tiny_bert_tokenizer, tiny_llama, tiny_llama_tokenizer
from tolerances import assert_close

TEXTS = ("the film is good", "the book was bad", "a very good book", "not good", "red green blue one two three four")


class Parrot(nn.Module):
    """Returns fixed logits for the token that each row begins with: row ``k`` of ``answers``."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.answers = nn.Parameter(answers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.answers[input_ids[:, 0]])


def rows(task: Task, targets: tuple[int, ...] | tuple[float, ...]) -> Encoded:
    """Row ``k`` begins with token ``k``; rows differ in length so that measuring reorders them."""
    return Encoded(task, tuple((row,) * (1 + (7 * row) % 4) for row in range(len(targets))), None, targets)


def close(actual: float, expected: float, claim: str, **override: float) -> None:
    assert_close(torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), claim=claim, **override)


# Known answers


def test_scores_of_classes_worked_out_by_hand():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    targets = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    predictions = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    found = score("classification", 2, predictions, targets)
    assert list(found) == ["accuracy", "matthews", "f1"]
    close(found["accuracy"], 0.7, "7 of 10")
    close(found["matthews"], (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6), "(TP TN - FP FN) over the root of the four sums")
    close(found["f1"], 2 * 3 / (2 * 3 + 1 + 2), "2 TP over 2 TP + FP + FN")


def test_f1_of_more_than_two_classes_is_the_mean_over_all_of_them_also_those_not_seen():
    found = score("classification", 4, [0, 1, 2, 2], [0, 1, 1, 2])
    close(found["f1"], (1 + 2 / 3 + 2 / 3 + 0) / 4, "classes 0, 1, 2, and 3 that never occurs")


def test_scores_of_numbers_worked_out_by_hand():
    found = score("regression", 1, [1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    assert list(found) == ["pearson", "spearman", "mse"]
    close(found["pearson"], 3 / math.sqrt(2 * 14 / 3), "covariance 3, sums of squares 2 and 14/3")
    close(found["spearman"], 1.0, "the order is right")
    close(found["mse"], 1 / 3, "one error of 1 in three rows")


def test_a_reversed_order_has_the_coefficient_minus_one():
    found = score("regression", 1, [3.0, 2.0, 1.0], [1.0, 2.0, 3.0])
    close(found["pearson"], -1.0, "a falling line")
    close(found["spearman"], -1.0, "a falling line")


def test_perplexity_of_even_odds_is_the_number_of_choices():
    found = score("causal-lm", 1, [3 * math.log(8), 5 * math.log(8)], [3, 5])
    assert list(found) == ["perplexity"]
    close(found["perplexity"], 8.0, "every token cost log 8")


def test_perplexity_weighs_rows_by_their_tokens():
    close(score("causal-lm", 1, [0.0, 9 * 2.0], [1, 9])["perplexity"], math.exp(1.8), "mean over 10 tokens, not over 2 rows")


def test_a_hopeless_perplexity_is_infinite_and_does_not_crash():
    assert score("causal-lm", 1, [1e6], [2])["perplexity"] == math.inf


@pytest.mark.parametrize(("predictions", "targets"), [([1, 1, 1], [0, 1, 1]), ([0, 1, 1], [1, 1, 1]), ([1, 1, 1], [1, 1, 1]), ([0, 0, 0], [1, 1, 1])])
def test_constant_classes_have_the_matthews_coefficient_zero(predictions, targets):
    found = score("classification", 2, predictions, targets)
    assert found["matthews"] == 0.0
    close(found["accuracy"], sum(p == t for p, t in zip(predictions, targets, strict=True)) / 3, "accuracy is defined all the same")


@pytest.mark.parametrize(("predictions", "targets"), [([0.5, 0.5, 0.5], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5]), ([2.0], [2.0])])
def test_constant_numbers_have_the_coefficients_zero(predictions, targets):
    found = score("regression", 1, predictions, targets)
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)
    assert math.isfinite(found["mse"])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20))
def test_every_list_of_classes_can_be_scored_within_bounds(pairs):
    found = score("classification", 4, [prediction for prediction, _ in pairs], [target for _, target in pairs])
    assert 0 <= found["accuracy"] <= 1
    assert -1 <= found["matthews"] <= 1
    assert 0 <= found["f1"] <= 1


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=20))
def test_every_list_of_numbers_can_be_scored_within_bounds(pairs):
    found = score("regression", 1, [prediction / 4 for prediction, _ in pairs], [target / 4 for _, target in pairs])
    assert -1 - 1e-9 <= found["pearson"] <= 1 + 1e-9
    assert -1 - 1e-9 <= found["spearman"] <= 1 + 1e-9
    assert found["mse"] >= 0


@pytest.mark.parametrize(
    ("task", "num_labels", "predictions", "targets"),
    [("classification", 2, [0, 1], [0, 1]), ("regression", 1, [0.0, 1.0], [0.0, 1.0]), ("causal-lm", 1, [1.0], [1])],
)
def test_the_headline_metric_comes_first(task, num_labels, predictions, targets):
    name, higher_is_better = headline(task)
    assert next(iter(score(task, num_labels, predictions, targets))) == name
    assert higher_is_better == (task != "causal-lm")


# Measuring a model


def test_predictions_meet_their_own_targets_however_rows_are_ordered_and_batched():
    targets = (2, 0, 1, 1, 0, 2, 2)
    model = Parrot(10 * torch.eye(3)[list(targets)])
    for batch_size in (1, 3, 7, 100):
        found = evaluate(model, rows("classification", targets), "classification", batch_size=batch_size, pad_token_id=0, num_labels=3)
        assert found["accuracy"] == 1.0
        close(found["loss"], math.log(1 + 2 * math.exp(-10)), "cross-entropy of a lead of 10", rtol=1e-5, atol=1e-7)


def test_a_model_of_numbers_is_measured_by_its_single_output():
    targets = (0.5, 1.5, 3.0, -1.0)
    model = Parrot(torch.tensor(targets).unsqueeze(1) + 1.0)
    found = evaluate(model, rows("regression", targets), "regression", batch_size=3, pad_token_id=0, num_labels=1)
    close(found["pearson"], 1.0, "a shift by 1 leaves the order and the line", atol=1e-6)
    close(found["mse"], 1.0, "every answer is 1 too high", atol=1e-6)
    close(found["loss"], found["mse"], "the loss is the squared error", atol=1e-6)


def perplexity_slowly(model: nn.Module, encoded: Encoded) -> tuple[float, float]:
    """One row at a time, one token at a time."""
    total, count = 0.0, 0
    for tokens, labels in zip(encoded.input_ids, encoded.targets, strict=True):
        for position in range(1, len(tokens)):
            if labels[position] != IGNORED:
                logits = model(input_ids=torch.tensor([tokens[:position]])).logits[0, -1]
                total -= float(logits.double().log_softmax(dim=0)[labels[position]])
                count += 1
    return math.exp(total / count), total / count


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_agrees_with_reading_one_token_at_a_time(batch_size):
    model = tiny_llama(seed=3)
    encoded = encode(Examples(("", "the film", "a very", "", "red"), TEXTS, None), tiny_llama_tokenizer(), task="causal-lm", max_length=9)
    with torch.no_grad():
        perplexity, loss = perplexity_slowly(model, encoded)
    found = evaluate(model, encoded, "causal-lm", batch_size=batch_size, pad_token_id=1, num_labels=1)
    close(found["perplexity"], perplexity, "same tokens; float32 logits of a padded batch", rtol=1e-5)
    close(found["loss"], loss, "same tokens; float32 logits of a padded batch", rtol=1e-5)


def test_the_loss_agrees_with_the_one_transformers_computes():
    model = tiny_bert(num_labels=3)
    encoded = encode(Examples(TEXTS, None, (0, 1, 2, 1, 0)), tiny_bert_tokenizer(), task="classification", max_length=16)
    with torch.no_grad():
        losses = [
            model(input_ids=torch.tensor([row]), labels=torch.tensor([target])).loss
            for row, target in zip(encoded.input_ids, encoded.targets, strict=True)
        ]
    found = evaluate(model, encoded, "classification", batch_size=2, pad_token_id=0, num_labels=3)
    close(found["loss"], float(torch.stack(losses).mean()), "float32 logits of a padded batch", rtol=1e-5)


def test_measuring_leaves_modes_random_state_and_gradients_as_they_were():
    model = tiny_bert(hidden_dropout_prob=0.5)
    model.train()
    model.bert.embeddings.eval()  # a part that a user has frozen
    modes = [module.training for module in model.modules()]
    encoded = encode(Examples(TEXTS, None, (0, 1, 0, 1, 0)), tiny_bert_tokenizer(), task="classification", max_length=16)
    before = torch.get_rng_state()
    first = evaluate(model, encoded, "classification", batch_size=2, pad_token_id=0, num_labels=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert evaluate(model, encoded, "classification", batch_size=2, pad_token_id=0, num_labels=2) == first


def test_modes_are_put_back_when_the_model_fails():
    model = Parrot(torch.zeros(1, 2)).train()
    with pytest.raises(IndexError):
        evaluate(model, rows("classification", (0, 1)), "classification", batch_size=2, pad_token_id=0, num_labels=2)
    assert model.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_model_is_reported(value):
    model = Parrot(torch.full((2, 1), value))
    with pytest.raises(RunError, match=r"NaN or infinite values on the held-out rows, expected finite ones\. Lower --lr") as caught:
        evaluate(model, rows("regression", (0.0, 1.0)), "regression", batch_size=2, pad_token_id=0, num_labels=1)
    assert caught.value.code == "diverged"
