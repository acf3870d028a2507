"""What a cache with a budget costs in quality and saves in memory: every method beside the full cache, on the same tokens in the same loop.

`measure` is the loop, for any caches; `compare` makes the caches of some methods and budgets and measures them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from partwise.checks import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from partwise.serve.rule import EvictionRule

__all__ = ["FULL", "Compared", "Measurement", "check_caches", "check_sizes", "compare", "measure"]

FULL = "full"
NUM_STRETCHES = 24  # of the text, over which the divergence is shown

Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One cache on some rows of text.

    Parameters
    ----------
    loss : float
        Mean loss of the scored tokens, in nats.
    kl : float
        Mean over the scored tokens of the divergence KL(full || this cache) of the predicted distributions, in nats; 0 for the full cache.
    agreement : float
        Share of the scored tokens at which the likeliest next token is that of the full cache.
    kl_curve : tuple of (int, float)
        The same divergence along the text: the last position of a stretch, and the mean over it.
    num_scored : int
        Tokens that were predicted, over all rows.
    bytes, peak_bytes : int
        That the cache held at the end, and at most after any call.
    max_bytes : int or None
        The bound that the cache promises; None for a cache that promises none.
    seconds, step_seconds : float
        Of all steps of one token together, and the median of a step.
    prefill_seconds : float
        Of the first block.
    tokens_per_second : float
        Over all rows, in steps of one token.
    evictions : int
        How often tokens left, over all layers.
    mass_kept : float or None
        Mean share of attention that fell on tokens which were kept.
    """

    loss: float
    kl: float
    agreement: float
    kl_curve: tuple[tuple[int, float], ...]
    num_scored: int
    bytes: int
    peak_bytes: int
    max_bytes: int | None
    seconds: float
    step_seconds: float
    prefill_seconds: float
    tokens_per_second: float
    evictions: int
    mass_kept: float | None

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A method at a budget.

    Parameters
    ----------
    method : str
        Its name, as in ``METHODS``.
    setting : str
        The call that makes its rule.
    budget : int
        Tokens per head.
    measured : Measurement
        What it did.
    full : Measurement
        The full cache in the same loop.
    """

    method: str
    setting: str
    budget: int
    measured: Measurement
    full: Measurement

    @property
    def perplexity_change(self) -> float:
        """Perplexity over that of the full cache, minus 1."""
        return self.measured.perplexity / self.full.perplexity - 1

    @property
    def ratio(self) -> float:
        """Bytes of the full cache at the end over the most that this one held."""
        return self.full.bytes / self.measured.peak_bytes


@dataclass
class _Tally:
    """What is noted of one cache while the loop runs."""

    cache: Any
    prefill_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def finish(self, positions: Sequence[int], num_rows: int) -> Measurement:
        report = self.cache.report() if hasattr(self.cache, "report") else None
        seconds = sum(self.seconds)
        size = math.ceil(len(positions) / NUM_STRETCHES)
        stretches = [range(start, min(start + size, len(positions))) for start in range(0, len(positions), size)]
        return Measurement(
            loss=statistics.fmean(self.losses),
            kl=statistics.fmean(self.divergences),
            agreement=statistics.fmean(self.agreements),
            kl_curve=tuple((positions[part[-1]], statistics.fmean(self.divergences[index] for index in part)) for part in stretches),
            num_scored=len(positions) * num_rows,
            bytes=bytes_of(self.cache),
            peak_bytes=self.peak_bytes,
            max_bytes=None if report is None else report.max_bytes,
            seconds=seconds,
            step_seconds=statistics.median(self.seconds),
            prefill_seconds=self.prefill_seconds,
            tokens_per_second=num_rows * len(self.seconds) / seconds,
            evictions=0 if report is None else report.evictions,
            mass_kept=None if report is None else report.mass_kept,
        )


def measure(
    model: Any,
    ids: Tensor,
    caches: Mapping[str, Any],
    *,
    num_prefill: int,
    first_scored: int | None = None,
    report: Report = lambda phase, done, total, note: None,
    phase: str = "measuring",
) -> dict[str, Measurement]:
    """Feed rows of text to a model token by token, with each of some caches, beside a full cache.

    The first ``num_prefill`` tokens go in as one block, so that no cache evicts anything which another one saw; every later token is a step of its own, as in
    decoding. At each token all caches take their turn, the first turn going round, so that a machine that slows down slows all of them.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model. It is run in evaluation mode and without gradients, and left as it was.
    ids : Tensor of shape (rows, tokens), int64
        Text, without padding.
    caches : mapping of str to Cache
        Empty ones, made for this model; they hold the text afterwards. Any cache of transformers will do. One called "full" is the reference in place of a
        ``DynamicCache``.
    num_prefill : int
        Tokens of the first block, at least 1 and at most ``tokens - 2``.
    first_scored : int, optional
        Predictions count from the step on that reads the token of this number. Left out: from the first step after the block.
    report : callable
        Told (phase, done, total, note) as the work goes on.
    phase : str
        What the report is told.

    Returns
    -------
    dict of str to Measurement
        The full cache, called "full", then all others.

    Raises
    ------
    InputError
        ``setting-out-of-range`` when there would be nothing to measure.
    """
    from transformers import DynamicCache

    from partwise.serve._evaluating import evaluating

    num_rows, num_tokens = ids.shape
    first_scored = num_prefill if first_scored is None else first_scored
    if not 1 <= num_prefill <= first_scored <= num_tokens - 2:
        raise InputError(
            "setting-out-of-range",
            f"got num_prefill={num_prefill} and first_scored={first_scored} for rows of {num_tokens} tokens, expected 1 <= num_prefill <= first_scored <= "
            f"{num_tokens - 2}. Pass longer rows.",
        )
    ids = ids.to(model.device)
    reference = caches[FULL] if FULL in caches else DynamicCache(config=model.config)
    tallies = {name: _Tally(cache) for name, cache in ({FULL: reference} | dict(caches)).items()}
    names = list(tallies)
    with evaluating(model):
        model(ids[:, :1], use_cache=False)  # the first call of a process is slow
        for name in names:
            _, tallies[name].prefill_seconds = _timed(model, ids[:, :num_prefill], tallies[name].cache)
            tallies[name].peak_bytes = bytes_of(tallies[name].cache)
        for position in range(num_prefill, num_tokens - 1):
            turn = position % len(names)
            logits: dict[str, Tensor] = {}
            for name in names[turn:] + names[:turn]:
                logits[name], seconds = _timed(model, ids[:, position : position + 1], tallies[name].cache)  # (rows, vocabulary)
                tallies[name].seconds.append(seconds)
                tallies[name].peak_bytes = max(tallies[name].peak_bytes, bytes_of(tallies[name].cache))
            if position >= first_scored:
                _score(tallies, logits, ids[:, position + 1])
            report(phase, position + 2 - num_prefill, num_tokens - num_prefill, "")
    positions = range(first_scored, num_tokens - 1)
    return {name: tally.finish(positions, num_rows) for name, tally in tallies.items()}


def _timed(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, float]:
    """Logits of the last token, (rows, vocabulary), and the seconds of the call."""
    _wait_for(model)
    start = time.perf_counter()
    logits: Tensor = model(ids, cache=cache, use_cache=True, logits_to_keep=1).logits
    _wait_for(model)
    return logits[:, -1].float(), time.perf_counter() - start


def _wait_for(model: Any) -> None:
    """Until a graphics processor has done what it was told."""
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _score(tallies: Mapping[str, _Tally], logits: Mapping[str, Tensor], targets: Tensor) -> None:
    """Loss of the next tokens (rows,), and how far each prediction is from that with the full cache."""
    expected = logits[FULL].log_softmax(dim=-1)  # (rows, vocabulary)
    likeliest = expected.argmax(dim=-1)  # (rows,)
    for name, tally in tallies.items():
        found = logits[name].log_softmax(dim=-1)
        tally.losses.append(float(-found.gather(1, targets[:, None]).double().mean()))
        tally.divergences.append(float((expected.exp() * (expected - found)).sum(dim=-1).double().mean()))
        tally.agreements.append(float((found.argmax(dim=-1) == likeliest).double().mean()))


def bytes_of(cache: Any) -> int:
    """Bytes of all tensors that a cache holds."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def compare(
    model: Any,
    ids: Tensor,
    rules: Mapping[str, EvictionRule],
    *,
    budgets: Sequence[int],
    bits: Literal[4, 8] | None = None,
    report: Report = lambda phase, done, total, note: None,
) -> list[Compared]:
    """Measure every method at every budget on the same text, beside the full cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model. It is left as it was.
    ids : Tensor of shape (rows, tokens), int64
        Text, without padding. The first tokens, as many as the smallest budget, are read as one block; all others are predicted one by one and scored.
    rules : mapping of str to EvictionRule
        Methods by name.
    budgets : sequence of int
        Tokens per head.
    bits : {4, 8}, optional
        Store keys and values in so many bits.
    report : callable
        Told (phase, done, total, note) as the work goes on.

    Returns
    -------
    list of Compared
        By budget, then by method.

    Raises
    ------
    InputError
        ``setting-out-of-range`` when a row is too short, and what the caches refuse; before anything is measured.
    """
    from partwise.serve._attached import attached
    from partwise.serve.cache import BudgetedCache

    check_sizes(budgets, num_tokens=ids.shape[1])
    check_caches(model, rules, budgets=budgets, bits=bits)
    found: list[Compared] = []
    with attached(model):
        for budget in budgets:
            caches = {name: BudgetedCache(model, rule, budget=budget, bits=bits) for name, rule in rules.items()}
            measured = measure(model, ids, caches, num_prefill=min(budgets), report=report, phase=f"budget {budget:,}")
            found += [
                Compared(method=name, setting=repr(rule), budget=budget, measured=measured[name], full=measured[FULL]) for name, rule in rules.items()
            ]
    return found


def check_caches(model: Any, rules: Mapping[str, EvictionRule], *, budgets: Sequence[int], bits: Literal[4, 8] | None) -> None:
    """Refuse what some cache would refuse, before minutes are spent on the others."""
    from partwise.serve._attached import attached
    from partwise.serve.cache import BudgetedCache

    with attached(model):
        for budget in budgets:
            for name, rule in rules.items():
                try:
                    BudgetedCache(model, rule, budget=budget, bits=bits)
                except InputError as error:
                    if error.code != "cache-budget":
                        raise
                    raise InputError("cache-budget", f"for the method {name}: {error}") from None


def check_sizes(budgets: Sequence[int], *, num_tokens: int) -> None:
    """Refuse budgets that leave nothing to measure in rows of this length."""
    if min(budgets) > num_tokens - 2:
        raise InputError(
            "setting-out-of-range",
            f"got rows of {num_tokens} tokens for a smallest budget of {min(budgets)}, expected at least {min(budgets) + 2}: a cache that is never full cannot "
            f"be told from a full one. Pass --tokens {2 * min(budgets)} or more, or smaller budgets.",
        )
