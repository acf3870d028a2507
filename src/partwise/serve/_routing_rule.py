"""Which model a prompt goes to, from numbers that describe the prompt: linear models of scikit-learn, kept as plain arrays, and a margin for doubt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from partwise.checks import load_extra

__all__ = ["Lesson", "LinearHead", "RoutingRule", "best_margin", "fit_rule"]

Floats = NDArray[np.floating[Any]]
Link = Literal["softmax", "sigmoid", "identity"]

NEVER = -1e9  # logit of a class that no training prompt has
CERTAIN = 20.0  # logit of a model that is always right
REGULARIZATIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
NUM_FOLDS = 5
NUM_MARGINS = 20
STANDARD_ERRORS = 2.0  # by which a margin must beat the best single model before it is believed


@dataclass(frozen=True, eq=False)
class LinearHead:
    """A standardised linear model.

    Parameters
    ----------
    mean, scale : ndarray of shape (features,)
        What is subtracted, and what is divided by.
    weight : ndarray of shape (outputs, features)
        Of standardised features.
    bias : ndarray of shape (outputs,)
        Added.
    link : {"softmax", "sigmoid", "identity"}
        What makes outputs of the sums.
    """

    mean: Floats
    scale: Floats
    weight: Floats
    bias: Floats
    link: Link

    def __call__(self, features: Floats) -> Floats:
        """Outputs (prompts, outputs) for ``features`` (prompts, features)."""
        sums = (features - self.mean) / self.scale @ self.weight.T + self.bias  # (prompts, outputs)
        if self.link == "identity":
            return sums
        if self.link == "sigmoid":
            return 0.5 * (1 + np.tanh(sums / 2))
        powers: Floats = np.exp(sums - sums.max(1, keepdims=True))
        shares: Floats = powers / powers.sum(1, keepdims=True)
        return shares


@dataclass(frozen=True, eq=False)
class RoutingRule:
    """A head, what its outputs are worth, and when to doubt it.

    Parameters
    ----------
    head : LinearHead
        Gives probabilities of domains where there is a ``table``, expected scores of models where there is none.
    table : ndarray of shape (domains, models) or None
        Mean score of each model on each domain.
    domains : tuple of str
        Names of the rows of ``table``.
    best_single : int
        The model with the highest mean score.
    margin : float
        How much better another model must be expected to be before it is chosen; infinite: never.
    """

    head: LinearHead
    table: Floats | None
    domains: tuple[str, ...]
    best_single: int
    margin: float

    def expected(self, features: Floats) -> Floats:
        """Expected scores (prompts, models)."""
        outputs = self.head(features)
        return outputs if self.table is None else outputs @ self.table

    def choose(self, features: Floats) -> NDArray[np.intp]:
        """Number of the model for each prompt."""
        return _choose(self.expected(features), self.best_single, self.margin)


@dataclass(frozen=True, eq=False)
class Lesson:
    """What there is to learn from.

    Parameters
    ----------
    features : ndarray of shape (prompts, features)
        What is known of each prompt.
    scores : ndarray of shape (prompts, models)
        How well each model did.
    domain : ndarray of shape (prompts,) or None
        Number of the domain of each prompt; None: scores are predicted as they are.
    domains : tuple of str
        Their names.
    table : ndarray of shape (domains, models) or None
        What each model is worth on each domain, where that is known; else it is the mean of ``scores``.
    """

    features: Floats
    scores: Floats
    domain: NDArray[np.intp] | None
    domains: tuple[str, ...] = ()
    table: Floats | None = None

    def only(self, rows: NDArray[np.intp]) -> Lesson:
        """Some of the prompts."""
        domain = None if self.domain is None else self.domain[rows]
        return replace(self, features=self.features[rows], scores=self.scores[rows], domain=domain)

    @property
    def targets(self) -> Floats:
        """What a head predicts, (prompts, outputs)."""
        return self.scores if self.domain is None else np.eye(len(self.domains))[self.domain]


def fit_rule(
    lesson: Lesson, *, groups: Sequence[str] | None = None, margin: float | None = None, regularization: float | None = None, seed: int = 0
) -> RoutingRule:
    """Learn a rule.

    Parameters
    ----------
    lesson : Lesson
        Prompts and what is known about them.
    groups : sequence of str, optional
        Source of each prompt; cross-validation then holds out whole sources.
    margin : float, optional
        None: the one that would have gained most in cross-validation, or infinity where none would have gained with certainty.
    regularization : float, optional
        Inverse strength, ``C`` of scikit-learn. None: the one whose predictions were nearest to the truth in cross-validation.
    seed : int
        Of the folds.
    """
    strengths = REGULARIZATIONS if regularization is None else (regularization,)
    outputs, expected = np.zeros((len(strengths), *lesson.targets.shape)), np.zeros((len(strengths), *lesson.scores.shape))
    if regularization is None or margin is None:
        for train, held_out in _folds(len(lesson.features), groups, seed):
            for number, rule in enumerate(_rules(lesson.only(train), strengths)):
                outputs[number, held_out] = rule.head(lesson.features[held_out])
                expected[number, held_out] = rule.expected(lesson.features[held_out])
    best = int(np.square(outputs - lesson.targets).mean((1, 2)).argmin())
    (rule,) = _rules(lesson, strengths[best : best + 1])
    return replace(rule, margin=best_margin(expected[best], lesson.scores, rule.best_single) if margin is None else margin)


def _rules(lesson: Lesson, strengths: Sequence[float]) -> list[RoutingRule]:
    """Rules without a margin, one for each strength of regularization."""
    single, table = int(lesson.scores.mean(0).argmax()), lesson.table
    if lesson.domain is not None and table is None:
        table = _means(lesson.scores, lesson.domain, len(lesson.domains))
    prepared = _Prepared.of(lesson.features)
    return [RoutingRule(_fit_head(prepared, lesson, strength), table, lesson.domains, single, 0.0) for strength in strengths]


def best_margin(expected: Floats, scores: Floats, best_single: int) -> float:
    """The margin at which ``expected`` (prompts, models) would have gained most over the best single model; infinite if no gain is certain."""
    rows = np.arange(len(scores))
    best = expected.argmax(1)
    advantage = expected[rows, best] - expected[:, best_single]  # (prompts,)
    gain = scores[rows, best] - scores[:, best_single]
    found, most = np.inf, 0.0
    for margin in (0.0, *np.quantile(advantage, np.linspace(0, 1, NUM_MARGINS, endpoint=False)).tolist()):
        gains = np.where(advantage > margin, gain, 0.0)
        mean, error = float(gains.mean()), float(gains.std() / np.sqrt(len(gains)))
        if mean > max(most, STANDARD_ERRORS * error):
            found, most = margin, mean
    return found


def _choose(expected: Floats, best_single: int, margin: float) -> NDArray[np.intp]:
    best = expected.argmax(1)
    advantage = expected[np.arange(len(expected)), best] - expected[:, best_single]
    return np.where(advantage > margin, best, best_single)


def _folds(num_prompts: int, groups: Sequence[str] | None, seed: int) -> Any:
    selection: Any = load_extra("sklearn.model_selection", extra="sklearn")
    if groups is None:
        return selection.KFold(min(NUM_FOLDS, num_prompts), shuffle=True, random_state=seed).split(np.empty(num_prompts))
    number = min(NUM_FOLDS, len(set(groups)))
    return selection.GroupKFold(number, shuffle=True, random_state=seed).split(np.empty(num_prompts), groups=list(groups))


def _means(scores: Floats, domain: NDArray[np.intp], num_domains: int) -> Floats:
    """Mean score of each model on each domain; that on all prompts for a domain that is not there."""
    return np.stack([scores[domain == number].mean(0) if (domain == number).any() else scores.mean(0) for number in range(num_domains)])


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Standardised features; where there are more of them than prompts, turned into as many axes as prompts, which changes no fit.

    Parameters
    ----------
    mean, scale : ndarray of shape (features,)
        Of the prompts.
    axes : ndarray of shape (axes, features) or None
        Orthonormal rows.
    values : ndarray of shape (prompts, axes)
        What is fitted on.
    """

    mean: Floats
    scale: Floats
    axes: Floats | None
    values: Floats

    @classmethod
    def of(cls, features: Floats) -> _Prepared:
        preprocessing: Any = load_extra("sklearn.preprocessing", extra="sklearn")
        scaler = preprocessing.StandardScaler()
        values = scaler.fit_transform(features.astype(np.float64))
        if values.shape[1] <= len(values):
            return cls(scaler.mean_, scaler.scale_, None, values)
        left, sizes, axes = np.linalg.svd(values, full_matrices=False)
        return cls(scaler.mean_, scaler.scale_, axes, left * sizes)

    def head(self, weight: Floats, bias: Floats, link: Link) -> LinearHead:
        """A head with ``weight`` (outputs, axes)."""
        return LinearHead(self.mean, self.scale, weight if self.axes is None else weight @ self.axes, bias, link)


def _fit_head(prepared: _Prepared, lesson: Lesson, regularization: float) -> LinearHead:
    if lesson.domain is not None:
        return _fit_domains(prepared, lesson.domain, len(lesson.domains), regularization)
    if np.isin(lesson.scores, (0.0, 1.0)).all():
        return _fit_chances(prepared, lesson.scores, regularization)
    linear: Any = load_extra("sklearn.linear_model", extra="sklearn")
    learned = linear.Ridge(alpha=1 / regularization).fit(prepared.values, lesson.scores)
    return prepared.head(learned.coef_, learned.intercept_, "identity")


def _logistic(regularization: float) -> Any:
    linear: Any = load_extra("sklearn.linear_model", extra="sklearn")
    return linear.LogisticRegression(C=regularization, max_iter=5000, tol=1e-6)


def _fit_domains(prepared: _Prepared, domain: NDArray[np.intp], num_domains: int, regularization: float) -> LinearHead:
    """Probabilities of all domains, of which some may be missing."""
    weight, bias = np.zeros((num_domains, prepared.values.shape[1])), np.full(num_domains, NEVER)
    present = np.unique(domain)
    if len(present) == 1:
        bias[present] = 0.0
        return prepared.head(weight, bias, "softmax")
    learned = _logistic(regularization).fit(prepared.values, domain)
    if len(present) == 2:
        weight[present[1]], bias[present] = learned.coef_[0], (0.0, learned.intercept_[0])
    else:
        weight[present], bias[present] = learned.coef_, learned.intercept_
    return prepared.head(weight, bias, "softmax")


def _fit_chances(prepared: _Prepared, scores: Floats, regularization: float) -> LinearHead:
    """The chance of each model to be right."""
    weight, bias = np.zeros((scores.shape[1], prepared.values.shape[1])), np.zeros(scores.shape[1])
    for model, right in enumerate(scores.T > 0):
        if right.all() or not right.any():
            bias[model] = CERTAIN if right.all() else -CERTAIN
            continue
        learned = _logistic(regularization).fit(prepared.values, right)
        weight[model], bias[model] = learned.coef_[0], learned.intercept_[0]
    return prepared.head(weight, bias, "sigmoid")
