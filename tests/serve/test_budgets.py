"""Budgets that are calibrated on a text go where they are needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from partwise.checks import InputError
from partwise.serve import Scissorhands, ScissorhandsCache, SlidingWindow, calibrate_budgets
from partwise.serve.persistence import share_out

RULE = Scissorhands(recent=2, drop=1)


def llama(*, num_layers: int = 3, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": num_layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=256, **sizes)).eval()


def tokens(rows: int = 2, length: int = 60) -> torch.Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(1))


def test_a_layer_whose_attention_is_switched_off_gets_the_minimum():
    model = llama()
    for layer, strength in enumerate((40.0, 0.0, 10.0)):  # what the layer's attention adds to the stream
        torch.nn.init.normal_(model.model.layers[layer].self_attn.o_proj.weight, std=0.1 * strength / 40)
    found = calibrate_budgets(model, tokens(), average=16, minimum=6, rule=RULE)
    assert found.divergence[1] == pytest.approx(0.0, abs=1e-6)
    assert found.budgets[1] == 6
    assert found.budgets[0] > found.budgets[2] > 6


def test_budgets_add_up_to_the_average_and_a_cache_takes_them():
    model = llama()
    found = calibrate_budgets(model, tokens(), average=15, rule=RULE)
    assert sum(found.budgets) == 45
    assert min(found.budgets) >= 4
    cache = ScissorhandsCache(model, budget=found.budgets, recent=2, drop=1)
    model(tokens(), cache=cache)
    assert [layer.slots for layer in cache.report().layers] == list(found.budgets)


def test_the_model_is_left_as_it_was_and_layers_are_reported():
    model, told = llama().train(), []
    model.lm_head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate_budgets(model, tokens(), average=16, rule=SlidingWindow(), report=lambda done, total: told.append((done, total)))
    assert model.training
    assert not model.lm_head.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_smaller_blocks_see_what_generation_sees_and_the_order_of_needs_stays():
    model = llama()
    for layer, strength in enumerate((0.1, 0.02, 0.05)):
        torch.nn.init.normal_(model.model.layers[layer].self_attn.o_proj.weight, std=strength)
    orders = []
    for block in (1, 16):
        found = calibrate_budgets(model, tokens(), average=16, rule=RULE, block=block).divergence
        orders.append(sorted(range(3), key=lambda layer: found[layer]))
    assert orders[0] == orders[1] == [1, 2, 0]


def test_a_text_that_fits_into_the_budget_is_refused():
    with pytest.raises(InputError, match=r"got input_ids of shape \(2, 60\), expected rows of at least 81 tokens.*Pass a longer text") as caught:
        calibrate_budgets(llama(), tokens(), average=64, rule=RULE)
    assert caught.value.code == "calibration-text"


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=12),
    st.integers(1, 50),
    st.integers(0, 100),
)
def test_shares_add_up_exactly_and_none_is_below_the_minimum(needs, minimum, more):
    shares = share_out(needs, average=minimum + more, minimum=minimum)
    assert sum(shares) == len(needs) * (minimum + more)
    assert min(shares) >= minimum


def test_a_larger_need_never_gets_less():
    shares = share_out([0.1, 0.4, 0.2], average=50, minimum=10)
    assert shares[0] < shares[2] < shares[1]
