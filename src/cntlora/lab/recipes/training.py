"""Training of every recipe: transformers' `Trainer` under one function, the same for every method that is compared.

Everything random in it (dropout, the order of the data) comes from the caller: call `torch.manual_seed(seed)`
right before `train`, and give batches whose order is fixed. Then the same seed gives the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..record import SampleEntry
from .trackers import Tracked, check_trackers
from .train_settings import Evaluate, Evaluation, MakeSamples, TrainSettings


@dataclass(frozen=True)
class Curve:
    """Record of a training run.

    Attributes:
        losses: the training loss of every update done, before it; finite.
        evaluations: in the order of their steps.
        times: seconds from the start to the end of every update, data included, evaluations and samples not.
        samples: what `sample` gave, each with its "step".
        diverged: whether the run stopped early at a loss that is not finite (and is not among `losses`).
    """

    losses: list[float]
    evaluations: list[Evaluation]
    times: list[float]
    samples: list[SampleEntry]
    diverged: bool = False

    @property
    def seconds(self) -> float:
        """Wall-clock time of the training steps."""
        return self.times[-1] if self.times else 0.0

    @property
    def mean_loss(self) -> float:
        """Mean training loss over all steps, how fast it learned; inf if diverged, which never wins."""
        return math.inf if self.diverged or not self.losses else math.fsum(self.losses) / len(self.losses)

    @property
    def final(self) -> Evaluation | None:
        """The last evaluation; None if there was none."""
        return self.evaluations[-1] if self.evaluations else None


def train(
    model: nn.Module,
    batches: Iterable[Any],
    settings: TrainSettings,
    *,
    learning_rate: float,
    evaluate: Evaluate | None = None,
    sample: MakeSamples | None = None,
    progress: Callable[[int, float], None] | None = None,
    folder: Path | None = None,
    tracked: Tracked | None = None,
) -> Curve:
    """Train the parameters that require gradients with AdamW, in transformers' `Trainer`.

    Deterministic if the caller seeds the global generator (`torch.manual_seed`) just before, for dropout, and
    the order of `batches` is fixed. The model is left in the modes it came in, without gradients.

    Args:
        model: called as model(**batch), or model(batch) if the batch is no mapping; gives an output with a
            `loss`, or the loss itself.
        batches: read again from its start when it ends; one-shot iterators must hold all batches that are needed.
        settings: how to train, see there; epochs are counted on `batches`.
        learning_rate: the largest one, reached after the warm-up; the very first update of one has factor 0.
        evaluate: scores the model at `settings.eval_at` and at the end, e.g.
            `lambda model: classifier_metrics(model, held_out)`.
        sample: makes images or texts of the model at `settings.sample_at`.
        progress: called after every update with the number of updates and the loss.
        folder: for checkpoints; training goes on from the last one in it. None for no files at all.
        tracked: what the trackers of `settings.report_to` are told besides the curves.

    Raises:
        ValueError: for no trainable parameter, no batches or too few, or an argument out of range.
        TypeError: if the model's output has no loss.
        MissingExtraError: if a tracker is not installed.
    """
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate: expected a finite number above 0, got {learning_rate}")
    for field, at, function in (
        ("eval_at", settings.eval_at, evaluate),
        ("sample_at", settings.sample_at, sample),
    ):
        if at and function is None:
            needed = "evaluate" if field == "eval_at" else "sample"
            raise ValueError(f"{field}={sorted(at)} needs {needed}, a function of the model")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: no parameter requires a gradient; add an adapter, or set requires_grad")
    check_trackers(settings.report_to)
    from .trainer import Recorder, run_trainer  # transformers' Trainer takes seconds to import

    settings = settings.in_updates(batches)
    recorder = Recorder(settings, evaluate, sample, progress)
    diverged = run_trainer(model, batches, settings, learning_rate, recorder, folder, tracked or Tracked())
    return Curve(recorder.losses, recorder.evaluations, recorder.times, recorder.samples, diverged)
