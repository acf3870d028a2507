"""Claims about tickets: a file that stock code reads, holding what the method meant, chosen without looking at anything else."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model_families import IDS, images, outputs
from partwise.checks import InputError, RunError
from partwise.models import mask, scale_readers, tensors_of
from partwise.models.networks import build
from partwise.train import IST, LoFT, ResIST, TwIST
from partwise.train.ticket import Ticket, cut, load_ticket, save_ticket, search
from tiny import WORDS, tiny_decoder, tiny_gpt2, tiny_llama, tiny_llama_tokenizer, tiny_vit
from tolerances import assert_close

BUILDERS: dict[str, Any] = {
    **{family: (lambda family=family, **options: tiny_decoder(family, **options)) for family in ("Llama", "Mistral", "Qwen2", "Qwen3")},
    "Llama-tied-with-biases": lambda **options: tiny_decoder("Llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True, **options),
    "GPT2": tiny_gpt2,
}
METHOD = TwIST(keep=0.5, num_blocks=4)


def ticket_of(model: nn.Module, keep: float = 0.5, *, method: TwIST = METHOD, seed: int = 0) -> Ticket:
    return cut(method, model, method.find_axes(model), keep, seed=seed)


def corrected_parent(model: nn.Module, ticket: Ticket, method: TwIST = METHOD) -> Any:
    """The whole model with what the ticket lacks switched off, and the correction folded in: the slow twin."""
    axes = method.find_axes(model)
    return mask(scale_readers(model, method.ticket_factors(axes, ticket.part), axes=axes), ticket.part, axes=axes)


@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("family", BUILDERS)
def test_stock_from_pretrained_gives_the_logits_and_texts_of_the_masked_parent(family: str, keep: float, tmp_path: Path):
    model = BUILDERS[family]()
    ticket = ticket_of(model, keep)
    save_ticket(ticket, tmp_path / "ticket")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ticket").eval()
    parent = corrected_parent(model, ticket)
    assert type(loaded) is type(model)
    assert_close(loaded(IDS).logits, parent(IDS).logits, claim="a plain checkpoint", rtol=0, atol=1e-6)
    texts = [one.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0) for one in (loaded, parent)]
    assert torch.equal(*texts)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == ticket.num_parameters
    assert (ticket.num_parameters < sum(parameter.numel() for parameter in model.parameters())) == (keep < 1)


def test_a_ticket_of_a_vit_opens_too(tmp_path: Path):
    model = tiny_vit()
    ticket = ticket_of(model)
    save_ticket(ticket, tmp_path / "ticket")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ticket").eval()
    assert_close(outputs(loaded, images(8)), outputs(corrected_parent(model, ticket), images(8)), claim="a plain checkpoint", rtol=0, atol=1e-6)


@settings(max_examples=10)
@given(keep=st.floats(0.13, 1.0), seed=st.integers(0, 99), correction=st.sampled_from(["inverse_keep", "inverse_sqrt_keep", "none"]))
def test_any_size_and_any_draw_is_the_corrected_masked_parent(keep: float, seed: int, correction: Any):
    method = TwIST(keep=0.5, num_blocks=4, correction=correction)
    ticket = ticket_of(WIDE, keep, method=method, seed=seed)
    assert_close(ticket.model(IDS).logits, corrected_parent(WIDE, ticket, method)(IDS).logits, claim="cut is mask", rtol=0, atol=1e-6)
    assert ticket.keep == keep
    assert not ticket.model.training


WIDE = tiny_decoder("Llama", intermediate_size=32, seed=3)


def test_biases_of_output_projections_are_not_scaled():
    model = tiny_decoder("Llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.3)
    small = tensors_of(ticket_of(model).model)
    for name in ("model.layers.0.self_attn.o_proj.bias", "model.layers.1.mlp.down_proj.bias"):
        assert torch.equal(small[name], tensors_of(model)[name])


def test_cutting_leaves_the_whole_model_alone_and_shares_nothing_with_it():
    model = tiny_decoder("Llama")
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    with torch.no_grad():
        for parameter in ticket_of(model, 1.0).model.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(model).items())


def test_the_same_seed_cuts_the_same_ticket_and_another_one_another():
    assert ticket_of(WIDE, seed=4).part == ticket_of(WIDE, seed=4).part
    assert ticket_of(WIDE, seed=4).part != ticket_of(WIDE, seed=5).part


def test_a_ticket_says_where_it_is_not_what_was_asked_for(caplog: pytest.LogCaptureFixture):
    model = tiny_llama(hidden_size=32, num_attention_heads=4, head_dim=4)
    with caplog.at_level(logging.INFO):
        ticket = ticket_of(model, 0.75)
    assert ticket.notes == ("Kept 2 of 4 head groups per layer, not 3: the nearest number that the model's configuration loads.",)
    assert ticket.notes[0] in caplog.text
    assert ticket.model.config.num_key_value_heads == 2
    assert ticket_of(model, 0.5).notes == ()


def test_a_search_keeps_the_lowest_score_and_tells_all_of_them():
    seen: list[nn.Module] = []
    values = iter([3.0, 1.0, 2.0, 1.0])

    def evaluate(model: nn.Module) -> float:
        seen.append(model)
        return next(values)

    best = search(METHOD, WIDE, METHOD.find_axes(WIDE), 0.5, evaluate=evaluate, num_candidates=4)
    assert best.model is seen[1]
    assert (best.score, best.scores) == (1.0, (3.0, 1.0, 2.0, 1.0))


def test_the_first_candidate_is_what_cut_gives_and_candidates_differ():
    axes = METHOD.find_axes(WIDE)
    one = search(METHOD, WIDE, axes, 0.5, evaluate=lambda _: 0.0, num_candidates=1, seed=7)
    assert one.part == cut(METHOD, WIDE, axes, 0.5, seed=7).part
    shapes: list[bytes] = []
    search(METHOD, WIDE, axes, 0.5, evaluate=lambda model: shapes.append(weights_of(model)) or 0.0, num_candidates=5)  # type: ignore[func-returns-value]
    assert len(set(shapes)) == 5


def weights_of(model: nn.Module) -> bytes:
    return b"".join(tensor.detach().numpy().tobytes() for tensor in tensors_of(model).values())


def test_a_search_finds_the_units_that_matter():
    """One block of each feed-forward layer carries everything: the best of many tickets holds it in both layers, which one in four does."""
    model = tiny_decoder("Llama", intermediate_size=32, seed=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 8:] = 0
            layer.mlp.down_proj.weight[:, :8] *= 30
    target = model(IDS).logits
    method = TwIST(keep=0.5, num_blocks=4, correction="none")

    def distance(candidate: Any) -> float:
        return float((candidate(IDS).logits - target).detach().square().mean())

    found = search(method, model, method.find_axes(model), 0.5, evaluate=distance, num_candidates=16)
    assert all(0 in found.part.units[f"model.layers.{layer}.mlp"] for layer in (0, 1))
    assert found.score == min(found.scores)
    assert found.score < sum(found.scores) / 16


def test_a_score_that_is_not_finite_and_no_candidates_are_refused():
    axes = METHOD.find_axes(WIDE)
    with pytest.raises(RunError, match=r"ticket 0 of keep=0\.5 got the score nan, expected a finite number"):
        search(METHOD, WIDE, axes, 0.5, evaluate=lambda _: math.nan)
    with pytest.raises(InputError, match="num_candidates=0 must be an integer of at least 1"):
        search(METHOD, WIDE, axes, 0.5, evaluate=lambda _: 0.0, num_candidates=0)
    for keep in (0.0, 1.2):
        with pytest.raises(InputError, match=f"got keep={keep}, expected a fraction above 0 and at most 1"):
            cut(METHOD, WIDE, axes, keep)


def test_the_folder_holds_tokenizer_card_and_what_the_ticket_is_and_no_pickle(tmp_path: Path):
    ticket = search(METHOD, WIDE, METHOD.find_axes(WIDE), 0.5, evaluate=lambda _: 2.0, num_candidates=2)
    save_ticket(ticket, tmp_path / "ticket", tokenizer=tiny_llama_tokenizer(), card="# A ticket\n")
    names = {path.name for path in (tmp_path / "ticket").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json", "ticket.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert list(tmp_path.iterdir()) == [tmp_path / "ticket"]
    assert (tmp_path / "ticket" / "README.md").read_text() == "# A ticket\n"
    facts = json.loads((tmp_path / "ticket" / "ticket.json").read_text())
    assert (facts["keep"], facts["scores"], facts["num_parameters"]) == (0.5, [2.0, 2.0], ticket.num_parameters)
    assert tuple(facts["units"]["model.layers.0.mlp"]) == ticket.part.units["model.layers.0.mlp"]
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "ticket")(" ".join(WORDS[:3]))["input_ids"]
    assert len(words) == 4


def test_a_folder_that_could_not_be_finished_stays_as_it_was(tmp_path: Path):
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "model.safetensors").exists()
            raise ValueError("no tokenizer after all")

    with pytest.raises(ValueError, match="no tokenizer after all"):
        save_ticket(ticket_of(WIDE), tmp_path / "ticket", tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2"])
def test_layers_of_different_size_open_with_load_ticket(family: str, tmp_path: Path):
    """Pinned layers stay whole in a ticket, and stock code reads one size for all layers only."""
    model = BUILDERS[family]()
    method = TwIST(keep=0.5, num_blocks=4, pinned=("first",))
    ticket = ticket_of(model, method=method)
    save_ticket(ticket, tmp_path / "ticket")
    loaded = load_ticket(tmp_path / "ticket")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_close(outputs(loaded, IDS), outputs(corrected_parent(model, ticket, method), IDS), claim="uneven layers", rtol=0, atol=1e-6)


def test_load_ticket_and_from_pretrained_agree(tmp_path: Path):
    save_ticket(ticket_of(WIDE), tmp_path / "ticket")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ticket")
    assert torch.equal(load_ticket(tmp_path / "ticket")(IDS).logits, stock.eval()(IDS).logits)


def test_folders_without_a_ticket_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere is not a folder"):
        load_ticket(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no config\.json, expected a folder that save_ticket wrote"):
        load_ticket(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds model\.bin: these can be pickles"):
        load_ticket(tmp_path)


@pytest.mark.parametrize("name", ["mlp", "resnet", "blocks"])
def test_a_ticket_of_a_network_of_this_package_is_built_again_from_its_folder(name: str, tmp_path: Path):
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    pictures = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    method: Any
    if name == "mlp":
        model, method, inputs = build({"network": "mlp", "num_inputs": 6, "hidden": [12, 8], "num_classes": 3, "norm": True}), IST(), rows
    else:
        stages = [{"width": 4, "stride": 1, "inner": [4, 4, 4]}, {"width": 8, "stride": 2, "inner": [8] * 4}]
        model = build({"network": "resnet", "channels": 1, "num_classes": 3, "stem": 4, "stages": stages})
        method, inputs = (LoFT(num_parts=2) if name == "resnet" else ResIST(num_parts=2)), pictures
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    ticket = cut(method, model, method.find_axes(model), 0.5)
    save_ticket(ticket, tmp_path / "ticket")
    assert {path.name for path in (tmp_path / "ticket").iterdir()} == {"config.json", "model.safetensors", "ticket.json"}
    loaded = load_ticket(tmp_path / "ticket")
    assert torch.equal(loaded(inputs), ticket.model(inputs))
    assert ticket.num_parameters < sum(parameter.numel() for parameter in model.parameters())
    axes = method.find_axes(model)
    if name == "mlp":
        parent = mask(scale_readers(model.eval(), method.ticket_factors(axes, ticket.part), axes=axes), ticket.part, axes=axes)
        assert_close(loaded(inputs), parent(inputs), claim="cut is mask", rtol=0, atol=1e-5)
