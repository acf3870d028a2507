"""Which of several models a prompt goes to, by what the prompt looks like inside a probe model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from partwise.checks import InputError, check_at_least, check_choice, check_finite
from partwise.serve import _router_files
from partwise.serve._hidden_states import describe_prompts, num_layers
from partwise.serve._routing_rule import Lesson, RoutingRule, fit_rule

__all__ = ["DomainRouter", "Features"]

Features = Literal["last", "mean", "trace"]
FEATURES: tuple[Features, ...] = ("last", "mean", "trace")
FEWEST = 10  # prompts to learn from


class DomainRouter:
    """Sends a prompt to the model that did best on prompts which look similar inside a cheap model while it reads them.

    `fit` learns from prompts whose domain is known, from prompts on which every model was scored, or from both; `route` needs the prompt alone. A prompt goes
    to the best single model when no other is expected to be better by a margin, which cross-validation chooses; if no margin is certain to gain anything
    on the training prompts, everything goes to the best single model.

    Parameters
    ----------
    probe : PreTrainedModel
        Reads the prompts. If it is one of the models, reading is not lost work.
    tokenizer : PreTrainedTokenizerBase
        The probe's.
    models : sequence of str
        Names of the models to choose among; a dictionary of models does as well.
    features : {"mean", "last", "trace"}, default="mean"
        What is taken from each layer: the mean of the hidden states over the prompt, the state of its last token, or mean and variance of that state.
    layers : "all" or sequence of int, default="all"
        Layers to look at; 0 are the embeddings.
    margin : float, optional
        By how much another model must be expected to score better than the best single one. None: chosen by cross-validation.
    regularization : float, optional
        Inverse strength of the classifier's regularization (``C`` of scikit-learn). None: chosen by cross-validation.
    max_length : int, default=512
        Tokens that are read, the last ones of a prompt.
    batch_size : int, default=16
        Prompts that are read at once; the features of a prompt do not depend on it.
    seed : int, default=0
        Of the folds of cross-validation.

    Attributes
    ----------
    rule_ : RoutingRule
        What was learned.

    References
    ----------
    Domain-specific traces in hidden states. arXiv:2504.16871. The margin, the mean over tokens and the prediction of scores without domains are ours.
    """

    def __init__(
        self,
        probe: Any,
        tokenizer: Any,
        *,
        models: Sequence[str],
        features: Features = "mean",
        layers: Literal["all"] | Sequence[int] = "all",
        margin: float | None = None,
        regularization: float | None = None,
        max_length: int = 512,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.probe, self.tokenizer, self.models = probe, tokenizer, tuple(models)
        self.features, self.layers = features, layers if layers == "all" else tuple(layers)
        self.margin, self.regularization, self.max_length, self.batch_size, self.seed = margin, regularization, max_length, batch_size, seed
        self.rule_: RoutingRule | None = None
        if isinstance(models, str) or len(set(self.models)) != len(self.models) or len(self.models) < 2:
            raise InputError(
                "router-models", f"got models={models!r}, expected at least two different names. Pass the names of the models to choose among."
            )
        check_choice(features, FEATURES, name="features")
        check_at_least(max_length, 1, name="max_length")
        check_at_least(batch_size, 1, name="batch_size")
        self._layers = _chosen_layers(layers, num_layers(probe))

    def fit(self, prompts: Sequence[str], labels: Sequence[str] | None = None, *, scores: Any = None, groups: Sequence[str] | None = None) -> Self:
        """Learn which prompts go where.

        Parameters
        ----------
        prompts : sequence of str
            At least ten.
        labels : sequence of str, optional
            The domain of each prompt. Without ``scores`` the name of the model that is right for it.
        scores : array-like of shape (prompts, models), optional
            How well each model did on each prompt, higher is better: 1 or 0 for right or wrong, or any numbers. With ``labels`` a prompt's domain is
            predicted, and the model with the best mean score there is chosen; without, the score of each model is predicted.
        groups : sequence of str, optional
            Where each prompt comes from. Cross-validation then asks whether the rule holds for sources that it has not seen; there must be at least two, and
            they should share domains.

        Returns
        -------
        self
            The fitted router.

        Raises
        ------
        InputError
            When lengths differ, scores hold NaN, a model was never right, or there is too little to learn from.
        """
        prompts = _checked_prompts(prompts)
        if len(prompts) < FEWEST or (labels is None and scores is None):
            raise InputError(
                "router-nothing-to-learn",
                f"got {len(prompts)} prompts, {'no ' if labels is None else ''}labels and {'no ' if scores is None else ''}scores, expected at least {FEWEST} "
                "prompts with labels, scores or both. Pass more prompts, and say what belongs to them.",
            )
        _check_length("labels", labels, len(prompts))
        _check_length("groups", groups, len(prompts))
        if groups is not None and len(set(groups)) < 2:
            raise InputError(
                "router-one-source", f"got one source in groups, {groups[0]!r}, expected at least two. Add another one, or leave out groups."
            )
        domains = self.models if scores is None else tuple(sorted(set(labels or ())))
        worth = self._checked_scores(self._one_hot(labels or ()) if scores is None else scores, len(prompts))
        domain = None if labels is None else np.array([domains.index(label) for label in labels])
        lesson = Lesson(self.encode(prompts), worth, domain, domains, np.eye(len(domains)) if scores is None else None)
        self.rule_ = fit_rule(lesson, groups=groups, margin=self.margin, regularization=self.regularization, seed=self.seed)
        return self

    def route(self, prompt: str) -> str:
        """Name of the model for one prompt."""
        return self.predict([prompt])[0]

    def predict(self, prompts: Sequence[str]) -> list[str]:
        """Name of the model for each prompt."""
        return [self.models[number] for number in self._fitted().choose(self.encode(prompts))]

    def expected_scores(self, prompts: Sequence[str]) -> NDArray[np.floating[Any]]:
        """What each model is expected to score on each prompt, (prompts, models)."""
        return self._fitted().expected(self.encode(prompts))

    def encode(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Features of each prompt, (prompts, features); a prompt's own, whatever it is read together with."""
        encoded = self._described(prompts, self._of_prompt)  # (prompts, features)
        check_finite(encoded, name="hidden states of the probe")
        return encoded.numpy()

    def trace(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Mean and variance over the entries of the last token's state in every chosen layer, (prompts, layers, 2)."""
        return self._described(prompts, _trace).numpy()

    def save(self, folder: str | Path) -> Path:
        """Write what was learned as JSON and safetensors; neither the probe nor the models."""
        settings = {"models": list(self.models), "features": self.features, "layers": self._layers, "max_length": self.max_length}
        return _router_files.write(Path(folder), settings | {"num_layers": num_layers(self.probe)}, self._fitted())

    @classmethod
    def load(cls, folder: str | Path, probe: Any, tokenizer: Any, *, batch_size: int = 16) -> Self:
        """Open what `save` wrote, with the same probe.

        Parameters
        ----------
        folder : path
            Where it lies.
        probe, tokenizer
            As they were when the router was fitted.
        batch_size : int, default=16
            Prompts that are read at once.

        Raises
        ------
        InputError
            ``router-other-probe`` when the probe has other layers.
        RunError
            When a file is missing or damaged.
        """
        settings, rule = _router_files.read(Path(folder))
        named = {name: settings[name] for name in ("models", "features", "layers", "max_length")}
        if settings["num_layers"] != num_layers(probe):
            raise _other_probe(folder, f"{num_layers(probe)} layers", f"{settings['num_layers']}")
        router = cls(probe, tokenizer, **named, batch_size=batch_size)
        width = router._of_prompt(torch.zeros(len(router._layers), 1, _width(probe))).numel()
        if width != len(rule.head.mean):
            raise _other_probe(folder, f"{width} features", f"{len(rule.head.mean)}")
        router.rule_ = rule
        return router

    def _fitted(self) -> RoutingRule:
        if self.rule_ is None:
            raise InputError("router-not-fitted", "got a router that has learned nothing, expected a fitted one. Call fit, or DomainRouter.load.")
        return self.rule_

    def _described(self, prompts: Sequence[str], describe: Callable[[Tensor], Tensor]) -> Tensor:
        return describe_prompts(
            self.probe,
            self.tokenizer,
            _checked_prompts(prompts),
            describe,
            layers=self._layers,
            max_length=self.max_length,
            batch_size=self.batch_size,
        )

    def _of_prompt(self, states: Tensor) -> Tensor:
        """Features of one prompt from its states (layers, tokens, dim)."""
        if self.features == "last":
            return states[:, -1].flatten()
        return states.mean(1).flatten() if self.features == "mean" else _trace(states).flatten()

    def _one_hot(self, labels: Sequence[str]) -> list[list[float]]:
        for label in labels:
            check_choice(label, self.models, name="labels")
        return [[float(label == model) for model in self.models] for label in labels]

    def _checked_scores(self, scores: Any, num_prompts: int) -> NDArray[np.float64]:
        worth = np.asarray(scores, dtype=np.float64)
        if worth.shape != (num_prompts, len(self.models)):
            raise InputError(
                "router-shapes",
                f"got scores of shape {worth.shape}, expected ({num_prompts}, {len(self.models)}): a row for each prompt and a column for each model.",
            )
        check_finite(torch.from_numpy(worth), name="scores")
        never = [model for model, column in zip(self.models, worth.T, strict=True) if not column.any()]
        if never:
            raise InputError(
                "router-model-never-right",
                f"got no prompt on which {', '.join(never)} is right, expected some for each model. Leave it out, or add prompts for it.",
            )
        return worth


def _trace(states: Tensor) -> Tensor:
    last = states[:, -1]  # (layers, dim)
    return torch.stack([last.mean(1), last.var(1, unbiased=False)], 1)  # (layers, 2)


def _chosen_layers(layers: Literal["all"] | Sequence[int], available: int) -> list[int]:
    if layers == "all":
        return list(range(available))
    chosen = list(layers)
    if not chosen or any(isinstance(layer, str) or not 0 <= layer < available for layer in chosen):
        raise InputError(
            "router-layers", f"got layers={layers!r}, expected numbers from 0, the embeddings, to {available - 1}. Pass layers='all' if in doubt."
        )
    return [int(layer) for layer in chosen]


def _checked_prompts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str) or not len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError("router-prompts", f"got prompts={prompts!r:.80}, expected a list of texts, at least one. Put a single text into a list.")
    return list(prompts)


def _check_length(name: str, values: Sequence[str] | None, expected: int) -> None:
    if values is not None and (isinstance(values, str) or len(values) != expected):
        raise InputError("router-shapes", f"got {len(values)} {name} for {expected} prompts, expected one for each. Check where they come from.")


def _width(probe: Any) -> int:
    return int(probe.get_input_embeddings().embedding_dim)


def _other_probe(folder: str | Path, got: str, expected: str) -> InputError:
    return InputError(
        "router-other-probe", f"got a probe with {got}, expected {expected} as in {folder}. Pass the probe that the router was fitted with."
    )
