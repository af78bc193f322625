"""Scores of predictions on held-out rows, by name: the metrics of GLUE, of classification and of regression."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from ..scoring import predictions

Score = Callable[[Any, Any], float]
"""Truth and guess, one a row: class indices, or numbers for regression."""


def _of_sklearn(name: str, **options: Any) -> Score:
    """A function of `sklearn.metrics`, whose import takes seconds and waits for the first score."""

    def score(truth: Any, guess: Any) -> float:
        from sklearn import metrics

        return float(getattr(metrics, name)(truth, guess, **options))

    return score


def _correlation(name: str) -> Score:
    """A correlation of `scipy.stats`; 0 where it is undefined, because truth or guesses are all alike."""

    def score(truth: Any, guess: Any) -> float:
        from scipy import stats

        if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(guess) == 0:
            return 0.0
        return float(getattr(stats, name)(truth, guess).statistic)

    return score


SCORES: dict[str, Score] = {
    "accuracy": _of_sklearn("accuracy_score"),
    "f1": _of_sklearn("f1_score", pos_label=1, zero_division=0.0),  # of class 1, as GLUE has it for MRPC and QQP
    "macro_f1": _of_sklearn("f1_score", average="macro", zero_division=0.0),
    "matthews": _of_sklearn("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
"""All of them are better when larger; "loss", which `evaluate_sequences` always gives, when smaller."""


def directions(names: Sequence[str]) -> dict[str, str]:
    """The loss, better when smaller ("min"), and the scores, better when larger ("max")."""
    return {"loss": "min", **dict.fromkeys(names, "max")}


def evaluate_sequences(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], scores: Sequence[str], *, regression: bool = False
) -> dict[str, float]:
    """Loss (mean over the rows: nats, or the squared error for regression) and scores of a sequence classifier.

    Evaluates without dropout and gradients, each row counted once; every module is left in the mode it had.

    Args:
        model: its output has `loss`, the mean over the rows, and `logits` (rows, classes), (rows, 1) for regression.
        batches: mappings with `labels` (rows,).
        scores: keys of `SCORES`.
        regression: the guess is the logit itself, not the largest one's class.

    Raises:
        ValueError: if there is no batch, or one without labels.
    """
    loss, truth, guess = predictions(model, batches, regression=regression)
    return {"loss": loss, **{name: SCORES[name](truth, guess) for name in scores}}
