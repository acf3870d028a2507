"""Claims about what parts do: which remember, which are recomputed, and whether size ranks them as their impact does."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from model_families import FAMILIES, IDS, images, rows
from partwise.checks import InputError
from partwise.prune import METHODS, SafeScore, advise, safe_score
from partwise.prune.safe_scores import rank_correlation
from tiny import tiny_bert, tiny_decoder, tiny_mamba2, tiny_mlp, tiny_resnet
from tolerances import assert_close

ROLES = {
    "mlp": {"neurons": "recomputes"},
    "resnet": {"filters": "recomputes"},
    "llama": {"heads": "remembers", "neurons": "recomputes"},
    "gpt2": {"neurons": "recomputes"},
    "mamba2": {"states": "remembers"},
    "vit": {"heads": "recomputes", "neurons": "recomputes"},  # it writes nothing, so it holds no keys and values
}


@pytest.mark.parametrize("family", ROLES)
def test_states_keys_and_values_remember_and_all_else_is_recomputed(family: str):
    model = FAMILIES[family][0]()
    parts = safe_score(model)
    assert {part.kind: part.role for part in parts} == ROLES[family]
    assert all(part.correlation is None for part in parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_method_that_is_recommended_exists_and_finds_such_units_in_the_model(family: str):
    model = FAMILIES[family][0]()
    parts = safe_score(model)
    for part in parts:
        module, _, name = METHODS[part.method].partition(":")
        found = getattr(importlib.import_module(module), name)(kinds=(part.kind,)).find_axes(model)
        assert part.where in {axis.name for axis in found}
        assert part.rule.endswith(".")
    assert len({part.where for part in parts}) == len(parts)


@pytest.mark.parametrize(("family", "data"), [("mlp", rows(6)), ("llama", IDS), ("gpt2", IDS), ("resnet", images(16)), ("vit", images(8))])
def test_where_all_columns_have_one_norm_size_is_impact(family: str, data: Tensor):
    model = FAMILIES[family][0]()
    before = [module.training for module in model.train().modules()]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in {"2.weight", "4.weight"} or name.endswith(("fc2.weight", "down_proj.weight", "c_proj.weight", "o_proj.weight", "conv2.weight")):
                parameter.fill_(0.1)
    with_readers = [part for part in safe_score(model, data) if part.correlation is not None]
    assert with_readers
    for part in with_readers:
        assert_close(torch.tensor(part.correlation), torch.tensor(1.0), claim=part.where)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_where_loud_units_are_read_faintly_the_correlation_is_minus_one():
    model = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        model[0].weight[:, 0] = torch.arange(1.0, 6)
        model[0].bias.zero_()
        model[2].weight[:] = torch.arange(1.0, 6) ** -2
    [part] = safe_score(model, torch.ones(4, 1))
    assert_close(torch.tensor(part.correlation), torch.tensor(-1.0), claim="impact falls as one over size")
    assert advise([part], keep=0.9) == (
        "In 1 of 1 layers, 0 for one, large activations do not go with a large impact on the output. Do not choose by size there; use a method that looks at "
        "what reads the units.",
    )


def test_the_correlation_is_that_of_a_loop_over_tokens_and_neurons():
    model = tiny_decoder("Llama").requires_grad_(False)
    data = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    found: list[Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(lambda module, arguments, output: found.append(arguments[0]))
    model(**data)
    handle.remove()
    sizes, impacts = [], []
    for neuron in range(24):
        values = [float(found[0][row, token, neuron].abs()) for row, length in ((0, 5), (1, 3)) for token in range(length)]
        sizes.append(sum(values) / 8)
        impacts.append(sizes[-1] * float(layer.weight[:, neuron].norm()))
    [part] = [part for part in safe_score(model, data) if part.where == "model.layers.1.mlp"]
    assert_close(torch.tensor(part.correlation), torch.tensor(stats.spearmanr(sizes, impacts).statistic).float(), claim="scipy's", rtol=1e-4, atol=1e-4)


def test_a_head_is_as_large_as_its_entries_together():
    model = tiny_decoder("Llama")
    heads = [part for part in safe_score(model, IDS) if part.kind == "heads"]
    assert [part.where for part in heads] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(-1 <= part.correlation <= 1 for part in heads if part.correlation is not None)


VALUES = st.lists(st.integers(0, 4).map(float), min_size=3, max_size=12)


@given(st.data())
def test_rank_correlation_is_scipy_s_with_ties_sharing_their_ranks(data: Any):
    first = data.draw(VALUES)
    second = data.draw(st.lists(st.integers(0, 4).map(float), min_size=len(first), max_size=len(first)))
    found = rank_correlation(torch.tensor(first), torch.tensor(second))
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found is not None
        assert_close(torch.tensor(found), torch.tensor(stats.spearmanr(first, second).statistic).float(), claim="scipy's")


def test_units_that_are_all_alike_have_no_ranking():
    model = tiny_mlp(6, 8, 4)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)
    assert [part.correlation for part in safe_score(model, rows(6))] == [None]


def test_nothing_reads_states_so_that_data_say_nothing_about_them():
    assert [part.correlation for part in safe_score(tiny_mamba2(), IDS)] == [None, None]


def test_removing_more_than_half_of_the_neurons_of_a_language_model_for_good_is_warned_of():
    parts = safe_score(tiny_decoder("Llama"))
    [warning] = advise(parts, keep=0.25)
    assert warning.startswith("75% of the feed-forward neurons would go for good in 2 layers. They are computed anew for every token, and tokens need ")
    assert warning.endswith("Keep at least 50%, or cut states or heads.")
    assert advise(parts, keep=0.5) == ()
    [warning] = advise(parts, keep=0.5, kinds=("heads",))
    assert warning.startswith("50% of the groups of heads would go in 2 layers. Expect a much worse model unless it is trained on. Keep at least 75%")
    assert advise(parts, keep=0.75, kinds=("heads",)) == ()
    assert advise(safe_score(tiny_mamba2()), keep=0.1, kinds=("states",)) == ()
    assert advise(safe_score(tiny_resnet()), keep=0.1, kinds=("filters",)) == (), "there are no tokens"
    assert advise(safe_score(tiny_mlp(6, 8, 4)), keep=0.1) == ()


def test_what_cannot_be_looked_at_is_refused():
    with pytest.raises(InputError, match=r"got a BertForSequenceClassification of type 'bert', expected one of"):
        safe_score(tiny_bert())
    with pytest.raises(InputError, match=r"got no calibration data, expected at least one batch of inputs"):
        safe_score(tiny_mlp(6, 8, 4), [])
    with pytest.raises(InputError, match=r"got NaN or infinite activations in 0, expected finite numbers"):
        safe_score(tiny_mlp(6, 8, 4), torch.full((2, 6), float("nan")))
    assert torch.is_grad_enabled()


def test_the_name_of_the_function_is_not_that_of_its_file():
    import partwise.prune
    import partwise.prune.safe_scores

    assert callable(partwise.prune.safe_score)
    assert isinstance(partwise.prune.safe_score(tiny_mlp(6, 8, 4))[0], SafeScore)
