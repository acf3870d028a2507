"""Claims about layers of low rank: they answer like linear layers, nothing is drawn or copied to make them, and what cannot be one is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from partwise.checks import InputError
from partwise.models.low_rank_layers import LowRankLinear, check_layer, make_thin, ranks_of, read_ranks, thin_like, with_layers
from tiny import tiny_llama, tiny_mlp
from tolerances import assert_close


def test_a_layer_of_low_rank_answers_like_a_linear_layer():
    layer = LowRankLinear(nn.Linear(7, 2, bias=False), nn.Linear(2, 5))
    assert (layer.in_features, layer.out_features, layer.rank) == (7, 5, 2)
    inputs = torch.randn(3, 4, 7)
    assert_close(nn.functional.linear(inputs, layer.weight, layer.bias), layer(inputs), claim="one product")
    assert set(layer.state_dict()) == {"0.weight", "1.weight", "1.bias"}
    assert LowRankLinear(nn.Linear(7, 2, bias=False), nn.Linear(2, 5, bias=False)).bias is None


def test_gradients_pass_through_the_weight_that_is_asked_for():
    layer = LowRankLinear(nn.Linear(4, 2, bias=False), nn.Linear(2, 3))
    layer.weight.sum().backward()
    assert all(part.weight.grad is not None for part in layer)


@pytest.mark.parametrize("bias", [True, False])
def test_a_thin_layer_is_like_the_one_that_it_stands_for_and_draws_nothing(bias: bool):
    linear = nn.Linear(6, 4, bias=bias, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    state = torch.get_rng_state()
    thin = thin_like(linear, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert (thin.rank, thin.in_features, thin.out_features, thin.training) == (2, 6, 4, False)
    assert {parameter.dtype for parameter in thin.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in thin.parameters())
    assert (thin.bias is not None) == bias
    with torch.device("meta"):
        assert thin_like(nn.Linear(6, 4), 2).weight.is_meta


def test_a_copy_with_other_layers_leaves_the_model_alone_and_never_copies_the_old_ones():
    model = tiny_mlp(6, 8, 4)

    class NeverCopied(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Linear:
            raise AssertionError("copied")

    model[0] = NeverCopied(6, 8)
    thin = thin_like(model[0], 2)
    copied = with_layers(model, {"0": thin})
    assert copied[0] is thin
    assert ranks_of(copied) == {"0": 2}
    assert ranks_of(model) == {}
    assert copied[2].weight.data_ptr() != model[2].weight.data_ptr()


def with_one_weight() -> nn.Module:
    network = tiny_mlp(6, 6, 6)
    network[2].weight = network[0].weight
    return network


@pytest.mark.parametrize(
    ("make", "name", "code", "text"),
    [
        (lambda: tiny_mlp(6, 8, 4), "9", "unknown-layer", "Sequential has no layer 9, expected the name of a linear layer"),
        (lambda: tiny_mlp(6, 8, 4), "1", "unsupported-layer", r"1 is a torch\.nn\.modules\.activation\.ReLU, expected a plain Linear\."),
        (with_one_weight, "0", "torn-ties", r"0\.weight and 2\.weight are one tensor, which two thin layers would tear apart"),
        (
            lambda: tiny_llama(tie_word_embeddings=True),
            "lm_head",
            "torn-ties",
            r"lm_head\.weight and model\.embed_tokens\.weight are one tensor, which two thin layers would tear apart",
        ),
    ],
)
def test_what_cannot_be_made_thin_is_named(make: Callable[[], nn.Module], name: str, code: str, text: str):
    with pytest.raises(InputError, match=text) as caught:
        check_layer(make(), name)
    assert caught.value.code == code


def test_a_layer_is_not_made_thin_twice_and_a_rank_must_fit():
    network = tiny_mlp(6, 8, 4)
    make_thin(network, {"0": 3})
    assert ranks_of(network) == {"0": 3}
    with pytest.raises(InputError, match=r"0 is a partwise\.models\.low_rank_layers\.LowRankLinear, expected a plain Linear\. It is thin already"):
        make_thin(network, {"0": 3})
    with pytest.raises(InputError, match="2 has 8 inputs and 4 outputs, got a rank of 5, expected 1 to 4") as caught:
        make_thin(network, {"2": 5})
    assert caught.value.code == "rank-out-of-range"


def test_a_folder_without_ranks_has_whole_layers(tmp_path: Path):
    assert read_ranks(tmp_path) == {}
