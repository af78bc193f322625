"""One run: a model, an arm, its initialisation, training, scores and samples, as one record."""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ...atomic import write_atomically
from ...data.batches import to_device
from ...files.class_names import class_names, write_names
from ...report import InitReport
from ..recipes.scoring import modes
from ..recipes.task import Task
from ..recipes.trackers import Tracked
from ..recipes.train_settings import TrainSettings
from ..recipes.training import Curve, train
from ..record import Outcome, RunRecord, Sample, StartLosses
from .adapting import Adapted, adapt
from .environment import machine
from .runs import Run, checkpoints_of, frame, remove_checkpoints
from .sites import SiteWatch, trainable_parameters
from .tasks import make_task


def run_one(run: Run, out: Path) -> RunRecord:
    """Do as `run_kept`, and remove the checkpoints, which are of no use to who does not keep the record either."""
    record = run_kept(run, out)
    remove_checkpoints(out, run, record)
    return record


def run_kept(run: Run, out: Path) -> RunRecord:
    """Train one arm and give its record; its checkpoints stay until the caller has written that.

    Every arm of a seed has the same head, the same draw of A, the same batches in the same order and the same dropout.

    Args:
        run: what to train.
        out: folder of the records: samples, checkpoint and adapter of the run lie in its subfolder `run.name`.

    Raises:
        ValueError, RuntimeError: if the arm cannot be initialised or trained.
    """
    task = make_task(run.experiment.task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = task.build_model(run.seed).to(device)
    first = to_device(next(iter(task.train_batches(run.seed))), device)
    batches = task.train_batches(run.seed)  # anew: what depends on the pass over the data begins with the first
    settings = run.experiment.train.in_updates(batches)
    before = _loss(model, first)
    adapted = adapt(run, task, model, task.init_batches(run.seed), settings.steps or 0)
    start: StartLosses = {"loss_before": before, "loss_after": _loss(adapted.scored, first)}
    watch = SiteWatch.at_start(adapted.model, adapted.plan, first, run.arm)
    trained = trainable_parameters(adapted.model, adapted.plan)
    place = RunFolder(out, run)
    place.prepare()
    curve = _train(run, task, adapted, batches, settings, place, told_of_start(run, out, adapted, watch))
    if not curve.diverged:
        place.keep(task, adapted)  # where a checkpoint of the last step was there, which no step follows
    record: RunRecord = {
        **frame(run, machine()),
        "init_seconds": adapted.seconds,
        "peak_memory_mib": peak_memory_mib(),
        "trainable_parameters": trained,
        "start": start,
        "sites": watch.at_end(adapted.model),
        **outcome(curve, adapted, run.experiment.train.gradient_accumulation),
    }
    return record


@dataclass
class RunFolder:
    """The subfolder of a run: `step-NNNN/` with samples, `adapter/`, and `checkpoint/` until it has finished.

    Attributes:
        kept: whether this process has written the trained adapter; one that is there may be of another.
    """

    out: Path
    run: Run
    kept: bool = False

    @property
    def path(self) -> Path:
        """The subfolder."""
        return self.out / self.run.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the Trainer's checkpoints."""
        return checkpoints_of(self.out, self.run)

    def prepare(self) -> None:
        """Keep the checkpoint of an interrupted run of the same settings, and remove all else that is there."""
        config, marker = json.dumps(self.run.config(), sort_keys=True), self.checkpoints / "config.json"
        try:
            same = marker.read_text() == config
        except OSError:
            same = False
        if not same:
            shutil.rmtree(self.path, ignore_errors=True)
        if self.run.experiment.train.save_every:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(marker, config.encode())

    def keep(self, task: Task, adapted: Adapted) -> None:
        """Write the trained adapter once, where it is wanted."""
        if self.run.save_adapter and not self.run.arm.full and not self.kept:
            _save(task, adapted, self.path / "adapter")
            self.kept = True

    def sample(self, task: Task, model: nn.Module, step: int) -> list[Sample]:
        """The task's samples; their files are named relative to the records' folder."""
        folder = self.path / f"step-{step:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        with modes(model, training=False), torch.no_grad(), _same_random_state():
            made = task.sample(model, step, folder)
        _remove_if_empty(folder)
        inside = folder.relative_to(self.out).as_posix()
        return [{**one, "file": one["file"] and f"{inside}/{one['file']}"} for one in made]


def told_of_start(run: Run, out: Path, adapted: Adapted, watch: SiteWatch) -> Tracked:
    """Give what trackers are told of a run before its first update: its names, and how it was initialised."""
    sites = watch.facts.values()
    start = {"init/seconds": adapted.seconds}
    if ranks := [site["rank"] for site in sites]:
        start |= {"init/rank_total": sum(ranks), "init/rank_min": min(ranks), "init/rank_max": max(ranks)}
    norms = [(site["start_norm"], site["weight_norm"]) for site in sites]
    if sizes := [start_norm / norm for start_norm, norm in norms if norm and start_norm is not None]:
        start |= {"init/start_norm_mean": math.fsum(sizes) / len(sizes), "init/start_norm_max": max(sizes)}
    report = f"{run.arm.label} ({run.method})"
    if adapted.plan:
        report += f"\n{InitReport.of(adapted.plan)}"
    return Tracked(run.experiment.name, run.name, out / "tensorboard", start, report)


def _train(
    run: Run,
    task: Task,
    adapted: Adapted,
    batches: Iterable[Any],
    settings: TrainSettings,
    place: RunFolder,
    tracked: Tracked,
) -> Curve:
    """The training, the same for every arm."""
    settings = replace(
        settings,
        layer_decay=settings.layer_decay if run.arm.full else 0.0,
        # AdaLoRA keeps its importance scores outside of the weights, so it begins anew
        save_every=0 if adapted.adalora else settings.save_every,
    )

    def evaluate(model: nn.Module) -> dict[str, float]:
        with _same_random_state():
            return task.evaluate(adapted.scored, task.eval_batches())

    def after(step: int, loss: float) -> None:
        if step == settings.steps:  # before the last evaluation, which may fail
            with _same_random_state():
                place.keep(task, adapted)

    torch.manual_seed(run.seed)  # dropout
    with adapted.adalora.running() if adapted.adalora else nullcontext():
        return train(
            adapted.model,
            batches,
            settings,
            learning_rate=run.learning_rate,
            evaluate=evaluate,
            sample=lambda model, step: place.sample(task, adapted.scored, step),
            progress=after,
            folder=place.checkpoints,
            tracked=tracked,
        )


def outcome(curve: Curve, adapted: Adapted, accumulation: int) -> Outcome:
    """The measured part of the record."""
    losses = curve.losses
    if adapted.adalora:  # its own, without the penalty: one a batch
        parts = adapted.adalora.losses
        means = [math.fsum(parts[i : i + accumulation]) / accumulation for i in range(0, len(parts), accumulation)]
        losses = means[: len(curve.losses)]
    finished = not curve.diverged
    return {
        "status": "finished" if finished else "diverged",
        "error": None if finished else f"the loss was not finite at step {len(losses) + 1}",
        "train_seconds": curve.seconds,
        "mean_loss": math.fsum(losses) / len(losses) if finished else None,
        "losses": losses,
        "seconds": curve.times,
        "evaluations": [{"step": e.step, "seconds": e.seconds, **e.metrics} for e in curve.evaluations],
        "samples": curve.samples,
    }


def _save(task: Task, adapted: Adapted, folder: Path) -> None:
    """The trained adapter as the task writes it; AdaLoRA's in PEFT's own format, which alone can hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    if adapted.adalora:
        adapted.adalora.model.save_pretrained(folder)
        write_names(folder, class_names(adapted.adalora.model, load_file(folder / "adapter_model.safetensors")))
    else:
        task.save(adapted.model, folder)


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Loss of one batch without dropout."""
    with modes(model, training=False), torch.no_grad():
        return float(model(**batch).loss)


def _same_random_state() -> Any:
    """Torch's generators are the same after the block: a look at the model changes no training."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def peak_memory_mib() -> float:
    """The most memory that this process has used: of the GPU if there is one, else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere
