"""Text written with a cache that has a budget: what comes out, bit by bit, and what it took."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from transformers import DynamicCache

from partwise.checks import InputError
from partwise.serve.generate import Sampling, TextPieces, generate_text, pad_token_of, prompt_ids, read_prompt
from partwise.serve.h2o import H2O
from partwise.serve.sliding_window import SlidingWindow
from partwise.train._text import Document, train_tokenizer
from serve_models import small_decoder
from tiny import tiny_llama_tokenizer

PROMPT = "the good film was not a bad film"
TEXT = "naive caf\u00e9, \u4e2d\u6587 and \U0001f600 " * 20


@pytest.fixture
def model() -> Any:
    return small_decoder()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_llama_tokenizer()


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    return train_tokenizer([Document("text", TEXT)], vocab_size=300, context=64)


def full_text(model: Any, tokenizer: Any, num_tokens: int, **options: Any) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), cache=DynamicCache(), max_new_tokens=num_tokens, pad_token_id=1, **options
    )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def write(model: Any, tokenizer: Any, rule: Any = None, **options: Any) -> Any:
    sampling = Sampling(max_new_tokens=options.pop("max_new_tokens", 30), **options.pop("sampling", {}))
    return generate_text(model, tokenizer, PROMPT, rule or SlidingWindow(), sampling=sampling, **({"budget": 80} | options))


def test_with_room_for_everything_the_text_is_that_of_a_full_cache(model: Any, tokenizer: Any):
    written = write(model, tokenizer)
    assert written.text == full_text(model, tokenizer, 30, do_sample=False)
    assert (written.num_prompt_tokens, written.evictions, written.mass_kept) == (9, 0, None)
    assert write(model, tokenizer, prefill_chunk_size=4).text == written.text
    assert written.bytes_full == (9 + written.num_new_tokens - 1) * 2 * 2 * 4 * 4 * 4  # tokens, layers, keys and values, heads, dimensions, bytes


def test_text_comes_in_pieces_that_together_are_the_text(model: Any, tokenizer: Any):
    pieces: list[str] = []
    written = write(model, tokenizer, budget=12, write=pieces.append)
    assert len(pieces) > 5
    assert all(pieces)
    assert "".join(pieces) == written.text


def test_the_budget_holds_and_what_left_is_counted(model: Any, tokenizer: Any):
    model.generation_config.eos_token_id = None
    written = write(model, tokenizer, H2O(), budget=12, max_new_tokens=60)
    assert written.num_new_tokens == 60
    assert written.bytes <= written.max_bytes < written.bytes_full
    assert written.evictions == 2 * (9 + 59 - 12)  # two layers, one token at a time
    assert 0 < written.mass_kept <= 1
    assert written.tokens_per_second == (written.num_new_tokens - 1) / written.seconds


def test_budgets_may_differ_by_layer(model: Any, tokenizer: Any):
    with pytest.raises(InputError, match="got 3 budgets, expected 2"):
        write(model, tokenizer, budget=[12, 14, 16])
    assert write(model, tokenizer, budget=[12, 14]).max_bytes == write(model, tokenizer, budget=13).max_bytes


def test_a_pinned_prompt_needs_a_budget_above_it(model: Any, tokenizer: Any):
    with pytest.raises(InputError, match="9 pinned") as caught:
        write(model, tokenizer, budget=10, pin_prompt=True)
    assert caught.value.code == "cache-budget"
    assert write(model, tokenizer, budget=12, pin_prompt=True).text != write(model, tokenizer, budget=12).text
    assert write(model, tokenizer, budget=12, pinned=9).text == write(model, tokenizer, budget=12, pin_prompt=True).text


def test_a_seed_decides_what_is_drawn_and_the_global_random_state_is_left_alone(model: Any, tokenizer: Any):
    state = torch.get_rng_state()
    first, again, other = (write(model, tokenizer, sampling={"temperature": 1.5, "seed": seed}).text for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again != other


def test_settings_of_a_model_do_not_overrule_what_was_asked_for(model: Any, tokenizer: Any):
    expected = write(model, tokenizer, max_new_tokens=12).text
    model.generation_config.update(do_sample=True, temperature=3.0, top_p=0.5, num_beams=3, max_new_tokens=2)
    assert write(model, tokenizer, max_new_tokens=12).text == expected


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_drawing_among_the_likeliest_alone_takes_the_likeliest(model: Any, tokenizer: Any, sampling: dict[str, Any]):
    assert write(model, tokenizer, sampling={"temperature": 1.0} | sampling).text == write(model, tokenizer).text


def test_a_token_that_ends_a_text_ends_it(model: Any, tokenizer: Any):
    whole = write(model, tokenizer, max_new_tokens=20)
    words = whole.text.split()
    model.generation_config.eos_token_id = tokenizer(words[2], add_special_tokens=False).input_ids[0]
    written = write(model, tokenizer, max_new_tokens=20)
    assert written.num_new_tokens < whole.num_new_tokens
    assert written.text.split() == words[:3]


def test_ctrl_c_writes_what_was_waiting_and_leaves_the_model_as_it_was(model: Any, tokenizer: Any):
    before, said = model.config._attn_implementation, []

    def interrupt(text: str) -> None:
        said.append(text)
        if len(said) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(model, tokenizer, write=interrupt)
    assert write(model, tokenizer).text.startswith("".join(said))
    assert model.config._attn_implementation == before


def test_how_far_it_is_comes_with_speed_and_memory(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("partwise.serve.generate.SECONDS_BETWEEN_REPORTS", 0.0)
    news: list[tuple[Any, ...]] = []
    written = write(model, tokenizer, budget=12, report=lambda *said: news.append(said))
    assert news[0] == ("reading the prompt", 0, 1, "9 tokens")
    assert [said[:3] for said in news[1:]] == [("writing", number, 30) for number in range(1, written.num_new_tokens + 1)]
    assert "tokens/s, cache 3." in news[-1][3]
    assert ", a full one " in news[-1][3]


def test_nothing_to_go_on_with_is_refused(model: Any):
    with pytest.raises(InputError, match=r"the prompt has no tokens, expected some text to go on with\. Pass --prompt TEXT\.") as caught:
        generate_text(model, tiny_llama_tokenizer(bos=False), "", SlidingWindow(), budget=12)
    assert caught.value.code == "empty-prompt"


def test_a_chat_is_put_into_the_template_of_the_model_and_refused_without_one(model: Any, tokenizer: Any):
    with pytest.raises(InputError, match=r"has no chat template, expected one for --chat\. Leave --chat out") as caught:
        write(model, tokenizer, chat=True)
    assert caught.value.code == "no-chat-template"
    chatty = tiny_llama_tokenizer()
    chatty.chat_template = "{% for message in messages %}red {{ message.content }} {% endfor %}{% if add_generation_prompt %}blue{% endif %}"
    assert chatty.decode(prompt_ids(chatty, "one two", chat=True)[0], skip_special_tokens=True) == "red one two blue"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens=0 must be an integer of at least 1"),
        ({"temperature": -1.0}, r"temperature=-1\.0 must be 0 or more"),
        ({"temperature": float("nan")}, r"temperature=nan must be 0 or more"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0 and at most 1"),
        ({"top_k": -1}, r"top_k=-1 must be an integer of at least 0"),
        ({"seed": -1}, r"seed=-1 must be from 0 to 9223372036854775807"),
    ],
)
def test_sampling_refuses_what_cannot_be(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Sampling(**changes)


def test_letters_of_several_tokens_wait_until_they_are_whole(byte_tokenizer: Any):
    pieces = TextPieces(byte_tokenizer)
    ids = byte_tokenizer("\U0001f601!").input_ids  # a letter that the tokenizer does not know as one token
    assert len(ids) > 2
    assert [pieces.add(token) for token in ids] == [""] * (len(ids) - 2) + ["\U0001f601", "!"]
    cut = TextPieces(byte_tokenizer)
    assert cut.add(ids[0]) == ""
    assert cut.rest() == "\ufffd"
    assert cut.rest() == ""


@hypothesis.given(strategies.lists(strategies.integers(0, 299), max_size=40))
def test_pieces_of_any_tokens_are_the_text_of_all_of_them(byte_tokenizer: Any, ids: list[int]):
    ids = [token % len(byte_tokenizer) for token in ids]
    pieces = TextPieces(byte_tokenizer)
    assert "".join([*map(pieces.add, ids), pieces.rest()]) == byte_tokenizer.decode(ids, skip_special_tokens=True)


def test_a_prompt_is_read_from_a_file_or_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfred\n")
    assert read_prompt(None, tmp_path / "prompt.txt") == "red\n"
    assert read_prompt("green", None) == "green"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"blue")))
    assert read_prompt(None, Path("-")) == "blue"
    with pytest.raises(InputError, match=r"cannot read .*gone\.txt: No such file"):
        read_prompt(None, tmp_path / "gone.txt")
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"is not UTF-8 text, at byte 3\. Convert it"):
        read_prompt(None, tmp_path / "prompt.txt")


def test_a_token_to_fill_rows_with_is_found_everywhere():
    settings = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 8]))
    assert pad_token_of(settings, SimpleNamespace(pad_token_id=3, eos_token_id=4)) == 3
    assert pad_token_of(settings, SimpleNamespace(pad_token_id=None, eos_token_id=4)) == 4
    assert pad_token_of(settings, SimpleNamespace(pad_token_id=None, eos_token_id=None)) == 0
