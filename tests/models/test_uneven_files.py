"""Claims about models with layers of different size as files: what is saved is what is loaded, and what does not fit is refused by name."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import partwise
from model_families import IDS
from partwise.checks import InputError, RunError
from partwise.models import BlockAxis, Part, coupled_axes, extract, mask
from partwise.models.uneven_files import FAMILIES, load_uneven, save_uneven
from tiny import tiny_bert, tiny_decoder, tiny_gpt2, tiny_llama_tokenizer, tiny_mamba2, tiny_neox, tiny_vit
from tolerances import assert_close

BUILDERS: dict[str, Callable[..., Any]] = {
    "llama": lambda: tiny_decoder("Llama"),
    "llama-tied": lambda: tiny_decoder("Llama", tie_word_embeddings=True),
    "mistral": lambda: tiny_decoder("Mistral"),
    "qwen2": lambda: tiny_decoder("Qwen2"),
    "qwen3": lambda: tiny_decoder("Qwen3"),
    "gpt2": tiny_gpt2,
    "gpt-neox": tiny_neox,
    "mamba2": tiny_mamba2,
    "mamba2-tied-in-two-groups": lambda: tiny_mamba2(tie_word_embeddings=True, n_groups=2),
}
EVERY_FAMILY = pytest.mark.parametrize("family", BUILDERS)
WORDS = {"max_new_tokens": 6, "do_sample": False}


def uneven_part(model: Any, *, first: int = 2, second: int = 4) -> Part:
    """``first`` of the units of each group of the first layer, and ``second`` of the others'."""
    groups = getattr(model.config, "n_groups", 1)
    units = {}
    for axis in coupled_axes(model):
        assert not isinstance(axis, BlockAxis)
        size = axis.size // groups
        kept = first if ".0." in axis.name else second
        units[axis.name] = tuple(group * size + unit for group in range(groups) for unit in range(1 if kept < size else 0, size)[:kept])
    return Part(units)


def uneven(model: Any, **counts: int) -> Any:
    return extract(model, uneven_part(model, **counts))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An uneven Llama, 2 head groups and 2 neurons in the first layer, 4 and 4 in the second."""
    save_uneven(uneven(tiny_decoder("Llama")), tmp_path / "model")
    return tmp_path / "model"


def test_every_family_of_files_is_tested():
    modules = [importlib.import_module(f"partwise.models.{name}") for name in FAMILIES]
    tested = {build().config.model_type for build in BUILDERS.values()} | {"vit"}
    assert tested == {model_type for module in modules for model_type in module.MODEL_TYPES}


@EVERY_FAMILY
def test_an_uneven_model_computes_what_the_masked_one_computes_and_loads_to_the_same_bits(family: str, tmp_path: Path):
    model = BUILDERS[family]()
    part = uneven_part(model)
    small = extract(model, part)
    assert small.config.to_dict()["per_layer_config"], "the layers differ, or nothing would be tested"
    assert_close(small(IDS).logits, mask(model, part)(IDS).logits, claim="slicing is masking", rtol=0, atol=1e-5)
    save_uneven(small, tmp_path / "small")
    loaded: Any = partwise.load(tmp_path / "small")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(loaded(IDS).logits, small(IDS).logits)
    assert torch.equal(loaded.generate(IDS, **WORDS), small.generate(IDS, **WORDS))
    assert loaded.config.to_dict()["per_layer_config"] == small.config.to_dict()["per_layer_config"]
    assert {path.suffix for path in (tmp_path / "small").iterdir()} == {".json", ".safetensors"}


@EVERY_FAMILY
def test_layers_of_one_size_are_an_ordinary_checkpoint_for_stock_transformers(family: str, tmp_path: Path):
    model = BUILDERS[family]()
    part = uneven_part(model, first=2, second=2)
    save_uneven(extract(model, part), tmp_path / "small")
    assert "per_layer_config" not in json.loads((tmp_path / "small" / "config.json").read_text())
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert_close(stock(IDS).logits, mask(model, part)(IDS).logits, claim="slicing is masking", rtol=0, atol=1e-5)
    assert torch.equal(stock(IDS).logits, partwise.load(tmp_path / "small")(IDS).logits)


@pytest.mark.parametrize("name", ["llama-stdlib-5m", "mamba2-stdlib-2m"])
def test_trained_models_cut_to_another_size_in_every_layer_keep_every_bit(name: str, tmp_path: Path, repository: Path):
    folder = repository.parent / "shared" / "models" / name
    if not folder.exists():
        pytest.skip(f"needs {folder}")
    model: Any = load_uneven(folder)
    units = {
        axis.name: tuple(range(position % 3, axis.size, 2 + position % 3))
        for position, axis in enumerate(coupled_axes(model))
        if axis.kind != "heads"
    }
    ids = torch.arange(5, 45)[None]  # (1, 40)
    exact = model.double()  # in float32 the order of a sum over hundreds of neurons is worth 1e-5 in logits of 12
    assert_close(extract(exact, Part(units))(ids).logits, mask(exact, Part(units))(ids).logits, claim="slicing is masking", rtol=0, atol=1e-5)
    small = extract(load_uneven(folder), Part(units))
    save_uneven(small, tmp_path / "small")
    loaded: Any = load_uneven(tmp_path / "small")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(ids).logits, small(ids).logits)
    assert torch.equal(loaded.generate(ids, **WORDS), small.generate(ids, **WORDS))


def test_a_vit_is_saved_and_loaded_like_the_others(tmp_path: Path):
    model = tiny_vit()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    save_uneven(model, tmp_path / "vit")
    assert torch.equal(load_uneven(tmp_path / "vit")(images).logits, model(images).logits)


def test_half_precision_and_ties_survive(tmp_path: Path):
    small = uneven(tiny_decoder("Llama", tie_word_embeddings=True)).to(torch.bfloat16)
    save_uneven(small, tmp_path / "small")
    loaded: Any = load_uneven(tmp_path / "small")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(IDS).logits, small(IDS).logits)


def test_a_loaded_model_can_be_cut_saved_and_loaded_again(tmp_path: Path):
    save_uneven(uneven(tiny_mamba2()), tmp_path / "once")
    once: Any = load_uneven(tmp_path / "once")
    twice = extract(once, Part({"backbone.layers.1.mixer.state": (0, 3)}))
    assert twice.config.state_size == 2
    save_uneven(twice, tmp_path / "once")
    assert torch.equal(load_uneven(tmp_path / "once")(IDS).logits, twice(IDS).logits), "what was there is replaced"


def test_a_tokenizer_and_further_files_lie_beside_the_model(tmp_path: Path):
    save_uneven(uneven(tiny_mamba2()), tmp_path / "small", tokenizer=tiny_llama_tokenizer(), extra={"README.md": b"# Small\n"})
    assert (tmp_path / "small" / "README.md").read_text() == "# Small\n"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "small")("the film").input_ids


def test_a_model_in_several_files_is_read_through_its_index(tmp_path: Path):
    small = uneven(tiny_decoder("Mistral"))
    small.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(load_uneven(tmp_path)(IDS).logits, small(IDS).logits)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(InputError, match=r"has no model-00002-of-\d+\.safetensors, expected the weights there\."):
        load_uneven(tmp_path)


def test_saving_leaves_the_model_and_its_class_alone(tmp_path: Path):
    model = uneven(tiny_decoder("Qwen3"))
    block = type(model.model.layers[0])
    before, logits, config = block.__init__, model(IDS).logits, model.config.to_dict()
    save_uneven(model, tmp_path / "small")
    load_uneven(tmp_path / "small")
    assert block.__init__ is before
    assert torch.equal(model(IDS).logits, logits)
    of_save_pretrained = {"architectures": ["Qwen3ForCausalLM"], "dtype": "float32"}
    assert model.config.to_dict() == config | of_save_pretrained


def test_a_failed_save_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    model = uneven(tiny_decoder("Mistral"))
    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(RunError, match="No space left on device"):
        save_uneven(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_code_in_the_folder_is_not_run(saved: Path, tmp_path: Path):
    trace = tmp_path / "was-run"
    (saved / "modeling.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Model: ...\n")
    edit_config(saved, lambda settings: settings.update(auto_map={"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Model"}))
    load_uneven(saved)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "old.pkl"])
def test_a_folder_with_a_pickle_is_refused_before_anything_is_read(name: str, saved: Path):
    (saved / name).write_bytes(b"\x80\x04.")
    (saved / "config.json").unlink()
    with pytest.raises(
        InputError, match=rf"holds {name}: these can be pickles, which run code when they are loaded; expected only safetensors and JSON"
    ):
        partwise.load(saved)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda settings: settings["per_layer_config"]["0"].update(intermediate_size=3),
            r"model\.layers\.0\.mlp\.(gate|up|down)_proj\.weight of .*model has the shape \((2, 32|32, 2)\), but the configuration "
            r"\(per_layer_config of layer 0: .*"
            r"intermediate_size 3.*\) makes it \((3, 32|32, 3)\)\. Check that both belong together",
        ),
        (
            lambda settings: settings["per_layer_config"].pop("0"),
            r"layers\.0\..* has the shape .*, but the configuration .*makes it \(",
        ),
        (lambda settings: settings.pop("per_layer_config"), r"layers\.0\..* has the shape .*, but the configuration makes it \("),
        (lambda settings: settings.update(num_hidden_layers=3), r"have 2 layers, but num_hidden_layers in config\.json is 3\. Check"),
        (lambda settings: settings.update(num_hidden_layers=10**12), r"have 2 layers, but num_hidden_layers in config\.json is 1000000000000"),
        (lambda settings: settings.update(vocab_size=10**9), r"has the shape \(24, 32\), but the configuration makes it \(1000000000, 32\)"),
    ],
    ids=["one-attribute", "one-layer", "all-layers", "a-layer-more", "layers-without-end", "a-huge-vocabulary"],
)
def test_a_configuration_that_contradicts_its_tensors_is_refused_with_the_tensor_and_both_sizes(change: Any, text: str, saved: Path):
    edit_config(saved, change)
    with pytest.raises(InputError, match=text) as caught:
        partwise.load(saved)
    assert caught.value.code == "sizes-contradict"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda settings: settings["per_layer_config"]["0"].update(intermediate_size=0),
            r"of layer 0 sets intermediate_size to 0, not to a number of at",
        ),
        (
            lambda settings: settings["per_layer_config"]["0"].update(intermediate_size="9"),
            r"of layer 0 sets intermediate_size to '9', not to a number",
        ),
        (lambda settings: settings["per_layer_config"].update(last={}), r"per_layer_config names the layer 'last', not a number"),
        (lambda settings: settings["per_layer_config"].update({"7": {"intermediate_size": 3}}), r"range \[0, 2\); got \[7\]"),
        (lambda settings: settings.update(per_layer_config=[1]), r"per_layer_config does not map layers to their attributes"),
        (lambda settings: settings.update(hidden_size="wide"), r"config\.json cannot be used: .*hidden_size"),
        (lambda settings: settings.pop("architectures"), r"architectures is None, not a list with the name of one class"),
        (lambda settings: settings.pop("model_type"), r"model_type is None, not the name of a family"),
        (lambda settings: settings.update(dtype=16), r"dtype is 16, not the name of one"),
        (lambda settings: settings.update(pad_token_id=10**6), r"cannot be used: Padding_idx must be within num_embeddings\."),
    ],
    ids=["zero", "text", "no-layer", "layer-out-of-range", "list", "text-for-a-number", "no-architecture", "no-type", "no-dtype", "no-token"],
)
def test_a_configuration_that_makes_no_model_is_refused_with_the_reason(change: Any, text: str, saved: Path):
    edit_config(saved, change)
    with pytest.raises(InputError, match=text) as caught:
        partwise.load(saved)
    assert caught.value.code == "bad-model-config"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"architectures": ["BertModel"], "model_type": "bert"},
            r"a BertModel of type 'bert', expected a class of transformers of one of the types llama, ",
        ),
        ({"architectures": ["MistralForCausalLM"]}, r"a MistralForCausalLM of type 'llama'"),
        (
            {"architectures": ["LlamaConfig"]},
            r"a LlamaConfig of type 'llama', expected a class of transformers of one of the types .*gpt_neox, mamba2, vit\.",
        ),
        ({"architectures": ["os.system"]}, r"a os\.system of type 'llama'"),
    ],
)
def test_an_architecture_that_is_not_known_is_refused_and_the_known_ones_are_listed(settings: dict[str, Any], text: str, saved: Path):
    edit_config(saved, lambda old: old.update(settings))
    with pytest.raises(InputError, match=text):
        partwise.load(saved)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            r"lack 1 tensors that its configuration asks for, such as model\.layers\.1\.mlp\.up",
        ),
        (lambda tensors: tensors.update(surplus=torch.zeros(1)), r"hold 1 tensors that its configuration does not know, such as surplus\."),
    ],
    ids=["missing", "surplus"],
)
def test_tensors_that_are_missing_or_too_many_are_named(change: Any, text: str, saved: Path):
    edit_weights(saved, change)
    with pytest.raises(InputError, match=text):
        partwise.load(saved)


def test_a_missing_tensor_of_an_ordinary_checkpoint_is_not_drawn_at_random(tmp_path: Path):
    save_uneven(tiny_decoder("Llama"), tmp_path / "even")
    edit_weights(tmp_path / "even", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(InputError, match=r"lack 1 tensors that its configuration asks for, such as model\.norm\.weight\."):
        partwise.load(tmp_path / "even")


def test_missing_and_damaged_files_are_named(saved: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere is not a folder: expected one that holds an adapter or a model"):
        partwise.load(tmp_path / "nowhere")
    weights = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match=r"the weights of .*model cannot be read \(.*\)\. Copy or save the model again\."):
        partwise.load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model has no model\.safetensors, expected the weights there\."):
        partwise.load(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        partwise.load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(
        InputError, match=r"model has no config\.json, expected a model as this package or save_pretrained writes it\. Check the path\."
    ):
        partwise.load(saved)
    with pytest.raises(InputError, match=r"model has no config\.json, expected a model as save_pretrained writes it"):
        load_uneven(saved)


def test_an_index_cannot_lead_out_of_its_folder(saved: Path, tmp_path: Path):
    shutil.move(saved / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(InputError, match=r"has no \.\./elsewhere\.safetensors, expected the weights there"):
        partwise.load(saved)


def test_ties_that_would_tear_are_refused_by_both_names(tmp_path: Path):
    torn = uneven(tiny_decoder("Llama", tie_word_embeddings=True))
    torn.lm_head.weight = nn.Parameter(torn.lm_head.weight.detach() + 1)
    text = r"model\.embed_tokens\.weight and lm_head\.weight are two tensors, but the configuration ties them, so one would be lost\. Tie them with"
    with pytest.raises(InputError, match=text):
        save_uneven(torn, tmp_path / "torn")
    shared = uneven(tiny_decoder("Llama"))
    shared.lm_head.weight = shared.model.embed_tokens.weight
    text = (
        r"model\.embed_tokens\.weight and lm_head\.weight are one tensor, but the configuration does not tie them, so they would be two when loaded"
    )
    with pytest.raises(InputError, match=text):
        save_uneven(shared, tmp_path / "torn")
    alike = uneven(tiny_decoder("Llama"))
    alike.lm_head.weight.data = alike.model.embed_tokens.weight.data
    with pytest.raises(InputError, match=text):
        save_uneven(alike, tmp_path / "torn")
    assert not list(tmp_path.iterdir())


def test_weights_of_several_dtypes_are_refused_because_a_configuration_names_one(tmp_path: Path):
    model = uneven(tiny_mamba2()).to(torch.bfloat16)
    model.backbone.layers[0].mixer.A_log.data = model.backbone.layers[0].mixer.A_log.data.float()
    text = r"in bfloat16 and backbone\.layers\.0\.mixer\.A_log in float32, expected one dtype: config\.json names one, .* model\.to\(torch\.bfloat16\) or"
    with pytest.raises(InputError, match=text):
        save_uneven(model, tmp_path / "model")


def test_a_file_that_does_not_allow_global_reading_is_opened_too(saved: Path):
    before = load_uneven(saved)(IDS).logits
    edit_config(saved, lambda settings: settings.pop("allow_global_per_layer_attribute_access"))
    assert torch.equal(load_uneven(saved)(IDS).logits, before)


def test_a_model_whose_configuration_is_not_its_own_is_refused_before_anything_is_written(tmp_path: Path):
    model = uneven(tiny_decoder("Mistral"))
    model.config.per_layer_config = {0: {"intermediate_size": 5}}
    with pytest.raises(InputError, match=r"of the MistralForCausalLM has the shape .*, but the configuration .*makes it"):
        save_uneven(model, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_models_that_are_no_plain_class_of_a_known_family_are_refused(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"got a BertForSequenceClassification of type 'bert', expected a class of transformers of one of the types llama"
    ):
        save_uneven(tiny_bert(), tmp_path / "model")
    with pytest.raises(InputError, match=r"got a Linear of type None"):
        save_uneven(nn.Linear(2, 2), tmp_path / "model")

    class LlamaForCausalLM(transformers.LlamaForCausalLM):
        """Has the name of the stock class, and perhaps another forward pass."""

    with pytest.raises(InputError, match=r"got a LlamaForCausalLM of type 'llama'"):
        save_uneven(LlamaForCausalLM(tiny_decoder("Llama").config), tmp_path / "model")
    peft = importlib.import_module("peft")
    with pytest.raises(InputError, match=r"Merge adapters and unwrap the model first"):
        save_uneven(peft.get_peft_model(tiny_decoder("Llama"), peft.LoraConfig(target_modules=["v_proj"])), tmp_path / "model")


def test_quantised_models_are_refused(saved: Path, tmp_path: Path):
    edit_config(saved, lambda settings: settings.update(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}))
    with pytest.raises(InputError, match=r"with a quantization_config, expected weights in floating point\. Dequantise the model first"):
        partwise.load(saved)
    model = tiny_decoder("Llama")
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(InputError, match=r"got the LlamaForCausalLM with a quantization_config"):
        save_uneven(model, tmp_path / "model")


def test_a_folder_or_file_that_is_no_model_is_never_replaced(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    for place, text in (
        (tmp_path, r"is there already and is no model"),
        (tmp_path / "notes.txt", r"notes\.txt is a file, expected the name of a folder"),
    ):
        with pytest.raises(InputError, match=text):
            save_uneven(tiny_decoder("Llama"), place)
    assert (tmp_path / "notes.txt").read_text() == "mine"
