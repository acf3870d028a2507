from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partwise.checks import InputError
from partwise.tune._batches import IGNORED, Encoded, batch_at, check_batch_fits, encode, eval_batches
from partwise.tune._data import Examples
from tiny import tiny_bert_tokenizer, tiny_llama_tokenizer


def test_pairs_are_joined_with_special_tokens_and_keep_their_token_types():
    encoded = encode(Examples(("the film",), ("is good",), (1,)), tiny_bert_tokenizer(), task="classification", max_length=16)
    tokenizer = tiny_bert_tokenizer()
    assert tokenizer.convert_ids_to_tokens(list(encoded.input_ids[0])) == ["[CLS]", "the", "film", "[SEP]", "is", "good", "[SEP]"]
    assert encoded.token_type_ids == ((0, 0, 0, 0, 1, 1, 1),)
    assert encoded.targets == (1,)


def test_texts_are_cut_to_the_longest_length():
    encoded = encode(Examples(("the film is very good",), None, (1,)), tiny_bert_tokenizer(), task="classification", max_length=5)
    assert [len(row) for row in encoded.input_ids] == [5]


def causal(prompt: str, completion: str, *, max_length: int = 16, **options: Any) -> tuple[list[str], list[str | None]]:
    tokenizer = tiny_llama_tokenizer(**options)
    encoded = encode(Examples((prompt,), (completion,), None), tokenizer, task="causal-lm", max_length=max_length)
    labels = [None if label == IGNORED else tokenizer.convert_ids_to_tokens(label) for label in encoded.targets[0]]
    return tokenizer.convert_ids_to_tokens(list(encoded.input_ids[0])), labels


def test_a_prompt_is_read_but_not_learnt_and_the_end_is_learnt():
    tokens, labels = causal("the film is", "very good")
    assert tokens == ["<s>", "the", "film", "is", "very", "good", "</s>"]
    assert labels == [None, None, None, None, "very", "good", "</s>"]


def test_a_text_alone_is_learnt_whole():
    tokens, labels = causal("", "the film is good", bos=False)
    assert tokens == labels == ["the", "film", "is", "good", "</s>"]


def test_a_long_prompt_loses_its_beginning_and_the_completion_stays_whole():
    tokens, labels = causal("one two three four five", "very good", max_length=6)
    assert tokens == ["<s>", "four", "five", "very", "good", "</s>"]
    assert labels == [None, None, None, "very", "good", "</s>"]


def test_a_long_completion_loses_its_end_and_is_not_taught_to_stop_there():
    tokens, labels = causal("the film", "one two three four five six", max_length=5)
    assert tokens == ["<s>", "one", "two", "three", "four"]
    assert labels == [None, "one", "two", "three", "four"]


@given(prompt=st.integers(0, 9), completion=st.integers(1, 9), max_length=st.integers(4, 20))
def test_causal_rows_fit_and_learn_exactly_the_completion_that_is_left(prompt, completion, max_length):
    tokens, labels = causal(" ".join(["red"] * prompt), " ".join(["blue"] * completion), max_length=max_length)
    assert len(tokens) == len(labels) == min(max_length, 1 + prompt + completion + 1)
    learnt = [label for label in labels if label is not None]
    assert learnt == (["blue"] * completion + ["</s>"])[: max_length - 1]
    assert tokens[len(tokens) - len(learnt) :] == learnt


def test_a_length_that_the_model_cannot_read_names_the_limit():
    with pytest.raises(InputError, match=r"max_length=33 is more than the 32 tokens that the model can read\. Pass --max-length 32") as caught:
        encode(Examples(("a",), None, (0,)), tiny_bert_tokenizer(), task="classification", max_length=33)
    assert caught.value.code == "max-length"


# Batches


def numbered(num_rows: int) -> Encoded:
    """Row ``k`` holds the token ``k + 1``, ``k % 3 + 1`` times."""
    return Encoded("classification", tuple((row + 1,) * (row % 3 + 1) for row in range(num_rows)), None, tuple(range(num_rows)))


def rows_at(encoded: Encoded, step: int, *, batch_size: int, seed: int) -> list[int]:
    return batch_at(encoded, step=step, batch_size=batch_size, seed=seed, pad_token_id=0)["labels"].tolist()


@given(batch_size=st.integers(1, 5), num_batches=st.integers(1, 5), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_visits_every_row_once_when_batches_divide_it(batch_size, num_batches, seed, epoch):
    encoded = numbered(batch_size * num_batches)
    steps = range(epoch * num_batches, (epoch + 1) * num_batches)
    seen = [row for step in steps for row in rows_at(encoded, step, batch_size=batch_size, seed=seed)]
    assert sorted(seen) == list(range(len(encoded)))


@given(num_rows=st.integers(5, 12), batch_size=st.integers(1, 5), seed=st.integers(0, 9))
def test_batches_are_full_and_repeat_no_row_within_an_epoch(num_rows, batch_size, seed):
    encoded = numbered(num_rows)
    seen = [row for step in range(num_rows // batch_size) for row in rows_at(encoded, step, batch_size=batch_size, seed=seed)]
    assert len(seen) == len(set(seen)) == batch_size * (num_rows // batch_size)


@given(steps=st.lists(st.integers(0, 1000), min_size=1, max_size=8), seed=st.integers(0, 2**32))
def test_a_batch_depends_on_the_step_and_the_seed_only(steps, seed):
    encoded = numbered(10)
    first = [rows_at(encoded, step, batch_size=3, seed=seed) for step in steps]
    torch.rand(3)
    again = [rows_at(encoded, step, batch_size=3, seed=seed) for step in reversed(steps)]
    assert first == again[::-1]


def test_epochs_and_seeds_have_orders_of_their_own():
    encoded = numbered(50)
    orders = {tuple(rows_at(encoded, step, batch_size=50, seed=seed)) for step in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_drawing_a_batch_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    batch_at(numbered(8), step=3, batch_size=2, seed=0, pad_token_id=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_are_padded_on_the_right_to_the_longest_of_the_batch_and_no_further():
    encoded = Encoded("classification", ((5,), (6, 7, 8), (9, 9, 9, 9, 9)), ((0,), (0, 1, 1), (0,) * 5), (1, 0, 1))
    batch = next(eval_batches(encoded, batch_size=2, pad_token_id=3))
    assert batch["input_ids"].tolist() == [[5, 3, 3], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0], [0, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]


def test_labels_have_the_type_that_the_loss_needs():
    scores = Encoded("regression", ((5,), (6,)), None, (0.5, 1.5))
    assert batch_at(scores, step=0, batch_size=2, seed=0, pad_token_id=0)["labels"].dtype == torch.float32
    assert batch_at(numbered(2), step=0, batch_size=2, seed=0, pad_token_id=0)["labels"].dtype == torch.int64


def test_padding_of_causal_rows_is_not_learnt():
    encoded = Encoded("causal-lm", ((5, 6), (7, 8, 9)), None, ((IGNORED, 6), (7, 8, 9)))
    batch = next(eval_batches(encoded, batch_size=2, pad_token_id=0))
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED], [7, 8, 9]]
    assert "token_type_ids" not in batch


@given(num_rows=st.integers(1, 12), batch_size=st.integers(1, 5))
def test_measuring_sees_every_row_once_with_its_own_target(num_rows, batch_size):
    batches = list(eval_batches(numbered(num_rows), batch_size=batch_size, pad_token_id=0))
    assert sorted(row for batch in batches for row in batch["labels"].tolist()) == list(range(num_rows))
    for batch in batches:
        assert (batch["input_ids"][:, 0] == batch["labels"] + 1).all()


@pytest.mark.parametrize("batch_size", [0, 4])
def test_a_batch_larger_than_the_data_is_refused(batch_size):
    match = rf"batch_size={batch_size} does not fit 3 rows to train on: it must be between 1 and 3\. Pass --batch-size 3 or less, or more data"
    with pytest.raises(InputError, match=match) as caught:
        check_batch_fits(3, batch_size)
    assert caught.value.code == "too-few-rows"
    with pytest.raises(InputError, match=match):
        batch_at(numbered(3), step=0, batch_size=batch_size, seed=0, pad_token_id=0)
