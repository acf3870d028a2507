"""Claims about saved pruned models: what is loaded is what was saved, to the bit; stock code opens it or refuses it, and what does not fit is named."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import partwise
from model_families import FAMILIES, IDS, images, outputs, rows
from partwise.checks import InputError
from partwise.models import tensors_of
from partwise.models.low_rank_layers import ranks_of
from partwise.models.networks import build
from partwise.opened_models import open_model
from partwise.prune import GHOST, LoRD, LowRankPlan, Magnitude, PrunePlan, UnitPlan, apply, load_plan, save
from partwise.prune.method import PruneMethod
from tiny import tiny_decoder, tiny_llama_tokenizer, tiny_mamba2, tiny_mlp, tiny_neox, tiny_resnet, tiny_vit, with_statistics
from tolerances import assert_close

WORDS = {"max_new_tokens": 6, "do_sample": False}
TEXTS = torch.randint(3, 20, (16, 12), generator=torch.Generator().manual_seed(3))
DECODERS: dict[str, tuple[Callable[[], Any], PruneMethod]] = {
    "mamba2": (tiny_mamba2, GHOST(keep=0.5)),
    "mamba2-in-two-groups": (lambda: tiny_mamba2(n_groups=2), GHOST(keep=0.5)),
    "llama": (lambda: tiny_decoder("Llama"), Magnitude(keep=0.5)),
    "llama-heads": (lambda: tiny_decoder("Llama"), Magnitude(keep=0.5, kinds=("heads", "neurons"))),
    "llama-tied": (lambda: tiny_decoder("Llama", tie_word_embeddings=True), Magnitude(keep=0.5)),
    "mistral": (lambda: tiny_decoder("Mistral"), Magnitude(keep=0.5)),
    "qwen2": (lambda: tiny_decoder("Qwen2"), Magnitude(keep=0.5)),
    "qwen3": (lambda: tiny_decoder("Qwen3"), Magnitude(keep=0.5)),
    "gpt-neox": (tiny_neox, Magnitude(keep=0.5)),
}
EVERY_DECODER = pytest.mark.parametrize("family", DECODERS)


def of_whole_model(method: PruneMethod) -> PruneMethod:
    """The same method with the best units of all layers, so that layers differ."""
    return dataclasses.replace(method, keep=0.4, scope="model")  # type: ignore[call-arg]


def cut(family: str, change: Callable[[PruneMethod], PruneMethod] = lambda method: method, *, as_mask: bool = False) -> tuple[Any, PrunePlan]:
    make, method = DECODERS[family]
    model = make()
    plan = change(method).plan(model, TEXTS)
    return apply(model, plan, as_mask=as_mask), plan


def same_answers(loaded: Any, small: Any) -> bool:
    return torch.equal(loaded(IDS).logits, small(IDS).logits) and torch.equal(loaded.generate(IDS, **WORDS), small.generate(IDS, **WORDS))


def low_rank(model: nn.Module, **budget: Any) -> tuple[Any, LowRankPlan]:
    plan = LoRD(**(budget or {"rank": 3})).plan(model, TEXTS)
    return apply(model, plan), plan


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# Units


@EVERY_DECODER
def test_layers_of_one_size_are_an_ordinary_checkpoint_to_the_bit(family: str, tmp_path: Path):
    small, plan = cut(family)
    save(small, tmp_path / "small", plan=plan)
    assert "per_layer_config" not in json.loads((tmp_path / "small" / "config.json").read_text())
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert type(stock) is type(small)
    assert same_answers(stock, small)
    assert same_answers(partwise.load(tmp_path / "small"), small)


@EVERY_DECODER
def test_layers_of_different_size_come_back_to_the_bit_and_stock_code_refuses_them(family: str, tmp_path: Path):
    small, plan = cut(family, of_whole_model)
    assert small.config.is_heterogeneous, "the layers differ, or nothing would be tested"
    save(small, tmp_path / "small", plan=plan)
    loaded: Any = partwise.load(tmp_path / "small")
    assert (type(loaded), loaded.training) == (type(small), False)
    assert same_answers(loaded, small)
    with pytest.raises(Exception, match=r"per-layer attribute|ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize("family", ["mamba2", "llama"])
def test_a_masked_model_is_an_ordinary_checkpoint_of_the_old_size(family: str, tmp_path: Path):
    masked, plan = cut(family, as_mask=True)
    save(masked, tmp_path / "masked", plan=plan)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "masked").eval()
    assert same_answers(stock, masked)
    assert stock.num_parameters() == DECODERS[family][0]().num_parameters()


def test_a_vit_is_an_ordinary_checkpoint_too(tmp_path: Path):
    model = tiny_vit()
    small = apply(model, plan := Magnitude(keep=0.5).plan(model))
    save(small, tmp_path / "small", plan=plan)
    assert torch.equal(partwise.load(tmp_path / "small")(images(8)).logits, small(images(8)).logits)
    assert torch.equal(transformers.ViTForImageClassification.from_pretrained(tmp_path / "small")(images(8)).logits, small(images(8)).logits)


# Layers of low rank


@EVERY_DECODER
def test_layers_of_low_rank_come_back_to_the_bit_and_stock_code_refuses_them(family: str, tmp_path: Path):
    model = DECODERS[family][0]()
    small, plan = low_rank(model, keep=0.6)
    save(small, tmp_path / "small", plan=plan)
    loaded: Any = partwise.load(tmp_path / "small")
    assert (type(loaded), loaded.training, ranks_of(loaded)) == (type(small), False, plan.ranks)
    assert same_answers(loaded, small)
    assert loaded.num_parameters() == small.num_parameters() < model.num_parameters()
    assert json.loads((tmp_path / "small" / "low_rank.json").read_text()) == plan.ranks
    with pytest.raises(OSError, match=r"[Nn]o file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_vit_with_layers_of_low_rank_comes_back_to_the_bit(tmp_path: Path):
    model = tiny_vit()
    small = apply(model, plan := LoRD(rank=3).plan(model, torch.randn(9, 3, 8, 8)))
    save(small, tmp_path / "small", plan=plan)
    assert torch.equal(partwise.load(tmp_path / "small")(images(8)).logits, small(images(8)).logits)


@pytest.mark.parametrize("family", ["mamba2", "llama", "qwen3"])
def test_units_may_be_cut_first_and_layers_made_thin_then(family: str, tmp_path: Path):
    uneven, _ = cut(family, of_whole_model)
    small, plan = low_rank(uneven.to(torch.bfloat16))
    save(small, tmp_path / "small", plan=plan)
    loaded: Any = partwise.load(tmp_path / "small")
    assert loaded.config.is_heterogeneous
    assert loaded.dtype == torch.bfloat16
    assert same_answers(loaded, small)


def test_a_masked_model_of_low_rank_is_an_ordinary_checkpoint(tmp_path: Path):
    model = tiny_decoder("Llama")
    _, plan = low_rank(model)
    masked = apply(model, plan, as_mask=True)
    save(masked, tmp_path / "masked", plan=plan)
    assert same_answers(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "masked").eval(), masked)


def test_commands_open_a_model_of_low_rank_with_its_tokenizer(tmp_path: Path):
    small, plan = low_rank(tiny_decoder("Llama"))
    save(small, tmp_path / "small", plan=plan, tokenizer=tiny_llama_tokenizer())
    opened = open_model(str(tmp_path / "small"), device="cpu")
    assert same_answers(opened.model, small)
    assert opened.tokenizer("red").input_ids


# What lies beside


def test_plan_tokenizer_settings_and_card_lie_beside_the_weights_and_nothing_else_does(tmp_path: Path):
    small, plan = cut("llama", of_whole_model)
    small.generation_config.max_new_tokens = 3
    save(small, tmp_path / "small", plan=plan, tokenizer=tiny_llama_tokenizer(), card="# Small\n")
    names = {str(path.relative_to(tmp_path / "small")) for path in (tmp_path / "small").rglob("*") if path.is_file()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert names == tokenizer | {"README.md", "config.json", "generation_config.json", "model.safetensors", "plan/plan.json", "plan/plan.safetensors"}
    loaded: Any = partwise.load(tmp_path / "small")
    assert loaded.generation_config.max_new_tokens == 3
    read = load_plan(tmp_path / "small" / "plan")
    assert isinstance(read, UnitPlan)
    assert isinstance(plan, UnitPlan)
    assert (read.units, read.method) == (plan.units, plan.method)
    assert (tmp_path / "small" / "README.md").read_text() == "# Small\n"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "small", config=loaded.config)("red").input_ids


def test_only_weights_lie_where_other_programs_look_for_weights(tmp_path: Path):
    save(*cut("llama")[:1], tmp_path / "units", plan=cut("llama")[1])
    save(*low_rank(tiny_decoder("Llama"))[:1], tmp_path / "thin", plan=low_rank(tiny_decoder("Llama"))[1])
    assert [path.name for path in (tmp_path / "units").glob("*.safetensors")] == ["model.safetensors"]
    assert [path.name for path in (tmp_path / "thin").glob("*.safetensors")] == ["model.low_rank.safetensors"]


def test_a_model_that_was_there_is_replaced_as_a_whole(tmp_path: Path):
    save(*low_rank(tiny_decoder("Llama"))[:1], tmp_path / "model")
    small, plan = cut("mistral")
    save(small, tmp_path / "model", plan=plan)
    assert same_answers(partwise.load(tmp_path / "model"), small)
    assert not (tmp_path / "model" / "low_rank.json").exists()


# Plain networks


MLP = {"network": "mlp", "num_inputs": 20, "hidden": [12, 10], "num_classes": 3, "norm": True}
RESNET = {"network": "resnet", "channels": 3, "num_classes": 4, "stem": 4, "stages": [{"width": 4, "stride": 1, "inner": [6, 4]}]}


@pytest.mark.parametrize(("settings", "inputs"), [(MLP, rows(20)), (RESNET, images(8))], ids=["perceptron", "resnet"])
def test_networks_of_this_package_are_built_again_from_the_folder_alone(settings: dict[str, Any], inputs: Tensor, tmp_path: Path):
    network = with_statistics(build(settings)).eval()
    plan = Magnitude(keep=0.5).plan(network)
    small = apply(network, plan)
    save(small, tmp_path / "small", plan=plan, card="# Half\n")
    assert torch.equal(partwise.load(tmp_path / "small")(inputs), small(inputs))


def test_a_perceptron_of_this_package_with_layers_of_low_rank_comes_back_to_the_bit(tmp_path: Path):
    network = with_statistics(build(MLP)).eval()
    small = apply(network, plan := LoRD(rank=3).plan(network, torch.randn(40, 20)))
    assert set(plan.ranks) == {"layers.0", "layers.1"}
    save(small, tmp_path / "small", plan=plan)
    loaded = partwise.load(tmp_path / "small")
    assert ranks_of(loaded) == plan.ranks
    assert torch.equal(loaded(rows(20)), small(rows(20)))
    edit_json(tmp_path / "small" / "low_rank.json", lambda ranks: ranks.update({"layers.0": 4}))
    with pytest.raises(InputError, match=r"layers\.0\.0\.weight of the weights of .* is of shape \(3, 20\), but in the network it is of shape \(4, 20\)"):
        partwise.load(tmp_path / "small")


@pytest.mark.parametrize(("make", "inputs"), [(lambda: tiny_mlp(20, 12, 3), rows(20)), (tiny_resnet, images(16))], ids=["perceptron", "resnet"])
def test_a_network_of_your_own_is_cut_again_out_of_the_whole_one(make: Callable[..., nn.Module], inputs: Tensor, tmp_path: Path):
    plan = Magnitude(keep=0.5).plan(make())
    for as_mask in (False, True):
        small = apply(make(), plan, as_mask=as_mask)
        save(small, tmp_path / "small", plan=plan)
        assert torch.equal(partwise.load(tmp_path / "small", model=make())(inputs), small(inputs))


def test_a_network_of_your_own_with_layers_of_low_rank_comes_back_to_the_bit(tmp_path: Path):
    network = tiny_mlp(20, 12, 3)
    small = apply(network, plan := LoRD(rank=3).plan(network, torch.randn(40, 20)))
    save(small, tmp_path / "small", plan=plan)
    loaded = partwise.load(tmp_path / "small", model=tiny_mlp(20, 12, 3, seed=9))
    assert ranks_of(loaded) == {"0": 3}
    assert torch.equal(loaded(rows(20)), small(rows(20)))


def test_a_network_of_your_own_needs_its_plan(tmp_path: Path):
    with pytest.raises(InputError, match=r"got a Sequential, which partwise cannot build again, expected the plan too: .* Pass plan=\.") as caught:
        save(tiny_mlp(6, 8, 3), tmp_path / "small")
    assert caught.value.code == "unknown-network"
    with pytest.raises(InputError, match=r"got a tokenizer with a Sequential, which is no model of transformers\. Leave it out\."):
        save(tiny_mlp(6, 8, 3), tmp_path / "small", tokenizer=tiny_llama_tokenizer())
    assert list(tmp_path.iterdir()) == []


# Refusals


def test_a_plan_that_does_not_make_the_model_is_refused(tmp_path: Path):
    small, plan = cut("llama")
    smaller = apply(small, Magnitude(keep=0.5).plan(small))
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp has 6 units in this model, expected the 12 that the plan keeps\.") as caught:
        save(smaller, tmp_path / "small", plan=plan)
    assert caught.value.code == "plan-for-another-model"
    thin, low_rank_plan = low_rank(tiny_decoder("Llama"))
    other, _ = low_rank(tiny_decoder("Llama"), rank=4)
    with pytest.raises(InputError, match=r"q_proj is of rank 4 in this model and of rank 3 in the plan, expected the model that the plan makes\."):
        save(other, tmp_path / "small", plan=low_rank_plan)
    partly = LoRD(rank=3, layers=("*.mlp.*",)).plan(tiny_decoder("Llama"), TEXTS)
    with pytest.raises(InputError, match=r"q_proj is of rank 3 in this model and whole in the plan"):
        save(thin, tmp_path / "small", plan=partly)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_does_not_fit_a_model_that_was_pruned_already():
    small, plan = cut("llama")
    with pytest.raises(InputError, match=r"24 neurons in model\.layers\.0\.mlp, but this model has 12, .* that was pruned before needs a new plan"):
        apply(small, UnitPlan(method="", units=dict.fromkeys(plan.units, (0,)), scores=plan.scores))  # type: ignore[attr-defined]
    thin, low_rank_plan = low_rank(tiny_decoder("Llama"))
    with pytest.raises(InputError, match=r"q_proj is a partwise\.models\.low_rank_layers\.LowRankLinear, expected a plain Linear\."):
        apply(thin, low_rank_plan)
    with pytest.raises(InputError, match=r"q_proj is a partwise\.models\.low_rank_layers\.LowRankLinear, expected a plain Linear\. Cut units first"):
        Magnitude().plan(thin)


def test_a_quantised_model_is_refused(tmp_path: Path):
    small, plan = cut("llama")
    small.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(InputError, match=r"with a quantization_config, expected weights in floating point\. Dequantise the model first") as caught:
        save(small, tmp_path / "small", plan=plan)
    assert caught.value.code == "quantised-model"


def test_tied_weights_that_would_tear_are_refused(tmp_path: Path):
    small, plan = cut("llama-tied")
    small.lm_head.weight = nn.Parameter(small.lm_head.weight.detach().clone())
    with pytest.raises(InputError, match=r"are two tensors, but the configuration ties them, so one would be lost") as caught:
        save(small, tmp_path / "small", plan=plan)
    assert caught.value.code == "torn-ties"
    thin, _ = low_rank(tiny_decoder("Llama"))
    first, second = (thin.model.layers[layer].mlp.up_proj[0] for layer in (0, 1))
    second.weight = first.weight
    with pytest.raises(InputError, match=r"up_proj\.0\.weight are one tensor, but the configuration does not tie them"):
        save(thin, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_pickles_is_refused(tmp_path: Path):
    small, plan = cut("mamba2", of_whole_model)
    save(small, tmp_path / "small", plan=plan)
    (tmp_path / "small" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds pytorch_model\.bin: these can be pickles, which run code when they are loaded") as caught:
        partwise.load(tmp_path / "small")
    assert caught.value.code == "pickle-refused"


def test_sizes_of_layers_that_contradict_the_tensors_are_refused_with_tensor_and_sizes(tmp_path: Path):
    small, plan = cut("llama", of_whole_model)
    save(small, tmp_path / "small", plan=plan)
    width = small.model.layers[0].mlp.up_proj.out_features

    def widen(config: dict[str, Any]) -> None:
        config["per_layer_config"]["0"]["intermediate_size"] = width + 1

    edit_json(tmp_path / "small" / "config.json", widen)
    sizes = rf"has the shape \(({width}, 32|32, {width})\), but the configuration \(per_layer_config of layer 0: intermediate_size {width + 1}\) makes it"
    with pytest.raises(InputError, match=rf"model\.layers\.0\.mlp\.\w+_proj\.weight of .* {sizes}") as caught:
        partwise.load(tmp_path / "small")
    assert caught.value.code == "sizes-contradict"


@pytest.fixture
def thin(tmp_path: Path) -> Path:
    """A Llama whose layers are of rank 3."""
    save(low_rank(tiny_decoder("Llama"))[0], tmp_path / "thin")
    return tmp_path / "thin"


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("ranks", "code", "text"),
    [
        ({UP: 2}, "sizes-contradict", r"up_proj\.0\.weight of .* has the shape \(3, 32\), .* \(rank 2 in low_rank\.json\) makes it \(2, 32\)"),
        ({UP: 10**9}, "rank-out-of-range", r"up_proj has 32 inputs and 24 outputs, got a rank of 1000000000, expected 1 to 24"),
        ({UP: 0}, "bad-model-config", r"low_rank\.json does not map layers to ranks of at least 1"),
        ({UP: True}, "bad-model-config", r"low_rank\.json does not map layers to ranks of at least 1"),
        ({"model.layers.7.mlp.up_proj": 3}, "unknown-layer", r"LlamaForCausalLM has no layer model\.layers\.7\.mlp\.up_proj"),
        ({"model.norm": 3}, "unsupported-layer", r"model\.norm is a .*LlamaRMSNorm, expected a plain Linear"),
        ({UP: None}, "weights-do-not-match", r"lack 1 tensors that its configuration asks for, such as model\.layers\.0\.mlp\.up_proj\.weight"),
    ],
    ids=["another rank", "a huge rank", "zero", "no number", "unknown layer", "no linear layer", "a layer left out"],
)
def test_ranks_that_contradict_the_tensors_are_refused(thin: Path, ranks: dict[str, Any], code: str, text: str):
    def change(stored: dict[str, Any]) -> None:
        stored.update(ranks)
        for name in [name for name, rank in stored.items() if rank is None]:
            del stored[name]

    edit_json(thin / "low_rank.json", change)
    with pytest.raises(InputError, match=text) as caught:
        partwise.load(thin)
    assert caught.value.code == code


def test_tied_layers_in_a_folder_are_not_torn(tmp_path: Path):
    save(low_rank(tiny_decoder("Llama", tie_word_embeddings=True))[0], tmp_path / "thin")
    edit_json(tmp_path / "thin" / "low_rank.json", lambda ranks: ranks.update({"lm_head": 3}))
    with pytest.raises(InputError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one tensor, which two thin layers would tear apart"):
        partwise.load(tmp_path / "thin")


@pytest.mark.parametrize("content", ["[1, 2]", "{"])
def test_a_damaged_list_of_ranks_is_refused(thin: Path, content: str):
    (thin / "low_rank.json").write_text(content)
    with pytest.raises(partwise.checks.PartwiseError, match=r"low_rank\.json (does not map layers to ranks|is damaged)"):
        partwise.load(thin)


def test_weights_without_their_ranks_or_ranks_without_their_weights_are_refused(thin: Path):
    weights = thin / "model.low_rank.safetensors"
    content = (thin / "low_rank.json").read_text()
    (thin / "low_rank.json").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors, expected the weights there"):
        partwise.load(thin)
    (thin / "low_rank.json").write_text(content)
    edit_weights(weights, lambda tensors: tensors.update({"more": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"hold 1 tensors that its configuration does not know, such as more\."):
        partwise.load(thin)
    edit_weights(weights, lambda tensors: [tensors.pop("more"), tensors.pop(f"{UP}.1.weight")])
    with pytest.raises(InputError, match=r"lack 1 tensors that its configuration asks for, such as model\.layers\.0\.mlp\.up_proj\.1\.weight"):
        partwise.load(thin)
    weights.unlink()
    with pytest.raises(InputError, match=r"has no model\.low_rank\.safetensors, expected the weights there"):
        partwise.load(thin)


def test_a_model_of_low_rank_in_several_files_is_read_through_its_index(tmp_path: Path):
    small, _ = low_rank(tiny_decoder("Llama"))
    save(small, tmp_path / "thin")
    (tmp_path / "thin" / "model.low_rank.safetensors").unlink()
    small.save_pretrained(tmp_path / "thin", variant="low_rank", max_shard_size="10KB")
    assert (tmp_path / "thin" / "model.safetensors.index.low_rank.json").is_file()
    assert same_answers(partwise.load(tmp_path / "thin"), small)


def test_loading_leaves_the_class_alone(thin: Path):
    before = transformers.LlamaForCausalLM.__init__
    partwise.load(thin)
    edit_json(thin / "low_rank.json", lambda ranks: ranks.update({"no.such": 3}))
    with pytest.raises(InputError, match=r"no layer no\.such"):
        partwise.load(thin)
    assert transformers.LlamaForCausalLM.__init__ is before
    assert ranks_of(tiny_decoder("Llama")) == {}


def test_loading_does_not_depend_on_random_numbers(thin: Path):
    first: Any = partwise.load(thin)
    torch.manual_seed(1)
    second: Any = partwise.load(thin)
    for name, tensor in tensors_of(first).items():
        assert_close(tensors_of(second)[name], tensor, claim=name, rtol=0, atol=0)


KILL_A_WRITER_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
import partwise
from partwise.atomic_files import clear_leftovers
from partwise.prune import LoRD, Magnitude, apply, save
from tiny import tiny_decoder

torch.set_num_threads(1)
model, ids = tiny_decoder("Llama"), torch.arange(3, 19).view(2, 8)
plans = [Magnitude().plan(model), Magnitude(scope="model").plan(model), LoRD(rank=3).plan(model, ids)]
smalls = [apply(model, plan) for plan in plans]
expected = [small(ids).logits for small in smalls]
folder, delay, num_in_flight, num_kills, was_there = Path(sys.argv[1]) / "model", random.Random(0), 0, 0, False
while num_kills < 30 or num_in_flight < 5 or not was_there:
    num_kills += 1
    child = os.fork()
    if child == 0:
        while True:
            for small, plan in zip(smalls, plans):
                save(small, folder, plan=plan)
    time.sleep(delay.uniform(0.0, 0.05 + 0.005 * num_kills))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    num_in_flight += any(path.name.startswith(".") for path in folder.parent.iterdir())
    clear_leftovers(folder.parent)
    assert [path.name for path in folder.parent.iterdir()] in ([], ["model"])
    assert folder.exists() or not was_there, "a model that was saved is gone"
    was_there = folder.exists()
    if was_there:
        loaded = partwise.load(folder)
        assert sum(torch.equal(loaded(ids).logits, logits) for logits in expected) == 1
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_the_old_model_or_the_new_one_or_none(tmp_path: Path, repository: Path):
    command = [sys.executable, "-c", textwrap.dedent(KILL_A_WRITER_AGAIN_AND_AGAIN), str(tmp_path), str(repository / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_family_that_is_cut_is_saved_here():
    tested = {DECODERS[family][0]().config.model_type for family in DECODERS} | {"vit", "gpt2"}
    known = {build().config.model_type for name, (build, _) in FAMILIES.items() if not name.startswith(("mlp", "resnet"))}
    assert tested == known


def test_a_gpt2_is_an_ordinary_checkpoint_too(tmp_path: Path):
    build_gpt2, inputs = FAMILIES["gpt2"]
    model = build_gpt2()
    small = apply(model, plan := Magnitude(keep=0.5).plan(model))
    save(small, tmp_path / "small", plan=plan)
    assert torch.equal(outputs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval(), inputs), outputs(small, inputs))
