"""Claims about measuring models: means over samples and tokens, and clocks that time what they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from partwise.checks import InputError, PartwiseError, RunError
from partwise.train import _metrics
from partwise.train._metrics import accuracy, decode_speed, decode_speeds, mean_loss, throughput
from tiny import tiny_decoder, tiny_mlp


def of_batch(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss if isinstance(batch, dict) else functional.cross_entropy(model(batch[0]), batch[1])


def rows(number: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 6, generator=generator), torch.randint(4, (number,), generator=generator)


def test_the_mean_loss_is_a_mean_over_samples_not_over_batches():
    model, batches = tiny_mlp(6, 8, 4), [rows(5), rows(1, seed=1)]
    inputs, labels = (torch.cat([batch[index] for batch in batches]) for index in (0, 1))
    assert mean_loss(model, batches, loss=of_batch) == pytest.approx(functional.cross_entropy(model(inputs), labels).item())


def test_the_mean_loss_of_a_language_model_is_a_mean_over_the_tokens_that_are_scored():
    model = tiny_decoder("Llama")
    ids = torch.randint(24, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[2, 2:] = -100  # one scored token in this row
    batches = [{"input_ids": ids[:2], "labels": labels[:2]}, {"input_ids": ids[2:], "labels": labels[2:]}]
    logits = model(ids).logits[:, :-1]
    expected = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
    assert mean_loss(model, batches, loss=of_batch) == pytest.approx(expected.item(), rel=1e-5)


def test_accuracy_counts_the_next_token_and_leaves_out_what_is_not_scored():
    class Shift(nn.Module):
        """Says that the token after t is t + 1."""

        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: Tensor) -> Tensor:
            return functional.one_hot((input_ids + 1) % 10, 10).float()

    ids = torch.tensor([[1, 2, 3, 5]])
    assert accuracy(Shift(), [{"input_ids": ids, "labels": ids}]) == pytest.approx(2 / 3)
    assert accuracy(Shift(), [{"input_ids": ids, "labels": torch.tensor([[1, 2, 3, -100]])}]) == 1


def test_accuracy_of_a_classifier_is_the_share_of_right_labels():
    model = nn.Linear(4, 4, bias=False)
    model.load_state_dict({"weight": torch.eye(4)})
    assert accuracy(model, [(torch.eye(4), torch.tensor([0, 1, 2, 0])), (torch.eye(4)[:1], torch.tensor([0]))]) == 0.8


def test_measuring_leaves_every_module_in_its_mode_even_when_it_fails():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout()).train()
    model[1].eval()
    mean_loss(model, [rows(3)], loss=of_batch)
    assert [module.training for module in model.modules()] == [True, True, False]
    with pytest.raises(IndexError):
        mean_loss(model, [(rows(3)[0], torch.full((3,), 9))], loss=of_batch)
    assert [module.training for module in model.modules()] == [True, True, False]


def test_nothing_to_score_and_losses_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="got no labels to score, expected at least one batch"):
        mean_loss(tiny_mlp(6, 4), [], loss=of_batch)
    with pytest.raises(RunError, match="NaN or infinite losses on held-out data"):
        mean_loss(tiny_mlp(6, 4), [(torch.full((2, 6), math.nan), torch.zeros(2, dtype=torch.long))], loss=of_batch)
    with pytest.raises(PartwiseError, match="repeats=0 must be an integer of at least 1"):
        decode_speed(tiny_decoder("Llama"), repeats=0)


def test_decoding_reads_the_prompt_once_and_then_one_token_at_a_time():
    model = tiny_decoder("Llama")
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    assert decode_speed(model, batch_size=2, prompt_length=5, num_tokens=3, repeats=2) > 0
    handle.remove()
    assert lengths == [5, 1, 1, 1] * 3  # a warm-up and two runs


def test_speeds_of_several_models_are_medians_of_runs_by_turns(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    seconds = {"a": iter([9.0, 1.0, 2.0, 50.0]), "b": iter([9.0, 4.0, 4.0, 4.0])}

    def decode(model: Any, *_: int) -> float:
        order.append(model)
        return next(seconds[model])

    monkeypatch.setattr(_metrics, "_decode", decode)
    models: Any = ["a", "b"]
    assert decode_speeds(models, batch_size=2, num_tokens=10, repeats=3) == [10.0, 5.0]
    assert order == ["a", "b"] * 4


def test_throughput_counts_samples(monkeypatch: pytest.MonkeyPatch):
    assert throughput(tiny_mlp(6, 4), rows(8)) > 0
    monkeypatch.setattr(_metrics, "_forward", lambda model, batch: 2.0)
    assert throughput(tiny_mlp(6, 4), rows(8)) == 4


def test_a_model_with_another_kind_of_cache_is_timed():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}
    assert decode_speed(Mamba2ForCausalLM(Mamba2Config(**sizes)), prompt_length=4, num_tokens=2, repeats=1) > 0
