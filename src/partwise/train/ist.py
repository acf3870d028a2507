"""Independent subnetwork training: every worker trains its own random neurons of every hidden layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from partwise.checks import InputError, check_choice
from partwise.models import (
    BernoulliSampler,
    CoupledAxis,
    DisjointSampler,
    StratifiedSampler,
    coupled_axes,
    extract,
    scale_readers,
    tensors_of,
    with_tensors,
)
from partwise.train.method import SubnetMethod

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from partwise.models import Axis, Part

__all__ = ["IST"]

SAMPLERS = ("disjoint", "stratified", "bernoulli")
SCALES = ("inverse_keep", "test_time", "norm")


@dataclass(frozen=True, kw_only=True)
class IST(SubnetMethod):
    """Deal the neurons of every hidden layer to the workers, train the slices apart, put them back, deal anew.

    A worker of S holds about 1/S of the first and last weights and 1/S^2 of those between two hidden layers. Inputs and outputs of the network are never
    split. Filters and head groups are dealt like neurons where a network has them. Bytes on the wire per round, for layers of width d_0 to d_L and b bytes a
    number: 2 b (d_0 d_1 + sum of d_(l-1) d_l / S over hidden pairs + d_(L-1) d_L), biases and norms apart.

    Unlike the public script, which leaves them out, what lies on no axis (the output bias, say) is trained by all workers and averaged.

    Parameters
    ----------
    sampler : {"disjoint", "stratified", "bernoulli"}, default="disjoint"
        disjoint: one shuffle of each layer, so every neuron has exactly one holder. stratified: the same from fixed shards, as the form without a
        coordinator does it. bernoulli: each worker keeps each neuron with probability ``keep``, so holders overlap and are averaged.
    keep : float, optional
        For bernoulli only: the probability, above 0 and at most 1. Left out: 1 / ``num_parts``, which trains as many neurons as dealing them does.
    scale : {"inverse_keep", "test_time", "norm"}, default="inverse_keep"
        The whole network sums over more neurons than a slice was trained with. inverse_keep: a slice trains with its activations multiplied by the number of
        neurons over the number it holds, so the whole network needs no change. test_time: slices train as they are, and the whole network's sums are
        multiplied by the fraction that a slice holds. norm: nothing is multiplied, because a norm layer behind each of those sums takes the scale away, as in
        the public networks; there inverse_keep is the same function, so it is the default for all.
    require_equal : bool, default=False
        Refuse layers whose neurons the number of parts does not divide. Otherwise slices differ by at most one neuron per layer.

    References
    ----------
    Distributed Learning of Deep Neural Networks using Independent Subnet Training. arXiv:1910.02120. 20 local steps are those of its public script.
    On the Convergence of Shallow Neural Network Training with Randomly Masked Neurons. arXiv:2112.02668.

    Examples
    --------
    >>> IST(num_parts=8, scale="norm").steps_of(0)
    20
    """

    sampler: Literal["disjoint", "stratified", "bernoulli"] = "disjoint"
    keep: float | None = None
    scale: Literal["inverse_keep", "test_time", "norm"] = "inverse_keep"
    require_equal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.sampler, SAMPLERS, name="sampler")
        check_choice(self.scale, SCALES, name="scale")
        if self.sampler != "bernoulli" and self.keep is not None:
            raise InputError(
                "keep-needs-bernoulli",
                f"got keep={self.keep} with sampler={self.sampler!r}, which deals every neuron to one of the {self.num_parts} parts, expected it with "
                "sampler='bernoulli' only. Leave keep out, or change num_parts.",
            )
        if self.sampler == "bernoulli":
            if self.require_equal:
                raise InputError(
                    "equal-needs-dealing",
                    "got require_equal=True with sampler='bernoulli', whose parts differ in size by chance, expected sampler='disjoint' or 'stratified'. "
                    "Leave require_equal out, or deal.",
                )
            self._sampler()  # refuses a keep out of range

    def find_axes(self, model: nn.Module) -> tuple[Axis, ...]:
        """Every row of neurons, filters or head groups that only other layers read."""
        import numpy as np

        axes = tuple(axis for axis in coupled_axes(model) if isinstance(axis, CoupledAxis) and axis.readers)
        if not axes:
            raise InputError(
                "no-axes",
                f"got a {type(model).__name__} without hidden neurons, filters or heads of its own, expected a hidden layer that only other layers read. "
                "Use a deeper model, or ResIST for residual blocks.",
            )
        if self.scale == "norm":
            _check_norms(model, axes)
        # Dealt once in vain, so that layers which are too narrow are refused here and not in the first round.
        sampler = self._sampler() if self.sampler == "bernoulli" else DisjointSampler(require_equal=self.require_equal)
        parts = sampler(axes, [np.random.default_rng(index) for index in range(self.num_parts)])
        if self.sampler == "bernoulli":  # layers of different size, which not every family can be built with
            weightless = with_tensors(model, {name: tensor.detach().to("meta") for name, tensor in tensors_of(model).items()})
            extract(weightless, parts[0], axes=axes, loadable=False)
        return axes

    def deal(self, axes: Sequence[Axis], generators: Sequence[np.random.Generator]) -> list[Part]:
        """Neurons of each part, every layer shuffled by itself."""
        return self._sampler()(axes, generators)

    def factors(self, axes: Sequence[Axis], part: Part) -> dict[str, float]:
        """Neurons of the layer over neurons held, for inverse_keep."""
        return _inverse_keep(axes, part) if self.scale == "inverse_keep" else {}

    def deployed(self, model: nn.Module, axes: Sequence[Axis]) -> nn.Module:
        """For test_time, sums over neurons multiplied by the fraction that a part holds."""
        return scale_readers(model, {axis.name: self._fraction() for axis in axes}, axes=axes) if self.scale == "test_time" else model

    def ticket_factors(self, axes: Sequence[Axis], part: Part) -> dict[str, float]:
        """Neurons of the layer over neurons kept, whatever the scale: a ticket is cut from the network as it is deployed, and keeps its statistics."""
        return _inverse_keep(axes, part)

    def _sampler(self) -> DisjointSampler | StratifiedSampler | BernoulliSampler:
        if self.sampler == "bernoulli":
            return BernoulliSampler(keep=self._fraction())
        return DisjointSampler() if self.sampler == "disjoint" else StratifiedSampler()

    def _fraction(self) -> float:
        """Of its neurons, what a part holds of a layer on average."""
        return 1 / self.num_parts if self.keep is None else self.keep


def _inverse_keep(axes: Sequence[Axis], part: Part) -> dict[str, float]:
    held = {axis.name: len(part.units.get(axis.name, range(axis.size))) for axis in axes}
    return {axis.name: axis.size / held[axis.name] for axis in axes if held[axis.name] < axis.size}


def _check_norms(model: nn.Module, axes: Sequence[Axis]) -> None:
    """Refuse layers that read split neurons into anything but a norm that takes their scale away."""
    readers = [reader.removesuffix(".weight") for axis in axes if isinstance(axis, CoupledAxis) for reader in axis.readers]
    normalised = _normalised_layers(model)
    bare = [reader for reader in readers if reader not in normalised]
    if bare:
        raise InputError(
            "no-norm",
            f"got scale='norm', but {len(bare)} of {len(readers)} layers that read split neurons ({bare[0]} first) have no norm layer behind them that takes "
            "their scale away, expected batch normalisation, or another norm behind a layer without bias. Pass scale='inverse_keep', or add norms.",
        )


def _normalised_layers(model: nn.Module) -> set[str]:
    """Layers whose output goes into norms only, and whose scale does not matter for that reason."""
    from torch import nn

    from partwise.models.chains import trace

    try:
        graph = trace(model)
    except InputError:
        return set()  # decoders: their readers add to the residual stream
    found = set()
    for node in graph.nodes:
        layer = graph.module(node)
        behind = [graph.module(user) for user in node.users]
        # Statistics over a batch take a bias away too; those over the features of one row do not.
        without_bias = getattr(layer, "bias", None) is None
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, *((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm) if without_bias else ()))
        if behind and all(isinstance(module, norms) for module in behind):
            found.add(str(node.target))
    return found
