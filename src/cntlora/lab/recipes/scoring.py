"""Scores of a model on held-out batches, and the modes it is scored in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batches import device_of, to_device

CLASSIFIER_METRICS = {"loss": "min", "accuracy": "max", "macro_f1": "max"}
"""What `classifier_metrics` gives, and whether the best is the smallest or the largest."""


@contextmanager
def modes(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside the block; after it every module is in its own mode again."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def evaluate_classifier(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Mean loss (nats), accuracy and macro F1 (both in [0, 1]) of a classifier, each row counted once.

    Evaluates without dropout and without gradients, and leaves every module in the mode it had.

    Args:
        model: its output has `loss`, the mean over the rows, and `logits` (rows, classes).
        batches: mappings with `labels` (rows,).

    Raises:
        ValueError: if there is no batch, or one without labels.
    """
    from sklearn.metrics import accuracy_score, f1_score  # here, because settings are read without it

    loss, truth, guess = predictions(model, batches)
    macro_f1 = f1_score(truth, guess, average="macro", zero_division=0.0)
    return loss, float(accuracy_score(truth, guess)), float(macro_f1)


def predictions(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, regression: bool = False
) -> tuple[float, list[Any], list[Any]]:
    """Mean loss over the rows, truth and guess of every row, without dropout and gradients.

    Args:
        model: its output has `loss`, the mean over the rows, and `logits` (rows, classes), (rows, 1) for regression.
        batches: mappings with `labels` (rows,).
        regression: the guess is the logit itself, not the largest one's class.

    Raises:
        ValueError: if there is no batch, or one without labels.
    """
    device = device_of(model)
    total, truth, guess = 0.0, [], []
    with modes(model, training=False), torch.no_grad():
        for batch in batches:
            if not isinstance(batch, Mapping) or "labels" not in batch:
                raise ValueError("batches: expected mappings with labels to evaluate a classifier")
            output = model(**to_device(batch, device))
            total += float(loss_of(output)) * len(batch["labels"])
            truth += batch["labels"].tolist()
            guess += (output.logits.float().flatten() if regression else output.logits.argmax(dim=-1)).tolist()
    if not truth:
        raise ValueError("batches: expected at least one batch, got none")
    return total / len(truth), truth, guess


def classifier_metrics(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """`evaluate_classifier` by name, for a task's `evaluate`."""
    return dict(zip(CLASSIFIER_METRICS, evaluate_classifier(model, batches), strict=True))


def loss_of(output: Any) -> Tensor:
    """The training loss in what a model gave: its `loss`, or the output itself.

    Raises:
        TypeError: if there is no scalar loss.
    """
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(
            f"the model gave {type(output).__name__} without a scalar loss; are there labels in the batches?"
        )
    return loss
