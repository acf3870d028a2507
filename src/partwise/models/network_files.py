"""Plain networks as folders: ``config.json`` and ``model.safetensors``, without pickles and without code.

A perceptron or ResNet of this package is built again from its configuration. Of any other network the configuration says which units of the whole one it
holds, and the sizes of its tensors: whoever loads it brings the whole network, made by its own constructor, and the same part is taken out of it. Layers of
low rank are told in ``low_rank.json``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from partwise import atomic_files
from partwise.checks import InputError
from partwise.models.axes import Part
from partwise.models.low_rank_layers import RANKS, make_thin, ranks_of, read_ranks
from partwise.models.networks import build, config_of, is_ours
from partwise.models.parts import coupled_axes, extract, tensors_of
from partwise.models.uneven_files import refuse_other_content

if TYPE_CHECKING:
    import os

    from torch import Tensor, nn

__all__ = ["load_network", "save_network", "write_network"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_network(model: nn.Module, folder: str | os.PathLike[str], *, part: Part | None = None, extra: Mapping[str, bytes] | None = None) -> None:
    """Write a plain network so that it loads without pickles; the folder appears whole or not at all.

    Parameters
    ----------
    model : torch.nn.Module
        A perceptron or ResNet of this package, or a network of your own as `partwise.models.extract` made it. Models of transformers:
        `partwise.models.uneven_files.save_uneven`.
    folder : str or path
        Target; a model that is already there is replaced.
    part : Part, optional
        For a network of your own: the units of the whole one that it holds. ``Part({})`` where it is whole.
    extra : mapping of str to bytes, optional
        Further files by name, such as a model card.

    Raises
    ------
    InputError
        ``unknown-network`` for a network of your own without ``part``, and for models of transformers; ``not-a-model-folder`` when something else is at
        ``folder``.
    RunError
        ``disk-full`` or ``cannot-write``; what was there before is then intact.
    """
    folder = Path(folder).expanduser()
    config = _config_for(model, part)
    refuse_other_content(folder)
    with atomic_files.write_folder(folder) as temporary:
        _write(model, config, temporary)
        for name, data in (extra or {}).items():
            atomic_files.write_atomic(temporary / name, data)


def write_network(model: nn.Module, folder: Path, *, part: Part | None = None) -> None:
    """Put the two files of `save_network` into a folder that is there already, as inside a ``with`` block of `partwise.atomic_files.write_folder`."""
    _write(model, _config_for(model, part), folder)


def load_network(folder: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """Open what `save_network` wrote, in evaluation mode and with the dtypes of the file. No code of the folder is run.

    Parameters
    ----------
    folder : str or path
        Holds ``config.json`` and ``model.safetensors``.
    model : torch.nn.Module, optional
        For a network of your own: the whole network, trained or not, on the device where the result is wanted. It is not changed. Networks of this package
        need none.

    Raises
    ------
    InputError
        ``folder-missing``, ``pickle-refused``, ``model-incomplete``, ``bad-model-config``, ``network-config``, ``damaged-weights``, ``weights-do-not-match``
        (naming a tensor), or ``needs-whole-model`` where ``model`` was left out; and what `partwise.models.extract` refuses.
    RunError
        ``file-unreadable`` or ``file-damaged`` for ``config.json``.
    """
    folder = Path(folder).expanduser()
    atomic_files.refuse_pickles(folder)
    if not (folder / CONFIG).is_file():
        raise InputError("model-incomplete", f"{folder} has no {CONFIG}, expected a network as save_network writes it. Check the path.")
    config = atomic_files.read_json(folder / CONFIG)
    if not isinstance(config, dict) or not {"network", "class"} & set(config):
        raise InputError("bad-model-config", f"{folder / CONFIG} names no network and no class, expected what save_network wrote. Check the path.")
    network = build(config) if "network" in config else _cut_again(config, folder, model)
    make_thin(network, read_ranks(folder))
    if "network" not in config:
        _check_sizes(config["sizes"], network, folder)
    _fill(network, folder)
    return network.eval()


def _config_for(model: nn.Module, part: Part | None) -> dict[str, Any]:
    """What `load_network` makes a network of the same shape from."""
    if is_ours(model):
        return config_of(model)
    kind = type(model)
    if hasattr(kind, "config_class"):
        raise InputError(
            "unknown-network", f"got a {kind.__name__} of transformers, expected a plain network. Save it with partwise.models.uneven_files.save_uneven."
        )
    if part is None:
        raise InputError(
            "unknown-network",
            f"got a {kind.__name__}, which partwise cannot build again, expected the units that it holds too. Pass part=, the Part that it was cut by, or "
            "Part({}) for a whole network.",
        )
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "sizes": {name: list(tensor.shape) for name, tensor in tensors_of(model).items()},
        "units": {name: list(units) for name, units in part.units.items()},
    }


def _write(model: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    atomic_files.write_json(folder / CONFIG, config)
    if ranks := ranks_of(model):
        atomic_files.write_json(folder / RANKS, ranks)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors_of(model).items()}, folder / WEIGHTS)


def _cut_again(config: Mapping[str, Any], folder: Path, model: nn.Module | None) -> nn.Module:
    """The part that was saved, taken out of the whole network."""
    if model is None:
        raise InputError(
            "needs-whole-model",
            f"{folder} holds a part of a {config['class']}, which partwise cannot build, expected the whole network too. Pass model=, made by its own "
            "constructor, trained or not.",
        )
    units, sizes = config.get("units"), config.get("sizes")
    if not _is_lists_of_counts(units) or not _is_lists_of_counts(sizes):
        raise InputError("bad-model-config", f"{folder / CONFIG} has no units and sizes as save_network writes them. Restore it from a copy.")
    part = Part({name: tuple(held) for name, held in units.items()})
    return extract(model, part, axes=[axis for axis in coupled_axes(model) if axis.name in units]) if units else copy.deepcopy(model)


def _check_sizes(sizes: Mapping[str, list[int]], network: nn.Module, folder: Path) -> None:
    """Refuse a whole network of other sizes than the one that was saved."""
    asked = {name: tuple(shape) for name, shape in sizes.items()}
    _check_same(asked, network, where=str(folder / CONFIG), advice="Pass model= with the sizes of the network that was saved")


def _is_lists_of_counts(value: Any) -> TypeGuard[dict[str, list[int]]]:
    return isinstance(value, dict) and all(isinstance(of, list) and all(type(count) is int and count >= 0 for count in of) for of in value.values())


def _fill(network: nn.Module, folder: Path) -> None:
    """Give a network the tensors of a file, which must be the same by name and shape; tied ones stay tied."""
    from safetensors.torch import load_file

    with _sound_weights(folder):
        found: dict[str, Tensor] = load_file(folder / WEIGHTS)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    _check_same(shapes, network, where=f"the weights of {folder}", advice=f"Check that they and {CONFIG} belong together")
    for name, entry in tensors_of(network).items():
        entry.data = found[name].to(entry.device)


def _check_same(shapes: Mapping[str, tuple[int, ...]], network: nn.Module, *, where: str, advice: str) -> None:
    """Refuse shapes by name that are not those of a network."""
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors_of(network).items()}
    for name in [*wanted, *shapes]:
        if shapes.get(name) != wanted.get(name):
            got, expected = (f"of shape {known[name]}" if name in known else "missing" for known in (shapes, wanted))
            raise InputError("weights-do-not-match", f"{name} of {where} is {got}, but in the network it is {expected}. {advice}.")


@contextlib.contextmanager
def _sound_weights(folder: Path) -> Iterator[None]:
    """Say in our words what is wrong with a file of weights."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError("damaged-weights", f"the weights of {folder} cannot be read ({str(error).splitlines()[0]}). Copy or save the model again.") from error
