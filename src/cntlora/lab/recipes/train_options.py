"""What a training run is told, and the batches that it goes through: shared by `train` and what runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..record import Sample
from .values import one_of

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""Gives the held-out metrics of a model by name."""
MakeSamples = Callable[[nn.Module, int], list[Sample]]
"""Gives what a model makes after a number of updates, as `Task.sample` does."""

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
class TrainOptions:
    """How to train; see `train` for each."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup: int = 10
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    precision: str = "float32"
    gradient_accumulation: int = 1
    layer_decay: float | None = None
    save_every: int = 0

    def __post_init__(self) -> None:
        for name, low in {"steps": 1, "gradient_accumulation": 1, "save_every": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate: expected a finite number above 0, got {self.learning_rate}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup: expected 0 to steps={self.steps}, got {self.warmup}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected above 0 (math.inf for no clipping), got {self.max_grad_norm}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: expected above 0 and at most 1, got {self.layer_decay}")
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("precision", self.precision, PRECISIONS)


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
