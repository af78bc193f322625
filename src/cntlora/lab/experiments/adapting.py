"""An arm's adapter on a pretrained model: put in, initialised and timed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ...analysis.head import fit_head
from ...analysis.learning_rate import fit_learning_rate
from ...api import apply_plan, compute_plan
from ...data.batches import to_device
from ...execution.head import NotFittedError
from ...messages import warn_caller
from ...plan import InitPlan
from ..recipes.task import Task
from .controls import read
from .peers import AdaLoraTraining, peft_model
from .runs import Run


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


def adapt(run: Run, task: Task, model: nn.Module, batches: Iterable[Mapping[str, Any]], steps: int) -> Adapted:
    """The arm's adapter on the pretrained model.

    Args:
        run: gives arm, seed and settings.
        task: gives what LoRA adapts unless the settings do.
        model: the pretrained one; it is changed.
        batches: what data-driven initialisations read; the first `num_batches` are taken.
        steps: updates of the training that follows (AdaLoRA plans with them).
    """
    arm, e = run.arm, run.experiment
    if arm.full:
        return Adapted(model, model, None, 0.0)
    options, config = lora_options(run, task), run.init_config()
    device = next(model.parameters()).device
    count = e.num_batches if config is None else config.num_batches
    used = steps * e.train.gradient_accumulation
    some = [to_device(batch, device) for batch in read(batches, count, used, task, run.seed, **arm.data)]
    torch.manual_seed(run.seed)  # A, and what PEFT's initialisations draw
    start, plan = time.perf_counter(), None
    if arm.peft:
        adapted = peft_model(arm.peft, model, options, some, steps)
    else:
        adapted = get_peft_model(model, LoraConfig(**options))  # type: ignore[assignment,arg-type]
    if arm.fit_head:
        _fit_head(adapted, some)
    if config is not None:
        plan = compute_plan(adapted, some, replace(config, num_batches=len(some)), progress=False)
        apply_plan(adapted, plan)
    if arm.fitted and (config is None or config.learning_rate is None):
        fit_learning_rate(adapted, run.learning_rate, some)
    seconds = time.perf_counter() - start
    if arm.peft == "adalora":
        adalora = AdaLoraTraining(adapted)
        return Adapted(adapted, adalora.inner, plan, seconds, adalora)
    return Adapted(adapted, adapted, plan, seconds)


def _fit_head(model: nn.Module, batches: list[Any]) -> None:
    """Fit a new head where there is one that can be fitted, as where no method is named."""
    try:
        fit_head(model, batches, num_batches=len(batches))
    except NotFittedError as error:
        warn_caller(f"+head: the head is left as it is: {error}")


def lora_options(run: Run, task: Task) -> dict[str, Any]:
    """Return the arguments of `peft.LoraConfig`."""
    lora = run.experiment.lora
    rank = run.arm.lora.get("r", lora.rank)
    return {
        "r": rank,
        "lora_alpha": lora.alpha * rank / lora.rank,
        "lora_dropout": lora.dropout,
        "target_modules": _targets(lora.targets or task.targets),
        "bias": lora.bias,
        "modules_to_save": list(task.modules_to_save) or None,
        "task_type": task.peft_type,
        **run.arm.lora,
    }


def _targets(names: tuple[str, ...]) -> list[str] | str | None:
    """Return the targets as PEFT wants them: names, or one text for a regular expression or "all-linear"."""
    if len(names) == 1 and names[0].startswith("re:"):
        return names[0].removeprefix("re:")
    return "all-linear" if names == ("all-linear",) else list(names) or None
