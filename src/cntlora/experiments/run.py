"""One run: a model, an arm, its initialisation, training and scores, as one record."""

from __future__ import annotations

import itertools
import math
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ..adapters import apply_plan
from ..batches import to_device
from ..compute import compute_plan
from ..plan import InitPlan
from ..recipes.training import Curve, modes, train
from .peers import AdaLoraTraining, peft_model
from .records import Run, frame, machine
from .sites import SiteWatch, trainable_parameters
from .tasks import TaskKind, task_kind


@dataclass(frozen=True)
class Adapted:
    """A model ready to train.

    Attributes:
        model: what trains.
        scored: what is evaluated: the model, or what lies below a penalty in its loss.
        plan: of cntlora, if it took part.
        seconds: from the pretrained model to here.
        adalora: what AdaLoRA needs in training, if it is the arm.
    """

    model: nn.Module
    scored: nn.Module
    plan: InitPlan | None
    seconds: float
    adalora: AdaLoraTraining | None = None


def run_one(run: Run) -> dict[str, Any]:
    """Trains one arm and gives its record.

    Every arm of a seed has the same head, the same draw of A, the same batches in the same order and the same dropout.

    Raises:
        ValueError, RuntimeError: if the arm cannot be initialised or trained.
    """
    kind = task_kind(run.experiment.task.name)
    task = kind.make(run.experiment.task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, batches = task.build_model(run.seed).to(device), task.train_batches(run.seed)
    first = to_device(next(iter(batches)), device)
    before = _loss(model, first)
    adapted = adapt(run, kind, task.targets, model, batches)
    start = {"loss_before": before, "loss_after": _loss(adapted.scored, first)}
    watch = SiteWatch.at_start(adapted.model, adapted.plan, first, run.arm)
    trained = trainable_parameters(adapted.model, adapted.plan)
    recorder = Recorder(adapted, kind, list(task.eval_batches()))
    curve = _train(run, recorder, batches)
    return {
        **frame(run, machine()),
        "init_seconds": adapted.seconds,
        "peak_memory_mib": peak_memory_mib(),
        "trainable_parameters": trained,
        "start": start,
        "sites": watch.at_end(adapted.model),
        **recorder.outcome(curve),
    }


def adapt(
    run: Run, kind: TaskKind, targets: Sequence[str], model: nn.Module, batches: Iterable[Mapping[str, Any]]
) -> Adapted:
    """The arm's adapter on the pretrained model, initialised and timed."""
    arm, e = run.arm, run.experiment
    if arm.full:
        return Adapted(model, model, None, 0.0)
    options, config = _lora_options(run, kind, targets), run.init_config()
    device = next(model.parameters()).device
    some = [to_device(batch, device) for batch in itertools.islice(batches, e.num_batches)]
    torch.manual_seed(run.seed)  # A, and what PEFT's initialisations draw
    start, plan = time.perf_counter(), None
    if arm.peft:
        adapted = peft_model(arm.peft, model, options, some, e.train.steps)
    else:
        adapted = get_peft_model(model, LoraConfig(**options))  # type: ignore[assignment,arg-type]
    if config is not None:
        plan = compute_plan(adapted, some, config, progress=False)
        apply_plan(adapted, plan)
    seconds = time.perf_counter() - start
    if arm.peft == "adalora":
        adalora = AdaLoraTraining(adapted)
        return Adapted(adapted, adalora.inner, plan, seconds, adalora)
    return Adapted(adapted, adapted, plan, seconds)


def _lora_options(run: Run, kind: TaskKind, targets: Sequence[str]) -> dict[str, Any]:
    """What `peft.LoraConfig` gets."""
    lora = run.experiment.lora
    return {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets or targets) or None,
        "task_type": kind.peft_type,
        **run.arm.lora,
    }


def _train(run: Run, recorder: Recorder, batches: Iterable[Mapping[str, Any]]) -> Curve:
    """The training, the same for every arm."""
    settings = run.experiment.train
    torch.manual_seed(run.seed)  # dropout
    with recorder.around():
        return train(
            recorder.adapted.model,
            batches,
            steps=settings.steps,
            learning_rate=run.learning_rate,
            weight_decay=settings.weight_decay,
            warmup=settings.warmup,
            max_grad_norm=settings.max_grad_norm,
            evaluate=recorder.evaluate,
            eval_at=settings.eval_at,
            progress=recorder.progress,
        )


@dataclass
class Recorder:
    """Collects times, losses and scores while a model trains."""

    adapted: Adapted
    kind: TaskKind
    held_out: list[Any]
    seconds: list[float] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    evaluating: float = 0.0  # seconds that do not count as training
    began: float = 0.0

    def around(self) -> AbstractContextManager[None]:
        """To be entered around the training."""
        self.began = time.perf_counter()
        return self.adapted.adalora.running() if self.adapted.adalora else nullcontext()

    def progress(self, step: int, loss: float) -> None:
        """After every update."""
        self.seconds.append(time.perf_counter() - self.began - self.evaluating)

    def evaluate(self, model: nn.Module) -> tuple[float, float, float]:
        """Scores the model by the task's metrics, whatever they are; the loop's own record of them is not used."""
        start = time.perf_counter()
        metrics = self.kind.evaluate(self.adapted.scored, self.held_out)
        spent = self.seconds[-1] if self.seconds else 0.0
        self.evaluations.append({"step": len(self.seconds), "seconds": spent, **metrics})
        self.evaluating += time.perf_counter() - start
        return metrics["loss"], math.nan, math.nan

    def outcome(self, curve: Curve) -> dict[str, Any]:
        """The measured part of the record."""
        losses = curve.losses
        if self.adapted.adalora:
            losses = self.adapted.adalora.losses[: len(curve.losses)]
        finished = not curve.diverged
        return {
            "status": "finished" if finished else "diverged",
            "error": None if finished else f"the loss was not finite at step {len(losses) + 1}",
            "train_seconds": self.seconds[-1] if self.seconds else 0.0,
            "mean_loss": math.fsum(losses) / len(losses) if finished else None,
            "losses": losses,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
        }


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Loss of one batch without dropout."""
    with modes(model, training=False), torch.no_grad():
        return float(model(**batch).loss)


def peak_memory_mib() -> float:
    """The most memory that this process has used: of the GPU if there is one, else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere
