"""The built-in networks, made from a configuration and a seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from partwise.checks import InputError, check_choice, load_extra
from partwise.models.loading import quiet

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MLP", "NETWORKS", "PreActBlock", "PreResNet", "build", "config_of", "is_ours"]

# Sizes without what the data say (num_inputs, channels, num_classes, vocab_size, max_position_embeddings). The head counts of the decoders are such that
# 100, 75, 50 and 25 % of the heads divide the hidden size, as LlamaConfig wants it, and 16 divides the width of their MLP.
NETWORKS: dict[str, dict[str, Any]] = {
    "llama-small": {"network": "llama", "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 768},
    "llama-medium": {"network": "llama", "hidden_size": 288, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 768},
    "mlp": {"network": "mlp", "hidden": [256, 256], "norm": True},
    "resnet": {
        "network": "resnet",
        "stem": 16,
        "stages": [
            {"width": 16, "stride": 1, "inner": [16] * 2},
            {"width": 32, "stride": 2, "inner": [32] * 9},
            {"width": 64, "stride": 2, "inner": [64] * 2},
        ],
    },
}
END_TOKEN = 0  # number of the token that ends a text, as the room train makes its tokenizers

_LLAMA_SIZES = (
    "vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
)  # fmt: skip


class MLP(nn.Module):
    """A multilayer perceptron: linear layer, batch normalisation, ReLU, again and again, and a linear layer.

    Parameters
    ----------
    num_inputs : int
        Features of a row.
    hidden : sequence of int
        Neurons of every hidden layer.
    num_classes : int
        Outputs.
    norm : bool, default=True
        Whether to normalise. Without it the hidden layers have biases instead.
    """

    def __init__(self, num_inputs: int, hidden: Sequence[int], num_classes: int, *, norm: bool = True) -> None:
        super().__init__()
        widths = [num_inputs, *hidden]
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs, bias=not norm) for inputs, outputs in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) if norm else nn.Identity() for width in hidden)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (row, class) of rows (row, feature)."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = functional.relu(norm(layer(x)))
        return self.head(x)  # type: ignore[no-any-return]


class PreActBlock(nn.Module):
    """A residual block that normalises and activates before each of its two convolutions.

    Its filters in between are ``inner``; its input passes unchanged, or through a convolution of 1 x 1 where the shape changes.

    Parameters
    ----------
    inputs, inner, outputs : int
        Channels.
    stride : int, default=1
        Of the first convolution.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.norm_a = nn.BatchNorm2d(inputs)
        self.conv_a = nn.Conv2d(inputs, inner, 3, stride=stride, padding=1, bias=False)
        self.norm_b = nn.BatchNorm2d(inner)
        self.conv_b = nn.Conv2d(inner, outputs, 3, padding=1, bias=False)
        self.shortcut = None if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images of ``outputs`` channels."""
        active = functional.relu(self.norm_a(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        branch = self.conv_b(functional.relu(self.norm_b(self.conv_a(active))))
        return branch + kept  # type: ignore[no-any-return]


class PreResNet(nn.Module):
    """A pre-activation ResNet: a convolution, stages of residual blocks, a norm, the mean over the image, a linear layer.

    Parameters
    ----------
    channels : int
        Of the images.
    num_classes : int
        Outputs.
    stem : int
        Channels behind the first convolution.
    stages : sequence of mapping
        Each with ``width`` (channels that its blocks give), ``stride`` (of its first block) and ``inner`` (filters between the two convolutions, one number
        for each block). Where stride or width change something, the first block of a stage has a convolution in its shortcut.
    """

    def __init__(self, channels: int, num_classes: int, *, stem: int, stages: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        width = stem
        self.num_stages = len(stages)
        for number, stage in enumerate(stages, start=1):
            blocks = []
            for position, inner in enumerate(stage["inner"]):
                blocks.append(PreActBlock(width, inner, stage["width"], stride=1 if position else stage["stride"]))
                width = stage["width"]
            self.add_module(f"stage{number}", nn.Sequential(*blocks))
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)

    def sections(self) -> list[nn.Sequential]:
        """The stages in order."""
        return [getattr(self, f"stage{number}") for number in range(1, self.num_stages + 1)]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (image, class) of images (image, channel, height, width)."""
        x = self.stem(x)
        for section in self.sections():
            x = section(x)
        return self.head(functional.relu(self.norm(x)).mean((2, 3)))  # type: ignore[no-any-return]


def build(config: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """Make a network, with weights drawn from a seed; the global random state is left alone.

    Parameters
    ----------
    config : mapping
        As `config_of` gives it, or an entry of ``NETWORKS`` with what the data say: ``num_inputs`` and ``num_classes`` for an MLP, ``channels`` and
        ``num_classes`` for a ResNet, ``vocab_size`` and ``max_position_embeddings`` for a decoder.
    seed : int, default=0
        Of the weights.

    Returns
    -------
    torch.nn.Module
        MLP, PreResNet or transformers.LlamaForCausalLM, in training mode, as torch makes modules.

    Raises
    ------
    InputError
        ``network-config`` when an entry is missing or unknown.
    """
    kind, sizes = config.get("network"), {name: value for name, value in config.items() if name != "network"}
    check_choice(kind, tuple(_BUILDERS), name="network")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        try:
            return _BUILDERS[str(kind)](**sizes)
        except (TypeError, KeyError, ValueError) as error:
            raise InputError("network-config", f"the configuration {dict(config)} makes no {kind}: {error}. Take one that partwise wrote.") from error


def is_ours(model: nn.Module) -> bool:
    """Whether this is one of the plain networks of this package; a decoder is transformers'."""
    return isinstance(model, MLP | PreResNet)


def config_of(model: nn.Module) -> dict[str, Any]:
    """What `build` makes a network of the same shape from, read from its layers; JSON takes it.

    Raises
    ------
    InputError
        ``unknown-network`` for a model that is not one of ours.
    """
    if isinstance(model, MLP):
        layers = [*model.layers, model.head]
        hidden = [layer.weight.shape[1] for layer in layers[1:]]
        norm = any(isinstance(module, nn.BatchNorm1d) for module in model.norms)
        return {"network": "mlp", "num_inputs": layers[0].weight.shape[1], "hidden": hidden, "num_classes": model.head.weight.shape[0], "norm": norm}
    if isinstance(model, PreResNet):
        stem, channels = model.stem.weight.shape[:2]
        stages: list[dict[str, Any]] = []
        width = stem
        for section in model.sections():
            blocks: list[Any] = list(section.children())
            width = blocks[0].conv_b.weight.shape[0] if blocks else width
            stride = blocks[0].conv_a.stride[0] if blocks else 1
            stages.append({"width": width, "stride": stride, "inner": [block.conv_a.weight.shape[0] for block in blocks]})
        return {"network": "resnet", "channels": channels, "num_classes": model.head.weight.shape[0], "stem": stem, "stages": stages}
    if type(model).__name__ == "LlamaForCausalLM":
        settings: Any = model.config
        return {"network": "llama"} | {name: getattr(settings, name) for name in _LLAMA_SIZES}
    raise InputError(
        "unknown-network",
        f"got a {type(model).__name__}, expected one of the networks {', '.join(NETWORKS)}. Save other modules with "
        "partwise.models.network_files.save_network and part=.",
    )


def _llama(**sizes: Any) -> nn.Module:
    transformers = load_extra("transformers", extra="hf")
    ids = {"bos_token_id": END_TOKEN, "eos_token_id": END_TOKEN, "pad_token_id": None}  # a pad token would get an embedding that is never trained
    sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
    sizes.setdefault("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    with quiet(transformers):
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ids, tie_word_embeddings=True, dtype="float32"))
    model.generation_config.pad_token_id = END_TOKEN
    return model  # type: ignore[no-any-return]


_BUILDERS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "resnet": PreResNet, "llama": _llama}
