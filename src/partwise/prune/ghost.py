"""GHOST: states of Mamba2 that contribute least to the output of their layer go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from partwise.checks import InputError, check_choice
from partwise.prune.unit_method import UnitMethod

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from partwise.models.walks import Batch
    from partwise.prune.unit_method import Visit

__all__ = ["GHOST", "Scan"]

Factor = Literal["both", "controllability", "observability", "product_of_means"]
FACTORS: tuple[Factor, ...] = ("both", "controllability", "observability", "product_of_means")


@dataclass(frozen=True, kw_only=True)
class GHOST(UnitMethod):
    """States of Mamba2 that contribute least to the output of their layer go; forward passes only.

    State ``n`` of group ``g`` scores the root mean square of what it adds to the outputs: the mean over tokens of ``sum(H[n, p]^2) C[n]^2`` over the heads of
    its group and their entries ``p``. How excited a state is (controllability) is thereby multiplied with how loudly it is read (observability) token by
    token, before the average. The square of the score is, exactly, the mean squared change of the layer's scan when this one state is removed.

    Layers are done in order, each on what the pruned layers before it pass on. In a layer the best states of every group stay, equally many in each, because
    ``B`` and ``C`` are stored as (groups, states); the paper pools the groups of a layer and does not say what it stores. With one group, as in the
    published Mamba2 models, both are the same.

    Weights shrink by little, the memory of a sequence by the fraction that goes.

    Parameters
    ----------
    factor : {"both", "controllability", "observability", "product_of_means"}
        What the score is made of. both: as above. controllability, observability: one of the two factors alone, a baseline. product_of_means: the two averages
        multiplied, which forgets that they go together.

    References
    ----------
    GHOST. arXiv:2602.11408.
    """

    DEFAULT_KINDS: ClassVar[tuple[str, ...]] = ("states",)

    factor: Factor = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.factor, FACTORS, name="factor")
        if wrong := [kind for kind in self.kinds if kind != "states"]:
            raise InputError("kinds-absent", f"GHOST prunes the states of Mamba2, got kinds={wrong[0]}. Leave kinds out, or choose another method.")

    def score(self, visit: Visit) -> Tensor:
        """Root of the mean over all tokens that are no padding."""
        import torch

        name = visit.axis.name.removesuffix(".state")
        mixer: Any = visit.model.get_submodule(name)
        sums = torch.zeros(3, visit.axis.size, dtype=torch.float64)  # of both, states, reads
        num_tokens = 0

        def add(projected: Tensor, batch: Batch) -> None:
            nonlocal num_tokens
            num_tokens += int(batch.real.sum()) if batch.real is not None else projected.shape[0] * projected.shape[1]
            scan = Scan.of(mixer, projected, batch.real)
            here = sums.new_zeros(sums.shape, device=projected.device)
            for states, reads, counted in scan.energies():
                here[0] += ((states * reads) * counted).sum(0).flatten()
                here[1] += (states * counted).sum(0).flatten()
                here[2] += (reads * counted).sum(0).flatten()
            sums.add_(here.cpu())

        visit.show(outputs={f"{name}.in_proj": add})
        both, states, reads = sums / num_tokens
        chosen = {"both": both, "controllability": states, "observability": reads, "product_of_means": states * reads}
        root: Tensor = chosen[self.factor].sqrt()
        return root

    def shares(self, scores: Tensor) -> Tensor:
        """Of the energy, because it is the squares that are errors."""
        return super().shares(scores.square())


@dataclass(frozen=True)
class Scan:
    """The recurrence of a Mamba2 mixer on some rows of text, in float32.

    Parameters
    ----------
    inputs : Tensor of shape (batch, tokens, groups, heads of a group, entries)
        What is written into the states, behind convolution and activation, times the time step.
    writes, reads : Tensor of shape (batch, tokens, groups, states)
        ``B`` and ``C``, behind convolution and activation.
    decays : Tensor of shape (batch, tokens, groups, heads of a group)
        What a state is multiplied by at each token.
    real : Tensor of shape (batch, tokens), bool, or None
        Which tokens are no padding.
    """

    inputs: Tensor
    writes: Tensor
    reads: Tensor
    decays: Tensor
    real: Tensor | None

    @classmethod
    def of(cls, mixer: Any, projected: Tensor, real: Tensor | None) -> Scan:
        """From the output of the mixer's ``in_proj``, (batch, tokens, gate + channels + heads)."""
        import torch
        from torch.nn.functional import conv1d, softplus

        groups, size, heads = mixer.n_groups, mixer.ssm_state_size, mixer.num_heads
        width = mixer.intermediate_size
        _, channels, dt = projected.float().split([width, width + 2 * groups * size, heads], dim=-1)  # type: ignore[no-untyped-call]
        weight = mixer.conv1d.weight.float()  # (channels, 1, kernel)
        bias = None if mixer.conv1d.bias is None else mixer.conv1d.bias.float()
        num_tokens = projected.shape[1]
        mixed = conv1d(channels.transpose(1, 2), weight, bias, padding=weight.shape[-1] - 1, groups=weight.shape[0])[..., :num_tokens]
        mixed = mixer.act(mixed).transpose(1, 2)  # (batch, tokens, channels)
        if real is not None:
            mixed = mixed * real[..., None]
        x, writes, reads = mixed.split([width, groups * size, groups * size], dim=-1)
        steps = softplus(dt + mixer.dt_bias.float()).clamp(*mixer.time_step_limit)  # (batch, tokens, heads)
        decays = torch.exp(-steps * mixer.A_log.float().exp())
        by_group = (*x.shape[:2], groups, heads // groups)
        return cls(
            inputs=(x.unflatten(-1, (heads, -1)) * steps[..., None]).view(*by_group, -1),
            writes=writes.unflatten(-1, (groups, size)),
            reads=reads.unflatten(-1, (groups, size)),
            decays=decays.view(by_group),
            real=real,
        )

    def energies(self) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
        """For each token: squares of the states summed over heads and entries, squares of the reads, both (batch, groups, states), and what counts.

        States of one token only are held.
        """
        states = self.inputs.new_zeros(*self.inputs.shape[:1], *self.inputs.shape[2:], self.writes.shape[-1])  # (batch, groups, heads, entries, states)
        for token in range(self.inputs.shape[1]):
            states *= self.decays[:, token, :, :, None, None]
            states.addcmul_(self.inputs[:, token, ..., None], self.writes[:, token, :, None, None, :])
            counted: Tensor | float = 1.0 if self.real is None else self.real[:, token, None, None].to(states.dtype)
            yield states.square().sum((2, 3)), self.reads[:, token].square(), counted

    def outputs(self, *, without: tuple[int, int] | None = None) -> Tensor:
        """What the scan gives, (batch, tokens, groups, heads, entries), without the direct path; ``without`` leaves one state (group, state) out."""
        import torch

        reads = self.reads
        if without is not None:
            reads = reads.clone()
            reads[:, :, without[0], without[1]] = 0
        states = self.inputs.new_zeros(*self.inputs.shape[:1], *self.inputs.shape[2:], self.writes.shape[-1])
        found = []
        for token in range(self.inputs.shape[1]):
            states = states * self.decays[:, token, :, :, None, None] + self.inputs[:, token, ..., None] * self.writes[:, token, :, None, None, :]
            found.append((states * reads[:, token, :, None, None, :]).sum(-1))
        return torch.stack(found, dim=1)
