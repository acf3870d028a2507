"""Pruning after training, structured: what tickets are compared with.

Each function takes a dense Llama-type model, the fraction to keep and calibration batches, and returns a really smaller model with as many head groups and
feed-forward neurons in every layer as a ticket of that fraction has (SliceGPT: as many parameters in its blocks). The model passed in is not changed.
Neurons are chosen one by one, not in blocks: pruning after training has no reason to keep blocks together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from partwise.models import CoupledAxis, Part, coupled_axes, extract, mask, tensors_of
from partwise.models.names import locate
from partwise.selection import select
from partwise.train import TwIST

Batch = Mapping[str, Tensor]


def magnitude(model: Any, keep: float, batches: Sequence[Batch], *, num_blocks: int = 16) -> Any:
    """Keep the units whose weights, in all tensors together, have the largest norm. Reads no data."""
    tensors = tensors_of(model)

    def score(axis: CoupledAxis) -> Tensor:
        squares = [tensors[member.tensor].detach().double().square().movedim(member.dim, 0) for member in axis.members]
        return sum(per_unit(square.reshape(len(square), -1).sum(1), axis.size) for square in squares).sqrt()  # type: ignore[union-attr]

    axes, counts = axes_and_counts(model, keep, num_blocks)
    return extract(model, best(axes, counts, score), axes=axes, loadable=False)


def wanda(model: Any, keep: float, batches: Sequence[Batch], *, num_blocks: int = 16) -> Any:
    """Wanda's score, weight times norm of its input, averaged over outputs and summed over a unit (Wanda-sp), layer by layer on what pruned layers pass on.

    arXiv:2306.11695; the structured form is that of arXiv:2312.11983 and its code.
    """
    axes, counts = axes_and_counts(model, keep, num_blocks)
    units: dict[str, tuple[int, ...]] = {}
    for layer in sorted({locate(axis.name)[0] for axis in axes}):  # type: ignore[type-var]
        here = [axis for axis in axes if locate(axis.name)[0] == layer]
        moments = input_moments(mask(model, Part(units), axes=axes), here, batches)

        def score(axis: CoupledAxis, moments: dict[str, tuple[Tensor, Tensor]] = moments) -> Tensor:
            return per_unit(reader_weight(model, axis).abs().mean(0) * moments[axis.name][1].sqrt(), axis.size)

        units |= best(here, counts, score).units
    return extract(model, Part(units), axes=axes, loadable=False)


def flap(model: Any, keep: float, batches: Sequence[Batch], *, num_blocks: int = 16, compensate: bool = True) -> Any:
    """FLAP: keep the inputs that fluctuate most, weighted by the squared norm of the column that reads them; what is removed leaves its mean as a bias.

    arXiv:2312.11983, metric WIFV, as many units in every layer (its structure UL-UM; its default spreads them unevenly over layers, which no plain
    configuration describes). As in its code, the metric of attention is squared before it is summed over a head.
    """
    axes, counts = axes_and_counts(model, keep, num_blocks)
    moments = input_moments(model, axes, batches)

    def score(axis: CoupledAxis) -> Tensor:
        mean, square = moments[axis.name]
        metric = (square - mean.square()) * reader_weight(model, axis).square().sum(0)
        return per_unit(metric.square() if axis.kind == "heads" else metric, axis.size)

    part = best(axes, counts, score)
    small = extract(model, part, axes=axes, loadable=False)
    for axis in axes if compensate else ():
        weight, mean = reader_weight(model, axis), moments[axis.name][0]
        removed = torch.ones(axis.size, dtype=torch.bool)
        removed[list(part.units[axis.name])] = False
        if removed.any():
            entries = removed.repeat_interleave(len(mean) // axis.size)
            add_bias(reader_of(small, axis), weight[:, entries] @ mean[entries])
    return small


def slicegpt(model: Any, keep: float, batches: Sequence[Batch], *, num_blocks: int = 16) -> Any:
    """SliceGPT: rotate the residual stream to its principal components, layer by layer, and cut off the last ones.

    arXiv:2401.15024. The width is the smallest at which the blocks, rotations of the shortcuts included, have at least as many parameters as those of a
    ticket; embeddings are sliced on top of that, and the head is not, as in its code. Tied embeddings come untied, because norms are folded into the head.
    """
    if keep == 1:
        return copy.deepcopy(model)
    axes, counts = axes_and_counts(model, keep, num_blocks)
    some = Part({axis.name: tuple(range(counts[axis.name])) for axis in axes})
    budget = num_block_parameters(extract(model, some, axes=axes, loadable=False))
    hidden = int(model.config.hidden_size)
    width = next((width for width in range(1, hidden) if sliced_block_parameters(model, width) >= budget), hidden)
    return sliced(model, width, batches)


METHODS: dict[str, Callable[..., Any]] = {"magnitude": magnitude, "wanda": wanda, "flap": flap, "slicegpt": slicegpt}


def axes_and_counts(model: Any, keep: float, num_blocks: int) -> tuple[tuple[CoupledAxis, ...], dict[str, int]]:
    """Axes of a model, and how many units of each a ticket of TwIST holds."""
    method = TwIST(num_blocks=num_blocks)
    axes = tuple(axis for axis in coupled_axes(model) if isinstance(axis, CoupledAxis))
    part = method.ticket_part(model, axes, keep, np.random.default_rng(0))
    return axes, {axis.name: len(part.units[axis.name]) for axis in axes}


def best(axes: Sequence[CoupledAxis], counts: Mapping[str, int], score: Callable[[CoupledAxis], Tensor]) -> Part:
    """The units with the highest scores."""
    return Part({axis.name: tuple(select(score(axis), keep=counts[axis.name]).tolist()) for axis in axes})


def input_moments(model: nn.Module, axes: Sequence[CoupledAxis], batches: Sequence[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Axis -> mean, and mean square, of each input of the layer that reads it, over all tokens of the calibration batches."""
    sums: dict[str, list[Any]] = {axis.name: [0, 0.0, 0.0] for axis in axes}

    def count(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).double()  # (tokens, features)
            sums[name] = [sums[name][0] + len(rows), sums[name][1] + rows.sum(0), sums[name][2] + rows.square().sum(0)]

        return hook

    handles = [reader_of(model, axis).register_forward_pre_hook(count(axis.name)) for axis in axes]
    try:
        for batch in batches:
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (first / number, second / number) for name, (number, first, second) in sums.items()}


@torch.no_grad()
def forward(model: Any, batch: Batch) -> Any:
    """Logits of a batch, in evaluation mode."""
    return model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits


def reader_of(model: nn.Module, axis: CoupledAxis) -> Any:
    """The one layer that reads an axis."""
    [reader] = axis.readers
    return model.get_submodule(reader.removesuffix(".weight"))


def reader_weight(model: nn.Module, axis: CoupledAxis) -> Tensor:
    """Its weight (outputs, inputs)."""
    weight: Tensor = reader_of(model, axis).weight.detach().double()
    return weight


def per_unit(entries: Tensor, size: int) -> Tensor:
    """Sums over the entries of each unit."""
    return entries.view(size, -1).sum(1)


def add_bias(layer: nn.Linear, extra: Tensor) -> None:
    """Add to the bias of a layer, or give it one."""
    bias = extra.to(layer.weight.dtype) + (0 if layer.bias is None else layer.bias.detach())
    layer.bias = nn.Parameter(bias)


class Normalised(nn.Module):
    """A root mean square norm without weights, over a stream from which components were cut: the mean is still over its old width."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Of the shape of the input."""
        squares = hidden.float().square().sum(-1, keepdim=True) / self.width
        return (hidden * torch.rsqrt(squares + self.eps)).to(hidden.dtype)


class SlicedLayer(nn.Module):
    """A decoder layer whose shortcuts turn the stream from one basis to the next."""

    def __init__(self, layer: Any, width: int, turn: Tensor) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.norms = nn.ModuleList(Normalised(width, norm.variance_epsilon) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        self.attention_shortcut, self.mlp_shortcut = nn.Parameter(turn), nn.Parameter(turn)

    def attend(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """The stream between attention and the feed-forward layer."""
        return hidden @ self.attention_shortcut + self.self_attn(hidden_states=self.norms[0](hidden), **kwargs)[0]

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """The stream behind the layer."""
        return hidden @ self.mlp_shortcut + self.mlp(self.norms[1](hidden))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """As the layer that it replaces."""
        return self.feed_forward(self.attend(hidden_states, **kwargs))


@torch.no_grad()
def sliced(model: Any, width: int, batches: Sequence[Batch]) -> Any:
    """A model whose residual stream has ``width`` components."""
    small = copy.deepcopy(model).eval()
    base = small.model
    if small.lm_head.weight is base.embed_tokens.weight:
        small.lm_head.weight = nn.Parameter(small.lm_head.weight.detach().clone())
        small.config.tie_word_embeddings = False
    hidden_size = base.embed_tokens.embedding_dim
    runs = list(layer_inputs(small, batches))
    streams = [stream for stream, _ in runs]
    basis = principal(streams)  # (hidden, hidden)
    change(base.embed_tokens, base.embed_tokens.weight @ basis[:, :width])
    streams = [stream @ basis[:, :width] for stream in streams]
    for index, old in enumerate(base.layers):
        is_last = index == len(base.layers) - 1
        layer = SlicedLayer(old, hidden_size, basis.T[:width].clone())
        for projection in (old.self_attn.q_proj, old.self_attn.k_proj, old.self_attn.v_proj):
            change(projection, projection.weight * old.input_layernorm.weight @ basis[:, :width])
        basis = principal([layer.attend(stream, **kwargs) for stream, (_, kwargs) in zip(streams, runs, strict=True)])
        layer.attention_shortcut = nn.Parameter(layer.attention_shortcut @ basis[:, :width])
        turn_output(old.self_attn.o_proj, basis[:, :width])
        streams = [layer.attend(stream, **kwargs) for stream, (_, kwargs) in zip(streams, runs, strict=True)]
        layer.mlp_shortcut = nn.Parameter(basis.T[:width].clone())
        for projection in (old.mlp.gate_proj, old.mlp.up_proj):
            change(projection, projection.weight * old.post_attention_layernorm.weight @ basis[:, :width])
        outputs = [layer.feed_forward(stream) for stream in streams]
        basis = principal(outputs)
        kept = basis if is_last else basis[:, :width]
        layer.mlp_shortcut = nn.Parameter(layer.mlp_shortcut @ kept)
        turn_output(old.mlp.down_proj, kept)
        streams = [output @ kept for output in outputs]
        base.layers[index] = layer
    change(small.lm_head, small.lm_head.weight * base.norm.weight @ basis)
    base.norm = Normalised(hidden_size, base.norm.variance_epsilon)
    return small


def layer_inputs(model: Any, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """What the first layer is called with, for every batch: the stream, and positions and mask, which are the same for all layers."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0], {name: value for name, value in kwargs.items() if name not in ("cache", "use_cache")}))

    handle = model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in batches:
            forward(model, batch)
    finally:
        handle.remove()
    yield from seen


def principal(streams: Sequence[Tensor]) -> Tensor:
    """Principal components of all tokens, as columns, the largest first."""
    rows = torch.cat([stream.flatten(0, -2) for stream in streams]).double()
    second = rows.T @ rows
    second.diagonal().add_(0.01 * second.diagonal().mean())
    return torch.linalg.eigh(second).eigenvectors.flip(1).to(streams[0].dtype)


def change(layer: Any, weight: Tensor) -> None:
    """Give a layer another weight, and the sizes that go with it."""
    layer.weight = nn.Parameter(weight.contiguous())
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    else:
        layer.num_embeddings, layer.embedding_dim = weight.shape


def turn_output(layer: nn.Linear, basis: Tensor) -> None:
    """Write into the stream in another basis."""
    change(layer, basis.T @ layer.weight)
    if layer.bias is not None:
        layer.bias = nn.Parameter(basis.T @ layer.bias)


def num_block_parameters(model: Any) -> int:
    """Parameters of the decoder layers, norms left out."""
    return sum(parameter.numel() for name, parameter in model.model.layers.named_parameters() if "norm" not in name)


def sliced_block_parameters(model: Any, width: int) -> int:
    """What `num_block_parameters` will be."""
    total, hidden = 0, int(model.config.hidden_size)
    layers = list(model.model.layers)
    for layer in layers:
        out = hidden if layer is layers[-1] else width
        total += width * width + width * out  # the shortcuts
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                end = name.endswith(("o_proj", "down_proj"))
                rows = (out if name.endswith("down_proj") else width) if end else module.out_features
                total += rows * (module.in_features if end else width) + (0 if module.bias is None else rows)
    return total
