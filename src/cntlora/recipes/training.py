"""A small training loop and its record, the same for every method that is compared.

Everything random in it (dropout, the order of the data) comes from the caller: call `torch.manual_seed(seed)`
right before `train`, and give batches whose order is fixed. Then the same seed gives the same curve.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn

from ..batches import to_device

Evaluate = Callable[[nn.Module], tuple[float, float, float]]
"""Gives loss (nats), accuracy and macro F1 (both in [0, 1]) of a model, as `evaluate_classifier` does."""


@dataclass(frozen=True)
class Evaluation:
    """Scores after `step` updates: loss in nats, accuracy and macro F1 in [0, 1]."""

    step: int
    loss: float
    accuracy: float
    macro_f1: float


@dataclass(frozen=True)
class Curve:
    """What happened in a training run.

    Attributes:
        losses: the training loss of every step done, before its update; finite.
        evaluations: in the order of their steps.
        seconds: wall-clock time of the training steps, data included, evaluations not.
        diverged: whether the run stopped early at a loss that is not finite (and is not among `losses`).
    """

    losses: list[float]
    evaluations: list[Evaluation]
    seconds: float
    diverged: bool = False

    @property
    def mean_loss(self) -> float:
        """Mean training loss over all steps, how fast it learned; inf if diverged, which never wins."""
        return math.inf if self.diverged or not self.losses else math.fsum(self.losses) / len(self.losses)

    @property
    def final(self) -> Evaluation | None:
        """The last evaluation; None if there was none."""
        return self.evaluations[-1] if self.evaluations else None


def linear_schedule(step: int, *, warmup: int, steps: int) -> float:
    """Factor on the learning rate at update `step` = 0, 1, …: step/warmup, then linear down to 0 at `steps`.

    As transformers' `get_linear_schedule_with_warmup`: with a warm-up the very first update has factor 0.
    """
    if step < warmup:
        return step / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def train(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup: int = 10,
    max_grad_norm: float = 1.0,
    evaluate: Evaluate | None = None,
    eval_at: Iterable[int] = (),
    progress: Callable[[int, float], None] | None = None,
) -> Curve:
    """Trains the parameters that require gradients with AdamW, linear warm-up and linear decay.

    Deterministic if the caller seeds the global generator (`torch.manual_seed`) just before, for dropout, and
    the order of `batches` is fixed. The model is left in the modes it came in, without gradients.

    Args:
        model: called as model(**batch), or model(batch) if the batch is no mapping; gives an output with a
            `loss`, or the loss itself.
        batches: read again from its start when it ends; one-shot iterators must hold `steps` batches.
        steps: number of updates, at least 1.
        learning_rate: the largest one, reached after the warm-up.
        weight_decay: AdamW's, on all trained parameters.
        warmup: updates of linear warm-up, at most `steps`.
        max_grad_norm: the norm of all gradients together is clipped to it; math.inf for no clipping.
        evaluate: scores the model, e.g. `lambda model: evaluate_classifier(model, held_out)`.
        eval_at: numbers of updates after which to evaluate, 0 to `steps`; `steps` always is one of them.
        progress: called after every update with the number of updates and the loss.

    Raises:
        ValueError: for no trainable parameter, no batches or too few, or an argument out of range.
        TypeError: if the model's output has no loss.
    """
    at = _evaluation_steps(steps, evaluate, eval_at)
    _check(steps, learning_rate, warmup, max_grad_norm)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: no parameter requires a gradient; add an adapter, or set requires_grad")
    schedule = partial(linear_schedule, warmup=warmup, steps=steps)
    run = _Run(model, parameters, learning_rate, weight_decay, schedule)
    source = cycled(batches, steps)
    if evaluate and 0 in at:
        run.evaluations.append(Evaluation(0, *evaluate(model)))
    for step in range(1, steps + 1):
        loss = run.step(source, max_grad_norm)
        if not math.isfinite(loss):
            return run.curve(diverged=True)
        if progress:
            progress(step, loss)
        if evaluate and step in at:
            run.evaluations.append(Evaluation(step, *evaluate(model)))
    return run.curve(diverged=False)


def _check(steps: int, learning_rate: float, warmup: int, max_grad_norm: float) -> None:
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate: expected a finite number above 0, got {learning_rate}")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup: expected 0 to steps={steps}, got {warmup}")
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: expected above 0 (math.inf for no clipping), got {max_grad_norm}")


def _evaluation_steps(steps: int, evaluate: Evaluate | None, eval_at: Iterable[int]) -> set[int]:
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    at = set(eval_at)
    outside = sorted(step for step in at if not 0 <= step <= steps)
    if outside:
        raise ValueError(f"eval_at: expected steps from 0 to {steps}, got {outside}")
    if at and evaluate is None:
        raise ValueError(f"eval_at={sorted(at)} needs evaluate, a function of the model")
    return at | {steps} if evaluate else at


@dataclass
class _Run:
    """The state of a run: the optimizer and what was recorded."""

    model: nn.Module
    parameters: list[nn.Parameter]
    learning_rate: float
    weight_decay: float
    schedule: Callable[[int], float]
    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        rate, decay = self.learning_rate, self.weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)

    def step(self, source: Iterator[Any], max_grad_norm: float) -> float:
        """One update, unless the loss is not finite; the loss."""
        start = time.perf_counter()
        with modes(self.model, training=True):
            loss = _loss_of(_call(self.model, to_device(next(source), self.parameters[0].device)))
            value = loss.item()
            if math.isfinite(value):
                self._update(loss, max_grad_norm)
                self.losses.append(value)
        self.seconds += time.perf_counter() - start
        return value

    def _update(self, loss: Tensor, max_grad_norm: float) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def curve(self, *, diverged: bool) -> Curve:
        return Curve(self.losses, self.evaluations, self.seconds, diverged)


def cycled(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """`count` batches, from the start again whenever `batches` ends.

    Raises:
        ValueError: if there is none, or a one-shot iterator ends too early.
    """
    given = 0
    while given < count:
        before = given
        for batch in batches:
            yield batch
            given += 1
            if given == count:
                return
        if given == before == 0:
            raise ValueError("batches: expected at least one batch, got none")
        if given == before:
            raise ValueError(
                f"batches: ended after {given} of {count} steps and cannot be read again; give a list or a "
                "DataLoader instead of an iterator, or fewer steps"
            )


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
    device = next(model.parameters()).device
    total, truth, guess = 0.0, [], []
    with modes(model, training=False), torch.no_grad():
        for batch in batches:
            if not isinstance(batch, Mapping) or "labels" not in batch:
                raise ValueError("batches: expected mappings with labels to evaluate a classifier")
            output = model(**to_device(batch, device))
            rows = len(batch["labels"])
            total += float(_loss_of(output)) * rows
            truth += batch["labels"].tolist()
            guess += output.logits.argmax(dim=-1).tolist()
    if not truth:
        raise ValueError("batches: expected at least one batch, got none")
    macro_f1 = f1_score(truth, guess, average="macro", zero_division=0.0)
    return total / len(truth), float(accuracy_score(truth, guess)), float(macro_f1)


def _call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _loss_of(output: Any) -> Tensor:
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(
            f"the model gave {type(output).__name__} without a scalar loss; are there labels in the batches?"
        )
    return loss
