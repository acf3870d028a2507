"""Models of transformers whose layers may differ in size, as folders that need no code of ours inside.

``save_uneven`` writes ``config.json`` and safetensors. Where all layers agree, that is an ordinary checkpoint, which stock ``from_pretrained`` opens. Where
they differ, the sizes stand in ``per_layer_config``, the schema of transformers; its models do not read it yet, so ``load_uneven`` builds the layers. Both
compare every tensor with what the configuration asks for, before anything is written or allocated.

Layers of low rank are told in ``low_rank.json``, which no other code reads. The weights of such a model lie in a file of another name, so that stock code finds
none and says so, instead of drawing the missing ones at random.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise import atomic_files
from partwise.checks import InputError, load_extra
from partwise.models.loading import quiet
from partwise.models.names import locate
from partwise.models.uneven import per_layer_blocks

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from types import ModuleType

    from torch import Tensor, nn

__all__ = ["FAMILIES", "load_uneven", "refuse_other_content", "save_uneven"]

# Families of transformers models that can be cut into parts; each says in SIZES which attributes may differ between layers.
FAMILIES = ("llama", "gpt2", "neox", "mamba2", "vit")
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LOW_RANK = "low_rank"  # in the names of the weights of a model with such layers, as in model.low_rank.safetensors

Shape = tuple[int, ...]


def save_uneven(model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None, extra: Mapping[str, bytes] | None = None) -> None:
    """Write a model so that it loads without remote code and without pickles; the folder appears whole or not at all.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of the families Llama, Mistral, Qwen2, Qwen3, GPT-2, GPT-NeoX, Mamba2 or ViT, as transformers made it or as ``partwise.models.extract`` or
        ``partwise.prune.apply`` did.
    folder : str or path
        Target; a model that is already there is replaced.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Saved beside the model.
    extra : mapping of str to bytes, optional
        Further files by name, such as a model card.

    Raises
    ------
    InputError
        ``unknown-architecture`` for another class; ``mixed-dtypes``; ``torn-ties`` when loading would tie weights that differ, or tear those that are one;
        ``sizes-contradict`` and ``weights-do-not-match`` when the configuration is not that of the tensors; ``quantised-model``; ``not-a-model-folder`` when
        something else is at ``folder``.
    RunError
        ``disk-full`` or ``cannot-write``; what was there before is then intact.
    """
    folder = Path(folder).expanduser()
    transformers = load_extra("transformers", extra="hf")
    from partwise.models import low_rank_layers

    config = getattr(model, "config", None)
    _class_of(type(model).__name__, getattr(config, "model_type", None), where=f"a {type(model).__name__}", model=model)
    assert config is not None
    _refuse_quantised(config.to_dict(), where=f"the {type(model).__name__}")
    refuse_other_content(folder)
    _refuse_torn_ties(model)
    _refuse_mixed_dtypes(model)
    ranks = low_rank_layers.ranks_of(model)
    with quiet(transformers):
        expected, tied = _expected_shapes(type(model), config, ranks, where=f"the {type(model).__name__}")
        saved = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        _compare(saved, expected, tied=tied, where=f"the {type(model).__name__}", config=config, ranks=ranks, strict=True)
        with atomic_files.write_folder(folder) as temporary:
            model.save_pretrained(temporary, variant=LOW_RANK if ranks else None)  # type: ignore[operator]
            if ranks:
                atomic_files.write_json(temporary / low_rank_layers.RANKS, ranks)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            for name, data in (extra or {}).items():
                atomic_files.write_atomic(temporary / name, data)


def load_uneven(folder: str | os.PathLike[str]) -> nn.Module:
    """Open what `save_uneven` or ``save_pretrained`` wrote, in evaluation mode and in the dtype of the file. No code of the folder is run.

    Parameters
    ----------
    folder : str or path
        Holds ``config.json`` and ``model.safetensors``, or several of them with their index.

    Returns
    -------
    torch.nn.Module
        Of the class that the configuration names.

    Raises
    ------
    InputError
        ``folder-missing``, ``pickle-refused``, ``model-incomplete``, ``unknown-architecture``, ``bad-model-config``, ``quantised-model``, ``damaged-weights``,
        ``sizes-contradict`` (naming the tensor and both sizes) or ``weights-do-not-match``; for layers of low rank also ``unknown-layer``,
        ``unsupported-layer``, ``torn-ties`` or ``rank-out-of-range``.
    RunError
        ``file-unreadable`` or ``file-damaged`` for ``config.json``.
    """
    folder = Path(folder).expanduser()
    atomic_files.refuse_pickles(folder)
    transformers = load_extra("transformers", extra="hf")
    from partwise.models import low_rank_layers

    settings, ranks = _settings_of(folder), low_rank_layers.read_ranks(folder)
    [architecture] = settings["architectures"]
    kind = _class_of(architecture, settings["model_type"], where=f"{folder / CONFIG}, a {architecture}")
    _refuse_quantised(settings, where=str(folder))
    variant = LOW_RANK if ranks else None
    found = _shapes_in(folder, variant=variant, renamed=getattr(_families()[settings["model_type"]], "RENAMED", {}))
    with quiet(transformers):
        config = _config_of(kind, folder, settings, found)
        expected, tied = _expected_shapes(kind, config, ranks, where=str(folder / CONFIG))
        _compare(found, expected, tied=tied, where=str(folder), config=config, ranks=ranks, strict=config.is_heterogeneous)
        options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True, "variant": variant}
        with _readable_config(folder / CONFIG), _built_layer_by_layer(config), _built_thin(kind, ranks), _sound_weights(folder):
            model, info = kind.from_pretrained(folder, config=config, **options)
    for name, shape, wanted in sorted(info["mismatched_keys"]):  # of names that stock code translates, so that they could not be compared before
        _compare({name: tuple(shape)}, {name: tuple(wanted)}, tied=tied, where=str(folder), config=config, ranks=ranks, strict=False)
    if info["missing_keys"]:  # would be drawn at random without a word
        raise _misses(folder, sorted(info["missing_keys"]))
    if ranks and info["unexpected_keys"]:
        raise _surplus(folder, sorted(info["unexpected_keys"]))
    return model.eval()  # type: ignore[no-any-return]


def _settings_of(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``, with the entries that say which class to build."""
    if not (folder / CONFIG).is_file():
        raise InputError("model-incomplete", f"{folder} has no {CONFIG}, expected a model as save_pretrained writes it. Check the path.")
    settings = atomic_files.read_json(folder / CONFIG)
    if not isinstance(settings, dict):
        raise _bad_config(folder / CONFIG, f"it holds a {type(settings).__name__}, not an object")
    architectures = settings.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise _bad_config(folder / CONFIG, f"architectures is {architectures!r}, not a list with the name of one class")
    if not isinstance(settings.get("model_type"), str):
        raise _bad_config(folder / CONFIG, f"model_type is {settings.get('model_type')!r}, not the name of a family")
    if not isinstance(settings.get("dtype"), str | None):
        raise _bad_config(folder / CONFIG, f"dtype is {settings['dtype']!r}, not the name of one")
    return settings


def _families() -> dict[str, ModuleType]:
    modules = [importlib.import_module(f"partwise.models.{name}") for name in FAMILIES]
    return {model_type: module for module in modules for model_type in module.MODEL_TYPES}


def _class_of(architecture: str, model_type: object, *, where: str, model: nn.Module | None = None) -> type[Any]:
    """The class of transformers with this name; never one from anywhere else."""
    import transformers

    families = _families()
    kind = getattr(transformers, architecture, None) if model_type in families and architecture.isidentifier() else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and (model is None or type(model) is kind):
        known: type[Any] = kind
        if known.config_class.model_type == model_type:
            return known
    raise InputError(
        "unknown-architecture",
        f"got {where} of type {model_type!r}, expected a class of transformers of one of the types {', '.join(families)}. "
        "Merge adapters and unwrap the model first, or use save_pretrained and from_pretrained.",
    )


def _refuse_quantised(settings: Mapping[str, Any], *, where: str) -> None:
    if settings.get("quantization_config") is not None:
        raise InputError(
            "quantised-model",
            f"got {where} with a quantization_config, expected weights in floating point. Dequantise the model first, model.dequantize().",
        )


def refuse_other_content(folder: Path) -> None:
    """Refuse to replace a folder, which is done as a whole, unless what is there is a model."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise InputError(
            "not-a-model-folder", f"{folder} is there already and is no model, expected a new name or a model to replace. Choose another folder."
        )
    if folder.exists() and not folder.is_dir():
        raise InputError("not-a-model-folder", f"{folder} is a file, expected the name of a folder. Choose another name.")


def _refuse_torn_ties(model: Any) -> None:
    """Tied weights are saved once and tied again by the configuration: they must share their memory where it says so, and nowhere else."""
    names: dict[int, list[str]] = {}
    places = {name: _place(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, place in places.items():
        names.setdefault(place, []).append(name)
    declared: dict[str, str] = model.all_tied_weights_keys
    for second, first in declared.items():
        if first in places and second in places and places[first] != places[second]:
            raise InputError(
                "torn-ties",
                f"{first} and {second} are two tensors, but the configuration ties them, so one would be lost. Tie them with model.tie_weights(), or set "
                "model.config.tie_word_embeddings to False and call model.tie_weights().",
            )
    for same in names.values():
        if loose := [name for name in same[1:] if name not in declared and same[0] not in declared]:
            raise InputError(
                "torn-ties",
                f"{same[0]} and {loose[0]} are one tensor, but the configuration does not tie them, so they would be two when loaded. Give each place a "
                "tensor of its own, or set model.config.tie_word_embeddings if these are the embeddings.",
            )


def _place(tensor: Tensor) -> int:
    """The same for tensors that share their memory."""
    return id(tensor) if tensor.is_meta or not tensor.numel() else tensor.untyped_storage().data_ptr()


def _refuse_mixed_dtypes(model: nn.Module) -> None:
    """A configuration names one dtype, and all weights are loaded in it."""
    dtypes = {str(tensor.dtype).removeprefix("torch."): name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if len(dtypes) > 1:
        (first, one), (second, other), *_ = dtypes.items()
        raise InputError(
            "mixed-dtypes",
            f"got {one} in {first} and {other} in {second}, expected one dtype: config.json names one, and everything is loaded in it. Call "
            f"model.to(torch.{first}) or model.to(torch.{second}) first.",
        )


def _config_of(kind: type[Any], folder: Path, settings: Mapping[str, Any], found: Mapping[str, Shape]) -> Any:
    """The configuration as its own class reads it, after what would take long to build has been refused."""
    layers = {layer for layer, _ in map(locate, found) if layer is not None}
    for name in ("num_hidden_layers", "n_layer"):
        if isinstance(number := settings.get(name), int) and number != len(layers):
            raise InputError(
                "sizes-contradict",
                f"the weights of {folder} have {len(layers)} layers, but {name} in {CONFIG} is {number}. Check that both belong together.",
            )
    _check_overrides(settings, folder / CONFIG)
    with _readable_config(folder / CONFIG):
        values, _ = kind.config_class.get_config_dict(folder)
        # Validators of some configurations read the global value; files of others may not say that they may.
        return kind.config_class.from_dict(values | ({"allow_global_per_layer_attribute_access": True} if settings.get("per_layer_config") else {}))


def _check_overrides(settings: Mapping[str, Any], path: Path) -> None:
    """Refuse a ``per_layer_config`` that is not layers -> attributes, with counts where a family's sizes are."""
    overrides = settings.get("per_layer_config") or {}
    sizes = _families()[settings["model_type"]].SIZES
    if not isinstance(overrides, dict) or not all(isinstance(of_layer, dict) for of_layer in overrides.values()):
        raise _bad_config(path, "per_layer_config does not map layers to their attributes")
    for layer, of_layer in overrides.items():
        if not layer.isdecimal():
            raise _bad_config(path, f"per_layer_config names the layer {layer!r}, not a number")
        for name in sizes:
            if name in of_layer and (type(of_layer[name]) is not int or of_layer[name] < 1):
                raise _bad_config(path, f"per_layer_config of layer {layer} sets {name} to {of_layer[name]!r}, not to a number of at least 1")


def _expected_shapes(kind: type[Any], config: Any, ranks: Mapping[str, int], *, where: str) -> tuple[dict[str, Shape], set[str]]:
    """Shapes of all tensors that a configuration asks for, without allocating them; and the names of those that are tied to another."""
    import torch

    with _readable_config(where), torch.device("meta"), _built_layer_by_layer(config), _built_thin(kind, ranks):
        model = kind(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, set(model.all_tied_weights_keys)


def _shapes_in(folder: Path, *, variant: str | None, renamed: Mapping[str, str]) -> dict[str, Shape]:
    """Shapes of all tensors in the safetensors files of a folder, read from their headers, under their names in the model."""
    from safetensors import safe_open

    # As transformers names a variant: in front of the last suffix.
    weights, listed = (f"{Path(name).stem}.{variant}{Path(name).suffix}" if variant else name for name in (WEIGHTS, INDEX))
    files = {weights}
    if not (folder / weights).is_file() and (folder / listed).is_file():
        index = atomic_files.read_json(folder / listed)
        files = set(index["weight_map"].values()) if isinstance(index, dict) and isinstance(index.get("weight_map"), dict) else set()
    missing = sorted(str(name) for name in files if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file())
    if missing or not files:
        raise InputError(
            "model-incomplete", f"{folder} has no {', '.join(missing) or weights}, expected the weights there. Download or save the model again."
        )
    shapes: dict[str, Shape] = {}
    for file in sorted(files):
        with _sound_weights(folder), safe_open(folder / file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - it is no mapping
    return {renamed.get(name, name): shape for name, shape in shapes.items()}


def _compare(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], *, tied: set[str], where: object, config: Any, ranks: Mapping[str, int], strict: bool
) -> None:
    """Refuse tensors that differ from what the configuration asks for.

    Surplus names may be former ones that stock code knows how to read; ``strict`` refuses them.
    """
    for name, shape in found.items():
        if name in expected and shape != expected[name]:
            raise InputError(
                "sizes-contradict",
                f"{name} of {where} has the shape {shape}, but the configuration{_own_sizes(name, config, ranks)} makes it {expected[name]}. Check that both "
                "belong together, or save the model again.",
            )
    missing, surplus = sorted(set(expected) - set(found) - tied), sorted(set(found) - set(expected) - tied)
    if missing and (strict or not surplus):
        raise _misses(where, missing)
    if surplus and strict:
        raise _surplus(where, surplus)


def _own_sizes(name: str, config: Any, ranks: Mapping[str, int]) -> str:
    """What ``low_rank.json`` or ``per_layer_config`` say of the layer that a tensor belongs to."""
    thin = next((thin for thin in ranks if name.startswith(f"{thin}.")), None)
    if thin is not None:
        return f" (rank {ranks[thin]} in low_rank.json)"
    layer, _ = locate(name)
    if layer is None or not config.is_heterogeneous:
        return ""
    overrides = config.to_dict()["per_layer_config"].get(str(layer), {})
    return f" (per_layer_config of layer {layer}: {', '.join(f'{key} {value}' for key, value in overrides.items()) or 'nothing of its own'})"


def _misses(where: object, names: list[str]) -> InputError:
    return InputError(
        "weights-do-not-match",
        f"the weights of {where} lack {len(names)} tensors that its configuration asks for, such as {names[0]}. Check that both belong together.",
    )


def _surplus(where: object, names: list[str]) -> InputError:
    return InputError(
        "weights-do-not-match",
        f"the weights of {where} hold {len(names)} tensors that its configuration does not know, such as {names[0]}. Check that both belong together.",
    )


def _bad_config(path: object, reason: str) -> InputError:
    return InputError("bad-model-config", f"{path} cannot be used: {reason}. Restore it from a copy, or save the model again.")


@contextlib.contextmanager
def _readable_config(path: object) -> Iterator[None]:
    """Say which file it was, whatever a configuration class or a constructor finds wrong with the values."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except InputError:
        raise
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        raise _bad_config(path, str(error).strip().splitlines()[-1].strip().rstrip(".") if str(error).strip() else type(error).__name__) from error


@contextlib.contextmanager
def _sound_weights(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(
            "damaged-weights", f"the weights of {folder} cannot be read ({str(error).splitlines()[0]}). Copy or save the model again."
        ) from error


def _built_layer_by_layer(config: Any) -> contextlib.AbstractContextManager[None]:
    """What stock code needs to build layers of different sizes; nothing where all have one size."""
    family = _families()[config.model_type]
    return per_layer_blocks(family.block_class(config.model_type)) if config.is_heterogeneous and family.SIZES else contextlib.nullcontext()


@contextlib.contextmanager
def _built_thin(kind: type[Any], ranks: Mapping[str, int]) -> Iterator[None]:
    """Give every model of a class, as soon as it is built, its layers of low rank."""
    from partwise.models.low_rank_layers import make_thin

    if not ranks:
        yield
        return
    original: Callable[..., None] = kind.__init__

    def then_thin(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        make_thin(self, ranks)

    kind.__init__ = then_thin
    try:
        yield
    finally:
        kind.__init__ = original
