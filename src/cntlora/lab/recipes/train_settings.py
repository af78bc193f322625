"""The settings of a training, from the experiment file to the Trainer, and the batches that it goes through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..record import Sample
from .trackers import TRACKERS
from .values import at_least, one_of, within

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""Gives the held-out metrics of a model by name."""
MakeSamples = Callable[[nn.Module, int], list[Sample]]
"""Gives what a model makes after a number of updates, as `Task.sample` does."""

WARMUP = 10
"""Updates of warm-up where none is given; a training with fewer updates has none."""
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""Our names → transformers' `SchedulerType`; all begin with a linear warm-up."""
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Evaluation:
    """Held-out metrics after `step` updates.

    Attributes:
        step: number of updates.
        metrics: by name, in their own units.
        seconds: of training up to here, evaluations not counted.
    """

    step: int
    metrics: Mapping[str, float]
    seconds: float = 0.0


@dataclass(frozen=True)
class TrainSettings:
    """The training with AdamW: the section `[train]` of an experiment file, and what `train` is given.

    Attributes:
        steps: updates; 100 if neither this nor `epochs` is given.
        epochs: passes over the training data, instead of `steps`.
        eval_at: when the held-out data is scored: updates, or epochs where `epochs` is given; 0 is the start, and the
            end always is one of them.
        sample_at: when the task writes pictures or texts, counted as in `eval_at`.
        warmup: updates of linear warm-up; 10 if neither this nor `warmup_epochs` is given, 0 with fewer `steps`.
        warmup_epochs: the same in epochs, instead of `warmup`.
        schedule: after the warm-up: "linear" or "cosine" down to 0, or "constant".
        weight_decay: AdamW's.
        max_grad_norm: the norm of all gradients together is clipped to it.
        precision: of the forward pass: "float32", or "bfloat16" by autocast.
        gradient_accumulation: batches an update.
        layer_decay: for full fine-tuning: the learning rate of a layer in terms of that of the layer above; 0 for none.
        save_every: updates between checkpoints, from which an interrupted run goes on; 0 for none.
        report_to: trackers that curves and the initialisation are reported to, see `TRACKERS`; no part of a record.
    """

    steps: int | None = None
    epochs: float | None = None
    eval_at: tuple[int, ...] = ()
    sample_at: tuple[int, ...] = ()
    warmup: int | None = None
    warmup_epochs: float | None = None
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "float32"
    gradient_accumulation: int = 1
    layer_decay: float = 0.0
    save_every: int = 0
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_length()
        at_least("train", self, gradient_accumulation=1, save_every=0)
        within("train.weight_decay", self.weight_decay, 0.0, math.inf, "0 for none")
        within("train.max_grad_norm", self.max_grad_norm, 0.0, math.inf, "1 is usual", open_low=True)
        within("train.layer_decay", self.layer_decay, 0.0, 1.0, "such as 0.75, 0 for none")
        one_of("train.schedule", self.schedule, SCHEDULES)
        one_of("train.precision", self.precision, PRECISIONS)
        for name in self.report_to:
            one_of("train.report_to", name, TRACKERS)

    def _check_length(self) -> None:
        """Steps or epochs, and the moments within them; the defaults depend on what is given."""
        for one, other in (("steps", "epochs"), ("warmup", "warmup_epochs")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"train.{one}: train.{other} is there too; keep one of them")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "steps", 100)  # what a record says, not "the default"
        if self.warmup_epochs is None and self.warmup is None:
            fits = self.steps is None or self.steps >= WARMUP
            object.__setattr__(self, "warmup", WARMUP if fits else 0)
        for name, low in (("steps", 1), ("warmup", 0)):
            if getattr(self, name) is not None:
                at_least("train", self, **{name: low})
        if self.epochs is not None:
            within("train.epochs", self.epochs, 0.0, math.inf, "such as 30", open_low=True)
        if self.warmup_epochs is not None:
            within("train.warmup_epochs", self.warmup_epochs, 0.0, math.inf, "such as 3")
        for name in ("warmup", "warmup_epochs"):
            length = "steps" if name == "warmup" else "epochs"
            value, end = getattr(self, name), getattr(self, length)
            if value is not None and end is not None and value > end:
                raise ValueError(f"train.{name}: expected at most train.{length}={end}, got {value}")
        length, unit = ("steps", "updates") if self.epochs is None else ("epochs", "epochs")
        for name in ("eval_at", "sample_at"):
            outside = [step for step in getattr(self, name) if not 0 <= step <= getattr(self, length)]
            if outside:
                end = getattr(self, length)
                raise ValueError(f"train.{name}: expected {unit} from 0 to train.{length}={end}, got {outside}")

    def in_updates(self, batches: Iterable[Any]) -> TrainSettings:
        """The same training counted in updates: epochs become passes over these batches, which then need a length."""
        if self.epochs is None and self.warmup_epochs is None:
            return self

        def updates(epochs: float) -> int:
            return round(epochs * len(batches) / self.gradient_accumulation)  # type: ignore[arg-type]

        steps, eval_at, sample_at = self.steps or 0, self.eval_at, self.sample_at
        if self.epochs is not None:
            steps = max(1, updates(self.epochs))
            eval_at, sample_at = (tuple(min(steps, updates(e)) for e in at) for at in (eval_at, sample_at))
        warmup = self.warmup or 0 if self.warmup_epochs is None else updates(self.warmup_epochs)
        counted = {"steps": steps, "epochs": None, "warmup": min(warmup, steps), "warmup_epochs": None}
        return replace(self, eval_at=eval_at, sample_at=sample_at, **counted)  # type: ignore[arg-type]


def cycled(batches: Iterable[Any], count: int, first: int = 0) -> Iterator[Any]:
    """Batches number `first` to `count` − 1, from the start again whenever `batches` ends.

    What depends on the pass (augmentation, noise) follows it: by `set_epoch(pass)` where `batches` has it, as PyTorch's
    samplers do, else by counting how often it is read, for which the passes before `first` are read too.

    Raises:
        ValueError: if there is none, or a one-shot iterator ends too early.
    """
    set_epoch = getattr(batches, "set_epoch", None)
    given = passes = 0
    if set_epoch:
        passes = first // len(batches)  # type: ignore[arg-type]
        given = passes * len(batches)  # type: ignore[arg-type]
    while given < count:
        before = given
        if set_epoch:
            set_epoch(passes)
        for batch in batches:
            if given >= first:
                yield batch
            given += 1
            if given == count:
                return
        passes += 1
        if given == before:
            raise ValueError(_ended(given, count))


def _ended(given: int, count: int) -> str:
    if not given:
        return "batches: expected at least one batch, got none"
    return (
        f"batches: ended after {given} of {count} steps and cannot be read again; give a list or a "
        "DataLoader instead of an iterator, or fewer steps"
    )
