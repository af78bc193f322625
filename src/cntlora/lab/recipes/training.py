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
from .train_options import Evaluate, Evaluation, MakeSamples, TrainOptions


@dataclass(frozen=True)
class Curve:
    """What happened in a training run.

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
    *,
    evaluate: Evaluate | None = None,
    eval_at: Iterable[int] = (),
    sample: MakeSamples | None = None,
    sample_at: Iterable[int] = (),
    progress: Callable[[int, float], None] | None = None,
    folder: Path | None = None,
    **options: Any,
) -> Curve:
    """Trains the parameters that require gradients with AdamW, in transformers' `Trainer`.

    Deterministic if the caller seeds the global generator (`torch.manual_seed`) just before, for dropout, and
    the order of `batches` is fixed. The model is left in the modes it came in, without gradients.

    Args:
        model: called as model(**batch), or model(batch) if the batch is no mapping; gives an output with a
            `loss`, or the loss itself.
        batches: read again from its start when it ends; one-shot iterators must hold all batches that are needed.
        evaluate: scores the model, e.g. `lambda model: classifier_metrics(model, held_out)`.
        eval_at: numbers of updates after which to evaluate, 0 to `steps`; `steps` always is one of them.
        sample: makes pictures or texts of the model.
        sample_at: numbers of updates after which it does, 0 to `steps`.
        progress: called after every update with the number of updates and the loss.
        folder: for checkpoints; training goes on from the last one in it. None for no files at all.
        options: fields of `TrainOptions`:
            steps: number of updates, at least 1.
            learning_rate: the largest one, reached after the warm-up.
            weight_decay: AdamW's, on all trained parameters.
            warmup: updates of linear warm-up, at most `steps`; the very first update of one has factor 0.
            schedule: after the warm-up: "linear" or "cosine" down to 0 at `steps`, or "constant".
            max_grad_norm: the norm of all gradients together is clipped to it; math.inf for no clipping.
            precision: of the forward pass: "float32", or "bfloat16" by autocast (weights stay as they are).
            gradient_accumulation: batches an update; its loss is their mean.
            layer_decay: the learning rate of a layer is this factor times that of the layer above it, for
                full fine-tuning, see `cntlora.lab.recipes.layer_decay`; None for one rate.
            save_every: updates between checkpoints in `folder`; 0 for none.

    Raises:
        ValueError: for no trainable parameter, no batches or too few, or an argument out of range.
        TypeError: if the model's output has no loss.
    """
    settings = TrainOptions(**options)
    evaluations = _steps("eval_at", settings.steps, eval_at, evaluate) | ({settings.steps} if evaluate else set())
    samples = _steps("sample_at", settings.steps, sample_at, sample)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: no parameter requires a gradient; add an adapter, or set requires_grad")
    from .trainer import Recorder, run_trainer  # transformers' Trainer takes seconds to import

    recorder = Recorder(evaluate, evaluations, sample, samples, progress, settings.gradient_accumulation)
    diverged = run_trainer(model, batches, settings, recorder, folder)
    return Curve(recorder.losses, recorder.evaluations, recorder.times, recorder.samples, diverged)


def _steps(name: str, steps: int, at: Iterable[int], function: Any) -> set[int]:
    """The numbers of updates of evaluations or samples."""
    wanted = set(at)
    outside = sorted(step for step in wanted if not 0 <= step <= steps)
    if outside:
        raise ValueError(f"{name}: expected steps from 0 to {steps}, got {outside}")
    if wanted and function is None:
        what = "evaluate" if name == "eval_at" else "sample"
        raise ValueError(f"{name}={sorted(wanted)} needs {what}, a function of the model")
    return wanted
