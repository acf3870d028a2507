"""How good a model is at its task, measured on held-out rows. scikit-learn and scipy do the computing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from partwise.checks import RunError, load_extra
from partwise.tune._batches import IGNORED, Encoded, eval_batches
from partwise.tune._data import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

_HEADLINES = {"classification": ("accuracy", True), "regression": ("pearson", True), "causal-lm": ("perplexity", False)}


def headline(task: Task) -> tuple[str, bool]:
    """Name of the metric that a task is judged by, and whether higher is better."""
    return _HEADLINES[task]


def score(task: Task, num_labels: int, predictions: Sequence[float], targets: Sequence[float]) -> dict[str, float]:
    """Metrics of a task, the headline metric first.

    Predictions that are all the same tell nothing: their Matthews, Pearson and Spearman coefficients, which are 0 / 0, are defined as 0 here. The same
    holds for targets that are all the same.

    Parameters
    ----------
    task : {"classification", "regression", "causal-lm"}
        What was predicted.
    num_labels : int
        Number of classes. With two, F1 is that of class 1; with more, the mean over the classes.
    predictions : sequence of float
        Class of every row, or score of every row, or for causal-lm the summed negative log-likelihood (nats) of the tokens of every row.
    targets : sequence of float
        True class, true score, or for causal-lm the number of tokens that the sum of this row runs over.

    Returns
    -------
    dict of str to float
        classification: ``accuracy``, ``matthews``, ``f1``; regression: ``pearson``, ``spearman``, ``mse``; causal-lm: ``perplexity`` (the exponential of
        the mean over all tokens, so a long row counts more than a short one).
    """
    if task == "causal-lm":
        mean = sum(predictions) / sum(targets)
        return {"perplexity": math.exp(mean) if mean < math.log(1e300) else math.inf}
    metrics: Any = load_extra("sklearn.metrics", extra="sklearn")
    constant = len(set(predictions)) == 1 or len(set(targets)) == 1
    if task == "classification":
        average = {"average": "binary"} if num_labels == 2 else {"average": "macro", "labels": range(num_labels)}
        return {
            "accuracy": float(metrics.accuracy_score(targets, predictions)),
            "matthews": 0.0 if constant else float(metrics.matthews_corrcoef(targets, predictions)),
            "f1": float(metrics.f1_score(targets, predictions, zero_division=0.0, **average)),
        }
    stats: Any = load_extra("scipy.stats", extra="sklearn")
    return {
        "pearson": 0.0 if constant else float(stats.pearsonr(targets, predictions).statistic),
        "spearman": 0.0 if constant else float(stats.spearmanr(targets, predictions).statistic),
        "mse": float(metrics.mean_squared_error(targets, predictions)),
    }


def evaluate(model: nn.Module, encoded: Encoded, task: Task, *, batch_size: int, pad_token_id: int, num_labels: int) -> dict[str, float]:
    """Run a model over held-out rows.

    The model comes back as it was, with every module in the mode it had, and no random number is drawn.

    Parameters
    ----------
    model : torch.nn.Module
        Called with the inputs of a batch, it returns an object with ``logits``: (batch, num_labels), or (batch, seq, vocabulary) for causal-lm.
    encoded : Encoded
        The rows.
    task : {"classification", "regression", "causal-lm"}
        What is predicted.
    batch_size : int
        Rows per forward pass. Decides speed and memory, not the result.
    pad_token_id : int
        Token that fills short rows.
    num_labels : int
        Number of classes.

    Returns
    -------
    dict of str to float
        What ``score`` returns, and ``loss``: mean cross-entropy per row, mean squared error, or mean cross-entropy per token, in nats.

    Raises
    ------
    RunError
        ``diverged`` when the model returns NaN or infinite values.
    """
    import torch

    predictions: list[float] = []
    targets: list[float] = []
    total, count = 0.0, 0.0
    device = next(model.parameters()).device
    with _evaluating(model), torch.no_grad():
        for batch in eval_batches(encoded, batch_size=batch_size, pad_token_id=pad_token_id):
            labels = batch.pop("labels").to(device)
            logits = model(**{name: value.to(device) for name, value in batch.items()}).logits.float()
            found, true, losses = _judge(task, logits, labels)
            predictions += found.tolist()
            targets += true.tolist()
            total += float(losses.double().sum())
            count += float(true.sum()) if task == "causal-lm" else len(true)
    if not math.isfinite(total):
        raise RunError("diverged", "the model returned NaN or infinite values on the held-out rows, expected finite ones. Lower --lr and run again.")
    return {**score(task, num_labels, predictions, targets), "loss": total / count}


def _judge(task: Task, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, targets and losses of a batch, each (batch,), as ``score`` takes them."""
    import torch
    from torch.nn import functional

    if task == "classification":
        return logits.argmax(dim=1), labels, functional.cross_entropy(logits, labels, reduction="none")
    if task == "regression":
        found = logits.squeeze(1)  # (batch,)
        return found, labels, torch.square(found - labels)
    following = labels[:, 1:]  # (batch, seq - 1); the logits at a token tell the next one
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), following, ignore_index=IGNORED, reduction="none")  # (batch, seq - 1)
    summed = losses.double().sum(dim=1)  # (batch,)
    return summed, (following != IGNORED).sum(dim=1), summed


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
